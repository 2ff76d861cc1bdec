"""Figures of images, of the map and of the confusion matrix."""

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jepa_jax.report.gather import number
from jepa_jax.report.pictures import Map, Neighbours
from jepa_jax.report.plots import WIDE, new_figure
from jepa_jax.report.theme import Theme, blend, text_on

# Above so many classes a name or a number a class could not be read.
MAX_NAMED_CLASSES = 20


def _image(axes: Axes, image: np.ndarray, x: float, y: float, side: float) -> None:
    """An image [H, W, 3] with its lower left corner at (x, y), `side` wide, as it is."""
    height = side * image.shape[0] / image.shape[1]
    box = (x, x + side, y, y + height)
    # "none": an SVG holds the pixels as they are, and the browser makes squares of them.
    axes.imshow(np.clip(image, 0, 1), extent=box, interpolation="none", aspect="auto")


def _canvas(height: float) -> tuple[Figure, Axes]:
    """A figure whose axes count points from its upper left corner, y downwards as -y."""
    figure, axes = new_figure(WIDE, height, left=0, right=0, top=0, bottom=0)
    axes.axis("off")
    return figure, axes


def _fix(axes: Axes, height: float) -> None:
    # imshow moves the limits.
    axes.set_xlim(0, WIDE)
    axes.set_ylim(-height, 0)


def shortened(text: str, length: int) -> str:
    """The text, cut to `length` letters; what cannot be printed is a question mark."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def pairs(shown: tuple[np.ndarray, np.ndarray, np.ndarray], theme: Theme) -> Figure:
    """Images, first and second views, [N, H, W, 3] each: a row a kind, a column an image."""
    left, gap = 46.0, 3.0
    side = (WIDE - left + gap) / len(shown[0]) - gap
    tall = [side * kind.shape[1] / kind.shape[2] for kind in shown]
    height = sum(tall) + 2 * gap
    figure, axes = _canvas(height)
    y = gap
    for kind, name, extent in zip(shown, ("image", "view 1", "view 2"), tall, strict=True):
        y -= extent + gap
        axes.text(0, y + extent / 2, name, va="center", color=theme.muted)
        for place, image in enumerate(kind):
            _image(axes, image, left + place * (side + gap), y, side)
    _fix(axes, height)
    return figure


def neighbours(found: Neighbours, label_names: tuple[str, ...], theme: Theme) -> Figure:
    """A row a query: the image, then its nearest; a tick or a cross says whether the class is the
    query's."""
    num_rows, num_columns = found.labels.shape
    gap, divide, below = 7.0, 16.0, 16.0
    side = (WIDE - divide + gap) / num_columns - gap
    tall = side * found.images.shape[2] / found.images.shape[3]
    row = tall + below + 3
    height = row * num_rows + 18
    figure, axes = _canvas(height)
    for x, text in ((0.0, "query"), (side + gap + divide, "its nearest, from left to right")):
        axes.text(x, -8, text, color=theme.muted, va="center")
    for line in range(num_rows):
        for column in range(num_columns):
            x = column * (side + gap) + (divide if column else 0)
            y = -18 - line * row - tall
            _image(axes, found.images[line, column], x, y, side)
            own, label = found.labels[line, 0], found.labels[line, column]
            cosine = f"{found.cosines[line, column - 1]:.2f}" if column else ""
            name = shortened(label_names[label], 10) if label >= 0 else ""
            if not column or own < 0 or label < 0:
                text, colour = name or cosine, theme.muted if column else theme.text
            elif own == label:
                text, colour = f"✓ {cosine}", theme.good
            else:
                text, colour = f"✗ {name}", theme.bad
            axes.text(x, y - below / 2, text, fontsize=8, color=colour, va="center")
    _fix(axes, height)
    return figure


