"""From the records of cells to rows, a winner, and what a reader has to know beside them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jepa_jax.compare import JUDGED_ON
from jepa_jax.compare.statistic import paired_interval
from jepa_jax.report.sweep_table import (
    DIVERGED,
    FINISHED,
    ONLINE,
    RANK_ME,
    RIDGE,
    STOPPED,
    scale_of,
)
from jepa_jax.sweep.axes import Point, as_flags, label
from jepa_jax.sweep.cells import Cell

FIGURES = ("seconds", "train_loss", RIDGE, ONLINE, RANK_ME)
# The winner's alone.
TEST = "test_ridge_probe_acc"
MISSING = "missing"


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """{'mean', 'std', 'n'}, std being a sample's and None for one value; None for no values."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def row_of(point: Point, cells: Sequence[Cell], stopped: str | None) -> dict[str, Any]:
    """The row of a point.

    Args:
      point: its swept keys.
      cells: one a seed.
      stopped: why it was given up, for one that was.

    Returns:
      see docs/sweeps.md; figures are over the cells that finished.
    """
    records = [record for cell in cells if (record := cell.record())]
    shown = []
    for record in records:
        status, reason = record["status"], record["reason"]
        if status not in (FINISHED, DIVERGED):
            status, reason = (STOPPED, stopped) if stopped else (MISSING, None)
        kept = {name: value for name, value in record.items() if name not in ("key", "rungs")}
        shown.append({**kept, "status": status, "reason": reason})
    statuses = [one["status"] for one in shown] + [MISSING] * (len(cells) - len(shown))
    if all(status == DIVERGED for status in statuses):
        status = DIVERGED
    elif stopped:
        status = STOPPED
    else:
        status = MISSING if MISSING in statuses else FINISHED
    optim = cells[0].config.optim
    return {
        "point": dict(point),
        "label": label(point),
        "epochs": optim.epochs,
        "warmup_epochs": optim.warmup_epochs,
        "status": status,
        "cells": shown,
        **{name: spread(_finished(shown, name)) for name in FIGURES},
    }


def _finished(cells: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [
        cell[name] for cell in cells if cell["status"] == FINISHED and cell.get(name) is not None
    ]


def best_row(rows: Sequence[Mapping[str, Any]], score: str) -> Mapping[str, Any] | None:
    """The row of the best mean among those of which every seed finished; None if there is none."""
    whole = [
        row
        for row in rows
        if row["status"] == FINISHED and all(cell["status"] == FINISHED for cell in row["cells"])
    ]
    return max(whole, key=lambda row: row[score]["mean"], default=None)


def winner_of(rows: Sequence[Mapping[str, Any]], score: str) -> dict[str, Any] | None:
    """The best row, its flags, and how sure it is against the next one by pairs of equal seeds."""
    best = best_row(rows, score)
    if best is None:
        return None
    others = [row for row in rows if row is not best]
    second = best_row(others, score)
    unit = scale_of(score)
    sentence = f"{best['label']} is the best of {len(rows)}"
    if second is None:
        sentence += ", the only one that finished" if others else ""
    else:
        by_seed = {cell["seed"]: cell[score] for cell in second["cells"]}
        pairs = [cell[score] - by_seed[cell["seed"]] for cell in best["cells"]]
        gap = unit * statistics.fmean(pairs)
        sentence += f", {gap:.2f} above {second['label']}"
        if len(pairs) < 2:
            sentence += "; with one seed no difference can be told from chance"
        else:
            paired = paired_interval(pairs)
            low, high = unit * paired.low, unit * paired.high
            told = "above 0" if low > 0 else "no difference seen"
            sentence += f" (95 % interval {low:+.2f} to {high:+.2f}, n = {paired.n}: {told})"
    return {
        "point": best["point"],
        "label": best["label"],
        "flags": as_flags(best["point"]),
        score: best[score],
        TEST: spread([cell[TEST] for cell in best["cells"] if cell.get(TEST) is not None]),
        "sentence": sentence,
    }


def notes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table does not say by itself."""
    found = []
    inside = [row for row in rows if row["epochs"] <= row["warmup_epochs"]]
    if inside:
        which = "Every point" if len(inside) == len(rows) else ", ".join(r["label"] for r in inside)
        found.append(
            f"{which} ended inside the warm-up ({inside[0]['epochs']:g} epochs, "
            f"{inside[0]['warmup_epochs']:g} of warm-up): the rate rose to the last step and never "
            "fell, so this says little about the rate of a longer run."
        )
    judged_on = [key for key in JUDGED_ON if key in rows[0]["point"]]
    if judged_on:
        found.append(
            f"Points of another {' and '.join(judged_on)} are judged on other images: their "
            "figures are not those of one test."
        )
    if len(rows) > 1:
        found.append(
            "The winner is the largest of several noisy figures, so its own val figure flatters it."
        )
    return found


def halve(
    scores: Mapping[Any, Sequence[float]], num_seeds: int, factor: int
) -> tuple[list[Any], int]:
    """Which points of a rung go on: the best of `factor`, at least one.

    Args:
      scores: point to the scores of its seeds that are alive.
      num_seeds: a point that lost one ranks below all that did not.
      factor: one of so many goes on, rounded up.

    Returns:
      (those that go on, in the order given; how many there were).
    """

    def rank(point):
        alive = scores[point]
        return (len(alive) == num_seeds, statistics.fmean(alive) if alive else float("-inf"))

    ranked = sorted(scores, key=rank, reverse=True)
    kept = set(ranked[: max(1, -(-len(ranked) // factor))])
    return [point for point in scores if point in kept], len(ranked)


def rung_shares(num_points: int, factor: int) -> list[float]:
    """Shares of the steps at which points are given up: 1/9 and 1/3 for 6 points by 3."""
    shares, left, share = [], num_points, 1.0
    while left > 1:
        share /= factor
        shares.append(share)
        left = -(-left // factor)
    return sorted(shares)


def work_with_rungs(num_points: int, factor: int) -> tuple[float, float]:
    """(share of all points' epochs that is trained, judgements a point); (1, 1) for factor 0."""
    trained, judged, before, left = 0.0, 0, 0.0, num_points
    for share in [*(rung_shares(num_points, factor) if factor else []), 1.0]:
        trained += (share - before) * left
        judged += left
        before, left = share, -(-left // factor) if factor else left
    return trained / num_points, judged / num_points
