"""Optimisers as optax gradient transformations, and the learning-rate schedule.

Every number (rate, weight decay, ...) may be a traced array: the chain is then built inside the
jitted step, and changing the number does not recompile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("lars", "sgd", "adamw", "muon")


def _number(value: jax.typing.ArrayLike) -> Any:
    """The value as it is; to a type checker an ArrayLike may be a boolean, which has no minus."""
    return value


def warmup_cosine(
    step: jax.typing.ArrayLike,
    *,
    peak: jax.typing.ArrayLike,
    num_steps: jax.typing.ArrayLike,
    warmup_steps: jax.typing.ArrayLike = 0,
    start: jax.typing.ArrayLike = 0.0,
    end: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    """Linear warm-up from `start` to `peak`, then a half cosine to `end`; one value per step.

    With W = warmup_steps and T = num_steps: start + (peak - start) * s / W for s < W, then
    end + (peak - end) * (1 + cos(pi * (s - W) / (T - W))) / 2, and `end` from T on. W = T is legal
    (the rate never leaves the warm-up), unlike in optax.warmup_cosine_decay_schedule, and all
    arguments may be traced.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup_steps = jnp.asarray(warmup_steps, jnp.float32)
    num_steps = jnp.asarray(num_steps, jnp.float32)
    rise = start + (_number(peak) - start) * step / jnp.maximum(warmup_steps, 1.0)
    progress = (step - warmup_steps) / jnp.maximum(num_steps - warmup_steps, 1.0)
    progress = jnp.where(step < num_steps, jnp.maximum(progress, 0.0), 1.0)
    fall = end + (_number(peak) - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup_steps, rise, fall)


