"""What a training step must compute and move, counted by hand: numbers in, numbers out.

Multiply-adds are those of convolutions, dense layers and the covariance; all else is below one per
cent of them, but for Muon, whose own products are no part of the model's. A convolution's padding
taps are counted, as they are computed: XLA's own analysis leaves them out. A multiply-add is two
FLOPs, and the backward pass costs twice the forward one.

Bytes are passes over every activation, each pass reading or writing a map once; `in` and `out` are
the maps before and after a convolution. Unfused, every operation is a pass of its own:

    forward   convolution: in, out            statistics: out
              normalise and ReLU: 2 out       end of a block, the skip read: out
    backward  sums of BatchNorm: 2 out        its gradient: 3 out
              gradient by input: in, out      gradient by weights: in, out
              the two gradients at a block's fork added: 3 out

so 3 in + 11 out, and 4 out more where a block ends. With BatchNorm fused into its neighbours (the
statistics taken as the convolution writes, the normalisation done as the next one reads, its
gradient likewise) 3 in + 7 out are left, and 2 out where a block ends. Augmentation and loss are
left out: they touch images and embeddings alone.

Parameters are float32, and are passed over 16 times a step: for each view read forward, read
backward and written as a gradient (6), the two gradients added (3), norms of parameters and
gradients (2), and the update, which reads both and the momentum and writes two of them (5).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jepa_jax.config import feature_dim
from jepa_jax.encoders import model_type
from jepa_jax.errors import ConfigError
from jepa_jax.models import block_expansion

_PARAMETER_PASSES = 16
_BYTES_OF_PARAMETER = 4
# Passes over (in, out, out at the end of a block).
_UNFUSED, _FUSED = (3, 11, 4), (3, 7, 2)
# A layer without BatchNorm is its three products alone.
_PRODUCTS = (3, 3, 0)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, or with sides of 1 a dense layer, as one view passes through it."""

    name: str
    in_side: int
    out_side: int
    in_channels: int
    out_channels: int
    kernel: int = 1
    has_norm: bool = True
    ends_block: bool = False

    @property
    def multiply_adds(self) -> int:
        """Of one view's forward pass, padding taps included."""
        return self.out_side**2 * self.kernel**2 * self.in_channels * self.out_channels

    @property
    def num_weights(self) -> int:
        """Entries of the kernel."""
        return self.kernel**2 * self.in_channels * self.out_channels

    def values_moved(self, *, is_fused: bool) -> int:
        """Activations read or written in one view's forward and backward pass."""
        passes = _PRODUCTS
        if self.has_norm:
            passes = _FUSED if is_fused else _UNFUSED
        values_in = self.in_side**2 * self.in_channels
        values_out = self.out_side**2 * self.out_channels
        at_end = passes[2] if self.ends_block else 0
        return passes[0] * values_in + (passes[1] + at_end) * values_out


def _side_after(side: int, kernel: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - kernel) // stride + 1


def encoder_layers(model: Mapping[str, Any], image_side: int) -> list[Layer]:
    """The convolutions of `models.ResNet`.

    Args:
      model: the `model` section of a config.
      image_side: of square images.

    Raises:
      ConfigError: for another encoder than a ResNet, or one with a predictor.
    """
    if model.get("predictor", False):
        raise ConfigError(
            "the benchmark counts no predictor and no target network: training says images/s with "
            "them"
        )
    if model_type(model) != "resnet":
        raise ConfigError(
            f"the benchmark counts the layers of a ResNet, not of {model_type(model)}: "
            "training says images/s of any encoder"
        )
    kernel, width = model["stem_kernel"], model["width"]
    side = _side_after(image_side, kernel, model["stem_stride"], model["stem_padding"])
    layers = [Layer("stem", image_side, side, 3, width, kernel)]
    if model["stem_pool"]:
        side = _side_after(side, 3, 2, 1)
    # .get: configs of older runs have no such key.
    channels, expansion = width, block_expansion(model.get("block", "basic"))
    for stage, num_blocks in enumerate(model["stage_sizes"]):
        for block in range(num_blocks):
            name, inner = f"stage{stage}_block{block}", width * 2**stage
            stride, out = 2 if stage and not block else 1, expansion * inner
            small = _side_after(side, 3, stride, 1)
            if expansion == 1:
                layers.append(Layer(f"{name}.0", side, small, channels, out, 3))
                layers.append(Layer(f"{name}.1", small, small, out, out, 3, ends_block=True))
            else:
                layers.append(Layer(f"{name}.0", side, side, channels, inner))
                layers.append(Layer(f"{name}.1", side, small, inner, inner, 3))
                layers.append(Layer(f"{name}.2", small, small, inner, out, ends_block=True))
            if stride != 1 or channels != out:
                layers.append(Layer(f"{name}.skip", side, small, channels, out))
            side, channels = small, out
    if expand_dim := model.get("expand_dim", 0):
        layers.append(Layer("expand", side, side, channels, expand_dim))
    return layers


