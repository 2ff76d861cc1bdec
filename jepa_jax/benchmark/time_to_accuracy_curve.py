"""One training run with a clock that stops while it is probed, and the floors beside it.

The clock counts what a run needs to become what it is: the eigenvectors of a whitening stem, every
step with its augmentation and input, the device waited for, and, in the last row alone, the
re-estimation of BatchNorm's statistics that makes the encoder that is judged. (Before an earlier
probe it is part of the probe: a run that goes on does not need it.) What it leaves out stands
beside it: drawing the first parameters, compiling, one step to warm up, and every probe.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.augment import to_float
from jepa_jax.data import Dataset
from jepa_jax.errors import ConfigError, TrainingError
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import make_runner
from jepa_jax.plan import Plan, clean_images, initial_state, whitening_stem
from jepa_jax.progress import Phases
from jepa_jax.random_patches import FEATURES_PER_FILTER, random_patches
from jepa_jax.representation import reestimate_batch_stats
from jepa_jax.train_step import TrainState

PROBES = ("ridge", "knn")
# The first probe after this share of a run, each later one after so many times as many steps.
_FIRST_SHARE, _FACTOR = 0.05, 1.4
_SEED_OF_PATCHES = 0
_STEM, _STEPS, _STATISTICS = "eigenvectors of the stem", "steps", "BatchNorm's statistics"
_PROBES = "probes"

Row = dict[str, Any]


def probe_steps(num_steps: int) -> list[int]:
    """After which steps a run is probed: 0, from 5 % of it on ever more rarely, and the last."""
    steps, share = {0, num_steps}, _FIRST_SHARE
    while share < 1:
        steps.add(max(1, round(share * num_steps)))
        share *= _FACTOR
    return sorted(steps)


def require_labels(plan: Plan) -> None:
    """Refuses a dataset on which no probe can be fitted or read.

    Raises:
      ConfigError: in one line.
    """
    if not plan.has_labels:
        raise ConfigError(
            f"accuracy needs labels: {plan.dataset.name} has none to fit a probe to, or, with "
            f"config.data.num_val={plan.config.data.num_val}, none to read it on"
        )


# --- one run ----------------------------------------------------------------------------------


def measure_curve(
    plan: Plan, on_row: Callable[[Row], None] = lambda row: None
) -> tuple[TrainState, dict[str, Any]]:
    """Trains a plan to its last step and reads its accuracy at growing intervals.

    The same program sees the same batches as in `train_and_evaluate`. Where it runs several steps
    at once, a probe comes after the first piece that ends at its step or behind it.

    Args:
      plan: of a dataset with labels.
      on_row: called with each row once it is read.

    Returns:
      The state after the last step, and figures that JSON can hold: `rows` from step 0, the
      untrained network, to the last step, each with 'step', 'seconds' by the clock, 'images',
      'epochs', and for each of PROBES {'val', 'test'} in [0, 1], 'test' in the first and in the
      last row alone; `clock`, the parts of the last row's seconds; `outside`, the seconds it leaves
      out; feature_dim, num_steps, steps_per_epoch and batch_size.

    Raises:
      ConfigError: see `require_labels`, or for a program that does not fit into memory.
      TrainingError: if a loss is not finite.
    """
    require_labels(plan)
    run = _Run(plan)
    rows = []
    for step in run.stops():
        rows.append(run.read(step))
        on_row(rows[-1])
    return run.state, {
        "rows": rows,
        "feature_dim": plan.feature_dim,
        "num_steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "batch_size": plan.config.data.batch_size,
        "clock": run.clock.seconds,
        "outside": run.outside.seconds,
    }


class _Run:
    """A run under way: its state, what its clock has counted, and what was left out."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.clock, self.outside = Phases(), Phases()
        self._images = clean_images(plan.dataset.train_images)
        with self.outside("first parameters"):
            self.state = jax.block_until_ready(initial_state(plan))
        with self.outside("compiling"):
            self._runner = make_runner(plan, self.state)
        with self.outside("warming up"):
            self._warm_up()
        if plan.config.model.stem_init == "whitening" and "encoder" not in plan.custom:
            with self.clock(_STEM):
                # What `initial_state` did, once more, now that it is compiled.
                images = plan.dataset.train_images
                jax.block_until_ready(whitening_stem(plan.encoder, plan.config, images))

    def _warm_up(self) -> None:
        """A step on a copy of the state: of what follows, the first step is as fast as any."""
        copy = jax.tree.map(jnp.copy, self.state)
        with contextlib.closing(self._runner.run(copy, self.plan.batches_of(0)[:1])) as pieces:
            jax.block_until_ready(list(pieces))

    def _pieces(self) -> Iterator[tuple[TrainState, Any, int]]:
        """(state, metrics, steps) of every piece of the run."""
        state = self.state
        for epoch in range(self.plan.num_epochs):
            with contextlib.closing(self._runner.run(state, self.plan.batches_of(epoch))) as pieces:
                for state, metrics, count in pieces:
                    yield state, metrics, count

    def stops(self) -> Iterator[int]:
        """Trains; yields, the clock stopped, the steps at which the run is to be read."""
        first, *due = probe_steps(self.plan.num_steps)
        yield first
        done, waiting = 0, None
        began = time.perf_counter()
        with contextlib.closing(self._pieces()) as pieces:
            for self.state, metrics, count in pieces:
                done += count
                # As in `train`, a loss is fetched while the next piece runs.
                if waiting is not None:
                    _require_finite(*waiting)
                waiting = (metrics["loss"], done, count)
                if done < due[0]:
                    continue
                jax.block_until_ready(self.state)
                self.clock.add({_STEPS: time.perf_counter() - began})
                _require_finite(*waiting)
                waiting, due = None, [step for step in due if step > done]
                yield done
                began = time.perf_counter()

    def read(self, step: int) -> Row:
        """The row of the state, of which `step` steps are done."""
        plan, is_last = self.plan, step == self.plan.num_steps
        before = sum(self.clock.seconds.values())
        with self.clock(_STATISTICS) if is_last else self.outside(_PROBES):
            trained = {"params": self.state.params, "batch_stats": self.state.batch_stats}
            variables = reestimate_batch_stats(plan.encoder, trained, self._images)
            jax.block_until_ready(variables)
        with self.outside(_PROBES):
            # The test images say how far the last step is from the first: no other one is read.
            dataset = plan.dataset if is_last or not step else _without_test(plan.dataset)
            scores = _scores(plan.encoder.apply, variables, dataset, plan.config.data.num_val)
        return {
            "step": step,
            "seconds": sum(self.clock.seconds.values()) if is_last else before,
            "images": step * plan.config.data.batch_size,
            "epochs": step / plan.steps_per_epoch,
            **scores["encoder"],
        }