def late_epoch_warmup_cosine(
    step: jax.typing.ArrayLike,
    *,
    peak: jax.typing.ArrayLike,
    num_steps: jax.typing.ArrayLike,
    epoch_steps: jax.typing.ArrayLike,
    warmup_steps: jax.typing.ArrayLike = 0,
    start: jax.typing.ArrayLike = 0.0,
    end: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    """The reference's schedule, off by one: it moves once an epoch, when the epoch is over.

    With E = num_steps / epoch_steps epochs and W = warmup_steps / epoch_steps of warm-up: epoch 0
    trains at `peak`, before any warm-up; epoch e > 0 at the rate of e' = e - 1, which is
    start + (peak - start) * e' / (W - 1) for e' < W, and
    end + (peak - end) * (1 + cos(pi * (e' - W) / (E - W))) / 2 from W on. Momentum that gathered at
    `start` in epoch 1 is then multiplied by a rate thousands of times larger: a kick. For a
    measurement of that (docs/recipe.md); `warmup_cosine` is the schedule to train with.

    Args:
      step: of the update, from 0.
      peak, num_steps, warmup_steps, start, end: as in `warmup_cosine`.
      epoch_steps: steps of an epoch; W must be a whole number other than 1, where the reference
        divides by zero.
    """
    epoch = jnp.floor(jnp.asarray(step, jnp.float32) / epoch_steps)
    warmup, epochs = warmup_steps / epoch_steps, num_steps / epoch_steps
    late = jnp.maximum(epoch - 1.0, 0.0)
    rise = start + (_number(peak) - start) * late / jnp.maximum(warmup - 1.0, 1.0)
    progress = (late - warmup) / jnp.maximum(epochs - warmup, 1.0)
    fall = end + (_number(peak) - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(epoch < 1, peak, jnp.where(late < warmup, rise, fall))


def matrices_only(params: optax.Params) -> optax.Params:
    """A mask that is True for weights (ndim > 1) and False for biases and BatchNorm's 1-D ones."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


class LarsState(NamedTuple):
    """State of `lars`: the number of updates done, and the momentum (a tree like params)."""

    count: jax.Array  # type: ignore[assignment]  # over tuple.count
    momentum: optax.Updates


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    momentum: jax.typing.ArrayLike = 0.9,
    trust_coefficient: jax.typing.ArrayLike = 0.02,
    eps: float = 1e-8,
    clip: bool = True,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rate scaling with clipping, known as LARC (arXiv 1708.03888, eq. 6).

    For a parameter p with more than one axis and gradient g:
      r = trust_coefficient * |p| / (|g| + weight_decay * |p| + eps), clipped to at most
      `learning_rate` when `clip`, so that no layer moves faster than plain SGD would move it;
      g <- (g + weight_decay * p) * r / learning_rate (with `clip`), or * r (without);
    both skipped when |p| or |g| is 0. One-axis parameters keep g, with no decay. Then
    m <- momentum * m + g and p <- p - learning_rate * m.

    This is not optax.lars, which has no clipping, multiplies the rate into the momentum, and uses
    a trust coefficient of 0.001 by default.

    Args:
      learning_rate: a number or a schedule of the update count.
      weight_decay: L2 penalty, inside the trust ratio.
      momentum: heavy-ball coefficient in [0, 1).
      trust_coefficient: eta of the paper.
      eps: keeps the ratio finite.
      clip: whether to limit the layer's own rate by `learning_rate`.

    Returns:
      an optax.GradientTransformation; its update needs `params`.
    """

    def init_fn(params: optax.Params) -> LarsState:
        return LarsState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update_fn(
        updates: optax.Updates, state: LarsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LarsState]:
        if params is None:
            raise ValueError("lars needs the parameters: call update(updates, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def scale(g: jax.Array, p: jax.Array) -> jax.Array:
            if p.ndim <= 1:
                return g
            p_norm, g_norm = jnp.linalg.norm(p.ravel()), jnp.linalg.norm(g.ravel())
            ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
            if clip:
                ratio = jnp.minimum(ratio / rate, 1.0)
            return jnp.where((p_norm > 0) & (g_norm > 0), (g + weight_decay * p) * ratio, g)

        updates = jax.tree.map(scale, updates, params)
        trace = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        updates = jax.tree.map(lambda m: -rate * m, trace)
        return updates, LarsState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init_fn, update_fn)


def _muon_dimension_numbers(params: optax.Params) -> optax.Params:
    """Which axes form the matrix that Muon orthogonalises: all but the last, against the last.

    Without it optax.contrib.muon leaves convolutions (HWIO, four axes) to Adam. The projector is
    left to it on purpose: its wide matrices would take most of Muon's time, a quarter of a step of
    configs/cpu.py, and at equal steps it learnt as much without (one seed, docs/recipe.md).
    """

    def numbers(path: tuple[Any, ...], p: jax.Array) -> Any:
        is_projector = path and getattr(path[0], "key", None) == "projector"
        if p.ndim <= 1 or is_projector:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree_util.tree_map_with_path(numbers, params)


def create_optimizer(
    name: str,
    learning_rate: jax.typing.ArrayLike,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformation:
    """The optax chain called `name`; weight decay never touches one-axis parameters.

    Args:
      name: 'lars' (see `lars`), 'sgd' (heavy-ball momentum, L2 decay), 'adamw' (decoupled decay)
        or 'muon' (momentum orthogonalised by Newton-Schulz for every weight, convolutions
        included; Adam at a tenth of the rate, without decay, for the one-axis parameters and for
        all that lies in 'projector'; https://kellerjordan.github.io/posts/muon).
      learning_rate: this step's rate, traced or not.
      weight_decay: see each optimiser.
      momentum: of lars and sgd; adamw and muon keep their usual constants.

    Raises:
      ValueError: for a name that is not in OPTIMIZERS.
    """
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "lars": lambda: lars(learning_rate, weight_decay=weight_decay, momentum=momentum),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(weight_decay, mask=matrices_only),
            optax.trace(decay=momentum),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adamw": lambda: optax.adamw(learning_rate, weight_decay=weight_decay, mask=matrices_only),
        "muon": lambda: optax.contrib.muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_learning_rate=0.1 * learning_rate,
            muon_weight_dimension_numbers=_muon_dimension_numbers,
        ),
    }
    if name not in makers:
        raise ValueError(f"optimiser {name!r} is not one of {', '.join(OPTIMIZERS)}")
    return makers[name]()
