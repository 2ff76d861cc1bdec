"""The host loop: reads a config, trains, evaluates, writes files. It holds no maths.

`train_and_evaluate` reads top to bottom: check, data, model, state (fresh or resumed), compile,
epochs, final evaluation. Everything it decides is a function of the config, never of the clock, so
that a resumed run ends in the same state as one that was never interrupted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jepa_jax import checkpoint, device
from jepa_jax.config import (
    SCHEMA_VERSION,
    compute_dtype,
    validate,
)
from jepa_jax.data import Dataset
from jepa_jax.errors import ConfigError, Interrupted, TrainingError
from jepa_jax.evaluation import evaluate_representation, with_online_probe
from jepa_jax.metrics import MetricsWriter, read_json, write_json
from jepa_jax.models import ModelFns
from jepa_jax.plan import (
    Plan,
    claim_workdir,
    clean_images,
    initial_state,
    make_plan,
    starting_state,
    training_labels,
)
from jepa_jax.probes import accuracy
from jepa_jax.profile import Profile
from jepa_jax.progress import Phases, Progress, Stopwatch, print_summary, say
from jepa_jax.representation import extract_features, reestimate_batch_stats, split_validation
from jepa_jax.runner import Runner
from jepa_jax.signals import StopRequest, stop_on_signals
from jepa_jax.train_step import (
    RESERVED_METRICS,
    LossFn,
    TrainState,
    TrainStep,
    make_train_step,
    probe_logits,
)
from jepa_jax.watch import Watch, diagnose, explain, loss_balance

# Phases beside the steps that make the weights what they are: a stem's eigenvectors, BatchNorm.
_ON_THE_CLOCK = ("initial state", "re-estimation")
# Which term of VICReg's a coefficient weighs.
_TERM_OF = {"sim_coeff": "invariance_loss", "std_coeff": "var_loss", "cov_coeff": "cov_loss"}

# --- steps ------------------------------------------------------------------------------------


def train_step_of(plan: Plan) -> TrainStep:
    """The step of a plan, pure and not yet jitted."""
    return make_train_step(
        plan.encoder.model,
        augment_fn=plan.augment_fn,
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        loss_fn=plan.loss_fn,
        optimizer=plan.config.optim.name,
    )


def make_runner(plan: Plan, state: TrainState) -> Runner:
    """The compiled step of a plan; `state` gives shapes alone."""
    return Runner(
        train_step_of(plan),
        state,
        plan.hparams,
        plan.dataset.train_images,
        training_labels(plan),
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.config.data.batch_size,
        placement=plan.placement,
        scan_steps=plan.scan_steps,
    )


def first_bad(metrics: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    """(index, name) of the first loss term, loss or gradient norm that is NaN or infinite.

    Args:
      metrics: of consecutive steps, [n] each.

    Returns:
      None if all are finite.
    """
    terms = [name for name in metrics if name not in RESERVED_METRICS]
    watched = [*terms, "loss", "grad_norm"]
    is_bad = np.stack([~np.isfinite(metrics[name]) for name in watched])
    if not is_bad.any():
        return None
    first = int(np.argmax(is_bad.any(axis=0)))
    return first, watched[int(np.argmax(is_bad[:, first]))]


def _check_finite(metrics: dict[str, np.ndarray], last_step: int, count: int) -> None:
    """Raises TrainingError that names the first step and term that is NaN or infinite."""
    if bad := first_bad(metrics):
        first, name = bad
        raise TrainingError(
            f"{name} became {metrics[name][first]} at step {last_step - count + first}: try a "
            "lower config.optim.lr; the last good checkpoint is untouched"
        )


def _train_epoch(loop: "_Loop", runner: Runner, state: TrainState) -> TrainState:
    """Runs what is left of an epoch, adding up its metrics; returns early on a stop."""
    plan, progress, bar, clock = loop.plan, loop.progress, loop.bar, loop.clock
    order = plan.batches_of(progress["epoch"])[progress["count"] :]

    def collect(metrics, count):
        metrics = {name: np.atleast_1d(v)[:count] for name, v in jax.device_get(metrics).items()}
        progress["count"] += count
        done = progress["epoch"] * plan.steps_per_epoch + progress["count"]
        _check_finite(metrics, done, count)
        for name, values in metrics.items():
            # One at a time, so that the sum does not depend on where a run was interrupted.
            for value in values:
                progress["sums"][name] = progress["sums"].get(name, 0.0) + float(value)
        progress["last_lr"] = float(metrics["lr"][-1])
        nonlocal last
        now = time.perf_counter()
        loop.say_first_step()
        bar.update(count, now - last, float(metrics["loss"][-1]))
        bar.expect(count, now - last, plan.num_steps - done)
        last = now

    clock.start()
    began = last = time.perf_counter()
    # The metrics of one piece are fetched while the next one runs: the device never waits.
    pending = None
    with contextlib.closing(runner.run(state, order)) as pieces:
        for newest, metrics, count in pieces:
            state = newest
            if pending is not None:
                collect(*pending)
            pending = (metrics, count)
            loop.profile.piece_done(state.step, count)
            if loop.stop.signal_number:
                break
    if pending is not None:
        collect(*pending)
    clock.stop()
    loop.phases.add({"training": time.perf_counter() - began})
    return state


# --- evaluation and files ---------------------------------------------------------------------


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def online_probe(plan: Plan, state: TrainState, *, with_test: bool = True) -> dict[str, float]:
    """Accuracy of the online probe, by the running statistics, on every labelled split."""
    if not plan.has_labels:
        return {}
    dataset = plan.dataset
    _, val = split_validation(dataset, plan.config.data.num_val)
    splits = {"val": (dataset.train_images[val], dataset.train_labels[val])}
    if with_test and dataset.test_labels is not None and (dataset.test_labels >= 0).any():
        splits["test"] = (dataset.test_images, dataset.test_labels)
    row = {}
    for split, (images, labels) in splits.items():
        h = extract_features(plan.apply_as_trained, _variables(state), images)
        logits = probe_logits(state.probe.params, h)
        row[f"{split}/online_probe_acc"] = float(accuracy(logits, jnp.asarray(labels)))
    return row


def _finish_epoch(loop: "_Loop", state: TrainState) -> dict[str, Any]:
    """Evaluates, writes the epoch's row, and turns the progress to the next epoch."""
    plan, progress, clock = loop.plan, loop.progress, loop.clock
    means = {name: total / progress["count"] for name, total in progress["sums"].items()}
    means["lr"] = progress.pop("last_lr")
    images = progress["count"] * plan.config.data.batch_size
    seconds = clock.seconds - progress["epoch_began"]
    progress.update(epoch=progress["epoch"] + 1, sums={}, count=0, epoch_began=clock.seconds)
    with loop.phases("online evaluation"):
        online = online_probe(plan, state)
    with loop.phases("watch"):
        watched = _watch_collapse(loop, state, means)
    step = min(progress["epoch"] * plan.steps_per_epoch, plan.num_steps)
    row = {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        **{f"train/{name}": value for name, value in means.items()},
        **online,
        **watched,
        "images_per_second": images / seconds,
        "train_seconds": clock.seconds,
        "total_seconds": loop.session.seconds,
    }
    val_acc = row.get("val/online_probe_acc")
    if val_acc is not None and val_acc > progress["best_val_acc"]:
        progress.update(best_val_acc=val_acc, best_epoch=progress["epoch"])
    loop.writer.write(row)
    every = plan.config.logging.log_every
    is_last = progress["epoch"] == plan.num_epochs
    loop.bar.epoch(row, plan.config.optim.epochs, as_line=is_last or progress["epoch"] % every == 0)
    return row


