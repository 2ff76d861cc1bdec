"""What a report shows of images: augmented pairs, nearest neighbours, a map of the test set."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from PIL import Image

from jepa_jax.api import load_encoder
from jepa_jax.augment import two_views
from jepa_jax.config import blur_kernel, view_options
from jepa_jax.data import FOLDER_PREFIX, Dataset, data_dir, prepared
from jepa_jax.errors import DataError, JepaError
from jepa_jax.plan import load_configured
from jepa_jax.report.gather import Run, part
from jepa_jax.representation import extract_features, split_validation

NUM_PAIRS, NUM_QUERIES, NUM_NEIGHBOURS = 12, 10, 8
# Images that are embedded, of which the map shows some; large images are fewer.
_MAX_IMAGES, _MAX_BYTES, _MAX_ON_MAP = 10_000, 2**28, 2_000
# t-SNE's own default is 1,000: after 500 the map of CIFAR-10 looks the same in half the time.
_TSNE_STEPS = 500
# Of an image on the page: larger ones would make it a heavy page.
_SIDE = 56


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest test images of some test images, by the cosine of their representations.

    Attributes:
      images: float32 in [0, 1], [Q, 1 + K, H, W, 3]; the query first, then the nearest first.
      labels: int [Q, 1 + K], -1 where there is none.
      indices: int [Q, 1 + K] into the embedded images.
      cosines: float32 [Q, K].
      same_class: share of neighbours with the query's class, over the images of the map; None
        without labels. by_chance: what a random order of the images would give.
      num_images: how many images the neighbours were sought among.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    cosines: np.ndarray
    same_class: float | None
    by_chance: float | None
    num_images: int


@dataclasses.dataclass(frozen=True)
class Map:
    """t-SNE of representations: places [N, 2], labels int [N] (-1 where there is none)."""

    places: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What was found; what is None has its reason, one line of plain text, in `missing`.

    Attributes:
      pairs: images, their first views and their second views, float32 in [0, 1], [N, H, W, 3]
        each; views are square.
      split: 'test', or 'validation' for a dataset without test images.
      label_names: one a class.
      missing: reasons by the names 'pairs', 'neighbours' and 'map'.
    """

    pairs: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    neighbours: Neighbours | None
    map: Map | None
    split: str
    label_names: tuple[str, ...]
    missing: dict[str, str]


def take_pictures(run: Run, dataset: Dataset | None = None) -> Pictures:
    """Reads the dataset and the encoder of a run and embeds some of its images.

    Args:
      run: see `read_run`.
      dataset: in place of the config's.

    Returns:
      What could be had. A dataset that would have to be downloaded is not.
    """
    missing: dict[str, str] = {}
    pairs = neighbours = map_ = None
    split = "test"
    try:
        dataset = dataset or _dataset_of(run)
    except JepaError as error:
        missing = dict.fromkeys(("pairs", "neighbours", "map"), str(error))
        return Pictures(None, None, None, split, (), missing)
    if "augment_fn" in run.custom:
        missing["pairs"] = f"the views were made by {run.custom['augment_fn']}, which is not here"
    else:
        pairs = _pairs(dataset, _strengths(run, dataset.image_shape[0]))
    try:
        images, labels, split = _shown_images(run, dataset)
        h = _features(run, images)
    except JepaError as error:
        missing["neighbours"] = missing["map"] = str(error)
    else:
        neighbours = find_neighbours(h, images, labels)
        on_map = _spread(len(h), _MAX_ON_MAP)
        try:
            map_ = Map(tsne(h[on_map]), labels[on_map])
        except DataError as error:
            missing["map"] = str(error)
    return Pictures(pairs, neighbours, map_, split, dataset.label_names, missing)


def _dataset_of(run: Run) -> Dataset:
    name, trained_on = run.config.get("data.dataset"), part(run.stored, "dataset").get("name")
    if type(name) is not str or not trained_on:
        raise DataError("config.json names no dataset")
    if name != trained_on:
        raise DataError(
            f"the run was trained on arrays of its own, {trained_on!r}: "
            "write_report([workdir], dataset=...) shows them"
        )
    folder = str(run.config.get("data.data_dir") or "")
    # load_dataset would fetch it.
    if not name.startswith(FOLDER_PREFIX) and prepared.find(data_dir(folder), name) is None:
        raise DataError(f"{name} is not prepared in {data_dir(folder)}")
    return load_configured(part(run.stored, "config").get("data"), placement="stream")


