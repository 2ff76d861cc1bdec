"""The pure training step: state in, state and metrics out. No files, no configs, no host sync.

Every random number is a function of (seed, stream, step or epoch): no key is stored, so a resumed
run draws what the uninterrupted one would have drawn, and a new stream moves no other.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jepa_jax.models import ModelFns, normalize, without_predictor
from jepa_jax.objectives import vicreg
from jepa_jax.optim import create_optimizer, late_epoch_warmup_cosine, warmup_cosine

Metrics = dict[str, jax.Array]
# What a step reports beside the loss's own terms.
RESERVED_METRICS = ("loss", "lr", "grad_norm", "probe_loss", "probe_acc", "fault")
# The one among them that says where something is not finite: no figure, so nothing averages it.
FAULT = "fault"
# The first batches of views are the global ones, of the size at which a network is used; any
# further ones are smaller crops, which only the loss sees.
NUM_GLOBAL = 2
# How the term of a model with a predictor is called.
PRED_LOSS = "pred_loss"


@flax.struct.dataclass
class HParams:
    """Every number a step reads: a pytree of scalars, so that changing one never recompiles.

    Rates are per step; the schedule warms up linearly from `warmup_start_lr` to `lr` in
    `warmup_steps` and falls by a half cosine to `min_lr` at `num_steps`. With `late_epoch_steps`
    above 0, the steps of an epoch, it is the reference's: see `late_epoch_warmup_cosine`.
    `augment` holds what augment_fn takes beside key and images, by name; nothing for one's own.
    `pred_coeff` weighs the term of a model with a predictor; `target_ema` is the momentum that its
    target network begins with, see `target_momentum`.
    """

    seed: jax.typing.ArrayLike
    lr: jax.typing.ArrayLike
    weight_decay: jax.typing.ArrayLike
    momentum: jax.typing.ArrayLike
    warmup_start_lr: jax.typing.ArrayLike
    min_lr: jax.typing.ArrayLike
    warmup_steps: jax.typing.ArrayLike
    num_steps: jax.typing.ArrayLike
    sim_coeff: jax.typing.ArrayLike
    std_coeff: jax.typing.ArrayLike
    cov_coeff: jax.typing.ArrayLike
    probe_lr: jax.typing.ArrayLike
    late_epoch_steps: jax.typing.ArrayLike = 0.0
    sigreg_coeff: jax.typing.ArrayLike = 10.0
    redundancy_coeff: jax.typing.ArrayLike = 5e-3
    temperature: jax.typing.ArrayLike = 0.5
    augment: dict[str, Any] = dataclasses.field(default_factory=dict)
    pred_coeff: jax.typing.ArrayLike = 1.0
    target_ema: jax.typing.ArrayLike = 0.0


@flax.struct.dataclass
class Probe:
    """The online linear probe: `kernel [F, K]`, `bias [K]`, and its own optimiser's state."""

    params: dict[str, jax.Array]
    opt_state: optax.OptState


@flax.struct.dataclass
class TrainState:
    """All that training changes, arrays only; no probe without labels."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    probe: Probe | None


@flax.struct.dataclass
class TargetState(TrainState):
    """The state of a run with a target network: its `params` (no predictor) and `batch_stats`.

    A class of its own, so that a state without a target has the arrays that it always had.
    """

    target: dict[str, Any]


# (key, z1, z2, hparams): the embeddings of every batch of views that the augmentation makes, two or
# more of them.
LossFn = Callable[..., tuple[jax.Array, Metrics]]
TrainStep = Callable[[TrainState, jax.Array, jax.Array, HParams], tuple[TrainState, Metrics]]
AugmentFn = Callable[..., tuple[jax.Array, ...]]


def stream_key(
    seed: jax.typing.ArrayLike, stream: str, index: jax.typing.ArrayLike = 0
) -> jax.Array:
    """The key of draw `index` (a step or an epoch) of the stream called `stream`."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    return jax.random.fold_in(key, index)


