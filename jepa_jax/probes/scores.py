"""Scores of predicted classes, and how sure a score is."""

import functools
import math

import jax
import jax.numpy as jnp


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of rows whose largest logit [N, K] is at its label [N]; in [0, 1].

    Rows with the label -1, an image without one, do not count.
    """
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return jnp.sum(hits) / jnp.maximum(jnp.sum((labels >= 0).astype(jnp.float32)), 1.0)


@functools.partial(jax.jit, static_argnames="num_classes")
def confusion_matrix(predicted: jax.Array, labels: jax.Array, *, num_classes: int) -> jax.Array:
    """How often each class was taken for each: int32 [K, K], rows true, columns predicted.

    Args:
      predicted: class of every row, integers [N] in [0, K).
      labels: true class of every row, integers [N]; rows with the label -1 do not count.
      num_classes: K.

    Raises:
      ValueError: if the two are not of one length.
    """
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            f"predicted and labels must share one shape [N], got {predicted.shape}, {labels.shape}"
        )
    counts = jnp.zeros((num_classes, num_classes), jnp.int32)
    return counts.at[labels, predicted].add((labels >= 0).astype(jnp.int32))


def wilson_interval(hits: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share of `hits` in `count` independent trials (Wilson 1927), 95 % at z = 1.96.

    The normal approximation p +- z sqrt(p (1 - p) / n) has no width at p = 0 and p = 1, leaves
    [0, 1] near them and covers too seldom in between when n is small, as in one class of a small
    test set. This one is the set of shares that a test at level z would not reject.

    Returns:
      (low, high) in [0, 1]; (0, 1) of no trials at all.
    """
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    # Rounding alone would put the end at 0 or 1 just outside.
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(low, share)), min(1.0, max(high, share))
