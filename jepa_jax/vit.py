"""Vision transformers: images in, one vector an image out, or one a patch.

Images are NHWC floats, normalised by the caller, as for `models.ResNet`; outputs are float32 where
the compute dtype is narrower, else of the compute dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Width, blocks and heads (arXiv 2010.11929, table 1; Ti and S as in DeiT, arXiv 2012.12877).
VIT_SIZES: dict[str, dict[str, Any]] = {
    "vit_ti": {"dim": 192, "depth": 12, "num_heads": 3},
    "vit_s": {"dim": 384, "depth": 12, "num_heads": 6},
    "vit_b": {"dim": 768, "depth": 12, "num_heads": 12},
}
POS_EMBEDS = ("learned", "sincos")
POOLS = ("cls", "mean")


def sincos_positions(height: int, width: int, dim: int) -> jax.Array:
    """Fixed positions of a grid of patches (arXiv 2104.02057): [height, width, dim], float32.

    A quarter of the channels each is sin and cos of the column, then of the row, at the
    frequencies 10000**(-i / (dim / 4)).

    Raises:
      ValueError: if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos positions need a dim that is a multiple of 4, got {dim}")
    quarter = dim // 4
    frequencies = 10000.0 ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)

    def waves(size: int) -> jax.Array:
        angles = jnp.arange(size, dtype=jnp.float32)[:, None] * frequencies[None, :]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)

    shape = (height, width, 2 * quarter)
    columns = jnp.broadcast_to(waves(width)[None, :, :], shape)
    rows = jnp.broadcast_to(waves(height)[:, None, :], shape)
    return jnp.concatenate([columns, rows], axis=2)


def _separate_xavier(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Glorot's uniform for the queries', keys' and values' matrices each (arXiv 2104.02057)."""
    bound = (6.0 / (shape[0] + shape[1] // 3)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _patch_xavier(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Glorot's uniform, a patch being one vector of shape[0] * shape[1] * shape[2] numbers."""
    bound = (6.0 / (shape[0] * shape[1] * shape[2] + shape[3])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _layer_norm(x: jax.Array, name: str) -> jax.Array:
    """In float32 or wider, whatever the compute dtype."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    # Two passes for the variance: the fast way loses digits where a token's mean is large.
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=wide, name=name)
    return norm(x.astype(wide))


_dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a skip (arXiv 2010.11929).

    Tokens [B, T, dim] to [B, T, dim]; dim must be a multiple of num_heads.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, num_tokens, dim = x.shape
        if dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {self.num_heads}")
        dense = functools.partial(_dense, dtype=self.dtype)
        y = _layer_norm(x, "attention_norm")
        qkv = dense(3 * dim, kernel_init=_separate_xavier, name="qkv")(y)
        qkv = qkv.reshape(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + dense(dim, name="attention_out")(y.reshape(batch, num_tokens, dim))
        y = _layer_norm(x, "mlp_norm")
        y = nn.gelu(dense(int(self.mlp_ratio * dim), name="mlp_in")(y), approximate=False)
        return x + dense(dim, name="mlp_out")(y)


class ViT(nn.Module):
    """Vision transformer (arXiv 2010.11929), pre-norm, without a head; F = `dim`.

    Images of another size than at init are taken too: learned positions are resized to the new
    grid of patches, sincos ones are those of the new grid. It has no BatchNorm and no dropout, and
    does the same in training and in evaluation.

    Attributes:
      patch_size: side of a patch; both sides of the images must be multiples of it.
      dim: channels of a token, a multiple of num_heads.
      depth: blocks.
      num_heads: of the attention.
      mlp_ratio: hidden units of a block's perceptron, in units of dim.
      pos_embed: 'learned', or 'sincos', see `sincos_positions`.
      pool: 'cls', the output at an additional class token, or 'mean', over the patches; there is
        no class token then.
      dtype: of the computation; parameters are float32.
      remat: keeps of every block its input alone for the backward pass, which computes the rest
        anew: less memory, more time, the same numbers.
    """

    patch_size: int = 4
    dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    pos_embed: str = "learned"
    pool: str = "cls"
    dtype: Any = jnp.float32
    remat: bool = False

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images [B, H, W, C] to representations h [B, F]."""
        x = self._transform(x, None)
        return x[:, 0] if self.pool == "cls" else jnp.mean(x, axis=1)

    def tokens(self, x: jax.Array, train: bool = False, keep: jax.Array | None = None) -> jax.Array:
        """Normalised images [B, H, W, C] to one vector a patch [B, K, F], row by row.

        keep: indices [K] or [B, K] of the patches to look at, the others are dropped before the
          first block, after the positions were added; None for all H * W / patch_size**2.
        """
        x = self._transform(x, keep)
        return x[:, 1:] if self.pool == "cls" else x

    @nn.compact
    def _transform(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        """All tokens behind the last LayerNorm, the class token (pool 'cls') ahead."""
        self._check(x)
        x = nn.Conv(
            self.dim,
            (self.patch_size, self.patch_size),
            strides=self.patch_size,
            padding="VALID",
            kernel_init=_patch_xavier,
            dtype=self.dtype,
            name="patch_embed",
        )(x.astype(self.dtype))
        batch, height, width, dim = x.shape
        x = x + self._positions(height, width)[None].astype(self.dtype)
        x = x.reshape(batch, height * width, dim)
        if keep is not None:
            x = x[:, keep] if keep.ndim == 1 else jnp.take_along_axis(x, keep[..., None], axis=1)
        if self.pool == "cls":
            token = self.param("class_token", nn.initializers.normal(1e-6), (dim,))
            if self.pos_embed == "learned":
                token = token + self.param("class_pos", nn.initializers.normal(0.02), (dim,))
            token = jnp.broadcast_to(token[None, None, :].astype(self.dtype), (batch, 1, dim))
            x = jnp.concatenate([token, x], axis=1)
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for i in range(self.depth):
            x = block(self.num_heads, self.mlp_ratio, self.dtype, name=f"block{i}")(x)
        return _layer_norm(x, "norm")

    def _positions(self, height: int, width: int) -> jax.Array:
        """[height, width, dim] for the grid at hand."""
        if self.pos_embed == "sincos":
            return sincos_positions(height, width, self.dim)
        positions: jax.Array
        if self.has_variable("params", "pos_embed"):
            positions = self.get_variable("params", "pos_embed")
        else:
            init = nn.initializers.normal(0.02)
            positions = self.param("pos_embed", init, (height, width, self.dim))
        if positions.shape[:2] != (height, width):
            positions = jax.image.resize(positions, (height, width, self.dim), "bicubic")
        return positions

    def _check(self, x: jax.Array) -> None:
        if self.pos_embed not in POS_EMBEDS:
            raise ValueError(f"pos_embed must be one of {POS_EMBEDS}, got {self.pos_embed!r}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels cannot be cut into patches of "
                f"{self.patch_size}: both sides must be multiples of it"
            )


ViTTi = functools.partial(ViT, **VIT_SIZES["vit_ti"])
ViTTi.__doc__ = "`ViT` of size Ti, F = 192; takes its other attributes."
ViTS = functools.partial(ViT, **VIT_SIZES["vit_s"])
ViTS.__doc__ = "`ViT` of size S, F = 384; takes its other attributes."
ViTB = functools.partial(ViT, **VIT_SIZES["vit_b"])
ViTB.__doc__ = "`ViT` of size B, F = 768; takes its other attributes."
