"""A sweep as text for a terminal and as Markdown: value, minutes, probe, loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from jepa_jax.compare.table import as_text
from jepa_jax.progress import duration
from jepa_jax.sweep.judge import ONLINE, RANK_ME, RIDGE
from jepa_jax.sweep.result import FINISHED

__all__ = ["as_markdown", "as_text", "closing_lines", "table"]


def _with_std(figure: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if figure is None:
        return "-"
    mean = f"{scale * figure['mean']:.{digits}f}"
    return mean if figure["std"] is None else f"{mean} ± {scale * figure['std']:.{digits}f}"


def _happened(row: Mapping[str, Any]) -> str:
    lost = [
        f"seed {cell['seed']} {cell['status']}: {cell['reason']}"
        for cell in row["cells"]
        if cell["reason"]
    ]
    texts = dict.fromkeys(text.partition(": ")[2] for text in lost)
    if row["status"] == "stopped":
        return f"stopped: {'; '.join(texts)}"
    return "; ".join(lost) if lost else ("" if row["status"] == FINISHED else row["status"])


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """Cells: a header, a row a point, and the floor."""
    rows, keys = document["rows"], list(document["axes"])
    columns = [("minutes", "seconds", 1 / 60, 2)]
    if document["score"] == RANK_ME:
        columns.append(("RankMe", RANK_ME, 1, 1))
    else:
        columns += [("ridge, val %", RIDGE, 100, 2), ("online, val %", ONLINE, 100, 2)]
    columns.append(("train loss", "train_loss", 1, 4))
    happened = [_happened(row) for row in rows]
    header = [
        *keys,
        *(title for title, *_ in columns),
        "seeds",
        *(["what happened"] * any(happened)),
    ]
    lines = [header]
    for row, text in zip(rows, happened, strict=True):
        figures = [_with_std(row[name], scale, digits) for _, name, scale, digits in columns]
        finished = sum(cell["status"] == FINISHED for cell in row["cells"])
        values = [_value(row["point"][key]) for key in keys]
        lines.append([*values, *figures, str(finished), *([text] * any(happened))])
    if floor := document["floor"]:
        figures = [_with_std(floor.get(name), scale, digits) for _, name, scale, digits in columns]
        names = ["untrained", *[""] * (len(keys) - 1)]
        seeds = str(floor[document["score"]]["n"])
        lines.append([*names, *figures, seeds, *([""] * any(happened))])
    return lines


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def closing_lines(document: Mapping[str, Any]) -> list[str]:
    """The lines below the table, the winner last."""
    cost = document["cost"]
    parts = {
        "steps": cost["step_seconds"],
        "compiling and choosing": cost["compile_seconds"],
        "evaluation": cost["evaluation_seconds"],
        "other": cost["other_seconds"],
    }
    text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
    saved = ""
    if cost["steps_saved"]:
        saved = f"; {cost['steps_saved']} steps that points share were trained once"
    lines = [
        f"{'how':<10}{document['execution']['text']}",
        f"{'cost':<10}{duration(cost['wall_seconds'])}: {text}; {cost['programs']} programs{saved}",
        *(f"{'note':<10}{note}" for note in document["notes"]),
    ]
    winner = document["winner"]
    if winner is None:
        return [*lines, f"{'winner':<10}none: no point finished with every seed"]
    figures = f"{_with_std(winner[document['score']], 1 if RANK_ME in winner else 100, 2)}"
    if winner["test_ridge_probe_acc"]:
        figures = (
            f"{figures} % on val, {_with_std(winner['test_ridge_probe_acc'], 100, 2)} % on test"
        )
    return [
        *lines,
        f"{'winner':<10}{winner['sentence']}; {figures}",
        f"{'flags':<10}{winner['flags']}",
    ]


def as_markdown(document: Mapping[str, Any]) -> str:
    """sweep.md: the winner, the table, and how it came about."""
    header, *rows = table(document)
    winner = document["winner"]
    best = winner and list(map(_value, winner["point"].values()))
    keys = len(document["axes"])
    rows = [[f"**{c}**" if row[:keys] == best and c else c for c in row] for row in rows]
    lines: Sequence[Sequence[str]] = [header, ["---:"] * len(header), *rows]
    environment = ", ".join(f"{name} {value}" for name, value in document["environment"].items())
    parts = [
        f"# {', '.join(document['axes'])} of {document['name']}",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        "Mean ± standard deviation over seeds, of the last step. Chosen on val/*, images held out "
        "from the probe; minutes are of one point's training steps.",
        "\n".join(f"- {line[:10].strip()}: {line[10:]}" for line in closing_lines(document)),
        f"`{document['command']}`, with {environment}.",
    ]
    return "\n\n".join(parts) + "\n"
