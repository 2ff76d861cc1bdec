"""The host loop: reads a config, trains, evaluates, writes files. It holds no maths.

`train_and_evaluate` reads top to bottom: check, data, model, state (fresh or resumed), compile,
epochs, final evaluation. Everything it decides is a function of the config, never of the clock, so
that a resumed run ends in the same state as one that was never interrupted.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import time
import uuid
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jepa_jax import checkpoint, device
from jepa_jax.augment import two_views
from jepa_jax.config import (
    SCHEMA_VERSION,
    changed_keys,
    compute_dtype,
    create_encoder,
    flatten,
    hparams_from,
    validate,
)
from jepa_jax.data import Dataset, choose_placement, epoch_order, load_dataset
from jepa_jax.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from jepa_jax.metrics import MetricsWriter, read_json, write_json
from jepa_jax.models import Encoder, ModelFns, patch_whitening_kernel
from jepa_jax.probes import accuracy
from jepa_jax.progress import Progress, Stopwatch, print_summary, say
from jepa_jax.representation import (
    evaluate_ridge,
    extract_features,
    reestimate_batch_stats,
    split_validation,
)
from jepa_jax.runner import Runner
from jepa_jax.signals import stop_on_signals
from jepa_jax.train_step import (
    RESERVED_METRICS,
    AugmentFn,
    HParams,
    LossFn,
    TrainState,
    create_train_state,
    make_train_step,
    probe_logits,
    stream_key,
    vicreg,
)

# Enough clean images for BatchNorm's moments and a stem's eigenvectors, cheap on any machine.
_NUM_CLEAN_IMAGES = 2000
# Steps of one scanned program, and images in it: long enough to hide the dispatch, short enough
# for a live bar and a prompt Ctrl-C.
_SCAN_STEPS, _SCAN_IMAGES = 32, 8192
# What decides what a network computes and leaves no trace in the shapes of its parameters.
_WITHOUT_SHAPE = ("model.stem_stride", "model.stem_padding", "model.stem_pool")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is fixed before the first step."""

    config: ConfigDict
    workdir: pathlib.Path
    dataset: Dataset
    encoder: Encoder
    hparams: HParams
    steps_per_epoch: int
    placement: str
    scan_steps: int
    augment_fn: AugmentFn
    loss_fn: LossFn
    init_from: str
    custom: dict[str, str]

    @property
    def num_epochs(self) -> int:
        return self.config.optim.epochs

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch

    @property
    def has_labels(self) -> bool:
        """Whether there is something to fit a probe to and something to choose on."""
        labels = self.dataset.train_labels
        splits = split_validation(self.dataset, self.config.data.num_val)
        return labels is not None and all((labels[split] >= 0).any() for split in splits)


def _name_of(thing: Any) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_sizes(config: ConfigDict, dataset: Dataset) -> None:
    num_train, batch_size = len(dataset.train_images), config.data.batch_size
    if batch_size > num_train:
        raise ConfigError(
            f"config.data.batch_size ({batch_size}) is larger than the {num_train} training images "
            f"of {dataset.name}"
        )
    if dataset.train_labels is not None and config.data.num_val >= num_train:
        raise ConfigError(
            f"config.data.num_val ({config.data.num_val}) leaves none of the {num_train} training "
            f"images of {dataset.name} to the probes"
        )


def _load(config: ConfigDict) -> Dataset:
    """The config's dataset, read into memory only if it will lie on the device."""
    load = functools.partial(
        load_dataset,
        config.data.dataset,
        data_dir=config.data.data_dir,
        num_workers=config.data.num_workers,
    )
    if config.data.placement == "device":
        return load()
    records = load(lazy=True)
    placement = choose_placement(config.data.placement, records.train_images.nbytes)
    return load() if placement == "device" else records


