"""Accuracy against time of several configs and seeds: curves, first crossings, floors, a plot.

    python -m jepa_jax.benchmark --time-to-accuracy --config=configs/cpu.py --out DIR

Every run and every floor leaves one JSON file, which counts for this config, these versions and
this device: the same command goes on with what is missing. The configs take turns within a seed,
so that a machine that slows down slows all of them.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from jepa_jax import device
from jepa_jax.benchmark import measure
from jepa_jax.benchmark import time_to_accuracy_curve as curve
from jepa_jax.benchmark.table import Table, as_markdown, as_text
from jepa_jax.benchmark.time_to_accuracy_tables import (
    PROBE_NAMES,
    Curves,
    Floor,
    crossings,
    tables,
    untrained_floors,
)
from jepa_jax.config import flatten, validate
from jepa_jax.config_flags import GivenConfig, fit_to_device
from jepa_jax.data import Dataset
from jepa_jax.errors import ConfigError, Interrupted, JepaError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.plan import DATASET_KEYS, Plan, load_configured, make_plan
from jepa_jax.progress import duration, say
from jepa_jax.random_patches import FEATURES_PER_FILTER

SEEDS, TARGETS = 3, (50.0, 55.0, 60.0, 65.0, 70.0)
_NAME = "time_to_accuracy"
# Of the floor of random patches, beside the features that a config has itself.
_PATCH_DIMS = (1024, 4096)
# Of a config: where files lie and what is shown, which no figure depends on.
_NO_PART_OF_A_RUN = ("data.data_dir", "meta.model_folder", "logging.")
# Accuracies on other images, or beside other floors, do not belong into one table.
_SHARED = (
    "meta.device",
    "data.dataset",
    "data.data_dir",
    "data.num_train",
    "data.num_val",
    "data.train_split",
    "data.unlabelled_split",
    "data.test_split",
)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A run or a floor: its name, the file that keeps it, what it is of, and how it is made."""

    name: str
    path: pathlib.Path
    key: dict[str, Any]
    measure: Callable[[], dict[str, Any]]

    def stored(self) -> dict[str, Any] | None:
        """The figures in the file, if they are of this very key."""
        if not self.path.exists():
            return None
        try:
            content = read_json(self.path)
        except JepaError:
            return None
        return content["figures"] if content.get("key") == self.key else None


