"""The SGD probe on augmented views: its arithmetic, what it sees and how it chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.sgd_probe import augmented_probe

KEY = jax.random.key(0)


@jax.jit
def colours(variables, images):
    return variables * jnp.mean(images, axis=(1, 2))


def plain(count, seed):
    """Images of one colour each, which no crop and no flip changes, and labels to learn."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 255, (count, 1, 1, 3)).astype(np.uint8)
    labels = values[:, 0, 0].argmax(1).astype(np.int32)
    return np.broadcast_to(values, (count, 8, 8, 3)).copy(), labels


def probe(images, labels, val, **options):
    clean = colours(1.0, jnp.asarray(images, jnp.float32) / 255)
    options = {"num_classes": 3, "num_epochs": 3, "batch_size": 64, **options}
    return augmented_probe(
        KEY, colours, jnp.float32(1.0), images, labels, clean=clean, val=val, **options
    )


def as_val(images, labels):
    return jnp.asarray(images.mean((1, 2)) / 255, jnp.float32), jnp.asarray(labels)


def test_whole_batches_follow_nesterov_with_a_cosine():
    """Views that never differ and one batch an epoch leave nothing random: numpy does the same."""
    images, labels = plain(64, 0)
    found = probe(images, labels, as_val(images, labels), num_epochs=20, rates=(0.8,))
    h = images.mean((1, 2)) / 255
    mean, std = h.mean(0), h.std(0)
    x, y = (h - mean) / std, np.eye(3)[labels]
    kernel, bias = np.zeros((3, 3)), np.zeros(3)
    moved = [np.zeros((3, 3)), np.zeros(3)]
    for step in range(20):
        logits = x @ kernel + bias
        shares = np.exp(logits - logits.max(1, keepdims=True))
        wrong = (shares / shares.sum(1, keepdims=True) - y) / len(x)
        rate = 0.8 * 64 / 256 * 0.5 * (1 + np.cos(np.pi * step / 20))
        gradients = [x.T @ wrong, wrong.sum(0)]
        moved = [0.9 * m + g for m, g in zip(moved, gradients, strict=True)]
        kernel = kernel - rate * (0.9 * moved[0] + gradients[0])
        bias = bias - rate * (0.9 * moved[1] + gradients[1])
    np.testing.assert_allclose(found["kernel"], kernel / std[:, None], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["bias"], bias - (mean / std) @ kernel, rtol=1e-3, atol=1e-3)


def test_the_rate_is_chosen_on_val():
    images, labels = plain(256, 1)
    val = as_val(*plain(128, 2))
    found = probe(images, labels, val, rates=(1e-6, 0.1))
    alone = {rate: probe(images, labels, val, rates=(rate,))["val_acc"] for rate in (1e-6, 0.1)}
    assert found["lr"] == max(alone, key=alone.get)
    assert found["val_acc"] == pytest.approx(max(alone.values())) and found["val_acc"] > 0.8


def test_images_without_a_label_are_never_seen():
    images, labels = plain(256, 3)
    hidden = np.where(np.arange(256) % 2, labels, -1).astype(np.int32)
    noise = images.copy()
    noise[::2] = 0
    val = as_val(*plain(64, 4))
    clean = jnp.zeros((1, 3)) + jnp.array([[0.1, 0.5, 0.9], [0.3, 0.2, 0.1]])
    first, second = (
        augmented_probe(
            KEY,
            colours,
            jnp.float32(1.0),
            x,
            hidden,
            clean=clean,
            val=val,
            num_classes=3,
            num_epochs=1,
            batch_size=64,
        )
        for x in (images, noise)
    )
    np.testing.assert_array_equal(first["kernel"], second["kernel"])


def test_views_are_crops_and_flips_of_the_images_colours():
    """Left half black, right half white: crops differ in brightness, none leaves the grey line."""
    seen = []

    def spy(variables, images):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), images)
        return colours(variables, images)

    images = np.zeros((64, 8, 8, 3), np.uint8)
    images[:, :, 4:] = 255
    labels = np.zeros(64, np.int32)
    clean = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    augmented_probe(
        KEY,
        spy,
        jnp.float32(1.0),
        images,
        labels,
        clean=clean,
        val=(clean, jnp.array([0, 0])),
        num_classes=2,
        num_epochs=1,
        batch_size=64,
    )
    jax.effects_barrier()
    views = np.concatenate(seen)
    assert views.shape == (64, 8, 8, 3)
    np.testing.assert_allclose(views[..., 0], views[..., 2], atol=1e-6)
    rises = views[:, 4, 7, 0] - views[:, 4, 0, 0]
    assert (rises > 0.5).any() and (rises < -0.5).any()
    assert np.std(views.mean((1, 2, 3))) > 0.05