def make_watch(plan: Plan) -> Watch:
    """What measures the networks of a plan after every epoch."""
    weights = {} if "loss_fn" in plan.custom else plan.loss_weights
    return Watch(
        plan.encoder.model,
        augment_fn=plan.views_fn,
        loss_fn=plan.loss_fn,
        term_weights={_TERM_OF[name]: weight for name, weight in weights.items()},
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        images=clean_images(plan.dataset.train_images),
        batch_size=plan.config.data.batch_size,
        hparams=plan.hparams,
    )


def _watch_collapse(loop: "_Loop", state: TrainState, means: dict[str, float]) -> dict[str, Any]:
    """What the watch sees, for the epoch's row; a collapse is named once, when it is first seen."""
    variables = _variables(state)
    measured = loop.watch.representation(variables)
    norms = loop.watch.gradient_norms(variables)
    kind = diagnose(measured, loop.untrained_representation, means)
    if kind and not loop.progress["collapse"]:
        loop.progress["collapse"] = kind
        advice = _what_to_try(loop.plan, kind)
        say(f"{'warning':<10}{explain(kind, measured, loop.untrained_representation, advice)}")
    return {
        **{f"watch/{name}": value for name, value in measured.items()},
        **{f"watch/grad_norm/{name}": norm for name, norm in norms.items()},
        "watch/collapse": kind,
    }


