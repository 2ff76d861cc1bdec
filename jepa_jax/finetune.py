"""The command: python -m jepa_jax.finetune --workdir=runs/cpu --labels=0.01,0.1,1

Trains a run's whole encoder with a share of the labels, under the head of its own frozen probe.
Prints a table of it beside training from scratch, the probe and chance, and writes finetune.json.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn

from jepa_jax import device
from jepa_jax.command import ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.data import Dataset, choose_placement
from jepa_jax.errors import CheckpointError, DataError
from jepa_jax.evaluate import (
    Judged,
    environment,
    find_judged,
    judging_parser,
    table,
    with_interval,
    write_result,
)
from jepa_jax.evaluation import has_labels, score_of
from jepa_jax.finetuning import Rates, balanced_subset, fine_tune
from jepa_jax.metrics import read_json
from jepa_jax.models import EncoderFns, ModelFns
from jepa_jax.plan import clean_images
from jepa_jax.probes import logistic_probe
from jepa_jax.progress import Stopwatch, duration, say
from jepa_jax.representation import (
    extract_features,
    labelled,
    reestimate_batch_stats,
    split_validation,
)
from jepa_jax.train_step import probe_logits

FINETUNE_SCHEMA_VERSION = 1
LABELS = (0.01, 0.1, 1.0)
# Of equal ones on validation images the first, the gentler to the encoder, is taken.
CHOICES = tuple(Rates(encoder, 0.01) for encoder in (0.01, 0.03, 0.1))
BATCH_SIZE = 64
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 10, 50, 1000
COLUMNS = {
    "fine_tuned": "fine-tuned",
    "scratch": "from scratch",
    "probe": "frozen probe",
    "chance": "chance",
}
_DESCRIPTION = """\
Fine-tunes a run's encoder with a share of the labels, and writes finetune.json into its folder.

Beside it stand the same network from scratch under the same recipe, a linear probe of the frozen
encoder on the same labels, and the commonest class. Rates and penalties are chosen on validation
images, held out of the training images; the test images are only scored.
"""


def finetune_run(
    workdir: str | os.PathLike[str],
    *,
    labels: Sequence[float] = LABELS,
    which: str = "latest",
    dataset: Dataset | str | None = None,
    data_dir: str = "",
    encoder: nn.Module | EncoderFns | ModelFns | None = None,
    num_steps: int = 0,
    seed: int = 0,
    num_seeds: int = 1,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fine-tunes the encoder of a run with shares of the labels; docs/evaluation.md has the recipe.

    Every finished trial, a share of one seed, is written at once; the same call goes on with those
    that are missing. A file of another recipe, dataset or checkpoint is begun anew.

    Args:
      workdir, which, dataset, data_dir, encoder: of `evaluate_run`.
      labels: shares of the training images' labels, in (0, 1].
      num_steps: of every training; 0 for 10 epochs of the labels, between 50 and 1,000 steps.
      seed, num_seeds: seeds are seed, seed + 1, ...: of the subset, the order, the views and the
        first weights of the network from scratch.
      on_progress: called with a line before each piece of work.

    Returns:
      a dict that JSON can hold. `trials` has 'labels', 'seed', 'num_labels', 'num_steps' and each
      of COLUMNS as {'val', 'test', ...} with {'acc', 'low', 'high', 'count'}; `rows` has the same
      by share, over the seeds. Written to finetune.json, on another dataset to
      finetune_NAME.json.

    Raises:
      DataError: if the dataset has no labels to train with, or to choose on.
      others as `evaluate_run`.
    """
    judged = find_judged(workdir, which, dataset, data_dir, encoder, on_progress)
    path = judged.file("finetune")
    settings = {
        "dataset": judged.dataset.identity,
        "checkpoint": {"which": judged.which, "step": judged.step},
        "recipe": {
            "rates": [choice._asdict() for choice in CHOICES],
            "batch_size": BATCH_SIZE,
            "num_steps": num_steps,
        },
    }
    splits = split_validation(judged.dataset, judged.num_val)
    if not has_labels(judged.dataset, *splits):
        raise DataError(f"{judged.dataset.name} has no labels to fine-tune and to choose with")
    wanted = [(share, seed + n) for share in sorted(set(labels)) for n in range(num_seeds)]
    trials = _finished(path, settings)
    bench = _Bench(judged, *splits, num_steps)
    for share, number in wanted:
        if (share, number) not in trials:
            on_progress(f"{share:.4g} of the labels, seed {number}")
            trials[share, number] = bench.trial(share, number)
        shown = [trials[key] for key in wanted if key in trials]
        result = {
            "schema_version": FINETUNE_SCHEMA_VERSION,
            **settings,
            "num_val": len(splits[1]),
            "command": sys.argv,
            "environment": environment(),
            "rows": _rows(shown),
            "trials": [trials[key] for key in sorted(trials)],
        }
        write_result(path, result)
    return result


