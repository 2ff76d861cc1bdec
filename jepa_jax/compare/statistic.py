"""Paired differences: their interval, and what it says in words."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import scipy.special

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """The mean of n paired differences, their standard deviation, and the mean's interval."""

    n: int
    mean: float
    std: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval: what the mean has to pass to be told from 0."""
        return (self.high - self.low) / 2


def paired_interval(differences: Sequence[float]) -> Paired:
    """Student's 95 % interval of the mean of paired differences, with n - 1 degrees of freedom.

    Raises:
      ValueError: for fewer than two differences, which have no spread.
    """
    n = len(differences)
    if n < 2:
        raise ValueError(f"an interval needs at least two differences, got {n}")
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    half = float(scipy.special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)
    return Paired(n, mean, std, mean - half, mean + half)


def verdict(paired: Paired) -> tuple[str, str]:
    """(word, sentence) of accuracies' differences B - A, shares in [-1, 1].

    The word is 'better' or 'worse' where the interval excludes 0, else 'no difference seen'.
    """
    mean, low, high = (100 * value for value in (paired.mean, paired.low, paired.high))
    interval = f"95 % interval {low:+.2f} to {high:+.2f}"
    if low <= 0 <= high:
        word = "no difference seen"
        return word, (
            f"{word} at n = {paired.n}: a difference of less than {100 * paired.half_width:.2f} "
            f"points would not show (B - A is {mean:+.2f} points, {interval})"
        )
    word, place = ("better", "above") if mean > 0 else ("worse", "below")
    sentence = f"{word}: B is {abs(mean):.2f} points {place} A ({interval}, n = {paired.n} pairs)"
    return word, sentence
