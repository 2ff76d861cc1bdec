"""The floor that takes no learning: whitened random patches of the images as filters.

A single layer after Coates, Ng and Lee (AISTATS 2011) and Coates and Ng (ICML 2011) whose filters
are nothing but patches of training images. A linear probe on it says what the images' own
statistics give away: a pretrained encoder with as many features has learnt something if it is
above that.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.augment import to_float

# Both signs, pooled over four quadrants.
FEATURES_PER_FILTER = 8
# Larger images are first averaged down to this side, or their maps would fill the memory.
_SIDE = 32
# Patches whose moments whiten, and among which the filters are drawn.
_NUM_IMAGES, _PATCHES_OF_EACH = 5000, 20
# Added to a patch's variance, as in the paper: 10 for values from 0 to 255.
_CONTRAST_EPS = 10.0 / 255.0**2
# Of the eigenvalues of contrast-normalised patches.
_ZCA_EPS = 0.01
# Of the responses to filters of length 1.
_THRESHOLD = 0.5


class PatchFilters(NamedTuple):
    """Filters of contrast-normalised patches, the whitening inside them.

    Attributes:
      kernel: [P, P, C, n]; each filter's values add up to 0.
      offset: what the mean patch responds, [n].
    """

    kernel: jax.Array
    offset: jax.Array


@jax.jit
def _at_most_small(images: jax.Array) -> jax.Array:
    """Images uint8 or [0, 1] as floats, larger ones averaged down as for the floor of pixels."""
    images = to_float(images)
    count, height, width, channels = images.shape
    side = (min(height, _SIDE), min(width, _SIDE))
    return jax.image.resize(images, (count, *side, channels), "linear")


def _contrast_normalised(patches: jax.Array) -> jax.Array:
    """Patches [N, d] less their mean, over their standard deviation."""
    centred = patches - jnp.mean(patches, axis=1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), 1, keepdims=True) + _CONTRAST_EPS)


def _draw_patches(key: jax.Array, images: jax.Array, patch_size: int) -> jax.Array:
    """Some patches of every image [N, H, W, C], [patches * N, d], images changing fastest."""
    count, height, width, channels = images.shape
    shape = (_PATCHES_OF_EACH, count)
    row_key, column_key = jax.random.split(key)
    rows = jax.random.randint(row_key, shape, 0, height - patch_size + 1)
    columns = jax.random.randint(column_key, shape, 0, width - patch_size + 1)

    def patch(image, row, column):
        size = (patch_size, patch_size, channels)
        return jax.lax.dynamic_slice(image, (row, column, jnp.zeros_like(row)), size)

    of_each = jax.vmap(jax.vmap(patch), in_axes=(None, 0, 0))(images, rows, columns)
    return of_each.reshape(-1, patch_size * patch_size * channels)


@jax.jit
def _filters(patches: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(kernel [d, n], offset [n]) of patches [N, d], those at `chosen` [n] being the filters."""
    patches = _contrast_normalised(patches)
    mean = jnp.mean(patches, axis=0, keepdims=True)
    patches = patches - mean
    eigenvalues, eigenvectors = jnp.linalg.eigh(patches.T @ patches / patches.shape[0])
    scale = jax.lax.rsqrt(jnp.maximum(eigenvalues, 0.0) + _ZCA_EPS)
    whitening = (eigenvectors * scale[None]) @ eigenvectors.T
    filters = patches[chosen] @ whitening
    filters = filters / jnp.linalg.norm(filters, axis=1, keepdims=True)
    kernel = whitening @ filters.T
    offset = mean[0] @ kernel
    # A filter without a mean does not see that of a patch: subtracted here, it need not be there.
    return kernel - jnp.mean(kernel, axis=0, keepdims=True), offset


def random_patches(
    key: jax.Array, images: Any, *, num_filters: int, patch_size: int = 6
) -> tuple[Any, PatchFilters]:
    """An encoder of whitened random patches, for `evaluate_representation` and `extract_features`.

    Filters are patches of training images: contrast-normalised, ZCA-whitened and of length 1. An
    image's features are the responses of its own patches, normalised and whitened alike, rectified
    with both signs above a threshold and averaged over each quadrant. Nothing is trained and no
    label is seen.

    The whitening's epsilon and the threshold were chosen with 128 filters on validation images of
    CIFAR-10, by ridge; within 0.25 to 0.5 and 0.003 to 0.1 all lay within 0.8 points.

    Args:
      key: of the images and the patches drawn.
      images: training images, uint8 [N, H, W, C], an array or anything that indexes like one.
      num_filters: n.
      patch_size: side P of the filters.

    Returns:
      (apply, variables): apply(variables, images uint8 or [0, 1] [B, H, W, C]) -> h [B, 8 n].

    Raises:
      ValueError: if the images are smaller than a patch or num_filters is below 1.
    """
    height, width, channels = images.shape[1:]
    if min(height, width) <= patch_size or num_filters < 1:
        raise ValueError(
            f"patches of {patch_size} x {patch_size} need larger images than {height} x {width}, "
            f"and at least one filter, got {num_filters}"
        )
    image_key, patch_key, filter_key = jax.random.split(key, 3)
    num_images = min(len(images), _NUM_IMAGES)
    rows = jax.random.permutation(image_key, len(images))[:num_images]
    # In the order of the data set, which may lie on a disk.
    drawn = jax.device_put(np.asarray(images[np.sort(jax.device_get(rows))]))
    patches = _draw_patches(patch_key, _at_most_small(drawn), patch_size)
    with jax.default_matmul_precision("highest"):
        chosen = jax.random.choice(
            filter_key, len(patches), (num_filters,), replace=num_filters > len(patches)
        )
        kernel, offset = _filters(patches, chosen)
    shape = (patch_size, patch_size, channels, num_filters)
    return _apply, PatchFilters(kernel.reshape(shape), offset)


def _convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.jit
def _apply(variables: PatchFilters, images: jax.Array) -> jax.Array:
    kernel, offset = variables
    # About 0, so that the difference below loses less.
    images = _at_most_small(images) - 0.5
    with jax.default_matmul_precision("highest"):
        box = jnp.full((*kernel.shape[:3], 1), 1.0 / math.prod(kernel.shape[:3]), jnp.float32)
        mean, square = _convolve(images, box), _convolve(jnp.square(images), box)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        contrast = jax.lax.rsqrt(variance + _CONTRAST_EPS)
        responses = _convolve(images, kernel) * contrast - offset[None, None, None]
    row, column = -(-responses.shape[1] // 2), -(-responses.shape[2] // 2)
    quadrants = [
        part
        for half in (responses[:, :row], responses[:, row:])
        for part in (half[:, :, :column], half[:, :, column:])
    ]
    pooled = [
        jnp.mean(jax.nn.relu(sign * part - _THRESHOLD), axis=(1, 2))
        for part in quadrants
        for sign in (1.0, -1.0)
    ]
    return jnp.concatenate(pooled, axis=-1)
