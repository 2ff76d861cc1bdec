"""From a run's folder to plain data: what its files say, and nothing that needs the network."""

import dataclasses
import json
import math
import os
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from jepa_jax import configs
from jepa_jax.config import flatten
from jepa_jax.errors import CheckpointError
from jepa_jax.metrics import Row, read_json, read_metrics
from jepa_jax.objectives import term_weights
from jepa_jax.paths import home_expanded
from jepa_jax.train_step import PRED_LOSS, RESERVED_METRICS

KNOWN_TERMS = ("invariance_loss", "var_loss", "cov_loss")
_RAPID = configs.FOLDER / "rapid.py"


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of one run say; a file that is absent is an empty value.

    Attributes:
      workdir: the run's folder, absolute.
      name: shown in headers; among several runs no two have the same.
      config: dotted keys to values.
      stored: the rest of config.json: dataset, custom, environment, imported, ...
      rapid: `config` of configs/rapid.py, or None.
      rows: of metrics.jsonl, one an epoch.
      summary, evaluation: of summary.json and evaluation.json.
      has_encoder: whether the run got as far as writing its encoder.
    """

    workdir: pathlib.Path
    name: str
    config: dict[str, Any]
    stored: dict[str, Any]
    rapid: dict[str, Any] | None
    rows: list[Row]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    has_encoder: bool

    @property
    def custom(self) -> dict[str, Any]:
        """What was given in place of the config's: {'encoder', 'loss_fn', 'augment_fn'}."""
        return part(self.stored, "custom")

    @property
    def dataset_name(self) -> str:
        """As the run called it; empty if no file says."""
        names = (part(self.evaluation, "dataset"), part(self.stored, "dataset"))
        return next((str(found["name"]) for found in names if found.get("name")), "")

    @property
    def probes(self) -> dict[str, dict[str, Any]]:
        """Scores by probe, in evaluation.json's form; summary.json's own where that is absent."""
        return part(self.evaluation, "probes") or _probes_of(self.summary)

    def series(self, key: str) -> list[float]:
        """A metric over the epochs, NaN where a row is without; empty if all are."""
        values = [number(row.get(key)) for row in self.rows]
        return values if any(map(math.isfinite, values)) else []

    def last(self, key: str) -> float | None:
        """A metric's value in the last row that has it."""
        return next((v for v in reversed(self.series(key)) if math.isfinite(v)), None)

    def epochs(self) -> list[float]:
        """The x of every series."""
        return [number(row.get("epoch", place)) for place, row in enumerate(self.rows, start=1)]

    def terms(self) -> list[str]:
        """Names of the loss terms, the package's three first."""
        keys = {key for row in self.rows for key in row if key.startswith("train/")}
        names = {key.removeprefix("train/") for key in keys if self.series(key)}
        known = [name for name in KNOWN_TERMS if name in names]
        return known + sorted(names - {*RESERVED_METRICS, *known})

    def weights(self) -> dict[str, float]:
        """The coefficient of each loss term; empty when the loss is not the config's own."""
        if "loss_fn" in self.custom:
            return {}
        start = "loss."
        loss = {k.removeprefix(start): v for k, v in self.config.items() if k.startswith(start)}
        # A damaged file may hold anything.
        found = term_weights({**loss, "type": str(loss.get("type"))})
        weights = {term: number(weight) for term, weight in found.items()}
        if weights and self.config.get("model.predictor"):
            weights[PRED_LOSS] = number(loss.get("pred_coeff"))
        return weights if all(map(math.isfinite, weights.values())) else {}

    def seconds(self) -> dict[str, float]:
        """Where the time went, in seconds; at worst training and the rest."""
        parts = {name: number(value) for name, value in part(self.summary, "seconds").items()}
        if parts := {name: value for name, value in parts.items() if value > 0}:
            return parts
        latest = self.summary or (self.rows[-1] if self.rows else {})
        training, total = (number(latest.get(f"{kind}_seconds")) for kind in ("train", "total"))
        if not 0 < training <= total:
            return {}
        return {"training": training, "other": total - training}

    def health(self) -> dict[str, dict[str, Any]]:
        """{'h': ..., 'z': ...} of the evaluation, else what the last epoch's watch saw."""
        if found := part(part(self.evaluation, "health"), "encoder"):
            return {name: value for name, value in found.items() if type(value) is dict}
        names = ("rank_me", "std_min", "std_mean")
        seen = {k: {n: self.last(f"watch/{k}_{n}") for n in names} for k in ("h", "z")}
        dims = {"h": self.summary.get("feature_dim"), "z": self.config.get("model.proj_output_dim")}
        seen = {k: {n: v for n, v in h.items() if v is not None} for k, h in seen.items()}
        return {k: {**h, "dim": dims[k]} for k, h in seen.items() if h}


def number(value: Any) -> float:
    """A finite number as float; NaN for whatever else a file may hold."""
    if not isinstance(value, int | float) or type(value) is bool or not abs(value) < 1e300:
        return math.nan
    return float(value)


def part(content: Any, key: str) -> dict[str, Any]:
    """A dictionary inside another; empty when it is absent or something else."""
    found = content.get(key) if type(content) is dict else None
    return found if type(found) is dict else {}


def _probes_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    def scores(name: str) -> dict[str, Any] | None:
        found = {"val": summary.get(f"val_{name}"), "test": summary.get(name)}
        found = {split: {"acc": acc} for split, acc in found.items() if acc is not None}
        return found or None

    ridge = {
        "encoder": scores("ridge_probe_acc"),
        "untrained": scores("untrained_ridge_probe_acc"),
    }
    probes = {"ridge": ridge, "online": {"encoder": scores("online_probe_acc")}}
    return {name: probe for name, probe in probes.items() if probe["encoder"]}


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """Reads a run's small files: no weights, no images.

    Args:
      workdir: the folder of a run, finished or not, or of imported weights.

    Raises:
      CheckpointError: if it is no folder, holds no run, or a file in it is damaged.
    """
    workdir = home_expanded(workdir).absolute()
    if not workdir.is_dir():
        raise CheckpointError(f"{workdir} is not a folder")
    stored = _read(workdir / "config.json")
    try:
        rows = [row for row in read_metrics(workdir / "metrics.jsonl") if type(row) is dict]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{workdir / 'metrics.jsonl'} cannot be read: {error}") from error
    if not stored and not rows:
        raise CheckpointError(f"{workdir} holds no run: config.json is missing")
    config = flatten(part(stored, "config"))
    return Run(
        workdir=workdir,
        name=workdir.name or str(workdir),
        config=config,
        stored=stored,
        rapid=_rapid_config(),
        rows=rows,
        summary=_read(workdir / "summary.json"),
        evaluation=_read(workdir / "evaluation.json"),
        has_encoder=(workdir / "encoder").is_dir(),
    )


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """`read_run` of several folders; those of one name are told apart by the folders above."""
    runs = [read_run(workdir) for workdir in workdirs]
    for depth in range(2, max(len(run.workdir.parts) for run in runs) + 1):
        names = [run.name for run in runs]
        if len(set(names)) == len(names):
            break
        runs = [
            dataclasses.replace(run, name="/".join(run.workdir.parts[-depth:]))
            if names.count(run.name) > 1
            else run
            for run in runs
        ]
    return runs


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_json(path)
    if type(content) is not dict:
        raise CheckpointError(f"{path} is not that of a run")
    return content


def _rapid_config() -> dict[str, Any] | None:
    if not _RAPID.is_file():
        return None
    config = runpy.run_path(str(_RAPID))["get_config"]()
    return flatten(json.loads(config.to_json()))
