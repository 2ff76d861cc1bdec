"""A cell of a sweep: one point with one seed, the folder that keeps it, and what it came to.

A cell's folder is that of a run: `load_encoder`, `evaluate` and `--init_from` read it.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jepa_jax.compare import PLACES
from jepa_jax.compare.equal_time import step_arguments
from jepa_jax.config import flatten, has_blur
from jepa_jax.errors import JepaError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.sweep.axes import Point, label

# Where things lie and what is shown: no part of a result.
_NO_PART = ("logging.", "meta.device", *PLACES)
# Of a folder; file systems end at 255 bytes, and a number follows.
_LONGEST_NAME = 100
# The record of a cell that goes on after a rung.
WAITING = "waiting"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point with one seed.

    Attributes:
      point: the swept keys.
      seed: of everything random.
      config: of a run that would be this cell.
      folder: what is kept of it.
      key: `config` without what is no part of a result, as JSON can hold it.
    """

    point: Point
    seed: int
    config: ConfigDict
    folder: pathlib.Path
    key: dict[str, Any]

    @property
    def program(self) -> str:
        """Equal for cells that one compiled program serves."""
        traced = {"meta.seed", "optim.epochs", *step_arguments()}
        fixed = {key: value for key, value in self.key.items() if key not in traced}
        # How much is blurred is a number of the program; whether anything is, is not.
        return json.dumps({**fixed, "has_blur": has_blur(self.config)}, sort_keys=True)

    def record(self) -> dict[str, Any] | None:
        """What is on record of this very cell; None for none, or for one that cannot be read."""
        path = self.folder / "cell.json"
        if not path.exists():
            return None
        try:
            found = read_json(path)
        except JepaError:
            return None
        return found if type(found) is dict and found.get("key") == self.key else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Puts it on record, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "cell.json", {"key": self.key, "seed": self.seed, **record})

    def clear(self) -> None:
        """Takes away what an interrupted attempt has left, but for its record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "cell.json":
                path.unlink()


def result_key(config: ConfigDict) -> dict[str, Any]:
    """The dotted keys that decide a result, as JSON gives them back."""
    flat = flatten(json.loads(config.to_json()))
    return {key: value for key, value in flat.items() if not key.startswith(_NO_PART)}


def make_cell(config: ConfigDict, point: Point, seed: int, folder: pathlib.Path) -> Cell:
    """The cell of a base config; a folder of its own for every different result.

    Args:
      config: the base, to which the point and the seed are applied.
      point: the swept keys.
      seed: its config.meta.seed.
      folder: of all cells.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(point)
    config.meta.seed = seed
    key = result_key(config)
    number = zlib.crc32(json.dumps(key, sort_keys=True).encode())
    name = re.sub(r"[^\w.,=+-]", ",", f"{label(point)},seed={seed}")[:_LONGEST_NAME]
    return Cell(dict(point), seed, config, folder / f"{name}-{number:08x}", key)


def by_program(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of every compiled program, in order."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.program, []).append(cell)
    return found
