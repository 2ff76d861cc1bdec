"""Accuracy against time as a picture: a colour a config, the floors as lines to compare with."""

import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jepa_jax.benchmark.time_to_accuracy_tables import PROBE_NAMES, Curves, Floor
from jepa_jax.report.plots import WIDE, label_ends, log_scale, name_axes, render, run_style
from jepa_jax.report.theme import LIGHT, Theme

# In points.
_LEFT, _RIGHT, _PANEL, _TOP, _BOTTOM, _BETWEEN = 40.0, 196.0, 230.0, 30.0, 38.0, 70.0


def write_plot(path: pathlib.Path, all_curves: Sequence[Curves], floors: Sequence[Floor]) -> None:
    """Writes the curves of several configs, at least one of them with figures, as a PNG."""
    path.write_bytes(render(lambda theme: _figure(all_curves, floors, theme), LIGHT, "png"))


def _figure(all_curves: Sequence[Curves], floors: Sequence[Floor], theme: Theme) -> Figure:
    height = _TOP + len(PROBE_NAMES) * _PANEL + (len(PROBE_NAMES) - 1) * _BETWEEN + _BOTTOM
    figure = Figure((WIDE / 72, height / 72))
    for place, (probe, name) in enumerate(PROBE_NAMES.items()):
        top = height - _TOP - place * (_PANEL + _BETWEEN)
        box = (_LEFT, top - _PANEL, WIDE - _LEFT - _RIGHT, _PANEL)
        axes = figure.add_axes((box[0] / WIDE, box[1] / height, box[2] / WIDE, box[3] / height))
        ends = _draw_curves(axes, all_curves, probe, theme)
        ends += _draw_floors(axes, all_curves, floors, probe, theme)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        name_axes(
            axes, "seconds of training, log scale", f"{name} on validation images, % (features)"
        )
        label_ends(axes, ends)
    return figure


def _colour(place: int, theme: Theme) -> str:
    return run_style(place, theme)["color"]


def _draw_curves(
    axes: Axes, all_curves: Sequence[Curves], probe: str, theme: Theme
) -> list[tuple[float, str, str]]:
    """Thin lines for the seeds, a bold one for their mean; returns what to write at its end.

    The untrained network has no place on a logarithmic axis: it is among the floors.
    """
    ends, times = [], []
    for place, curves in enumerate(all_curves):
        if not curves.figures:
            continue
        style = run_style(place, theme)
        for figures in curves.figures.values():
            points = [(row["seconds"], 100 * row[probe]["val"]) for row in figures["rows"][1:]]
            axes.plot(*zip(*points, strict=True), color=style["color"], linewidth=0.8, alpha=0.55)
        mean = [
            tuple(
                statistics.fmean(values)
                for values in zip(
                    *((r["seconds"], 100 * r[probe]["val"]) for r in rows), strict=True
                )
            )
            for rows in curves.rows()[1:]
        ]
        x, y = zip(*mean, strict=True)
        axes.plot(x, y, linewidth=2.4, marker="o", **style)
        times += x
        dim = next(iter(curves.figures.values()))["feature_dim"]
        ends.append((y[-1], f"{curves.name} {y[-1]:.1f} ({dim})", style["color"]))
    low, high = min(times), max(times)
    log_scale(axes.xaxis, low, max(high, 1.01 * low))
    axes.set_xlim(low / 1.08, high * 1.08)
    return ends


def _draw_floors(
    axes: Axes,
    all_curves: Sequence[Curves],
    floors: Sequence[Floor],
    probe: str,
    theme: Theme,
) -> list[tuple[float, str, str]]:
    """Horizontal lines; the untrained networks in the colours of their configs."""
    own = {f"untrained, {curves.name}": place for place, curves in enumerate(all_curves)}
    ends = []
    for floor in floors:
        value = 100 * floor.scores[probe]["val"]
        colour = _colour(own[floor.name], theme) if floor.name in own else theme.muted
        axes.axhline(value, color=colour, linewidth=1.0, linestyle=(0, (3, 2)), zorder=1)
        dim = f" ({floor.feature_dim})" if floor.feature_dim else ""
        ends.append((value, f"{floor.name} {value:.1f}{dim}", colour))
    return ends
