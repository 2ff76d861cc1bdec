"""Joint-embedding prediction: from one part of an image what a target encoder says of another.

Two forms, each the `predict` of a `ModelFns` (see there), its parameters in params["predictor"]:

  predicts_views   from an image's one view the embedding of the other (BYOL, arXiv 2006.07733; with
                   no target network SimSiam, arXiv 2011.10566)
  predicts_blocks  from some patches of a view the tokens of others (I-JEPA, arXiv 2301.08243)

A predictor is used in training alone: its BatchNorm keeps no running statistics.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jepa_jax.losses import invariance_loss
from jepa_jax.masks import sample_blocks
from jepa_jax.models import PREDICTOR, BatchNorm, ModelFns, without_predictor
from jepa_jax.vit import TransformerBlock, ViT, sincos_positions

# Of the predictor's draw from the key of the model's own, which stays as it is.
_STREAM = 2**32 - 1
# Channels of a head of a `BlockPredictor`.
HEAD_DIM = 32


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


class EmbeddingPredictor(nn.Module):
    """MLP from z [B, D] to [B, D]: Linear, BatchNorm, ReLU, Linear (arXiv 2006.07733, section 3.3).

    BatchNorm normalises by the batch in training and evaluation.
    """

    hidden_dim: int = 4096
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as the projector's.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        x = nn.Dense(self.hidden_dim, kernel_init=init, dtype=self.dtype)(z.astype(self.dtype))
        norm = BatchNorm(
            use_running_average=False, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False
        )
        x = nn.relu(norm(x))
        return _wide(nn.Dense(z.shape[-1], kernel_init=init, dtype=self.dtype)(x))


class BlockPredictor(nn.Module):
    """A narrow transformer from an image's context to its target blocks (arXiv 2301.08243).

    Every block is guessed by itself, from the context's tokens and one mask token a patch of the
    block; both kinds carry the sincos position of their patch.

    Attributes:
      dim: channels, a multiple of `HEAD_DIM`.
      depth: transformer blocks.
    """

    dim: int = 384
    depth: int = 6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: jax.Array, context: jax.Array, targets: jax.Array, grid: tuple[int, int]
    ) -> jax.Array:
        """The guess for every patch of every block, [B, M, K, F].

        Args:
          tokens: of the context's patches, [B, C, F].
          context: indices of these patches, [B, C].
          targets: indices of the blocks' patches, [B, M, K].
          grid: rows and columns of patches.
        """
        batch, num_blocks, num_patches = targets.shape
        positions = sincos_positions(*grid, self.dim).reshape(-1, self.dim).astype(self.dtype)
        seen = nn.Dense(self.dim, dtype=self.dtype, name="inputs")(tokens.astype(self.dtype))
        seen = jnp.repeat(seen + positions[context], num_blocks, axis=0)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.dim,))
        masks = positions[targets] + mask_token.astype(self.dtype)[None, None, None, :]
        masks = masks.reshape(batch * num_blocks, num_patches, self.dim)
        x = jnp.concatenate([seen, masks], axis=1)
        for i in range(self.depth):
            x = TransformerBlock(self.dim // HEAD_DIM, dtype=self.dtype, name=f"block{i}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, -num_patches:])
        x = _wide(nn.Dense(tokens.shape[-1], dtype=self.dtype, name="outputs")(x))
        return x.reshape(*targets.shape, -1)


def _with_predictor(
    model: ModelFns,
    init_predictor: Callable[[jax.Array, Mapping[str, Any], jax.Array], Any],
    predict: Callable[..., jax.Array],
) -> ModelFns:
    """The model, to the bit, with a predictor's parameters beside its own.

    Args:
      init_predictor: (key, variables of the model, images) -> parameters.
    """

    def init(key, images):
        variables = model.init(key, images)
        own = init_predictor(jax.random.fold_in(key, _STREAM), variables, images)
        return {**variables, "params": {**variables["params"], PREDICTOR: own}}

    def apply(variables, images, train):
        return model.apply(without_predictor(variables), images, train)

    return ModelFns(init, apply, predict)


def predicts_views(model: ModelFns, predictor: EmbeddingPredictor) -> ModelFns:
    """A model whose embedding of either view is to tell the target network's of the other.

    The loss is the mean over both directions of the mean squared difference. (BYOL and SimSiam take
    it between vectors of length 1; here as in VICReg's invariance, whose place it takes.)
    """

    def init_predictor(key, variables, images):
        (_, z), _ = jax.eval_shape(lambda v: model.apply(v, images, False), variables)
        return predictor.init(key, jnp.zeros(z.shape, z.dtype))["params"]

    def predict(key, variables, target, views, embeddings):
        del key
        own = {"params": variables["params"][PREDICTOR]}
        p1, p2 = (predictor.apply(own, z, mutable=["batch_stats"])[0] for z in embeddings)
        targets = embeddings
        if target is not None:
            targets = [model.apply(target, view, True)[0][1] for view in views]
        t1, t2 = jax.lax.stop_gradient(targets)
        return (invariance_loss(p1, t2) + invariance_loss(p2, t1)) / 2

    return _with_predictor(model, init_predictor, predict)


def predicts_blocks(model: ModelFns, encoder: ViT, predictor: BlockPredictor) -> ModelFns:
    """A model whose tokens of some patches are to tell the target network's of four blocks.

    Blocks are drawn for every view by `masks.sample_blocks`. The targets are the target encoder's
    tokens of the whole view, each token brought to mean 0 and variance 1 over its channels, and the
    loss the mean smooth L1 distance, both as in the authors' program; the paper writes a squared
    distance (arXiv 2301.08243, section 3).

    Args:
      model: with the encoder's parameters in params["encoder"].
      encoder: of the model.
      predictor: see `BlockPredictor`.
    """

    def tokens(variables, views, keep=None):
        own = {"params": variables["params"]["encoder"]}
        return encoder.apply(own, views, True, keep, method="tokens")

    def grid_of(views):
        return views.shape[1] // encoder.patch_size, views.shape[2] // encoder.patch_size

    def init_predictor(key, variables, images):
        # Of one patch: no parameter has the shape of a block or a grid.
        patch = jnp.zeros((len(images), 1), jnp.int32)
        shape = jax.eval_shape(tokens, variables, images, patch)
        seen = jnp.zeros(shape.shape, shape.dtype)
        return predictor.init(key, seen, patch, patch[:, None], grid_of(images))["params"]

    def predict(key, variables, target, views, embeddings):
        del embeddings
        views = jnp.concatenate(views)
        grid, keys = grid_of(views), jax.random.split(key, len(views))
        context, targets = jax.vmap(lambda key: sample_blocks(key, grid))(keys)
        own = {"params": variables["params"][PREDICTOR]}
        guesses = predictor.apply(own, tokens(variables, views, context), context, targets, grid)
        wanted = tokens(variables if target is None else target, views)
        wanted = jax.nn.standardize(wanted, epsilon=1e-5)
        wanted = jnp.take_along_axis(wanted, targets.reshape(len(views), -1, 1), axis=1)
        wanted = jax.lax.stop_gradient(wanted)
        return jnp.mean(optax.losses.huber_loss(guesses.reshape(wanted.shape), wanted))

    return _with_predictor(model, init_predictor, predict)
