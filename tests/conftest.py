"""Shared fixtures; every test runs with strict dtype and rank promotion."""

import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def cifar_arrays() -> dict[str, np.ndarray]:
    """400 training and 200 test images of the real CIFAR-10, with labels; see fixtures/."""
    with np.load(FIXTURES / "cifar10_small.npz") as arrays:
        return dict(arrays)
