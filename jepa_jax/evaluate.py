"""The command: python -m jepa_jax.evaluate --workdir=runs/cpu

Judges the encoder of a run: linear probes, nearest neighbours, few labels, the health of its
representation, and the floors beside them. Prints a table and writes evaluation.json.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jepa_jax import device
from jepa_jax.api import described_encoder, read_run
from jepa_jax.checkpoint import Checkpoints, check_shapes, load_tree, shapes_of
from jepa_jax.command import Parser, ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.data import FOLDER_PREFIX, Dataset
from jepa_jax.errors import CheckpointError, ConfigError, DataError
from jepa_jax.evaluation import (
    HEALTH_NAMES,
    PARTS,
    PROBE_NAMES,
    evaluate_representation,
    with_online_probe,
)
from jepa_jax.metrics import read_metrics, write_json
from jepa_jax.models import Encoder, EncoderFns, ModelFns
from jepa_jax.plan import clean_images, load_configured, load_fitting, untrained_variables
from jepa_jax.progress import Stopwatch, duration, say
from jepa_jax.representation import reestimate_batch_stats

_DESCRIPTION = """\
Judges the encoder of a run, and writes evaluation.json into its folder.

Everything a probe chooses is chosen on validation images, held out of the training images; the test
images are only scored. Beside every accuracy stand its 95 % interval and three floors: the same
network untrained, raw pixels, and the commonest class.
"""
_CHOICES = ("latest", "best")
# More of them than a screen has lines for are left to evaluation.json.
_MOST_CLASSES = 20


def evaluate_run(
    workdir: str | os.PathLike[str],
    *,
    which: str = "latest",
    dataset: Dataset | str | None = None,
    data_dir: str = "",
    encoder: nn.Module | EncoderFns | ModelFns | None = None,
    parts: Sequence[str] = PARTS,
    augmented_epochs: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Judges the encoder of a run by `evaluate_representation` and writes what it found.

    BatchNorm's statistics are those of 2,000 clean training images of the run; of the untrained
    network, those of the dataset it is judged on; of imported weights, as they came.

    Args:
      workdir: the folder of a run, finished or not, or of imported weights.
      which: the checkpoint: 'latest', 'best' (of those kept, by validation accuracy of the online
        probe), or a step.
      dataset: in place of the run's own; the name of one, or a `Dataset`.
      data_dir: where datasets lie; '' for the config's and the usual places.
      encoder: what was given to `train_and_evaluate` as `encoder`, if anything was.
      parts, augmented_epochs, on_progress: of `evaluate_representation`.

    Returns:
      its result, with 'checkpoint', 'environment' and, on the run's own data, the probe 'online'
      and 'online_gap'. Written to evaluation.json; on another dataset to evaluation_NAME.json.

    Raises:
      CheckpointError: if the folder holds no run or not this checkpoint.
      ConfigError: if it does not say which dataset, and `dataset` does not either.
      DataError: if the dataset cannot be read, or is not the one that the run was trained on.
    """
    judged = find_judged(workdir, which, dataset, data_dir, encoder, on_progress)
    dataset, state = judged.dataset, judged.state
    online = {}
    if judged.is_own and state.get("probe"):
        online = _recorded_online(judged.workdir, judged.step)
    images = clean_images(dataset.train_images)
    untrained = reestimate_batch_stats(judged.encoder, judged.untrained(), images)
    result = evaluate_representation(
        judged.encoder.apply,
        judged.variables,
        dataset,
        num_val=judged.num_val,
        embed=judged.encoder.embed,
        untrained=untrained,
        heads={"online_clean": state["probe"]["params"]} if online else {},
        parts=parts,
        augmented_epochs=augmented_epochs,
        on_progress=on_progress,
    )
    if "online_clean" in result["probes"]:
        result = with_online_probe(result, online)
    result["checkpoint"] = {"which": judged.which, "step": judged.step}
    result["environment"] = environment()
    write_result(judged.file("evaluation"), result)
    return result


