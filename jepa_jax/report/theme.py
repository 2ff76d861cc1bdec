"""Colours of the page and of its figures, light and dark, and how readable they are.

The hues follow Okabe and Ito's palette for colour-blind readers, made darker on white and lighter
on black until text in them has a contrast of at least 4.5:1 (WCAG 2.2, success criterion 1.4.3).
The ten class colours are that palette and four more, as far apart as they get for dichromats.
"""

import dataclasses
from typing import Any

# SVG text is drawn by the reader's own fonts; matplotlib lays it out with the last, the widest.
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"]


@dataclasses.dataclass(frozen=True)
class Theme:
    """One set of colours, as #rrggbb.

    Attributes:
      name: 'light' or 'dark'.
      background, surface: of the page, and of what stands out from it a little.
      text, muted, accent, good, bad: colours that text is written in.
      rule: lines that guide the eye and carry no meaning.
      terms: of loss terms, by name; each series of a run keeps its colour in every figure.
      more: of what has no colour of its own: loss terms of a user, parts of the time, runs.
      classes: ten colours of dots, which no text is written in.
      ramp: (from, to) of a share, from 0 to 1.
      epochs: matplotlib's colour map of the epochs, and the stretch of it that shows.
    """

    name: str
    background: str
    surface: str
    text: str
    muted: str
    accent: str
    good: str
    bad: str
    rule: str
    terms: dict[str, str]
    more: tuple[str, ...]
    classes: tuple[str, ...]
    ramp: tuple[str, str]
    epochs: tuple[str, float, float]

    def text_colours(self) -> dict[str, str]:
        """Every colour that text is written in, by name."""
        names = ("text", "muted", "accent", "good", "bad")
        named = {name: getattr(self, name) for name in names}
        return {**named, **self.terms, **{f"more[{n}]": c for n, c in enumerate(self.more)}}

    def rc(self) -> dict[str, Any]:
        """Matplotlib's settings for this theme."""
        return {
            "font.family": _FONTS,
            "font.size": 9.5,
            "text.color": self.text,
            "text.parse_math": False,  # class names may hold dollars
            "svg.fonttype": "none",
            "svg.hashsalt": "jepa_jax",  # the same data gives the same bytes
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "axes.facecolor": self.background,
            "axes.edgecolor": self.rule,
            "axes.labelcolor": self.muted,
            "axes.labelsize": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.unicode_minus": True,
            "grid.color": self.rule,
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "lines.markersize": 4.5,
            "lines.solid_capstyle": "round",
            "xtick.color": self.rule,
            "xtick.labelcolor": self.muted,
            "xtick.labelsize": 9,
            "ytick.left": False,
            "ytick.minor.left": False,
            "ytick.labelcolor": self.muted,
            "ytick.labelsize": 9,
        }


LIGHT = Theme(
    name="light",
    background="#ffffff",
    surface="#f4f5f8",
    text="#191c21",
    muted="#5a626d",
    accent="#4450b5",
    good="#00714f",
    bad="#b03a00",
    rule="#dfe2e8",
    terms={
        "invariance_loss": "#0069a8",
        "var_loss": "#b34500",
        "cov_loss": "#00775a",
        "val": "#93357f",
        "test": "#7c5a00",
        "h": "#4450b5",
        "z": "#5a626d",
    },
    more=("#93357f", "#5f4b00", "#4450b5", "#0069a8", "#b34500", "#00775a", "#5a626d"),
    classes=(
        "#0072b2",
        "#e69f00",
        "#009e73",
        "#cc79a7",
        "#56b4e9",
        "#d55e00",
        "#3a34d2",
        "#3f0e58",
        "#523514",
        "#bcc270",
    ),
    ramp=("#ffffff", "#313c96"),
    epochs=("viridis", 0.0, 0.82),
)

DARK = Theme(
    name="dark",
    background="#121418",
    surface="#1c2026",
    text="#e8eaee",
    muted="#a0a8b4",
    accent="#a5aefa",
    good="#35c79a",
    bad="#f79566",
    rule="#2c323b",
    terms={
        "invariance_loss": "#5db7ec",
        "var_loss": "#f2904f",
        "cov_loss": "#2fc595",
        "val": "#e69ad2",
        "test": "#dfb93f",
        "h": "#a5aefa",
        "z": "#a0a8b4",
    },
    more=("#e69ad2", "#dfb93f", "#a5aefa", "#2f8fd6", "#f2904f", "#2fc595", "#a0a8b4"),
    classes=(
        "#0072b2",
        "#e69f00",
        "#009e73",
        "#cc79a7",
        "#56b4e9",
        "#d55e00",
        "#ede791",
        "#6a64f2",
        "#7a5226",
        "#e0d5d1",
    ),
    ramp=("#171a20", "#aab3ff"),
    epochs=("viridis", 0.22, 1.0),
)

THEMES = (LIGHT, DARK)


def _channels(colour: str) -> list[float]:
    return [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours #rrggbb, in [1, 21] (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def blend(theme: Theme, share: float) -> str:
    """The colour of a share in [0, 1] on the theme's ramp."""
    ends = zip(*map(_channels, theme.ramp), strict=True)
    mixed = [round(255 * (low + (high - low) * share)) for low, high in ends]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def text_on(colour: str) -> str:
    """Black or white, whichever is easier to read on `colour`."""
    return max(("#ffffff", "#000000"), key=lambda text: contrast(text, colour))
