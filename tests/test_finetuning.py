"""Fine-tuning's arithmetic: the subsets, the step against one by hand, and what it can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from jepa_jax.finetuning import (
    Rates,
    balanced_subset,
    fine_tune,
    finetune_step,
    initial_tuned,
)
from jepa_jax.models import Encoder, ModelFns
from jepa_jax.train_step import probe_logits

KEY = jax.random.key(0)


def _apply(variables, images, train):
    """A linear encoder of the mean colour; its 'statistics' count the training batches."""
    h = jnp.mean(images, axis=(1, 2)) @ variables["params"]
    return (h, h), variables["batch_stats"] + jnp.float32(train)


LINEAR = Encoder(ModelFns(lambda key, images: {}, _apply), mean=(0.5,) * 3, std=(0.25,) * 3)


def variables_of(seed):
    weights = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
    return {"params": jnp.asarray(weights), "batch_stats": jnp.float32(0)}


def head_of(seed, features=4, classes=3):
    kernel = np.random.default_rng(seed).normal(size=(features, classes)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.arange(classes, dtype=jnp.float32)}


def plain(count, seed):
    """Images of one colour each, which no crop and no flip changes, and labels to learn."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 255, (count, 1, 1, 3)).astype(np.uint8)
    labels = values[:, 0, 0].argmax(1).astype(np.int32)
    return np.broadcast_to(values, (count, 8, 8, 3)).copy(), labels


def test_subsets_are_balanced_nested_and_of_their_seed():
    labels = np.repeat(np.arange(4), (100, 100, 100, 3)).astype(np.int32)
    labels[:10] = -1
    rows = np.arange(0, 303)
    subsets = [balanced_subset(labels, rows, share, 0) for share in (0.01, 0.1, 1.0)]
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert set(small) < set(large)
    assert np.bincount(labels[subsets[0]]).tolist() == [1, 1, 1, 1]
    assert np.bincount(labels[subsets[1]]).tolist() == [9, 10, 10, 1]
    np.testing.assert_array_equal(subsets[2], np.flatnonzero(labels >= 0))
    again, other = (balanced_subset(labels, rows[::-1], 0.1, seed) for seed in (0, 1))
    np.testing.assert_array_equal(subsets[1], again)
    assert set(other) != set(again)
    held = balanced_subset(labels, rows[:200], 0.5, 0)
    assert held.max() < 200


def test_steps_are_those_of_nesterovs_sgd_with_two_rates():
    """Written by hand in float64: buf = 0.9 buf + g; p = p - rate (g + 0.9 buf), PyTorch's form."""
    images, labels = plain(32, 0)
    rates, start, head = Rates(np.float32(0.05), np.float32(0.5)), variables_of(0), head_of(1)
    state = initial_tuned(start, head)
    x = (images.mean((1, 2)) / 255 - 0.5) / 0.25
    encoder, kernel, bias = (
        np.array(array, np.float64) for array in (start["params"], head["kernel"], head["bias"])
    )
    buffers = [np.zeros_like(p) for p in (encoder, kernel, bias)]
    for _ in range(4):
        state, loss = finetune_step(LINEAR, state, KEY, jnp.asarray(images), labels, rates)
        likely = scipy.special.softmax(x @ encoder @ kernel + bias, axis=1)
        expected = -np.mean(np.log(likely[np.arange(32), labels]))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        error = (likely - np.eye(3)[labels]) / 32
        gradients = (x.T @ error @ kernel.T, encoder.T @ x.T @ error, error.sum(0))
        for p, buf, g, rate in zip(
            (encoder, kernel, bias), buffers, gradients, (0.05, 0.5, 0.5), strict=True
        ):
            buf[:] = 0.9 * buf + g
            p -= rate * (g + 0.9 * buf)
    for mine, by_hand in (
        (state.params["encoder"], encoder),
        (state.params["head"]["kernel"], kernel),
        (state.params["head"]["bias"], bias),
    ):
        np.testing.assert_allclose(mine, by_hand, rtol=1e-3, atol=1e-4)
    assert float(state.batch_stats) == 4


def test_before_its_first_step_it_is_the_probe():
    """With no step, and in the loss of the first one, the logits are those of frozen features."""
    images, labels = plain(32, 2)
    start, head = variables_of(3), head_of(4)
    logits = probe_logits(head, LINEAR.apply(start, images))
    tuned = fine_tune(
        KEY,
        LINEAR,
        start,
        head,
        images,
        labels,
        num_steps=0,
        batch_size=8,
        rates=Rates(0.1, 0.1),
    )
    np.testing.assert_array_equal(
        probe_logits(tuned.params["head"], LINEAR.apply(tuned.variables, images)), logits
    )
    _, loss = finetune_step(LINEAR, tuned, KEY, images, labels, Rates(0.1, 0.1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(loss, jnp.mean(losses), rtol=1e-4)


def test_a_separable_problem_is_learnt_and_the_key_alone_decides():
    images = np.zeros((60, 8, 8, 3), np.uint8)
    labels = (np.arange(60) % 3).astype(np.int32)
    images[np.arange(60), :, :, labels] = 255
    options = {"num_steps": 40, "batch_size": 20, "rates": Rates(0.05, 0.5)}
    start, head = variables_of(1), head_of(1)
    first, second = (
        fine_tune(KEY, LINEAR, start, head, images, labels, **options)
        for images in (images, jnp.asarray(images))
    )
    logits = probe_logits(first.params["head"], LINEAR.apply(first.variables, images))
    np.testing.assert_array_equal(np.argmax(logits, axis=1), labels)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    options["rates"] = Rates(0.0, 0.5)
    frozen = fine_tune(KEY, LINEAR, start, head, images, labels, **options)
    np.testing.assert_array_equal(frozen.params["encoder"], start["params"])
