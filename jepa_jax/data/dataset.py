"""A dataset of images and labels, as arrays in memory or as records read when they are needed."""

import dataclasses
from typing import Any

import numpy as np

from jepa_jax.data.records import Records
from jepa_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels to train and to evaluate on.

    Attributes:
      name: shown in headers.
      train_images: uint8 [N, H, W, 3].
      train_labels: int32 [N] in [0, num_classes), -1 where there is none; None without labels.
      test_images, test_labels: the same, or None.
      label_names: one a class.
      fingerprint: of what else makes it this dataset, as the names of its files; '' for nothing.
    """

    name: str
    # A failing test or a debugger shows a dataset by its name, not by its pixels.
    train_images: np.ndarray | Records = dataclasses.field(repr=False)
    train_labels: np.ndarray | None = dataclasses.field(repr=False)
    test_images: np.ndarray | Records | None = dataclasses.field(repr=False)
    test_labels: np.ndarray | None = dataclasses.field(repr=False)
    label_names: tuple[str, ...]
    fingerprint: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run stores of the dataset that it belongs to."""
        fingerprint = {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return {
            "name": self.name,
            "num_train": len(self.train_images),
            "image_shape": list(self.image_shape),
            **fingerprint,
        }

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
