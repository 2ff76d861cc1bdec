"""All that is fixed before a run's first step: data, model, numbers, and the state it starts from.

That state is fresh, the one of the last checkpoint, or fresh with another run's parameters.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from ml_collections import ConfigDict

from jepa_jax import checkpoint
from jepa_jax.augment import multi_crop_views, pairs_of_views, resize_images
from jepa_jax.config import (
    SCHEMA_VERSION,
    blur_kernel,
    changed_keys,
    check_stored,
    create_encoder,
    flatten,
    has_blur,
    has_target,
    hparams_from,
    local_side,
    num_local_crops,
    view_options,
)
from jepa_jax.data import Dataset, Records, choose_placement, epoch_order, load_dataset
from jepa_jax.distributed import (
    Agreement,
    Layout,
    arrays_from_main,
    check_batch,
    from_main,
    on_main,
)
from jepa_jax.encoders import check_encoder, is_own, model_type
from jepa_jax.environment import describe_environment
from jepa_jax.errors import CheckpointError, ConfigError, JepaError
from jepa_jax.evaluation import has_labels
from jepa_jax.masks import block_sides
from jepa_jax.metrics import read_json, write_json
from jepa_jax.models import PREDICTOR, Encoder, patch_whitening_kernel, without_predictor
from jepa_jax.objectives import make_loss_fn, term_weights
from jepa_jax.pairing import lifted
from jepa_jax.paths import home_expanded
from jepa_jax.progress import say
from jepa_jax.representation import labelled, split_validation
from jepa_jax.train_step import (
    AugmentFn,
    HParams,
    LossFn,
    TrainState,
    check_scalars,
    create_train_state,
    fault_places,
    fresh_target,
    stream_key,
)
from jepa_jax.vit import VIT_SIZES
from jepa_jax.watch import loss_balance

# Enough clean images for BatchNorm's moments and a stem's eigenvectors, cheap on any machine.
_NUM_CLEAN_IMAGES = 2000
# Steps of one scanned program, and images in it: long enough to hide the dispatch, short enough
# for a live bar and a prompt Ctrl-C.
_SCAN_STEPS, _SCAN_IMAGES = 32, 8192
# Of the `data` section: what decides which images there are and where they lie.
DATASET_KEYS = (
    "dataset",
    "data_dir",
    "placement",
    "num_workers",
    "image_size",
    "train_split",
    "unlabelled_split",
    "test_split",
    "max_broken",
    "num_train",
)
# What decides what a network computes and leaves no trace in the shapes of its parameters.
_WITHOUT_SHAPE = (
    "model.stem_stride",
    "model.stem_padding",
    "model.stem_pool",
    "model.pos_embed",
)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _order(seed, epoch, num_images: int, batch_size: int) -> jax.Array:
    return epoch_order(stream_key(seed, "order", epoch), num_images, batch_size)


# Of a few networks: the plans of a sweep share what is compiled.
@functools.lru_cache(maxsize=4)
def _state_creator(model, image_shape, num_classes: int, optimizer: str, with_target: bool):
    create = functools.partial(
        create_train_state,
        model,
        image_shape=image_shape,
        num_classes=num_classes,
        optimizer=optimizer,
        has_target=with_target,
    )
    return jax.jit(create)


@functools.lru_cache(maxsize=4)
def _apply_at(encoder: Encoder, size: int):
    return jax.jit(lambda variables, images: encoder.apply(variables, resize_images(images, size)))


@dataclasses.dataclass(frozen=True)
class Plan:
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
    layout: Layout

    @property
    def num_steps(self) -> int:
        return round(self.config.optim.epochs * self.steps_per_epoch)

    @property
    def num_epochs(self) -> int:
        """The last one included, which may be shorter."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    @property
    def loss_type(self) -> str:
        """The config's; '' where a loss was given in its place."""
        return "" if "loss_fn" in self.custom else self.config.loss.type

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of every term, by name; {} of a loss of one's own."""
        return term_weights(self.config.loss) if self.loss_type else {}

    @property
    def balance(self) -> tuple[str, str]:
        """Of `loss_balance`, for VICReg's weights; two empty texts for another loss.

        A predictor of the other view pulls the views together as the invariance term does, and is
        counted with it; of blocks nothing is known beside which to hold the weights.
        """
        if self.loss_type != "vicreg" or self.config.model.mask != "none":
            return "", ""
        loss, names = self.config.loss, ("sim_coeff", "std_coeff", "cov_coeff")
        weights = {name: loss[name] for name in names}
        weights["sim_coeff"] += loss.pred_coeff if self.config.model.predictor else 0.0
        return loss_balance(self.embedding_dim, **weights)

    @property
    def feature_dim(self) -> int:
        """F of the representation that the probes see."""
        return self._dims[0]

    @property
    def embedding_dim(self) -> int:
        """D of the embedding that the loss sees."""
        return self._dims[1]

    @functools.cached_property
    def _dims(self) -> tuple[int, int]:
        images = jnp.zeros((2, *self.dataset.image_shape), jnp.float32)

        def embed(key):
            return self.encoder.model.apply(self.encoder.model.init(key, images), images, False)[0]

        h, z = jax.eval_shape(embed, stream_key(self.hparams.seed, "init"))
        return h.shape[-1], z.shape[-1]

    @functools.cached_property
    def fault_places(self) -> list[str]:
        """Of `train_step.fault_places`."""
        return fault_places(jax.eval_shape(self.create_state, self.hparams).params)

    @property
    def views_fn(self) -> AugmentFn:
        """`augment_fn` with the strengths of this config: (key, images) -> two views."""
        if "augment_fn" in self.custom:
            return self.augment_fn
        return functools.partial(self.augment_fn, **view_options(self.config))

    @property
    def apply_as_trained(self) -> Callable[[Any, jax.Array], jax.Array]:
        """`encoder.apply` of images made as large as the views, to which its statistics belong."""
        size = self.config.data.view_size
        return _apply_at(self.encoder, size) if size else self.encoder.apply

    @property
    def create_state(self) -> Callable[[HParams], TrainState]:
        """Draws the first parameters and what goes with them; compiled once."""
        num_classes = self.dataset.num_classes if self.has_labels else 0
        name, shape = self.config.optim.name, self.dataset.image_shape
        return _state_creator(self.encoder.model, shape, num_classes, name, has_target(self.config))

    def with_numbers(self, config: ConfigDict, workdir: pathlib.Path) -> "Plan":
        """The plan of a config that differs in traced numbers alone: it shares what is compiled."""
        has_own_views = "augment_fn" not in self.custom
        if has_own_views and has_blur(config) != has_blur(self.config):
            raise ValueError("views with a blur and views without one are two programs")
        hparams = _hparams(config, self.steps_per_epoch, has_own_views)
        return dataclasses.replace(self, config=config, workdir=workdir, hparams=hparams)

    def steps_of(self, epoch: int) -> int:
        """Of epoch number `epoch`, from 0."""
        return min(self.steps_per_epoch, self.num_steps - epoch * self.steps_per_epoch)

    def batches_of(self, epoch: int) -> np.ndarray:
        """The dataset indices, int32 [S, B], of the steps of epoch number `epoch`, from 0."""
        order = _order(
            self.hparams.seed,
            jax.device_put(np.uint32(epoch)),
            len(self.dataset.train_images),
            self.config.data.batch_size,
        )
        return jax.device_get(order)[: self.steps_of(epoch)]

    @property
    def has_labels(self) -> bool:
        """Whether there is something to fit a probe to and something to choose on."""
        return has_labels(self.dataset, *split_validation(self.dataset, self.config.data.num_val))