def _what_to_try(plan: Plan, kind: str) -> str:
    if kind == "dead":
        return "try a lower config.optim.lr or a longer config.optim.warmup_epochs"
    if "loss_fn" in plan.custom:
        return "try a stronger term against it, or a lower config.optim.lr"
    _, warning = loss_balance(plan.embedding_dim, **plan.loss_weights)
    return warning or "try a lower config.optim.lr"


def _is_over(plan: Plan, progress: dict[str, Any]) -> bool:
    patience = plan.config.training.early_stop_epochs
    stale = progress["epoch"] - progress["best_epoch"]
    return progress["epoch"] >= plan.num_epochs or (0 < patience <= stale and plan.has_labels)


def params_digest(params: Any) -> str:
    """SHA-256 over the parameters' names and bytes, in the tree's own order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _evaluate_final(plan, state, untrained, progress, session, phases) -> dict[str, Any]:
    """Judges the last step and the untrained network; writes encoder/, evaluation, summary."""
    say("evaluating the last step and the same network untrained by ridge probe ...")
    summary: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    images = clean_images(plan.dataset.train_images)
    with phases("final evaluation"):
        # First, because it compiles, and the trained network's is on the run's clock.
        untrained = reestimate_batch_stats(plan.encoder, jax.device_put(untrained), images)
        jax.block_until_ready(untrained)
    with phases("re-estimation"):
        trained = reestimate_batch_stats(plan.encoder, _variables(state), images)
        jax.block_until_ready(trained)
    with phases("final evaluation"):
        checkpoint.save_tree(plan.workdir / "encoder", trained)
        evaluation = evaluate_representation(
            plan.encoder.apply,
            trained,
            plan.dataset,
            num_val=plan.config.data.num_val,
            embed=plan.encoder.embed,
            untrained=untrained,
            heads={"online_clean": state.probe.params} if plan.has_labels else {},
            augment_fn=plan.views_fn,
            parts=("ridge", "health"),
        )
        if plan.has_labels:
            online = online_probe(plan, state)
            accs = {name.split("/")[0]: acc for name, acc in online.items()}
            evaluation = with_online_probe(evaluation, accs)
            summary.update(_headline(evaluation))
        evaluation["checkpoint"] = {"which": "latest", "step": int(state.step)}
        write_json(plan.workdir / "evaluation.json", evaluation)
    steps, seconds = int(state.step), dict(phases.seconds)
    summary.update(
        seed=plan.config.meta.seed,
        steps=steps,
        epochs=steps / plan.steps_per_epoch,
        collapse=progress["collapse"],
        train_seconds=progress["train_seconds"],
        # From the seed to the weights that are judged: without the step's compilation, the online
        # evaluation and the probes.
        clock_seconds=progress["train_seconds"] + sum(seconds[name] for name in _ON_THE_CLOCK),
        total_seconds=session.seconds,
        seconds={**seconds, "other": max(session.seconds - sum(seconds.values()), 0.0)},
        images_per_second=steps * plan.config.data.batch_size / progress["train_seconds"],
        params_digest=params_digest(state.params),
    )
    write_json(plan.workdir / "summary.json", summary)
    return summary


def _headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The summary's figures: ridge, its floor and the online probe, on test and validation."""
    probes = evaluation["probes"]
    kinds = {
        "ridge_probe": probes["ridge"]["encoder"],
        "untrained_ridge_probe": probes["ridge"]["untrained"],
        "online_probe": probes["online"]["encoder"],
    }
    figures: dict[str, Any] = {}
    for name, scores in kinds.items():
        figures[f"{name}_acc"] = scores["test"] and scores["test"]["acc"]
        figures[f"val_{name}_acc"] = scores["val"]["acc"]
    return {
        **figures,
        "ridge_lambda": kinds["ridge_probe"]["lambda"],
        "untrained_ridge_lambda": kinds["untrained_ridge_probe"]["lambda"],
        "feature_dim": evaluation["feature_dim"],
    }


