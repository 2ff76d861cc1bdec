"""The page of a sweep: its table, accuracy against each swept key and against time, the winner."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.special
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from jepa_jax.errors import CheckpointError
from jepa_jax.metrics import read_json
from jepa_jax.progress import duration
from jepa_jax.report.plots import WIDE, label_ends, log_scale, name_axes, new_figure, run_style
from jepa_jax.report.sections import Cell, Chart, Headline, Note, Report, Section, Table
from jepa_jax.report.sweep_table import (
    DIVERGED,
    FINISHED,
    RANK_ME,
    closing_lines,
    scale_of,
    table,
    value_text,
    with_std,
)
from jepa_jax.report.theme import Theme

_HEIGHT = 280.0
# More lines than this have no names that a reader could tell apart.
_MOST_LINES = 6
_MOST_NAMES = 14
_CONFIDENCE = 0.95
Document = Mapping[str, Any]
Row = Mapping[str, Any]


def read_sweep(workdir: pathlib.Path) -> dict[str, Any]:
    """The content of WORKDIR/sweep.json.

    Raises:
      CheckpointError: for one that is not whole, or of another version.
    """
    document = read_json(workdir / "sweep.json")
    needed = {"rows", "axes", "score", "winner", "cost", "floor", "notes", "environment"}
    if type(document) is not dict or not needed <= set(document):
        raise CheckpointError(f"{workdir / 'sweep.json'} is not that of a sweep: run it again")
    return document


# --- figures ------------------------------------------------------------------------------------


def _half_width(figure: Mapping[str, Any]) -> float:
    """Of Student's 95 % interval of a mean over seeds; 0 where one seed has no spread."""
    if figure["std"] is None:
        return 0.0
    n = figure["n"]
    quantile = float(scipy.special.stdtrit(n - 1, (1 + _CONFIDENCE) / 2))
    return quantile * figure["std"] / math.sqrt(n)


def _named(document: Document) -> str:
    if document["score"] == RANK_ME:
        return "RankMe, effective dimensions"
    return "ridge probe on validation images, %"


def _finished(document: Document) -> list[Row]:
    return [row for row in document["rows"] if row[document["score"]] is not None]


def _place(axes: Axes, values: Sequence[Any]) -> dict[Any, float]:
    """Sets up the x axis for values of one key; returns where each of them lies."""
    are_numbers = all(type(value) in (int, float) for value in values)
    if not are_numbers:
        places = {value: float(n) for n, value in enumerate(values)}
        axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
        names = {place: value_text(value) for value, place in places.items()}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))
        axes.set_xlim(-0.5, len(values) - 0.5)
        return places
    low, high = min(values), max(values)
    if low > 0 and high > 3 * low:
        log_scale(axes.xaxis, low, high)
        pad = (high / low) ** 0.06
        axes.set_xlim(low / pad, high * pad)
    else:
        pad = 0.06 * (high - low) or 0.5
        axes.set_xlim(low - pad, high + pad)
    if len(values) <= _MOST_NAMES // 2:  # the values themselves, and nothing between them
        axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    return {value: float(value) for value in values}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _draw_row(axes: Axes, x: float, row: Row, score: str, colour: str) -> float:
    """Dots of the seeds, the mean and its interval; returns the mean as shown."""
    scale, figure = scale_of(score), row[score]
    values = [scale * c[score] for c in row["cells"] if c["status"] == FINISHED and c.get(score)]
    axes.plot([x] * len(values), values, "o", color=colour, markersize=3, alpha=0.5)
    mean = scale * figure["mean"]
    half = scale * _half_width(figure)
    axes.errorbar(
        [x], [mean], [half], color=colour, marker="o", markersize=6, capsize=3, linewidth=1.4
    )
    return mean


def _draw_floor(axes: Axes, document: Document, theme: Theme) -> list[tuple[float, str, str]]:
    if not document["floor"]:
        return []
    score = document["score"]
    value = scale_of(score) * document["floor"][score]["mean"]
    axes.axhline(value, color=theme.muted, linewidth=1.0, linestyle=(0, (3, 2)), zorder=1)
    return [(value, f"untrained {value:.1f}", theme.muted)]


