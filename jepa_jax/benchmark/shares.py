"""Where the time of a step and of an epoch goes: every part compiled and timed alone.

The parts do not add up to the step exactly, because XLA fuses across their borders and overlaps
them; their sum is given beside.
"""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
import optax

from jepa_jax.benchmark.timing import REPEATS, sample, spread
from jepa_jax.checkpoint import Checkpoints
from jepa_jax.data import epoch_order, stream_batches, take
from jepa_jax.models import normalize
from jepa_jax.optim import create_optimizer
from jepa_jax.plan import Plan, clean_images, initial_state, training_labels
from jepa_jax.representation import extract_features
from jepa_jax.train_step import NUM_GLOBAL, learning_rate, probe_logits, stream_key, update_probe
from jepa_jax.watch import Watch

# The online probe is read on so many images after every epoch: 5,000 of val, 10,000 of test.
_EVALUATED, _EVALUATED_ON_CPU = 15_000, 1_500
_EPOCH_IMAGES = 50_000
# A part that takes long is timed less often, down to once.
_BUDGET_SECONDS = 30.0


def _seconds(work, budget_seconds=_BUDGET_SECONDS) -> dict[str, Any]:
    return spread(sample(work, min_seconds=0.1, budget_seconds=budget_seconds))


class _Parts:
    """The parts of a step as functions of their own inputs, on the first batch of an epoch."""

    def __init__(self, plan: Plan):
        self.plan, self.state = plan, initial_state(plan)
        batch_size, images = plan.config.data.batch_size, plan.dataset.train_images
        self.labels = training_labels(plan)
        self.row = np.arange(batch_size, dtype=np.int32)
        self.batch = jax.device_put((np.asarray(images[:batch_size]), self.labels[:batch_size]))
        model, hparams = plan.encoder.model, plan.hparams
        mean, std = plan.encoder.mean, plan.encoder.std

        def augment(images):
            views = plan.views_fn(stream_key(hparams.seed, "views"), images)
            return [normalize(view, mean, std) for view in views]

        def forward(params, batch_stats, views):
            outputs = []
            for view in views:
                variables = {"params": params, "batch_stats": batch_stats}
                output, moved = model.apply(variables, view, True)
                batch_stats = moved if len(outputs) < NUM_GLOBAL else batch_stats
                outputs.append(output)
            return *(z for _, z in outputs), (outputs[0][0], batch_stats)

        def loss(*embeddings):
            return plan.loss_fn(stream_key(hparams.seed, "loss"), *embeddings, hparams)

        def whole(params, batch_stats, views):
            *embeddings, aux = forward(params, batch_stats, views)
            value, terms = loss(*embeddings)
            return value, (terms, aux)

        def update(grads, opt_state, params):
            optimizer = create_optimizer(
                plan.config.optim.name,
                learning_rate(hparams, 0),
                weight_decay=hparams.weight_decay,
                momentum=hparams.momentum,
            )
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state

        self.augment, self.forward, self.loss = map(jax.jit, (augment, forward, loss))
        self.gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))
        self.update = jax.jit(update)
        self.probe = jax.jit(lambda probe, h, labels: update_probe(probe, h, labels, hparams))

    def input_seconds(self) -> dict[str, Any]:
        """An epoch's order, divided by its steps, and the gathering of one batch."""
        plan = self.plan
        images, num_steps = plan.dataset.train_images, plan.steps_per_epoch
        key = stream_key(plan.hparams.seed, "order")
        order = _seconds(
            lambda: jax.device_get(epoch_order(key, len(images), plan.config.data.batch_size))
        )
        if plan.placement != "device":
            batches = _seconds(
                lambda: list(stream_batches(images, self.labels, self.row[None].repeat(8, 0)))
            )
            gathered = spread([value / 8 for value in batches["values"]])
        else:
            resident = jax.device_put((np.asarray(images), self.labels))
            gathered = _seconds(lambda: take(*resident, jax.device_put(self.row)))
        of_order = order["median"] / num_steps
        return {
            **spread([value + of_order for value in gathered["values"]]),
            "order_seconds_per_epoch": order["median"],
        }


def with_shares(parts: dict[str, Any], whole_seconds: float) -> dict[str, Any]:
    """The parts by name, each with its `share` of the whole, and the sum of the shares."""
    shared = {
        name: {**part, "share": part["median"] / whole_seconds} for name, part in parts.items()
    }
    return {"parts": shared, "sum": sum(part["share"] for part in shared.values())}