def _require_finite(losses: jax.Array, done: int, count: int) -> None:
    values = np.atleast_1d(jax.device_get(losses))[:count]
    if not np.isfinite(values).all():
        first = int(np.argmax(~np.isfinite(values)))
        raise TrainingError(
            f"the loss became {values[first]} at step {done - count + first}: try a lower "
            "config.optim.lr"
        )


def _without_test(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, test_images=None, test_labels=None)


def _scores(
    apply: Any, variables: Any, dataset: Dataset, num_val: int, *more: str
) -> dict[str, Any]:
    """Accuracies in [0, 1] of 'encoder', what `more` names, and 'chance', by probe and split."""
    result = evaluate_representation(
        apply, variables, dataset, num_val=num_val, parts=(*PROBES, *more)
    )
    kinds = ("encoder", *more, "chance")
    return {
        kind: {probe: _by_split(result["probes"][probe][kind]) for probe in PROBES}
        for kind in kinds
    }


def _by_split(score: dict[str, Any]) -> dict[str, float | None]:
    return {split: score[split] and score[split]["acc"] for split in ("val", "test")}


# --- floors -----------------------------------------------------------------------------------


def measure_pixels(dataset: Dataset, num_val: int) -> dict[str, Any]:
    """Chance and probes on raw pixels: {'chance', 'pixels'}, each with its feature_dim."""
    # An evaluation is of an encoder: this one is the mean colour, and no part of the result.
    scores = _scores(_mean_colour, None, dataset, num_val, "pixels")
    height, width, channels = dataset.image_shape
    num_pixels = min(height, 32) * min(width, 32) * channels
    return {
        "chance": {"feature_dim": 0, **scores["chance"]},
        "pixels": {"feature_dim": num_pixels, **scores["pixels"]},
    }


@jax.jit
def _mean_colour(variables: None, images: jax.Array) -> jax.Array:
    del variables
    return jnp.mean(to_float(images), axis=(1, 2))


def measure_patches(dataset: Dataset, num_val: int, num_features: int) -> dict[str, Any]:
    """Probes on whitened random patches of so many features, a multiple of 8."""
    apply, variables = random_patches(
        jax.random.key(_SEED_OF_PATCHES),
        dataset.train_images,
        num_filters=num_features // FEATURES_PER_FILTER,
    )
    scores = _scores(apply, variables, dataset, num_val)
    return {"feature_dim": num_features, **scores["encoder"]}
