"""What a config may say: every key with its type and range, and what the numbers become.

Floors below take plain values; this module turns a ConfigDict into them. Each complaint is one
line that names the key, the value and what would be right.
"""

import dataclasses
import difflib
import functools
import math
import os
import pathlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jepa_jax import device
from jepa_jax.dotted import is_dotted
from jepa_jax.encoders import (
    MODEL_TYPES,
    build_encoder,
    encoder_dim,
    encoder_parameters,
    is_own,
    model_type,
)
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.models import (
    Encoder,
    EncoderFns,
    ImageJEPA,
    ModelFns,
    Projector,
    linen_model,
    with_projector,
)
from jepa_jax.objectives import OBJECTIVES, is_loss_type
from jepa_jax.optim import OPTIMIZERS
from jepa_jax.pairing import PAIRINGS
from jepa_jax.predictors import (
    HEAD_DIM,
    BlockPredictor,
    EmbeddingPredictor,
    predicts_blocks,
    predicts_views,
)
from jepa_jax.train_step import HParams
from jepa_jax.vit import POOLS, POS_EMBEDS, ViT

# Of config.json and summary.json.
SCHEMA_VERSION = 1
_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}

# Upper bounds are far above what anybody trains; they keep a slip of the keyboard from asking for
# all the memory there is. Squares of rates and coefficients stay in float32's range.
_MOST_STRENGTH = 10**6
_MOST_EPOCHS = 10**6
_SMALLEST_SIDE = 8
# Indices of images, and the counter of steps, are int32.
_MOST_IMAGES = _MOST_STEPS = 2**31 - 1
_MOST_STAGES, _MOST_BLOCKS = 10, 1000
# With a gradient and two momenta each they take 137 GB.
_MOST_PARAMETERS = 2**33


@dataclasses.dataclass(frozen=True)
class _Key:
    """One key of a config: its type, and what a legal value satisfies, in words and in code."""

    type: type
    rule: str = ""
    is_legal: Callable[[Any], bool] = lambda value: True


def _at_least(low: int) -> _Key:
    return _Key(int, f"at least {low}", lambda value: value >= low)


def _between(low: int, high: int) -> _Key:
    return _Key(int, f"at least {low} and at most {high:,}", lambda value: low <= value <= high)


