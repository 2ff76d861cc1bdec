"""Fine-tuning, pure: a subset of the labels, the step that trains encoder and head, the loop."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.augment import to_float
from jepa_jax.models import Encoder
from jepa_jax.sgd_probe import batches, crops
from jepa_jax.train_step import probe_logits

_MOMENTUM = optax.trace(0.9, nesterov=True)


class Rates(NamedTuple):
    """Learning rates of the two groups of parameters."""

    encoder: jax.typing.ArrayLike
    head: jax.typing.ArrayLike


class Tuned(NamedTuple):
    """What fine-tuning trains.

    params: {'encoder': of the model, 'head': {'kernel' [F, K], 'bias' [K]}}.
    batch_stats: BatchNorm's running statistics.
    trace: the momentum, like params.
    """

    params: dict[str, Any]
    batch_stats: Any
    trace: Any

    @property
    def variables(self) -> dict[str, Any]:
        """Of the encoder, for `Encoder.apply`."""
        return {"params": self.params["encoder"], "batch_stats": self.batch_stats}


def balanced_subset(labels: np.ndarray, rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a share of every class, drawn at random; a smaller share's are among a larger's.

    Args:
      labels: int [N], -1 for a row without one.
      rows: int [M], those to draw from.
      share: in (0, 1]; of every class it is rounded, and one row at least.
      seed: of the draw.

    Returns:
      sorted rows with a label.
    """
    order = np.random.default_rng(seed).permutation(np.sort(rows))
    of_classes = [order[labels[order] == label] for label in np.unique(labels[rows]) if label >= 0]
    kept = [rows[: max(1, round(share * len(rows)))] for rows in of_classes]
    return np.sort(np.concatenate(kept))


def initial_tuned(variables: dict[str, Any], head: dict[str, jax.Array]) -> Tuned:
    """An encoder under a head, {'kernel' [F, K], 'bias' [K]}, both at rest."""
    params = {"encoder": variables["params"], "head": head}
    return Tuned(params, variables.get("batch_stats", {}), _MOMENTUM.init(params))


@functools.partial(jax.jit, static_argnums=0)
def finetune_step(
    encoder: Encoder,
    state: Tuned,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    rates: Rates,
) -> tuple[Tuned, jax.Array]:
    """One step of SGD with Nesterov momentum 0.9 on the mean cross-entropy, without weight decay.

    BatchNorm is in training mode: it normalises by the batch and moves its running statistics.

    Args:
      encoder: static; its normalisation is applied.
      key: of the crops and flips.
      images: uint8 [B, H, W, 3].
      labels: int32 [B] in [0, K).
      rates: of this step.

    Returns:
      (state, loss before the step).
    """
    views = encoder.normalize(crops(jax.random.split(key, len(images)), to_float(images)))

    def loss_fn(params):
        variables = {"params": params["encoder"], "batch_stats": state.batch_stats}
        (h, _), batch_stats = encoder.model.apply(variables, views, True)
        logits = probe_logits(params["head"], h.astype(jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), batch_stats

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, trace = _MOMENTUM.update(grads, state.trace)
    params = {
        group: jax.tree.map(lambda p, u, rate=rate: p - (rate * u).astype(p.dtype), old, new)
        for group, rate, old, new in (
            (name, getattr(rates, name), state.params[name], updates[name]) for name in state.params
        )
    }
    return Tuned(params, batch_stats, trace), loss


def fine_tune(
    key: jax.Array,
    encoder: Encoder,
    variables: dict[str, Any],
    head: dict[str, jax.Array],
    images: Any,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    rates: Rates,
) -> Tuned:
    """Trains an encoder and a linear head on labelled images.

    From the head of a probe of the same encoder it is arXiv 2202.10054's LP-FT: under a head that
    is not fitted yet, the first gradients distort the features.

    Both rates fall by a half cosine to 0. Every image is seen once an epoch as one random crop
    (scale 0.08 to 1, resized to the whole image's size) with a flip; an incomplete last batch of an
    epoch is dropped.

    Args:
      key: of the order and the views.
      encoder: with a BatchNorm or without.
      variables: of the encoder to start from; those of an untrained one are training from scratch.
      head: {'kernel' [F, K], 'bias' [K]} of raw features to start from.
      images: uint8 [N, H, W, 3], on the device or anything that indexes like an array.
      labels: int32 [N] in [0, K).
      batch_size: at most N is used.
      rates: at the first step.
    """
    state = initial_tuned(variables, head)
    order_key, view_key = jax.random.split(key)
    batch_size = min(batch_size, len(labels))
    endless = batches(order_key, np.arange(len(labels)), num_steps, batch_size)
    for count, batch in enumerate(itertools.islice(endless, num_steps)):
        share = 0.5 * (1.0 + np.cos(np.pi * count / num_steps))
        state, _ = finetune_step(
            encoder,
            state,
            jax.random.fold_in(view_key, count),
            jax.device_put(images[batch]),
            jax.device_put(labels[batch]),
            Rates(*(np.float32(rate * share) for rate in rates)),
        )
    return state
