"""Image augmentation on the device, by torchvision's definitions.

Range contract: the cores take and return float images [H, W, 3] with values in [0, 1]; batches are
made by `jax.vmap`. A core is deterministic; a `random_*` function only samples and calls its core,
with the key first. `two_views` is the whole recipe, from uint8 batches.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Of the local crops' keys: `split` counts those of the other views from 0 and never comes here.
_LOCAL = 2**32 - 1
# ITU-R 601-2 luma, the weights of PIL's and torchvision's greyscale conversion.
_LUMA = (0.2989, 0.587, 0.114)


def _blend(image, other, factor):
    return jnp.clip(factor * image + (1.0 - factor) * other, 0.0, 1.0)


def rgb_to_grayscale(image: jax.Array) -> jax.Array:
    """Luma of an image [H, W, 3], repeated in all three channels."""
    red, green, blue = image[..., 0:1], image[..., 1:2], image[..., 2:3]
    luma = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return jnp.broadcast_to(luma, image.shape)


def adjust_brightness(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Multiplies by `factor` >= 0 and clips: 0 is black, 1 the image itself."""
    return _blend(image, 0.0, factor)


def adjust_contrast(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Blends with the mean luma of the whole image; `factor` >= 0, 1 is the image itself."""
    return _blend(image, jnp.mean(rgb_to_grayscale(image)), factor)


def adjust_saturation(image: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Blends with the greyscale image; `factor` >= 0, 0 is grey, 1 the image itself."""
    return _blend(image, rgb_to_grayscale(image), factor)


def adjust_hue(image: jax.Array, delta: jax.typing.ArrayLike) -> jax.Array:
    """Shifts the hue by `delta` turns of the colour circle, in [-0.5, 0.5]."""
    value = jnp.max(image, axis=-1)
    chroma = value - jnp.min(image, axis=-1)
    saturation = chroma / jnp.where(value > 0, value, 1.0)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    hue = jnp.mod(sixths / 6.0 + delta, 1.0)
    # Back to RGB: channel n is value * (1 - saturation * max(0, min(k, 4 - k, 1))) with
    # k = (n + 6 hue) mod 6 and n = 5, 3, 1, the branch-free form of the six sectors.
    n = jnp.array([5.0, 3.0, 1.0], image.dtype).reshape((1,) * hue.ndim + (3,))
    k = jnp.mod(n + 6.0 * hue[..., None], 6.0)
    drop = jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
    return value[..., None] * (1.0 - saturation[..., None] * drop)


def solarize(image: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
    """Inverts every value that is at or above `threshold`, in [0, 1]."""
    return jnp.where(image >= threshold, 1.0 - image, image)


def _blur_weights(sigma, kernel_size: int, side: int) -> jax.Array:
    """Rows of Gaussian weights [side, side], cut at kernel_size // 2 pixels, with sum 1.

    A tap beyond an edge falls on its mirror image in the edge's pixel: three distances a pair.
    """
    place = jnp.arange(side, dtype=jnp.float32)
    row, col, last = place[:, None], place[None, :], side - 1

    def weights(distance):
        falling = jnp.exp(-0.5 * jnp.square(distance / sigma))
        return jnp.where(jnp.abs(distance) <= kernel_size // 2, falling, 0.0)

    weights_of = weights(col - row)
    weights_of += jnp.where(col > 0, weights(col + row), 0.0)
    weights_of += jnp.where(col < last, weights(2 * last - col - row), 0.0)
    return weights_of / jnp.sum(weights_of, axis=1, keepdims=True)


def gaussian_blur(image: jax.Array, sigma: jax.typing.ArrayLike, kernel_size: int) -> jax.Array:
    """Blurs [H, W, C] by a Gaussian; the image goes on beyond its edges as a mirror shows it.

    torchvision's gaussian_blur of a square kernel. `sigma` may be traced, and another for every
    image of a batch: the blur is two matrices, one over rows and one over columns.

    Args:
      image: [H, W, C] in [0, 1].
      sigma: standard deviation in pixels, above 0.
      kernel_size: taps across, odd; half of them must be fewer than the rows and the columns.

    Raises:
      ValueError: for another kernel size.
    """
    height, width, _ = image.shape
    if kernel_size < 1 or kernel_size % 2 == 0 or kernel_size // 2 >= min(height, width):
        raise ValueError(
            f"a blur of {height} x {width} pixels has an odd kernel_size of at most "
            f"{2 * min(height, width) - 1}, got {kernel_size}"
        )
    sigma = jnp.asarray(sigma, jnp.float32)
    rows = _blur_weights(sigma, kernel_size, height)
    return _apply_rows_and_columns(image, rows, _blur_weights(sigma, kernel_size, width))


def random_gaussian_blur(
    key: jax.Array,
    image: jax.Array,
    *,
    kernel_size: int,
    sigma: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.1, 2.0),
) -> jax.Array:
    """Blurs with a standard deviation uniform in `sigma`, in pixels; see `gaussian_blur`."""
    return gaussian_blur(image, _between(jax.random.uniform(key), *sigma), kernel_size)


def _resize_weights(start, extent, in_size: int, out_size: int) -> jax.Array:
    """Rows of bilinear weights [out_size, in_size] that read the window [start, start + extent).

    A triangle filter, widened when it shrinks the window (the anti-aliasing of PIL and of
    torchvision), cut at the window's edge and normalised to sum 1.
    """
    start, extent = jnp.asarray(start, jnp.float32), jnp.asarray(extent, jnp.float32)
    stretch = extent / out_size
    centres = start + (jnp.arange(out_size, dtype=jnp.float32) + 0.5) * stretch
    pixels = jnp.arange(in_size, dtype=jnp.float32)
    distance = jnp.abs(pixels[None, :] + 0.5 - centres[:, None]) / jnp.maximum(stretch, 1.0)
    inside = (pixels >= start) & (pixels < start + extent)
    weights = jnp.where(inside[None, :], jnp.maximum(0.0, 1.0 - distance), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def resized_crop(
    image: jax.Array,
    top: jax.typing.ArrayLike,
    left: jax.typing.ArrayLike,
    height: jax.typing.ArrayLike,
    width: jax.typing.ArrayLike,
    size: int,
) -> jax.Array:
    """Cuts the box [top, top + height) x [left, left + width) and resizes it, bilinear.

    The box may be traced: the crop and the resize are two small matrices, one over rows and one
    over columns, so that every image of a batch can have its own box.

    Args:
      image: [H, W, C] in [0, 1].
      top, left, height, width: the box in whole pixels, inside the image, at least 1 x 1.
      size: of the square result.

    Returns:
      [size, size, C].
    """
    rows = _resize_weights(top, height, image.shape[0], size)
    cols = _resize_weights(left, width, image.shape[1], size)
    return _apply_rows_and_columns(image, rows, cols)


def _apply_rows_and_columns(image, rows, cols):
    # float32 products: a GPU's default would round pixels to 10 bits of mantissa.
    return jnp.einsum("ph,hwc,qw->pqc", rows, image, cols, precision="highest")


def random_crop_box(
    key: jax.Array,
    height: int,
    width: int,
    *,
    scale: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The box of a RandomResizedCrop: (top, left, height, width), int32 scalars.

    Area uniform in `scale` of the image's, aspect ratio log-uniform in `ratio`, both rounded to
    whole pixels; the first of ten draws that fits is taken, else the largest centred box whose
    aspect ratio lies in `ratio`.
    """
    # One draw for all: on a CPU every call of the generator adds a fifth of a second of compiling.
    uniform = jax.random.uniform(key, (22,))
    area = height * width * _between(uniform[:10], *scale)
    aspect = jnp.exp(_between(uniform[10:20], math.log(ratio[0]), math.log(ratio[1])))
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)

    centred_width, centred_height = width, height
    if width / height < ratio[0]:
        centred_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        centred_width = round(height * ratio[1])
    found = fits[first]
    box_height = jnp.where(found, heights[first], centred_height)
    box_width = jnp.where(found, widths[first], centred_width)
    top = _whole_below(uniform[20], height - box_height + 1)
    left = _whole_below(uniform[21], width - box_width + 1)
    top = jnp.where(found, top, (height - centred_height) // 2)
    left = jnp.where(found, left, (width - centred_width) // 2)
    return top, left, box_height, box_width


def _between(uniform: jax.Array, low: Any, high: Any) -> Any:
    return low + (high - low) * uniform


def _whole_below(uniform, count) -> jax.Array:
    """A number of [0, 1) to a whole number of [0, count), int32."""
    whole = jnp.floor(uniform * jnp.asarray(count, jnp.float32)).astype(jnp.int32)
    # uniform * count can round up to count.
    return jnp.minimum(whole, count - 1)


def color_jitter(
    image: jax.Array,
    order: jax.Array,
    *,
    brightness: jax.typing.ArrayLike,
    contrast: jax.typing.ArrayLike,
    saturation: jax.typing.ArrayLike,
    hue: jax.typing.ArrayLike,
) -> jax.Array:
    """Applies the four adjustments in the given order.

    `order` is a permutation of 0..3 (brightness, contrast, saturation, hue), which may be traced.
    Under `vmap` a switch would compute all four at each of four places. Three of them are blends
    with another image, cheap to choose from; so the hue is shifted once, between two rounds of
    blends, and a blend whose turn is in the other round gets the factor 1, the identity.
    """
    factors = jnp.stack([jnp.asarray(f, image.dtype) for f in (brightness, contrast, saturation)])
    hue_place = jnp.argmax(order == 3)

    def blends(image, is_active):
        for place in range(4):
            kind = order[place]
            grey = rgb_to_grayscale(image)
            other = jnp.where(kind == 2, grey, jnp.where(kind == 1, jnp.mean(grey), 0.0))
            factor = jnp.where(is_active(place) & (kind != 3), factors[jnp.minimum(kind, 2)], 1.0)
            image = _blend(image, other, factor)
        return image

    image = blends(image, lambda place: place < hue_place)
    image = adjust_hue(image, hue)
    return blends(image, lambda place: place > hue_place)


def random_jitter_parameters(
    key: jax.Array,
    *,
    brightness: jax.typing.ArrayLike = 0.4,
    contrast: jax.typing.ArrayLike = 0.4,
    saturation: jax.typing.ArrayLike = 0.2,
    hue: jax.typing.ArrayLike = 0.1,
) -> dict[str, jax.Array]:
    """What `color_jitter` needs beside the image: all 24 orders alike, every number uniform.

    The factors lie in [max(0, 1 - a), 1 + a], a being the argument of their name, and the hue in
    [-hue, hue].
    """
    uniform = jax.random.uniform(key, (5,))
    orders = jnp.array(list(itertools.permutations(range(4))), jnp.int32)

    def factor(uniform, amount):
        return _between(uniform, jnp.maximum(0.0, 1.0 - amount), 1.0 + amount)

    return {
        "order": orders[_whole_below(uniform[0], len(orders))],
        "brightness": factor(uniform[1], brightness),
        "contrast": factor(uniform[2], contrast),
        "saturation": factor(uniform[3], saturation),
        "hue": _between(uniform[4], jnp.negative(hue), hue),
    }


def random_color_jitter(
    key: jax.Array, image: jax.Array, **amounts: jax.typing.ArrayLike
) -> jax.Array:
    """Jitters in random order; `amounts` are those of `random_jitter_parameters`."""
    return color_jitter(image, **random_jitter_parameters(key, **amounts))


def random_view(
    key: jax.Array,
    image: jax.Array,
    *,
    size: int | None = None,
    scale: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.2, 1.0),
    jitter_prob: jax.typing.ArrayLike = 0.8,
    grayscale_prob: jax.typing.ArrayLike = 0.2,
    solarize_prob: jax.typing.ArrayLike = 0.1,
    flip_prob: jax.typing.ArrayLike = 0.5,
    blur_kernel: int = 0,
    blur_prob: jax.typing.ArrayLike = 0.0,
    blur_sigma: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.1, 2.0),
    **amounts: jax.typing.ArrayLike,
) -> jax.Array:
    """One augmented view of an image [H, W, 3] in [0, 1]: [size, size, 3] in [0, 1].

    RandomResizedCrop, colour jitter, greyscale, Gaussian blur, solarize at 128/255, horizontal
    flip, in this order and each with its probability. `scale` and `amounts` are those of
    `random_crop_box` and `random_jitter_parameters`, `blur_kernel` and `blur_sigma` those of
    `random_gaussian_blur`; without a `blur_kernel` no blur is computed. Every number but `size` and
    `blur_kernel` may be traced.

    Raises:
      ValueError: for a `blur_prob` above 0 without a `blur_kernel`, or an impossible one.
    """
    if not blur_kernel and isinstance(blur_prob, int | float) and blur_prob > 0:
        raise ValueError("a blur_prob above 0 needs a blur_kernel, odd and in pixels")
    crop_key, jitter_key, choice_key = jax.random.split(key, 3)
    height, width, _ = image.shape
    size = size or height
    jittered, greyed, solarized, flipped = jax.random.uniform(choice_key, (4,)) < jnp.array(
        [jitter_prob, grayscale_prob, solarize_prob, flip_prob]
    )
    top, left, box_height, box_width = random_crop_box(crop_key, height, width, scale=scale)
    cols = _resize_weights(left, box_width, width, size)
    # Reading the columns backwards flips the view, which no later step can tell from a flip last.
    cols = jnp.where(flipped, cols[::-1], cols)
    image = _apply_rows_and_columns(image, _resize_weights(top, box_height, height, size), cols)
    image = jnp.where(jittered, random_color_jitter(jitter_key, image, **amounts), image)
    image = jnp.where(greyed, rgb_to_grayscale(image), image)
    if blur_kernel:
        # split has used 0, 1 and 2 of this key: blurred or not, all other draws are the same.
        blurred = jax.random.uniform(jax.random.fold_in(key, 3)) < blur_prob
        blur = random_gaussian_blur(
            jax.random.fold_in(key, 4), image, kernel_size=blur_kernel, sigma=blur_sigma
        )
        image = jnp.where(blurred, blur, image)
    return jnp.where(solarized, solarize(image, 128 / 255), image)


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images to float32 in [0, 1]; float images are taken to be in [0, 1] already.

    Raises:
      ValueError: for whole numbers of another type, of which nobody can tell.
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255.0
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floats in [0, 1], got {images.dtype}")
    return images.astype(jnp.float32)


def resize_images(images: jax.Array, size: int) -> jax.Array:
    """Images uint8 or [0, 1], [B, H, W, C], to float32 in [0, 1], [B, size, size, C].

    Bilinear with anti-aliasing, as the crops of a view are.
    """
    images = to_float(images)
    shape = (images.shape[0], size, size, images.shape[-1])
    return images if images.shape == shape else jax.image.resize(images, shape, "bilinear")


def two_views(
    key: jax.Array, images: jax.Array, *, size: int | None = None, **view_options: Any
) -> tuple[jax.Array, jax.Array]:
    """Two independent augmented views of every image.

    Args:
      key: a typed key (jax.random.key); image i of view v has a key of its own.
      images: uint8, or float in [0, 1], [B, H, W, 3].
      size: side of the views; that of the images when None.
      **view_options: of `random_view`.

    Returns:
      (x1, x2), float32 in [0, 1], [B, size, size, 3] each.

    Raises:
      ValueError: if images are not [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3], got {images.shape}")
    images = to_float(images)
    view = jax.vmap(lambda key, image: random_view(key, image, size=size, **view_options))
    keys = jax.random.split(key, (2, images.shape[0]))
    return view(keys[0], images), view(keys[1], images)


def pairs_of_views(
    key: jax.Array, images: jax.Array, *, num_pairs: int = 1, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Several pairs of views of every image, one below the other.

    Args:
      key: a typed key.
      images: as for `two_views`, [B, H, W, 3].
      num_pairs: P; with 1 these are `two_views`.
      **options: of `two_views`.

    Returns:
      (x1, x2), float32 in [0, 1], [P * B, size, size, 3] each: rows n, n + B, n + 2B, ... of both
      are views of image n.

    Raises:
      ValueError: as `two_views`.
    """
    return two_views(key, jnp.concatenate([images] * num_pairs), **options)


def multi_crop_views(
    key: jax.Array,
    images: jax.Array,
    *,
    num_local_crops: int,
    local_size: int,
    local_scale: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.05, 0.2),
    local_blur_kernel: int = 0,
    num_pairs: int = 1,
    size: int | None = None,
    scale: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0.2, 1.0),
    blur_kernel: int = 0,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The views of `pairs_of_views`, to the bit, and beside them small crops of small parts.

    Multi-crop (SwAV, arXiv 2006.09882): the small crops change as the other views do but for their
    `local_scale`, `local_size` and `local_blur_kernel`. The rows of an image's crops lie together,
    so that devices that share a batch by its rows share the crops in the same way.

    Args:
      key: a typed key; crop l of image i has a key of its own, however many crops there are.
      images: as for `two_views`, [B, H, W, 3].
      num_local_crops: L, at least 1.
      local_size: side of the small crops.
      local_scale: share of the image that a small crop takes, from and to.
      local_blur_kernel: of the small crops, see `random_view`.
      num_pairs, size, scale, blur_kernel, **options: of `pairs_of_views`.

    Returns:
      (x1, x2, local), float32 in [0, 1]: [P * B, size, size, 3] twice, and
      [B * L, local_size, local_size, 3], whose rows L * n to L * n + L - 1 are crops of image n.

    Raises:
      ValueError: as `two_views`.
    """
    shared = {"size": size, "scale": scale, "blur_kernel": blur_kernel}
    x1, x2 = pairs_of_views(key, images, num_pairs=num_pairs, **shared, **options)
    own = {"size": local_size, "scale": local_scale, "blur_kernel": local_blur_kernel, **options}
    crops_of_image = jax.vmap(lambda key, image: random_view(key, image, **own), in_axes=(0, None))
    keys = jax.random.split(jax.random.fold_in(key, _LOCAL), (num_local_crops, len(images)))
    crops = jax.vmap(crops_of_image)(keys.T, to_float(images))
    return x1, x2, crops.reshape(-1, *crops.shape[2:])