def _make_plan(config, workdir, dataset, loss_fn, encoder, augment_fn, init_from) -> _Plan:
    if dataset is None:
        dataset = _load(config)
    _check_sizes(config, dataset)
    placement = choose_placement(config.data.placement, dataset.train_images.nbytes)
    scan_steps = config.training.scan_steps
    if placement == "stream":
        if scan_steps > 1:
            raise ConfigError("config.training.scan_steps > 1 needs config.data.placement=device")
        scan_steps = 1
    elif not scan_steps:
        # On the CPU a convolution inside a scan takes a path some 60 times slower.
        scan_steps = 1
        if jax.default_backend() != "cpu":
            scan_steps = max(1, min(_SCAN_STEPS, _SCAN_IMAGES // config.data.batch_size))
    steps_per_epoch = len(dataset.train_images) // config.data.batch_size
    given = {"loss_fn": loss_fn, "encoder": encoder, "augment_fn": augment_fn}
    return _Plan(
        config=config,
        workdir=workdir,
        dataset=dataset,
        encoder=create_encoder(config, encoder),
        hparams=jax.device_put(hparams_from(config, steps_per_epoch)),
        steps_per_epoch=steps_per_epoch,
        placement=placement,
        scan_steps=scan_steps,
        augment_fn=augment_fn or two_views,
        loss_fn=loss_fn or vicreg,
        init_from=init_from or "",
        custom={name: _name_of(thing) for name, thing in given.items() if thing is not None},
    )


def _initial_state(plan: _Plan) -> TrainState:
    """The untrained state: a function of the seed and, for a whitening stem, of the images."""
    create = functools.partial(
        create_train_state,
        plan.encoder.model,
        image_shape=plan.dataset.image_shape,
        num_classes=plan.dataset.num_classes if plan.has_labels else 0,
        optimizer=plan.config.optim.name,
    )
    state = jax.jit(create)(plan.hparams)
    if plan.config.model.stem_init == "whitening" and "encoder" not in plan.custom:
        kernel = state.params["encoder"]["stem_conv"]["kernel"]
        images = plan.encoder.normalize(jnp.asarray(_clean_images(plan)))
        state.params["encoder"]["stem_conv"]["kernel"] = patch_whitening_kernel(
            images, kernel.shape[-1], patch_size=kernel.shape[0]
        )
    return state


def _clean_images(plan: _Plan) -> np.ndarray:
    """Training images at even distances: a dataset may be sorted by class."""
    images = plan.dataset.train_images
    stride = max(1, len(images) // _NUM_CLEAN_IMAGES)
    return np.asarray(images[::stride][:_NUM_CLEAN_IMAGES])


# --- resume -----------------------------------------------------------------------------------


def _new_progress() -> dict[str, Any]:
    return {
        "epoch": 0,
        "sums": {},
        "count": 0,
        "best_val_acc": -1.0,
        "best_epoch": 0,
        "epoch_began": 0.0,
        "train_seconds": 0.0,
        "total_seconds": 0.0,
        "run_id": uuid.uuid4().hex[:12],
    }


def _claim_workdir(plan: _Plan, has_checkpoint: bool) -> None:
    """Stores what the run is, or checks that the run whose checkpoint is there is this one."""
    path = plan.workdir / "config.json"
    identity = {
        "config": json.loads(plan.config.to_json()),
        "dataset": {
            "name": plan.dataset.name,
            "num_train": len(plan.dataset.train_images),
            "image_shape": list(plan.dataset.image_shape),
        },
        "custom": plan.custom,
        "init_from": plan.init_from,
    }
    if has_checkpoint:
        stored = read_json(path)
        changed = changed_keys(
            {**stored["config"], **{k: stored[k] for k in identity if k != "config"}},
            {**identity["config"], **{k: identity[k] for k in identity if k != "config"}},
        )
        if changed:
            raise CheckpointError(
                f"{plan.workdir} holds a run of another config ({'; '.join(changed)}): give "
                f"another --workdir, and --init_from={plan.workdir} to start from its parameters"
            )
        return
    # Of an earlier run, whose checkpoints somebody deleted.
    (plan.workdir / "summary.json").unlink(missing_ok=True)
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    environment = {
        "python": platform.python_version(),
        **versions,
        "device": device.describe(),
    }
    write_json(path, {**identity, "schema_version": SCHEMA_VERSION, "environment": environment})


def _resume(plan: _Plan, checkpoints: checkpoint.Checkpoints, state: TrainState):
    """(state, progress): from the latest checkpoint, from another run's parameters, or fresh."""
    step = checkpoints.latest_step()
    if step is not None:
        return checkpoints.restore(step, state)
    if plan.init_from:
        state = _with_parameters_of(plan, state)
    return state, _new_progress()


def _with_parameters_of(plan: _Plan, state: TrainState) -> TrainState:
    """The state with the parameters and statistics in `plan.init_from`.

    An encoder that was imported without a projector is trained under the fresh one.
    """
    workdir = pathlib.Path(plan.init_from).expanduser()
    stored = checkpoint.load_latest(workdir)
    given = {"params": stored["params"], "batch_stats": stored["batch_stats"] or {}}
    wanted = {"params": state.params, "batch_stats": state.batch_stats}
    if "encoder" in given["params"] and "projector" in set(state.params) - set(given["params"]):
        say(f"{'init':<10}{workdir} has no projector: a new one is trained")
        given = {kind: {**wanted[kind], **tree} for kind, tree in given.items()}

    try:
        for kind in ("params", "batch_stats"):
            checkpoint.check_shapes(checkpoint.shapes_of({kind: given[kind]}), {kind: wanted[kind]})
    except ValueError as error:
        raise CheckpointError(f"--init_from={workdir} holds another model: {error}") from error
    _check_same_network(plan, workdir)
    given = jax.tree.map(jnp.asarray, given)
    return dataclasses.replace(state, **given)


def _check_same_network(plan: _Plan, workdir: pathlib.Path) -> None:
    """Refuses parameters that fit, but were trained in a network of other strides or padding."""
    path = workdir / "config.json"
    if "encoder" in plan.custom or not path.exists():
        return
    stored = flatten(read_json(path).get("config", {}))
    own = flatten(json.loads(plan.config.to_json()))
    differing = {
        name: f"{name} was {stored[name]} there and is {own[name]} here"
        for name in (*_WITHOUT_SHAPE, "data.mean", "data.std")
        if name in stored and stored[name] != own[name]
    }
    if lines := [differing[name] for name in _WITHOUT_SHAPE if name in differing]:
        raise CheckpointError(f"--init_from={workdir} holds another model: {'; '.join(lines)}")
    for line in differing.values():
        say(f"{'note':<10}{line}: the images are normalised otherwise")


# --- steps ------------------------------------------------------------------------------------


def _make_runner(plan: _Plan, state: TrainState) -> Runner:
    train_step = make_train_step(
        plan.encoder.model,
        augment_fn=plan.augment_fn,
        mean=plan.encoder.mean,
        std=plan.encoder.std,
        loss_fn=plan.loss_fn,
        optimizer=plan.config.optim.name,
    )
    return Runner(
        train_step,
        state,
        plan.hparams,
        plan.dataset.train_images,
        _training_labels(plan),
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.config.data.batch_size,
        placement=plan.placement,
        scan_steps=plan.scan_steps,
    )


def _training_labels(plan: _Plan) -> np.ndarray:
    """Labels for the online probe: -1, no label, for the images held out for validation."""
    num_train = len(plan.dataset.train_images)
    if not plan.has_labels:
        return np.full(num_train, -1, np.int32)
    labels = np.array(plan.dataset.train_labels, np.int32)
    _, val = split_validation(plan.dataset, plan.config.data.num_val)
    labels[val] = -1
    return labels


def _check_finite(metrics: dict[str, np.ndarray], last_step: int, count: int) -> None:
    """Raises TrainingError that names the first step and term that is NaN or infinite."""
    terms = [name for name in metrics if name not in RESERVED_METRICS]
    watched = [*terms, "loss", "grad_norm"]
    is_bad = np.stack([~np.isfinite(metrics[name]) for name in watched])
    if is_bad.any():
        first = int(np.argmax(is_bad.any(axis=0)))
        name = watched[int(np.argmax(is_bad[:, first]))]
        raise TrainingError(
            f"{name} became {metrics[name][first]} at step {last_step - count + first}: try a "
            "lower config.optim.lr; the last good checkpoint is untouched"
        )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _order(seed, epoch, num_images: int, batch_size: int) -> jax.Array:
    return epoch_order(stream_key(seed, "order", epoch), num_images, batch_size)


def _train_epoch(plan, runner, state, progress, bar, stop, clock) -> TrainState:
    """Runs what is left of an epoch, adding its metrics to `progress`; returns early on a stop."""
    order = _order(
        plan.hparams.seed,
        jax.device_put(np.uint32(progress["epoch"])),
        len(plan.dataset.train_images),
        plan.config.data.batch_size,
    )
    order = jax.device_get(order)[progress["count"] :]

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
        bar.update(count, now - last, float(metrics["loss"][-1]))
        bar.expect(count, now - last, plan.num_steps - done)
        last = now

    clock.start()
    last = time.perf_counter()
    # The metrics of one piece are fetched while the next one runs: the device never waits.
    pending = None
    with contextlib.closing(runner.run(state, order)) as pieces:
        for newest, metrics, count in pieces:
            state = newest
            if pending is not None:
                collect(*pending)
            pending = (metrics, count)
            if stop.signal_number:
                break
    if pending is not None:
        collect(*pending)
    clock.stop()
    return state


# --- evaluation and files ---------------------------------------------------------------------


def _variables(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _online_probe(plan: _Plan, state: TrainState) -> dict[str, float]:
    """Accuracy of the online probe, by the running statistics, on every labelled split."""
    if not plan.has_labels:
        return {}
    dataset = plan.dataset
    _, val = split_validation(dataset, plan.config.data.num_val)
    splits = {"val": (dataset.train_images[val], dataset.train_labels[val])}
    if dataset.test_labels is not None:
        splits["test"] = (dataset.test_images, dataset.test_labels)
    row = {}
    for split, (images, labels) in splits.items():
        h = extract_features(plan.encoder.apply, _variables(state), images)
        logits = probe_logits(state.probe.params, h)
        row[f"{split}/online_probe_acc"] = float(accuracy(logits, jnp.asarray(labels)))
    return row


def _finish_epoch(plan, state, progress, writer, bar, clock, session) -> dict[str, float]:
    """Evaluates, writes the epoch's row, and turns `progress` to the next epoch."""
    means = {name: total / progress["count"] for name, total in progress["sums"].items()}
    means["lr"] = progress.pop("last_lr")
    images = progress["count"] * plan.config.data.batch_size
    seconds = clock.seconds - progress["epoch_began"]
    progress.update(epoch=progress["epoch"] + 1, sums={}, count=0, epoch_began=clock.seconds)
    row = {
        "step": progress["epoch"] * plan.steps_per_epoch,
        "epoch": progress["epoch"],
        **{f"train/{name}": value for name, value in means.items()},
        **_online_probe(plan, state),
        "images_per_second": images / seconds,
        "train_seconds": clock.seconds,
        "total_seconds": session.seconds,
    }
    val_acc = row.get("val/online_probe_acc")
    if val_acc is not None and val_acc > progress["best_val_acc"]:
        progress.update(best_val_acc=val_acc, best_epoch=progress["epoch"])
    writer.write(row)
    every = plan.config.logging.log_every
    is_last = progress["epoch"] == plan.num_epochs
    bar.epoch(row, plan.num_epochs, as_line=is_last or progress["epoch"] % every == 0)
    return row


def _is_over(plan: _Plan, progress: dict[str, Any]) -> bool:
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


def _evaluate_final(plan, state, untrained, progress, session) -> dict[str, Any]:
    """Ridge probes of the last step and of the untrained network; writes `encoder/`, summary."""
    say("evaluating the last step and the same network untrained by ridge probe ...")
    images = _clean_images(plan)
    trained = reestimate_batch_stats(plan.encoder, _variables(state), images)
    summary: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    if plan.has_labels:
        untrained = reestimate_batch_stats(plan.encoder, jax.device_put(untrained), images)
        num_val = plan.config.data.num_val
        for name, variables in (("", trained), ("untrained_", untrained)):
            ridge = evaluate_ridge(plan.encoder, variables, plan.dataset, num_val=num_val)
            summary[f"{name}ridge_probe_acc"] = ridge.get("test_acc")
            summary[f"val_{name}ridge_probe_acc"] = ridge["val_acc"]
            summary[f"{name}ridge_lambda"] = ridge["lambda"]
            summary["feature_dim"] = ridge["feature_dim"]
        online = _online_probe(plan, state)
        summary["online_probe_acc"] = online.get("test/online_probe_acc")
        summary["val_online_probe_acc"] = online["val/online_probe_acc"]
    steps = int(state.step)
    checkpoint.save_tree(plan.workdir / "encoder", trained)
    summary.update(
        seed=plan.config.meta.seed,
        steps=steps,
        epochs=progress["epoch"],
        train_seconds=progress["train_seconds"],
        total_seconds=session.seconds,
        images_per_second=steps * plan.config.data.batch_size / progress["train_seconds"],
        params_digest=params_digest(state.params),
    )
    write_json(plan.workdir / "summary.json", summary)
    return summary


# --- what a person reads ----------------------------------------------------------------------


def _print_header(plan: _Plan, state: TrainState, progress: dict[str, Any]) -> None:
    config, dataset = plan.config, plan.dataset
    height, width, _ = dataset.image_shape
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    num_test = len(dataset.test_images) if dataset.test_images is not None else 0
    place = "resident on the device" if plan.placement == "device" else "streamed"
    loss = config.loss
    weights = f"{loss.sim_coeff:g}/{loss.std_coeff:g}/{loss.cov_coeff:g}"
    lines = {
        "device": device.describe(),
        "data": f"{dataset.name}, {len(dataset.train_images)} training images of {height}x{width}, "
        f"{num_test} test images, {place}",
        "model": f"{plan.custom.get('encoder', config.model.type)}, {parameters:,} parameters, "
        f"computing in {compute_dtype(config).__name__}",
        "loss": plan.custom.get("loss_fn", f"{config.loss.type} {weights}"),
        "optimiser": f"{config.optim.name}, rate {config.optim.lr:g}, batch "
        f"{config.data.batch_size}, {plan.num_epochs} epochs = {plan.num_steps} steps",
        "workdir": str(plan.workdir),
    }
    if progress["epoch"] or progress["count"]:
        lines["resumed"] = f"at step {int(state.step)}"
    elif plan.init_from:
        lines["init"] = f"parameters of {plan.init_from}"
    lines["config"] = f"{plan.workdir / 'config.json'} has every value"
    for name, text in lines.items():
        say(f"{name:<10}{text}")
    if jax.default_backend() == "cpu" and compute_dtype(config) is jnp.bfloat16:
        say(f"{'note':<10}bfloat16 is emulated here; config.training.use_amp=False may be faster")


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


def _train(plan, state, progress, checkpoints, session) -> tuple[TrainState, dict[str, Any]]:
    """The epochs: steps, online evaluation, checkpoints, and a saved stop on a signal."""
    say(f"{'compiling':<10}the training step")
    runner = _make_runner(plan, state)
    config = plan.config
    clock = Stopwatch(progress["train_seconds"])
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
        stop.deferring = True
        while not _is_over(plan, progress):
            state = _train_epoch(plan, runner, state, progress, bar, stop, clock)
            row: dict[str, float] = {}
            if progress["count"] == plan.steps_per_epoch:
                row = _finish_epoch(plan, state, progress, writer, bar, clock, session)
            due = bool(row) and progress["epoch"] % config.logging.save_every == 0
            if due or stop.signal_number or _is_over(plan, progress):
                progress.update(train_seconds=clock.seconds, total_seconds=session.seconds)
                checkpoints.save(int(state.step), state, progress, row)
            if stop.signal_number:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped at step {int(state.step)} of {plan.num_steps} and saved it in "
                    f"{plan.workdir}; the same command goes on from there",
                    stop.signal_number,
                )
        checkpoints.wait()
    return state, progress


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    dataset: Dataset | None = None,
    loss_fn: LossFn | None = None,
    encoder: nn.Module | ModelFns | None = None,
    augment_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    init_from: str | None = None,
) -> TrainState:
    """Pretrains, evaluates, and writes everything to `workdir`; resumes what it finds there.

    Args:
      config: see `configs/`. `meta.device` is for the command: a caller has chosen already.
      workdir: the run's folder; created. The same call again goes on where the run stopped, and
        ends, on the same CPU, in the same bits as if it had never stopped.
      dataset: in place of the config's, see `jepa_jax.data.from_arrays`.
      loss_fn: (key, z1 [B, D], z2 [B, D], hparams) -> (loss, terms), in place of the config's.
      encoder: a Linen module called as encoder(images, train) -> h [B, F], or a `ModelFns`.
      augment_fn: (key, images uint8 [B, H, W, 3]) -> (x1, x2) in [0, 1], in place of `two_views`.
      init_from: another run's workdir, whose parameters the run starts from.

    Returns:
      the state after the last step.

    Raises:
      ConfigError, DataError, CheckpointError: one line each; nothing was trained.
      TrainingError: a loss became NaN or infinite; names the term and the step.
      Interrupted: on SIGINT or SIGTERM, after saving.
    """
    session = Stopwatch()
    session.start()
    validate(config)
    workdir = _prepare_workdir(workdir)
    plan = _make_plan(config, workdir, dataset, loss_fn, encoder, augment_fn, init_from)
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        _claim_workdir(plan, checkpoints.latest_step() is not None)
        state = _initial_state(plan)
        untrained = jax.device_get(_variables(state))
        state, progress = _resume(plan, checkpoints, state)
        session.add(progress["total_seconds"])
        _print_header(plan, state, progress)
        if not _is_over(plan, progress):
            state, progress = _train(plan, state, progress, checkpoints, session)
    summary_path = workdir / "summary.json"
    if summary_path.exists():
        summary = read_json(summary_path)
        say("this run is finished; another --workdir starts a new one")
    else:
        summary = _evaluate_final(plan, state, untrained, progress, session)
    print_summary(summary, workdir)
    return state
