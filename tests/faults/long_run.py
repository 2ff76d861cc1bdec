"""A run of thousands of epochs: does anything grow, compile again, or get slower?

    python -m tests.faults.long_run --epochs=2500 --out=samples.jsonl

is one run: 4 steps an epoch, each followed by the online evaluation, the watch, a row of metrics
and a checkpoint. `rows` starts it as a process of its own and judges what it wrote.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tests.faults.cases import small_dataset
from tests.faults.processes import run_command
from tests.faults.table import Row, row_of
from tests.tiny import tiny_config

PROMISE = 8
STEPS_PER_EPOCH = 4
# Of 10,000 pieces, a step each on a CPU; and of what a suite can wait for.
LONG, SHORT = 2500, 30
# A save or a read under way holds files and threads for a while: the fewest of so many epochs.
_WINDOW = 10
_SETTLED = 20
# The pools of XLA and tensorstore start their threads one by one, whenever all are at work: of two
# runs of 2,500 epochs one had its last thread only after the 250th.
_POOLS_FULL = 1250
_BLOCKS = 25
# tensorstore 0.1.71 to 0.1.86 never frees the texts that it converts to JSON, and orbax 0.12.8
# makes some for every save and for every array in it. Saves alone, without any training, left 54
# KiB each with 81 arrays, as the tiny run has, and 35 KiB with 27.
_KEPT_BY_A_CHECKPOINT = 60 * 1024
_EVENTS = {
    # Also counts programs that the persistent cache had.
    "/jax/core/compile/backend_compile_duration": "compiled",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/compilation_cache/cache_hits": "cache_hits",
}

Samples = dict[str, np.ndarray]


# --- one run ------------------------------------------------------------------------------------


def _main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=LONG)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a line for every epoch")
    parser.add_argument("--core", type=int, help="the only one that the run may use")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    with (
        tempfile.TemporaryDirectory(dir=arguments.out.parent) as folder,
        arguments.out.open("w", buffering=1) as out,
    ):
        _train(arguments.epochs, pathlib.Path(folder), out)


def _train(epochs: int, folder: pathlib.Path, out) -> None:
    """Trains, and writes a line after every epoch: what the process holds, has compiled, took."""
    import jax

    from jepa_jax import train
    from jepa_jax.metrics import MetricsWriter

    counts: collections.Counter[str] = collections.Counter()

    def count(event, *args, **kwargs):
        if event in _EVENTS:
            counts[_EVENTS[event]] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    write, seconds = MetricsWriter.write, 0.0
    time_fixed_work = _fixed_work()

    def write_and_sample(writer, row):
        nonlocal seconds
        write(writer, row)
        taken = {
            "step_seconds": row["train_seconds"] - seconds,
            "fixed_seconds": min(time_fixed_work() for _ in range(3)),
        }
        seen = {name: counts[name] for name in _EVENTS.values()}
        out.write(json.dumps({**seen, **_held(), **taken}) + "\n")
        seconds = row["train_seconds"]

    MetricsWriter.write = write_and_sample
    config = tiny_config(optim__epochs=float(epochs))
    train.train_and_evaluate(config, folder, dataset=small_dataset())


def _fixed_work() -> Callable[[], float]:
    """Compiles a gradient of a convolution; what comes back times it once.

    A shared machine's own speed moves by several percent within minutes, and that of both runs
    together: what is judged is the time of the steps against that of this.
    """
    import jax
    import jax.numpy as jnp

    images = jnp.ones((100, 32, 32, 3), jnp.float32)

    def loss(kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        maps = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return jnp.sum(jnp.square(maps))

    work, kernel = jax.jit(jax.grad(loss)), jnp.ones((3, 3, 3, 16), jnp.float32)
    jax.block_until_ready(work(kernel))

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(work(kernel))
        return time.perf_counter() - began

    return timed


def _held() -> dict[str, int]:
    """What this process has open and takes (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    resident = next(line for line in status if line.startswith("VmRSS:"))
    return {
        "open_files": len(os.listdir("/proc/self/fd")),
        "python_threads": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "rss_bytes": int(resident.split()[1]) * 1024,
    }


# --- the judgement ------------------------------------------------------------------------------


def read_samples(path: pathlib.Path) -> Samples:
    """Name to float64 [epochs]."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: np.array([float(line[name]) for line in lines]) for name in lines[0]}


def growth(values: np.ndarray, since: int) -> str | None:
    """What values [epochs] have grown since an epoch: the fewest of ten, then and at the end."""
    then, now = values[since - _WINDOW : since].min(), values[-_WINDOW:].min()
    return f"{then:g} at epoch {since}, {now:g} at epoch {len(values)}" if now > then else None


def compiled_again(samples: Samples) -> str | None:
    """What was compiled after the first epoch, or found in the cache of programs."""
    late = {name: samples[name][-1] - samples[name][0] for name in _EVENTS.values()}
    return ", ".join(f"{count:g} {name}" for name, count in late.items() if count) or None


def drift(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """How far the second halves of two equal runs move, and how far the runs move apart.

    Both are cut into 25 blocks, whose medians leave out single disturbances.

    Returns:
      (change of a least-squares line from end to end, mean of both runs; half the width of its
      95 % interval, by a bootstrap over blocks of the residuals; largest distance of the two runs
      in a block, each about its own mean).
    """
    blocks = np.stack([_block_medians(run[len(run) // 2 :]) for run in (first, second)])
    time = np.linspace(-0.5, 0.5, blocks.shape[1])
    slopes = (blocks - blocks.mean(axis=1, keepdims=True)) @ time / (time @ time)
    residuals = blocks - blocks.mean(axis=1, keepdims=True) - slopes[:, None] * time
    # Neighbouring blocks are alike (memory moves in stairs): three are drawn together.
    random, length = np.random.default_rng(0), 3
    starts = random.integers(0, _BLOCKS - length + 1, (2000, 2, -(-_BLOCKS // length)))
    picked = (starts[..., None] + np.arange(length)).reshape(2000, 2, -1)[..., :_BLOCKS]
    drawn = np.take_along_axis(np.broadcast_to(residuals, (2000, 2, _BLOCKS)), picked, axis=2)
    noise = (drawn @ time / (time @ time)).mean(axis=1)
    apart = np.abs(np.diff(blocks - blocks.mean(axis=1, keepdims=True), axis=0)).max()
    return float(slopes.mean()), float(1.96 * noise.std()), float(apart)


def _block_medians(values: np.ndarray) -> np.ndarray:
    return np.array([np.median(block) for block in np.array_split(values, _BLOCKS)])


def _has_drifted(change: float, interval: float, apart: float) -> bool:
    # More than chance, and more than the two runs differ from each other.
    return change > interval and change > apart


# --- the rows of the table ----------------------------------------------------------------------


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Runs and judges them.

    Args:
      is_long: 10,000 steps, twice at once on a core each; else one run of 30 epochs, which is too
        short for the threads of pools and for the slopes of memory and time.
      folder: for what they write.
    """
    epochs, cores = (LONG, [0, 1]) if is_long else (SHORT, [None])
    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        runs = list(pool.map(lambda core: _run(epochs, core, folder), cores))
    yield from judge(runs)


def judge(runs: Sequence[Samples | str]) -> Iterator[Row]:
    """The rows of one or two equal runs: of each its samples, or how it failed."""
    failed = [run for run in runs if isinstance(run, str)]
    runs = [run for run in runs if not isinstance(run, str)]
    epochs = len(runs[0]["threads"]) if runs else 0
    what = f"{epochs:,} epochs, {STEPS_PER_EPOCH * epochs:,} chunks, a checkpoint after each"
    held = [("open_files", "open files", _SETTLED), ("python_threads", "Python threads", _SETTLED)]
    if epochs >= 2 * _POOLS_FULL:
        held.append(("threads", "threads of the process", _POOLS_FULL))
    for name, text, since in held:
        outcomes = [*failed, *(growth(run[name], since) for run in runs)]
        yield row_of(PROMISE, f"{what}: more {text} than at epoch {since}?", outcomes)
    again = [*failed, *map(compiled_again, runs)]
    yield row_of(PROMISE, f"{what}: anything compiled after the first?", again)
    if len(runs) < 2:
        return
    memory = [run["rss_bytes"] / 2**20 for run in runs]
    allowed = _KEPT_BY_A_CHECKPOINT * (epochs - epochs // 2) / 2**20
    rest = f", {allowed:.1f} allowed to tensorstore"
    yield _drift_row(f"{what}: host memory", memory, "MiB", allowed, rest)
    paces = [run["step_seconds"] / run["fixed_seconds"] for run in runs]
    paces = [100 * pace / np.median(pace) for pace in paces]
    yield _drift_row(f"{what}: time of the steps against a fixed program's", paces, "%", 0.0, "")


def _drift_row(
    what: str, values: Sequence[np.ndarray], unit: str, allowed: float, rest: str
) -> Row:
    """Whether two runs rise over their second halves by more than is allowed, chance or apart."""
    change, interval, apart = drift(*values)
    what = f"{what}, over the second half {change:+.2f} ± {interval:.2f} {unit}"
    what += f", the two runs up to {apart:.2f} {unit} apart{rest}"
    is_bad = _has_drifted(change - allowed, interval, apart)
    return row_of(PROMISE, what, [what if is_bad else None])


def _run(epochs: int, core: int | None, folder: pathlib.Path) -> Samples | str:
    out = folder / f"long_run_{'all' if core is None else core}.jsonl"
    arguments = [f"--epochs={epochs}", f"--out={out}"]
    if core is not None:
        arguments.append(f"--core={core}")
    ended = run_command(arguments, module="tests.faults.long_run", timeout=600 + 4 * epochs)
    if ended.code:
        return f"ended with {ended.code}: {ended.err.strip().splitlines()[-1:]}"
    return read_samples(out)


if __name__ == "__main__":
    _main()
