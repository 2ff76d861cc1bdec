"""The encoder that the `model` section of a config describes: its sizes, and the thing itself.

A section may be that of an older run, which lacks the newer keys. `model.type` is a ResNet, a
vision transformer, or `my_module:my_encoder`, a person's own, of which nothing is known before it
is built.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.dotted import is_dotted, load_dotted, one_line
from jepa_jax.errors import ConfigError
from jepa_jax.models import EncoderFns, ModelFns, ResNet, block_expansion
from jepa_jax.vit import VIT_SIZES, ViT

MODEL_TYPES = ("resnet", *VIT_SIZES)
# Of images whose size a section does not tell.
_USUAL_SIDE = 32


def model_type(model: Mapping[str, Any]) -> str:
    """model.type; a ResNet where a stored section lacks it."""
    return model.get("type", "resnet")


def is_own(model: Mapping[str, Any]) -> bool:
    """Whether the encoder is a person's own, by dotted path."""
    return is_dotted(model_type(model))


def vit_sizes(model: Mapping[str, Any]) -> dict[str, Any]:
    """patch_size, dim, depth, num_heads, pos_embed and pool of a transformer's section."""
    sizes = VIT_SIZES[model_type(model)]
    return {
        **sizes,
        "depth": model.get("depth", 0) or sizes["depth"],
        "patch_size": model["patch_size"],
        "pos_embed": model["pos_embed"],
        "pool": model["pool"],
    }


def encoder_dim(model: Mapping[str, Any]) -> int:
    """F.

    Raises:
      ConfigError: for an encoder of one's own, of which only its output tells.
    """
    if is_own(model):
        raise ConfigError(f"config.model does not tell the features of {model_type(model)}")
    if model_type(model) in VIT_SIZES:
        return VIT_SIZES[model_type(model)]["dim"]
    width, stages = model["width"], len(model["stage_sizes"])
    return model.get("expand_dim", 0) or _expansion(model) * width * 2 ** (stages - 1)


def encoder_parameters(model: Mapping[str, Any], image_side: int = _USUAL_SIDE) -> int:
    """How many it has, without building it; 0 of one's own, of which nothing is known.

    Args:
      image_side: of square images, for which a transformer learns positions.
    """
    if is_own(model):
        return 0
    if model_type(model) in VIT_SIZES:
        return _vit_parameters(model, image_side)
    channels = width = model["width"]
    size = (3 * model["stem_kernel"] ** 2 + 2) * width
    for stage, num_blocks in enumerate(model["stage_sizes"]):
        inputs, width = channels, model["width"] * 2**stage
        channels = width * _expansion(model)
        # A scale and a bias of BatchNorm after each convolution.
        has_skip = stage > 0 or inputs != channels
        size += (inputs + 2) * channels if has_skip else 0
        size += _block_size(model, inputs, width)
        size += (num_blocks - 1) * _block_size(model, channels, width)
    if expand_dim := model.get("expand_dim", 0):
        size += (channels + 2) * expand_dim
    return size


def _vit_parameters(model: Mapping[str, Any], image_side: int) -> int:
    sizes = vit_sizes(model)
    dim, patch, has_class_token = sizes["dim"], sizes["patch_size"], sizes["pool"] == "cls"
    block = (4 + 2 * 4) * dim**2 + (4 + 4 + 1) * dim + 2 * 2 * dim
    size = (3 * patch**2 + 1) * dim + sizes["depth"] * block + 2 * dim
    size += dim if has_class_token else 0
    if sizes["pos_embed"] == "learned":
        size += ((image_side // patch) ** 2 + has_class_token) * dim
    return size


def _expansion(model: Mapping[str, Any]) -> int:
    return block_expansion(model.get("block", "basic"))


def _block_size(model: Mapping[str, Any], inputs: int, width: int) -> int:
    """Parameters of one block without its skip."""
    expansion = _expansion(model)
    if expansion == 1:
        return (9 * inputs + 2 + 9 * width + 2) * width
    outputs = expansion * width
    return (inputs + 2 + 9 * width + 2) * width + (width + 2) * outputs


def build_encoder(model: Mapping[str, Any], dtype: Any, remat: bool) -> nn.Module | EncoderFns:
    """The encoder of a section.

    Args:
      dtype: of the computation, and
      remat: whether to trade time for memory; both are the package's own encoders' alone.

    Raises:
      ConfigError: for one's own that cannot be had.
    """
    if is_own(model):
        return _own_encoder(model_type(model))
    if model_type(model) in VIT_SIZES:
        return ViT(**vit_sizes(model), dtype=dtype, remat=remat)
    return ResNet(
        stage_sizes=tuple(model["stage_sizes"]),
        width=model["width"],
        stem_kernel=model["stem_kernel"],
        stem_stride=model["stem_stride"],
        stem_padding=model["stem_padding"],
        stem_pool=model["stem_pool"],
        # .get: configs of older runs, and of imported weights, have no such keys.
        expand_dim=model.get("expand_dim", 0),
        dtype=dtype,
        remat=remat,
        block=model.get("block", "basic"),
    )


def _own_encoder(path: str) -> nn.Module | EncoderFns:
    start = f"config.model.type={path}"
    make = load_dotted("model.type", path)
    if not callable(make):
        raise ConfigError(f"{start} is a {type(make).__name__}; it must be a function or a class")
    try:
        made = make()
    except Exception as error:  # whatever a person's own function raises
        raise ConfigError(f"{start}, called without arguments: {one_line(error)}") from error
    if not isinstance(made, nn.Module | EncoderFns):
        raise ConfigError(
            f"{start} must return a Linen module or jepa_jax.EncoderFns(init, apply), got a "
            f"{type(made).__name__}"
        )
    return made


def check_encoder(
    model_fns: ModelFns, name: str, image_shape: tuple[int, int, int], view_size: int
) -> None:
    """Traces an encoder that is not of this package for its shapes; nothing is computed.

    Args:
      name: for the message.
      image_shape: (H, W, C), of what is evaluated.
      view_size: side of what is trained on; 0 for that of the images.

    Raises:
      ConfigError: if it takes no such images, or its h is no float array [B, F]; one line.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    view_shape = (view_size, view_size, image_shape[2]) if view_size else image_shape
    for shape, train in ((image_shape, False), (view_shape, True)):

        def embed(key, images, shape=shape, train=train):
            inputs = jnp.zeros((2, *shape), jnp.float32)
            return model_fns.apply(model_fns.init(key, images), inputs, train)

        try:
            (h, _), _ = jax.eval_shape(embed, jax.random.key(0), images)
        except Exception as error:
            where = "in training" if train else "in evaluation"
            size = " x ".join(map(str, shape))
            reason = one_line(error)
            raise ConfigError(f"{name} fails {where} on images of {size}: {reason}") from error
        is_right = len(h.shape) == 2 and h.shape[0] == 2 and jnp.issubdtype(h.dtype, jnp.floating)
        if not is_right:
            raise ConfigError(
                f"{name} must give float representations [B, F], of 2 images it gives "
                f"{h.dtype}{list(h.shape)}"
            )
