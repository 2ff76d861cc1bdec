"""The runs of a comparison, what is kept of them, and what it comes to."""

import contextlib
import functools
import gc
import importlib.metadata
import pathlib
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import jepa_jax
from jepa_jax import device
from jepa_jax.compare import JUDGED_ON, PLACES, SIDES
from jepa_jax.compare.equal_time import differing_keys, equal_time
from jepa_jax.compare.statistic import CONFIDENCE, paired_interval, verdict
from jepa_jax.compare.table import FIGURES, as_markdown, figures_text, head_lines
from jepa_jax.config import changed_keys, flatten, validate
from jepa_jax.data import Dataset
from jepa_jax.errors import CheckpointError, ConfigError, JepaError, TrainingError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.pace import with_epochs
from jepa_jax.paths import home_expanded
from jepa_jax.plan import Plan, make_plan
from jepa_jax.progress import say
from jepa_jax.train import train_and_evaluate

SCHEMA_VERSION = 1
# Beyond this share the two did not train equally long, and a reader has to know.
_TIME_TOLERANCE = 0.05


class _Runs:
    """The runs of a comparison: one in each of WORKDIR/A/seed0, WORKDIR/B/seed0, ...

    All in this process, not one each: the data is read once, the process-wide choices (XLA's
    flags, the allocator) are one for both sides by construction, and a stop or a diverged loss
    arrives as the exception it is. What a run leaves behind is freed before the next one begins.
    """

    def __init__(self, configs: Mapping[str, ConfigDict], workdir: pathlib.Path, dataset):
        self.configs, self._workdir, self._dataset = dict(configs), workdir, dataset

    @functools.cached_property
    def plans(self) -> dict[str, Plan]:
        """Of both sides; reads the data.

        Raises:
          ConfigError: for sizes that the data does not allow, and for data without labels.
        """
        plans: dict[str, Plan] = {}
        for side, config in self.configs.items():
            dataset = self._dataset
            if plans and config.data.placement == plans["A"].config.data.placement:
                dataset = plans["A"].dataset
            plans[side] = make_plan(config, self._workdir, dataset, None, None, None, None)
            if not plans[side].has_labels:
                raise ConfigError(
                    f"{plans[side].dataset.name} has no labels to judge by: a comparison needs them"
                )
        return plans

    def figures(self, side: str, seed: int) -> dict[str, Any]:
        """What a run says of itself on val/*; trains it if it has not been trained.

        Raises:
          CheckpointError: if its folder holds a run of another config.
          Interrupted: on a signal, after saving.
        """
        config = self.configs[side].copy_and_resolve_references()
        config.meta.seed = seed
        folder = self._workdir / side / f"seed{seed}"
        if not _is_finished(folder, config):
            say(f"{'training':<10}{side}, seed {seed}: {folder / 'log.txt'} has its lines")
            try:
                self._train(config, folder, self.plans[side].dataset)
            except TrainingError as error:
                # Its first part says what happened, the rest what to do in a run of one's own.
                return {"error": str(error).split(":")[0]}
        summary = read_json(folder / "summary.json")
        images = summary["steps"] * config.data.batch_size
        kept = (*FIGURES, "steps", "epochs", "train_seconds", "collapse")
        return {**{name: summary[name] for name in kept}, "images": images}

    def _train(self, config: ConfigDict, folder: pathlib.Path, dataset: Dataset) -> None:
        gc.collect()
        folder.mkdir(parents=True, exist_ok=True)
        # A run's own lines have its test figures, which nobody should see while choosing.
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            try:
                with contextlib.redirect_stdout(log):
                    train_and_evaluate(config, folder, dataset=dataset)
            except JepaError as error:
                print(f"error: {error}", file=log)
                raise


def _is_finished(folder: pathlib.Path, config: ConfigDict) -> bool:
    if not (folder / "summary.json").exists():
        return False
    changed = changed_keys(read_json(folder / "config.json")["config"], config)
    if changed:
        raise CheckpointError(
            f"{folder} holds a run of another config ({'; '.join(changed)}): give another --workdir"
        )
    return True


def _environment() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": device.describe(),
        "python": platform.python_version(),
        "jepa_jax": jepa_jax.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _described(config: ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if key not in PLACES}


def check(a: ConfigDict, b: ConfigDict) -> None:
    """Refuses what cannot be run, and pairs that cannot be compared.

    Raises:
      ConfigError: one line naming the key.
    """
    for config in (a, b):
        validate(config)
    if a.meta.device != b.meta.device:
        raise ConfigError("config.meta.device must be one for A and B: --config.meta.device=...")
    first, second = flatten(a), flatten(b)
    for key in JUDGED_ON:
        if first[key] != second[key]:
            raise ConfigError(
                f"config.{key} is {first[key]} in A and {second[key]} in B: figures of different "
                "images are not comparable"
            )
    if not differing_keys(a, with_epochs(b, a.optim.epochs)):
        raise ConfigError(
            "A and B learn the same: nothing differs but the number of epochs and the seed, which "
            "are set here, or what has no effect on learning"
        )


