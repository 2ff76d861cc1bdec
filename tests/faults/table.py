"""What an attack counts, and the table of all attacks."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      promise: the number of the promise in docs/reliability.md.
      what: what was done to the program.
      tried: how often.
      survived: how often the promise held.
      failures: a line for each time that it did not.
    """

    promise: int
    what: str
    tried: int
    survived: int
    failures: tuple[str, ...] = ()


def row_of(promise: int, what: str, outcomes: Sequence[str | None]) -> Row:
    """A row of outcomes: None where the promise held, else what happened in its place."""
    failures = tuple(outcome for outcome in outcomes if outcome is not None)
    return Row(promise, what, len(outcomes), len(outcomes) - len(failures), failures)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table of docs/reliability.md."""
    lines = ["| promise | what was done | tried | survived |", "|---:|---|---:|---:|"]
    lines += [f"| {r.promise} | {r.what} | {r.tried:,} | {r.survived:,} |" for r in rows]
    return "\n".join(lines)
