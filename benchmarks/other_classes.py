"""Are the features of configs/cpu.py good for classes that it never saw? Three seeds.

    python -m benchmarks.other_classes --workdir runs/classes --out benchmarks/results/classes.json

Pretrains on the images of five classes, drawn by the seed, without labels, and probes on the other
five; beside it the same network pretrained on all ten, untrained, and whitened random patches of as
many features, on the same five classes. Nothing is chosen by these figures: they are of test
images. Finished runs are read, not repeated.
"""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.figures import parse, parser, percent, stored, write_document
from configs import cpu
from jepa_jax import (
    Dataset,
    evaluate_representation,
    from_arrays,
    load_dataset,
    load_encoder,
    train_and_evaluate,
)
from jepa_jax.config import feature_dim
from jepa_jax.pace import with_epochs
from jepa_jax.plan import clean_images, untrained_variables
from jepa_jax.random_patches import FEATURES_PER_FILTER, random_patches
from jepa_jax.representation import reestimate_batch_stats

_NUM_CLASSES = 10
ROWS = {
    "other_five": "pretrained on the other five classes",
    "all_ten": "pretrained on all ten",
    "untrained": "the same network, untrained",
    "patches": "whitened random patches of as many features",
}


def split_classes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pretrained on, probed on): five classes each, sorted."""
    classes = np.random.default_rng(seed).permutation(_NUM_CLASSES)
    return np.sort(classes[:5]), np.sort(classes[5:])


def only(dataset: Dataset, classes: np.ndarray, *, labelled: bool) -> Dataset:
    """The images of some classes, these counted from 0."""
    number = np.full(_NUM_CLASSES, -1)
    number[classes] = np.arange(len(classes))
    train, test = (
        np.isin(labels, classes) for labels in (dataset.train_labels, dataset.test_labels)
    )
    if not labelled:
        return from_arrays(dataset.train_images[train], name="five classes")
    return from_arrays(
        dataset.train_images[train],
        number[dataset.train_labels[train]],
        dataset.test_images[test],
        number[dataset.test_labels[test]],
        name="five classes",
    )


def _ridge(apply: Any, variables: Any, dataset: Dataset, num_val: int) -> float:
    result = evaluate_representation(apply, variables, dataset, num_val=num_val, parts=("ridge",))
    return result["probes"]["ridge"]["encoder"]["test"]["acc"]


def measure_seed(seed: int, dataset: Dataset, workdir: pathlib.Path) -> dict[str, Any]:
    """Ridge accuracies in [0, 1] on test images of the five classes that are probed."""
    seen, probed = split_classes(seed)
    pretraining, probing = (
        only(dataset, classes, labelled=labelled)
        for classes, labelled in ((seen, False), (probed, True))
    )
    config = cpu.get_config()
    config.meta.seed = seed
    train_and_evaluate(config, workdir / f"all_ten-seed{seed}")
    # As many steps as on all ten, of half as many images.
    of_ten, of_five = (
        len(each.train_images) // config.data.batch_size for each in (dataset, pretraining)
    )
    config = with_epochs(config, round(config.optim.epochs * of_ten) / of_five)
    train_and_evaluate(config, workdir / f"other_five-seed{seed}", dataset=pretraining)

    num_val, found = config.data.num_val // 2, {}
    for name in ("other_five", "all_ten"):
        encoder, variables = load_encoder(workdir / f"{name}-seed{seed}")
        found[name] = _ridge(encoder.apply, variables, probing, num_val)
    variables = untrained_variables(encoder, config, pretraining.train_images)
    clean = clean_images(pretraining.train_images)
    variables = reestimate_batch_stats(encoder, variables, clean)
    found["untrained"] = _ridge(encoder.apply, variables, probing, num_val)
    num_filters = feature_dim(config.model) // FEATURES_PER_FILTER
    patches = random_patches(
        jax.random.key(seed), pretraining.train_images, num_filters=num_filters
    )
    found["patches"] = _ridge(*patches, probing, num_val)
    return {"seed": seed, "pretrained_on": seen.tolist(), "probed_on": probed.tolist(), **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| features | ridge on five classes, test | over untrained |", "|---|---|---|"]
    for name, text in ROWS.items():
        gains = [row[name] - row["untrained"] for row in rows]
        cells = [percent([row[name] for row in rows]), percent(gains)]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table and writes the figures."""
    arguments = parse(parser(__doc__))
    dataset, rows = load_dataset("cifar10"), []
    for seed in range(arguments.seeds):
        measure = functools.partial(measure_seed, seed, dataset, arguments.workdir)
        rows.append(stored(arguments.workdir / f"seed{seed}.json", measure))
    print(table(rows))
    if arguments.out:
        what = "configs/cpu.py on five classes, probed on the other five"
        write_document(arguments.out, what, "python -m benchmarks.other_classes", seeds=rows)


if __name__ == "__main__":
    main()
