"""Features on a common scale, and the directions in which they vary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Standardised(NamedTuple):
    """Features of zero mean and unit variance, and the eigenbasis of their covariance.

    Attributes:
      mean, scale: of the raw features, [F] each; a scale of 0 where a feature never varies.
      columns: the standardised features, one image a column, [F, N]; an image without a label is
        a column of zeros.
      count: the images that have a label, a scalar.
      eigenvalues: of columns @ columns.T / count, [R] with R = min(F, N), none negative.
      eigenvectors: [F, R]; any others have the eigenvalue 0.
    """

    mean: jax.Array
    scale: jax.Array
    columns: jax.Array
    count: jax.Array  # type: ignore[assignment]  # over tuple.count
    eigenvalues: jax.Array
    eigenvectors: jax.Array


@jax.jit
def standardise(features: jax.Array, labels: jax.Array) -> Standardised:
    """Standardises features [N, F] by the mean and standard deviation of those with a label.

    Raises:
      ValueError: if the features are not [N, F] with a label each.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features [N, F] and labels [N] do not fit: {features.shape} and {labels.shape}"
        )
    weight = (labels >= 0).astype(jnp.float32)[:, None]
    count = jnp.maximum(jnp.sum(weight), 1.0)
    features = features.astype(jnp.float32)
    # Off the first row before the mean is: of a constant feature nothing at all remains.
    first = features[:1]
    mean = first + jnp.sum(weight * (features - first), axis=0, keepdims=True) / count
    centred = weight * (features - mean)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=0, keepdims=True) / count)
    # A feature that never varies has no say; dividing by its rounding error would give it one.
    scale = jnp.where(std > 1e-6 * jnp.max(std), 1.0 / jnp.maximum(std, 1e-30), 0.0)
    # A product with few columns reads a matrix along its rows: W^T X and X R^T both do here.
    columns = (centred * scale).T
    with jax.default_matmul_precision("highest"):
        if features.shape[0] < features.shape[1]:
            eigenvectors, singular, _ = jnp.linalg.svd(columns, full_matrices=False)
            eigenvalues = jnp.square(singular) / count
        else:
            eigenvalues, eigenvectors = jnp.linalg.eigh(columns @ columns.T / count)
    return Standardised(
        mean[0], scale[0], columns, count, jnp.maximum(eigenvalues, 0.0), eigenvectors
    )


@jax.jit
def raw_units(fit: Standardised, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(kernel [F, K], bias [K]) for raw features, of those for standardised ones."""
    with jax.default_matmul_precision("highest"):
        kernel = kernel * fit.scale[:, None]
        return kernel, bias - fit.mean @ kernel


@jax.jit
def standardised_logits(
    fit: Standardised, kernel: jax.Array, bias: jax.Array, features: jax.Array
) -> jax.Array:
    """Logits [N, K] of raw features [N, F] under a classifier of standardised ones."""
    with jax.default_matmul_precision("highest"):
        centred = features.astype(jnp.float32) - fit.mean[None]
        return (centred * fit.scale[None]) @ kernel + bias[None]
