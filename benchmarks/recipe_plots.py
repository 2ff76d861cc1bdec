"""Draws the pictures of docs/recipe.md from measured figures.

python -m benchmarks.recipe_plots --ablation benchmarks/results/ablation.json --out docs
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jepa_jax.report.theme import LIGHT

_RUNGS = ("rapid as written", "+ balance of the loss", "+ a schedule per step", "+ smaller batches")
_TERMS = {"invariance": "invariance_loss", "variance": "var_loss", "covariance": "cov_loss"}
_KICKED, _SMOOTH = LIGHT.bad, LIGHT.accent


def _rc() -> dict[str, Any]:
    return {**LIGHT.rc(), "font.family": ["DejaVu Sans"], "axes.titlesize": 10.5}


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=LIGHT.text, pad=10)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _percent(runs: Sequence[dict[str, Any]], probe: str) -> tuple[float, float]:
    values = [100 * run["probes"][probe] for run in runs if run["probes"]]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_balance(ablation: dict[str, Any]) -> Figure:
    """Gradients of the terms on the encoder, and what balancing them brings."""
    figure = Figure((8.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    norms = ablation["gradient_norms"]
    texts = {"rapid": "rapid's weights\n1 : 25 : 1", "balanced": "balanced\n1 : 1 : 164"}
    for group, of_terms in enumerate(norms.values()):
        for place, (term, norm) in enumerate(of_terms.items()):
            x = group + 0.27 * (place - 1)
            left.bar(x, norm, 0.24, color=LIGHT.terms[_TERMS[term]])
            where = {"ha": "center", "va": "bottom", "fontsize": 8.5}
            left.text(x, 1.08 * norm, f"{term}\n{norm:.2g}", color=LIGHT.text, **where)
    _log_scale(left)
    values = [norm for of_terms in norms.values() for norm in of_terms.values()]
    left.set_ylim(min(values) / 3, max(values) * 5)
    left.set_xticks(range(len(norms)), [texts[kind] for kind in norms])
    left.tick_params(axis="x", length=0)
    _title(left, "Gradient of each weighted term on the encoder")

    for place, probe in enumerate(("ridge", "knn")):
        for group, rung in enumerate(_RUNGS[:2]):
            mean, spread = _percent(ablation["rungs"][rung], probe)
            x, colour = place + 0.36 * (group - 0.5), (_KICKED, _SMOOTH)[group]
            right.bar(x, mean, 0.32, color=colour, yerr=spread, ecolor=LIGHT.text)
            right.text(x, mean + spread + 0.6, f"{mean:.1f}", ha="center", color=LIGHT.text)
            name = ("rapid's weights", "balanced")[group]
            spot = {"ha": "center", "va": "bottom", "rotation": 90, "color": "#ffffff"}
            right.text(x, 1.5, name, **spot)
    right.set_xticks(range(2), ("ridge", "20 nearest neighbours"))
    right.tick_params(axis="x", length=0)
    _title(right, "Accuracy on validation images, %")
    return figure


def draw_kick(ablation: dict[str, Any]) -> Figure:
    """Rate, movement and loss of every step, by the reference's schedule and by one per step."""
    figure = Figure((8.6, 5.4), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    schedules = {
        "late_epoch": ("once an epoch, one late (the reference's)", _KICKED),
        "step": ("every step", _SMOOTH),
    }
    texts = {
        "lr": "Learning rate",
        "most_moved": "Most that a layer moved in one step, as a share of the norm of its weights",
        "loss": "Loss",
    }
    for axes, (name, text) in zip(rows, texts.items(), strict=True):
        for schedule, (_, colour) in schedules.items():
            run = ablation["kick"][schedule]
            values = run["records"][name]
            x = [step / run["steps_an_epoch"] for step in range(len(values))]
            axes.plot(x, values, color=colour, linewidth=1.4)
        _title(axes, text)
    _log_scale(rows[1])
    _log_scale(rows[2])
    for place, (text, colour) in enumerate(schedules.values()):
        spot = {"transform": rows[0].transAxes, "ha": "right", "color": colour}
        rows[0].text(0.99, 0.26 - 0.16 * place, text, **spot)
    rows[2].set_xlabel("epochs")
    rows[2].set_xlim(0, None)
    return figure


def draw_batches(ablation: dict[str, Any]) -> Figure:
    """Ridge accuracy against images seen, by the size of the batch."""
    figure = Figure((8.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for rung, colour in ((_RUNGS[2], _KICKED), (_RUNGS[3], _SMOOTH)):
        runs = ablation["rungs"][rung]
        epochs = sorted(map(int, runs[0]["curve"]))
        images = [epoch * runs[0]["images_an_epoch"] / 1000 for epoch in epochs]
        means, spreads = [], []
        for epoch in epochs:
            values = [100 * run["curve"][str(epoch)] for run in runs]
            means.append(statistics.fmean(values))
            spreads.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        axes.errorbar(images, means, spreads, marker="o", color=colour, capsize=3)
        text = f"  batch {runs[0]['batch_size']}: {runs[0]['steps']:,} steps in all"
        axes.text(images[-1], means[-1], text, color=colour, va="center")
    untrained = [100 * run["untrained"]["ridge"] for run in ablation["rungs"][_RUNGS[3]]]
    floor = statistics.fmean(untrained)
    axes.axhline(floor, color=LIGHT.muted, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(images[-1], floor + 0.5, "untrained", color=LIGHT.muted, va="bottom")
    axes.set_xlim(0, 1.34 * images[-1])
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= images[-1]])
    axes.set_xlabel("thousand images seen")
    _title(axes, "Ridge accuracy on validation images, %")
    return figure


def main() -> None:
    """Writes balance.png, kick.png and batches.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ablation", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    ablation = json.loads(arguments.ablation.read_text())

    with matplotlib.rc_context(_rc()):
        for name, draw in (
            ("balance", draw_balance),
            ("kick", draw_kick),
            ("batches", draw_batches),
        ):
            draw(ablation).savefig(arguments.out / f"{name}.png", dpi=144)


if __name__ == "__main__":
    main()