def backward_seconds(forward: Any, loss: Any, gradient: Any) -> dict[str, Any]:
    """What the gradient of all takes beyond forward and loss: a difference of medians."""
    alone = forward["median"] + loss["median"]
    return {
        "median": max(gradient["median"] - alone, 0.0),
        "n": gradient["n"],
        "forward_loss_and_backward": gradient,
    }


def step_parts(plan: Plan) -> dict[str, Any]:
    """Seconds of every part of a step by name, with their spread; `backward` has no range."""
    parts = _Parts(plan)
    state, images = parts.state, parts.batch[0]
    views = parts.augment(images)
    *embeddings, (h, _) = parts.forward(state.params, state.batch_stats, views)
    _, grads = parts.gradient(state.params, state.batch_stats, views)
    measured = {
        "input": parts.input_seconds(),
        "augment": _seconds(lambda: parts.augment(images)),
        "forward": _seconds(lambda: parts.forward(state.params, state.batch_stats, views)),
        "loss": _seconds(lambda: parts.loss(*embeddings)),
    }
    gradient = _seconds(lambda: parts.gradient(state.params, state.batch_stats, views))
    measured["backward"] = backward_seconds(measured["forward"], measured["loss"], gradient)
    measured["optimizer"] = _seconds(lambda: parts.update(grads, state.opt_state, state.params))
    if state.probe is not None:
        labels = parts.batch[1]
        measured["online probe"] = _seconds(lambda: parts.probe(state.probe, h, labels))
    return measured


def _evaluation_seconds(plan: Plan, state: Any) -> dict[str, Any]:
    """The online probe on val and test; on a CPU on a tenth of them, times ten."""
    wanted = _EVALUATED_ON_CPU if jax.default_backend() == "cpu" else _EVALUATED
    images = np.asarray(plan.dataset.train_images[:wanted])
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def evaluate():
        h = extract_features(plan.encoder.apply, variables, images)
        return h if state.probe is None else probe_logits(state.probe.params, h)

    values = sample(evaluate, budget_seconds=_BUDGET_SECONDS)
    scaled = spread([value * _EVALUATED / len(images) for value in values])
    return {**scaled, "measured_on_images": len(images), "for_images": _EVALUATED}


def _watch_seconds(plan: Plan, state: Any) -> dict[str, Any]:
    watch = Watch(
        plan.encoder.model,
        augment_fn=plan.views_fn,
        loss_fn=plan.loss_fn,
        term_weights={},
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        images=clean_images(plan.dataset.train_images),
        batch_size=plan.config.data.batch_size,
        hparams=plan.hparams,
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def work():
        watch.representation(variables)
        watch.gradient_norms(variables)

    return spread(sample(work, min_seconds=0.0, budget_seconds=_BUDGET_SECONDS))


def _checkpoint_seconds(state: Any) -> dict[str, Any]:
    """For how long an asynchronous save blocks, and until it is whole."""
    blocked, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder))
        for step in range(REPEATS + 1):
            began = time.perf_counter()
            checkpoints.save(step, state, {}, {})
            blocked.append(time.perf_counter() - began)
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
        checkpoints.close()
    # The first one also starts orbax's threads.
    return {"blocking": spread(blocked[1:]), "until_whole": spread(whole[1:])}


def epoch_parts(plan: Plan) -> dict[str, Any]:
    """Seconds of what follows an epoch, by name, with their spread."""
    state = initial_state(plan)
    checkpoint = _checkpoint_seconds(state)
    return {
        "online evaluation": _evaluation_seconds(plan, state),
        "watch": _watch_seconds(plan, state),
        "checkpoint, blocking": checkpoint["blocking"],
        "checkpoint, until whole": checkpoint["until_whole"],
    }


def of_an_epoch(parts: dict[str, Any], images_per_second: float) -> dict[str, Any]:
    """`epoch_parts` as shares of the steps of an epoch of 50,000 images."""
    seconds = _EPOCH_IMAGES / images_per_second
    shared = with_shares(parts, seconds)["parts"]
    return {"epoch_images": _EPOCH_IMAGES, "epoch_seconds": seconds, "parts": shared}
