"""Figures as text: aligned for a terminal, or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"


class Table(NamedTuple):
    """A title, the names of the columns, and rows of cells; a note is said below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def as_text(table: Table) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([table.title, *lines, *([table.note] if table.note else [])])


def as_markdown(table: Table) -> str:
    """A heading of the third level and a table."""
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    note = ["", table.note] if table.note else []
    return "\n".join([f"### {table.title}", "", *lines, *note, ""])


def number(value: float | None, digits: int = 3) -> str:
    """'1,234', '12.3' or '0.00123': so many significant digits, all of those before the point."""
    if value is None:
        return NOT_MEASURED
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def with_range(figures: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    """'12.3 (12.1-12.6)', a `timing.spread`'s median and range; one value alone has no range."""
    if figures is None:
        return NOT_MEASURED
    if "min" not in figures or figures.get("n") == 1:
        return number(figures["median"] * scale)
    low, high = (number(figures[name] * scale) for name in ("min", "max"))
    return f"{number(figures['median'] * scale)} ({low}-{high})"


def percent(share: float | None) -> str:
    """'12.3 %'."""
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def gigabytes(num_bytes: float | None) -> str:
    """'1.23 GB', by the thousand."""
    return NOT_MEASURED if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"
