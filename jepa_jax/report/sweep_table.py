"""sweep.json as rows of text: value, minutes, probe, loss; and the lines below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jepa_jax.progress import duration

RANK_ME, RIDGE, ONLINE = "rank_me", "val_ridge_probe_acc", "val_online_probe_acc"
FINISHED, DIVERGED, STOPPED = "finished", "diverged", "stopped"


def scale_of(score: str) -> float:
    """What a score is multiplied by to be shown: accuracies are shares, in %."""
    return 1.0 if score == RANK_ME else 100.0


def with_std(figure: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    """'53.35 ± 0.41' of {'mean', 'std'}."""
    if figure is None:
        return "-"
    mean = f"{scale * figure['mean']:.{digits}f}"
    return mean if figure["std"] is None else f"{mean} ± {scale * figure['std']:.{digits}f}"


def happened(row: Mapping[str, Any]) -> str:
    """Why figures of a row are absent or of fewer seeds; empty where all is well."""
    seeds: dict[str, list[str]] = {}
    for cell in row["cells"]:
        if cell["reason"]:
            seeds.setdefault(f"{cell['status']}: {cell['reason']}", []).append(str(cell["seed"]))
    if row["status"] == STOPPED:
        return "; ".join(seeds) or STOPPED
    texts = [
        f"seed{'s' if len(of) > 1 else ''} {', '.join(of)} {text}" for text, of in seeds.items()
    ]
    return "; ".join(texts) or ("" if row["status"] == FINISHED else row["status"])


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """Cells: a header, a row a point, and the floor."""
    rows, keys = document["rows"], list(document["axes"])
    columns = [("minutes", "seconds", 1 / 60, 2)]
    if document["score"] == RANK_ME:
        columns.append(("RankMe", RANK_ME, 1, 1))
    else:
        columns += [("ridge, val %", RIDGE, 100, 2), ("online, val %", ONLINE, 100, 2)]
    columns.append(("train loss", "train_loss", 1, 4))
    remarks = [happened(row) for row in rows]
    header = [*keys, *(title for title, *_ in columns), "seeds"]
    lines = [[*header, *["what happened"] * any(remarks)]]
    for row, text in zip(rows, remarks, strict=True):
        figures = [with_std(row[name], scale, digits) for _, name, scale, digits in columns]
        finished = sum(cell["status"] == FINISHED for cell in row["cells"])
        values = [value_text(row["point"][key]) for key in keys]
        lines.append([*values, *figures, str(finished), *[text] * any(remarks)])
    if floor := document["floor"]:
        figures = [with_std(floor.get(name), scale, digits) for _, name, scale, digits in columns]
        names = ["untrained", *[""] * (len(keys) - 1)]
        seeds = str(floor[document["score"]]["n"])
        lines.append([*names, *figures, seeds, *[""] * any(remarks)])
    return lines


def value_text(value: Any) -> str:
    """A swept value as a table shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def winner_figures(document: Mapping[str, Any]) -> str:
    """The winner's figures, those of the test images beside them; there has to be a winner."""
    winner, score = document["winner"], document["score"]
    figures = with_std(winner[score], scale_of(score), 2)
    if score == RANK_ME:
        return f"RankMe {figures}"
    if winner["test_ridge_probe_acc"]:
        test = with_std(winner["test_ridge_probe_acc"], 100, 2)
        return f"{figures} % on val, {test} % on test"
    return f"{figures} % on val"


def closing_lines(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of what stands below the table, the winner last."""
    cost, winner = document["cost"], document["winner"]
    parts = {
        "steps": cost["step_seconds"],
        "compiling and choosing": cost["compile_seconds"],
        "evaluation": cost["evaluation_seconds"],
        "other": cost["other_seconds"],
    }
    text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
    programs = f"{cost['programs']} program{'s' if cost['programs'] != 1 else ''}"
    saved = ""
    if cost["steps_saved"]:
        saved = f"; {cost['steps_saved']:,} steps that points share were trained once"
    lines = [
        ("how", document["execution"]["text"]),
        ("cost", f"{duration(cost['wall_seconds'])}: {text}; {programs}{saved}"),
        *(("note", note) for note in document["notes"]),
    ]
    if winner is None:
        return [*lines, ("winner", "none: no point finished with every seed")]
    return [
        *lines,
        ("winner", f"{winner['sentence']}; {winner_figures(document)}"),
        ("flags", winner["flags"]),
    ]


def as_markdown(document: Mapping[str, Any]) -> str:
    """sweep.md: the table with the winner in bold, and how it came about."""
    header, *rows = table(document)
    winner = document["winner"]
    best = winner and list(map(value_text, winner["point"].values()))
    keys = len(document["axes"])
    rows = [[f"**{c}**" if row[:keys] == best and c else c for c in row] for row in rows]
    lines: Sequence[Sequence[str]] = [header, ["---:"] * len(header), *rows]
    environment = ", ".join(f"{name} {value}" for name, value in document["environment"].items())
    judged = "RankMe" if document["score"] == RANK_ME else "val/*, images held out from the probe"
    parts = [
        f"# {', '.join(document['axes'])} of {document['name']}",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        "Mean ± standard deviation over seeds, of the last step. Chosen on "
        f"{judged}; minutes are of one point's training steps.",
        "\n".join(f"- {name}: {text}" for name, text in closing_lines(document)),
        f"`{document['command']}`, with {environment}.",
    ]
    return "\n\n".join(parts) + "\n"
