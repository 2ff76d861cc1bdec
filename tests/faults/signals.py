"""Promise 1: told to stop at any moment, twice too, the next identical command makes it good."""

import pathlib
from collections.abc import Iterator
from signal import SIGINT, SIGKILL, SIGTERM

from tests.faults.kill import PHASES, Place, signal_rows
from tests.faults.table import Row

# (phase, what is sent); during a save and its rename more often than elsewhere.
_SIGNALS = [
    *[(phase, (SIGTERM,)) for phase in (*PHASES, *(3 * ("save", "rename")))],
    *[(phase, (SIGINT, SIGINT)) for phase in PHASES],
    *[(phase, (SIGINT, SIGKILL)) for phase in ("save", "chunk", "preparation")],
]


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """25 signals and pairs of signals; the short form is part of `kill.rows`.

    Args:
      is_long: nothing is done otherwise.
      folder: an empty one; what survived is deleted.
    """
    if is_long:
        yield from signal_rows(Place(folder, with_all=True), _SIGNALS)
