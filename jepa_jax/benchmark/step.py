"""The training step as a run runs it: one compiled program over synthetic images."""

import dataclasses
import functools
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jepa_jax.augment import to_float
from jepa_jax.benchmark import roofline
from jepa_jax.benchmark.timing import REPEATS, spread
from jepa_jax.config import compute_dtype, validate
from jepa_jax.data import Dataset, from_arrays
from jepa_jax.errors import TrainingError
from jepa_jax.loop import make_runner
from jepa_jax.plan import Plan, initial_state, make_plan
from jepa_jax.train_step import TrainState

NUM_IMAGES, NUM_TEST, SIDE, _NUM_CLASSES = 50_000, 10_000, 32, 10
# Noise may diverge at a recipe's own rate, and no time depends on it.
RATE = 1e-4
# A value is the mean over as many steps as fill this.
_SECONDS_OF_VALUE = 1.0


def synthetic_dataset(num_images: int = NUM_IMAGES, *, side: int = SIDE) -> Dataset:
    """Random uint8 images and labels by a fixed seed: no figure depends on what is in an image."""
    random = np.random.default_rng(0)

    def split(count):
        images = random.integers(0, 256, (count, side, side, 3), np.uint8)
        return images, random.integers(0, _NUM_CLASSES, count)

    num_test = max(1, num_images * NUM_TEST // NUM_IMAGES)
    names = tuple(str(label) for label in range(_NUM_CLASSES))
    return from_arrays(*split(num_images), *split(num_test), label_names=names)


def fixed_views(
    key: jax.Array, images: jax.Array, *, size: int = SIDE, num_pairs: int = 1
) -> tuple[jax.Array, jax.Array]:
    """In place of `pairs_of_views`: the images themselves, or their corner of size x size.

    In another order the second time, or XLA would see one view and compute it once.
    """
    del key
    images = jnp.concatenate([to_float(images)[:, :size, :size]] * num_pairs)
    return images, images[::-1]


def synthetic_plan(config: ConfigDict, *, num_images: int = NUM_IMAGES, augment: str) -> Plan:
    """The plan of a run of this config over synthetic images.

    Args:
      config: see `configs/`.
      num_images: at least the batch size; of images larger than 32 pixels fewer, as many bytes.
      augment: 'device', the config's own, or 'none'.

    Returns:
      the plan; its learning rate is `RATE`.

    Raises:
      ConfigError: for a config that cannot be run.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    config.optim.lr = RATE
    side = config.data.image_size or SIDE
    fitting = max(config.data.batch_size, NUM_IMAGES * SIDE**2 // side**2)
    num_images = min(num_images, fitting)
    config.data.num_val = min(config.data.num_val, num_images // 2)
    augment_fn = None
    if augment == "none":
        augment_fn = functools.partial(
            fixed_views,
            size=config.data.view_size or side,
            num_pairs=config.data.num_views // 2,
        )
    dataset = synthetic_dataset(num_images, side=side)
    return make_plan(config, pathlib.Path(), dataset, None, None, augment_fn, None)


def _view_side(plan: Plan) -> int:
    images = jax.ShapeDtypeStruct((2, *plan.dataset.image_shape), jnp.uint8)
    return jax.eval_shape(plan.views_fn, jax.random.key(0), images)[0].shape[1]


def dtype_name(config: ConfigDict) -> str:
    """'float32' or 'bfloat16': what the model computes in."""
    return jnp.dtype(compute_dtype(config)).name


def peak_memory() -> dict[str, Any]:
    """Peak bytes of the process on the host, and of arrays on the device (None on a CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        # Bytes on macOS, KiB elsewhere.
        "host_peak_bytes": resident if sys.platform == "darwin" else 1024 * resident,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
    }


def _program_memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    names = ("argument", "output", "alias", "temp")
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in names}


@dataclasses.dataclass
class _Loop:
    """A runner, the state it is at, and the rows of indices it is fed with."""

    runner: Any
    state: TrainState
    order: np.ndarray
    position: int = 0

    def run(self, num_steps: int) -> tuple[float, float]:
        """(seconds a step, last loss) of so many steps, the device waited for."""
        rows = np.arange(self.position, self.position + num_steps) % len(self.order)
        self.position += num_steps
        began = time.perf_counter()
        for state, metrics, count in self.runner.run(self.state, self.order[rows]):
            self.state, last, last_count = state, metrics, count
        jax.block_until_ready((self.state, last))
        seconds = (time.perf_counter() - began) / num_steps
        return seconds, float(np.atleast_1d(last["loss"])[last_count - 1])


def measure_step(plan: Plan, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Times the compiled step of a plan.

    Returns:
      step_seconds and images_per_second with their spread, what a step counts by hand, memory,
      and the first and the last loss.

    Raises:
      ConfigError: if the program needs more memory than the device has.
      TrainingError: if the loss is not finite.
      ConfigError: for an encoder whose layers are not counted, before anything is measured.
    """
    config, batch_size = plan.config, plan.config.data.batch_size
    num_views = config.data.num_views
    counted = roofline.count(
        config.model.to_dict(),
        batch_size=batch_size,
        num_views=num_views,
        bytes_per_value=jnp.dtype(compute_dtype(config)).itemsize,
        image_side=_view_side(plan),
    )
    state = initial_state(plan)
    began = time.perf_counter()
    runner = make_runner(plan, state)
    compile_seconds = time.perf_counter() - began
    piece = runner.piece
    loop = _Loop(runner, state, plan.batches_of(0))
    del state
    _, first_loss = loop.run(piece)
    seconds, _ = loop.run(piece)
    num_steps = piece * max(1, math.ceil(_SECONDS_OF_VALUE / max(seconds * piece, 1e-6)))
    values, losses = zip(*(loop.run(num_steps) for _ in range(repeats)), strict=True)
    if not np.isfinite(losses[-1]):
        raise TrainingError(f"the loss became {losses[-1]}")
    images_per_second = spread([batch_size / value for value in values])
    return {
        "batch_size": batch_size,
        "embedding_dim": roofline.embedding_dim(config.model.to_dict()),
        "dtype": dtype_name(config),
        "optimizer": config.optim.name,
        "augment": "none" if "augment_fn" in plan.custom else "device",
        "placement": plan.placement,
        "steps_in_a_program": piece,
        "steps_in_a_value": num_steps,
        "compile_seconds": compile_seconds,
        "step_seconds": spread(values),
        "images_per_second": images_per_second,
        "views_per_second": num_views * images_per_second["median"],
        "counted": counted,
        "model_flops_per_second": counted["flops_per_image"] * images_per_second["median"],
        "memory": {**peak_memory(), "program": _program_memory(runner.program)},
        "loss": {"first": first_loss, "last": losses[-1]},
    }
