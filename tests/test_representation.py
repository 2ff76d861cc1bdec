"""Features, re-estimated BatchNorm statistics and the held-out split."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import representation
from jepa_jax.data import from_arrays
from jepa_jax.models import Encoder, ImageJEPA, ModelFns, ResNet, linen_model
from jepa_jax.representation import (
    extract_features,
    reestimate_batch_stats,
    split_validation,
)


@pytest.fixture(scope="module")
def images(cifar_arrays):
    return np.ascontiguousarray(cifar_arrays["train_images"][:250, 12:20, 12:20])


@pytest.fixture(scope="module")
def model():
    return linen_model(ImageJEPA(ResNet(stage_sizes=(1,), width=4)))


@pytest.fixture(scope="module")
def variables(model):
    """Random values; a compiled init takes seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return jax.tree.map(lambda v: jnp.float32(0.1 + 0.3 * np.abs(rng.normal(size=v.shape))), shapes)


@jax.jit
def mean_colour(variables, images):
    return variables["scale"] * jnp.mean(images.astype(jnp.float32), axis=(1, 2))


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250])
def test_features_of_any_number_of_images_are_those_of_each(count, images, monkeypatch):
    """In chunks of 100, the last one filled up and cut."""
    monkeypatch.setattr(representation, "CHUNK", 100)
    found = extract_features(mean_colour, {"scale": jnp.float32(0.5)}, images[:count])
    assert found.shape == (count, 3)
    np.testing.assert_allclose(found, 0.5 * images[:count].mean((1, 2)), rtol=1e-4)


def test_chunks_have_one_shape_and_so_one_compilation(images, monkeypatch):
    monkeypatch.setattr(representation, "CHUNK", 100)
    shapes = []

    def apply(variables, chunk):
        assert isinstance(chunk, jax.Array)
        shapes.append(chunk.shape)
        return mean_colour(variables, chunk)

    extract_features(apply, {"scale": jnp.float32(1.0)}, images)
    assert shapes == [(100, 8, 8, 3)] * 3


def test_statistics_are_the_moments_of_the_images_at_the_first_norm(
    model, variables, images, monkeypatch
):
    """Averages over whole chunks; a last incomplete one is left out."""
    monkeypatch.setattr(representation, "CHUNK", 100)
    encoder = Encoder(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    found = reestimate_batch_stats(encoder, variables, images)
    kernel = np.asarray(variables["params"]["encoder"]["stem_conv"]["kernel"], np.float64)
    normalised = (images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    padded = np.pad(normalised, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    maps = np.einsum("bpqchw,hwcf->bpqf", windows, kernel)
    chunks = [maps[:100], maps[100:200]]
    stem = found["batch_stats"]["encoder"]["stem_norm"]
    mean = np.mean([chunk.mean((0, 1, 2)) for chunk in chunks], axis=0)
    var = np.mean([chunk.var((0, 1, 2)) for chunk in chunks], axis=0)
    np.testing.assert_allclose(stem["mean"], mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stem["var"], var, rtol=1e-3)
    assert found["params"] is variables["params"]


def test_statistics_do_not_depend_on_the_running_ones_and_make_evaluation_equal_training(
    model, variables, images
):
    """With one chunk, evaluation by the new statistics is what the training mode computes."""
    encoder, images = Encoder(model), images[:100]
    once = reestimate_batch_stats(encoder, variables, images)
    again = reestimate_batch_stats(encoder, once, images)
    assert jax.tree.structure(once) == jax.tree.structure(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, once)
    train = jax.jit(lambda v, x: model.apply(v, encoder.normalize(x), True)[0][0])
    np.testing.assert_allclose(
        encoder.apply(once, images), train(variables, images), rtol=1e-3, atol=1e-4
    )


def test_any_momentum_gives_the_moments(images):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.37)
            return (norm(jnp.mean(x, axis=(1, 2))), None)

    model = linen_model(Norm())
    encoder = Encoder(model, mean=(0.0,) * 3, std=(1.0,) * 3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    stats = reestimate_batch_stats(encoder, variables, images)["batch_stats"]["BatchNorm_0"]
    colours = images.mean((1, 2)) / 255
    np.testing.assert_allclose(stats["mean"], colours.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], colours.var(0), rtol=1e-3)


def test_a_model_without_statistics_is_left_alone(images):
    encoder = Encoder(ModelFns(lambda key, x: {}, lambda v, x, train: ((x, x), {})))
    for variables in ({"params": {}}, {"params": {}, "batch_stats": {}}):
        assert reestimate_batch_stats(encoder, variables, images) is variables


def test_validation_is_drawn_from_everywhere_and_is_disjoint_from_the_rest():
    dataset = from_arrays(np.zeros((120, 1, 1, 3), np.uint8))
    train, val = split_validation(dataset, 30)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(120))
    assert len(val) == 30
    # A dataset may be sorted by class: no third of it may be left out.
    assert all(np.any((val >= start) & (val < start + 40)) for start in (0, 40, 80))
    np.testing.assert_array_equal(val, split_validation(dataset, 30)[1])
