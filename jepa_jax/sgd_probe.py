"""The literature's linear probe: stochastic gradient descent on augmented views."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.augment import random_view, to_float
from jepa_jax.probes import accuracy

# Per 256 images, of heads on standardised features; the best by validation accuracy is taken.
SGD_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class _Heads(NamedTuple):
    """Linear classifiers, one a rate: kernel [R, F, K], bias [R, K]."""

    kernel: jax.Array
    bias: jax.Array


def augmented_probe(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    images: Any,
    labels: np.ndarray,
    *,
    clean: jax.Array,
    val: tuple[jax.Array, jax.Array],
    num_classes: int,
    num_epochs: int,
    batch_size: int = 256,
    rates: Sequence[float] = SGD_RATES,
) -> dict[str, Any]:
    """A linear classifier by SGD on random crops and flips, as self-supervised papers report it.

    Every image is seen once an epoch as one random crop (scale 0.08 to 1) with a flip. Nesterov
    momentum 0.9, no weight decay, the rate falling by a half cosine to 0 (arXiv 2006.07733,
    appendix C; 2006.09882, appendix A.6). One head a rate is trained on the same views; the one
    with the best accuracy on `val` is taken, of equal ones that of the smallest rate.

    Args:
      key: of the order and the views.
      apply: (variables, images float [B, H, W, 3] in [0, 1]) -> h [B, F].
      variables: of the encoder.
      images: uint8 [N, H, W, 3], an array or anything that indexes like one.
      labels: int32 [N]; a row with -1 is left out.
      clean: h [M, F] of training images without augmentation, for the standardisation.
      val: (features [V, F], labels [V]) to choose on.
      num_classes: K.
      num_epochs: passes over the labelled images; an incomplete last batch is dropped.
      batch_size: B; at most the number of labelled images is used.
      rates: the rates to try, per 256 images.

    Returns:
      {'lr', 'val_acc', 'kernel' [F, K], 'bias' [K]}, the standardisation folded in.
    """
    mean, std = jnp.mean(clean, axis=0), jnp.std(clean, axis=0)
    scale = jnp.where(std > 1e-6 * jnp.max(std), 1.0 / jnp.maximum(std, 1e-30), 0.0)
    rows = np.flatnonzero(labels >= 0)
    batch_size = min(batch_size, len(rows))
    num_steps = num_epochs * (len(rows) // batch_size)
    peaks = jnp.asarray(rates, jnp.float32) * (batch_size / 256)
    momentum = optax.trace(0.9, nesterov=True)

    @jax.jit
    def step(heads, trace, variables, key, count, images, labels):
        h = apply(variables, crops(jax.random.split(key, len(images)), to_float(images)))
        h = (h - mean[None, :]) * scale[None, :]
        updates, trace = momentum.update(jax.grad(_loss)(heads, h, labels), trace)
        rates = -peaks * 0.5 * (1.0 + jnp.cos(jnp.pi * count / num_steps))
        updates = _Heads(updates.kernel * rates[:, None, None], updates.bias * rates[:, None])
        return optax.apply_updates(heads, updates), trace

    shape = (len(peaks), clean.shape[1], num_classes)
    heads = _Heads(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[::2], jnp.float32))
    trace = momentum.init(heads)
    order_key, view_key = jax.random.split(key)
    for count, batch in enumerate(batches(order_key, rows, num_epochs, batch_size)):
        heads, trace = step(
            heads,
            trace,
            variables,
            jax.random.fold_in(view_key, count),
            jnp.float32(count),
            jax.device_put(images[batch]),
            jax.device_put(labels[batch]),
        )
    kernels = heads.kernel * scale[None, :, None]
    biases = heads.bias - jnp.einsum("f,rfk->rk", mean, kernels, precision="highest")
    folded = list(zip(kernels, biases, strict=True))
    with jax.default_matmul_precision("highest"):
        accs = [float(accuracy(val[0] @ kernel + bias[None, :], val[1])) for kernel, bias in folded]
    best = int(np.argmax(accs))
    kernel, bias = folded[best]
    return {"lr": float(rates[best]), "val_acc": accs[best], "kernel": kernel, "bias": bias}


def batches(
    key: jax.Array, rows: np.ndarray, num_epochs: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Rows [B] of every batch, in another order every epoch; an incomplete last one is dropped."""
    for epoch in range(num_epochs):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def crops(keys: jax.Array, images: jax.Array) -> jax.Array:
    """A random crop (scale 0.08 to 1) with a flip of every image [B, H, W, 3] in [0, 1]."""

    def crop(key, image):
        return random_view(
            key, image, scale=(0.08, 1.0), jitter_prob=0.0, grayscale_prob=0.0, solarize_prob=0.0
        )

    return jax.vmap(crop)(keys, images)


def _loss(heads: _Heads, h: jax.Array, labels: jax.Array) -> jax.Array:
    """The sum over the heads of each one's mean cross-entropy."""
    logits = jnp.einsum("bf,rfk->rbk", h, heads.kernel, precision="highest")
    logits = logits + heads.bias[:, None, :]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None, :])
    return jnp.sum(jnp.mean(losses, axis=1))
