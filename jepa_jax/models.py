"""Flax encoders and projector, and the two-function seam through which training sees any model.

Images are NHWC floats, normalised by the caller; representations `h [B, F]` and embeddings
`z [B, D]` are float32 when the compute dtype is narrower, else of the compute dtype.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.augment import to_float

# Channel means and standard deviations of CIFAR-10's training images, as the reference has them.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


def _torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of PyTorch's Linear and Conv2d."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _fan_out_normal(key, shape, dtype=jnp.float32):
    """N(0, 2 / fan_out), not truncated: torchvision's ResNet convolutions."""
    fan_out = shape[0] * shape[1] * shape[3]
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(jnp.asarray(2.0 / fan_out, dtype))


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm, with PyTorch's unbiased variance in the running statistics.

    Both normalise a training batch by its biased variance. What Flax then averages is that one;
    PyTorch averages n / (n - 1) of it, n being the number of values per channel. In a projector n
    is the batch size: weights could not move between the two without a drift in evaluation.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        is_updating = self.has_variable("batch_stats", "var") and not self.use_running_average
        old: Any = self.get_variable("batch_stats", "var") if is_updating else None
        x = super().__call__(x, use_running_average, mask=mask)
        if is_updating:
            kept = self.momentum * old
            added = self.get_variable("batch_stats", "var") - kept
            count = x.size // x.shape[self.axis]
            self.put_variable("batch_stats", "var", kept + added * (count / max(count - 1, 1)))
        return x


def _batch_norm(train: bool, dtype: Any, **options: Any) -> Callable[..., nn.Module]:
    return functools.partial(
        BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, **options
    )


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _conv(dtype: Any) -> Callable[..., nn.Module]:
    return functools.partial(nn.Conv, use_bias=False, kernel_init=_fan_out_normal, dtype=dtype)


def _skip(
    x: jax.Array, channels: int, stride: int, conv: Callable[..., Any], norm: Callable[..., Any]
) -> jax.Array:
    """The input itself, or where a block changes its shape, a 1x1 convolution of it."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, (1, 1), strides=stride, name="skip_conv")(x)
    return norm(name="skip_norm")(x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip (arXiv 1512.03385); the first may stride.

    [B, H, W, C] to [B, H / stride, W / stride, width].
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = _conv(self.dtype), _batch_norm(train, self.dtype)
        # (1, 1) on each side at every stride, as PyTorch pads; 'SAME' would pad strided ones less.
        conv3x3 = functools.partial(conv, self.width, (3, 3), padding=1)
        skip = _skip(x, self.width, self.stride, conv, norm)
        x = nn.relu(norm()(conv3x3(strides=self.stride)(x)))
        x = norm()(conv3x3()(x))
        return nn.relu(x + skip)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a skip (arXiv 1512.03385): ResNet-50's block.

    [B, H, W, C] to [B, H / stride, W / stride, 4 * width]. The 3x3 convolution strides, as in
    torchvision ("v1.5"); in the paper it is the first 1x1, which drops three of four positions.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = _conv(self.dtype), _batch_norm(train, self.dtype)
        channels = self.expansion * self.width
        skip = _skip(x, channels, self.stride, conv, norm)
        x = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        x = nn.relu(norm()(conv(self.width, (3, 3), strides=self.stride, padding=1)(x)))
        x = norm()(conv(channels, (1, 1))(x))
        return nn.relu(x + skip)


_BLOCKS = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


def _block_of(name: str) -> Any:
    if name not in _BLOCKS:
        raise ValueError(f"block must be one of {', '.join(_BLOCKS)}, got {name!r}")
    return _BLOCKS[name]


class ResNet(nn.Module):
    """ResNet (arXiv 1512.03385): stem, stages of blocks, average pooling, no head.

    By default it is the one for small images, with a 3x3 stem and no max-pool. The paper's own
    stem for larger images is stem_kernel=7, stem_stride=2, stem_padding=3, stem_pool=True.

    Stage i has `stage_sizes[i]` blocks of `width * 2**i` channels, or four times as many where the
    block is a bottleneck, and halves the map from the second stage on; F = `expand_dim`, or the
    channels of the last stage: width * 2**(num_stages - 1), times 4 for bottlenecks.

    Attributes:
      stage_sizes: blocks per stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34 and, of
        bottlenecks, ResNet-50.
      width: channels of the stem, and of the first stage's 3x3 convolutions.
      stem_kernel: side of the stem's filters.
      stem_stride: 1 as usual on CIFAR; 2 makes every map four times smaller.
      stem_padding: 1 is the community's CIFAR stem; the reference pads 2, which gives 34x34 maps.
      stem_pool: whether a 3x3 max-pool of stride 2 follows the stem.
      expand_dim: where not 0, the last stage ends in a 1x1 convolution to that many channels, with
        BatchNorm and ReLU, ahead of the pooling (the last layer of MobileNetV2, arXiv 1801.04381):
        F for the price of a small product. docs/recipe.md has what it gained.
      dtype: of the computation; parameters and BatchNorm's statistics are float32.
      remat: keeps of every block its input alone for the backward pass, which computes the rest
        anew: less memory, more time, the same numbers.
      block: 'basic', two 3x3 convolutions, or 'bottleneck', see `BottleneckBlock`.
    """

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    stem_kernel: int = 3
    stem_stride: int = 1
    stem_padding: int = 1
    stem_pool: bool = False
    expand_dim: int = 0
    dtype: Any = jnp.float32
    remat: bool = False
    block: str = "basic"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [B, H, W, 3] to representations h [B, F]."""
        x = nn.Conv(
            self.width,
            (self.stem_kernel, self.stem_kernel),
            strides=self.stem_stride,
            padding=self.stem_padding,
            use_bias=False,
            kernel_init=_torch_uniform(self.stem_kernel**2 * x.shape[-1]),
            dtype=self.dtype,
            name="stem_conv",
        )(x.astype(self.dtype))
        x = nn.relu(_batch_norm(train, self.dtype)(name="stem_norm")(x))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        make_block = _block_of(self.block)
        make_block = nn.remat(make_block, static_argnums=(2,)) if self.remat else make_block
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = make_block(
                    self.width * 2**stage, stride, self.dtype, name=f"stage{stage}_block{block}"
                )(x, train)
        if self.expand_dim:
            x = nn.Conv(
                self.expand_dim,
                (1, 1),
                use_bias=False,
                kernel_init=_fan_out_normal,
                dtype=self.dtype,
                name="expand_conv",
            )(x)
            x = nn.relu(_batch_norm(train, self.dtype)(name="expand_norm")(x))
        return jnp.mean(x, axis=(1, 2), dtype=_at_least_float32(x.dtype))


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), width=64)
ResNet18.__doc__ = "`ResNet` with the sizes of ResNet-18, F = 512; takes its other attributes."
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), width=64)
ResNet34.__doc__ = "`ResNet` with the sizes of ResNet-34, F = 512; takes its other attributes."
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), width=64, block="bottleneck")
ResNet50.__doc__ = "`ResNet` with the sizes of ResNet-50, F = 2048; takes its other attributes."


