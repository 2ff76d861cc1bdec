"""VICReg pretraining in PyTorch, as fast as PyTorch does it: the other side of a fair benchmark.

    python -m benchmarks.torch_peer --recipe recipe.json --mode compile --dtype bfloat16 \\
        --memory-format channels_last --augment device

Network, loss, optimiser, online probe and augmentation are those of jepa_jax, as
tests/test_torch_peer.py checks. Images are noise from a fixed seed: no time depends on what is in
an image. The last line of stdout is a JSON object; an error is one line and exit code 2.

Needs PyTorch and numpy alone; `--augment loader` torchvision and Pillow too.
"""

import argparse
import contextlib
import ctypes
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def _at_least(least: int):
    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"number (at least {least})"
    return number


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


_positive.__name__ = "number (above 0)"


_MODE_HELP = "of mixed, torch.compile makes augmentation and LARS; of compile, the network too"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks.torch_peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, help="a JSON file with the fields of Recipe")
    parser.add_argument(
        "--mode", choices=("eager", "mixed", "compile"), default="eager", help=_MODE_HELP
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), default="contiguous"
    )
    parser.add_argument("--augment", choices=("none", "device", "loader"), default="none")
    parser.add_argument("--workers", type=_at_least(0), default=2, help="of --augment loader")
    parser.add_argument("--warmup", type=_at_least(1), default=5, help="steps not timed, at least")
    parser.add_argument(
        "--seconds", type=_positive, default=2.0, help="of one timing, filled with steps"
    )
    parser.add_argument("--repeats", type=_at_least(1), default=5, help="timings")
    parser.add_argument("--threads", type=_at_least(1), help="of a CPU; PyTorch's choice if none")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args(argv)


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def _keep_freed_memory() -> None:
    """Makes glibc reuse large blocks, as every allocator recommended for PyTorch on CPUs does.

    By default it hands them back to the system, which clears them anew in every step: measured,
    a tenth to a fifth of the speed.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _device(name: str, dtype: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        fail("this PyTorch sees no CUDA device")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        # TF32 everywhere in float32; beside bfloat16 only the loss is left, exact as in jepa_jax.
        torch.set_float32_matmul_precision("high" if dtype == "float32" else "highest")
    else:
        _keep_freed_memory()
    return device


def _described(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _peak_memory(device: Any) -> int:
    """Bytes: PyTorch's own on a GPU, the whole process's on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _batches(recipe, arguments, device, memory_format) -> Iterator[Any]:
    from benchmarks.torch_peer import batches

    if arguments.augment == "none":
        return batches.fixed(recipe, device, memory_format)
    if arguments.augment == "device":
        compiled = arguments.mode != "eager"
        return batches.resident(recipe, device, memory_format, compiled=compiled)
    return batches.loaded(recipe, device, memory_format, workers=arguments.workers)


def time_steps(
    run: Callable[[int], Any], *, warmup: int, period: int, seconds: float, repeats: int
) -> dict[str, Any]:
    """Times steps once they have warmed up.

    Args:
      run: does so many steps, waits for them and returns the last loss.
      warmup: steps not timed, at least so many.
      period: steps after which all is as it was before them; whatever is counted is a multiple.
      seconds: that a value takes, at least.
      repeats: values.

    Returns:
      step_seconds (each value the mean over its steps), warmup_steps, steps_in_a_value,
      first_step_seconds, and the first and the last loss.
    """

    def seconds_of(num_steps: int) -> tuple[float, Any]:
        began = time.perf_counter()
        loss = run(num_steps)
        return time.perf_counter() - began, loss

    warmup = period * math.ceil(warmup / period)
    first_step_seconds, first_loss = seconds_of(1)
    if warmup > 1:
        run(warmup - 1)
    timed = [seconds_of(period)]
    num_periods = math.ceil(seconds / max(timed[0][0], 1e-6))
    if num_periods > 1:
        timed = []
    while len(timed) < repeats:
        timed.append(seconds_of(num_periods * period))
    return {
        "step_seconds": [value / (num_periods * period) for value, _ in timed],
        "warmup_steps": warmup,
        "steps_in_a_value": num_periods * period,
        "first_step_seconds": first_step_seconds,
        "loss": {"first": float(first_loss), "last": float(timed[-1][1])},
    }


def _measure(recipe, arguments) -> dict[str, Any]:
    import torch

    from benchmarks.torch_peer.batches import loader_period
    from benchmarks.torch_peer.recipe import PeerError
    from benchmarks.torch_peer.training import Trainer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = _device(arguments.device, arguments.dtype)
    memory_format = {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }[arguments.memory_format]
    trainer = Trainer(
        recipe,
        mode=arguments.mode,
        dtype=arguments.dtype,
        memory_format=memory_format,
        device=device,
    )
    batches = _batches(recipe, arguments, device, memory_format)

    def run(num_steps: int) -> Any:
        for _ in range(num_steps):
            loss = trainer.step(*next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return loss

    is_loaded = arguments.augment == "loader"
    measured = time_steps(
        run,
        warmup=arguments.warmup,
        period=loader_period(recipe, arguments.workers) if is_loaded else 1,
        seconds=arguments.seconds,
        repeats=arguments.repeats,
    )
    if not all(map(math.isfinite, measured["loss"].values())):
        raise PeerError(f"the loss is not finite: {measured['loss']}")
    return {
        "device": _described(device),
        "images_per_second": [recipe.batch_size / value for value in measured["step_seconds"]],
        "peak_memory_bytes": _peak_memory(device),
        **measured,
    }


def _versions() -> dict[str, str]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if "torchvision" in sys.modules:
        versions["torchvision"] = sys.modules["torchvision"].__version__
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def main(argv: list[str] | None = None) -> None:
    """Measures one variant and prints it."""
    arguments = _parse(argv)
    try:
        import torch

        from benchmarks.torch_peer.recipe import PeerError, load_recipe
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install -e '.[parity]'")
    try:
        recipe = load_recipe(arguments.recipe)
        measured = _measure(recipe, arguments)
    except PeerError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install -e '.[parity]'")
    except torch.OutOfMemoryError:
        fail(f"batch size {recipe.batch_size} does not fit into the device's memory")
    except torch._dynamo.exc.TorchDynamoException as error:
        fail(f"torch.compile failed: {str(error).strip().splitlines()[0]}")
    variant = {
        "mode": arguments.mode,
        "dtype": arguments.dtype,
        "memory_format": arguments.memory_format,
        "augment": arguments.augment,
        "workers": arguments.workers if arguments.augment == "loader" else 0,
    }
    result = {
        "framework": "torch",
        "versions": _versions(),
        "variant": variant,
        "batch_size": recipe.batch_size,
        **measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
