"""Whitened random patches: against the same written out patch by patch, and what they ignore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import random_patches as module
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.random_patches import PatchFilters, random_patches
from jepa_jax.representation import extract_features

SIDE = 4


def some_images(count=5, side=11, seed=0):
    return np.random.default_rng(seed).random((count, side, side, 3), np.float32)


@pytest.fixture(scope="module")
def encoder():
    images = (255 * some_images(40, side=11, seed=1)).astype(np.uint8)
    return random_patches(jax.random.key(0), images, num_filters=6, patch_size=SIDE)


def normalised(patches):
    centred = patches - patches.mean(axis=1, keepdims=True)
    return centred / np.sqrt(patches.var(axis=1, keepdims=True) + module._CONTRAST_EPS)


def test_features_equal_those_written_out_patch_by_patch():
    rng = np.random.default_rng(2)
    patches = rng.random((300, SIDE * SIDE * 3))
    chosen = np.array([3, 50, 299])
    kernel, offset = module._filters(jnp.asarray(patches, jnp.float32), jnp.asarray(chosen))
    variables = PatchFilters(kernel.reshape(SIDE, SIDE, 3, 3), offset)
    images = some_images()
    found = module._apply(variables, jnp.asarray(images))

    whitened = normalised(patches)
    mean = whitened.mean(axis=0)
    covariance = np.cov(whitened.T, bias=True)
    values, vectors = np.linalg.eigh(covariance + module._ZCA_EPS * np.eye(len(mean)))
    zca = vectors @ np.diag(values**-0.5) @ vectors.T
    filters = (whitened[chosen] - mean) @ zca
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    count = images.shape[1] - SIDE + 1
    expected = np.zeros((len(images), 2, 2, 2, 3))
    half = -(-count // 2)
    for number, image in enumerate(images.astype(np.float64)):
        for row in range(count):
            for column in range(count):
                patch = image[row : row + SIDE, column : column + SIDE].reshape(1, -1)
                response = ((normalised(patch) - mean) @ zca @ filters.T)[0]
                place = (number, int(row >= half), int(column >= half))
                size = np.prod([half if at == 0 else count - half for at in place[1:]])
                for sign in (0, 1):
                    signed = (1, -1)[sign] * response - module._THRESHOLD
                    expected[(*place, sign)] += np.maximum(signed, 0) / size
    np.testing.assert_allclose(found, expected.reshape(len(images), -1), atol=2e-5)
    assert np.max(expected) > 0.01


def test_bytes_and_floats_give_the_same_features_none_negative(encoder):
    apply, variables = encoder
    images = (255 * some_images()).astype(np.uint8)
    h = extract_features(apply, variables, images)
    assert h.shape == (5, 8 * 6) and h.dtype == jnp.float32
    assert np.min(h) >= 0
    np.testing.assert_allclose(h, apply(variables, images.astype(np.float32) / 255), atol=1e-6)


def test_brightness_does_not_count_and_contrast_hardly(encoder):
    apply, variables = encoder
    images = 0.25 + 0.5 * some_images()
    h = apply(variables, images)
    np.testing.assert_allclose(apply(variables, images + 0.2), h, atol=1e-4)
    np.testing.assert_allclose(apply(variables, 0.5 + 0.5 * (images - 0.5)), h, atol=2e-2)
    assert np.max(np.abs(apply(variables, images[:, ::-1]) - h)) > 0.05


def test_a_quadrant_sees_its_own_patches_alone(encoder):
    apply, variables = encoder
    images = some_images(1)
    other = images.copy()
    other[:, :2, :2] = 1 - other[:, :2, :2]
    changed = np.abs(apply(variables, images) - apply(variables, other)).reshape(4, 12).max(axis=1)
    assert changed[0] > 0 and np.all(changed[1:] < 1e-6)


def test_filters_are_a_function_of_the_key():
    images = (255 * some_images(40)).astype(np.uint8)

    def kernel(seed):
        return random_patches(jax.random.key(seed), images, num_filters=4)[1].kernel

    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert np.max(np.abs(kernel(0) - kernel(1))) > 0.1
    np.testing.assert_allclose(np.sum(kernel(0), axis=(0, 1, 2)), 0, atol=1e-4)


def test_larger_images_are_averaged_down(encoder):
    apply, variables = encoder
    images = some_images(2, side=32)
    larger = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    small = module._at_most_small(jnp.asarray(larger))
    assert small.shape == images.shape
    np.testing.assert_allclose(
        apply(variables, larger), apply(variables, np.asarray(small)), atol=1e-5
    )


def test_it_is_judged_like_any_encoder(small_cifar):
    apply, variables = random_patches(jax.random.key(0), small_cifar.train_images, num_filters=16)
    result = evaluate_representation(apply, variables, small_cifar, num_val=80, parts=("ridge",))
    scores = result["probes"]["ridge"]
    assert result["feature_dim"] == 128
    assert scores["encoder"]["test"]["acc"] > scores["chance"]["test"]["acc"] + 0.1


@pytest.mark.parametrize(("side", "num_filters"), [(6, 4), (11, 0)])
def test_what_cannot_be_made_is_refused(side, num_filters):
    images = np.zeros((3, side, side, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one filter"):
        random_patches(jax.random.key(0), images, num_filters=num_filters)