class TimeToAccuracy:
    """The runs of several configs and seeds and their floors, as far as a folder has them.

    Args:
      given: the configs; two of one name are numbered.
      folder: created.
      num_seeds: of every config: its own config.meta.seed and those that follow.
      targets: in percent.

    Raises:
      ConfigError: for a config that cannot be run, configs that cannot stand in one table, data
        without labels, or a folder that cannot be written.
      DataError: for a dataset that cannot be read.
    """

    def __init__(
        self,
        given: Sequence[GivenConfig],
        folder: pathlib.Path,
        *,
        num_seeds: int = SEEDS,
        targets: Sequence[float] = TARGETS,
    ):
        self.folder, self.targets = folder, tuple(targets)
        for one in given:
            validate(one.config)
        _require_shared(given)
        _require_writable(folder)
        device.select(given[0].config.meta.device)
        for one in given:
            fit_to_device(one)
        self._environment = measure.environment()
        self._given = dict(zip(_names(given), given, strict=True))
        self._seeds = {
            name: range(one.config.meta.seed, one.config.meta.seed + num_seeds)
            for name, one in self._given.items()
        }
        self.failed: dict[str, str] = {}
        # Whatever is wrong with one of them is said before the first is trained.
        self._plans = {name: self._plan(name, self._seeds[name][0]) for name in self._given}
        for plan in self._plans.values():
            curve.require_labels(plan)
        self._runs = {
            name: {seed: self._run(name, seed) for seed in seeds}
            for name, seeds in self._seeds.items()
        }
        self._floors = self._floor_pieces()

    def _plan(self, name: str, seed: int) -> Plan:
        config = self._given[name].config.copy_and_resolve_references()
        config.meta.seed = seed
        dataset = _load(tuple((key, config.data[key]) for key in DATASET_KEYS))
        return make_plan(config, pathlib.Path(), dataset, None, None, None, None)

    # --- pieces -----------------------------------------------------------------------------------

    def _piece(self, name: str, key: dict[str, Any], work: Callable[[], Any]) -> _Piece:
        """Of these versions and this device; what differs in any of it has another file."""
        key = {
            "schema_version": measure.SCHEMA_VERSION,
            **key,
            "versions": self._environment["versions"],
            **{part: self._environment[part] for part in ("device", "processor")},
        }
        text = json.dumps(key, sort_keys=True)
        file = f"{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}-{zlib.crc32(text.encode()):08x}.json"
        return _Piece(name, self.folder / file, json.loads(text), work)

    def _run(self, name: str, seed: int) -> _Piece:
        key = {"config": {**_flat(self._given[name]), "meta.seed": seed}}
        return self._piece(f"{name} seed {seed}", key, functools.partial(self._train, name, seed))

    def _train(self, name: str, seed: int) -> dict[str, Any]:
        def on_row(row):
            accs = [f"{of} {100 * row[p]['val']:.1f} %" for p, of in PROBE_NAMES.items()]
            say(f"{'':<10}step {row['step']}, {row['seconds']:.1f} s: {', '.join(accs)} on val")

        return curve.measure_curve(self._plan(name, seed), on_row)[1]

    def _floor_pieces(self) -> list[_Piece]:
        plan = next(iter(self._plans.values()))
        dataset, num_val = plan.dataset, plan.config.data.num_val
        key = {"dataset": _describe(dataset), "num_val": num_val}
        own = {plan.feature_dim for plan in self._plans.values()}
        dims = {*_PATCH_DIMS, *(dim for dim in own if dim % FEATURES_PER_FILTER == 0)}
        work = functools.partial(curve.measure_pixels, dataset, num_val)
        return [
            self._piece(f"floor {dataset.name} pixels", {**key, "floor": "pixels"}, work),
            *(
                self._piece(
                    f"floor {dataset.name} patches {dim}",
                    {**key, "floor": "whitened random patches", "feature_dim": dim},
                    functools.partial(curve.measure_patches, dataset, num_val, dim),
                )
                for dim in sorted(dims)
            ),
        ]

    def measure(self) -> None:
        """Measures what is missing, the runs first; what fails is said, and the rest goes on."""
        seeds = zip(*(runs.values() for runs in self._runs.values()), strict=True)
        for piece in [*(piece for of_seed in seeds for piece in of_seed), *self._floors]:
            if piece.stored() is not None:
                say(f"{'kept':<10}{piece.name}")
                continue
            say(f"{'measuring':<10}{piece.name}")
            began = time.perf_counter()
            try:
                figures = piece.measure()
            except Interrupted:
                raise
            except JepaError as error:
                say(f"{'failed':<10}{piece.name}: {error}")
                self.failed[piece.name] = str(error)
                continue
            content = _document(piece.name, key=piece.key, figures=figures)
            _write(piece.path, lambda path, content=content: write_json(path, content))
            say(f"{'measured':<10}{piece.name}, {duration(time.perf_counter() - began)}")

    # --- results ----------------------------------------------------------------------------------

    def curves(self) -> list[Curves]:
        """Of every config, what has been measured."""
        found = []
        for name, runs in self._runs.items():
            stored = {seed: piece.stored() for seed, piece in runs.items()}
            figures = {seed: of_seed for seed, of_seed in stored.items() if of_seed}
            failed = {
                seed: self.failed[piece.name]
                for seed, piece in runs.items()
                if piece.name in self.failed
            }
            found.append(Curves(name, figures, failed))
        return found

    def floors(self) -> list[Floor]:
        """Those that have been measured: of the data, then of every config untrained."""
        pixels, *patches = (piece.stored() for piece in self._floors)
        found = []
        for name, figures in (pixels or {}).items():
            found.append(_floor("raw pixels" if name == "pixels" else name, figures))
        found += [_floor("whitened random patches", figures) for figures in patches if figures]
        return [*found, *untrained_floors(self.curves())]

    def write(self) -> list[Table]:
        """Writes the JSON document, the tables and, once there is a curve, the plot.

        Returns:
          The tables.
        """
        all_curves, floors = self.curves(), self.floors()
        found = tables(all_curves, floors, self.targets)
        content = _document(
            "accuracy against time",
            environment=self._environment,
            configs={name: _flat(given) for name, given in self._given.items()},
            targets=self.targets,
            crossings={
                curves.name: {
                    probe: {f"{at:g}": crossings(curves, probe, at) for at in self.targets}
                    for probe in PROBE_NAMES
                }
                for curves in all_curves
            },
            floors=[dataclasses.asdict(floor) for floor in floors],
            curves={curves.name: curves.figures for curves in all_curves},
            failed=self.failed,
        )
        names = ", ".join(self._given)
        text = [f"# Accuracy against time: {names}", "", f"On {self._environment['device']}.", ""]
        page = "\n".join([*text, *map(as_markdown, found)])
        for suffix, write in (
            ("json", lambda path: write_json(path, content)),
            ("md", lambda path: path.write_text(page + "\n")),
            ("png", lambda path: _plot(path, all_curves, floors)),
        ):
            path = self.folder / f"{_NAME}.{suffix}"
            if suffix != "png" or any(curves.figures for curves in all_curves):
                _write(path, write)
                say(f"{'written':<10}{path}")
        return found


