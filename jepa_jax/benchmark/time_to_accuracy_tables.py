"""From curves to tables: the last step, the first crossing of every target, and the floors.

A curve is the figures of one run (`time_to_accuracy_curve.measure_curve`); the curves of a config
are those of its seeds.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jepa_jax.benchmark.table import NOT_MEASURED, Table, number

PROBE_NAMES = {"ridge": "ridge", "knn": "20-NN"}
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Curves:
    """The runs of one config.

    Attributes:
      name: of the config.
      figures: by seed.
      failed: why others have none, by seed.
    """

    name: str
    figures: dict[int, dict[str, Any]]
    failed: dict[int, str]

    def rows(self) -> list[list[dict[str, Any]]]:
        """For every step that was probed, the rows of all seeds."""
        found = [figures["rows"] for figures in self.figures.values()]
        return [list(rows) for rows in zip(*found, strict=True)]


@dataclasses.dataclass(frozen=True)
class Floor:
    """What no learning reaches: accuracies {'ridge', 'knn'} of {'val', 'test'} in [0, 1]."""

    name: str
    feature_dim: int
    scores: Mapping[str, Any]


def first_crossing(rows: Sequence[Mapping[str, Any]], probe: str, target: float) -> float | None:
    """Seconds of the first row whose accuracy on validation images is at least `target` percent.

    Nothing is interpolated: the true crossing lies between this probe and the one before it.
    """
    for row in rows:
        if row[probe]["val"] >= target / 100:
            return row["seconds"]
    return None


def crossings(curves: Curves, probe: str, target: float) -> dict[str, Any]:
    """{'seconds' of the seeds that crossed, 'crossed', 'of'}: how many did, of how many."""
    found = [first_crossing(figures["rows"], probe, target) for figures in curves.figures.values()]
    seconds = [value for value in found if value is not None]
    return {"seconds": seconds, "crossed": len(seconds), "of": len(found)}


def _crossing_cell(found: Mapping[str, Any]) -> str:
    if not found["of"]:
        return NOT_MEASURED
    seconds, share = found["seconds"], f"{found['crossed']} of {found['of']}"
    if not seconds:
        return f"not reached, {share}"
    text = f"{number(statistics.fmean(seconds))} s"
    if len(seconds) > 1:
        text += f" ({number(min(seconds))}-{number(max(seconds))})"
    return f"{text}, {share}"


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """'61.2 ± 0.4': mean and standard deviation (n - 1); one value alone has none."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _percents(rows: Sequence[Mapping[str, Any]], probe: str, split: str) -> str:
    values = [row[probe][split] for row in rows]
    if not values:
        return NOT_MEASURED
    return _NONE if None in values else mean_and_spread([100 * value for value in values])


def untrained_floors(all_curves: Sequence[Curves]) -> list[Floor]:
    """The first row of every config, as the mean over its seeds."""
    floors = []
    for curves in all_curves:
        if curves.figures:
            first = curves.rows()[0]
            scores = {
                probe: {
                    split: _mean([row[probe][split] for row in first]) for split in first[0][probe]
                }
                for probe in PROBE_NAMES
            }
            dim = next(iter(curves.figures.values()))["feature_dim"]
            floors.append(Floor(f"untrained, {curves.name}", dim, scores))
    return floors


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def tables(
    all_curves: Sequence[Curves], floors: Sequence[Floor], targets: Sequence[float]
) -> list[Table]:
    """Everything a person reads, the floors beside the result."""
    return [
        _last_step_table(all_curves),
        *(_crossing_table(all_curves, probe, targets) for probe in PROBE_NAMES),
        _floor_table(floors),
        *(_curve_table(curves) for curves in all_curves if curves.figures),
    ]


def _last_step_table(all_curves: Sequence[Curves]) -> Table:
    probes = [(probe, split) for probe in PROBE_NAMES for split in ("val", "test")]
    header = ("config", "seeds", "features", "seconds", "steps", "images")
    names = [f"{PROBE_NAMES[probe]} {split}, %" for probe, split in probes]
    last_columns = ("ridge val over untrained", "before the clock, s")
    rows = []
    for curves in all_curves:
        figures = list(curves.figures.values())
        if not figures:
            others = len(header) + len(names) + len(last_columns) - 2
            rows.append([curves.name, "0", *[NOT_MEASURED] * others])
            continue
        last = [found["rows"][-1] for found in figures]
        gains = [
            100 * (found["rows"][-1]["ridge"]["val"] - found["rows"][0]["ridge"]["val"])
            for found in figures
        ]
        outside = [sum(found["outside"].values()) - found["outside"]["probes"] for found in figures]
        rows.append(
            [
                curves.name,
                str(len(figures)),
                str(figures[0]["feature_dim"]),
                mean_and_spread([row["seconds"] for row in last]),
                f"{last[0]['step']:,}",
                f"{last[0]['images']:,}",
                *(_percents(last, probe, split) for probe, split in probes),
                mean_and_spread(gains),
                mean_and_spread(outside),
            ]
        )
    failed = [
        f"{curves.name}, seed {seed}: {reason}."
        for curves in all_curves
        for seed, reason in curves.failed.items()
    ]
    note = " ".join(
        [
            "Mean ± standard deviation over the seeds, of the last step and no other. Seconds from "
            "the first step, eigenvectors, augmentation and the statistics of BatchNorm included; "
            "compiling and what else comes before is the last column, and probes are in neither.",
            *failed,
        ]
    )
    return Table("At the last step", (*header, *names, *last_columns), rows, note)


def _crossing_table(all_curves: Sequence[Curves], probe: str, targets: Sequence[float]) -> Table:
    rows = [
        [curves.name, *(_crossing_cell(crossings(curves, probe, at)) for at in targets)]
        for curves in all_curves
    ]
    note = (
        "Mean (range) over the seeds that crossed, and how many did: the first probe at or above "
        "the target; the probe before it, up to 1.4 times earlier, was below. A target below the "
        "network untrained is crossed at its step 0."
    )
    title = f"Seconds to an accuracy on validation images, {PROBE_NAMES[probe]}"
    return Table(title, ("config", *(f"{target:g} %" for target in targets)), rows, note)


def _floor_table(floors: Sequence[Floor]) -> Table:
    def cell(score: float | None) -> str:
        return _NONE if score is None else f"{100 * score:.1f}"

    rows = [
        [floor.name, str(floor.feature_dim) if floor.feature_dim else _NONE]
        + [cell(floor.scores[probe][split]) for probe in PROBE_NAMES for split in ("val", "test")]
        for floor in floors
    ]
    names = [f"{name} {split}, %" for name in PROBE_NAMES.values() for split in ("val", "test")]
    note = "Not one gradient step: an accuracy says what was learnt by what it has above these."
    return Table("Floors", ("floor", "features", *names), rows, note)


def _curve_table(curves: Curves) -> Table:
    def line(rows: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float]) -> str:
        return number(statistics.fmean(map(of, rows)))

    rows = [
        [
            f"{at[0]['step']:,}",
            line(at, lambda row: row["seconds"]),
            f"{at[0]['images']:,}",
            f"{at[0]['epochs']:.3g}",
            *(_percents(at, probe, "val") for probe in PROBE_NAMES),
        ]
        for at in curves.rows()
    ]
    names = [f"{name} val, %" for name in PROBE_NAMES.values()]
    count = len(curves.figures)
    title = f"{curves.name}, {count} seed{'s' if count > 1 else ''}"
    return Table(title, ("step", "seconds", "images", "epochs", *names), rows)
