"""What does each repair of the rapid recipe bring? Three seeds, read on held-out images.

    python -m benchmarks.ablation --workdir runs/ablation --out benchmarks/results/ablation.json

By default rapid at an eighth, for two CPU cores: width, projector, batch and images are divided by
eight, a stage has one block, views have 16 pixels; epochs, steps an epoch, rates and the balance of
the loss in the paper's units stay. With --scale 1, on a GPU, it is rapid itself. The reference's
own online probe, which sits inside the encoder's optimiser and schedule, is trained beside ours on
the same features. Finished runs are read, not repeated. The test set is not read.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks.figures import (
    parse,
    parser,
    percent,
    stored,
    training_images,
    write_document,
)
from configs import rapid, rapid_fixed
from jepa_jax.data import Dataset, take
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import train_step_of
from jepa_jax.losses import paper_cov_coeff
from jepa_jax.models import normalize
from jepa_jax.optim import create_optimizer
from jepa_jax.plan import Plan, clean_images, initial_state, make_plan
from jepa_jax.probes import accuracy
from jepa_jax.representation import extract_features, reestimate_batch_stats, split_validation
from jepa_jax.train_step import HParams, TrainState, learning_rate, probe_logits, stream_key

Overrides = dict[str, Any]
# Undone in rapid_fixed, one after the other from the last to the first; the scale divides batches.
_WRITTEN = rapid.get_config()
_LOSS = {f"loss.{name}": _WRITTEN.loss[name] for name in ("std_coeff", "cov_coeff")}
_SCHEDULE = {"optim.schedule": "late_epoch"}
_BATCH = {"data.batch_size": _WRITTEN.data.batch_size}
RUNGS: dict[str, Overrides] = {
    "rapid as written": {**_LOSS, **_SCHEDULE, **_BATCH},
    "+ balance of the loss": {**_SCHEDULE, **_BATCH},
    "+ a schedule per step": _BATCH,
    "+ smaller batches": {},
}
# After which shares of a run, beside the last step, the ridge probe is read.
_PROBED = (0.1, 0.2, 0.5)
_NUM_GRADIENT_IMAGES = 256
# The schedules that show the kick, with rapid's weights: the reference's and ours.
_SCHEDULES, _KICK_EPOCHS = ("late_epoch", "step"), 12


def config_of(rung: str, *, scale: int, seed: int = 0) -> ConfigDict:
    """rapid_fixed with what the rung does not yet repair, at 1 / `scale` of its sizes."""
    config = rapid_fixed.get_config()
    config.update_from_flattened_dict(RUNGS[rung])
    config.meta.seed = seed
    if scale == 1:
        return config
    model, loss = config.model, config.loss
    config.data.batch_size //= scale
    config.data.view_size = 16
    config.model.stage_sizes = (1, 1, 1, 1)
    config.model.stem_padding = 1
    config.training.use_amp = False
    # The weight in the paper's units is the weight divided by D - 1.
    full = paper_cov_coeff(model.proj_output_dim)
    for key in ("width", "proj_hidden_dim", "proj_output_dim"):
        model[key] //= scale
    loss.cov_coeff *= paper_cov_coeff(model.proj_output_dim) / full
    return config


def _subset(dataset: Dataset, scale: int, num_val: int) -> tuple[Dataset, np.ndarray]:
    """Every `scale`-th image, and its labels, -1 for those that validation reads."""
    labels = np.array(dataset.train_labels, np.int32)
    labels[split_validation(dataset, num_val)[1]] = -1
    images, classes = dataset.train_images[::scale], dataset.train_labels[::scale]
    small = dataclasses.replace(dataset, train_images=images, train_labels=classes)
    return small, labels[::scale]


# --- the reference's online probe -------------------------------------------------------------


def _tied_optimizer(hparams: HParams, step: jax.typing.ArrayLike):
    """The encoder's: its rate, its decay, its trust ratio."""
    rate = learning_rate(hparams, step)
    numbers = {"weight_decay": hparams.weight_decay, "momentum": hparams.momentum}
    return create_optimizer("lars", rate, **numbers)


def _tied_init(plan: Plan, num_classes: int) -> dict[str, Any]:
    """PyTorch's initialisation of a linear layer: uniform, up to 1 / sqrt(F)."""
    bound, shape = plan.feature_dim**-0.5, (plan.feature_dim, num_classes)
    draws = jax.random.uniform(jax.random.key(plan.config.meta.seed), shape, minval=-1.0)
    params = {"kernel": bound * draws, "bias": jnp.zeros(num_classes)}
    return {"params": params, "opt_state": _tied_optimizer(plan.hparams, 0).init(params)}


def _tied_update(tied, h, labels, hparams, step):
    """A step of cross-entropy on h [B, F], rows labelled -1 left out."""

    def loss(params):
        logits = probe_logits(params, jax.lax.stop_gradient(h))
        is_labelled = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(is_labelled, losses, 0.0)) / jnp.maximum(jnp.sum(is_labelled), 1)

    grads = jax.grad(loss)(tied["params"])
    updates, opt_state = _tied_optimizer(hparams, step).update(
        grads, tied["opt_state"], tied["params"]
    )
    return {"params": optax.apply_updates(tied["params"], updates), "opt_state": opt_state}


