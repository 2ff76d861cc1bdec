"""A comparison as text for a terminal and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jepa_jax.compare import SIDES
from jepa_jax.progress import duration

# Of summary.json; the first decides.
FIGURES = ("val_ridge_probe_acc", "val_online_probe_acc", "val_untrained_ridge_probe_acc")
PROTOCOL = (
    "by the ridge probe of the last step on val/*, images held out from the probe; the test set "
    "is left for the last look"
)


def _percent(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{100 * value:{form}}"


def figures_text(figures: Mapping[str, Any]) -> str:
    """What a run came to, in a line."""
    if "error" in figures:
        return figures["error"]
    collapse = f", collapsed ({figures['collapse']})" if figures["collapse"] else ""
    return (
        f"val ridge {_percent(figures[FIGURES[0]])} %, {figures['images']:,} images in "
        f"{duration(figures['train_seconds'])} of training{collapse}"
    )


def head_lines(document: Mapping[str, Any]) -> list[str]:
    """What is compared, and how it is judged."""
    lines = [f"{side:<10}{name}" for side, name in document["names"].items()]
    for key, (first, second) in document["differing"].items():
        lines.append(f"{'differs':<10}{key}: {first} in A, {second} in B")
    return [*lines, f"{'judged':<10}{PROTOCOL}"]


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells: a header, a row a pair, and the means of the pairs that count."""

    def both(row, name, form):
        return " / ".join(form(row[side].get(name)) for side in SIDES)

    def count(value):
        return "-" if value is None else f"{value:,.0f}"

    def seconds(value):
        return "-" if value is None else f"{value:.1f}"

    def cells(title, row):
        ridge = (_percent(row[side].get(FIGURES[0])) for side in SIDES)
        return [
            title,
            *ridge,
            _percent(row["difference"], "+.2f"),
            both(row, FIGURES[1], _percent),
            both(row, FIGURES[2], _percent),
            both(row, "images", count),
            both(row, "train_seconds", seconds),
        ]

    header = ["seed", "ridge A", "ridge B", "B - A"]
    header += [f"{name} A / B" for name in ("online", "untrained", "images", "seconds")]
    whole = [row for row in rows if row["difference"] is not None]
    lines = [header, *(cells(str(row["seed"]), row) for row in rows)]
    if whole:
        names = (*FIGURES, "images", "train_seconds")
        means: dict[str, Any] = {
            side: {name: statistics.fmean(row[side][name] for row in whole) for name in names}
            for side in SIDES
        }
        means["difference"] = statistics.fmean(row["difference"] for row in whole)
        lines.append(cells("mean", means))
    return lines


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in table
    )


def closing_lines(document: Mapping[str, Any]) -> list[str]:
    """The lines below the table, the verdict last."""
    lines = [f"{'lost':<10}{text}" for text in document["lost"]]
    collapsed = [
        f"{'note':<10}{side}, seed {row['seed']} collapsed ({row[side]['collapse']}) and counts"
        for row in document["rows"]
        for side in SIDES
        if row[side].get("collapse")
    ]
    warning = [f"{'warning':<10}{document['warning']}"] if document["warning"] else []
    return [*lines, *collapsed, *warning, f"{'verdict':<10}{document['sentence']}"]


def as_markdown(document: Mapping[str, Any]) -> str:
    """compare.md: the verdict, the table, and how it came about."""
    header, *rows = table(document["rows"])
    lines = [header, ["---:"] * len(header), *rows]
    # Without the protocol and the verdict, which have places of their own.
    head, closing = head_lines(document)[:-1], closing_lines(document)[:-1]
    environment = ", ".join(f"{name} {value}" for name, value in document["environment"].items())
    parts = [
        f"# {document['names']['B']} against {document['names']['A']}",
        f"**{document['sentence']}**",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        f"In %, and B - A in points; judged {PROTOCOL}.",
        f"Equal time: {document['equal_time']['text']}.",
        "\n".join(f"- {line[:10].strip()}: {line[10:]}" for line in [*head, *closing]),
        f"Measured with {environment}.",
    ]
    return "\n\n".join(parts) + "\n"