def against_key(document: Document, key: str, theme: Theme) -> Figure:
    """The score against one swept key: a line for every setting of the other keys."""
    score = document["score"]
    figure, axes = new_figure(WIDE, _HEIGHT, right=150.0)
    places = _place(axes, [_hashable(value) for value in document["axes"][key]])
    lines: dict[str, list[Row]] = {}
    for row in _finished(document):
        others = {k: v for k, v in row["point"].items() if k != key}
        name = ", ".join(f"{k.rpartition('.')[2]} {value_text(v)}" for k, v in others.items())
        lines.setdefault(name, []).append(row)
    are_lines = len(lines) <= _MOST_LINES
    ends = []
    for number, (name, rows) in enumerate(lines.items()):
        style = run_style(number if are_lines else 0, theme)
        found = sorted((places[_hashable(row["point"][key])], row) for row in rows)
        shown = [(x, _draw_row(axes, x, row, score, style["color"])) for x, row in found]
        if are_lines:
            axes.plot(*zip(*shown, strict=True), linewidth=1.4, **style)
            ends.append((shown[-1][1], name or "mean, 95 % interval", style["color"]))
    ends += _draw_floor(axes, document, theme)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    lost = {
        places[_hashable(row["point"][key])]
        for row in document["rows"]
        if row["status"] == DIVERGED
    }
    low = axes.get_ylim()[0]
    for x in lost:
        axes.plot([x], [low], "x", color=theme.bad, clip_on=False, markersize=7)
    if lost:
        ends.append((low, "× diverged", theme.bad))
    name_axes(axes, key, _named(document))
    label_ends(axes, ends)
    return figure


def against_time(document: Document, theme: Theme) -> Figure:
    """The score against the minutes that one point with one seed was trained for."""
    score = document["score"]
    figure, axes = new_figure(WIDE, _HEIGHT, right=190.0)
    rows, ends = _finished(document), []
    minutes = [row["seconds"]["mean"] / 60 for row in rows]
    for number, (x, row) in enumerate(zip(minutes, rows, strict=True)):
        are_named = len(rows) <= _MOST_NAMES
        colour = run_style(number, theme)["color"] if are_named else theme.accent
        mean = _draw_row(axes, x, row, score, colour)
        if are_named:
            ends.append((mean, f"{row['label']}: {mean:.1f} in {60 * x:.0f} s", colour))
    ends += _draw_floor(axes, document, theme)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlim(0, 1.06 * max(minutes))
    name_axes(axes, "minutes of training, one seed", _named(document))
    label_ends(axes, ends)
    return figure


def charts_of(document: Document) -> list[Chart]:
    """Every figure of a sweep; none where no point finished."""
    rows = _finished(document)
    if not rows:
        return []
    score = document["score"]
    spoken = "; ".join(
        f"{row['label']}: {with_std(row[score], scale_of(score), 1)}" for row in rows[:_MOST_NAMES]
    )
    remark = "Small dots are seeds; a bar is Student's 95 % interval of their mean."
    charts = [
        Chart(
            f"key-{key.replace('.', '-')}",
            f"Against {key}",
            f"{_named(document)} against {key}. {spoken}.",
            functools.partial(against_key, document, key),
            remark,
            is_wide=True,
        )
        for key in document["axes"]
    ]
    return [
        *charts,
        Chart(
            "time",
            "Against time",
            f"{_named(document)} against minutes of training. {spoken}.",
            functools.partial(against_time, document),
            remark,
            is_wide=True,
        ),
    ]


# --- page ---------------------------------------------------------------------------------------


def _headline(document: Document) -> Headline | None:
    winner, score = document["winner"], document["score"]
    if winner is None or score == RANK_ME:
        return None
    half = _half_width(winner[score])
    verdict = winner["sentence"]
    if document["floor"]:
        verdict += f"; untrained {with_std(document['floor'][score], 100, 1)}"
    return Headline(
        f"{100 * winner[score]['mean']:.1f}",
        f"± {100 * half:.1f}" if half else "",
        f"ridge probe on validation images, {winner['label']}, mean of {winner[score]['n']} seeds",
        verdict,
    )


def sweep_report(document: Document) -> Report:
    """What the page of a sweep says."""
    header, *rows = table(document)
    cells = [[Cell(row[0], kind="key"), *row[1:]] for row in rows]
    lines: list[Any] = [Table(header, cells)]
    if document["winner"] is not None:
        lines.append(Note("The winner as flags: ", document["winner"]["flags"]))
    lines += [
        Note(f"{name.capitalize()}: {text}")
        for name, text in closing_lines(document)
        if name != "flags"
    ]
    charts = charts_of(document) or [Note("Not here: figures; no point finished.", is_missing=True)]
    environment = [
        [Cell(name, kind="key"), str(value)] for name, value in document["environment"].items()
    ]
    how = [
        Table((), environment, "Machine", is_text=True),
        Note("Made by ", document["command"]),
    ]
    num_points, num_seeds = len(document["rows"]), len(document["seeds"])
    return Report(
        title=f"{', '.join(document['axes'])} of {document['name']}",
        kicker="jepa_jax sweep",
        facts=[
            f"{num_points} point{'s' if num_points != 1 else ''}",
            f"{num_seeds} seed{'s' if num_seeds != 1 else ''} each",
            duration(document["cost"]["wall_seconds"]),
            document["environment"]["device"],
        ],
        headline=_headline(document),
        chips=(),
        floors=None,
        sections=(
            Section("table", "Table", lines),
            Section("figures", "Figures", charts),
            Section("machine", "Hardware and versions", how),
        ),
    )


def holds_sweep(workdir: pathlib.Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (workdir / "sweep.json").is_file()
