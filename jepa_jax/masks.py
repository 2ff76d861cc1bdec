"""Which patches of an image are context and which are to be predicted: I-JEPA's blocks.

A grid of patches is numbered row by row. Every shape is fixed by the grid alone, so that one
compiled program serves every draw; that is where this differs from the paper (arXiv 2301.08243,
section 3 and appendix A):

  target blocks  The paper draws one area, 0.15 to 0.2 of the image, and one aspect ratio, 0.75 to
                 1.5, for a batch, and a place for every block. Here the area is the one nearest the
                 middle of that range, of sides that differ at most 1.5 times, and every block
                 draws its place and which way round it lies.
  context        The paper takes a square of 0.85 to 1.0 of the image less the targets, and cuts
                 every image's list of patches to the shortest one of its batch. Here the number
                 is what is left when no two targets overlap; so many are drawn from the same square
                 less the targets, and from outside it only if there they are too few.
"""

import jax
import jax.numpy as jnp

NUM_BLOCKS = 4
_TARGET_SCALE = (0.15, 0.2)
_MOST_ASPECT = 1.5
_CONTEXT_SCALE = (0.85, 1.0)


def block_sides(grid: tuple[int, int]) -> tuple[int, int]:
    """The sides (short, long) of a target block, in patches.

    Args:
      grid: rows and columns of patches.

    Raises:
      ValueError: if no block has between 0.15 and 0.2 of the grid and fits it either way round.
    """
    num_patches, longest = grid[0] * grid[1], min(grid)
    low, high = (scale * num_patches for scale in _TARGET_SCALE)
    sides = [
        (short, long)
        for short in range(1, longest + 1)
        for long in range(short, longest + 1)
        if low <= short * long <= high and long <= _MOST_ASPECT * short
    ]
    if not sides:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} patches is too small for target blocks")
    return min(sides, key=lambda pair: (abs(pair[0] * pair[1] - (low + high) / 2), pair))


def num_context(grid: tuple[int, int]) -> int:
    """How many patches are context: those that four blocks without overlap leave."""
    short, long = block_sides(grid)
    return grid[0] * grid[1] - NUM_BLOCKS * short * long


def _place(key: jax.Array, most: jax.Array) -> jax.Array:
    """A whole number from 0 to `most`, itself included."""
    return jax.random.randint(key, (), 0, most + 1)


def _target_block(key: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Indices [short * long] of a block at a random place, either way round."""
    short, long = block_sides(grid)
    turn, top, left = jax.random.split(key, 3)
    height = jnp.where(jax.random.bernoulli(turn), short, long)
    width = short + long - height
    place = jnp.arange(short * long)
    rows = _place(top, grid[0] - height) + place // width
    columns = _place(left, grid[1] - width) + place % width
    return rows * grid[1] + columns


def _in_context_block(key: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Whether each patch [N] lies in a block that has the grid's own aspect ratio."""
    of_scale, top, left = jax.random.split(key, 3)
    low, high = _CONTEXT_SCALE
    side = jnp.sqrt(jax.random.uniform(of_scale, minval=low, maxval=high))
    height, width = (jnp.round(side * length).astype(jnp.int32) for length in grid)
    row, column = jnp.divmod(jnp.arange(grid[0] * grid[1]), grid[1])
    row, column = row - _place(top, grid[0] - height), column - _place(left, grid[1] - width)
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def sample_blocks(key: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The patches of one image that are context, and those of four blocks to predict from them.

    Args:
      key: a typed key.
      grid: rows and columns of patches.

    Returns:
      (context [C], targets [4, K]): int32 indices of patches. No patch is both; blocks may overlap
      one another. C is `num_context(grid)` and K the area of a block.

    Raises:
      ValueError: as `block_sides`.
    """
    of_blocks, of_context, of_choice = jax.random.split(key, 3)
    keys = jax.random.split(of_blocks, NUM_BLOCKS)
    targets = jax.vmap(lambda key: _target_block(key, grid))(keys)
    num_patches = grid[0] * grid[1]
    is_target = jnp.zeros(num_patches, bool).at[targets.reshape(-1)].set(True)
    # The context's patches rank above the others, any of them above a target.
    is_near = _in_context_block(of_context, grid).astype(jnp.float32)
    rank = jax.random.uniform(of_choice, (num_patches,)) + is_near
    _, context = jax.lax.top_k(jnp.where(is_target, -1.0, rank), num_context(grid))
    return jnp.sort(context), targets
