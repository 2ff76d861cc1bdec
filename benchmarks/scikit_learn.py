"""Does scikit-learn find what evaluation.json says? The same features, fitted again.

    python -m benchmarks.scikit_learn --workdir=runs/cpu --out benchmarks/results/scikit_learn.json

Linear probes are fitted with the penalty that evaluation.json names, in float64; neighbours by
brute force. Prints a table and exits with 1 if an accuracy differs by more than 0.1 points.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from jepa_jax import load_dataset, load_encoder
from jepa_jax.metrics import read_json
from jepa_jax.representation import extract_features, split_validation

_TOLERANCE = 0.1
Predict = Callable[[np.ndarray], np.ndarray]


def _fits(h: np.ndarray, labels: np.ndarray, probes: dict) -> dict[str, Callable[[], Predict]]:
    """By the probe's name, what fits it and returns what predicts; h [N, F] in float64."""
    mean, std = h.mean(0), h.std(0)
    standardised = (h - mean) / std

    def penalty(name):
        return probes[name]["encoder"]["lambda"] * len(h)

    def linear():
        model = LogisticRegression(C=1 / penalty("linear"), tol=1e-6, max_iter=10_000)
        model.fit(standardised, labels)
        return lambda x: model.predict((x - mean) / std)

    def ridge():
        model = Ridge(alpha=penalty("ridge")).fit(standardised, np.eye(labels.max() + 1)[labels])
        return lambda x: model.predict((x - mean) / std).argmax(1)

    def neighbours(weights):
        model = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
        return model.fit(h, labels).predict

    return {
        "linear": linear,
        "ridge": ridge,
        "knn": lambda: neighbours(lambda distance: np.exp((1 - distance) / 0.07)),
        "knn_majority": lambda: neighbours("uniform"),
    }


def main() -> None:
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    probes = read_json(arguments.workdir / "evaluation.json")["probes"]
    config = read_json(arguments.workdir / "config.json")["config"]
    dataset = load_dataset(config["data"]["dataset"], data_dir=config["data"]["data_dir"])
    dataset = dataset.with_num_train(config["data"].get("num_train", 0))
    encoder, variables = load_encoder(arguments.workdir)
    train, val = split_validation(dataset, config["data"]["num_val"])
    h, test_h = (
        np.asarray(extract_features(encoder.apply, variables, images), np.float64)
        for images in (dataset.train_images, dataset.test_images)
    )
    labels = dataset.train_labels
    splits = {"val": (h[val], labels[val]), "test": (test_h, dataset.test_labels)}
    rows = []
    for name, fit in _fits(h[train], labels[train], probes).items():
        predict = fit()
        for split, (x, known) in splits.items():
            theirs = float(np.mean(predict(x) == known))
            ours = probes[name]["encoder"][split]["acc"]
            difference = 100 * (ours - theirs)
            rows.append(
                {
                    "probe": name,
                    "split": split,
                    "ours": ours,
                    "scikit_learn": theirs,
                    "points": difference,
                }
            )
            print(
                f"{name:<14}{split:<6}{100 * ours:8.2f}{100 * theirs:8.2f}{difference:+8.2f}",
                flush=True,
            )
    if arguments.out:
        content = {
            "what": "accuracies of evaluation.json beside scikit-learn's on the same features",
            "command": "python -m benchmarks.scikit_learn --workdir=runs/cpu",
            "scikit-learn": sklearn.__version__,
            "feature_dim": h.shape[1],
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(abs(row["points"]) > _TOLERANCE for row in rows))


if __name__ == "__main__":
    main()
