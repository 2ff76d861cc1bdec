"""Closed-form evaluation of frozen features: arrays in, numbers out."""

from collections.abc import Sequence

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


@jax.jit
def _ridge_fit(features, targets):
    """Eigenvalues [F], eigenvectors [F, F] and rotated X^T Y / N [F, K]."""
    with jax.default_matmul_precision("highest"):
        covariance = features.T @ features / features.shape[0]
        eigenvalues, eigenvectors = jnp.linalg.eigh(covariance)
        return eigenvalues, eigenvectors, eigenvectors.T @ (features.T @ targets) / len(features)


@jax.jit
def _ridge_logits(features, fit, ridge_lambda, bias):
    eigenvalues, eigenvectors, rotated = fit
    with jax.default_matmul_precision("highest"):
        scaled = rotated / (jnp.maximum(eigenvalues, 0.0) + ridge_lambda)[:, None]
        return features @ (eigenvectors @ scaled) + bias


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
    is_labelled = train[1] >= 0
    features, labels = train[0][is_labelled].astype(jnp.float32), train[1][is_labelled]
    mean = jnp.mean(features, axis=0, keepdims=True)
    std = jnp.std(features, axis=0, keepdims=True)
    # A feature that never varies has no say; dividing by its rounding error would give it one.
    scale = jnp.where(std > 1e-6 * jnp.max(std), 1.0 / jnp.maximum(std, 1e-30), 0.0)

    def standardise(x):
        return (x.astype(jnp.float32) - mean) * scale

    targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    bias = jnp.mean(targets, axis=0, keepdims=True)
    fit = _ridge_fit(standardise(features), targets - bias)

    def score(split, ridge_lambda):
        logits = _ridge_logits(standardise(split[0]), fit, jnp.float32(ridge_lambda), bias)
        return float(accuracy(logits, split[1]))

    val_acc, best = max((score(val, candidate), candidate) for candidate in lambdas)
    result = {"lambda": float(best), "val_acc": val_acc}
    if test is not None:
        result["test_acc"] = score(test, best)
    return result
