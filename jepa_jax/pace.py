"""How fast a plan trains on this machine, and how many epochs fit into the time that is given."""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jepa_jax.data import Dataset
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.lock import only_process_in
from jepa_jax.loop import make_runner, make_watch, online_probe
from jepa_jax.metrics import read_json, write_json
from jepa_jax.plan import Plan, clean_images, initial_state, make_plan
from jepa_jax.progress import duration, say
from jepa_jax.representation import CHUNK, extract_features, reestimate_batch_stats
from jepa_jax.train import prepare_workdir
from jepa_jax.train_step import TrainState

_TURN_SECONDS = 2.0
_NUM_TURNS = 3
# Images that the final evaluation embeds beside those of the probes: see `evaluation`.
_NUM_HEALTH_IMAGES, _HEALTH_VIEWS = 5000, 3
_FILE = "budget.json"


def with_epochs(config: ConfigDict, epochs: float) -> ConfigDict:
    """A copy that trains for so many epochs, with the warm-up's share of them as it was."""
    share = config.optim.warmup_epochs / config.optim.epochs
    is_as_it_was = epochs == config.optim.epochs
    config = config.copy_and_resolve_references()
    if is_as_it_was:  # to the last bit
        return config
    with config.ignore_type():  # a person's own file may say 2, and 1.7 is meant
        config.optim.warmup_epochs = min(epochs, round(share * epochs, 6))
        config.optim.epochs = epochs
    return config


class Pace:
    """The compiled step of a plan over its data, for timing it."""

    def __init__(self, plan: Plan):
        state = initial_state(plan)
        self._runner = make_runner(plan, state)
        self._state = self._runner.place(state)
        self._order, self._steps_per_epoch = plan.batches_of(0), plan.steps_per_epoch
        self._position = 0
        self._run(self._runner.piece)  # the first call is slower than all others
        seconds = self._run(self._runner.piece)
        self._num_steps = self._runner.piece * max(1, math.ceil(_TURN_SECONDS / seconds))

    def _run(self, num_steps: int) -> float:
        """Seconds of so many steps, their metrics fetched as in training."""
        rows = np.arange(self._position, self._position + num_steps) % len(self._order)
        self._position += num_steps
        pending = None
        began = time.perf_counter()
        for state, metrics, _ in self._runner.run(self._state, self._order[rows]):
            self._state = state
            jax.device_get(pending)
            pending = metrics
        jax.block_until_ready((self._state, pending))
        return time.perf_counter() - began

    def epoch_seconds(self) -> float:
        """A turn: what an epoch takes at the pace of some seconds."""
        return self._run(self._num_steps) / self._num_steps * self._steps_per_epoch