# --- what a person reads ----------------------------------------------------------------------


def _print_header(plan: Plan, state: TrainState, progress: dict[str, Any]) -> None:
    config, dataset = plan.config, plan.dataset
    height, width, _ = dataset.image_shape
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    num_test = len(dataset.test_images) if dataset.test_images is not None else 0
    place = "resident on the device" if plan.placement == "device" else "streamed"
    num_views = config.data.num_views
    of_views = "" if num_views == 2 else f" of {num_views} views each"
    weights, warning = "", ""
    if "loss_fn" not in plan.custom:
        weights, warning = loss_balance(plan.embedding_dim, **plan.loss_weights)
    lines = {
        "device": device.describe(),
        "data": f"{dataset.name}, {len(dataset.train_images)} training images of {height}x{width}, "
        f"{num_test} test images, {place}",
        "model": f"{plan.custom.get('encoder', config.model.type)}, {parameters:,} parameters, "
        f"computing in {compute_dtype(config).__name__}",
        "loss": plan.custom.get(
            "loss_fn",
            f"{config.loss.type}, balance {weights} (the paper's is 1 : 1 : 0.04)",
        ),
        "optimiser": f"{config.optim.name}, rate {config.optim.lr:g}, batch "
        f"{config.data.batch_size}{of_views}, {config.optim.epochs:g} epochs = "
        f"{plan.num_steps} steps",
        "workdir": str(plan.workdir),
    }
    if progress["epoch"] or progress["count"]:
        lines["resumed"] = f"at step {int(state.step)}"
    elif plan.init_from:
        lines["init"] = f"parameters of {plan.init_from}"
    lines["config"] = f"{plan.workdir / 'config.json'} has every value"
    for name, text in lines.items():
        say(f"{name:<10}{text}")
    if warning:
        say(f"{'warning':<10}{warning}")


# --- the whole ---------------------------------------------------------------------------------


def _prepare_workdir(workdir: str | pathlib.Path) -> pathlib.Path:
    workdir = pathlib.Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    return workdir


@dataclasses.dataclass
class _Loop:
    """What the epochs of one process share."""

    plan: Plan
    progress: dict[str, Any]
    session: Stopwatch
    clock: Stopwatch
    phases: Phases
    writer: MetricsWriter
    bar: Progress
    stop: StopRequest
    profile: Profile
    untrained: dict[str, Any]
    has_stepped: bool = False

    def say_first_step(self) -> None:
        """Says how long the start took, once the first steps of this process are done."""
        if not self.has_stepped:
            self.has_stepped = True
            compiling = self.phases.seconds["compile"]
            say(
                f"first step {self.session.running:.1f} s after the start, {compiling:.1f} s of "
                "them for compiling it"
            )

    @functools.cached_property
    def watch(self) -> Watch:
        return make_watch(self.plan)

    @functools.cached_property
    def untrained_representation(self) -> dict[str, Any]:
        return self.watch.representation(jax.device_put(self.untrained))