def block_expansion(block: str) -> int:
    """How many times its width a block of this name puts out: 1, or 4 for a bottleneck."""
    return _block_of(block).expansion


class Projector(nn.Module):
    """MLP from h [B, F] to z [B, D]: Linear, BatchNorm, ReLU twice, then Linear."""

    hidden_dim: int = 2048
    output_dim: int = 2048
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array, train: bool = False) -> jax.Array:
        x = h.astype(self.dtype)
        # A young encoder's features hardly differ between images: E[x^2] - E[x]^2, Flax's fast way
        # to a variance, would lose here a digit and a half of float32 in outputs and gradients.
        norm = _batch_norm(train, self.dtype, use_fast_variance=False)
        for layer, dim in enumerate((self.hidden_dim, self.hidden_dim, self.output_dim)):
            init = _torch_uniform(x.shape[-1])
            x = nn.Dense(dim, kernel_init=init, bias_init=init, dtype=self.dtype)(x)
            if layer < 2:
                x = nn.relu(norm()(x))
        return x.astype(_at_least_float32(x.dtype))


class ImageJEPA(nn.Module):
    """An encoder and a projector: images [B, H, W, 3] to (h [B, F], z [B, D]).

    Without a projector, z is h.
    """

    encoder: nn.Module
    projector: nn.Module | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        h = self.encoder(x, train)
        return h, (h if self.projector is None else self.projector(h, train))


# Where the parameters of a predictor lie among those of its model.
PREDICTOR = "predictor"


