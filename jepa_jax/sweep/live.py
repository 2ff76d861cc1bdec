"""A sweep while it runs: a line a point, the best so far on top; plain lines without a terminal."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.table

from jepa_jax.progress import duration, say
from jepa_jax.report.sweep_table import RANK_ME, scale_of

# Of a terminal's height, for what was printed above.
_MARGIN = 6


class Live:
    """Shows rows: (label, share done in [0, 1], score or None, what happened)."""

    def __init__(self, title: str, unit: str):
        self._title, self._unit = title, unit
        self._live: rich.live.Live | None = None
        if sys.stdout.isatty():
            self._live = rich.live.Live(console=rich.console.Console(), auto_refresh=False)

    def __enter__(self) -> "Live":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            with contextlib.suppress(Exception):
                self._live.stop()

    def show(self, rows: Sequence[tuple[str, float, float | None, str]]) -> None:
        """Draws the rows anew; does nothing without a terminal."""
        if self._live is None:
            return
        table = rich.table.Table(title=self._title, title_justify="left", box=None)
        for name in ("point", "done", self._unit, ""):
            table.add_column(name, justify="left" if name in ("point", "") else "right")
        height = max(3, self._live.console.size.height - _MARGIN)
        for label, share, score, text in ordered(rows)[:height]:
            figure = "-" if score is None else f"{score:.2f}"
            table.add_row(label, f"{100 * share:.0f} %", figure, text)
        self._live.update(table, refresh=True)

    def line(self, label: str, text: str) -> None:
        """Says that something is done, where there is no terminal to show it."""
        if self._live is None:
            say(f"{label:<10}{text}")


def ordered(
    rows: Sequence[tuple[str, float, float | None, str]],
) -> list[tuple[str, float, float | None, str]]:
    """The best score first, then those without one, the furthest first."""
    return sorted(rows, key=lambda row: (row[2] is None, -(row[2] or 0.0), -row[1]))


def figures_text(record: Mapping[str, Any], score: str) -> str:
    """A cell's result in a line."""
    if record["reason"]:
        return record["reason"]
    value = f"{scale_of(score) * record[score]:.2f}"
    figure = f"RankMe {value}" if score == RANK_ME else f"val ridge {value} %"
    return f"{figure}, {duration(record['seconds'])} of training"
