"""The host loop: reads a config, trains, evaluates, writes files. It holds no maths.

`train_and_evaluate` reads top to bottom: check, data, model, state (fresh or resumed), compile,
epochs, final evaluation. Everything it decides is a function of the config, never of the clock, so
that a resumed run ends in the same state as one that was never interrupted.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from jepa_jax import checkpoint, device, loop
from jepa_jax.config import SCHEMA_VERSION, compute_dtype, num_local_crops, validate
from jepa_jax.data import Dataset
from jepa_jax.distributed import Layout, is_main, on_main
from jepa_jax.errors import ConfigError, TrainingError
from jepa_jax.evaluation import evaluate_representation, with_online_probe
from jepa_jax.lock import only_process_in
from jepa_jax.loop import collapsed_text, is_over, online_probe, variables_of
from jepa_jax.metrics import read_json, write_json
from jepa_jax.models import EncoderFns, ModelFns
from jepa_jax.objectives import described
from jepa_jax.paths import home_expanded
from jepa_jax.plan import (
    Plan,
    check_alike,
    claim_workdir,
    clean_images,
    initial_state,
    make_plan,
    starting_state,
    store_where_it_goes_on,
)
from jepa_jax.progress import Phases, Stopwatch, print_summary, quiet, say
from jepa_jax.representation import reestimate_batch_stats
from jepa_jax.train_step import LossFn, TrainState

# Phases beside the steps that make the weights what they are: a stem's eigenvectors, BatchNorm.
_ON_THE_CLOCK = ("initial state", "re-estimation")

_PLACES = {
    "device": "resident on the device",
    "host": "in the host's memory",
    "stream": "streamed",
}


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
        trained = reestimate_batch_stats(plan.encoder, variables_of(state), images)
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
    place = _PLACES[plan.placement]
    num_views = config.data.num_views
    of_views = "" if num_views == 2 else f" of {num_views} views each"
    if count := num_local_crops(config):
        of_views = f" of {num_views} views and {count} local crops each"
    weights, warning = plan.balance
    loss = plan.custom.get("loss_fn", described(config.loss))
    if weights:
        loss = f"{plan.loss_type}, balance {weights} (the paper's is 1 : 1 : 0.04)"
    lines = {
        "device": _described(plan.layout),
        "data": f"{dataset.name}, {len(dataset.train_images)} training images of {height}x{width}, "
        f"{num_test} test images, {_classes(dataset)}, {place}",
        "model": f"{plan.custom.get('encoder', config.model.type)}, {parameters:,} parameters, "
        f"computing in {compute_dtype(config).__name__}",
        "loss": loss,
        **_of_predictor(config),
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


def _of_predictor(config: ConfigDict) -> dict[str, str]:
    """What is predicted, of which network and at what weight; nothing without a predictor."""
    model = config.model
    if not model.predictor:
        return {}
    what = "four blocks of patches" if model.mask == "blocks" else "the other view"
    whose = f"a target network of momentum {model.target_ema:g} to 1"
    if not model.target_ema:
        whose = "the network itself, its gradient stopped"
    return {"predictor": f"of {what} as seen by {whose}; weight {config.loss.pred_coeff:g}"}


def _classes(dataset: Dataset) -> str:
    names = dataset.label_names
    if dataset.train_labels is None or not names:
        return "no labels"
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return f"{len(names)} class{'es' * (len(names) != 1)} ({shown})"


def _described(layout: Layout) -> str:
    """The devices in words, as '2 processes with 8 NVIDIA H100 (gpu) in all'."""
    if layout.is_single:
        return device.describe()
    processes = f"{jax.process_count()} processes with " if jax.process_count() > 1 else ""
    kind = f"{layout.devices[0].device_kind} ({layout.devices[0].platform})"
    in_all = " in all" if processes else ""
    return f"{processes}{len(layout.devices)} devices{in_all}, {kind}"


# --- the whole ---------------------------------------------------------------------------------


def prepare_workdir(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder as an absolute path, made where it is missing.

    Raises:
      ConfigError: if it cannot be written.
    """
    workdir = home_expanded(workdir).absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    return workdir


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    dataset: Dataset | None = None,
    loss_fn: LossFn | None = None,
    encoder: nn.Module | EncoderFns | ModelFns | None = None,
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
        data.num_views = 2P, [P * B, D], rows n, n + B, ... of both being views of image n. With
        data.num_local_crops or loss.pairing=mean it is always of two views, see `pairing`.
      encoder: a Linen module called as encoder(images, train) -> h [B, F], an `EncoderFns`, or a
        whole `ModelFns`; a config names one by model.type=my_module:my_encoder.
      augment_fn: (key, images uint8 [B, H, W, 3]) -> (x1, x2) in [0, 1], in place of `two_views`;
        data.view_size then counts as 0; with data.num_views = 2P both are [P * B, ...], as
        `pairs_of_views` stacks them, and with data.num_local_crops a third batch follows, as
        `multi_crop_views` has it.
      init_from: another run's workdir, whose parameters the run starts from.
      profile: whether to write a trace of a few steps to workdir/profile, see `profile.Profile`.

    Returns:
      the state after the last step.

    Raises:
      ConfigError, DataError, CheckpointError: one line each; nothing was trained. Among them:
        another process is at work in the folder.
      TrainingError: something became NaN or infinite; names the term, the step and the layer.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    validate(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(not is_main()))

        def claim() -> str:
            own = prepare_workdir(workdir)
            stack.enter_context(only_process_in(own))
            return str(own)

        own = pathlib.Path(on_main(claim))
        return _run(config, own, dataset, loss_fn, encoder, augment_fn, init_from, profile)