# --- training ---------------------------------------------------------------------------------


def make_step(plan: Plan):
    """The package's step, the tied probe on the features that it saw, and how far layers move."""
    train_step, model = train_step_of(plan), plan.encoder.model

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry, images, labels, hparams):
        state, tied = carry
        # The step's own first view and forward pass: XLA computes them once.
        view = plan.views_fn(stream_key(hparams.seed, "views", state.step), images)[0]
        view = normalize(view, plan.encoder.mean, plan.encoder.std)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        (h, _), _ = model.apply(variables, view, True)
        tied = _tied_update(tied, h, labels, hparams, state.step)
        after, metrics = train_step(state, images, labels, hparams)
        moved = jax.tree.map(
            lambda new, old: jnp.linalg.norm((new - old).ravel()) / jnp.linalg.norm(old.ravel()),
            *(
                [p for p in jax.tree.leaves(params) if p.ndim > 1]
                for params in (after.params, state.params)
            ),
        )
        return (after, tied), {**metrics, "most_moved": jnp.max(jnp.stack(moved))}

    return step


_RECORDED = ("loss", "invariance_loss", "var_loss", "cov_loss", "lr", "grad_norm", "most_moved")


class _Judge:
    """Probes of a run, fitted and read on all images of the dataset, however few it trained on."""

    def __init__(self, plan: Plan, dataset: Dataset, num_val: int):
        self.plan, self.dataset, self.num_val = plan, dataset, num_val
        val = split_validation(dataset, num_val)[1]
        self.val_images, self.val_labels = dataset.train_images[val], dataset.train_labels[val]
        self.clean = clean_images(plan.dataset.train_images)

    def probes(self, state: TrainState, *parts: str) -> dict[str, float]:
        """Accuracies in [0, 1] on validation images."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        variables = reestimate_batch_stats(self.plan.encoder, variables, self.clean)
        result = evaluate_representation(
            self.plan.encoder.apply, variables, self.dataset, num_val=self.num_val, parts=parts
        )
        return {probe: result["probes"][probe]["encoder"]["val"]["acc"] for probe in parts}

    def online(self, state: TrainState, probe_params: Any) -> float:
        """Of a linear head on features through the running statistics, as the reference reads."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        h = extract_features(self.plan.apply_as_trained, variables, self.val_images)
        return float(accuracy(probe_logits(probe_params, h), jnp.asarray(self.val_labels)))


