"""The epochs of a run: steps, what is measured after each, checkpoints, and what ends them early.

It holds no maths. What it decides is a function of the config, never of the clock: when a
checkpoint is saved changes nothing of what is learnt.
"""

import contextlib
import dataclasses
import functools
import time
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import checkpoint
from jepa_jax.data import Records
from jepa_jax.distributed import Agreement, is_main, on_main
from jepa_jax.divergence import what_is_bad
from jepa_jax.errors import Interrupted, TrainingError
from jepa_jax.metrics import MetricsWriter, NoMetrics
from jepa_jax.objectives import OBJECTIVES
from jepa_jax.plan import Plan, clean_images, initial_state, starting_state, training_labels
from jepa_jax.probes import accuracy
from jepa_jax.profile import Profile
from jepa_jax.progress import Phases, Progress, Stopwatch, say
from jepa_jax.representation import extract_features, split_validation
from jepa_jax.runner import Runner
from jepa_jax.signals import StopRequest, stop_on_signals
from jepa_jax.train_step import (
    FAULT,
    HParams,
    TrainState,
    TrainStep,
    make_train_step,
    probe_logits,
)
from jepa_jax.watch import Watch, diagnose, explain

# How often a run goes back to its last checkpoint before it gives up.
_MAX_BACK_OFFS = 3


class _Diverged(TrainingError):
    """A loss, a gradient, a parameter or a view that is NaN or infinite."""


# --- a plan's programs --------------------------------------------------------------------------


def train_step_of(plan: Plan) -> TrainStep:
    """The step of a plan, pure and not yet jitted."""
    return make_train_step(
        plan.encoder.model,
        augment_fn=plan.augment_fn,
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        loss_fn=plan.loss_fn,
        optimizer=plan.config.optim.name,
        microbatches=plan.config.training.microbatches,
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
        layout=plan.layout,
    )


def variables_of(state: TrainState) -> dict[str, Any]:
    """What the model's apply takes."""
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
        h = extract_features(plan.apply_as_trained, variables_of(state), images)
        logits = probe_logits(state.probe.params, h)
        row[f"{split}/online_probe_acc"] = float(accuracy(logits, jnp.asarray(labels)))
    return row


def make_watch(plan: Plan) -> Watch:
    """What measures the networks of a plan after every epoch."""
    return Watch(
        plan.encoder.model,
        augment_fn=plan.views_fn,
        loss_fn=plan.loss_fn,
        term_weights=plan.loss_weights,
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        images=clean_images(plan.dataset.train_images),
        batch_size=plan.config.data.batch_size,
        hparams=plan.hparams,
    )


# --- an epoch -----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Loop:
    """What the epochs of one process share."""

    plan: Plan
    runner: Runner
    progress: dict[str, Any]
    checkpoints: checkpoint.Checkpoints | checkpoint.NoCheckpoints
    session: Stopwatch
    clock: Stopwatch
    phases: Phases
    writer: MetricsWriter | NoMetrics
    bar: Progress
    stop: StopRequest
    profile: Profile
    untrained: dict[str, Any]
    agreement: Agreement = dataclasses.field(default_factory=Agreement)
    has_stepped: bool = False
    saved_at: float = dataclasses.field(default_factory=time.monotonic)

    def say_first_step(self) -> None:
        """Says how long the start took, once the first steps of this process are done."""
        if not self.has_stepped:
            self.has_stepped = True
            # Without that of earlier processes, which came with the progress.
            earlier = self.progress["phases"].get("compile", 0.0)
            compiling = self.phases.seconds["compile"] - earlier
            say(
                f"first step {self.session.running:.1f} s after the start, {compiling:.1f} s of "
                "them for compiling it"
            )

    @property
    def hparams(self) -> HParams:
        """The plan's numbers, the rate halved as often as the run has gone back."""
        hparams, back_offs = self.plan.hparams, self.progress["back_offs"]
        if not back_offs:
            return hparams
        rate = np.float32(self.plan.config.optim.lr / 2**back_offs)
        return dataclasses.replace(hparams, lr=jax.device_put(rate))

    @property
    def is_save_due(self) -> bool:
        """Whether so much time has passed that a kill would cost more than was promised."""
        minutes = self.plan.config.logging.save_every_minutes
        return time.monotonic() - self.saved_at > 60 * minutes

    def wishes(self) -> tuple[int, int]:
        """What this process asks of all: the signal that it was sent, and whether to save."""
        return self.stop.signal_number, self.is_save_due

    @functools.cached_property
    def watch(self) -> Watch:
        return make_watch(self.plan)

    @functools.cached_property
    def untrained_representation(self) -> dict[str, Any]:
        return self.watch.representation(jax.device_put(self.untrained))


def _check_finite(loop: _Loop, metrics: dict[str, np.ndarray], first_step: int) -> None:
    """Raises _Diverged with the first step and term that is NaN or infinite, and the layer."""
    if bad := what_is_bad(metrics, first_step, loop.plan.fault_places):
        raise _Diverged(bad)