def without_predictor(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the network that is judged: a predictor is of use in training alone."""
    params = variables["params"]
    if isinstance(params, Mapping):
        params = {name: tree for name, tree in params.items() if name != PREDICTOR}
    return {**variables, "params": params}


class ModelFns(NamedTuple):
    """What training needs of a model; any framework that can supply the pair can be trained.

    init(key, images) -> variables, a dict with 'params' and, where there are any, 'batch_stats'.
    apply(variables, images, train) -> ((h, z), batch_stats): the statistics are the updated ones
      when `train`, else those that came in. Images are normalised floats [B, H, W, 3].
    predict(key, variables, target, views, embeddings) -> a scalar, for a model with a predictor:
      how far what it predicts lies from what the target network says. `target` are that network's
      variables, None where it is this very one; views (two batches) and embeddings z are those of
      the step. No gradient may reach what is predicted. See `predictors`.
    """

    init: Callable[[jax.Array, jax.Array], dict[str, Any]]
    apply: Callable[[dict[str, Any], jax.Array, bool], tuple[Any, Any]]
    predict: Callable[..., jax.Array] | None = None


class EncoderFns(NamedTuple):
    """An encoder alone, of any framework; `with_projector` makes a model of it.

    init(key, images) -> variables, a dict with 'params' and, where there are any, 'batch_stats'.
    apply(variables, images, train) -> (h [B, F], batch_stats): the statistics are the updated ones
      when `train`, else those that came in. Images are normalised floats [B, H, W, 3].
    """

    init: Callable[[jax.Array, jax.Array], dict[str, Any]]
    apply: Callable[[dict[str, Any], jax.Array, bool], tuple[Any, Any]]


def with_projector(encoder: EncoderFns, projector: Projector | None) -> ModelFns:
    """The whole model of an encoder of any framework; without a projector, z is h.

    Its variables have the names that an `ImageJEPA`'s have, 'encoder' and 'projector'.
    """

    def init(key, images):
        keys = jax.random.split(key)
        parts: dict[str, Any] = {"encoder": encoder.init(keys[0], images)}
        if projector is not None:
            h, _ = encoder.apply(parts["encoder"], images, False)
            parts["projector"] = projector.init(keys[1], h, False)
        variables = {kind: _of_kind(parts, kind) for kind in ("params", "batch_stats")}
        # None weakly typed: a step returns strong types, and would be compiled for either.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), variables)

    def apply(variables, images, train):
        own = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
        h, stats = encoder.apply(own, images, train)
        if projector is None:
            return (h, h), _of_kind({"encoder": {"batch_stats": stats}}, "batch_stats")
        own = {kind: tree["projector"] for kind, tree in variables.items() if "projector" in tree}
        z, projector_stats = linen_model(projector).apply(own, h, train)
        stats = {"encoder": {"batch_stats": stats}, "projector": {"batch_stats": projector_stats}}
        return (h, z), _of_kind(stats, "batch_stats")

    return ModelFns(init, apply)


def _of_kind(parts: dict[str, Any], kind: str) -> dict[str, Any]:
    """What is not empty of every part's 'params' or 'batch_stats'."""
    trees = {name: variables.get(kind, {}) for name, variables in parts.items()}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def linen_model(module: nn.Module) -> ModelFns:
    """The pair of functions of a Flax Linen module called as `module(images, train)`."""

    def init(key, images):
        return module.init(key, images, False)

    def apply(variables, images, train):
        if not train:
            return module.apply(variables, images, False), variables.get("batch_stats", {})
        output, updates = module.apply(variables, images, True, mutable=["batch_stats"])
        return output, updates.get("batch_stats", {})

    return ModelFns(init, apply)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(images - mean) / std per channel, for uint8 images or floats in [0, 1]; float32."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    means = jnp.asarray(mean, jnp.float32).reshape(shape)
    stds = jnp.asarray(std, jnp.float32).reshape(shape)
    return (to_float(images) - means) / stds


class Encoder(NamedTuple):
    """A model as evaluation sees it: raw images in, representations out, normalisation inside."""

    model: ModelFns
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 or [0, 1] images to what the model takes."""
        return normalize(images, self.mean, self.std)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """uint8 or [0, 1] images [B, H, W, 3] to h [B, F], by the running statistics."""
        (h, _), _ = self.model.apply(variables, self.normalize(images), False)
        return h.astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def embed(self, variables: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same, and the embeddings z [B, D] that the loss would see."""
        (h, z), _ = self.model.apply(variables, self.normalize(images), False)
        return h.astype(jnp.float32), z.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("num_filters", "patch_size"))
def patch_whitening_kernel(
    images: jax.Array, num_filters: int, *, patch_size: int = 3, eps: float = 1e-2
) -> jax.Array:
    """A stem kernel that whitens image patches: their covariance's eigenvectors with both signs.

    The leading num_filters / 2 eigenvectors, each divided by the square root of its eigenvalue
    plus `eps`, and their negatives (so that a ReLU loses nothing), as the initial value of a
    stem convolution.

    Args:
      images: normalised floats [N, H, W, C]; some 2,000 suffice.
      num_filters: even, at most 2 * patch_size**2 * C.

    Returns:
      kernel [patch_size, patch_size, C, num_filters].

    Raises:
      ValueError: if there are not enough eigenvectors, or num_filters is odd.
    """
    channels = images.shape[-1]
    num_dims = patch_size * patch_size * channels
    if num_filters % 2 or num_filters > 2 * num_dims:
        raise ValueError(
            f"a whitening stem has an even number of filters, at most {2 * num_dims}; "
            f"got {num_filters}"
        )
    patches = jax.lax.conv_general_dilated_patches(
        images,
        (patch_size, patch_size),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(-1, num_dims)
    patches = patches - jnp.mean(patches, axis=0, keepdims=True)
    eigenvalues, eigenvectors = jnp.linalg.eigh(patches.T @ patches / patches.shape[0])
    leading = slice(None, -num_filters // 2 - 1, -1)
    filters = eigenvectors[:, leading] / jnp.sqrt(eigenvalues[leading] + eps)[None, :]
    kernel = jnp.concatenate([filters, -filters], axis=1)
    # conv_general_dilated_patches orders a patch channel first: C, then rows, then columns.
    kernel = kernel.reshape(channels, patch_size, patch_size, num_filters)
    return kernel.transpose(1, 2, 0, 3)
