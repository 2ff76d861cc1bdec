"""How good are frozen features? Every probe, floor and health figure, as one dict of numbers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jepa_jax.augment import to_float, two_views
from jepa_jax.data import Dataset
from jepa_jax.errors import DataError
from jepa_jax.health import summarise
from jepa_jax.probes import (
    confusion_matrix,
    few_shot_draws,
    few_shot_probe,
    knn_votes,
    logistic_probe,
    ridge_probe,
    wilson_interval,
)
from jepa_jax.progress import Phases
from jepa_jax.representation import CHUNK, extract_features, labelled, split_validation
from jepa_jax.sgd_probe import augmented_probe
from jepa_jax.train_step import AugmentFn, probe_logits, stream_key

# Of evaluation.json.
EVALUATION_SCHEMA_VERSION = 1
PARTS = ("linear", "ridge", "knn", "few_shot", "health", "pixels")
# What people call the probes; the first that an evaluation has is its headline.
PROBE_NAMES = {
    "linear": "linear, logistic",
    "ridge": "linear, ridge",
    "augmented": "linear, SGD on augmented views",
    "knn": "20 nearest neighbours",
    "knn_majority": "20 nearest, plain majority",
    "online": "linear, online",
    "online_clean": "linear, online, clean statistics",
    "few_shot_100": "linear, 100 labels a class",
    "few_shot_10": "linear, 10 labels a class",
    "few_shot_1": "linear, 1 label a class",
}
HEALTH_NAMES = {
    "rank_me": "RankMe",
    "effective_rank": "effective rank",
    "dim": "dimensions",
    "dead_fraction": "dead dimensions",
    "std_min": "standard deviation, least",
    "std_mean": "standard deviation, mean",
    "mean_cosine": "cosine between views",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
_LINEAR = {"linear": logistic_probe, "ridge": ridge_probe}
_SHOTS, _NUM_DRAWS = (1, 10, 100), 5
_NUM_HEALTH_IMAGES = 5000
# Larger images are first averaged down to this side: pixels by the thousand are floor enough.
_PIXEL_SIDE, _NUM_PIXEL_ROWS = 32, 50_000

Apply = Callable[[Any, jax.Array], jax.Array]


class _Features(NamedTuple):
    """h [N, F] on the device and labels int32 [N] of one split."""

    h: jax.Array
    labels: jax.Array


def evaluate_representation(
    apply: Apply,
    variables: Any,
    dataset: Dataset,
    *,
    num_val: int = 5000,
    embed: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]] | None = None,
    untrained: Any | None = None,
    heads: Mapping[str, dict[str, jax.Array]] | None = None,
    augment_fn: AugmentFn = two_views,
    parts: Sequence[str] = PARTS,
    augmented_epochs: int = 0,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Judges frozen representations by linear probes, neighbours, few labels and their own shape.

    Every probe is fitted on the training images that are not held out; what it has to choose, it
    chooses on the `num_val` held-out ones. The test images are only scored.

    Args:
      apply: (variables, images uint8 or [0, 1] [B, H, W, C]) -> h [B, F].
      variables: of the encoder, passed through.
      dataset: with labels, -1 for an image without one; without labels only health is measured.
      num_val: training images held out.
      embed: (variables, images) -> (h, z [B, D]): health of the embedding too.
      untrained: the variables of the same network before training: the floor of every figure.
      heads: linear classifiers {'kernel' [F, K], 'bias' [K]} by name, to score beside the probes.
      augment_fn: (key, images) -> two views in [0, 1]; for alignment.
      parts: of PARTS: 'linear' (multinomial logistic regression), 'ridge', 'knn', 'few_shot',
        'health', and 'pixels', which puts the same probes on raw pixels beside them, fitted on at
        most 50,000 images.
      augmented_epochs: epochs of the SGD probe on augmented views, the literature's protocol, for
        an `apply` that JAX can trace; 0 leaves it out.
      seed: of the few-shot draws, the views and the SGD probe.
      on_progress: called with a line before each piece of work.

    Returns:
      a dict that JSON can hold. `probes[name]` has 'encoder', 'untrained' and 'pixels' (None where
      not asked for), each {'val', 'test', ...} with {'acc', 'low', 'high', 'count'}, accuracies in
      [0, 1] and a 95 % interval (Wilson's of the images; of few-shot probes Student's over the
      draws), and 'chance', always the commonest class. `per_class` and `confusion` (rows true,
      columns predicted) are the first linear probe's on test images, else on validation images.
      `health['encoder' or 'untrained']['h' or 'z']` has the figures of `health.summarise`.

    Raises:
      DataError: if `num_val` leaves no training image.
      ValueError: for an unknown part.
    """
    _check(dataset, num_val, parts)
    train, val = split_validation(dataset, num_val)
    phases = Phases()
    encoders: dict[str, tuple[Apply, Any]] = {"encoder": (apply, variables)}
    if untrained is not None:
        encoders["untrained"] = (apply, untrained)
    result: dict[str, Any] = {
        "schema_version": EVALUATION_SCHEMA_VERSION,
        "dataset": _describe(dataset, len(train), len(val)),
        "health": None,
        "probes": {},
    }
    if "health" in parts and len(val) > 1:
        embed_fn = embed or (lambda variables, images: (apply(variables, images), None))
        result["health"] = dict.fromkeys(("encoder", "untrained"))
        for name, (_, given) in encoders.items():
            on_progress(f"representation health, {name}")
            views = functools.partial(_embed_views, embed_fn, given, dataset, val, augment_fn, seed)
            result["health"][name] = _health_of(views, phases)
    if has_labels(dataset, train, val):
        if "pixels" in parts:
            encoders["pixels"] = (_pixels, None)
        # Of images without a label no probe would learn: STL-10 has 100,000 of them beside 5,000.
        train = train[labelled(dataset)[train]]
        probe = _Battery(dataset, train, val, parts, augmented_epochs, seed, phases, on_progress)
        for name, (apply_fn, given) in encoders.items():
            result.update(probe.run(name, apply_fn, given, heads or {}))
        result["probes"] = probe.table()
    result["seconds"] = phases.seconds
    return result


