"""What the benchmarks of docs/recipe.md share: figures on the disk, and in a table."""

import datetime
import importlib.metadata
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from jepa_jax import device
from jepa_jax.metrics import read_json, write_json


def stored(path: pathlib.Path, measure: Callable[[], Any]) -> Any:
    """What a JSON file holds, or what `measure` gives, which it holds from then on."""
    if not path.exists():
        print(f"measuring {path.stem}", flush=True)
        write_json(path, measure())
    return read_json(path)


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent, of shares of 1."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def write_document(path: pathlib.Path, what: str, command: str, **figures: Any) -> None:
    """Writes figures with the date, the device and the versions that they were measured with."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    content = {
        "what": what,
        "date": datetime.date.today().isoformat(),
        "device": device.describe(),
        "command": command,
        "versions": versions,
        **figures,
    }
    write_json(path, content)