def _train_epoch(loop: "_Loop", state: TrainState) -> TrainState:
    """Runs what is left of an epoch, adding up its metrics; returns early to stop or to save."""
    plan, progress, bar, clock = loop.plan, loop.progress, loop.bar, loop.clock
    order = plan.batches_of(progress["epoch"])[progress["count"] :]

    def collect(metrics, count):
        metrics = {name: np.atleast_1d(v)[:count] for name, v in jax.device_get(metrics).items()}
        progress["count"] += count
        done = progress["epoch"] * plan.steps_per_epoch + progress["count"]
        _check_finite(loop, metrics, done - count)
        del metrics[FAULT]
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
    with contextlib.closing(loop.runner.run(state, order, loop.hparams)) as pieces:
        for newest, metrics, count in pieces:
            state = newest
            if pending is not None:
                collect(*pending)
            pending = (metrics, count)
            loop.profile.piece_done(state.step, count)
            if any(loop.agreement.soon(*loop.wishes())):
                break
    if pending is not None:
        collect(*pending)
    clock.stop()
    loop.phases.add({"training": time.perf_counter() - began})
    return state


def _finish_epoch(loop: "_Loop", state: TrainState) -> dict[str, Any]:
    """Evaluates, writes the epoch's row, and turns the progress to the next epoch.

    Process 0 does, and all go by what it found.

    Args:
      state: whole, on one device.
    """
    row: dict[str, Any] = {}

    def finish() -> dict[str, Any]:
        row.update(_measured_epoch(loop, state))
        return {"progress": loop.progress, "collapse": row["watch/collapse"]}

    found = on_main(finish)
    loop.progress.update(found["progress"])
    # The last sum of an epoch is gone with it.
    loop.progress.pop("last_lr", None)
    return {**row, "watch/collapse": found["collapse"]}


def _measured_epoch(loop: "_Loop", state: TrainState) -> dict[str, Any]:
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


def _watch_collapse(loop: "_Loop", state: TrainState, means: dict[str, float]) -> dict[str, Any]:
    """What the watch sees, for the epoch's row; a collapse is named once, when it is first seen."""
    variables = variables_of(state)
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
    if plan.loss_type not in OBJECTIVES:
        return "try a stronger term against it, or a lower config.optim.lr"
    if remedy := OBJECTIVES[plan.loss_type].remedy:
        return f"try {remedy}, or a lower config.optim.lr"
    _, warning = plan.balance
    return warning or "try a lower config.optim.lr"


def is_over(plan: Plan, progress: dict[str, Any]) -> bool:
    """Whether the last epoch is done, or early stopping says so."""
    patience = plan.config.training.early_stop_epochs
    stale = progress["epoch"] - progress["best_epoch"]
    return progress["epoch"] >= plan.num_epochs or (0 < patience <= stale and plan.has_labels)


# --- all of them --------------------------------------------------------------------------------