def _check(dataset: Dataset, num_val: int, parts: Sequence[str]) -> None:
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"parts must be of {PARTS}, got {sorted(unknown)}")
    if dataset.train_labels is not None and num_val >= len(dataset.train_images):
        raise DataError(
            f"num_val={num_val} leaves none of the {len(dataset.train_images)} training images of "
            f"{dataset.name} to the probes"
        )


def has_labels(dataset: Dataset, train: np.ndarray, val: np.ndarray) -> bool:
    """Whether there is something to fit a probe to, at `train`, and to choose on, at `val`."""
    labels = dataset.train_labels
    if labels is None or dataset.num_classes < 2:
        return False
    return all((labels[split] >= 0).any() for split in (train, val))


def _describe(dataset: Dataset, num_train: int, num_val: int) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "num_train": num_train,
        "num_val": num_val,
        "num_test": 0 if dataset.test_images is None else len(dataset.test_images),
        "label_names": list(dataset.label_names),
    }


# --- features ---------------------------------------------------------------------------------


@jax.jit
def _pixels(variables: None, images: jax.Array) -> jax.Array:
    del variables
    images = to_float(images)
    count, height, width, channels = images.shape
    side = (min(height, _PIXEL_SIDE), min(width, _PIXEL_SIDE))
    return jax.image.resize(images, (count, *side, channels), "linear").reshape(count, -1)


class _Rows:
    """Some of the images of a dataset, read a chunk at a time."""

    def __init__(self, images: Any, rows: np.ndarray):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._images[self._rows[index]]


