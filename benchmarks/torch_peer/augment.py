"""Augmentation of a whole batch by tensors alone, with the semantics of jepa_jax.augment.

Pixels are floats in [0, 1] of shape [N, H, 3, W], each row's three channels side by side: both
halves of a resize are then plain batched matrix products. Every image has its own parameters.
"""

import math

import torch
from torch import Tensor

# jepa_jax.models has the same; importing it would need JAX.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

_LUMA = (0.2989, 0.587, 0.114)
_HUE = 3
Parameters = dict[str, Tensor]


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def random_boxes(num: int, height: int, width: int, device: torch.device) -> Parameters:
    """Boxes of RandomResizedCrop(scale 0.2-1, ratio 3/4-4/3), `num` of each number, float32.

    An image at least 3/4 and at most 4/3 as wide as high is its own fallback box.
    """
    area = height * width * _between(torch.rand(num, 10, device=device), 0.2, 1.0)
    bound = math.log(4 / 3)
    aspect = _between(torch.rand(num, 10, device=device), -bound, bound).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.gather(1, first)
    box_height = torch.where(found, heights.gather(1, first), float(height))[:, 0]
    box_width = torch.where(found, widths.gather(1, first), float(width))[:, 0]
    # uniform * count can round up to count.
    down, right = (height - box_height), (width - box_width)
    top = torch.minimum((torch.rand(num, device=device) * (down + 1)).floor(), down)
    left = torch.minimum((torch.rand(num, device=device) * (right + 1)).floor(), right)
    return {"top": top, "left": left, "height": box_height, "width": box_width}


def random_parameters(num: int, height: int, width: int, device: torch.device) -> Parameters:
    """What `augment` needs for `num` images; one that is not jittered has neutral numbers."""
    uniform = torch.rand(num, 8, device=device)
    is_jittered = uniform[:, :1] < 0.8
    amounts = torch.tensor([0.4, 0.4, 0.2], device=device)
    factors = 1.0 + amounts * (2.0 * uniform[:, 1:4] - 1.0)
    return {
        **random_boxes(num, height, width, device),
        "factors": torch.where(is_jittered, factors, 1.0),
        "hue": torch.where(is_jittered[:, 0], _between(uniform[:, 4], -0.1, 0.1), 0.0),
        "order": torch.rand(num, 4, device=device).argsort(1),
        "is_grey": uniform[:, 5] < 0.2,
        "is_solarized": uniform[:, 6] < 0.1,
        "is_flipped": uniform[:, 7] < 0.5,
    }


def _resize_weights(start: Tensor, extent: Tensor, in_size: int, out_size: int) -> Tensor:
    """Bilinear weights [N, out_size, in_size], widened where they shrink (anti-aliasing)."""
    stretch = (extent / out_size)[:, None]
    steps = torch.arange(out_size, device=start.device, dtype=torch.float32) + 0.5
    centres = start[:, None] + steps * stretch
    pixels = torch.arange(in_size, device=start.device, dtype=torch.float32)
    distance = (pixels + 0.5 - centres[:, :, None]).abs() / stretch.clamp(min=1.0)[:, :, None]
    inside = (pixels >= start[:, None]) & (pixels < (start + extent)[:, None])
    weights = torch.where(inside[:, None, :], (1.0 - distance).clamp(min=0.0), 0.0)
    return weights / weights.sum(2, keepdim=True)


def _crop_and_flip(pixels: Tensor, parameters: Parameters, size: int) -> Tensor:
    num, height, channels, width = pixels.shape
    rows = _resize_weights(parameters["top"], parameters["height"], height, size)
    cols = _resize_weights(parameters["left"], parameters["width"], width, size)
    # Columns read backwards flip the view, which nothing later can tell from a flip at the end.
    cols = torch.where(parameters["is_flipped"][:, None, None], cols.flip(1), cols)
    pixels = torch.bmm(rows, pixels.reshape(num, height, channels * width))
    pixels = torch.bmm(pixels.reshape(num, size * channels, width), cols.transpose(1, 2))
    return pixels.reshape(num, size, channels, size)


def _luma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.split(1, dim=2)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blends(pixels: Tensor, kinds: Tensor, factors: Tensor, is_active: Tensor) -> Tensor:
    """Brightness, contrast and saturation (kinds 0, 1, 2 of [N, 3]) in each image's order."""
    for place in range(3):
        kind = kinds[:, place, None]
        factor = torch.where(is_active[:, place, None], factors.gather(1, kind), 1.0)
        kind, factor = kind[:, :, None, None], factor[:, :, None, None]
        luma = _luma(pixels)
        mean = luma.mean((1, 2, 3), keepdim=True)
        other = torch.where(kind == 2, luma, torch.where(kind == 1, mean, 0.0))
        pixels = torch.lerp(other, pixels, factor).clamp(0.0, 1.0)
    return pixels


def _shift_hue(pixels: Tensor, delta: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(2)
    value = pixels.amax(2)
    chroma = value - pixels.amin(2)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    hue = (sixths + 6.0 * delta[:, None, None]).remainder(6.0)
    # Channel n of HSV is value - chroma * max(0, min(k, 4 - k, 1)), k = (n + 6 hue) mod 6.
    channels = []
    for n in (5.0, 3.0, 1.0):
        k = (n + hue).remainder(6.0)
        channels.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, 2)


def augment(pixels: Tensor, parameters: Parameters, size: int) -> Tensor:
    """Crop, jitter, greyscale, solarize and flip: [N, H, 3, W] to [N, size, 3, size].

    Args:
      pixels: floats in [0, 1].
      parameters: of `random_parameters`; `factors [N, 3]` of brightness, contrast and saturation,
        and `order [N, 4]`, a permutation of these three and the hue (3) for every image.
      size: of the views.
    """
    pixels = _crop_and_flip(pixels, parameters, size)
    order, factors = parameters["order"], parameters["factors"]
    # The hue is shifted once, between two rounds of blends; a blend of the other round is neutral.
    hue_place = (order == _HUE).to(torch.uint8).argmax(1, keepdim=True)
    places = torch.arange(3, device=order.device).expand(len(order), 3)
    kinds = order.gather(1, places + (places >= hue_place))
    pixels = _blends(pixels, kinds, factors, places < hue_place)
    pixels = _shift_hue(pixels, parameters["hue"])
    pixels = _blends(pixels, kinds, factors, places >= hue_place)
    pixels = torch.where(parameters["is_grey"][:, None, None, None], _luma(pixels), pixels)
    is_inverted = parameters["is_solarized"][:, None, None, None] & (pixels >= 128 / 255)
    return torch.where(is_inverted, 1.0 - pixels, pixels)


@torch.no_grad()
def two_views(
    images: Tensor, memory_format: torch.memory_format, size: int
) -> tuple[Tensor, Tensor]:
    """Two normalised views [B, 3, size, size] of uint8 images [B, H, 3, W], drawn anew."""
    num, height, _, width = images.shape
    pixels = (images / 255.0).repeat(2, 1, 1, 1)
    views = augment(pixels, random_parameters(2 * num, height, width, images.device), size)
    mean, std = (torch.tensor(c, device=images.device)[:, None] for c in (MEAN, STD))
    views = ((views - mean) / std).transpose(1, 2).contiguous(memory_format=memory_format)
    return views[:num], views[num:]