def train(
    plan: Plan,
    state: TrainState,
    untrained: dict[str, Any],
    progress: dict[str, Any],
    checkpoints: checkpoint.Checkpoints | checkpoint.NoCheckpoints,
    session: Stopwatch,
    phases: Phases,
    profile: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """The epochs: steps, online evaluation, checkpoints, and a saved stop on a signal.

    Returns:
      (state, progress) at the end.

    Raises:
      TrainingError: when something became NaN or infinite, or the representation collapsed and the
        config asks to stop then.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    say(f"{'compiling':<10}the training step")
    with phases("compile"):
        runner = make_runner(plan, state)
    state, config = runner.place(state), plan.config
    with contextlib.ExitStack() as stack:
        if isinstance(plan.dataset.train_images, Records):
            # What decodes the stream would hold memory while the probes run.
            stack.callback(plan.dataset.train_images.close)
        stop = stack.enter_context(
            stop_on_signals("interrupted; the same command goes on from the last checkpoint")
        )
        writer = on_main(lambda: _make_writer(plan, int(state.step), progress), share=False)
        writer = writer or NoMetrics()
        stack.callback(writer.close)
        silent = config.logging.tqdm_silent or not is_main()
        bar = Progress(int(state.step), plan.num_steps, config.data.batch_size, silent=silent)
        stack.callback(bar.close)
        clock = Stopwatch(progress["train_seconds"])
        trace = Profile(plan.workdir / "profile" if profile and is_main() else None)
        stack.callback(trace.close)
        loop = _Loop(
            plan,
            runner,
            progress,
            checkpoints,
            session,
            clock,
            phases,
            writer,
            bar,
            stop,
            trace,
            untrained,
        )
        stop.deferring = True
        here = _all_epochs(loop, state)
        _wait_for_save(loop)
        stop.deferring = False
        if signal_number := loop.agreement.now(*loop.wishes())[0]:  # during that save
            _stop_early(loop, int(here.step), signal_number, None)
    return here, progress


def _make_writer(plan: Plan, step: int, progress: dict[str, Any]) -> MetricsWriter:
    logging = plan.config.logging
    return MetricsWriter(
        plan.workdir,
        step=step,
        run_id=progress["run_id"],
        config=plan.config.to_dict(),
        wandb=logging.log_wandb,
        tensorboard=logging.log_tensorboard,
    )


def _all_epochs(loop: "_Loop", state: TrainState) -> TrainState:
    """The epochs that are left; the state after them, whole and on one device."""
    plan, progress, logging = loop.plan, loop.progress, loop.plan.config.logging
    here = loop.runner.here(state)
    while not is_over(plan, progress):
        try:
            state = _train_epoch(loop, state)
        except _Diverged as error:
            state = loop.runner.place(_back_off(loop, error))
            continue
        here = loop.runner.here(state)
        row: dict[str, Any] = {}
        if progress["count"] == plan.steps_of(progress["epoch"]):
            row = _finish_epoch(loop, here)
        signal_number, save_is_due = loop.agreement.now(*loop.wishes())
        collapsed = logging.stop_on_collapse and row.get("watch/collapse")
        due = bool(row) and progress["epoch"] % logging.save_every == 0
        if due or save_is_due or signal_number or collapsed or is_over(plan, progress):
            _save(loop, here, row)
        if signal_number or collapsed:
            _stop_early(loop, int(here.step), signal_number, collapsed)
    return here


# --- what ends them early -----------------------------------------------------------------------


def _save(loop: _Loop, state: TrainState, row: dict[str, Any]) -> None:
    """Starts a save; a disk that does not take it is said, and does not end the training."""
    loop.saved_at = time.monotonic()
    with loop.phases("checkpoints"):
        loop.progress.update(train_seconds=loop.clock.seconds, total_seconds=loop.session.seconds)
        loop.progress["phases"] = dict(loop.phases.seconds)
        try:
            loop.checkpoints.save(int(state.step), state, loop.progress, row)
        except checkpoint.NotSavedError as error:
            say(f"{'warning':<10}{error}: training goes on, {_on_record(loop)}")


def _wait_for_save(loop: _Loop) -> None:
    """Returns once what is being saved is whole, or has been said not to be."""
    with loop.phases("checkpoints"):
        try:
            loop.checkpoints.wait()
        except checkpoint.NotSavedError as error:
            say(f"{'warning':<10}{error}: {_on_record(loop)}")


def _on_record(loop: _Loop) -> str:
    step = loop.checkpoints.latest_step()
    return "no step is on record" if step is None else f"on record is step {step}"


def _back_off(loop: _Loop, error: _Diverged) -> TrainState:
    """The last state on record, to go on from at half the rate; else the error, with advice.

    What is stored with the next checkpoint says how often that was done; a run that is killed
    before it diverges again at the same step, and does the same again.
    """
    plan, progress = loop.plan, loop.progress
    back_offs = progress["back_offs"] + 1
    loop.clock.stop()
    _wait_for_save(loop)
    on_record = f"{on_main(lambda: _on_record(loop))}, and is untouched"
    if plan.config.training.on_nan != "back_off":
        what = "the images" if "a view" in str(error) else "a lower config.optim.lr"
        raise TrainingError(f"{error}: try {what}; {on_record}")
    if back_offs > _MAX_BACK_OFFS:
        raise TrainingError(
            f"{error}, at a rate halved {_MAX_BACK_OFFS} times: try another config; {on_record}"
        )
    run_id = progress["run_id"]
    state, stored = starting_state(plan, loop.checkpoints, initial_state(plan))
    step = int(state.step)
    progress.clear()
    progress.update(stored, back_offs=back_offs, run_id=run_id)
    # The time that was lost stays on the clock, and an epoch's speed is that of its own steps.
    progress["epoch_began"] += loop.clock.seconds - progress["train_seconds"]
    loop.writer.go_back(step)
    loop.bar.go_back(step)
    say(
        f"{'warning':<10}{error}: back at step {step}, with the rate halved to "
        f"{plan.config.optim.lr / 2**back_offs:g} ({back_offs} of {_MAX_BACK_OFFS})"
    )
    return state


def _stop_early(
    loop: _Loop, step: int, signal_number: int, collapsed: str | bool | None
) -> NoReturn:
    """Raises, once what has been saved is whole."""
    _wait_for_save(loop)
    plan = loop.plan
    is_saved, on_record = on_main(
        lambda: (loop.checkpoints.latest_step() == step, _on_record(loop))
    )
    if not signal_number:
        raise TrainingError(collapsed_text(plan, collapsed, step))
    how = f"saved it in {plan.workdir}" if is_saved else f"could not save it: {on_record}"
    raise Interrupted(
        f"stopped at step {step} of {plan.num_steps} and {how}; the same command goes on from "
        "there",
        signal_number,
    )


def collapsed_text(plan: Plan, kind: str, step: int) -> str:
    """What ends a run that has collapsed, in words."""
    return (
        f"the run has collapsed ({kind}): stopped at step {step} of {plan.num_steps} and saved in "
        f"{plan.workdir}; --config.logging.stop_on_collapse=False goes on from there"
    )