# --- configs, data and files ----------------------------------------------------------------------


def _names(given: Sequence[GivenConfig]) -> list[str]:
    """'cpu', or 'cpu:5m' of a file that takes an argument; the second of one name is 'cpu (2)'."""
    names: list[str] = []
    for one in given:
        path, _, argument = one.path.partition(":")
        name = pathlib.Path(path).stem + (f":{argument}" if argument else "")
        count = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def _flat(given: GivenConfig) -> dict[str, Any]:
    flat = flatten(given.config.to_dict())
    return {key: value for key, value in flat.items() if not key.startswith(_NO_PART_OF_A_RUN)}


def _require_shared(given: Sequence[GivenConfig]) -> None:
    flat = [flatten(one.config.to_dict()) for one in given]
    for key in _SHARED:
        values = [one[key] for one in flat]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"configs of one table share config.{key}, got "
                f"{' and '.join(dict.fromkeys(map(repr, values)))}"
            )


def _require_writable(folder: pathlib.Path) -> None:
    def touch(path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()

    _write(folder / ".writable", touch)


def _write(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"--out={path.parent} cannot be written: {error.strerror}") from error


@functools.lru_cache(maxsize=2)
def _load(data: tuple[tuple[str, Any], ...]) -> Dataset:
    return load_configured(dict(data))


def _describe(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "num_train": len(dataset.train_images),
        "num_test": 0 if dataset.test_images is None else len(dataset.test_images),
        "image_shape": list(dataset.image_shape),
    }


def _document(what: str, **content: Any) -> dict[str, Any]:
    """As every document of a benchmark, but with no folder of this machine in its command."""
    arguments = []
    for argument in sys.argv[1:]:
        flag, separator, value = argument.rpartition("=")
        if pathlib.PurePath(value).is_absolute():
            value = pathlib.PurePath(value).name
        arguments.append(f"{flag}{separator}{value}")
    command = " ".join(["python -m jepa_jax.benchmark", *arguments])
    return {**measure.document(what, **content), "command": command}


def _floor(name: str, figures: dict[str, Any]) -> Floor:
    scores = {probe: figures[probe] for probe in PROBE_NAMES}
    return Floor(name, figures["feature_dim"], scores)


def _plot(path: pathlib.Path, all_curves: Sequence[Curves], floors: Sequence[Floor]) -> None:
    # matplotlib takes a second to load.
    from jepa_jax.benchmark.time_to_accuracy_plot import write_plot

    write_plot(path, all_curves, floors)


def run_time_to_accuracy(
    given: Sequence[GivenConfig],
    folder: pathlib.Path,
    *,
    num_seeds: int,
    targets: Sequence[float],
) -> int:
    """Measures what is missing, writes and prints the result; the command's exit code."""
    whole = TimeToAccuracy(given, folder, num_seeds=num_seeds, targets=targets)
    try:
        whole.measure()
    finally:
        found = whole.write()
    for table in found:
        say("\n" + as_text(table))
    return 1 if whole.failed else 0