def _finished(path, settings: dict[str, Any]) -> dict[tuple[float, int], dict[str, Any]]:
    """The trials that a file of the same settings holds, by share and seed."""
    if not path.exists():
        return {}
    with contextlib.suppress(CheckpointError, KeyError, TypeError):
        old = read_json(path)
        wanted = {"schema_version": FINETUNE_SCHEMA_VERSION, **settings}
        if {key: old[key] for key in wanted} == wanted:
            return {(trial["labels"], trial["seed"]): trial for trial in old["trials"]}
    return {}


class _Bench:
    """Everything that the trials of one encoder on one dataset share."""

    def __init__(self, judged: Judged, train: np.ndarray, val: np.ndarray, num_steps: int):
        self.judged, dataset = judged, judged.dataset
        self.num_steps, self.labels = num_steps, np.asarray(dataset.train_labels)
        self.train = train[labelled(dataset)[train]]
        self.scored = {"val": (dataset.train_images[val], self.labels[val])}
        if dataset.test_labels is not None and (dataset.test_labels >= 0).any():
            self.scored["test"] = (dataset.test_images, dataset.test_labels)

    @functools.cached_property
    def frozen(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """(h, labels) of the encoder as it was trained, by scored split."""
        return self._features(self.judged.variables, tuple(self.scored))

    def _features(self, variables, names: Sequence[str]) -> dict[str, tuple[jax.Array, jax.Array]]:
        apply = self.judged.encoder.apply
        return {
            name: (extract_features(apply, variables, images), jnp.asarray(labels))
            for name, (images, labels) in self.scored.items()
            if name in names
        }

    def trial(self, share: float, seed: int) -> dict[str, Any]:
        """One share of the labels with one seed: every column's scores."""
        dataset = self.judged.dataset
        rows = balanced_subset(self.labels, self.train, share, seed)
        images, labels = dataset.train_images[rows], self.labels[rows]
        if choose_placement("auto", images.nbytes) == "device":
            images = jax.device_put(images)
        steps = self.num_steps or steps_for(len(rows))
        pretrained, untrained = self.judged.variables, self._untrained(seed)
        probe = self._probe(pretrained, images, labels, self.frozen)
        floor = self._probe(untrained, images, labels, self._features(untrained, ("val",)))
        return {
            "labels": share,
            "seed": seed,
            "num_labels": len(rows),
            "num_steps": steps,
            "fine_tuned": self._best(seed, pretrained, probe, images, labels, steps),
            "scratch": self._best(seed, untrained, floor, images, labels, steps),
            "probe": {**_scores(probe, self.frozen), "lambda": probe["lambda"]},
            "chance": self._chance(labels),
        }

    def _untrained(self, seed: int) -> dict[str, Any]:
        """The network before its first step, its statistics those of clean images."""
        images = clean_images(self.judged.dataset.train_images)
        return reestimate_batch_stats(self.judged.encoder, self.judged.untrained(seed), images)

    def _probe(self, variables, images, labels: np.ndarray, scored) -> dict[str, Any]:
        """Logistic regression on the frozen features of the images to be fine-tuned with."""
        train = (
            extract_features(self.judged.encoder.apply, variables, images),
            jnp.asarray(labels),
        )
        return logistic_probe(train, scored["val"], num_classes=self.judged.dataset.num_classes)

    def _best(self, seed, start, probe, images, labels, num_steps: int) -> dict[str, Any]:
        """Scores of the choice of rates that is best on validation images."""
        best, best_acc = None, -1.0
        for rates in CHOICES:
            tuned = fine_tune(
                jax.random.key(seed),
                self.judged.encoder,
                start,
                {key: probe[key] for key in ("kernel", "bias")},
                images,
                labels,
                num_steps=num_steps,
                batch_size=BATCH_SIZE,
                rates=rates,
            )
            score = self._score(tuned, ("val",))["val"]
            if score["acc"] > best_acc:
                best, best_acc, chosen = tuned, score["acc"], rates
        return {**self._score(best, tuple(self.scored)), "rates": chosen._asdict()}

    def _score(self, tuned, names: Sequence[str]) -> dict[str, Any]:
        return _scores(tuned.params["head"], self._features(tuned.variables, names))

    def _chance(self, labels: np.ndarray) -> dict[str, Any]:
        """Always the commonest class of the labels trained on."""
        commonest = np.argmax(np.bincount(labels))
        always = {k: (np.full(len(y), commonest), y) for k, (_, y) in self.scored.items()}
        return {"val": None, "test": None, **{k: _score(*pair) for k, pair in always.items()}}


def steps_for(num_labels: int) -> int:
    """Steps of a training with so many labels: 10 epochs, but from 50 to 1,000 steps."""
    return min(max(_EPOCHS * num_labels // BATCH_SIZE, _FEWEST_STEPS), _MOST_STEPS)


def _scores(head, features) -> dict[str, Any]:
    """{'val', 'test'} of a linear classifier on (h [N, F], labels [N]) by split."""
    scores: dict[str, Any] = {"val": None, "test": None}
    with jax.default_matmul_precision("highest"):
        for name, (h, labels) in features.items():
            predicted = np.asarray(jnp.argmax(probe_logits(head, h), axis=1))
            scores[name] = _score(predicted, np.asarray(labels))
    return scores


def _score(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    count = int(np.sum(labels >= 0))
    return score_of(int(np.sum(predicted == labels)) / max(count, 1), count)


def _rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By share of labels: every column over the seeds."""
    rows = []
    for share in sorted({trial["labels"] for trial in trials}):
        same = [trial for trial in trials if trial["labels"] == share]
        columns = {
            name: {k: over_seeds([trial[name][k] for trial in same]) for k in ("val", "test")}
            for name in COLUMNS
        }
        about = {key: same[0][key] for key in ("labels", "num_labels", "num_steps")}
        rows.append({**about, "seeds": [trial["seed"] for trial in same], **columns})
    return rows


def over_seeds(scores: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The mean score; of several with their standard deviation and Student's 95 % interval."""
    found = [score for score in scores if score]
    if len(found) < len(scores):
        return None
    if len(found) == 1:
        return found[0]
    accs = [score["acc"] for score in found]
    mean, std = float(np.mean(accs)), float(np.std(accs, ddof=1))
    half = float(scipy.special.stdtrit(len(accs) - 1, 0.975)) * std / len(accs) ** 0.5
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return {"acc": mean, "low": low, "high": high, "std": std, "count": found[0]["count"]}


def print_finetune(result: dict[str, Any]) -> None:
    """Prints the result of `finetune_run` as a table, of test images where there are any."""
    split = "test" if result["rows"][0]["fine_tuned"]["test"] else "val"
    lines = [["labels", "images", *COLUMNS.values()]]
    for row in result["rows"]:
        cells = [with_interval(row[name][split]) for name in COLUMNS]
        lines.append([f"{100 * row['labels']:.4g} %", str(row["num_labels"]), *cells])
    say("\n".join(["", *table(lines), ""]))
    num_seeds = len(result["rows"][0]["seeds"])
    kind = "of the images (Wilson)" if num_seeds == 1 else f"over {num_seeds} seeds (Student)"
    chosen = f"{result['num_val']} others (val)" if split == "test" else "the same images"
    say(
        f"accuracy in % on {split} images of {result['dataset']['name']}, whole ones, and its 95 % "
        f"interval {kind}; rates and penalties chosen on {chosen}"
    )


def _shares(text: str) -> list[float]:
    shares = [float(part) for part in text.split(",")]
    if not all(0 < share <= 1 for share in shares):
        raise ValueError
    return shares


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = judging_parser("finetune", _DESCRIPTION)
    parser.add_argument(
        "--labels", default="0.01,0.1,1", help="shares of the labels, above 0 and up to 1"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="of every training; 0: 10 epochs of the labels, from 50 to 1,000 steps",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds")
    arguments = parser.parse_args(argv)
    try:
        arguments.labels = _shares(arguments.labels)
    except ValueError:
        parser.error(f"--labels must be shares such as 0.01,0.1,1, got {arguments.labels!r}")
    if arguments.steps < 0:
        parser.error("--steps must be 0 or more")
    if arguments.seeds < 1 or not 0 <= arguments.seed < 2**31 - arguments.seeds:
        parser.error("--seeds must be 1 or more, and --seed from 0 to 2**31 - 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments = _parse(argv)
    with errors_as_lines("interrupted; finished rows are kept, and the same command goes on"):
        watch = Stopwatch()
        watch.start()
        result = finetune_run(
            arguments.workdir,
            labels=arguments.labels,
            which=arguments.checkpoint,
            dataset=arguments.dataset,
            data_dir=arguments.data_dir,
            num_steps=arguments.steps,
            seed=arguments.seed,
            num_seeds=arguments.seeds,
            on_progress=lambda text: say(f"{duration(watch.seconds):>9}  {text} ..."),
        )
        print_finetune(result)
        say(f"written   {arguments.workdir}/finetune*.json in {duration(watch.seconds)}")


if __name__ == "__main__":
    with_huge_pages()
    device.select("auto")
    with ends_at_once():
        main()
