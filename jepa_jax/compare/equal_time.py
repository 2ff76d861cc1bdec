"""How many epochs of B take as long as those of A."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jepa_jax.compare import PLACES, SIDES
from jepa_jax.config import flatten, known_keys
from jepa_jax.plan import Plan, initial_state
from jepa_jax.progress import say
from jepa_jax.train import make_runner
from jepa_jax.train_step import HParams

# Set by the comparison for both sides.
_SET_HERE = ("meta.seed", "optim.epochs")
# On neither what is learnt nor how long it takes.
_WITHOUT_EFFECT = ("logging.", "meta.device", *PLACES)
# Both are timed in turns of so many seconds: A B A B ...
_TURNS, _TURN_SECONDS = 5, 2.0


def step_arguments() -> set[str]:
    """The keys that the compiled step takes as arguments: no value of them makes it slower."""
    fields = {field.name for field in dataclasses.fields(HParams)}
    sections = ("meta", "loss", "optim")
    keys = {f"{section}.{name}" for section in sections for name in fields}
    return {"optim.warmup_epochs", "optim.schedule", *(keys & set(known_keys()))}


def differing_keys(a: ConfigDict, b: ConfigDict) -> dict[str, list[Any]]:
    """Key to [A's value, B's] of what is compared: not the seed, nor the number of epochs."""
    first, second = flatten(a), flatten(b)
    return {
        key: [first.get(key), second.get(key)]
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
        and key not in _SET_HERE
        and not key.startswith(_WITHOUT_EFFECT)
    }


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


def epochs_of_equal_time(epochs: float, turns: Sequence[tuple[float, float]]) -> float:
    """Epochs of B that take as long as `epochs` of A.

    Args:
      epochs: of A.
      turns: seconds of an epoch of A and of B, measured one after the other. The median of their
        ratios is what counts: what else a machine does in a turn slows both.
    """
    return float(f"{epochs * statistics.median(a / b for a, b in turns):.6g}")


class _Pace:
    """The compiled step of a plan over its data, for timing it."""

    def __init__(self, plan: Plan):
        state = initial_state(plan)
        self._runner, self._state = make_runner(plan, state), state
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


def measure_turns(plans: Mapping[str, Plan]) -> list[tuple[float, float]]:
    """Seconds of an epoch of A and of B, in turns A B A B."""
    paces = [_Pace(plans[side]) for side in SIDES]
    return [tuple(pace.epoch_seconds() for pace in paces) for _ in range(_TURNS)]


def equal_time(
    a: ConfigDict, b: ConfigDict, own_epochs: float, plans: Callable[[], Mapping[str, Plan]]
) -> dict[str, Any]:
    """Epochs of A and B with which both train equally long.

    Args:
      a, b: with A's number of epochs.
      own_epochs: what B's config said.
      plans: of both sides, for timing them; called only where their steps may differ in cost.

    Returns:
      epochs of both; epoch_seconds, by turns, or None where nothing had to be timed; and text.
    """
    epochs, b_epochs, turns = float(a.optim.epochs), float(a.optim.epochs), None
    if set(differing_keys(a, b)) <= step_arguments():
        text = f"both run the same compiled step: A and B train {epochs:g} epochs each"
    else:
        say(f"{'measuring':<10}the speed of A and B, in turns")
        turns = measure_turns(plans())
        b_epochs = epochs_of_equal_time(epochs, turns)
        ratios = [second / first for first, second in turns]
        text = (
            f"an epoch of B takes {statistics.median(ratios):.3f} times as long as one of A "
            f"(median of {len(ratios)} turns, {min(ratios):.3f} to {max(ratios):.3f}): B trains "
            f"{b_epochs:g} epochs in the time of A's {epochs:g}"
        )
    if own_epochs not in (epochs, b_epochs):
        text += f", in place of its own {own_epochs:g}"
    return {"epochs": {"A": epochs, "B": b_epochs}, "epoch_seconds": turns, "text": text}