def _begin(
    path: pathlib.Path, names: Mapping[str, str], configs: Mapping[str, ConfigDict]
) -> dict[str, Any]:
    """compare.json's content: what is stored, if that is this comparison, else a fresh one."""
    described = {side: _described(configs[side]) for side in SIDES}
    fresh = {
        "schema_version": SCHEMA_VERSION,
        "environment": _environment(),
        "names": dict(names),
        "differing": differing_keys(configs["A"], configs["B"]),
        "configs": described,
        "equal_time": None,
        "rows": [],
    }
    if not path.exists():
        return fresh
    stored = read_json(path)
    for side in SIDES:
        changed = changed_keys(stored["configs"][side], described[side])
        if changed:
            raise CheckpointError(
                f"{path} is of another {side} ({'; '.join(changed)}): give another --workdir"
            )
    if stored["environment"] != fresh["environment"]:
        say(
            f"{'note':<10}begun on another machine or with other versions, see {path}: its equal "
            "time may not be equal here"
        )
    return {**fresh, **{name: stored[name] for name in ("environment", "equal_time", "rows")}}


def _conclude(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistic, the verdict, and what a reader has to know beside it."""
    whole = [row for row in rows if row["difference"] is not None]
    lost = [
        f"{side}, seed {row['seed']}: {row[side]['error']}"
        for row in rows
        for side in SIDES
        if "error" in row[side]
    ]
    left = f"{len(whole)} of {len(rows)} pairs remain" if lost else ""
    result: dict[str, Any] = {"statistics": None, "verdict": None, "lost": lost, "warning": None}
    if len(whole) < 2:
        return {**result, "sentence": f"no verdict: {left or 'two pairs are needed'}"}
    paired = paired_interval([row["difference"] for row in whole])
    word, sentence = verdict(paired)
    sentence += f"; {left}" if left else ""
    seconds = {
        side: statistics.fmean(row[side]["train_seconds"] for row in whole) for side in SIDES
    }
    excess = seconds["B"] / seconds["A"] - 1
    if abs(excess) > _TIME_TOLERANCE:
        longer = "longer" if excess > 0 else "shorter"
        result["warning"] = (
            f"B trained {100 * abs(excess):.1f} % {longer} than A: this is not equal time"
        )
    return {
        **result,
        "statistics": {**paired._asdict(), "confidence": CONFIDENCE, "train_seconds": seconds},
        "verdict": word,
        "sentence": sentence,
    }


def compare_configs(
    a: ConfigDict,
    b: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    num_seeds: int = 5,
    names: Mapping[str, str] | None = None,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Trains both configs with seeds 0, 1, ... for the same time, and compares them.

    Args:
      a, b: see `configs/`. B's epochs and both seeds are replaced.
      workdir: gets A/seed0, B/seed0, ..., compare.json and compare.md. The same call goes on with
        what is missing there, a larger `num_seeds` adds pairs.
      num_seeds: pairs, at least 2.
      names: what A and B are called in the tables, and what is said of both.
      dataset: in place of the configs', see `jepa_jax.data.from_arrays`.

    Returns:
      the content of compare.json. `verdict` is None where diverged runs leave fewer than two
      pairs.

    Raises:
      ConfigError, DataError, CheckpointError: one line each.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    check(a, b)
    if num_seeds < 2:
        raise ConfigError(f"a comparison needs at least 2 seeds, got {num_seeds}")
    workdir = home_expanded(workdir).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "compare.md").touch()
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    own_epochs, epochs = float(b.optim.epochs), float(a.optim.epochs)
    configs = {"A": with_epochs(a, epochs), "B": with_epochs(b, epochs)}
    for config in configs.values():
        config.meta.seed = 0
    path = workdir / "compare.json"
    document = _begin(path, names or {side: side for side in SIDES}, configs)
    for line in head_lines(document):
        say(line)
    runs = _Runs(configs, workdir, dataset)
    if document["equal_time"] is None:
        document["equal_time"] = equal_time(*configs.values(), own_epochs, lambda: runs.plans)
        # At once: a second measurement would differ, and with it B's config.
        write_json(path, document)
    say(f"{'time':<10}{document['equal_time']['text']}")
    runs.configs["B"] = with_epochs(configs["B"], document["equal_time"]["epochs"]["B"])
    _run_pairs(runs, document, path, num_seeds)
    document.update(_conclude(document["rows"]))
    write_json(path, document)
    (workdir / "compare.md").write_text(as_markdown(document))
    return read_json(path)


def _run_pairs(runs: _Runs, document: dict[str, Any], path: pathlib.Path, num_seeds: int) -> None:
    """Fills `rows`, A then B of every seed; a run that diverged once is not tried again."""
    failed = {
        (side, row["seed"]): row[side]
        for row in document["rows"]
        for side in SIDES
        if "error" in row.get(side, {})
    }
    document["rows"] = []
    for seed in range(num_seeds):
        row: dict[str, Any] = {"seed": seed, "difference": None}
        document["rows"].append(row)
        for side in SIDES:
            row[side] = failed.get((side, seed)) or runs.figures(side, seed)
            say(f"{'done':<10}{side}, seed {seed}: {figures_text(row[side])}")
            accs = [row.get(name, {}).get(FIGURES[0]) for name in SIDES]
            row["difference"] = None if None in accs else accs[1] - accs[0]
            write_json(path, document)