def _is_plain(text: str) -> bool:
    """Whether it may be part of a path and of a line: no NUL, no line break, no broken Unicode."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return not any(unicodedata.category(char) == "Cc" for char in text)


def _one_of(*names: str) -> _Key:
    return _Key(str, f"one of {', '.join(names)}", lambda value: value in names)


_POSITIVE = _Key(
    float, f"above 0 and at most {_MOST_STRENGTH:,}", lambda value: 0 < value <= _MOST_STRENGTH
)
_NOT_NEGATIVE = _Key(
    float, f"at least 0 and at most {_MOST_STRENGTH:,}", lambda value: 0 <= value <= _MOST_STRENGTH
)
_SHARE = _Key(float, "in [0, 1]", lambda value: 0 <= value <= 1)
_SIDE = _Key(
    int,
    "0, or at least 8 and at most 4,096",
    lambda value: value == 0 or _SMALLEST_SIDE <= value <= 4096,
)
_AREA = _Key(
    tuple,
    "two shares of an image, 0 < from <= to <= 1",
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
)
_FLAG = _Key(bool)
_TEXT = _Key(str, "a text without control characters", _is_plain)
_CHANNELS = _Key(
    tuple, "three numbers in [-1000, 1000]", lambda v: len(v) == 3 and max(map(abs, v)) <= 1000
)

_KEYS = {
    "meta.seed": _Key(int, "in [0, 2**32)", lambda value: 0 <= value < 2**32),
    "meta.device": _one_of("auto", "cpu", "gpu"),
    "meta.model_folder": _TEXT,
    "data.dataset": _Key(
        str, "the name of a tfds dataset", lambda value: value and _is_plain(value)
    ),
    "data.batch_size": _between(2, 2**20),
    "data.num_workers": _between(1, 1024),
    "data.data_dir": _TEXT,
    "data.placement": _one_of("auto", "device", "host", "stream"),
    "data.image_size": _SIDE,
    "data.train_split": _Key(str, "the name of a split", lambda value: value and _is_plain(value)),
    "data.unlabelled_split": _TEXT,
    "data.test_split": _TEXT,
    "data.max_broken": _SHARE,
    "data.view_size": _SIDE,
    "data.num_views": _Key(int, "2, 4 or 6", lambda value: value in (2, 4, 6)),
    "data.num_local_crops": _Key(int, "in [0, 10]", lambda value: 0 <= value <= 10),
    "data.local_size": _SIDE,
    "data.num_train": _Key(
        int,
        f"0, or at least 2 and at most {_MOST_IMAGES:,}",
        lambda value: value == 0 or 2 <= value <= _MOST_IMAGES,
    ),
    "data.num_val": _between(1, _MOST_IMAGES),
    "data.mean": _CHANNELS,
    "data.std": _Key(
        tuple,
        "three numbers in [1e-6, 1000]",
        lambda v: len(v) == 3 and min(v) >= 1e-6 and max(v) <= 1000,
    ),
    "augment.scale": _AREA,
    "augment.local_scale": _AREA,
    "augment.jitter_prob": _SHARE,
    "augment.brightness": _NOT_NEGATIVE,
    "augment.contrast": _NOT_NEGATIVE,
    "augment.saturation": _NOT_NEGATIVE,
    "augment.hue": _Key(float, "in [0, 0.5]", lambda value: 0 <= value <= 0.5),
    "augment.grayscale_prob": _SHARE,
    "augment.solarize_prob": _SHARE,
    "augment.flip_prob": _SHARE,
    "augment.blur_prob": _SHARE,
    "augment.blur_sigma": _Key(
        tuple,
        "two numbers of pixels, 0 < from <= to <= 100",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 100,
    ),
    "model.type": _Key(
        str,
        f"one of {', '.join(MODEL_TYPES)}, or one's own as my_module:my_encoder",
        lambda value: value in MODEL_TYPES or is_dotted(value),
    ),
    "model.patch_size": _Key(int, "2, 4, 8, 14 or 16", lambda value: value in (2, 4, 8, 14, 16)),
    "model.pos_embed": _one_of(*POS_EMBEDS),
    "model.pool": _one_of(*POOLS),
    "model.depth": _between(0, _MOST_BLOCKS),
    "model.use_projector": _FLAG,
    "model.proj_hidden_dim": _between(1, 2**18),
    "model.proj_output_dim": _between(2, 2**18),
    "model.stage_sizes": _Key(
        tuple,
        "one positive whole number a stage, "
        f"at most {_MOST_STAGES} stages and {_MOST_BLOCKS} blocks",
        lambda value: (
            0 < len(value) <= _MOST_STAGES
            and all(type(v) is int and v > 0 for v in value)
            and sum(value) <= _MOST_BLOCKS
        ),
    ),
    "model.width": _between(1, 2**16),
    "model.block": _one_of("basic", "bottleneck"),
    "model.stem_kernel": _Key(int, "3 or 7", lambda value: value in (3, 7)),
    "model.stem_stride": _Key(int, "1 or 2", lambda value: value in (1, 2)),
    "model.stem_padding": _Key(int, "1, 2 or 3", lambda value: value in (1, 2, 3)),
    "model.stem_pool": _FLAG,
    "model.expand_dim": _between(0, 2**16),
    "model.stem_init": _one_of("random", "whitening"),
    "model.predictor": _FLAG,
    "model.target_ema": _Key(float, "in [0, 1)", lambda value: 0 <= value < 1),
    "model.mask": _one_of("none", "blocks"),
    "model.pred_hidden_dim": _between(1, 2**18),
    "model.pred_dim": _Key(
        int,
        f"a multiple of {HEAD_DIM}, at most {2**14:,}",
        lambda value: 0 < value <= 2**14 and value % HEAD_DIM == 0,
    ),
    "model.pred_depth": _between(1, _MOST_BLOCKS),
    "loss.type": _Key(
        str, f"one of {', '.join(OBJECTIVES)}, or one's own as my_module:my_loss", is_loss_type
    ),
    "loss.pairing": _one_of(*PAIRINGS),
    "loss.sim_coeff": _NOT_NEGATIVE,
    "loss.std_coeff": _NOT_NEGATIVE,
    "loss.cov_coeff": _NOT_NEGATIVE,
    "loss.sigreg_coeff": _NOT_NEGATIVE,
    "loss.num_directions": _between(1, 2**16),
    "loss.redundancy_coeff": _NOT_NEGATIVE,
    "loss.temperature": _Key(
        float, "at least 0.001 and at most 1,000", lambda value: 1e-3 <= value <= 1e3
    ),
    "loss.pred_coeff": _NOT_NEGATIVE,
    "optim.name": _one_of(*OPTIMIZERS),
    "optim.epochs": _Key(
        float, f"above 0 and at most {_MOST_EPOCHS:,}", lambda value: 0 < value <= _MOST_EPOCHS
    ),
    "optim.lr": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.momentum": _Key(float, "in [0, 1)", lambda value: 0 <= value < 1),
    "optim.warmup_epochs": _NOT_NEGATIVE,
    "optim.warmup_start_lr": _NOT_NEGATIVE,
    "optim.schedule": _one_of("step", "late_epoch"),
    "optim.min_lr": _NOT_NEGATIVE,
    "optim.probe_lr": _POSITIVE,
    "training.use_amp": _FLAG,
    "training.dtype": _one_of(*_DTYPES),
    "training.remat": _FLAG,
    "training.scan_steps": _at_least(0),
    "training.microbatches": _between(1, 2**16),
    "training.shard_params": _FLAG,
    "training.on_nan": _one_of("stop", "back_off"),
    "training.early_stop_epochs": _at_least(0),
    "logging.log_wandb": _FLAG,
    "logging.log_tensorboard": _FLAG,
    "logging.log_every": _at_least(1),
    "logging.save_every": _at_least(1),
    "logging.save_every_minutes": _POSITIVE,
    "logging.stop_on_collapse": _FLAG,
    "logging.tqdm_silent": _FLAG,
}

# What `create_encoder` reads.
_OF_A_NETWORK = ("model.", "training.", "data.mean", "data.std", "data.view_size")

# What may differ between the two halves of one run: none of it changes what is learnt.
_FREE_ON_RESUME = (
    "logging.",
    "meta.device",
    "meta.model_folder",
    "data.data_dir",
    "data.num_workers",
    "data.placement",
    "data.max_broken",
    "training.shard_params",
)


def check_stored(path: pathlib.Path, stored: Any) -> None:
    """CheckpointError unless `stored`, the content of a run's config.json, has today's form."""
    sections = ("config", "custom", "dataset")
    if type(stored) is not dict or not all(type(stored.get(s)) is dict for s in sections):
        raise CheckpointError(f"{path} is not that of a run")
    continued_in = stored.get("continued_in", [])
    environments = [
        stored.get("environment", {}),
        *(continued_in if type(continued_in) is list else [0]),
    ]
    if not all(type(environment) is dict for environment in environments):
        raise CheckpointError(f"{path} does not say under which conditions the run was")
    if stored.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(f"{path} was written by another version of jepa_jax")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def nearest(name: str, known: Any) -> str:
    """' (did you mean X?)' when one of `known` is close to `name`, else an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def known_keys() -> list[str]:
    """Every dotted key a config has."""
    return list(_KEYS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def _shown(value: Any) -> str:
    """A value as part of one line of legible length."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_value(name: str, value: Any) -> None:
    key = _KEYS[name]
    if key.type is float and _is_number(value):
        if not _is_finite(value):
            raise ConfigError(f"config.{name} must be a finite number, got {_shown(value)}")
    elif key.type is tuple and isinstance(value, tuple | list):
        if not all(_is_number(v) and _is_finite(v) for v in value):
            raise ConfigError(f"config.{name} must hold numbers, got {_shown(value)}")
    elif type(value) is not key.type:
        wanted, given = key.type.__name__, type(value).__name__
        raise ConfigError(f"config.{name} must be of type {wanted}, got {_shown(value)} ({given})")
    if not key.is_legal(value):
        near = ""
        if key.type is str:
            names = key.rule.removeprefix("one of ").partition(", or ")[0]
            near = nearest(value, names.split(", "))
        raise ConfigError(f"config.{name} must be {key.rule}, got {_shown(value)}{near}")


def validate(config: ConfigDict) -> None:
    """Checks every key's presence, type and range, and what they say together.

    Raises:
      ConfigError: one line naming the key and the nearest right thing.
    """
    flat = flatten(config)
    for name in flat:
        if name not in _KEYS:
            raise ConfigError(f"config.{name} is not a known key{nearest(name, _KEYS)}")
    for name in _KEYS:
        if name not in flat:
            raise ConfigError(f"the config lacks config.{name}: start from a file in configs/")
        _check_value(name, flat[name])
    optim = config.optim
    if optim.warmup_epochs > optim.epochs:
        raise ConfigError(
            f"config.optim.warmup_epochs ({optim.warmup_epochs:g}) is longer than "
            f"config.optim.epochs ({optim.epochs:g})"
        )
    if optim.schedule == "late_epoch" and (optim.warmup_epochs % 1 or optim.warmup_epochs == 1):
        raise ConfigError(
            "config.optim.schedule=late_epoch needs a whole number of config.optim.warmup_epochs "
            f"other than 1, got {optim.warmup_epochs:g}"
        )
    _check_prediction(config)
    if config.model.stem_init == "whitening" and model_type(config.model) != "resnet":
        raise ConfigError(
            "config.model.stem_init=whitening is for config.model.type=resnet: with "
            f"{config.model.type} give --config.model.stem_init=random"
        )
    if config.model.stem_init == "whitening" and config.model.width % 2:
        raise ConfigError("config.model.stem_init=whitening needs an even config.model.width")
    if (count := num_parameters(config.model)) > _MOST_PARAMETERS:
        raise ConfigError(
            f"config.model describes a network of {count:.1e} parameters, at most "
            f"{_MOST_PARAMETERS:.1e} can be trained: give it a smaller config.model.width, fewer "
            "config.model.stage_sizes or config.model.depth, or smaller projector dims"
        )


def _check_prediction(config: ConfigDict) -> None:
    model = config.model
    if not model.predictor:
        for name, is_set in (("target_ema", model.target_ema), ("mask", model.mask != "none")):
            if is_set:
                raise ConfigError(
                    f"config.model.{name}={model[name]} is of use to a predictor alone: add "
                    "config.model.predictor=True"
                )
    elif config.training.microbatches > 1:
        raise ConfigError(
            "config.model.predictor=True needs config.training.microbatches=1: what is predicted "
            "of a batch is not computed in pieces"
        )


def has_target(config: Mapping[str, Any]) -> bool:
    """Whether a target network follows the online one."""
    # .get: an older run has no such key.
    return config["model"].get("target_ema", 0.0) > 0


def num_parameters(model: Mapping[str, Any]) -> int:
    """How many the `model` section of a config describes; of a network that is never built.

    Of an encoder of one's own nothing is known: 0.
    """
    if is_own(model):
        return 0
    size = encoder_parameters(model)
    if model["use_projector"]:
        hidden, outputs = model["proj_hidden_dim"], model["proj_output_dim"]
        size += (feature_dim(model) + 3) * hidden + (hidden + 3) * hidden + (hidden + 1) * outputs
    # .get: configs of older runs have no such key.
    return size + (_predictor_parameters(model) if model.get("predictor", False) else 0)


def _predictor_parameters(model: Mapping[str, Any]) -> int:
    if model["mask"] == "none":
        dim = model["proj_output_dim"] if model["use_projector"] else feature_dim(model)
        return (2 * dim + 3) * model["pred_hidden_dim"] + dim
    features, dim, depth = feature_dim(model), model["pred_dim"], model["pred_depth"]
    # A block's matrices, biases and two LayerNorms; the last LayerNorm; the mask token.
    blocks = depth * (12 * dim**2 + 13 * dim) + 2 * dim + dim
    return blocks + (features + 1) * dim + (dim + 1) * features


def feature_dim(model: Mapping[str, Any]) -> int:
    """F of the `model` section of a config, see `encoders.encoder_dim`."""
    return encoder_dim(model)


def compute_dtype(config: ConfigDict) -> Any:
    """The dtype of the model's arithmetic: training.dtype, or float32 without training.use_amp."""
    return _DTYPES[config.training.dtype] if config.training.use_amp else jnp.float32


def create_encoder(
    config: ConfigDict, encoder: nn.Module | EncoderFns | ModelFns | None = None
) -> Encoder:
    """The model that a config describes, with its normalisation.

    Args:
      config: see `configs/`.
      encoder: in place of the config's: a Linen module called as encoder(images, train) -> h
        [B, F], or an `EncoderFns`, to which the config's projector is added, or a whole `ModelFns`.

    Raises:
      ConfigError: for a value out of its range, which a stored config may have, a network that
        does not fit into the device's memory, or an encoder of one's own that cannot be had.
    """
    for name, value in flatten(config).items():
        if name in _KEYS and name.startswith(_OF_A_NETWORK):
            _check_value(name, value)
    if not isinstance(encoder, ModelFns):
        dtype, model = compute_dtype(config), config.model
        if encoder is None:
            _check_fits(num_parameters(model))
            encoder = build_encoder(model, dtype, config.training.get("remat", False))
        projector = None
        if model.use_projector:
            projector = Projector(model.proj_hidden_dim, model.proj_output_dim, dtype)
        if isinstance(encoder, EncoderFns):
            whole = with_projector(encoder, projector)
        else:
            whole = linen_model(ImageJEPA(encoder, projector))
        encoder = _with_predictor(model, encoder, whole, dtype)
    elif (encoder.predict is not None) != config.model.get("predictor", False):
        raise ConfigError(
            "config.model.predictor has to be True for a ModelFns with `predict`, and for no other"
        )
    return Encoder(encoder, tuple(config.data.mean), tuple(config.data.std))


def _with_predictor(
    model: Any, encoder: nn.Module | EncoderFns, whole: ModelFns, dtype: Any
) -> ModelFns:
    """The whole network with the predictor that the `model` section of a config describes."""
    # .get: an older run has no such keys.
    if not model.get("predictor", False):
        return whole
    if model.mask == "none":
        return predicts_views(whole, EmbeddingPredictor(model.pred_hidden_dim, dtype))
    if not isinstance(encoder, ViT):
        raise ConfigError(
            f"config.model.mask={model.mask} needs an encoder of patches such as "
            f"config.model.type=vit_ti, this one is a {type(encoder).__name__}"
        )
    predictor = BlockPredictor(model.pred_dim, model.pred_depth, dtype)
    return predicts_blocks(whole, encoder, predictor)


def _check_fits(count: int) -> None:
    """Before any of them is drawn. Training holds them and their gradients at the least."""
    needed, limit = 8 * count, device.memory_limit()
    if needed > limit:
        raise ConfigError(
            f"config.model describes a network of {count:.1e} parameters: with their "
            f"gradients they take {needed / 2**30:.1f} GiB and the device has "
            f"{limit / 2**30:.1f} GiB"
        )


def hparams_from(config: ConfigDict, steps_per_epoch: int) -> HParams:
    """The config's numbers, per step, as float32 scalars (the seed as uint32).

    Raises:
      ConfigError: for more steps than can be counted.
    """
    optim, loss = config.optim, config.loss
    if optim.epochs * steps_per_epoch > _MOST_STEPS:
        raise ConfigError(
            f"config.optim.epochs ({optim.epochs:g}) is {optim.epochs * steps_per_epoch:.1e} steps "
            f"of {steps_per_epoch} an epoch: at most {_MOST_STEPS:,} are counted"
        )
    numbers = {
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "momentum": optim.momentum,
        "warmup_start_lr": optim.warmup_start_lr,
        "min_lr": optim.min_lr,
        "warmup_steps": round(optim.warmup_epochs * steps_per_epoch),
        "num_steps": round(optim.epochs * steps_per_epoch),
        "sim_coeff": loss.sim_coeff,
        "std_coeff": loss.std_coeff,
        "cov_coeff": loss.cov_coeff,
        "sigreg_coeff": loss.sigreg_coeff,
        "redundancy_coeff": loss.redundancy_coeff,
        "temperature": loss.temperature,
        "pred_coeff": loss.get("pred_coeff", 1.0),
        "target_ema": config.model.get("target_ema", 0.0),
        "probe_lr": optim.probe_lr,
        "late_epoch_steps": steps_per_epoch if optim.schedule == "late_epoch" else 0,
    }
    scalars = {name: np.float32(value) for name, value in numbers.items()}
    return HParams(seed=np.uint32(config.meta.seed), **scalars)


def has_blur(config: Mapping[str, Any]) -> bool:
    """Whether a config's views are blurred at all: if not, no blur is part of the program."""
    # .get: an older run has no such key.
    return config["augment"].get("blur_prob", 0.0) > 0


def num_local_crops(config: Mapping[str, Any]) -> int:
    """L of `multi_crop_views`; 0 for a config of an older run, or one without its data."""
    return config.get("data", {}).get("num_local_crops", 0)


def local_side(config: Mapping[str, Any], side: int) -> int:
    """The side of the local crops in pixels, beside views of `side`.

    Raises:
      ConfigError: for crops larger than the views, or for views that have no half of 8 pixels.
    """
    size = config["data"].get("local_size", 0)
    if size > side:
        raise ConfigError(
            f"config.data.local_size ({size}) is larger than the views of {side} pixels"
        )
    if not size and side < 2 * _SMALLEST_SIDE:
        raise ConfigError(
            f"config.data.local_size=0 is half of the views' {side} pixels, below "
            f"{_SMALLEST_SIDE}: give it, or take a larger config.data.view_size"
        )
    return size or side // 2


def blur_kernel(config: Mapping[str, Any], side: int) -> int:
    """The `blur_kernel` of `random_view`: 0 without a blur, else the odd number nearest a tenth.

    Of the views' side, as in SimCLR (arXiv 2002.05709), and at least 3.
    """
    return max(3, 2 * round((side / 10 - 1) / 2) + 1) if has_blur(config) else 0


def view_options(config: Mapping[str, Any]) -> dict[str, float | tuple[float, float]]:
    """The strengths of the augmentation, as `random_view` takes them, without those of no use.

    A blur's are there only if there is one, those of local crops as `multi_crop_views` takes them.
    Sizes in pixels that a program is compiled for are not among them: see `blur_kernel`.
    """
    is_used = {"blur": has_blur(config), "local": num_local_crops(config) > 0}
    return {
        name: tuple(value) if isinstance(value, tuple | list) else float(value)
        for name, value in config["augment"].items()
        if is_used.get(name.partition("_")[0], True)
    }


@functools.cache
def _neutral() -> dict[str, Any]:
    """The value of every key that leaves the rapid recipe as it is."""
    from jepa_jax.configs import rapid

    return flatten(rapid.get_config())


def changed_keys(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """'key: stored -> new' for every key that decides what is learnt and differs.

    A key that an older version did not have counts as what configs/rapid.py gives it: new keys come
    with the value under which nothing changes.
    """
    old, new = flatten(stored), flatten(config)
    old = {**{name: value for name, value in _neutral().items() if name in new}, **old}
    lines = []
    for name in sorted({*old, *new}):
        if name.startswith(_FREE_ON_RESUME):
            continue
        before, after = old.get(name), new.get(name)
        before = tuple(before) if isinstance(before, list) else before
        after = tuple(after) if isinstance(after, list) else after
        if before != after:
            lines.append(f"{name}: {before} -> {after}")
    return lines