def _extract(apply, variables, dataset, train, val, is_pixels) -> dict[str, _Features]:
    """Features of every labelled split."""
    if is_pixels and len(train) > _NUM_PIXEL_ROWS:
        train = np.sort(np.random.default_rng(0).permutation(train)[:_NUM_PIXEL_ROWS])
    # One pass over the images: a dataset on disk is read in its own order.
    chosen = np.sort(np.concatenate([train, val]))
    images = dataset.train_images
    h = extract_features(apply, variables, _Rows(images, chosen))
    place = np.empty(len(images), np.int32)
    place[chosen] = np.arange(len(chosen))
    labels = dataset.train_labels
    splits = {
        name: _Features(h[place[rows]], jnp.asarray(labels[rows], jnp.int32))
        for name, rows in (("train", train), ("val", val))
    }
    if dataset.test_labels is not None and (dataset.test_labels >= 0).any():
        test = extract_features(apply, variables, dataset.test_images)
        splits["test"] = _Features(test, jnp.asarray(dataset.test_labels, jnp.int32))
    return splits


def _health_of(views: Callable[[], dict[str, Any]], phases: Phases) -> dict[str, Any]:
    with phases("extraction"):
        triples = jax.block_until_ready(views())
    with phases("health"):
        return {kind: _health(*triple) for kind, triple in triples.items()}


def _embed_views(embed_fn, variables, dataset, val, augment_fn, seed) -> dict[str, Any]:
    """h and z (or thrice None) of clean images and of two views of each, [N, F] and [N, D]."""
    # At even distances: a dataset may be sorted by class.
    places = np.linspace(0, len(val) - 1, min(len(val), _NUM_HEALTH_IMAGES)).astype(int)
    images = dataset.train_images[val[places]]
    size = min(len(images), CHUNK)
    # Of several pairs of views, the first; local crops are no views of the whole image.
    augment = jax.jit(lambda key, images: [view[:size] for view in augment_fn(key, images)[:2]])
    chunks = []
    for index, start in enumerate(range(0, len(images) - size + 1, size)):
        clean = jax.device_put(images[start : start + size])
        views = augment(stream_key(seed, "health", index), clean)
        chunks.append([embed_fn(variables, view) for view in (to_float(clean), *views)])

    def joined(view, place):
        parts = [chunk[view][place] for chunk in chunks]
        return None if parts[0] is None else jnp.concatenate(parts)

    return {
        kind: tuple(joined(view, place) for view in range(3))
        for place, kind in enumerate(("h", "z"))
    }


def _health(clean, one, two) -> dict[str, Any] | None:
    if clean is None:
        return None
    found = jax.device_get(summarise(clean, one, two))
    spectrum = found.pop("spectrum")
    return {
        "dim": clean.shape[1],
        "num_images": len(clean),
        **{name: float(value) for name, value in found.items()},
        "spectrum": [float(value) for value in spectrum],
    }