# --- a budget -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run takes, in seconds.

    Attributes:
      fixed: whatever its length: what has passed, compiling once more, the final evaluation.
      epoch: of training, an epoch.
      per_epoch: after every epoch, also one that is not whole.
    """

    fixed: float
    epoch: float
    per_epoch: float = 0.0


def epochs_within(seconds: float, cost: Cost, steps_per_epoch: int) -> float:
    """The most epochs, in whole steps, that take no more than `seconds`; 0 if there is no step."""
    left = seconds - cost.fixed
    whole = max(0, math.floor(left / (cost.epoch + cost.per_epoch)))
    part = (left - whole * (cost.epoch + cost.per_epoch) - cost.per_epoch) / cost.epoch
    steps = math.floor((whole + min(max(part, 0.0), 1.0)) * steps_per_epoch)
    # Short enough to paste, and `optim.epochs` rounds to the nearest step.
    return round(steps / steps_per_epoch, 6) if left > 0 else 0.0


def chosen_epochs(
    workdir: pathlib.Path, seconds: float, measure: Callable[[], tuple[Cost, int]]
) -> float:
    """The epochs on record in WORKDIR/budget.json, or as many as fit, which are put there.

    Args:
      workdir: of a run or a sweep.
      seconds: for all of it.
      measure: (what it costs, steps of an epoch).

    Raises:
      ConfigError: if not one step fits.
      CheckpointError: if another budget is on record.
    """
    path = workdir / _FILE
    if path.exists():
        stored = read_json(path)
        if stored["seconds"] != seconds:
            raise CheckpointError(
                f"{workdir} was begun with --budget={stored['seconds']:g}s: the same goes on, and "
                "another --workdir begins anew"
            )
        say(f"{'budget':<10}{duration(seconds)}: {stored['epochs']:g} epochs, as it was begun")
        return stored["epochs"]
    cost, steps_per_epoch = measure()
    epochs = epochs_within(seconds, cost, steps_per_epoch)
    if not epochs:
        raise ConfigError(
            f"--budget={seconds:g}s is not enough: start and evaluation alone take about "
            f"{duration(math.ceil(cost.fixed + cost.per_epoch))}"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, {"seconds": seconds, "epochs": epochs, "cost": dataclasses.asdict(cost)})
    say(
        f"{'budget':<10}{duration(seconds)}: {epochs:g} epochs of {cost.epoch:.1f} s, beside "
        f"{cost.fixed:.0f} s for the start and the evaluation"
    )
    return epochs


def fit_to_budget(
    config: ConfigDict,
    workdir: pathlib.Path,
    seconds: float,
    *,
    spent: float = 0.0,
    init_from: str = "",
) -> tuple[ConfigDict, Dataset | None]:
    """A run's config with as many epochs as fit into `seconds`.

    The schedule is that of the config, stretched or squeezed; the time is that of everything up to
    the summary. Measured once: a folder that has a budget.json gets what stands there.

    Args:
      config: of the run.
      workdir: of the run.
      seconds: for compiling, training and evaluation.
      spent: how many of them have passed.
      init_from: see `train_and_evaluate`.

    Returns:
      (the config, the dataset if it was read).

    Raises:
      ConfigError, CheckpointError: as `chosen_epochs`.
    """
    found: dict[str, Any] = {}

    def measure() -> tuple[Cost, int]:
        began = time.perf_counter()
        say(f"{'measuring':<10}how fast this run trains, for its budget")
        plan = make_plan(config, workdir, None, None, None, None, init_from, jax.devices())
        found["dataset"] = plan.dataset
        pace = Pace(plan)
        epoch = statistics.median(pace.epoch_seconds() for _ in range(_NUM_TURNS))
        state = initial_state(plan)
        compiling = _seconds(lambda: make_runner(plan, state))
        after = _after_an_epoch(plan, state)
        final = _final_evaluation(plan, state)
        passed = time.perf_counter() - began
        return Cost(spent + passed + compiling + final, epoch, after), plan.steps_per_epoch

    workdir = prepare_workdir(workdir)
    with only_process_in(workdir):
        epochs = chosen_epochs(workdir, seconds, measure)
    return with_epochs(config, epochs), found.get("dataset")


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(jax.tree.leaves(work()))
    return time.perf_counter() - began


def _after_an_epoch(plan: Plan, state: TrainState) -> float:
    """The online probe and the watch, without what it takes to compile them."""
    watch, variables = make_watch(plan), {"params": state.params, "batch_stats": state.batch_stats}

    def look() -> Any:
        figures = online_probe(plan, state)
        return figures, watch.representation(variables), watch.gradient_norms(variables)

    look()
    return _seconds(look)


def _final_evaluation(plan: Plan, state: TrainState) -> float:
    """The features of two networks, by the time of a few: they are nearly all of it."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = clean_images(plan.dataset.train_images)
    reestimation = _seconds(lambda: reestimate_batch_stats(plan.encoder, variables, images))
    sample = images[: 2 * CHUNK]

    def extract() -> jax.Array:
        return extract_features(plan.encoder.apply, variables, sample)

    extract()
    test = plan.dataset.test_images
    num_images = _HEALTH_VIEWS * min(plan.config.data.num_val, _NUM_HEALTH_IMAGES)
    if plan.has_labels:
        num_images += len(plan.dataset.train_images) + (0 if test is None else len(test))
    return 2 * (num_images * _seconds(extract) / len(sample) + reestimation)