def _train(
    plan: Plan,
    state: TrainState,
    untrained: dict[str, Any],
    progress: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
    session: Stopwatch,
    phases: Phases,
    profile: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """The epochs: steps, online evaluation, checkpoints, and a saved stop on a signal."""
    say(f"{'compiling':<10}the training step")
    with phases("compile"):
        runner = make_runner(plan, state)
    config = plan.config
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(
            stop_on_signals("interrupted; the same command goes on from the last checkpoint")
        )
        writer = MetricsWriter(
            plan.workdir,
            step=int(state.step),
            run_id=progress["run_id"],
            config=config.to_dict(),
            wandb=config.logging.log_wandb,
            tensorboard=config.logging.log_tensorboard,
        )
        stack.callback(writer.close)
        silent = config.logging.tqdm_silent
        bar = Progress(int(state.step), plan.num_steps, config.data.batch_size, silent=silent)
        stack.callback(bar.close)
        clock = Stopwatch(progress["train_seconds"])
        trace = Profile(plan.workdir / "profile" if profile else None)
        stack.callback(trace.close)
        loop = _Loop(plan, progress, session, clock, phases, writer, bar, stop, trace, untrained)
        stop.deferring = True
        while not _is_over(plan, progress):
            state = _train_epoch(loop, runner, state)
            row: dict[str, Any] = {}
            if progress["count"] == plan.steps_of(progress["epoch"]):
                row = _finish_epoch(loop, state)
            collapsed = config.logging.stop_on_collapse and row.get("watch/collapse")
            due = bool(row) and progress["epoch"] % config.logging.save_every == 0
            if due or stop.signal_number or collapsed or _is_over(plan, progress):
                with phases("checkpoints"):
                    progress.update(train_seconds=clock.seconds, total_seconds=session.seconds)
                    progress["phases"] = dict(phases.seconds)
                    checkpoints.save(int(state.step), state, progress, row)
            if stop.signal_number or collapsed:
                _stop_early(loop, checkpoints, int(state.step), collapsed)
        with phases("checkpoints"):
            checkpoints.wait()
    return state, progress


def _stop_early(loop: _Loop, checkpoints, step: int, collapsed: str | bool | None) -> None:
    """Raises, once what has been saved is whole."""
    checkpoints.wait()
    plan = loop.plan
    if loop.stop.signal_number:
        raise Interrupted(
            f"stopped at step {step} of {plan.num_steps} and saved it in {plan.workdir}; the same "
            "command goes on from there",
            loop.stop.signal_number,
        )
    raise TrainingError(_collapsed(plan, collapsed, step))


def _collapsed(plan: Plan, kind: str, step: int) -> str:
    return (
        f"the run has collapsed ({kind}): stopped at step {step} of {plan.num_steps} and saved in "
        f"{plan.workdir}; --config.logging.stop_on_collapse=False goes on from there"
    )


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    dataset: Dataset | None = None,
    loss_fn: LossFn | None = None,
    encoder: nn.Module | ModelFns | None = None,
    augment_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    init_from: str | None = None,
    profile: bool = False,
) -> TrainState:
    """Pretrains, evaluates, and writes everything to `workdir`; resumes what it finds there.

    Args:
      config: see `configs/`. `meta.device` is for the command: a caller has chosen already.
      workdir: the run's folder; created. The same call again goes on where the run stopped, and
        ends, on the same CPU, in the same bits as if it had never stopped.
      dataset: in place of the config's, see `jepa_jax.data.from_arrays`.
      loss_fn: (key, z1 [B, D], z2 [B, D], hparams) -> (loss, terms), in place of the config's; with
        data.num_views = 2P, [P * B, D], rows n, n + B, ... of both being views of image n.
      encoder: a Linen module called as encoder(images, train) -> h [B, F], or a `ModelFns`.
      augment_fn: (key, images uint8 [B, H, W, 3]) -> (x1, x2) in [0, 1], in place of `two_views`;
        data.view_size then counts as 0; with data.num_views = 2P both are [P * B, ...], as
        `pairs_of_views` stacks them.
      init_from: another run's workdir, whose parameters the run starts from.
      profile: whether to write a trace of a few steps to workdir/profile, see `profile.Profile`.

    Returns:
      the state after the last step.

    Raises:
      ConfigError, DataError, CheckpointError: one line each; nothing was trained.
      TrainingError: a loss became NaN or infinite; names the term and the step.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    session, phases = Stopwatch(), Phases()
    session.start()
    with phases("setup"):
        validate(config)
        workdir = _prepare_workdir(workdir)
        plan = make_plan(config, workdir, dataset, loss_fn, encoder, augment_fn, init_from)
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        with phases("setup"):
            claim_workdir(plan, checkpoints.latest_step() is not None)
        with phases("compile"):
            # Thrown away: the next phase is on the run's clock, and compiling is not.
            jax.block_until_ready(initial_state(plan))
        with phases("initial state"):
            state = jax.block_until_ready(initial_state(plan))
        with phases("setup"):
            untrained = jax.device_get(_variables(state))
            state, progress = starting_state(plan, checkpoints, state)
        session.add(progress["total_seconds"])
        phases.add(progress["phases"])
        _print_header(plan, state, progress)
        if plan.config.logging.stop_on_collapse and progress["collapse"]:
            raise TrainingError(_collapsed(plan, progress["collapse"], int(state.step)))
        if not _is_over(plan, progress):
            state, progress = _train(
                plan, state, untrained, progress, checkpoints, session, phases, profile
            )
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = read_json(summary_path)
        say("this run is finished; another --workdir starts a new one")
    else:
        summary = _evaluate_final(plan, state, untrained, progress, session, phases)
    print_summary(summary, workdir)
    return state