def learning_rate(hparams: HParams, step: jax.typing.ArrayLike) -> jax.Array:
    """The rate of update number `step`, from 0."""
    numbers = {
        "peak": hparams.lr,
        "num_steps": hparams.num_steps,
        "warmup_steps": hparams.warmup_steps,
        "start": hparams.warmup_start_lr,
        "end": hparams.min_lr,
    }
    epoch_steps = jnp.asarray(hparams.late_epoch_steps)
    late = late_epoch_warmup_cosine(step, epoch_steps=jnp.maximum(epoch_steps, 1.0), **numbers)
    return jnp.where(epoch_steps > 0, late, warmup_cosine(step, **numbers))


def target_momentum(hparams: HParams, step: jax.typing.ArrayLike) -> jax.Array:
    """Of the target network after update number `step`, from 0 (arXiv 2006.07733, section 3.3).

    From `target_ema` by a half cosine to 1 at `num_steps`. (I-JEPA's goes there in a line.)
    """
    share = jnp.asarray(step, jnp.float32) / hparams.num_steps
    return jnp.asarray(1 - (1 - hparams.target_ema) * (jnp.cos(jnp.pi * share) + 1) / 2)


def fresh_target(state: TrainState) -> TrainState:
    """The state with a target network, if it has any, that is a copy of the online one."""
    if not isinstance(state, TargetState):
        return state
    online = without_predictor({"params": state.params, "batch_stats": state.batch_stats})
    # Arrays of its own: a state that holds one twice cannot be donated.
    return dataclasses.replace(state, target=jax.tree.map(jnp.copy, online))


def _moved_on(state: TrainState, new: dict[str, Any], hparams: HParams) -> TrainState:
    """The state of the next step; a target network moves to m * target + (1 - m) * online."""
    if isinstance(state, TargetState):
        momentum = target_momentum(hparams, state.step)
        online = without_predictor({kind: new[kind] for kind in ("params", "batch_stats")})
        new["target"] = jax.tree.map(
            lambda t, p: momentum * t + (1 - momentum) * p, state.target, online
        )
    return dataclasses.replace(state, step=state.step + 1, **new)


def _optimizer(name: str, hparams: HParams, step: jax.typing.ArrayLike):
    return create_optimizer(
        name,
        learning_rate(hparams, step),
        weight_decay=hparams.weight_decay,
        momentum=hparams.momentum,
    )


def create_train_state(
    model: ModelFns,
    hparams: HParams,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    optimizer: str = "lars",
    has_target: bool = False,
) -> TrainState:
    """A fresh state, a function of `hparams.seed`; jit-able.

    Args:
      model: see `ModelFns`.
      hparams: see `HParams`.
      image_shape: (H, W, C) of one view.
      num_classes: of the online probe; 0 without labels.
      optimizer: a name of `optim.OPTIMIZERS`.
      has_target: whether a model with a predictor has a target network of its own.

    Returns:
      a `TargetState` if it has, else a `TrainState`.
    """
    images = jnp.zeros((2, *image_shape), jnp.float32)
    variables = model.init(stream_key(hparams.seed, "init"), images)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    probe = None
    if num_classes:
        ((h, _), _) = jax.eval_shape(lambda v: model.apply(v, images, False), variables)
        probe_params = {
            "kernel": jnp.zeros((h.shape[-1], num_classes), jnp.float32),
            "bias": jnp.zeros((num_classes,), jnp.float32),
        }
        probe = Probe(probe_params, optax.adam(hparams.probe_lr).init(probe_params))
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=_optimizer(optimizer, hparams, 0).init(params),
        probe=probe,
    )
    return fresh_target(TargetState(**vars(state), target={})) if has_target else state


def probe_logits(probe_params: Mapping[str, jax.Array], h: jax.Array) -> jax.Array:
    """Logits [N, K] of representations [N, F]."""
    return h @ probe_params["kernel"] + probe_params["bias"][None, :]


