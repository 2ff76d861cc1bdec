"""The same command twice is the same bits; the data's order and draws are the same everywhere.

`python -m tests.faults.determinism` prints, as JSON, what must not depend on how XLA compiles.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.faults.cases import small_arrays
from tests.faults.processes import TINY, run_command, with_small_cifar
from tests.faults.table import Row, row_of

PROMISE = 7
# (seed, images, batch size); CIFAR-10's own size is one of them.
_ORDERS = ((0, 400, 100), (1, 50_000, 96), (2**31, 12_345, 256))
_EPOCHS = (0, 7)
# Of the int32 indices, little-endian. Made, and to be made again, by
#   python -m tests.faults.determinism
# with jax 0.10.2 and 0.10.0 on an x86 CPU. Only whole numbers are in them: another figure means
# that every run of before would be drawn otherwise.
GOLDEN_ORDERS = {
    "seed 0, 400 images by 100, epoch 0": (
        "7c2fef4d8da6b74933a572f1de69a68679c234fc0e79f9633461ef0ad34bf7ab"
    ),
    "seed 0, 400 images by 100, epoch 7": (
        "205dca9d3f86f68849c533ee23718bed3380242471430dc1411d044bfa180e68"
    ),
    "seed 1, 50000 images by 96, epoch 0": (
        "daddbc25f6642763047b1efa0f15a12fcd90d9d0c4e028c9b5e8befce35403c4"
    ),
    "seed 1, 50000 images by 96, epoch 7": (
        "713bbe9a82f8b630eef28ada470f24c33d4c00852c33f0de5388f60242e51185"
    ),
    "seed 2147483648, 12345 images by 256, epoch 0": (
        "f9b250c72d4403d626166042db19b2c50484ef7726892659c4b6b64c1bd2e340"
    ),
    "seed 2147483648, 12345 images by 256, epoch 7": (
        "ce0085c7a6f9a079fdde9bed4e8fb5f28174164268cd707f4b86c7edb8c096a9"
    ),
}
# What changes a program and must not change what is drawn.
_FLAGS = {
    "as it is": "",
    "without optimisation": "--xla_backend_optimization_level=0",
    "on two devices": "--xla_force_host_platform_device_count=2",
    "for an older processor": "--xla_cpu_max_isa=SSE4_2",
}
_TIMES = {"images_per_second", "train_seconds", "total_seconds", "seconds"}


def drawn() -> dict[str, str]:
    """SHA-256, by name, of orders of the data, and of the first batch's boxes and choices."""
    import jax

    from jepa_jax.data import epoch_order
    from jepa_jax.train_step import stream_key

    found = {}
    for seed, num_images, batch_size in _ORDERS:
        for epoch in _EPOCHS:
            key = stream_key(np.uint32(seed), "order", np.uint32(epoch))
            order = np.asarray(epoch_order(key, num_images, batch_size), "<i4")
            name = f"seed {seed}, {num_images} images by {batch_size}, epoch {epoch}"
            found[name] = hashlib.sha256(order.tobytes()).hexdigest()
    # The last device is another one than where arrays lie without being asked.
    with jax.default_device(jax.devices()[-1]):
        for name, numbers in _first_views().items():
            found[name] = hashlib.sha256(np.asarray(numbers, "<i4").tobytes()).hexdigest()
    return found


def _first_views() -> dict[str, Any]:
    """Whole numbers of the views of step 0: boxes, orders of the jitter, and yes or no."""
    import jax
    import jax.numpy as jnp

    from jepa_jax.augment import random_crop_box, random_jitter_parameters
    from jepa_jax.train_step import stream_key

    @jax.vmap
    def numbers(key):
        # The three keys of augment.random_view.
        crop_key, jitter_key, choice_key = jax.random.split(key, 3)
        probabilities = jnp.array([0.8, 0.2, 0.1, 0.5], jnp.float32)
        choices = jax.random.uniform(choice_key, (4,)) < probabilities
        order = random_jitter_parameters(jitter_key)["order"]
        return jnp.stack(random_crop_box(crop_key, 32, 32)), order, choices

    keys = jax.random.split(stream_key(np.uint32(0), "views", np.uint32(0)), 2 * 96)
    names = ("boxes of step 0", "orders of the jitter of step 0", "choices of step 0")
    return dict(zip(names, jax.jit(numbers)(keys), strict=True))


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Runs commands as processes.

    Args:
      is_long: ten commands, each twice resident and once streamed, and every way of compiling; else
        one command twice, and one way of compiling.
      folder: for data and runs.
    """
    flags = _FLAGS
    if not is_long:
        names = ("without optimisation", "on two devices")
        flags = {" and ".join(names): " ".join(_FLAGS[name] for name in names)}
    yield from _draws(flags)
    data = with_small_cifar(small_arrays(), folder / "data")
    again, streamed = [], []
    for seed in range(10 if is_long else 1):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(_run, folder / f"{seed}-{name}", seed, data) for name in "ab"]
        first, second = (run.result() for run in runs)
        again.append(_difference(first, second))
        if is_long:
            placed = "--config.data.placement=stream"
            streamed.append(_difference(first, _run(folder / f"{seed}-c", seed, data, placed)))
    what = "compared: parameters, metrics and evaluation, bit for bit"
    yield row_of(PROMISE, f"the same command in two processes; {what}", again)
    if is_long:
        yield row_of(PROMISE, f"data resident and streamed; {what}", streamed)


def _draws(flags: Mapping[str, str]) -> Iterator[Row]:
    """What processes with these XLA_FLAGS draw, against what is stored and what this one draws."""
    orders, views, own = [], [], drawn()
    for name, flag in flags.items():
        ended = run_command([], module="tests.faults.determinism", XLA_FLAGS=flag)
        found = json.loads(ended.out) if ended.code == 0 else {}
        for drawing, digest in {**own, **GOLDEN_ORDERS}.items():
            failure = f"{name}: {drawing}: {ended.err.strip()[-200:] or 'differs'}"
            outcomes = orders if drawing in GOLDEN_ORDERS else views
            outcomes.append(None if found.get(drawing) == digest else failure)
    how = "programs compiled otherwise"
    yield row_of(PROMISE, f"the data's order against stored digests, {how}", orders)
    yield row_of(PROMISE, f"boxes and choices of a batch's views, {how}", views)


def _run(workdir: pathlib.Path, seed: int, data: pathlib.Path, *given: str) -> dict | str:
    """What a run left behind that must repeat, or how it failed."""
    arguments = [*TINY, f"--config.meta.seed={seed}", *given, f"--workdir={workdir}"]
    ended = run_command(arguments, EBJEPA_DSETS=str(data))
    if ended.code:
        return f"ended with {ended.code}: {ended.err.strip()[-200:]}"
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return {
        "parameters": json.loads((workdir / "summary.json").read_text())["params_digest"],
        "metrics": [_without_times(json.loads(line)) for line in lines],
        "evaluation": _without_times(evaluation),
    }


def _without_times(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in _TIMES}


def _difference(first: dict | str, second: dict | str) -> str | None:
    failed = [run for run in (first, second) if isinstance(run, str)]
    if failed:
        return "; ".join(failed)
    return ", ".join(name for name in first if first[name] != second[name]) or None


if __name__ == "__main__":
    print(json.dumps(drawn(), indent=1))
