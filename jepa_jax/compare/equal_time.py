"""How many epochs of B take as long as those of A."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jepa_jax.compare import PLACES, SIDES
from jepa_jax.config import flatten, has_blur, known_keys
from jepa_jax.pace import Pace
from jepa_jax.plan import Plan
from jepa_jax.progress import say
from jepa_jax.train_step import HParams

# Set by the comparison for both sides.
_SET_HERE = ("meta.seed", "optim.epochs")
# On neither what is learnt nor how long it takes.
_WITHOUT_EFFECT = ("logging.", "meta.device", *PLACES)
# Both are timed in turns: A B A B ...
_TURNS = 5


def step_arguments() -> set[str]:
    """The keys that the compiled step takes as arguments.

    No value of them makes it slower, but for the step from no blur at all to some: see
    `run_one_program`.
    """
    fields = {field.name for field in dataclasses.fields(HParams)}
    sections = ("meta", "loss", "optim")
    keys = {f"{section}.{name}" for section in sections for name in fields}
    known = set(known_keys())
    augment = {key for key in known if key.startswith("augment.")}
    return {"optim.warmup_epochs", "optim.schedule", *augment, *(keys & known)}


def run_one_program(a: ConfigDict, b: ConfigDict) -> bool:
    """Whether configs differ in what the compiled step takes as arguments alone."""
    return set(differing_keys(a, b)) <= step_arguments() and has_blur(a) == has_blur(b)


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


def epochs_of_equal_time(epochs: float, turns: Sequence[tuple[float, float]]) -> float:
    """Epochs of B that take as long as `epochs` of A.

    Args:
      epochs: of A.
      turns: seconds of an epoch of A and of B, measured one after the other. The median of their
        ratios is what counts: what else a machine does in a turn slows both.
    """
    return float(f"{epochs * statistics.median(a / b for a, b in turns):.6g}")


def measure_turns(plans: Mapping[str, Plan]) -> list[tuple[float, float]]:
    """Seconds of an epoch of A and of B, in turns A B A B."""
    paces = [Pace(plans[side]) for side in SIDES]
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
    if run_one_program(a, b):
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