def _probe_loss(probe_params, h, labels):
    """Mean cross-entropy and accuracy over the rows whose label is not -1."""
    logits = probe_logits(probe_params, h)
    is_labelled = (labels >= 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(is_labelled), 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return jnp.sum(losses * is_labelled) / count, jnp.sum(hits * is_labelled) / count


def update_probe(
    probe: Probe | None, h: jax.Array, labels: jax.Array, hparams: HParams
) -> tuple[Probe | None, Metrics]:
    """One step of the online probe on h [P * B, F], P views of each of B images below one another.

    No gradient reaches h.
    """
    if probe is None:
        return None, {}
    labels = jnp.tile(labels, h.shape[0] // labels.shape[0])
    grad_fn = jax.value_and_grad(_probe_loss, has_aux=True)
    (loss, acc), grads = grad_fn(probe.params, jax.lax.stop_gradient(h), labels)
    # optax raises a float to an integer power, which strict promotion (as in the tests) refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optax.adam(hparams.probe_lr).update(grads, probe.opt_state)
    params = optax.apply_updates(probe.params, updates)
    return Probe(params, opt_state), {"probe_loss": loss, "probe_acc": acc}


def _check_rows(views: Sequence[jax.Array], h: jax.Array, num_images: int) -> None:
    for view in views:
        if len(view) % num_images:
            raise ValueError(f"augment_fn made {len(view)} views of {num_images} images")
    if len(h) != len(views[0]):
        raise ValueError(f"the encoder gave {len(h)} representations of {len(views[0])} views")


def check_scalars(loss: jax.Array, terms: Metrics) -> None:
    """ValueError unless a step can report them: scalars, under names that are not its own."""
    for name, value in {"loss": loss, **terms}.items():
        if jnp.shape(value):
            raise ValueError(f"loss_fn must return scalars; {name} has shape {jnp.shape(value)}")
    for name in terms:
        if name in RESERVED_METRICS:
            raise ValueError(f"loss_fn may not call a term {name!r}, a metric of the step itself")


def fault_places(params: Any) -> list[str]:
    """What the metric `fault` speaks of, in words: place n of this list is fault n + 1."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    gradients = [f"the gradient of {name} is not finite" for name in names]
    parameters = [f"the parameter {name} is not finite" for name in names]
    views = "a view of an image is not finite"
    return [views, *gradients, *parameters, "no gradient is finite"]


def _fault(views: Sequence[jax.Array], grad_squares: list[jax.Array], params: Any) -> jax.Array:
    """0, or the number of the first place that is not finite, see `fault_places`."""

    def is_bad(array):
        return ~jnp.all(jnp.isfinite(array))

    gradients = jnp.stack([is_bad(square) for square in grad_squares])
    is_bad_view = jnp.any(jnp.stack([is_bad(view) for view in views]))
    parameters = [is_bad(leaf) for leaf in jax.tree.leaves(params)]
    flags = jnp.concatenate([is_bad_view[None], gradients, jnp.stack(parameters)])
    first = jnp.where(jnp.any(flags), jnp.argmax(flags) + 1, 0)
    # As when the loss itself is not finite: the first of them would be a misleading name.
    is_everywhere = jnp.all(gradients) & ~is_bad_view
    return jnp.where(is_everywhere, len(flags) + 1, first).astype(jnp.float32)


def _grads(model: ModelFns, params, batch_stats, views, score, predict=None):
    """(loss, terms), h of the first views, new batch statistics, and the parameters' gradient.

    Args:
      views: two batches of views or more, of any sizes and numbers of rows. Each is normalised by
        moments of its own; the running statistics are those of the `NUM_GLOBAL` first.
      score: (z1, z2, ...), one of each batch -> (loss, terms).
      predict: (variables, views, embeddings), of the `NUM_GLOBAL` first -> (loss, terms) that are
        added; nothing for a model without a predictor.
    """

    def loss_and_aux(params):
        stats, outputs = batch_stats, []
        with jax.named_scope("model"):
            for place, view in enumerate(views):
                variables = {"params": params, "batch_stats": stats}
                output, moved = model.apply(variables, view, True)
                stats = moved if place < NUM_GLOBAL else stats
                outputs.append(output)
        embeddings = [z for _, z in outputs]
        loss, terms = score(*embeddings)
        if predict is not None:
            variables = {"params": params, "batch_stats": batch_stats}
            more, term = predict(variables, views[:NUM_GLOBAL], embeddings[:NUM_GLOBAL])
            loss, terms = loss + more, {**terms, **term}
        return loss, (terms, outputs[0][0], stats)

    (loss, (terms, h, stats)), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params)
    return (loss, terms), h, stats, grads


def _grads_by_pieces(
    model: ModelFns, params, batch_stats, views, score, predict=None, *, num_pieces: int
):
    """`_grads` with the activations of one piece of one view in memory at a time.

    The gradient of the loss by the embeddings needs no activations: a first pass embeds every
    piece, the loss sees the whole batch, and a second pass takes its gradient back through one
    piece after the other (GradCache, arXiv 2101.06983): every term of the loss is that of the whole
    batch. For an encoder without batch statistics the result is that of `_grads`. BatchNorm
    normalises each piece by the moments of its own B / num_pieces images, and the running
    statistics move by the mean of these. The price is a second forward pass.

    Piece i has rows i, i + num_pieces, ...: of every device's part of the batch the same share.
    There is no predictor, see `_grads_in`.
    """
    del predict
    # On a CPU a convolution inside a loop of XLA's takes a path some 60 times slower.
    scan = functools.partial(
        jax.lax.scan, unroll=num_pieces if jax.default_backend() == "cpu" else 1
    )

    def split(rows):
        return jnp.moveaxis(rows.reshape(-1, num_pieces, *rows.shape[1:]), 1, 0)

    def merge(pieces):
        return jnp.moveaxis(pieces, 0, 1).reshape(-1, *pieces.shape[2:])

    def embed(params, batch_stats, piece):
        with jax.named_scope("model"):
            return model.apply({"params": params, "batch_stats": batch_stats}, piece, True)

    def mean_of(total):
        if jnp.issubdtype(total.dtype, jnp.floating):
            return total / num_pieces
        # A counter of updates, or a flag, which other frameworks keep beside their averages.
        return total if total.dtype == jnp.bool_ else total // num_pieces

    def embed_all(batch_stats, view):
        def body(total, piece):
            outputs, stats = embed(params, batch_stats, piece)
            return jax.tree.map(jnp.add, total, stats), outputs

        zeros = jax.tree.map(jnp.zeros_like, batch_stats)
        total, outputs = scan(body, zeros, split(view))
        return jax.tree.map(merge, outputs), jax.tree.map(mean_of, total)

    def add_grads(grads, view, pulls):
        def body(grads, pieces):
            piece, pull = pieces
            _, back = jax.vjp(lambda p: embed(p, batch_stats, piece)[0][1], params)
            return jax.tree.map(jnp.add, grads, back(pull)[0]), None

        return scan(body, grads, (split(view), split(pulls)))[0]

    stats, outputs = batch_stats, []
    for place, view in enumerate(views):
        output, moved = embed_all(stats, view)
        stats = moved if place < NUM_GLOBAL else stats
        outputs.append(output)
    embeddings = [z for _, z in outputs]
    score_and_pulls = jax.value_and_grad(score, argnums=tuple(range(len(views))), has_aux=True)
    (loss, terms), pulls = score_and_pulls(*embeddings)
    grads = jax.tree.map(jnp.zeros_like, params)
    for view, pull in zip(views, pulls, strict=True):
        grads = add_grads(grads, view, pull)
    return (loss, terms), outputs[0][0], stats, grads


def _grads_in(num_pieces: int, model: ModelFns):
    """`_grads`, or `_grads_by_pieces`."""
    if num_pieces == 1:
        return _grads
    if model.predict is not None:
        raise ValueError("a model with a predictor does not go through in microbatches")
    return functools.partial(_grads_by_pieces, num_pieces=num_pieces)


def _scored(loss_fn: LossFn, loss_key: jax.Array, hparams: HParams, model: ModelFns):
    """(z1, z2, ...) -> (loss, terms) by the loss function."""

    def score(*embeddings):
        with jax.named_scope("loss"):
            loss, terms = loss_fn(loss_key, *embeddings, hparams)
        check_scalars(loss, terms)
        if model.predict is not None and PRED_LOSS in terms:
            raise ValueError(f"loss_fn may not call a term {PRED_LOSS!r}, the predictor's own")
        return loss, terms

    return score


def _predicted(model: ModelFns, state: TrainState, hparams: HParams):
    """(variables, views, embeddings) -> (loss, terms) of the predictor; None without one."""
    if (predictor := model.predict) is None:
        return None
    key = stream_key(hparams.seed, "predictor", state.step)
    target = jax.lax.stop_gradient(getattr(state, "target", None))

    def predict(variables, views, embeddings):
        with jax.named_scope("predictor"):
            term = predictor(key, variables, target, views, embeddings)
        return hparams.pred_coeff * term, {PRED_LOSS: term}

    return predict


def make_train_step(
    model: ModelFns,
    *,
    augment_fn: AugmentFn,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    loss_fn: LossFn = vicreg,
    optimizer: str = "lars",
    microbatches: int = 1,
) -> TrainStep:
    """The step `(state, images, labels, hparams) -> (state, metrics)`, pure and not yet jitted.

    The two views go through the model one after the other, each with its own batch statistics, as
    in the reference; the running statistics are updated twice. So do any further batches of views,
    such as small local crops: they take part in the loss, and neither the running statistics nor
    the online probe see them.

    Args:
      model: see `ModelFns`. One with a predictor adds hparams.pred_coeff times its term to the
        loss, and reports it as `pred_loss`; it takes no microbatches.
      augment_fn: (key, images uint8 [B, H, W, C], **hparams.augment) -> two views in [0, 1],
        [B, h, w, C] each; or P pairs of views, [P * B, h, w, C] each, as `pairs_of_views` stacks
        them. Any further batches, [n * B, h', w', C], may be of other sizes.
      mean, std: the normalisation of every view.
      loss_fn: (key, z1, z2, hparams) -> (loss, terms), scalars all; with further batches of views
        (key, z1, z2, z3, ..., hparams).
      optimizer: a name of `optim.OPTIMIZERS`.
      microbatches: pieces in which the views go through the network, one after the other, for
        batches whose activations do not fit; a divisor of B. See `_grads_by_pieces`.

    Returns:
      a function of images uint8 [B, H, W, C] and int32 labels [B], -1 for no label. Metrics are
      float32 scalars: loss, the loss's terms, lr, grad_norm, probe_loss, probe_acc, and fault, 0
      as long as views, gradients and parameters are finite (see `fault_places`).
    """
    grads_of = _grads_in(microbatches, model)

    def train_step(state, images, labels, hparams):
        with jax.named_scope("augment"):
            views_key = stream_key(hparams.seed, "views", state.step)
            views: Sequence[jax.Array] = augment_fn(views_key, images, **hparams.augment)
            views = [normalize(view, mean, std) for view in views]
        loss_key = stream_key(hparams.seed, "loss", state.step)
        (loss, terms), h, batch_stats, grads = grads_of(
            model,
            state.params,
            state.batch_stats,
            views,
            _scored(loss_fn, loss_key, hparams, model),
            _predicted(model, state, hparams),
        )
        _check_rows(views, h, len(images))
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            updates, opt_state = _optimizer(optimizer, hparams, state.step).update(
                grads, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("finite"):
            grad_squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)]
            fault = _fault(views, grad_squares, params)
        with jax.named_scope("probe"):
            probe, probe_metrics = update_probe(state.probe, h, labels, hparams)
        metrics = {
            "loss": loss,
            **terms,
            "lr": learning_rate(hparams, state.step),
            "grad_norm": jnp.sqrt(sum(grad_squares)),
            FAULT: fault,
            **probe_metrics,
        }
        new = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state, "probe": probe}
        return _moved_on(state, new, hparams), metrics

    return train_step


def make_train_epoch(train_step: Callable[..., Any]) -> Callable[..., tuple[TrainState, Metrics]]:
    """Many steps in one program, for data that is resident on the device.

    Returns:
      `(state, images, labels, indices, hparams) -> (state, metrics)` with images uint8
      [N, H, W, C], labels int32 [N] and indices int32 [S, B]: a `lax.scan` over S steps, metrics
      stacked [S]. A row of indices that starts with -1 is no step: it leaves the state alone and
      its metrics are 0, so that one compiled length serves an epoch's last, shorter piece.
    """

    def train_epoch(state, images, labels, indices, hparams):
        def run(state, batch_indices):
            return train_step(state, images[batch_indices], labels[batch_indices], hparams)

        empty = jax.tree.map(
            lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(run, state, indices[0])[1]
        )

        def body(state, batch_indices):
            return jax.lax.cond(
                batch_indices[0] >= 0,
                run,
                lambda state, _: (state, empty),
                state,
                batch_indices,
            )

        return jax.lax.scan(body, state, indices)

    return train_epoch