def _hparams(config: ConfigDict, steps_per_epoch: int, has_own_views: bool) -> HParams:
    """On the device; the augmentation's strengths are for the config's own views alone."""
    hparams = hparams_from(config, steps_per_epoch)
    if has_own_views:
        strengths = jax.tree.map(np.float32, view_options(config))
        hparams = dataclasses.replace(hparams, augment=strengths)
    return jax.device_put(hparams)


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
    num_labelled = labelled(dataset).sum()
    if dataset.train_labels is not None and config.data.num_val >= num_labelled:
        which = "" if num_labelled == num_train else "labelled "
        raise ConfigError(
            f"config.data.num_val ({config.data.num_val}) leaves none of the {num_labelled} "
            f"{which}training images of {dataset.name} to the probes: a fifth of them is "
            f"--config.data.num_val={max(num_labelled // 5, 1)}"
        )


def _check_patches(config: ConfigDict, dataset: Dataset) -> None:
    """Images and views are cut into patches by a transformer."""
    if model_type(config.model) not in VIT_SIZES:
        return
    patch, view = config.model.patch_size, config.data.view_size
    sides = {"images": dataset.image_shape[:2], "views (config.data.view_size)": (view, view)}
    for what, (height, width) in sides.items():
        if height % patch or width % patch:
            raise ConfigError(
                f"config.model.patch_size={patch} does not divide {what} of {height} x {width} "
                "pixels"
            )


