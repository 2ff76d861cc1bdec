"""A run, several, or a sweep as one HTML page: is a number a number, and what made it?"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_jax.data import Dataset

__all__ = ["write_report"]


def write_report(
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    dataset: Dataset | None = None,
) -> pathlib.Path:
    """Writes a page about one run, about one sweep, or one that compares several runs.

    `OUT/report.html` holds everything and asks no host for anything; `OUT/report/` has its figures
    as PNGs. Both are replaced when they exist; the page is written whole or not at all.

    Args:
      workdirs: folders of runs, finished or not, of imported weights, or of one sweep. What a
        folder lacks is named on the page, with the command that gives it.
      out: a folder; for one run its own by default, for several `comparison` in $EBJEPA_CKPTS or
        runs/.
      dataset: in place of the config's, for the images of one run.

    Returns:
      The path of the page.

    Raises:
      CheckpointError: a folder holds no run or a damaged one, or the page cannot be written.
      ConfigError: no folder was given.
    """
    # matplotlib and scikit-learn take a second to load: not before somebody wants a page.
    from jepa_jax.report.write import write

    return write(workdirs, out=out, dataset=dataset)