# --- probes -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Battery:
    """Every probe asked for, on one encoder after the other; the scores of all as one table."""

    dataset: Dataset
    train: np.ndarray
    val: np.ndarray
    parts: Sequence[str]
    augmented_epochs: int
    seed: int
    phases: Phases
    on_progress: Callable[[str], None]
    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    chance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(
        self, name: str, apply: Apply, variables: Any, heads: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Probes one encoder; of the one that is judged, what stands beside the table."""
        num_classes, is_judged = self.dataset.num_classes, name == "encoder"
        self.on_progress(f"extracting features, {name}")
        with self.phases("extraction"):
            splits = (self.train, self.val)
            features = _extract(apply, variables, self.dataset, *splits, name == "pixels")
            jax.block_until_ready(features)
        self.on_progress(f"probes, {name}")
        heads = heads if is_judged else {}
        probed = _probe(features, self.parts, num_classes, heads, self.seed, self.phases)
        if is_judged and self.augmented_epochs:
            self.on_progress(f"SGD probe on augmented views, {self.augmented_epochs} epochs")
            with self.phases("augmented"):
                probed["augmented"] = self._augmented(apply, variables, features)
        for probe, (scores, _) in probed.items():
            empty = {"encoder": None, "untrained": None, "pixels": None}
            self.scores.setdefault(probe, empty)[name] = scores
        if not is_judged:
            return {}
        self.chance = _chance(features)
        return {
            "feature_dim": features["train"].h.shape[1],
            **_by_class(features, probed, num_classes),
        }

    def table(self) -> dict[str, Any]:
        return {probe: {**row, "chance": self.chance} for probe, row in self.scores.items()}

    def _augmented(self, apply: Apply, variables: Any, features: dict[str, _Features]) -> "_Probed":
        labels = np.full(len(self.dataset.train_images), -1, np.int32)
        labels[self.train] = np.asarray(self.dataset.train_labels)[self.train]
        fit = augmented_probe(
            jax.random.key(self.seed),
            apply,
            variables,
            self.dataset.train_images,
            labels,
            clean=features["train"].h,
            val=features["val"],
            num_classes=self.dataset.num_classes,
            num_epochs=self.augmented_epochs,
        )
        extra = {"lr": fit["lr"], "epochs": self.augmented_epochs}
        return _score_linear(fit, {k: f for k, f in features.items() if k != "train"}, extra)


class _Probed(NamedTuple):
    """What is kept of a probe, and its predictions [N] by split."""

    scores: dict[str, Any]
    predicted: dict[str, np.ndarray]


def _probe(features, parts, num_classes, heads, seed, phases) -> dict[str, _Probed]:
    train, scored = features["train"], {k: f for k, f in features.items() if k != "train"}
    probed = {}
    for name, probe in _LINEAR.items():
        if name in parts:
            with phases(name):
                fit = probe(train, features["val"], num_classes=num_classes)
                probed[name] = _score_linear(fit, scored, {"lambda": fit["lambda"]})
    if "knn" in parts:
        with phases("knn"):
            votes = jax.device_get(
                {k: knn_votes(train, f.h, num_classes=num_classes) for k, f in scored.items()}
            )
        for place, name in enumerate(("knn", "knn_majority")):
            predicted = {k: np.argmax(v[place], axis=1) for k, v in votes.items()}
            probed[name] = _Probed(_score_all(predicted, scored), predicted)
    if "few_shot" in parts:
        with phases("few_shot"):
            for shots in _SHOTS:
                scores = _few_shot(features, shots, num_classes, seed)
                if scores is not None:
                    probed[f"few_shot_{shots}"] = _Probed(scores, {})
    for name, head in heads.items():
        probed[name] = _score_linear(head, scored, {})
    return probed


def _score_linear(fit: Mapping[str, Any], scored, extra: dict[str, Any]) -> _Probed:
    # As the probes compute: a GPU's default would round what these features, not centred, cancel.
    with jax.default_matmul_precision("highest"):
        predicted = {
            name: np.asarray(jnp.argmax(probe_logits(fit, split.h), axis=1))
            for name, split in scored.items()
        }
    return _Probed({**_score_all(predicted, scored), **extra}, predicted)


def _score_all(predicted: dict[str, np.ndarray], scored) -> dict[str, Any]:
    scores = {name: _score(predicted[name], np.asarray(f.labels)) for name, f in scored.items()}
    return {"val": None, "test": None, **scores}


def _score(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy over the labelled rows, with Wilson's 95 % interval."""
    hits, count = int(np.sum(predicted == labels)), int(np.sum(labels >= 0))
    return score_of(hits / max(count, 1), count)


def score_of(acc: float, count: int) -> dict[str, Any]:
    """{'acc', 'low', 'high', 'count'}: an accuracy on `count` images with its 95 % interval."""
    low, high = wilson_interval(acc * count, count)
    return {"acc": acc, "low": low, "high": high, "count": count}


def _few_shot(features, shots: int, num_classes: int, seed: int) -> dict[str, Any] | None:
    """Mean over draws and Student's 95 % interval of it; None if a class has too few images."""
    train = features["train"]
    labels = np.asarray(train.labels)
    if np.bincount(labels[labels >= 0], minlength=num_classes).min() < shots:
        return None
    draws = few_shot_draws(
        train.labels, num_classes=num_classes, shots=shots, num_draws=_NUM_DRAWS, seed=seed
    )
    accs: dict[str, list[float]] = {name: [] for name in features if name != "train"}
    for rows in np.asarray(draws):
        kernel, bias = few_shot_probe(train.h[rows], train.labels[rows], num_classes=num_classes)
        fit = {"kernel": kernel, "bias": bias}
        scored = {name: features[name] for name in accs}
        for name, score in _score_linear(fit, scored, {}).scores.items():
            if score is not None:
                accs[name].append(score["acc"])
    scores: dict[str, Any] = {"val": None, "test": None}
    for name, values in accs.items():
        mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / _NUM_DRAWS**0.5
        # Student's quantile; scipy.stats takes a second to import.
        half = float(scipy.special.stdtrit(_NUM_DRAWS - 1, 0.975)) * error
        scores[name] = {
            "acc": mean,
            "low": max(mean - half, 0.0),
            "high": min(mean + half, 1.0),
            "count": int(np.sum(np.asarray(features[name].labels) >= 0)),
            "draws": values,
        }
    return scores


def with_online_probe(result: dict[str, Any], accs: Mapping[str, float]) -> dict[str, Any]:
    """The result with what the online probe last reached, and the gap to the offline one explained.

    Args:
      result: of `evaluate_representation`, with the online probe's weights among its `heads` as
        'online_clean'.
      accs: accuracies in [0, 1] by split, 'val' and 'test'.
    """
    clean = result["probes"]["online_clean"]
    scores: dict[str, Any] = {"val": None, "test": None}
    for split, acc in accs.items():
        if clean["encoder"][split] is not None:
            scores[split] = score_of(acc, clean["encoder"][split]["count"])
    online = {**clean, "encoder": scores}
    result = {**result, "probes": {**result["probes"], "online": online}}
    split = "test" if scores["test"] else "val"
    return {**result, "online_gap": explain_online_gap(result, split)}


def _by_class(features, probed: dict[str, _Probed], num_classes: int) -> dict[str, Any]:
    """Per-class accuracies and confusion matrix of the first linear probe."""
    name = next((name for name in _LINEAR if name in probed), None)
    if name is None:
        return {}
    split = "test" if "test" in features else "val"
    labels = features[split].labels
    predicted = jnp.asarray(probed[name].predicted[split], jnp.int32)
    confusion = np.asarray(confusion_matrix(predicted, labels, num_classes=num_classes))
    counts = confusion.sum(axis=1)
    scores = [
        score_of(int(hits) / int(count), int(count)) if count else None
        for hits, count in zip(np.diag(confusion), counts, strict=True)
    ]
    return {
        "per_class": {"probe": name, "split": split, "scores": scores},
        "confusion": confusion.tolist(),
    }


def _chance(features) -> dict[str, Any]:
    """The accuracy of always naming the commonest class of the training images."""
    labels = np.asarray(features["train"].labels)
    commonest = np.argmax(np.bincount(labels[labels >= 0]))
    scores: dict[str, Any] = {"val": None, "test": None}
    for name in scores:
        if name in features:
            known = np.asarray(features[name].labels)
            scores[name] = _score(np.full(len(known), commonest), known)
    return scores


# --- online against offline -------------------------------------------------------------------


def explain_online_gap(result: Mapping[str, Any], split: str = "test") -> str | None:
    """Why the online probe and the offline one disagree, in one line of measured shares.

    Args:
      result: of `evaluate_representation`, with the probe 'online', as training saw it (by the
        running statistics of augmented views), and 'online_clean', the same weights on the
        features that the offline probes see.
    """
    probes = result["probes"]
    offline = next((name for name in _LINEAR if name in probes), None)
    names = ("online", "online_clean", offline)
    scores = [probes.get(name, {}).get("encoder") for name in names]
    if not all(scores) or not all(score.get(split) for score in scores):
        return None
    online, clean, fitted = (100 * score[split]["acc"] for score in scores)
    kind = "logistic" if offline == "linear" else "ridge"
    # A zero has no sign.
    statistics, fit = (round(gap, 1) + 0.0 for gap in (clean - online, fitted - clean))
    return (
        f"online {online:.1f} %, offline {fitted:.1f} % ({kind}) on {split} images: "
        f"{statistics:+.1f} points from BatchNorm statistics of clean images in place of running "
        f"ones of augmented views, {fit:+.1f} from a classifier fitted to finished features in "
        "place of one that followed them"
    )