def _check_blocks(config: ConfigDict, encoder: Any, augment_fn: AugmentFn, dataset) -> None:
    """Views that are to be masked by blocks have enough patches for them."""
    if config.model.mask == "none":
        return
    images = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.uint8)
    height, width = jax.eval_shape(augment_fn, jax.random.key(0), images)[0].shape[1:3]
    patch = config.model.patch_size if encoder is None else encoder.patch_size
    try:
        block_sides((height // patch, width // patch))
    except ValueError as error:
        raise ConfigError(
            f"config.model.mask={config.model.mask}: {error}; make config.data.view_size larger or "
            "config.model.patch_size smaller"
        ) from error


def _views_of(config: ConfigDict, dataset: Dataset) -> AugmentFn:
    """The config's own augmentation, without its strengths."""
    side = config.data.view_size or dataset.image_shape[0]
    options = {
        "num_pairs": config.data.num_views // 2,
        "size": config.data.view_size or None,
        "blur_kernel": blur_kernel(config, side),
    }
    count = num_local_crops(config)
    if not count:
        return functools.partial(pairs_of_views, **options)
    size = local_side(config, side)
    return functools.partial(
        multi_crop_views,
        num_local_crops=count,
        local_size=size,
        local_blur_kernel=blur_kernel(config, size),
        **options,
    )


def _loss_of(config: ConfigDict, loss_fn: LossFn | None) -> LossFn:
    """The loss of the embeddings of all batches of views, from one of two views or the config's.

    Without local crops, and over pairs, it is given the stacked pairs as they are.
    """
    num_pairs = config.data.num_views // 2
    pairing = config.loss.get("pairing", "pairs")
    if num_local_crops(config) or pairing != "pairs":
        return lifted(loss_fn or make_loss_fn(config.loss, 1), pairing, num_pairs=num_pairs)
    return loss_fn or make_loss_fn(config.loss, num_pairs)


def _check_local(encoder: Encoder, augment_fn: AugmentFn, dataset: Dataset) -> None:
    """Refuses an encoder that cannot see the local crops with the parameters that it has."""
    crops = _shapes_of_views(augment_fn, 2, dataset)[2]

    def embed(key):
        images = jnp.zeros((2, *dataset.image_shape), jnp.float32)
        return encoder.model.apply(encoder.model.init(key, images), jnp.zeros(crops.shape), True)

    try:
        jax.eval_shape(embed, jax.random.key(0))
    except (FlaxError, JepaError, TypeError, ValueError) as error:
        height, width, _ = crops.shape[1:]
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the encoder takes no local crops of {height}x{width} pixels, see "
            f"config.data.local_size: {reason}"
        ) from error


def _shapes_of_views(augment_fn: AugmentFn, num_images: int, dataset: Dataset) -> Any:
    images = jax.ShapeDtypeStruct((num_images, *dataset.image_shape), jnp.uint8)
    return jax.eval_shape(augment_fn, jax.random.key(0), images)


def _check_views(augment_fn: AugmentFn, config: ConfigDict, dataset: Dataset) -> None:
    num_images = config.data.batch_size
    first, _, *others = _shapes_of_views(augment_fn, num_images, dataset)
    found = {
        "num_views": ("views", 2 * len(first) / num_images),
        "num_local_crops": ("local crops", sum(map(len, others)) / num_images),
    }
    for key, (what, count) in found.items():
        if count != config.data[key]:
            raise ConfigError(
                f"augment_fn makes {count:g} {what} of an image; config.data.{key} is "
                f"{config.data[key]}"
            )


def load_fitting(
    name: str, *, placement: str = "auto", num_train: int = 0, **options: Any
) -> Dataset:
    """`load_dataset` with `num_train` images, in memory unless they are to be streamed.

    Args:
      name, options: of `load_dataset`.
      placement: see `choose_placement`.
      num_train: see `Dataset.with_num_train`.
    """

    def load(lazy: bool) -> Dataset:
        return load_dataset(name, lazy=lazy, **options).with_num_train(num_train)

    if placement in ("device", "host"):
        return load(False)
    records = load(True)
    placement = choose_placement(placement, records.train_images.nbytes)
    return records if placement == "stream" else load(False)


def load_configured(data: Mapping[str, Any], **changes: Any) -> Dataset:
    """The dataset that the `data` section of a config describes.

    Args:
      data: also that of an older run, which lacks some keys.
      changes: values in place of the section's.
    """
    data = {**data, **changes}
    options = {name: data[name] for name in DATASET_KEYS if name != "dataset" and name in data}
    return load_fitting(data["dataset"], **options)


def make_plan(
    config, workdir, dataset, loss_fn, encoder, augment_fn, init_from, devices=None
) -> Plan:
    """What `train_and_evaluate` was called with, checked against the data and filled in.

    Args:
      devices: that share every batch; the first local one alone if None.

    Raises:
      ConfigError: for sizes that do not go together.
      DataError: for a dataset that cannot be read.
    """
    if dataset is None:
        dataset = load_configured(config.data)
    else:
        dataset = dataset.with_num_train(config.data.num_train)
    _check_sizes(config, dataset)
    if encoder is None:
        _check_patches(config, dataset)
    model = create_encoder(config, encoder)
    if encoder is not None or is_own(config.model):
        name = (
            _name_of(encoder) if encoder is not None else f"config.model.type={config.model.type}"
        )
        view_size = config.data.view_size if augment_fn is None else 0
        check_encoder(model.model, name, dataset.image_shape, view_size)
    devices = devices or jax.local_devices()[:1]
    check_batch(config.data.batch_size, len(devices), config.training.microbatches)
    placement = choose_placement(config.data.placement, dataset.train_images.nbytes)
    scan_steps = config.training.scan_steps
    if placement != "device":
        if scan_steps > 1:
            raise ConfigError("config.training.scan_steps > 1 needs config.data.placement=device")
        scan_steps = 1
    elif not scan_steps:
        # On the CPU a convolution inside a scan takes a path some 60 times slower.
        scan_steps = 1
        if jax.default_backend() != "cpu":
            scan_steps = max(1, min(_SCAN_STEPS, _SCAN_IMAGES // config.data.batch_size))
    given = {"loss_fn": loss_fn, "encoder": encoder, "augment_fn": augment_fn}
    if augment_fn is None:
        augment_fn = _views_of(config, dataset)
    else:
        # One's own makes views of the size it likes: the key does not speak of them.
        config = config.copy_and_resolve_references()
        config.data.view_size = 0
        _check_views(augment_fn, config, dataset)
    _check_blocks(config, encoder, augment_fn, dataset)
    steps_per_epoch = len(dataset.train_images) // config.data.batch_size
    if round(config.optim.epochs * steps_per_epoch) < 1:
        raise ConfigError(
            f"config.optim.epochs ({config.optim.epochs:g}) is not one step: an epoch of "
            f"{dataset.name} at config.data.batch_size={config.data.batch_size} has "
            f"{steps_per_epoch}"
        )
    if num_local_crops(config):
        _check_local(model, augment_fn, dataset)
    plan = Plan(
        config=config,
        workdir=workdir,
        dataset=dataset,
        encoder=model,
        hparams=_hparams(config, steps_per_epoch, given["augment_fn"] is None),
        steps_per_epoch=steps_per_epoch,
        placement=placement,
        scan_steps=scan_steps,
        augment_fn=augment_fn,
        loss_fn=_loss_of(config, loss_fn),
        init_from=init_from or "",
        custom={name: _name_of(thing) for name, thing in given.items() if thing is not None},
        layout=Layout(devices, config.training.shard_params),
    )
    if ":" in plan.loss_type:
        _check_own_loss(plan)
    return plan


def _check_own_loss(plan: Plan) -> None:
    """Refuses what a config's my_module:my_loss returns if no step can take it."""
    num_rows = plan.config.data.batch_size * plan.config.data.num_views // 2
    num_crops = plan.config.data.batch_size * num_local_crops(plan.config)
    embeddings = [
        jax.ShapeDtypeStruct((count, plan.embedding_dim), jnp.float32)
        for count in (num_rows, num_rows, num_crops)
        if count
    ]
    found = jax.eval_shape(plan.loss_fn, jax.random.key(0), *embeddings, plan.hparams)
    start = f"config.loss.type={plan.loss_type}:"
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
        raise ConfigError(f"{start} it must return (loss, terms), terms being a dict of scalars")
    try:
        check_scalars(*found)
    except ValueError as error:
        raise ConfigError(f"{start} {error}") from error


def initial_state(plan: Plan) -> TrainState:
    """The untrained state: a function of the seed and, for a whitening stem, of the images."""
    state = plan.create_state(plan.hparams)
    if plan.config.model.stem_init == "whitening" and "encoder" not in plan.custom:
        _whiten_stem(plan.encoder, plan.config, plan.dataset.train_images, state.params)
    return fresh_target(state)


def untrained_variables(
    encoder: Encoder,
    config: ConfigDict,
    images: np.ndarray | Records,
    *,
    has_own_stem: bool = True,
) -> Any:
    """The variables that `initial_state` starts a run of this config from.

    Args:
      encoder: of `create_encoder(config)`.
      config: of a run; without a seed or a kind of stem, as imported weights have it, those of
        seed 0 and a random stem.
      images: the run's training images, uint8 [N, H, W, C].
      has_own_stem: False for an encoder that did not come from the config.
    """
    seed = config.meta.seed if "meta" in config else 0
    shape = (2, *images.shape[1:])
    key = stream_key(jax.device_put(np.uint32(seed)), "init")
    variables = jax.jit(lambda key: encoder.model.init(key, jnp.zeros(shape, jnp.float32)))(key)
    if config.model.get("stem_init") == "whitening" and has_own_stem:
        _whiten_stem(encoder, config, images, variables["params"])
    return variables


def whitening_stem(encoder: Encoder, config: ConfigDict, images: np.ndarray | Records) -> jax.Array:
    """The filters of a whitening stem, from training images uint8 [N, H, W, C].

    Returns:
      kernel [k, k, C, min(width, 2 * k**2 * C)]: two of each eigenvector are all there are, 54 for
      3x3 patches of three channels.
    """
    images = jnp.asarray(clean_images(images))
    # A patch of a smaller image holds more of it. (.get: an older run has no such key.)
    if view_size := config.data.get("view_size", 0):
        images = resize_images(images, view_size)
    side, width = config.model.stem_kernel, config.model.width
    num_filters = min(width, 2 * side**2 * images.shape[-1])
    return patch_whitening_kernel(encoder.normalize(images), num_filters, patch_size=side)


def _whiten_stem(encoder, config, images, params) -> None:
    """Whitening filters in place of random ones; those of a wider stem's rest stay random.

    The two need not be of one size: BatchNorm brings every filter's output to the same scale.
    """
    stem = params["encoder"]["stem_conv"]
    filters = whitening_stem(encoder, config, images)
    rest = stem["kernel"][..., filters.shape[-1] :]
    stem["kernel"] = jnp.concatenate([filters, rest], axis=-1)


def clean_images(images: np.ndarray | Records) -> np.ndarray:
    """Up to 2,000 training images at even distances: a dataset may be sorted by class."""
    stride = max(1, len(images) // _NUM_CLEAN_IMAGES)
    return np.asarray(images[: stride * _NUM_CLEAN_IMAGES : stride])


def training_labels(plan: Plan) -> np.ndarray:
    """Labels for the online probe: -1, no label, for the images held out for validation."""
    num_train = len(plan.dataset.train_images)
    if not plan.has_labels:
        return np.full(num_train, -1, np.int32)
    labels = np.array(plan.dataset.train_labels, np.int32)
    _, val = split_validation(plan.dataset, plan.config.data.num_val)
    labels[val] = -1
    return labels


# --- resume -----------------------------------------------------------------------------------


def new_progress() -> dict[str, Any]:
    """What the host counts, of a run that has not begun; stored with every checkpoint."""
    return {
        "epoch": 0,
        "sums": {},
        "count": 0,
        "best_val_acc": -1.0,
        "best_epoch": 0,
        "epoch_began": 0.0,
        "train_seconds": 0.0,
        "total_seconds": 0.0,
        "phases": {},
        "collapse": None,
        "back_offs": 0,
        "run_id": uuid.uuid4().hex[:12],
    }


def _identity(plan: Plan) -> dict[str, Any]:
    """What a run is, as its config.json says it."""
    return {
        "config": json.loads(plan.config.to_json()),
        "dataset": plan.dataset.identity,
        "custom": plan.custom,
        "init_from": plan.init_from,
    }


def check_alike(plan: Plan) -> None:
    """Refuses processes of one run that would not do the same; all have to call it.

    Raises:
      ConfigError: in every process; in those that differ from process 0, with what differs.
    """
    if jax.process_count() == 1:
        return
    identity = _identity(plan)
    programs = {
        "placement": plan.placement,
        "scan_steps": plan.scan_steps,
        "shard_params": plan.layout.shard_params,
    }
    own = {**identity.pop("config"), **identity, **programs}
    changed = changed_keys(from_main(own), own)
    if any(Agreement().now(len(changed))):
        what = "; ".join(changed) or "another one than this process differs from process 0"
        raise ConfigError(f"the processes of this run do not have the same config and data: {what}")


def claim_workdir(plan: Plan, has_checkpoint: bool) -> None:
    """Stores what the run is, or checks that the run whose checkpoint is there is this one."""
    path, identity = plan.workdir / "config.json", _identity(plan)
    if has_checkpoint:
        stored = read_json(path)
        check_stored(path, stored)
        changed = changed_keys(
            {**stored["config"], **{k: stored.get(k) for k in identity if k != "config"}},
            {**identity["config"], **{k: identity[k] for k in identity if k != "config"}},
        )
        if changed:
            raise CheckpointError(
                f"{plan.workdir} holds a run of another config ({'; '.join(changed)}): give "
                f"another --workdir, and --init_from={plan.workdir} to start from its parameters"
            )
        return
    # Of an earlier run, whose checkpoints somebody deleted.
    for name in ("summary.json", "evaluation.json", "report.html"):
        (plan.workdir / name).unlink(missing_ok=True)
    shutil.rmtree(plan.workdir / "encoder", ignore_errors=True)
    environment = describe_environment()
    write_json(path, {**identity, "schema_version": SCHEMA_VERSION, "environment": environment})


def store_where_it_goes_on(workdir: pathlib.Path) -> None:
    """Adds this environment to a run's config.json if the run was last in another one."""
    path = workdir / "config.json"
    stored, current = read_json(path), describe_environment()
    continued_in = stored.get("continued_in", [])
    previous = continued_in[-1] if continued_in else stored.get("environment", {})
    changed = [
        f"{name} was {previous.get(name)} and is {current.get(name)}"
        for name in sorted({*previous, *current} - {"command"})
        # Where compiled programs are kept changes nothing of them.
        if "CACHE" not in name and previous.get(name) != current.get(name)
    ]
    if changed:
        write_json(path, {**stored, "continued_in": [*continued_in, current]})
        say(f"{'note':<10}the run goes on under other conditions: {'; '.join(changed)}")


def starting_state(plan: Plan, checkpoints: Any, state: TrainState):
    """(state, progress): from the newest sound checkpoint, another run's parameters, or fresh.

    Read by process 0, and the same in all.

    Args:
      checkpoints: of `checkpoint.Checkpoints`, in process 0.
      state: a fresh one.
    """
    kept = {"state": state}

    def read() -> dict[str, Any]:
        if found := checkpoints.restore_latest(state):
            _, kept["state"], stored = found
            return {**new_progress(), **stored}
        if plan.init_from:
            kept["state"] = _with_parameters_of(plan, state)
        return new_progress()

    progress = on_main(read)
    if jax.process_count() > 1:
        kept["state"] = jax.device_put(arrays_from_main(kept["state"]), jax.local_devices()[0])
    return kept["state"], progress


def _with_parameters_of(plan: Plan, state: TrainState) -> TrainState:
    """The state with the parameters and statistics in `plan.init_from`.

    An encoder that was imported without a projector is trained under the fresh one, and so is one
    without a predictor. A target network begins as a copy of what was given.
    """
    workdir = home_expanded(plan.init_from)
    stored = checkpoint.load_latest(workdir)
    given = {"params": stored["params"], "batch_stats": stored["batch_stats"] or {}}
    wanted = {"params": state.params, "batch_stats": state.batch_stats}
    if "encoder" in given["params"] and "projector" in set(state.params) - set(given["params"]):
        say(f"{'init':<10}{workdir} has no projector: a new one is trained")
        given = {kind: {**wanted[kind], **tree} for kind, tree in given.items()}
    if PREDICTOR not in set(state.params):
        given = without_predictor(given)
    elif PREDICTOR not in given["params"]:
        say(f"{'init':<10}{workdir} has no predictor: a new one is trained")
        given["params"][PREDICTOR] = state.params[PREDICTOR]
    try:
        for kind in ("params", "batch_stats"):
            checkpoint.check_shapes(checkpoint.shapes_of({kind: given[kind]}), {kind: wanted[kind]})
    except ValueError as error:
        raise CheckpointError(f"--init_from={workdir} holds another model: {error}") from error
    _check_same_network(plan, workdir)
    given = jax.tree.map(jnp.asarray, given)
    return fresh_target(dataclasses.replace(state, **given))


def _check_same_network(plan: Plan, workdir: pathlib.Path) -> None:
    """Refuses parameters that fit, but were trained in a network of other strides or padding."""
    path = workdir / "config.json"
    if "encoder" in plan.custom or not path.exists():
        return
    stored = read_json(path)
    check_stored(path, stored)
    stored = flatten(stored["config"])
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