def _shown_images(run: Run, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [N, H, W, 3] that no probe was fitted on, their labels [N], their split."""
    images, labels, split = dataset.test_images, dataset.test_labels, "test"
    indices = np.arange(0 if images is None else len(images))
    if images is None:
        num_val = min(int(run.config.get("data.num_val", 0)), len(dataset.train_images))
        images, labels, split = dataset.train_images, dataset.train_labels, "validation"
        indices = split_validation(dataset, num_val)[1]
    size = int(np.prod(images.shape[1:]))
    indices = indices[_spread(len(indices), min(_MAX_IMAGES, max(1, _MAX_BYTES // size)))]
    if len(indices) <= NUM_NEIGHBOURS:
        raise DataError(f"the dataset has {len(indices)} {split} images, too few for neighbours")
    chosen = np.full(len(indices), -1) if labels is None else np.asarray(labels)[indices]
    return np.asarray(images[indices]), chosen, split


def _features(run: Run, images: np.ndarray) -> np.ndarray:
    encoder, variables = load_encoder(run.workdir)
    try:
        h = np.asarray(extract_features(encoder.apply, variables, images))
    except (FlaxError, KeyError, TypeError, ValueError) as error:  # shapes that do not fit
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the encoder does not take these images ({reason})") from error
    if not np.isfinite(h).all():
        raise DataError("the representations of some images are not finite")
    return h


def _spread(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things at even distances, in order."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _one_of_each(labels: np.ndarray | None, count: int, total: int) -> np.ndarray:
    """Indices of `count` images: the first of every class, then the second of every class, ..."""
    if labels is None or (np.asarray(labels) < 0).all():
        return _spread(total, count)
    labels = np.asarray(labels)
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    turns = [(turn, n, i) for n, c in enumerate(by_class) for turn, i in enumerate(c[:count])]
    return np.array([index for _, _, index in sorted(turns)[:count]])


def _small(images: np.ndarray) -> np.ndarray:
    """uint8, or float32 in [0, 1], [..., H, W, 3], to float32 at the size of the page."""
    if images.dtype != np.uint8:
        images = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    height, width = images.shape[-3:-1]
    if max(height, width) > _SIDE:
        scale = _SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        flat = images.reshape(-1, *images.shape[-3:])
        flat = np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in flat])
        images = flat.reshape(*images.shape[:-3], *flat.shape[1:])
    return images.astype(np.float32) / 255


def _strengths(run: Run, side: int) -> dict[str, Any]:
    """Of the run's views at this side; none in the config of an older run: those of the default."""
    found = {k.partition(".")[2]: v for k, v in run.config.items() if k.startswith("augment.")}
    options = {"augment": found}
    return {**view_options(options), "blur_kernel": blur_kernel(options, side)}


def _pairs(
    dataset: Dataset, strengths: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chosen = _one_of_each(dataset.train_labels, NUM_PAIRS, len(dataset.train_images))
    images = jax.device_put(np.asarray(dataset.train_images[chosen]))
    views = jax.jit(functools.partial(two_views, **strengths))(jax.random.key(0), images)
    return tuple(_small(np.asarray(shown)) for shown in (images, *views))


def find_neighbours(h: np.ndarray, images: np.ndarray, labels: np.ndarray) -> Neighbours:
    """The nearest images of a few, one of each class where there are labels.

    Args:
      h: representations, float [N, F], finite.
      images: uint8 [N, H, W, 3].
      labels: int [N], -1 where there is none.
    """
    unit = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-30)
    queries = _one_of_each(labels, NUM_QUERIES, len(h))
    nearest, cosines = _nearest(unit, queries)
    shown = np.concatenate([queries[:, None], nearest], axis=1)
    same_class = by_chance = None
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled):
        some = labelled[_spread(len(labelled), _MAX_ON_MAP)]
        same_class = float(np.mean(labels[_nearest(unit, some)[0]] == labels[some, None]))
        shares = np.bincount(labels[labelled]) / len(labels)
        by_chance = float(np.sum(shares**2))
    return Neighbours(
        images=_small(images[shown]),
        labels=labels[shown],
        indices=shown,
        cosines=cosines,
        same_class=same_class,
        by_chance=by_chance,
        num_images=len(h),
    )


def _nearest(unit: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices, cosines), [Q, K] each, the nearest first; no image is its own neighbour."""
    cosines = unit[queries] @ unit.T
    cosines[np.arange(len(queries)), queries] = -np.inf
    some = np.argpartition(-cosines, NUM_NEIGHBOURS - 1, axis=1)[:, :NUM_NEIGHBOURS]
    order = np.argsort(-np.take_along_axis(cosines, some, 1), axis=1, kind="stable")
    nearest = np.take_along_axis(some, order, 1)
    return nearest, np.take_along_axis(cosines, nearest, 1)


def tsne(h: np.ndarray) -> np.ndarray:
    """A map of representations, by scikit-learn: t-SNE after PCA to at most 50 dimensions.

    Args:
      h: float [N, F], finite.

    Returns:
      Places, float32 [N, 2]; the same on every call.

    Raises:
      DataError: fewer than ten images or two dimensions, or representations that are all alike.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(h) < 10 or h.shape[1] < 2:
        raise DataError(f"{len(h)} images and {h.shape[1]} features are too few for a map")
    if np.ptp(h, axis=0).max() < 1e-6 * max(1e-6, np.abs(h).max()):
        raise DataError("the representations are all alike: the run has collapsed")
    # One thread: OpenMP's own wait by spinning, and made this five times slower on a busy machine.
    with threadpool_limits(1):
        reduced = PCA(min(50, *h.shape), random_state=0).fit_transform(h)
        perplexity = min(30.0, (len(h) - 1) / 3)
        map_ = TSNE(init="pca", random_state=0, perplexity=perplexity, max_iter=_TSNE_STEPS)
        return map_.fit_transform(reduced)