def map_of(found: Map, label_names: tuple[str, ...], theme: Theme) -> Figure:
    """The map as dots, coloured by class where there are labels, with names at the medians."""
    height = 410.0
    figure, axes = new_figure(WIDE, height, left=2, right=2, top=2, bottom=2)
    colours = np.full(len(found.labels), theme.muted, dtype=object)
    for label in np.unique(found.labels[found.labels >= 0]):
        colours[found.labels == label] = theme.classes[label % len(theme.classes)]
    x, y = found.places.T
    style = {"s": 11, "linewidths": 0, "alpha": 0.85, "clip_on": False}
    axes.scatter(x, y, c=colours.tolist(), **style)
    axes.axis("off")
    axes.set_aspect("auto")
    axes.margins(0.02)
    if len(label_names) <= MAX_NAMED_CLASSES:
        halo = [patheffects.withStroke(linewidth=3, foreground=theme.background)]
        names = _named_places(found, label_names, axes, WIDE - 4, height - 4)
        for (px, py), name, colour in names:
            dot = theme.classes[colour % len(theme.classes)]
            at = {"xycoords": "axes points", "va": "center", "path_effects": halo}
            axes.annotate("●", (px - 4, py), ha="right", color=dot, fontsize=10, **at)
            axes.annotate(name, (px, py), color=theme.text, weight="bold", fontsize=10.5, **at)
    return figure


def _named_places(found: Map, label_names, axes: Axes, width: float, height: float):
    """((x, y) in points, name, class) at the medians of the classes, moved apart in y."""
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[tuple[float, float], str, int]] = []
    for label in np.unique(found.labels[found.labels >= 0]):
        median = np.median(found.places[found.labels == label], axis=0)
        name = shortened(label_names[label], 16)
        half = 3.2 * len(name)
        x = min(max((median[0] - x0) / (x1 - x0) * width - half, 16), width - 2 * half - 8)
        y = (median[1] - y0) / (y1 - y0) * height
        placed.append(((x, y), name, int(label)))
    placed.sort(key=lambda item: item[0][1])
    done: list[tuple[tuple[float, float], str, int]] = []
    for (x, y), name, label in placed:
        for (other_x, other_y), other, _ in done:
            near = x < other_x + 6.6 * len(other) + 14 and other_x < x + 6.6 * len(name) + 14
            if near and y < other_y + 15:
                y = other_y + 15
        done.append(((x, min(y, height - 8)), name, label))
    return done


def row_percent(matrix: list[list[float]]) -> np.ndarray:
    """Counts [K, K] as percent of their row; a row without any stays at 0."""
    counts = np.array([[number(value) for value in row] for row in matrix], np.float64)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def confusion(matrix: list[list[float]], label_names: tuple[str, ...], theme: Theme) -> Figure:
    """Rows: the true class; columns: what the probe said; percent of the row."""
    percent = row_percent(matrix)
    count = len(percent)
    named = count <= MAX_NAMED_CLASSES
    left, bottom = (84.0, 70.0) if named else (40.0, 30.0)
    side = min(WIDE - left - 10, 420.0)
    height = min(side, 27.0 * count + 50) if named else side
    figure, axes = new_figure(
        WIDE, height + bottom + 22, left=left, right=WIDE - left - side, top=22, bottom=bottom
    )
    colours = [[blend(theme, value / 100) for value in row] for row in percent]
    edge = {"edgecolor": theme.background, "linewidth": 1.5 if named else 0}
    if named:
        for line, row in enumerate(percent):
            for column, value in enumerate(row):
                colour = colours[line][column]
                axes.add_patch(Rectangle((column, line), 1, 1, facecolor=colour, **edge))
                style = {"ha": "center", "va": "center", "fontsize": 9, "color": text_on(colour)}
                text = f"{value:.0f}" if value >= 0.5 else "·"
                axes.text(column + 0.5, line + 0.5, text, **style)
        names = [shortened(name, 14) for name in label_names[:count]]
        places = np.arange(count) + 0.5
        axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, names)
        axes.tick_params(length=0, labelcolor=theme.text)
    else:
        pixels = [[to_rgb(colour) for colour in row] for row in colours]
        axes.imshow(pixels, extent=(0, count, count, 0), interpolation="none")
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_aspect("auto")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_title(
        "true class, % of its images",
        loc="left",
        fontsize=9.5,
        color=theme.muted,
        x=-left / side,
    )
    return figure
