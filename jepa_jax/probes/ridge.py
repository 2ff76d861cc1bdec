"""Linear least-squares classifier in closed form."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.probes.scores import accuracy
from jepa_jax.probes.standardise import Standardised, raw_units, standardise, standardised_logits

# Multiples of the mean eigenvalue of the standardised features' covariance, which is 1.
RIDGE_LAMBDAS = tuple(10.0**exponent for exponent in range(-5, 2))


@functools.partial(jax.jit, static_argnames="num_classes")
def _targets(fit: Standardised, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """(X^T Y / N in the eigenbasis [R, K], the bias [K]): what every lambda shares."""
    targets = jax.nn.one_hot(labels, num_classes, axis=0, dtype=jnp.float32)
    bias = jnp.sum(targets, axis=1) / fit.count
    with jax.default_matmul_precision("highest"):
        # Columns without a label are zeros, so that their target, 0 - bias, does not count.
        product = fit.columns @ (targets - bias[:, None]).T / fit.count
        return fit.eigenvectors.T @ product, bias


@jax.jit
def _shrunk(fit: Standardised, rotated: jax.Array, ridge_lambda: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return fit.eigenvectors @ (rotated / (fit.eigenvalues + ridge_lambda)[:, None])


def ridge_probe(
    train: tuple[jax.Array, jax.Array],
    val: tuple[jax.Array, jax.Array],
    test: tuple[jax.Array, jax.Array] | None = None,
    *,
    num_classes: int,
    lambdas: Sequence[float] = RIDGE_LAMBDAS,
) -> dict[str, Any]:
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
      {'lambda', 'val_acc', 'test_acc', 'kernel' [F, K], 'bias' [K]}, accuracies in [0, 1]; no
      'test_acc' without `test`. The logits of raw features are features @ kernel + bias.

    Raises:
      ValueError: if the features of `train` are not [N, F] with a label each.
    """
    fit = standardise(*train)
    rotated, bias = _targets(fit, train[1], num_classes)

    def score(split: tuple[jax.Array, jax.Array], ridge_lambda: float) -> float:
        kernel = _shrunk(fit, rotated, jnp.float32(ridge_lambda))
        return float(accuracy(standardised_logits(fit, kernel, bias, split[0]), split[1]))

    val_acc, best = max((score(val, candidate), candidate) for candidate in lambdas)
    result: dict[str, Any] = {"lambda": float(best), "val_acc": val_acc}
    if test is not None:
        result["test_acc"] = score(test, best)
    kernel, bias = raw_units(fit, _shrunk(fit, rotated, jnp.float32(best)), bias)
    return {**result, "kernel": kernel, "bias": bias}
