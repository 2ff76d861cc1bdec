"""Closed-form evaluation of frozen features: arrays in, numbers out."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Multiples of the mean eigenvalue of the standardised features' covariance, which is 1.
RIDGE_LAMBDAS = tuple(10.0**exponent for exponent in range(-5, 2))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of rows whose largest logit [N, K] is at its label [N]; in [0, 1].

    Rows with the label -1, an image without one, do not count.
    """
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return jnp.sum(hits) / jnp.maximum(jnp.sum((labels >= 0).astype(jnp.float32)), 1.0)


class _RidgeFit(NamedTuple):
    """Standardisation [1, F], bias [1, K], and the eigenbasis in which every lambda is cheap."""

    mean: jax.Array
    scale: jax.Array
    bias: jax.Array
    eigenvalues: jax.Array
    eigenvectors: jax.Array
    rotated: jax.Array


@functools.partial(jax.jit, static_argnames="num_classes")
def _ridge_fit(features, labels, num_classes: int) -> _RidgeFit:
    weight = (labels >= 0).astype(jnp.float32)[:, None]
    count = jnp.sum(weight)
    features = features.astype(jnp.float32)
    mean = jnp.sum(weight * features, axis=0, keepdims=True) / count
    centred = weight * (features - mean)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=0, keepdims=True) / count)
    # A feature that never varies has no say; dividing by its rounding error would give it one.
    scale = jnp.where(std > 1e-6 * jnp.max(std), 1.0 / jnp.maximum(std, 1e-30), 0.0)
    targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    bias = jnp.sum(targets, axis=0, keepdims=True) / count
    with jax.default_matmul_precision("highest"):
        standardised = centred * scale
        covariance = standardised.T @ standardised / count
        eigenvalues, eigenvectors = jnp.linalg.eigh(covariance)
        rotated = eigenvectors.T @ (standardised.T @ (weight * (targets - bias))) / count
    return _RidgeFit(mean, scale, bias, eigenvalues, eigenvectors, rotated)


@jax.jit
def _ridge_accuracy(fit: _RidgeFit, features, labels, ridge_lambda) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        shrunk = fit.rotated / (jnp.maximum(fit.eigenvalues, 0.0) + ridge_lambda)[:, None]
        standardised = (features.astype(jnp.float32) - fit.mean) * fit.scale
        return accuracy(standardised @ (fit.eigenvectors @ shrunk) + fit.bias, labels)


def ridge_probe(
    train: tuple[jax.Array, jax.Array],
    val: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array] | None = None,
    *,
    num_classes: int,
    lambdas: Sequence[float] = RIDGE_LAMBDAS,
) -> dict[str, float]:
    """Linear least-squares classifier with an L2 penalty, in closed form.

    Features are standardised by the training set's mean and standard deviation; the targets are
    one-hot and centred; W = (X^T X / N + lambda I)^-1 X^T Y / N. The penalty is chosen by accuracy
    on `val`, never on `test`; of equal ones the largest wins.

    Args:
      train, val, test: (features [N, F] of any float dtype, integer labels [N]) each; a row with
        the label -1, an image without one, is left out.
      num_classes: K.
      lambdas: the penalties to try.

    Returns:
      {'lambda', 'val_acc', 'test_acc'}, accuracies in [0, 1]; no 'test_acc' without `test`.
    """
    fit = _ridge_fit(*train, num_classes)

    def score(split, ridge_lambda):
        return float(_ridge_accuracy(fit, *split, jnp.float32(ridge_lambda)))

    val_acc, best = max((score(val, candidate), candidate) for candidate in lambdas)
    result = {"lambda": float(best), "val_acc": val_acc}
    if test is not None:
        result["test_acc"] = score(test, best)
    return result
