"""Laws of the masks, on grids of several shapes, over many draws."""

import functools

import jax
import numpy as np
import pytest

from jepa_jax.masks import NUM_BLOCKS, block_sides, num_context, sample_blocks

GRIDS = ((8, 8), (6, 9))
NUM_DRAWS = 400


@functools.lru_cache
def draws(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    return jax.device_get(jax.jit(jax.vmap(lambda key: sample_blocks(key, grid)))(keys))


@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_and_range(grid):
    context, targets = draws(grid)
    short, long = block_sides(grid)
    assert context.shape == (NUM_DRAWS, num_context(grid))
    assert targets.shape == (NUM_DRAWS, NUM_BLOCKS, short * long)
    for indices in (context, targets):
        assert indices.dtype == np.int32
        assert indices.min() == 0 and indices.max() == grid[0] * grid[1] - 1


@pytest.mark.parametrize("grid", GRIDS)
def test_context_has_no_patch_twice_and_none_of_a_target(grid):
    context, targets = draws(grid)
    for chosen, blocks in zip(context, targets, strict=True):
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(blocks.ravel())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_target_is_a_full_rectangle_and_lies_either_way(grid):
    short, long = block_sides(grid)
    seen = set()
    for block in draws(grid)[1].reshape(-1, short * long):
        rows, columns = np.divmod(block, grid[1])
        sides = (int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)
        assert sorted(sides) == [short, long]
        assert len(set(block)) == short * long
        seen.add(sides)
    assert seen == {(short, long), (long, short)}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_is_drawn_as_either(grid):
    for indices in draws(grid):
        assert set(indices.ravel()) == set(range(grid[0] * grid[1]))


def test_every_place_of_a_block_is_as_likely():
    grid = (8, 8)
    short, long = block_sides(grid)
    blocks = draws(grid)[1].reshape(-1, short * long)
    rows, columns = np.divmod(blocks[:, 0], grid[1])
    is_tall = np.ptp(blocks // grid[1], axis=1) + 1 == long
    rows, columns = rows[is_tall], columns[is_tall]
    assert abs(is_tall.mean() - 0.5) < 0.1
    counts = np.zeros((8 - long + 1, 8 - short + 1))
    np.add.at(counts, (rows, columns), 1)
    # A chi-squared of 29 degrees of freedom: above 80 once in a million.
    assert counts.size == 30
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 80


def test_context_comes_from_one_large_square():
    """Patches of the rim are seldom context: most squares leave one row and one column out."""
    grid = (8, 8)
    context, targets = draws(grid)
    counts = np.bincount(context.ravel(), minlength=64).reshape(grid)
    free = NUM_DRAWS - np.bincount(
        np.concatenate([np.unique(blocks) for blocks in targets]), minlength=64
    ).reshape(grid)
    share = counts / free
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    # Of seven rows of eight a corner is in one of four, and its row in one of two.
    assert corners < 0.8 * share[3:5, 3:5].mean()


@pytest.mark.parametrize("side", range(5, 33))
def test_sizes_are_those_of_the_paper(side):
    short, long = block_sides((side, side))
    assert 0.15 <= short * long / side**2 <= 0.2
    assert 1 <= long / short <= 1.5
    assert num_context((side, side)) >= 0.2 * side**2 - 1e-9


def test_too_small_a_grid_is_refused():
    with pytest.raises(ValueError, match="4x4 patches is too small"):
        block_sides((4, 4))


def test_draws_are_a_function_of_the_key_alone():
    one = sample_blocks(jax.random.key(3), (8, 8))
    same = sample_blocks(jax.random.key(3), (8, 8))
    other = sample_blocks(jax.random.key(4), (8, 8))
    np.testing.assert_array_equal(one[1], same[1])
    np.testing.assert_array_equal(one[0], same[0])
    assert (np.asarray(one[1]) != np.asarray(other[1])).any()
