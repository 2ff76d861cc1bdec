"""A dataset of images and labels, as arrays in memory or as records read when they are needed."""

import concurrent.futures
import copy
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jepa_jax.data import prepared
from jepa_jax.data.images import open_image
from jepa_jax.errors import ConfigError, DataError


class Records:
    """The images of a tfds data source, decoded when they are indexed.

    Indexing with an int array or a slice reads like a uint8 array [N, H, W, 3]. Grey images are
    repeated to three channels.

    Args:
      source: a tfds data source whose images are left encoded (`tfds.decode.SkipDecoding`).
      image_key: the feature that holds the image.
      label_key: the feature that holds the label.
      folder: where the records lie, for error messages.
      num_workers: threads that decode; Pillow releases the GIL while it does.

    Raises:
      DataError: on construction or on reading, for records that cannot be read or images that
        differ in size.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, source: Any, image_key: str, label_key: str, folder: pathlib.Path, num_workers: int
    ):
        self._source = source
        self._image_key = image_key
        self._label_key = label_key
        self._folder = folder
        self._num_workers = num_workers
        self._positions = np.arange(len(source))
        self.shape: tuple[int, ...] = (len(source), *self._decode(self._fetch([0])[0]).shape)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def nbytes(self) -> int:
        """Size of all images once they are decoded."""
        return int(np.prod(self.shape))

    def take(self, index: np.ndarray) -> "Records":
        """The records at an int array, none of them decoded."""
        taken = copy.copy(self)
        taken._positions = self._positions[index]
        taken.shape = (len(taken._positions), *self.shape[1:])
        return taken

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return self.read(index)[0]

    def read(self, index: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, 3] and labels int32 [B] at an int array or a slice."""
        positions = self._positions[index]
        images = np.empty((len(positions), *self.shape[1:]), np.uint8)
        labels = np.empty(len(positions), np.int32)

        def fill(slots: np.ndarray) -> None:
            for slot, record in zip(slots, self._fetch(positions[slots]), strict=True):
                images[slot] = self._decode(record, self.shape[1:])
                labels[slot] = record[self._label_key]

        with concurrent.futures.ThreadPoolExecutor(self._num_workers) as pool:
            list(pool.map(fill, np.array_split(np.arange(len(positions)), self._num_workers)))
        return images, labels

    def labels(self, index: np.ndarray | slice) -> np.ndarray:
        """Labels int32 [B], without decoding images."""
        records = self._fetch(self._positions[index])
        return np.array([record[self._label_key] for record in records], np.int32)

    def _fetch(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return self._source.__getitems__([int(position) for position in positions])
        # The readers of records and of protocol buffers each raise their own kinds.
        except Exception as error:
            raise prepared.damaged(self._folder, error) from error

    def _decode(self, record: dict[str, Any], shape: tuple[int, ...] = ()) -> np.ndarray:
        try:
            opened = open_image(record[self._image_key])
            found = (opened.height, opened.width, 3)
            if shape in ((), found):
                return np.asarray(opened.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds
            raise prepared.damaged(self._folder, error) from error
        raise DataError(
            f"the images in {self._folder} differ in size ({found} and {shape}): only "
            "datasets whose images share one size can be read"
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels to train and to evaluate on.

    Attributes:
      name: shown in headers.
      train_images: uint8 [N, H, W, 3].
      train_labels: int32 [N] in [0, num_classes), -1 where there is none; None without labels.
      test_images, test_labels: the same, or None.
      label_names: one a class.
    """

    name: str
    # A failing test or a debugger shows a dataset by its name, not by its pixels.
    train_images: np.ndarray | Records = dataclasses.field(repr=False)
    train_labels: np.ndarray | None = dataclasses.field(repr=False)
    test_images: np.ndarray | Records | None = dataclasses.field(repr=False)
    test_labels: np.ndarray | None = dataclasses.field(repr=False)
    label_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train_images.shape[1:])

    def with_num_train(self, num_train: int) -> "Dataset":
        """The dataset with fewer training images, the same ones whenever it is asked.

        Drawn at random, because a dataset may be sorted by class; in their order.

        Args:
          num_train: how many; all of them for 0.

        Raises:
          ConfigError: if there are not so many.
        """
        num_images = len(self.train_images)
        if num_train > num_images:
            raise ConfigError(
                f"config.data.num_train ({num_train}) is more than the {num_images} training "
                f"images of {self.name}"
            )
        if num_train in (0, num_images):
            return self
        kept = np.sort(np.random.default_rng(0).permutation(num_images)[:num_train])
        images, labels = self.train_images, self.train_labels
        return dataclasses.replace(
            self,
            train_images=images.take(kept) if isinstance(images, Records) else images[kept],
            train_labels=None if labels is None else labels[kept],
        )


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    *,
    name: str = "arrays",
    label_names: tuple[str, ...] = (),
) -> Dataset:
    """A dataset of one's own images.

    Args:
      images: uint8 [N, H, W, 3].
      labels: integers [N], the classes 0, 1, ... without gaps; -1 marks an image without label.
      test_images, test_labels: the same; the classes are those of `labels`.
      name: shown in headers.
      label_names: one a class; the numbers themselves if empty.

    Raises:
      DataError: another dtype, shape, length or range of labels; it names what was seen.
    """
    train_images = _checked_images(images, "images")
    train_labels = _checked_labels(labels, len(train_images), "labels")
    used = np.unique(train_labels[train_labels >= 0]) if train_labels is not None else np.empty(0)
    if len(used) and used[-1] != len(used) - 1:
        missing = sorted(set(range(used[-1])) - set(used.tolist()))
        raise DataError(
            f"labels must be 0, 1, ... without gaps; the largest is {used[-1]}, but "
            f"{missing[0]} does not occur"
        )
    label_names = tuple(label_names) or tuple(str(label) for label in range(len(used)))
    if len(label_names) < len(used):
        raise DataError(f"{len(label_names)} label_names for {len(used)} classes")
    if test_images is not None:
        test_images = _checked_images(test_images, "test_images")
        if test_images.shape[1:] != train_images.shape[1:]:
            raise DataError(
                f"images {train_images.shape} and test_images {test_images.shape} differ in size"
            )
        test_labels = _checked_labels(test_labels, len(test_images), "test_labels")
        if test_labels is not None and test_labels.max() >= len(label_names):
            raise DataError(
                f"test_labels has class {test_labels.max()}, but labels has only "
                f"{len(label_names)} classes"
            )
    elif test_labels is not None:
        raise DataError("test_labels without test_images")
    return Dataset(name, train_images, train_labels, test_images, test_labels, label_names)


def _checked_images(images: np.ndarray, what: str) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DataError(
            f"{what} must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    return images


def _checked_labels(labels: np.ndarray | None, length: int, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (length,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{what} must be integers [{length}], got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < -1:
        raise DataError(f"{what} must be -1 or more, got {labels.min()}")
    return labels.astype(np.int32)
