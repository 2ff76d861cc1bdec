"""An encoder in forms that need none of this package: safetensors in PyTorch's names, StableHLO."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.checkpoint import check_shapes, shapes_of
from jepa_jax.errors import CheckpointError
from jepa_jax.interop.torch_file import shown
from jepa_jax.interop.torch_names import from_torch, to_torch
from jepa_jax.models import Encoder

_LARGEST_SIDE = 4096
# One program that runs on any of them: nothing in a ResNet is written for one kind.
_PLATFORMS = ("cpu", "cuda", "tpu")


def _part(variables: Mapping[str, Any], part: str) -> dict[str, np.ndarray]:
    tensors = to_torch({kind: {part: tree[part]} for kind, tree in variables.items()})
    return {
        name.removeprefix(f"{part}."): np.array(tensor, np.float32, order="C")
        for name, tensor in tensors.items()
    }


def encoder_tensors(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The encoder of an `ImageJEPA`'s variables, float32.

    A ResNet's in torchvision's names and layouts; another's, which has no batch statistics, in its
    own: 'block0.qkv.kernel'.
    """
    if _is_resnet(variables):
        return _part(variables, "encoder")
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"]["encoder"])
    return {_own_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves}


def _is_resnet(variables: Mapping[str, Any]) -> bool:
    return "stem_conv" in variables["params"]["encoder"]


def _own_name(path: tuple[Any, ...]) -> str:
    return ".".join(key.key for key in path)


def _from_own_names(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
    """The inverse of `encoder_tensors` for an encoder that is no ResNet."""

    def find(path, _):
        return tensors[_own_name(path)]

    encoder = jax.tree_util.tree_map_with_path(find, like["params"]["encoder"])
    return {"params": {"encoder": encoder}}


def projector_tensors(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The projector likewise, in the names of an nn.Sequential ('0.weight' to '6.bias').

    Empty if there is none.
    """
    return _part(variables, "projector") if "projector" in variables["params"] else {}


def serialize_encoder(
    encoder: Encoder, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> bytes:
    """StableHLO of (tensors, images) -> h, by `jax.export`, for any batch size.

    tensors is the dict of `encoder_tensors`, images float32 [b, H, W, 3] in [0, 1], and h [b, F]
    float32 equals `encoder.apply` on them: the normalisation is inside, the weights are not.

    Args:
      encoder: of a model without a projector.
      variables: its variables; only their names and shapes are looked at.
      image_shape: (H, W, 3).

    Raises:
      CheckpointError: if the variables are not the encoder's, or the images are none.
    """

    like = {
        kind: {"encoder": tree["encoder"]} for kind, tree in variables.items() if "encoder" in tree
    }
    _check(encoder, like, image_shape)

    def embed(tensors, images):
        if not _is_resnet(like):
            return encoder.apply(_from_own_names(tensors, like), images)
        named = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        return encoder.apply(from_torch(named, like), images)

    shapes = {
        name: jax.ShapeDtypeStruct(tensor.shape, jnp.float32)
        for name, tensor in encoder_tensors(variables).items()
    }
    height, width, channels = image_shape
    batch = jax.export.symbolic_shape(f"b, {height}, {width}, {channels}")
    images = jax.ShapeDtypeStruct(batch, jnp.float32)
    exported = jax.export.export(jax.jit(embed), platforms=_PLATFORMS)(shapes, images)
    return bytes(exported.serialize())


def _check(encoder: Encoder, variables: Mapping[str, Any], image_shape: Any) -> None:
    """Of what a folder's files say, before a program is made of it."""
    sides = image_shape if isinstance(image_shape, list | tuple) else ()
    are_sides = all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides)
    if len(sides) != 3 or not are_sides or sides[2] != 3:
        raise CheckpointError(f"there are no images of the shape {shown(str(image_shape))}")
    images = jax.ShapeDtypeStruct((2, *sides), jnp.float32)
    wanted = jax.eval_shape(encoder.model.init, jax.random.key(0), images)
    try:
        check_shapes(shapes_of(variables), {kind: wanted.get(kind, {}) for kind in variables})
    except ValueError as error:
        raise CheckpointError(
            f"the weights are of another encoder than their config describes: {error}"
        ) from error