def projector_layers(model: Mapping[str, Any]) -> list[Layer]:
    """The dense layers of `models.Projector`; none without a projector."""
    if not model["use_projector"]:
        return []
    features = feature_dim(model)
    hidden, out = model["proj_hidden_dim"], model["proj_output_dim"]
    return [
        Layer("projector.0", 1, 1, features, hidden),
        Layer("projector.1", 1, 1, hidden, hidden),
        Layer("projector.2", 1, 1, hidden, out, has_norm=False),
    ]


def embedding_dim(model: Mapping[str, Any]) -> int:
    """D of the loss: the projector's outputs, or the features without one."""
    if model["use_projector"]:
        return model["proj_output_dim"]
    return feature_dim(model)


def count(
    model: Mapping[str, Any],
    *,
    batch_size: int,
    bytes_per_value: int,
    image_side: int = 32,
    num_views: int = 2,
    num_local_crops: int = 0,
    local_side: int = 0,
) -> dict[str, Any]:
    """FLOPs and bytes of a training step.

    The loss is VICReg's; that of others is as small beside the network, and not counted apart.
    The covariance of B embeddings of D dimensions is D x D, or for B < D the Gram matrix B x B
    with the same norm: min(B, D) * D multiply-adds an embedding.

    Args:
      model: the `model` section of a config.
      batch_size: B.
      bytes_per_value: of an activation: 2 in bfloat16.
      image_side: of square images.
      num_views: of every image.
      num_local_crops: of every image, beside its views.
      local_side: of square local crops.

    Returns:
      multiply_adds_per_view (encoder and projector), multiply_adds_per_image of the loss, FLOPs
      per image and per step, bytes per view and per step unfused and fused, num_weights. With local
      crops multiply_adds_per_local_crop and bytes_per_local_crop too.
    """
    projector, dim = projector_layers(model), embedding_dim(model)
    in_projector = sum(layer.multiply_adds for layer in projector)

    def passes(side):
        layers = [*encoder_layers(model, side), *projector]
        moved = {
            name: bytes_per_value * sum(layer.values_moved(is_fused=is_fused) for layer in layers)
            for name, is_fused in (("unfused", False), ("fused", True))
        }
        return sum(layer.multiply_adds for layer in layers), moved

    in_view, per_view = passes(image_side)
    in_crop, per_crop = passes(local_side) if num_local_crops else (0, dict.fromkeys(per_view, 0))
    # The loss is one of two matrices, of all the views that lie in each; beside local crops one of
    # a matrix of each view.
    rows = batch_size if num_local_crops else batch_size * num_views // 2
    in_loss = (num_views + num_local_crops) * min(rows, dim) * dim
    flops = 2 * 3 * (num_views * in_view + num_local_crops * in_crop + in_loss)
    num_weights = sum(
        layer.num_weights for layer in [*encoder_layers(model, image_side), *projector]
    )
    of_parameters = _PARAMETER_PASSES * _BYTES_OF_PARAMETER * num_weights
    of_crops = {
        "multiply_adds_per_local_crop": {
            "encoder": in_crop - in_projector,
            "projector": in_projector,
        },
        "bytes_per_local_crop": per_crop,
    }
    return {
        "multiply_adds_per_view": {"encoder": in_view - in_projector, "projector": in_projector},
        "multiply_adds_per_image": {"loss": in_loss},
        "flops_per_image": flops,
        "flops_per_step": flops * batch_size,
        "bytes_per_view": per_view,
        "bytes_of_parameters": of_parameters,
        "bytes_per_step": {
            name: batch_size * (num_views * per_view[name] + num_local_crops * per_crop[name])
            + of_parameters
            for name in per_view
        },
        "num_weights": num_weights,
        **(of_crops if num_local_crops else {}),
    }


def floors(
    counted: Mapping[str, Any], *, flops_per_second: float, bytes_per_second: float
) -> dict[str, float]:
    """Seconds that a step takes at least, by arithmetic alone and by memory alone.

    Args:
      counted: of `count`.
      flops_per_second: a measured rate of matrix products.
      bytes_per_second: a measured rate of a copy, read and written bytes both counted.
    """
    memory = counted["bytes_per_step"]
    return {
        "arithmetic": counted["flops_per_step"] / flops_per_second,
        "memory_unfused": memory["unfused"] / bytes_per_second,
        "memory_fused": memory["fused"] / bytes_per_second,
    }
