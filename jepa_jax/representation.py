"""From an encoder and images to features, on held-out images or not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.data import Dataset
from jepa_jax.models import Encoder, ModelFns

CHUNK = 500
_MANY_UPDATES = 2**24


def extract_features(
    apply: Callable[[Any, jax.Array], jax.Array], variables: Any, images: Any
) -> jax.Array:
    """Representations of many images, in chunks of one compiled size.

    Args:
      apply: (variables, images [B, H, W, C]) -> h [B, F].
      variables: passed through.
      images: anything of length N that slices to uint8 arrays [n, H, W, C].

    Returns:
      h [N, F] on the device.
    """
    chunks = []
    for start in range(0, len(images), CHUNK):
        chunk = np.asarray(images[start : start + CHUNK])
        count = len(chunk)
        if start and count < CHUNK:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], CHUNK - count, axis=0)])
        chunks.append(apply(variables, jax.device_put(chunk))[:count])
    return jnp.concatenate(chunks)


@functools.partial(jax.jit, static_argnums=0)
def _batch_moments(model: ModelFns, variables, images):
    stats = variables["batch_stats"]

    def filled_with(leaf, fill):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full_like(leaf, fill)
        # A counter of updates, by which some frameworks correct young averages: an old one.
        return leaf if leaf.dtype == jnp.bool_ else jnp.full_like(leaf, _MANY_UPDATES)

    def updated(fill):
        filled = jax.tree.map(lambda leaf: filled_with(leaf, fill), stats)
        return model.apply({**variables, "batch_stats": filled}, images, True)[1]

    # A running average is linear in its old value, r -> decay * r + (1 - decay) * batch; two old
    # values give both unknowns. The forward pass does not read r, so XLA runs it once.
    from_zero, from_one = updated(0.0), updated(1.0)

    def of_batch(zero, one):
        is_average = jnp.issubdtype(zero.dtype, jnp.floating)
        return zero / (1.0 - (one - zero)) if is_average else zero

    return jax.tree.map(of_batch, from_zero, from_one)


def reestimate_batch_stats(encoder: Encoder, variables: Any, images: Any) -> Any:
    """BatchNorm statistics of clean images in place of the running ones of augmented views.

    The running statistics follow augmented views of the last few steps (and are the initial 0 and
    1 in a network that was never trained): evaluation on clean images reads features through
    statistics of the same images, the trained and the untrained network alike.

    Args:
      encoder: the model and its normalisation.
      variables: {'params', 'batch_stats'}.
      images: uint8 [N, H, W, C]; moments are averaged over chunks of 500.

    Returns:
      variables with new 'batch_stats'.
    """
    if not jax.tree.leaves(variables.get("batch_stats", {})):
        return variables
    chunks = [
        _batch_moments(encoder.model, variables, encoder.normalize(jax.device_put(images[i:j])))
        for i, j in _full_chunks(len(images))
    ]

    def mean_of(*moments):
        is_average = jnp.issubdtype(moments[0].dtype, jnp.floating)
        return sum(moments) / len(moments) if is_average else moments[0]

    mean = jax.tree.map(mean_of, *chunks)
    return {**variables, "batch_stats": mean}


def _full_chunks(count: int) -> list[tuple[int, int]]:
    size = min(count, CHUNK)
    return [(start, start + size) for start in range(0, count - size + 1, size)]


def labelled(dataset: Dataset) -> np.ndarray:
    """Which training images have a label, bool [N]."""
    if dataset.train_labels is None:
        return np.zeros(len(dataset.train_images), bool)
    return np.asarray(dataset.train_labels) >= 0


def split_validation(dataset: Dataset, num_val: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): sorted indices; `num_val` training images are held out from every probe.

    Drawn at random, because a dataset may be sorted by class, and the same ones in every run; of
    the labelled images, as long as there are any.
    """
    order = np.random.default_rng(0).permutation(len(dataset.train_images))
    is_labelled = labelled(dataset)[order]
    order = np.concatenate([order[is_labelled], order[~is_labelled]])
    return np.sort(order[num_val:]), np.sort(order[:num_val])
