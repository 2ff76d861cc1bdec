"""One table of names and layouts, read in both directions: Flax variables and PyTorch's tensors.

The encoder's names are torchvision's ("encoder.layer1.0.conv1.weight"), the projector's those of
an nn.Sequential ("projector.0.weight"). Convolutions are [height, width, in, out] here and
[out, in, height, width] there, linear layers [in, out] here and [out, in] there.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax

# The stem, and the expansion after the stages, which torchvision's ResNet does not have.
_SINGLE = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "expand_conv": "expand.0",
    "expand_norm": "expand.1",
}
_BLOCK = {
    "Conv_0": "conv1",
    "BatchNorm_0": "bn1",
    "Conv_1": "conv2",
    "BatchNorm_1": "bn2",
    "Conv_2": "conv3",
    "BatchNorm_2": "bn3",
    "skip_conv": "downsample.0",
    "skip_norm": "downsample.1",
}
# 2 and 5 are the ReLUs.
_PROJECTOR = {
    "Dense_0": "0",
    "BatchNorm_0": "1",
    "Dense_1": "3",
    "BatchNorm_1": "4",
    "Dense_2": "6",
}
_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: tuple[Any, ...]) -> str:
    """(params, encoder, stage0_block1, Conv_0, kernel) to 'encoder.layer1.1.conv1.weight'."""
    _, part, *modules, leaf = (key.key for key in path)
    if part == "projector":
        (layer,) = modules
        name = _PROJECTOR[layer]
    elif block := re.fullmatch(r"stage(\d+)_block(\d+)", modules[0]):
        name = f"layer{int(block[1]) + 1}.{block[2]}.{_BLOCK[modules[1]]}"
    else:
        (layer,) = modules
        name = _SINGLE[layer]
    return f"{part}.{name}.{_LEAF[leaf]}"


def to_torch(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of an `ImageJEPA` to PyTorch's names and layouts.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, of numpy or JAX arrays.
    """
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}
    return {
        _torch_name(path): leaf.transpose(axes[leaf.ndim]) if leaf.ndim in axes else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def from_torch(tensors: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `to_torch`.

    Args:
      tensors: numpy or JAX arrays; those that `like` does not have are left out.
      like: variables of the wanted structure; only their names are looked at.
    """
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}

    def find(path, _):
        tensor = tensors[_torch_name(path)]
        return tensor.transpose(axes[tensor.ndim]) if tensor.ndim in axes else tensor

    return jax.tree_util.tree_map_with_path(find, like)
