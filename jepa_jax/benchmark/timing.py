"""Seconds of a piece of work, warmed up and synchronised, with their spread."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

REPEATS = 5


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max, n and the values themselves."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": list(values),
    }


def sample(
    work: Callable[[], Any],
    *,
    repeats: int = REPEATS,
    min_seconds: float = 0.2,
    budget_seconds: float = math.inf,
) -> list[float]:
    """Seconds of one call of `work`, `repeats` times.

    Args:
      work: returns arrays that the device is waited for.
      repeats: values to take, each the mean over as many calls as fill `min_seconds`: a short
        call alone would measure the clock and the dispatch.
      min_seconds: of one value.
      budget_seconds: no further value is begun after so long; one there is always.
    """
    jax.block_until_ready(work())  # compiles
    began = time.perf_counter()
    jax.block_until_ready(work())
    calls = max(1, math.ceil(min_seconds / max(time.perf_counter() - began, 1e-6)))
    values: list[float] = []
    start = time.perf_counter()
    while len(values) < repeats and (not values or time.perf_counter() - start < budget_seconds):
        began = time.perf_counter()
        for _ in range(calls):
            result = work()
        jax.block_until_ready(result)
        values.append((time.perf_counter() - began) / calls)
    return values
