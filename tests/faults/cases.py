"""The tiny run that is attacked: its config and its 400 real images."""

import pathlib
from typing import Any

import numpy as np

from configs import cpu
from tests.tiny import TINY

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


def tiny_config(**overrides: Any) -> Any:
    """`TINY` for three epochs of four steps; overrides as optim__lr=0.1."""
    config = cpu.get_config()
    config.update_from_flattened_dict(
        {
            **TINY,
            "optim.lr": 0.3,
            "optim.epochs": 3.0,
            "optim.warmup_epochs": 1.0,
            "logging.tqdm_silent": True,
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
    )
    return config
