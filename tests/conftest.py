"""Shared fixtures; every test runs with strict dtype and rank promotion.

Programs are compiled once per session, also across the processes that tests start: JAX's
persistent cache lies in a temporary folder that goes with the session.
"""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

# The processes of pytest-xdist inherit the folder of the first.
_CACHE = tempfile.TemporaryDirectory(prefix="jepa_jax_tests_")
os.environ.setdefault("JEPA_JAX_TEST_CACHE", _CACHE.name)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JEPA_JAX_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# ruff: noqa: E402
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import tiny_config

from jepa_jax.data import Dataset, from_arrays
from jepa_jax.data.cifar10 import LABEL_NAMES

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_file() -> Iterator[None]:
    """Frees what a file's tests compiled.

    Every program holds mappings of memory, of which Linux gives a process 65,530
    (vm.max_map_count): where none is left, XLA ends the process without a word.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def cifar_arrays() -> dict[str, np.ndarray]:
    """400 training and 200 test images of the real CIFAR-10, with labels; see fixtures/."""
    with np.load(FIXTURES / "cifar10_small.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def small_cifar(cifar_arrays) -> Dataset:
    """The fixture's images as a dataset."""
    return from_arrays(
        cifar_arrays["train_images"],
        cifar_arrays["train_labels"],
        cifar_arrays["test_images"],
        cifar_arrays["test_labels"],
        label_names=LABEL_NAMES,
    )


@pytest.fixture(scope="session", name="tiny_config")
def make_tiny_config() -> ConfigDict:
    """`tiny_config()`. Shared: a test that changes it works on a copy."""
    return tiny_config()