@dataclasses.dataclass(frozen=True)
class Judged:
    """What of a run is judged, and on what.

    Attributes:
      workdir, which: the run's folder, and which checkpoint was asked for.
      stored, config: what its config.json says, and the config in it.
      encoder, variables: the model, and {'params', 'batch_stats'} as a probe sees them.
      dataset, is_own: what it is judged on, and whether that is the run's own.
      step, state: the checkpoint's, None and {} of imported weights.
    """

    workdir: pathlib.Path
    which: str
    stored: dict[str, Any]
    config: ConfigDict
    encoder: Encoder
    variables: dict[str, Any]
    dataset: Dataset
    is_own: bool
    step: int | None
    state: dict[str, Any]

    @property
    def num_val(self) -> int:
        """Training images to hold out."""
        own = self.is_own and self.config.data.get("num_val")
        return own or _num_val(len(self.dataset.train_images))

    def file(self, kind: str) -> pathlib.Path:
        """Where figures of this kind go: KIND.json, on another dataset KIND_NAME.json."""
        kind = kind if self.is_own else re.sub(r"[^\w.-]", "_", f"{kind}_{self.dataset.name}")
        return self.workdir / f"{kind}.json"

    def untrained(self, seed: int | None = None) -> dict[str, Any]:
        """The same network before its first step; of another seed than the run's if one is given.

        BatchNorm's statistics are still 0 and 1.
        """
        config, is_ours = self.config, "encoder" not in self.stored["custom"]
        if seed is not None:
            config = ConfigDict({**config, "meta": {"seed": seed}})
        images = self.dataset.train_images
        return untrained_variables(self.encoder, config, images, has_own_stem=is_ours)


