"""The 400 real images of the tiny run that is attacked."""

import pathlib
from typing import Any

import numpy as np

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "cifar10_small.npz"


def small_arrays() -> dict[str, np.ndarray]:
    """400 training and 200 test images of CIFAR-10, with labels."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def small_dataset() -> Any:
    """The same as a dataset."""
    from jepa_jax.data import from_arrays

    arrays = small_arrays()
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return from_arrays(*(arrays[name] for name in names))