class _Training:
    """A plan under way, the tied probe beside it, and what every step recorded."""

    def __init__(self, config: ConfigDict, scale: int, dataset: Dataset):
        num_val = config.data.num_val
        small, labels = _subset(dataset, scale, num_val)
        config.data.num_val = num_val // scale
        self.plan = make_plan(config, pathlib.Path(), small, None, None, None, None)
        self.judge = _Judge(self.plan, dataset, num_val)
        self.state = initial_state(self.plan)
        self.tied = _tied_init(self.plan, small.num_classes)
        self.records: dict[str, list[float]] = {name: [] for name in _RECORDED}
        self._step = make_step(self.plan)
        self._resident = jax.device_put((np.asarray(small.train_images), labels))

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss was not finite."""
        finite = np.isfinite(self.records["loss"])
        return None if finite.all() else int(np.argmin(finite))

    def run_epoch(self, epoch: int) -> None:
        """All its steps; their metrics are fetched when it is over."""
        found = []
        for rows in self.plan.batches_of(epoch):
            batch = take(*self._resident, jax.device_put(rows))
            (self.state, self.tied), metrics = self._step(
                (self.state, self.tied), *batch, self.plan.hparams
            )
            found.append(metrics)
        for metrics in jax.device_get(found):
            for name, values in self.records.items():
                values.append(float(f"{float(metrics[name]):.5g}"))


def measure_run(rung: str, seed: int, scale: int, dataset: Dataset) -> dict[str, Any]:
    """Trains a rung of the ladder; accuracies untrained, on the way and, unless it diverged, last.

    One that did has no "probes", and the step in "diverged_at".
    """
    training = _Training(config_of(rung, scale=scale, seed=seed), scale, dataset)
    plan, judge = training.plan, training.judge
    untrained = judge.probes(training.state, "ridge", "knn")
    stops, curve = {round(share * plan.num_epochs) for share in _PROBED}, {}
    for epoch in range(plan.num_epochs):
        training.run_epoch(epoch)
        if training.diverged_at is not None:
            break
        if epoch + 1 in stops:
            curve[epoch + 1] = judge.probes(training.state, "ridge")["ridge"]
    probes = None
    if training.diverged_at is None:
        state, final = training.state, judge.probes(training.state, "ridge", "knn")
        curve[plan.num_epochs] = final["ridge"]
        probes = {
            "online as the reference": judge.online(state, training.tied["params"]),
            "online": judge.online(state, state.probe.params),
            **final,
        }
    return {
        "probes": probes,
        "diverged_at": training.diverged_at,
        "untrained": untrained,
        "curve": curve,
        "steps": plan.num_steps,
        "batch_size": plan.config.data.batch_size,
        "images_an_epoch": plan.steps_per_epoch * plan.config.data.batch_size,
        "losses": [training.records["loss"][0], training.records["loss"][-1]],
    }


def measure_kick(schedule: str, scale: int, dataset: Dataset) -> dict[str, Any]:
    """What every step of the first epochs recorded, with all else as rapid is written."""
    config = config_of("rapid as written", scale=scale)
    config.optim.schedule = schedule
    training = _Training(config, scale, dataset)
    for epoch in range(_KICK_EPOCHS):
        training.run_epoch(epoch)
    return {"steps_an_epoch": training.plan.steps_per_epoch, "records": training.records}


# --- gradients --------------------------------------------------------------------------------


def gradient_norms(dataset: Dataset) -> dict[str, dict[str, float]]:
    """Norms of every weighted term's gradient on rapid's encoder at its start, by both weightings.

    ResNet-18 and a projector 4096-4096 in float32, one batch of 256 images.
    """
    config = config_of("rapid as written", scale=1)
    config.training.use_amp = False
    config.data.batch_size = _NUM_GRADIENT_IMAGES
    plan = make_plan(config, pathlib.Path(), dataset, None, None, None, None)
    state = initial_state(plan)
    images = jnp.asarray(dataset.train_images[:_NUM_GRADIENT_IMAGES])
    views = plan.views_fn(jax.random.key(0), images)
    views = [normalize(view, plan.encoder.mean, plan.encoder.std) for view in views]

    @jax.jit
    def norms(params):
        def terms(encoder):
            variables = {"params": {**params, "encoder": encoder}, "batch_stats": state.batch_stats}
            z1, z2 = (plan.encoder.model.apply(variables, view, True)[0][1] for view in views)
            found = plan.loss_fn(None, z1, z2, plan.hparams)[1]
            return tuple(found[f"{name}_loss"] for name in ("invariance", "var", "cov"))

        _, pull = jax.vjp(terms, params["encoder"])
        return [optax.tree.norm(pull(tuple(row))[0]) for row in np.eye(3, dtype=np.float32)]

    invariance, variance, covariance = (float(norm) for norm in norms(state.params))
    fixed = rapid_fixed.get_config().loss
    return {
        name: {
            "invariance": loss.sim_coeff * invariance,
            "variance": loss.std_coeff * variance,
            "covariance": loss.cov_coeff * covariance,
        }
        for name, loss in (("rapid", _WRITTEN.loss), ("balanced", fixed))
    }


# --- table ------------------------------------------------------------------------------------

_COLUMNS = {
    "online as the reference": "online probe in LARS",
    "online": "online probe, own Adam",
    "ridge": "ridge",
    "knn": "20-NN",
}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per rung, a column per probe, in percent on validation images."""
    lines = [
        f"| recipe | steps | {' | '.join(_COLUMNS.values())} | seeds |",
        "|---" * (3 + len(_COLUMNS)) + "|",
    ]
    for rung, runs in rows.items():
        ended = [run["probes"] for run in runs if run["probes"]]
        cells = [percent([probes[name] for probes in ended]) if ended else "" for name in _COLUMNS]
        seeds = str(len(runs))
        if len(ended) < len(runs):
            steps = " and ".join(str(run["diverged_at"]) for run in runs if not run["probes"])
            seeds += f", {len(runs) - len(ended)} diverged at step {steps}"
        lines.append(f"| {rung} | {runs[0]['steps']:,} | {' | '.join(cells)} | {seeds} |")
    untrained = [runs["untrained"] for runs in next(iter(rows.values()))]
    cells = [percent([values[probe] for values in untrained]) for probe in ("ridge", "knn")]
    lines.append(f"| untrained | 0 | | | {' | '.join(cells)} | {len(untrained)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table and writes the figures."""
    command = parser(__doc__)
    command.add_argument("--scale", type=int, default=8, help="sizes are divided by it; 1: rapid")
    arguments, dataset = parse(command), training_images()
    rows: dict[str, list[dict[str, Any]]] = {rung: [] for rung in RUNGS}
    for seed in range(arguments.seeds):
        for rung in RUNGS:
            measure = functools.partial(measure_run, rung, seed, arguments.scale, dataset)
            path = arguments.workdir / f"scale {arguments.scale} {rung} {seed}.json"
            rows[rung].append(stored(path, measure))
    print(table(rows))
    if arguments.out:
        gradients, kick = functools.partial(gradient_norms, dataset), {}
        for schedule in _SCHEDULES:
            measure = functools.partial(measure_kick, schedule, arguments.scale, dataset)
            path = arguments.workdir / f"scale {arguments.scale} kick {schedule}.json"
            kick[schedule] = stored(path, measure)
        write_document(
            arguments.out,
            f"the repairs of rapid at 1/{arguments.scale} of its sizes",
            f"python -m benchmarks.ablation --scale {arguments.scale}",
            gradient_norms=stored(arguments.workdir / "gradients.json", gradients),
            kick=kick,
            rungs=rows,
        )


if __name__ == "__main__":
    main()