def find_judged(
    workdir: str | os.PathLike[str],
    which: str = "latest",
    dataset: Dataset | str | None = None,
    data_dir: str = "",
    encoder: nn.Module | EncoderFns | ModelFns | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Judged:
    """Reads a run's encoder and the dataset to judge it on; see `evaluate_run`, which raises so."""
    (workdir, stored), which = read_run(workdir), str(which)
    described, config = described_encoder(workdir, stored, encoder), ConfigDict(stored["config"])
    step = _step_of(workdir, which)
    data_dir = data_dir or config.data.get("data_dir", "")
    if dataset is None:
        on_progress("reading the dataset")
        dataset = _own_dataset(workdir, stored, data_dir)
    elif isinstance(dataset, str):
        on_progress("reading the dataset")
        dataset = _other_dataset(dataset, config, data_dir, stored["dataset"]["image_shape"])
    dataset = _cut_as(stored, dataset)
    is_own = stored["dataset"] == dataset.identity
    state = {} if step is None else load_tree(workdir / "checkpoints" / str(step))
    has_encoder = which == "latest" and (workdir / "encoder").is_dir()
    found = load_tree(workdir / "encoder") if has_encoder else state
    variables = _fitting(workdir, described, found, dataset.image_shape)
    if not has_encoder:
        own = dataset if is_own else _own_dataset(workdir, stored, data_dir)
        variables = reestimate_batch_stats(described, variables, clean_images(own.train_images))
    return Judged(
        workdir, which, stored, config, described, variables, dataset, is_own, step, state
    )


def write_result(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes figures as JSON; CheckpointError if that cannot be done."""
    try:
        write_json(path, result)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path} cannot be written: {reason}") from error


def _fitting(
    workdir: pathlib.Path, encoder: Encoder, stored: Any, image_shape: tuple[int, ...]
) -> dict[str, Any]:
    """The variables in what a run has stored; CheckpointError unless they are of that encoder."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    wanted = jax.eval_shape(encoder.model.init, jax.random.key(0), images)
    kinds = ("params", "batch_stats")
    found = {kind: stored.get(kind) or {} for kind in kinds}
    try:
        check_shapes(shapes_of(found), {kind: wanted.get(kind, {}) for kind in kinds})
    except ValueError as error:
        raise CheckpointError(
            f"{workdir} holds weights of another network than its config.json describes: {error}"
        ) from error
    return found


def _cut_as(stored: dict[str, Any], dataset: Dataset) -> Dataset:
    """The dataset with as many training images as the run used, if it is the run's own."""
    # .get: an older run has no such key.
    num_train = stored["config"]["data"].get("num_train", 0)
    if dataset.name != stored["dataset"].get("name") or num_train > len(dataset.train_images):
        return dataset
    return dataset.with_num_train(num_train)


def _num_val(num_images: int) -> int:
    """Images to hold out of a dataset that no config speaks of: those of CIFAR-10, or fewer."""
    return min(5000, max(num_images // 5, 1))


def _own_dataset(workdir: pathlib.Path, stored: dict[str, Any], data_dir: str) -> Dataset:
    name = stored["config"]["data"].get("dataset")
    if not name:
        raise ConfigError(f"{workdir} holds imported weights: --dataset says what to judge them on")
    if (own := stored["dataset"].get("name")) != name:
        raise DataError(
            f"{workdir} was trained on {own!r}, a dataset given in Python, "
            "which is needed here: evaluate_run(workdir, dataset=...)"
        )
    data = stored["config"]["data"]
    dataset = load_configured(data, data_dir=data_dir, placement="auto", num_train=0)
    return _cut_as(stored, dataset)


def _other_dataset(name: str, config: ConfigDict, data_dir: str, image_shape: list[int]) -> Dataset:
    """A dataset that the run was not trained on, its images brought to the size of the run's.

    Of a folder in any case: its images seldom share one.
    """
    size = config.data.get("image_size", 0)
    if name.startswith(FOLDER_PREFIX):
        size = size or image_shape[0]
    return load_fitting(name, data_dir=data_dir, image_size=size)


def _step_of(workdir: pathlib.Path, which: str) -> int | None:
    """The checkpoint's step; None for imported weights, which have none."""
    if not (workdir / "checkpoints").is_dir():
        if which != "latest" or not (workdir / "encoder").is_dir():
            raise CheckpointError(f"{workdir} holds no checkpoints, so no {which!r}")
        return None
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(f"{workdir} holds no checkpoints")
        if which in _CHOICES:
            return checkpoints.best_step() if which == "best" else steps[-1]
    if which not in map(str, steps):
        raise CheckpointError(
            f"{workdir} holds no checkpoint {which!r}: there are {', '.join(_CHOICES)} and "
            f"{', '.join(map(str, steps))}"
        )
    return int(which)


def _recorded_online(workdir: pathlib.Path, step: int | None) -> dict[str, float]:
    """What the online probe had reached at this step, by split."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row.get("step") == step]
    suffix = "/online_probe_acc"
    return {
        name.removesuffix(suffix): acc
        for row in rows[-1:]
        for name, acc in row.items()
        if name.endswith(suffix)
    }


def environment() -> dict[str, str]:
    """Versions and the device, as every file of figures has them."""
    packages = ("jax", "jaxlib", "flax", "numpy", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions, "device": device.describe()}


# --- what a person reads ----------------------------------------------------------------------


def _percent(score: dict[str, Any] | None) -> str:
    return "-" if not score else f"{100 * score['acc']:.1f}"


def with_interval(score: dict[str, Any] | None) -> str:
    """'66.4 [65.5, 67.4]': an accuracy and its 95 % interval, in %."""
    if not score:
        return "-"
    return f"{100 * score['acc']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def table(rows: list[list[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _main_split(result: dict[str, Any]) -> str:
    rows = result["probes"].values()
    return "test" if any(row["encoder"]["test"] for row in rows) else "val"


def _probe_table(result: dict[str, Any]) -> list[str]:
    main = _main_split(result)
    rows = [["accuracy in %", f"{main} [95 %]", "val", "untrained", "pixels", "chance"]]
    for name, text in PROBE_NAMES.items():
        if row := result["probes"].get(name):
            floors = [(row[f] or {}).get(main) for f in ("untrained", "pixels", "chance")]
            encoder = row["encoder"]
            rows.append(
                [text, with_interval(encoder[main]), _percent(encoder["val"])]
                + [_percent(score) for score in floors]
            )
    return table(rows)


def _class_table(result: dict[str, Any]) -> list[str]:
    """Per class: its accuracy, and the class it is most often taken for."""
    names, rows = result["dataset"]["label_names"], [["class", "accuracy [95 %]", "taken for"]]
    scores = result["per_class"]["scores"]
    for place, (name, score) in enumerate(zip(names, scores, strict=True)):
        taken = list(result["confusion"][place])
        total, taken[place] = max(sum(taken), 1), -1
        worst = int(np.argmax(taken))
        mistaken = f"{names[worst]} ({100 * taken[worst] / total:.0f} %)"
        rows.append([name, with_interval(score), mistaken])
    return table(rows)


def _health_table(health: dict[str, Any]) -> list[str]:
    columns = [
        (f"{kind}, {'trained' if name == 'encoder' else name}", figures[kind])
        for kind in ("h", "z")
        for name, figures in health.items()
        if figures and figures[kind]
    ]
    rows = [["health", *(title for title, _ in columns)]]
    for key, text in HEALTH_NAMES.items():
        rows.append([text, *(f"{figures[key]:.4g}" for _, figures in columns)])
    return table(rows)


def print_evaluation(result: dict[str, Any]) -> None:
    """Prints the result of `evaluate_representation` as tables."""
    described, blocks = result["dataset"], []
    if result["probes"]:
        blocks.append(_probe_table(result))
    if "confusion" in result and len(described["label_names"]) <= _MOST_CLASSES:
        blocks.append(_class_table(result))
    if result["health"]:
        blocks.append(_health_table(result["health"]))
    for block in blocks:
        say("\n".join(["", *block]))
    say("")
    if result.get("online_gap"):
        say(result["online_gap"])
    if result["probes"]:
        say(
            f"fitted on {described['num_train']} images of {described['name']}, chosen on "
            f"{described['num_val']} others (val); test images are only scored. Floors are on "
            f"{_main_split(result)} images"
        )


def judging_parser(name: str, description: str) -> Parser:
    """Of a command that judges a run's encoder: what `find_judged` takes."""
    parser = Parser(prog=f"python -m jepa_jax.{name}", description=description)
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--checkpoint", default="latest", help="latest, best, or a step")
    parser.add_argument(
        "--dataset", help="in place of the run's own: a tfds dataset, or folder:/path/to/images"
    )
    parser.add_argument("--data_dir", default="", help="where datasets lie")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = judging_parser("evaluate", _DESCRIPTION)
    parser.add_argument(
        "--augmented_epochs",
        type=int,
        default=0,
        metavar="N",
        help="also a linear probe by SGD on augmented views, for N epochs (papers use 100)",
    )
    arguments = parser.parse_args(argv)
    if arguments.augmented_epochs < 0:
        parser.error("--augmented_epochs must be 0 or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments = _parse(argv)
    with errors_as_lines("interrupted; nothing was written"):
        watch = Stopwatch()
        watch.start()
        result = evaluate_run(
            arguments.workdir,
            which=arguments.checkpoint,
            dataset=arguments.dataset,
            data_dir=arguments.data_dir,
            augmented_epochs=arguments.augmented_epochs,
            on_progress=lambda text: say(f"{duration(watch.seconds):>9}  {text} ..."),
        )
        print_evaluation(result)
        say(f"written   {arguments.workdir}/evaluation*.json in {duration(watch.seconds)}")


if __name__ == "__main__":
    with_huge_pages()
    device.select("auto")
    with ends_at_once():
        main()
