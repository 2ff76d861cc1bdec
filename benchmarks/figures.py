"""What the benchmarks of docs/recipe.md share: their command, and figures on the disk."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from jepa_jax import device
from jepa_jax.data import Dataset
from jepa_jax.metrics import read_json, write_json
from jepa_jax.plan import load_fitting


def parser(description: str) -> argparse.ArgumentParser:
    """Of --workdir, where finished runs are kept, --seeds and --out."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workdir", type=pathlib.Path, required=True)
    made.add_argument("--out", type=pathlib.Path)
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a device chosen and the folder there."""
    arguments = made.parse_args()
    device.select("auto")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    return arguments


def training_images() -> Dataset:
    """CIFAR-10 without its test images: what is not there is not read."""
    dataset = load_fitting("cifar10", placement="device")
    return dataclasses.replace(dataset, test_images=None, test_labels=None)


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
