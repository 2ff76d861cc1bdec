"""Curves and bars: plain data in, a matplotlib figure out, in the colours of a theme.

No pyplot and no global state: a figure is drawn inside `render`, which sets the theme for it alone.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jepa_jax.progress import duration
from jepa_jax.report.gather import Run, number, part
from jepa_jax.report.theme import Theme

# In points: 4/3 of them are CSS pixels, so that a figure's 9.5 pt text is the page's 13 px.
HALF, WIDE = 390.0, 600.0
_LEFT, _HEIGHT = 40.0, 215.0
_MARKERS_UP_TO = 15
_MAX_SPECTRA = 40
# As many as there are colours.
_MAX_TIME_PARTS = 7

Draw = Callable[[Theme], Figure]


def render(draw: Draw, theme: Theme, format: str = "svg") -> bytes:
    """A figure as the bytes of an SVG or, at twice the size on the page, of a PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(theme.rc()), warnings.catch_warnings():
        # A class name in letters that no font here has shows as boxes; the page has it as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        with _quiet_about_fonts():
            metadata = {"Date": None} if format == "svg" else None
            draw(theme).savefig(buffer, format=format, dpi=192, metadata=metadata)
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet_about_fonts():
    """The reader's fonts are named for the browser; few of them are on the machine that draws."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def new_figure(
    width: float, height: float, *, left=_LEFT, right=12.0, top=26.0, bottom=36.0
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; sizes and margins in points."""
    figure = Figure((width / 72, height / 72))
    place = (left / width, bottom / height)
    size = (1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes((*place, *size))


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Labels; the y axis is named above its top, where it can be read without a turn."""
    axes.set_xlabel(x)
    axes.set_ylabel(y, rotation=0, ha="left", va="bottom")
    width, height = _size(axes)
    axes.yaxis.set_label_coords(-_LEFT / width, 1 + 8 / height)


def _size(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes in points."""
    (width, height), place = 72 * axes.figure.get_size_inches(), axes.get_position()
    return place.width * width, place.height * height


def _power(value: float, _: int = 0) -> str:
    """'10⁻⁵', '1', '10³'."""
    exponent = round(math.log10(value))
    if exponent in (0, 1):
        return f"{10**exponent}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _plain(value: float, _: int = 0) -> str:
    return f"{value:,.10g}".replace("-", "−")


def log_scale(axis, low: float, high: float) -> None:
    """A logarithmic axis; its ticks are plain numbers, and powers where these would be long."""
    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.5 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    are_long = decades > 2 and (low < 1e-3 or high >= 1e5)
    axis.set_major_formatter(FuncFormatter(_power if are_long else _plain))
    axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], *, gap: float = 12.0) -> None:
    """Names of lines at the right edge: (y, text, colour), moved apart to `gap` points."""
    height = _size(axes)[1]
    low, high = axes.get_ylim()
    transform = axes.transScale.transform
    bottom, top = transform((1.0, low))[1], transform((1.0, high))[1]
    places = [(transform((1.0, y))[1] - bottom) / (top - bottom) * height for y, _, _ in ends]
    order = np.argsort(places, kind="stable")
    spread = spread_out([places[i] for i in order], gap, 2.0, height)
    for i, place in zip(order, spread, strict=True):
        _, text, colour = ends[i]
        axes.annotate(
            text,
            (1.0, place / height),
            xytext=(7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9.5,
            annotation_clip=False,
        )


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as it takes to lie `gap` apart, inside [low, high]."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    for index in range(len(moved) - 1, -1, -1):
        ceiling = high if index == len(moved) - 1 else moved[index + 1] - gap
        moved[index] = min(moved[index], ceiling)
    return moved


def _plot(axes: Axes, x, y, colour: str, *, most: int = 0, **style) -> None:
    """A line; with dots where it, and the longest beside it, has few of them."""
    count = np.count_nonzero(np.isfinite(y))
    if max(count, most) <= _MARKERS_UP_TO or count == 1:
        style = {"marker": "o", **style}
    axes.plot(x, y, color=colour, **style)


def _epoch_axis(axes: Axes, epochs: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    finite = [e for e in epochs if math.isfinite(e)] or [1.0]
    pad = 0.5 if min(finite) == max(finite) else 0.02 * (max(finite) - min(finite))
    axes.set_xlim(min(finite) - pad, max(finite) + pad)


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _short(value: float) -> str:
    """About three digits, never in exponents of ten for what a person would write out."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-4 or not size else f"{value:.1e}"


def _curves(
    run: Run,
    lines: Sequence[tuple[str, Sequence[float], str, dict]],
    unit: str,
    *,
    log: bool = False,  # where they span enough for it
    from_zero: bool = False,
    value: Callable[[float], str] = _short,
) -> Figure:
    """Lines over the epochs, each (name, values, colour, style); several are named at their end,
    with their last value."""
    figure, axes = new_figure(HALF, _HEIGHT, right=118.0 if len(lines) > 1 else 12.0)
    epochs = run.epochs()
    drawn = [v for _, values, _, _ in lines for v in values if math.isfinite(v)]
    positive = [v for v in drawn if v > 0]
    log = log and bool(positive) and max(positive) > 3 * min(positive)
    for _, values, colour, style in lines:
        y = [v if v > 0 or not log else math.nan for v in values]
        _plot(axes, epochs, y, colour, **style)
    if log:
        log_scale(axes.yaxis, min(positive), max(positive))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    if from_zero:
        axes.set_ylim(0, 1.12 * max(drawn) or 1)
    _epoch_axis(axes, epochs)
    name_axes(axes, "epoch", f"{unit}, log scale" if log else unit)
    if len(lines) > 1:
        ends = [(_last(v), f"{name} {value(_last(v))}", c) for name, v, c, _ in lines]
        label_ends(axes, [end for end in ends if end[0] > 0 or not log])
    return figure


def term_name(term: str) -> str:
    """'invariance' of 'invariance_loss'; the field's words for the package's own."""
    names = {"var_loss": "variance", "cov_loss": "covariance", "pred_loss": "prediction"}
    return names.get(term, term.removesuffix("_loss").replace("_", " ") or term)


def term_colour(run: Run, term: str, theme: Theme) -> str:
    """The same colour for a term in every figure."""
    own = [name for name in run.terms() if name not in theme.terms]
    return theme.terms.get(term) or theme.more[own.index(term) % len(theme.more)]


def loss(run: Run, theme: Theme) -> Figure:
    """The loss and its terms over the epochs, weighted where the weights are known."""
    weights = run.weights()
    lines = [("loss", run.series("train/loss"), theme.text, {"linewidth": 2.4})]
    for term in run.terms():
        weight = weights.get(term, 1.0)
        values = [weight * value for value in run.series(f"train/{term}")]
        lines.append((term_name(term), values, term_colour(run, term, theme), {}))
    unit = "loss and weighted terms" if weights else "loss and terms as they are"
    are_positive = all(not value <= 0 for _, values, _, _ in lines for value in values)
    return _curves(run, lines, unit, log=are_positive)


def learning_rate(run: Run, theme: Theme) -> Figure:
    """The learning rate at the end of each epoch."""
    lines = [("rate", run.series("train/lr"), theme.text, {})]
    return _curves(run, lines, "learning rate, last step of the epoch", from_zero=True)


def gradients(run: Run, theme: Theme) -> Figure:
    """Norms of the gradient, in all and of each weighted term on the encoder's parameters."""
    lines = []
    for term in run.terms():
        if values := run.series(f"watch/grad_norm/{term}"):
            lines.append((term_name(term), values, term_colour(run, term, theme), {}))
    if values := run.series("train/grad_norm"):
        lines.append(("all", values, theme.text, {"linewidth": 2.4}))
    return _curves(run, lines, "gradient norm (L2)", log=True)


def probe_curves(run: Run, offline: tuple[str, float] | None, theme: Theme) -> Figure:
    """Online probe accuracy over the epochs, and the offline probe's as a line to compare with."""
    names = (
        ("train views", "train/probe_acc", theme.muted, {"linewidth": 1.2}),
        ("val", "val/online_probe_acc", theme.terms["val"], {}),
        ("test", "test/online_probe_acc", theme.terms["test"], {"linestyle": (0, (4, 1.6))}),
    )
    lines = [
        (name, [100 * value for value in run.series(key)], colour, style)
        for name, key, colour, style in names
        if run.series(key)
    ]
    if offline is not None:
        style = {"linestyle": ":", "marker": "", "linewidth": 1.6}
        level = [100 * offline[1]] * len(run.rows)
        lines.append((offline[0], level, theme.accent, style))
    percent = "{:.1f} %".format
    return _curves(run, lines, "accuracy of the online probe, %", value=percent)


def throughput(run: Run, theme: Theme) -> Figure:
    """Images per second of training, by epoch."""
    lines = [("speed", run.series("images_per_second"), theme.text, {})]
    return _curves(run, lines, "training speed, images/s", from_zero=True)


def time_spent(run: Run, theme: Theme) -> Figure:
    """One bar: where the seconds went, the longest part first, with a key below it."""
    parts = sorted(run.seconds().items(), key=lambda item: (item[0] == "other", -item[1]))
    total = sum(seconds for _, seconds in parts)
    if len(parts) > _MAX_TIME_PARTS:
        rest = sum(seconds for _, seconds in parts[_MAX_TIME_PARTS - 1 :])
        parts = [*parts[: _MAX_TIME_PARTS - 1], ("other", rest)]
    lines = math.ceil(len(parts) / 2)
    height = 66.0 + 18 * lines
    figure, axes = new_figure(HALF, height, left=0, right=0, top=26, bottom=height - 50)
    axes.axis("off")
    axes.set_xlim(0, total)
    axes.set_ylim(0, 1)
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{duration(total)} in all", (0, 1), xytext=(0, 13), color=theme.muted, **at)
    start = 0.0
    for place, (name, seconds) in enumerate(parts):
        colour = run_style(place, theme)["color"]
        box = {"facecolor": colour, "edgecolor": theme.background, "linewidth": 1.2}
        axes.add_patch(Rectangle((start, 0), seconds, 1, **box))
        column, line = divmod(place, lines)
        x, y = column * HALF / 2, -18 - 18 * line
        axes.annotate("■", (0, 0), xytext=(x, y), color=colour, **at)
        share = f"{100 * seconds / total:.0f} %" if seconds >= 0.005 * total else "< 1 %"
        axes.annotate(f"{name} {duration(seconds)}, {share}", (0, 0), xytext=(x + 13, y), **at)
        start += seconds
    return figure


def rank(run: Run, theme: Theme) -> Figure:
    """RankMe of the representation and of the embedding over the epochs."""
    return _of_h_and_z(run, theme, {"rank_me": {}}, "RankMe, effective dimensions")


def spread(run: Run, theme: Theme) -> Figure:
    """Standard deviation of the features over the epochs: their mean and their least."""
    styles = {"std_mean": {}, "std_min": {"linestyle": (0, (3, 1.6))}}
    return _of_h_and_z(run, theme, styles, "standard deviation of a feature")


def _of_h_and_z(run: Run, theme: Theme, kinds: dict[str, dict], unit: str) -> Figure:
    lines = []
    for space in ("h", "z"):
        for kind, style in kinds.items():
            if values := run.series(f"watch/{space}_{kind}"):
                name = f"{space} {kind.removeprefix('std_')}" if len(kinds) > 1 else space
                lines.append((name, values, theme.terms[space], style))
    return _curves(run, lines, unit, from_zero=True)


def spectra(run: Run, space: str) -> list[tuple[float, list[float], list[float]]]:
    """(epoch, ranks, eigenvalues) of the epochs that have a spectrum; at most 40 of them."""
    found = []
    for epoch, row in zip(run.epochs(), run.rows, strict=True):
        values = row.get(f"watch/{space}_spectrum")
        if type(values) is list and values:
            ranks = row.get(f"watch/{space}_spectrum_ranks") or range(1, len(values) + 1)
            pairs = zip(map(number, ranks), map(number, values), strict=False)
            kept = [(rank, value) for rank, value in pairs if rank > 0 and value > 0]
            if kept:
                found.append((epoch, *map(list, zip(*kept, strict=True))))
    if len(found) > _MAX_SPECTRA:
        chosen = np.linspace(0, len(found) - 1, _MAX_SPECTRA).round().astype(int)
        found = [found[index] for index in chosen]
    return found


def final_spectrum(run: Run, network: str, space: str) -> list[float]:
    """All positive eigenvalues that the evaluation found, descending; may be empty."""
    found = part(part(part(run.evaluation, "health"), network), space).get("spectrum")
    values = map(number, found if type(found) is list else [])
    return [value for value in values if value > 0]


def spectrum(run: Run, theme: Theme) -> Figure:
    """Covariance eigenvalues by rank, log-log, a line an epoch; the untrained network dashed."""
    spaces = [s for s in ("h", "z") if spectra(run, s) or final_spectrum(run, "encoder", s)]
    figure = Figure((WIDE / 72, 250 / 72))
    names = {"h": "representation h", "z": "embedding z"}
    everywhere = [epoch for space in spaces for epoch, _, _ in spectra(run, space)]
    colours = _epoch_colours(theme, everywhere)
    for place, space in enumerate(spaces):
        column = WIDE / len(spaces)
        box = (place * column + _LEFT, 38, column - _LEFT - 14, 168)
        axes = figure.add_axes((box[0] / WIDE, box[1] / 250, box[2] / WIDE, box[3] / 250))
        drawn = _spectrum_lines(run, space, axes, colours, theme)
        for axis, index in ((axes.xaxis, 0), (axes.yaxis, 1)):
            values = [v for pair in drawn for v in pair[index]]
            log_scale(axis, min(values), max(values))
        name_axes(axes, "rank of the eigenvalue", "eigenvalue of the covariance")
        at = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(names[space], (1, 1), xytext=(0, 8), ha="right", color=theme.text, **at)
    if everywhere:
        _epoch_key(figure, theme, min(everywhere), max(everywhere))
    return figure


def _spectrum_lines(run, space, axes, colours, theme) -> list[tuple[list, list]]:
    drawn = []
    for epoch, ranks, values in spectra(run, space):
        axes.plot(ranks, values, color=colours(epoch), linewidth=1.3)
        drawn.append((ranks, values))
    ends = {"untrained": (theme.muted, (0, (4, 2))), "encoder": (theme.text, "-")}
    for network, (colour, dashes) in ends.items():
        # The last epoch shows the trained one already, through fewer images.
        if network == "encoder" and drawn:
            continue
        if values := final_spectrum(run, network, space):
            ranks = list(range(1, len(values) + 1))
            axes.plot(ranks, values, color=colour, linestyle=dashes, linewidth=1.6)
            drawn.append((ranks, values))
            # A spectrum descends: what is left of it and below is free.
            at = min(len(values) - 1, round(len(values) ** 0.6))
            label = "untrained" if network == "untrained" else "trained"
            place = {"xytext": (-6, -2), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(label, (ranks[at], values[at]), color=colour, **place)
    return drawn


def _epoch_colours(theme: Theme, epochs: Sequence[float]) -> Callable[[float], tuple]:
    name, low, high = theme.epochs
    ramp = matplotlib.colormaps[name]
    first, last = (min(epochs), max(epochs)) if epochs else (0.0, 1.0)

    def colour(epoch: float) -> tuple:
        share = (epoch - first) / (last - first) if last > first else 1.0
        return ramp(low + (high - low) * share)

    return colour


def _epoch_key(figure: Figure, theme: Theme, first: float, last: float) -> None:
    """A strip of the epochs' colours, named at both ends, in the figure's upper right corner."""
    name, low, high = theme.epochs
    key = figure.add_axes(((WIDE - 126) / WIDE, 236 / 250, 90 / WIDE, 7 / 250))
    shades = matplotlib.colormaps[name](np.linspace(low, high, 64))
    edges = np.linspace(0, 1, 65)
    for shade, start, end in zip(shades, edges, edges[1:], strict=False):
        key.add_patch(Rectangle((start, 0), end - start + 0.004, 1, color=shade, linewidth=0))
    key.set_xlim(0, 1)
    key.axis("off")
    at = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    key.annotate(f"epoch {first:g}", (0, 0.5), xytext=(-6, 0), ha="right", color=theme.muted, **at)
    key.annotate(f"{last:g}", (1, 0.5), xytext=(6, 0), color=theme.muted, **at)


def floors(scores: Sequence[tuple[str, dict]], theme: Theme) -> Figure:
    """Accuracies with their intervals, one a line, the first of them the run's own."""
    height = 30.0 + 27 * len(scores)
    figure, axes = new_figure(HALF, height, left=78, right=52, top=4, bottom=34)
    highest = max(number(score.get("high", score["acc"])) for _, score in scores)
    for place, (_, score) in enumerate(scores):
        colour = theme.accent if not place else theme.muted
        acc = 100 * number(score["acc"])
        axes.plot((0, acc), (-place, -place), color=theme.rule, linewidth=1.4, zorder=1)
        low, high = (100 * number(score.get(key)) for key in ("low", "high"))
        if math.isfinite(low) and math.isfinite(high):
            axes.plot((low, high), (-place, -place), color=colour, linewidth=3.4, zorder=2)
        axes.plot(acc, -place, "o", color=colour, markersize=7 if not place else 5.5, zorder=3)
        shift = max(high, acc) if math.isfinite(high) else acc
        axes.annotate(
            f"{acc:.1f} %",
            (shift, -place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold" if not place else "normal",
        )
    axes.set_yticks([-place for place in range(len(scores))], [name for name, _ in scores])
    axes.tick_params(axis="y", labelcolor=theme.text, length=0, pad=8)
    axes.set_ylim(0.6 - len(scores), 0.6)
    axes.set_xlim(0, min(100.0, 112 * highest) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(False)
    axes.set_xlabel("accuracy, %")
    return figure


COMPARED = {
    "train/loss": ("training loss", 1.0),
    "watch/h_rank_me": ("RankMe of h, effective dimensions", 1.0),
    "val/online_probe_acc": ("online probe, validation accuracy, %", 100.0),
    "test/online_probe_acc": ("online probe, test accuracy, %", 100.0),
}


def run_style(place: int, theme: Theme) -> dict:
    """Colour and dashes of the run at `place` of a comparison."""
    colours = (theme.accent, *(c for c in theme.more if c != theme.accent))
    dashes = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)))
    return {
        "color": colours[place % len(colours)],
        "linestyle": dashes[place // len(colours) % len(dashes)],
    }


def compared(runs: Sequence[Run], theme: Theme) -> Figure:
    """Curves of several runs, a panel a metric, with one key for all."""
    keys = [key for key in COMPARED if any(run.series(key) for run in runs)]
    columns = min(2, len(keys))
    lines = math.ceil(len(keys) / columns)
    names = [_short_name(run.name) for run in runs]
    per_line = max(1, min(len(runs), int(WIDE // (6.2 * max(map(len, names)) + 34))))
    top = 10.0 + 16 * math.ceil(len(runs) / per_line)
    height = top + 205 * lines
    figure = Figure((WIDE / 72, height / 72))
    _runs_key(figure, names, per_line, height, theme)
    for place, key in enumerate(keys):
        line, column = divmod(place, columns)
        width = WIDE / columns
        box = (column * width + _LEFT, height - top - 205 * line - 168, width - 56, 134)
        axes = figure.add_axes((box[0] / WIDE, box[1] / height, box[2] / WIDE, box[3] / height))
        unit, scale = COMPARED[key]
        most = max(len(run.rows) for run in runs)
        for index, run in enumerate(runs):
            if values := run.series(key):
                y = [scale * value for value in values]
                style = run_style(index, theme)
                colour = style.pop("color")
                _plot(axes, run.epochs(), y, colour, most=most, **style)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        _epoch_axis(axes, [e for run in runs if run.series(key) for e in run.epochs()])
        name_axes(axes, "epoch", unit)
    return figure


def _short_name(name: str) -> str:
    """What fits on a line: both ends, because the names of a sweep differ anywhere."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= 88 else f"{name[:43]}…{name[-43:]}"


def _runs_key(figure: Figure, names: list[str], per_line: int, height: float, theme: Theme) -> None:
    key = figure.add_axes((0, 0, 1, 1))
    key.axis("off")
    key.set_xlim(0, WIDE)
    key.set_ylim(0, height)
    for place, name in enumerate(names):
        line, column = divmod(place, per_line)
        x, y = 1 + column * WIDE / per_line, height - 9 - 16 * line
        key.plot((x, x + 18), (y, y), **run_style(place, theme))
        key.text(x + 25, y, name, va="center")