def _run(config, workdir, dataset, loss_fn, encoder, augment_fn, init_from, profile) -> TrainState:
    """`train_and_evaluate`, in a folder that is this run's own."""
    session, phases = Stopwatch(), Phases()
    session.start()
    with phases("setup"):
        plan = make_plan(
            config, workdir, dataset, loss_fn, encoder, augment_fn, init_from, jax.devices()
        )
        check_alike(plan)

    def opened():
        return checkpoint.Checkpoints(workdir)

    with contextlib.closing(on_main(opened, share=False) or checkpoint.NoCheckpoints()) as kept:
        with phases("setup"):
            is_resumed = on_main(lambda: _claimed(plan, kept))
        with phases("compile"):
            # Thrown away: the next phase is on the run's clock, and compiling is not.
            jax.block_until_ready(initial_state(plan))
        with phases("initial state"):
            state = jax.block_until_ready(initial_state(plan))
        with phases("setup"):
            untrained = jax.device_get(variables_of(state))
            state, progress = starting_state(plan, kept, state)
            if is_resumed:
                on_main(lambda: _go_on(workdir))
        session.add(progress["total_seconds"])
        phases.add(progress["phases"])
        _print_header(plan, state, progress)
        if plan.config.logging.stop_on_collapse and progress["collapse"]:
            raise TrainingError(collapsed_text(plan, progress["collapse"], int(state.step)))
        if not is_over(plan, progress):
            state, progress = loop.train(
                plan, state, untrained, progress, kept, session, phases, profile
            )

    def finish() -> None:
        print_summary(_summary(plan, state, untrained, progress, session, phases), workdir)

    on_main(finish)
    return state


def _claimed(plan: Plan, checkpoints: checkpoint.Checkpoints | checkpoint.NoCheckpoints) -> bool:
    """Whether the run goes on, once its folder says what it is."""
    is_resumed = checkpoints.latest_step() is not None
    claim_workdir(plan, is_resumed)
    return is_resumed


def _go_on(workdir: pathlib.Path) -> None:
    """Stores where, of a run that is not finished."""
    if not (workdir / "summary.json").exists():
        store_where_it_goes_on(workdir)


def _summary(plan, state, untrained, progress, session, phases) -> dict[str, Any]:
    """That on record, or of an evaluation now."""
    path = plan.workdir / "summary.json"
    if path.exists():
        say("this run is finished; another --workdir starts a new one")
        return read_json(path)
    return _evaluate_final(plan, state, untrained, progress, session, phases)
