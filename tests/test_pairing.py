"""Losses of many views: against formulas written out; with two views, the two-view loss itself."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.losses import vicreg_loss
from jepa_jax.pairing import PAIRINGS, against_mean, lifted, over_pairs

B, D = 6, 4


def some_views(count, seed=0):
    return list(np.random.default_rng(seed).normal(size=(count, B, D)).astype(np.float32))


def squared(a, b):
    error = jnp.mean(jnp.square(a - b))
    return error, {"invariance_loss": error}


def energies(a, b):
    """What regularises views alone, and counts both."""
    total = jnp.mean(jnp.square(a)) + jnp.mean(jnp.square(b))
    return total, {}


def contrastive(a, b):
    """Symmetric, and no sum of a distance and of terms of one view."""
    a, b = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    logits = 5 * a @ b.T
    rows = [jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=axis))) for axis in (0, 1)]
    return -(rows[0] + rows[1]) / 2, {"best": jnp.max(logits)}


LOSSES = {
    "vicreg": functools.partial(vicreg_loss, sim_coeff=3.0, std_coeff=2.0, cov_coeff=5.0),
    "contrastive": contrastive,
}


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_global_views_are_the_two_view_loss_to_the_bit(pairing, name):
    loss, (z1, z2) = LOSSES[name], some_views(2)
    found, expected = PAIRINGS[pairing](loss, [z1, z2]), loss(z1, z2)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 3), (4, 0), (4, 1)])
def test_over_pairs_is_the_mean_of_every_global_view_with_every_other_view(num_global, num_local):
    views = some_views(num_global + num_local)
    loss = LOSSES["vicreg"]
    values = [
        loss(views[g], views[v])[0] for g in range(num_global) for v in range(len(views)) if v != g
    ]
    found, terms = over_pairs(loss, views[:num_global], views[num_global:])
    np.testing.assert_allclose(found, np.mean(values), rtol=1e-5)
    weighted = 3 * terms["invariance_loss"] + 2 * terms["var_loss"] + 5 * terms["cov_loss"]
    np.testing.assert_allclose(weighted, found, rtol=1e-5)


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 3), (4, 0), (4, 1)])
def test_against_mean_is_the_mean_over_views_of_the_distance_from_the_other_global_ones(
    num_global, num_local
):
    views = np.stack(some_views(num_global + num_local))
    values = []
    for place, view in enumerate(views):
        others = [v for other, v in enumerate(views[:num_global]) if other != place]
        values.append(np.mean((view - np.mean(others, axis=0)) ** 2))
    found, terms = against_mean(squared, list(views[:num_global]), list(views[num_global:]))
    np.testing.assert_allclose(found, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(terms["invariance_loss"], found)


def test_against_mean_is_the_distance_from_the_mean_of_all_global_views_to_a_known_factor():
    """As in LeJEPA's algorithm 2; its centre has the view itself in it, which local crops have not.

    Of G views the distance from the others' mean is G / (G - 1) times that from the mean of all.
    """
    for num_global in (2, 4):
        views = np.stack(some_views(num_global))
        lejepa = np.mean((views - views.mean(axis=0)) ** 2)
        found, _ = against_mean(squared, list(views))
        np.testing.assert_allclose(found, (num_global / (num_global - 1)) ** 2 * lejepa, rtol=1e-5)


@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 4), (4, 3)])
def test_what_regularises_views_counts_twice_in_all_however_many_there_are(num_global, num_local):
    """Twice a mean over views, of the weights that the docstring names."""
    alike = [np.ones((B, D), np.float32)] * (num_global + num_local)
    for pairing in PAIRINGS.values():
        found, _ = pairing(energies, alike[:num_global], alike[num_global:])
        np.testing.assert_allclose(found, 2.0, rtol=1e-6)
    views = some_views(num_global + num_local)
    weights = [2 * (num_global - 1) + num_local] * num_global + [num_global] * num_local
    mean = np.average([np.mean(view**2) for view in views], weights=weights)
    found, _ = over_pairs(energies, views[:num_global], views[num_global:])
    np.testing.assert_allclose(found, 2 * mean, rtol=1e-5)


@pytest.mark.parametrize("num_pairs", [1, 2, 3])
def test_vicregs_closed_form_over_all_pairs_agrees_with_the_lift(num_pairs):
    """In the invariance; with one pair in everything. What regularises has other rows else."""
    z1, z2 = (np.concatenate(some_views(num_pairs, seed)) for seed in (1, 2))
    closed, closed_terms = vicreg_loss(z1, z2, cov_coeff=1.0, num_pairs=num_pairs)

    def two_view(key, a, b, hparams):
        return vicreg_loss(a, b, cov_coeff=1.0)

    loss, terms = lifted(two_view, "pairs", num_pairs=num_pairs)(None, z1, z2, None)
    np.testing.assert_allclose(terms["invariance_loss"], closed_terms["invariance_loss"], rtol=1e-5)
    if num_pairs == 1:
        np.testing.assert_array_equal(loss, closed)


def test_a_lifted_loss_finds_each_images_views_and_hands_on_key_and_hparams():
    """Row n of every view says which image it is of, and which view."""
    num_pairs, num_crops, seen = 2, 3, []

    def spy(key, a, b, hparams):
        assert (key, hparams) == ("key", "hparams")
        for z in (a, b):
            np.testing.assert_array_equal(np.asarray(z)[:, 0], np.arange(B))
        seen.append((int(a[0, 1]), int(b[0, 1])))
        return jnp.zeros([]), {}

    def rows(images, views):
        return np.stack([images, views], axis=1).astype(np.float32)

    images = np.arange(B)
    z1 = rows(np.tile(images, 2), np.repeat([0, 1], B))
    z2 = rows(np.tile(images, 2), np.repeat([2, 3], B))
    local = rows(np.repeat(images, num_crops), np.tile([4, 5, 6], B))
    lifted(spy, "pairs", num_pairs=num_pairs)("key", z1, z2, local, "hparams")
    wanted = [*itertools.combinations(range(4), 2), *itertools.product(range(4), (4, 5, 6))]
    assert sorted(seen) == sorted(wanted)


def test_one_global_view_has_nothing_to_be_paired_with():
    for pairing in PAIRINGS.values():
        with pytest.raises(ValueError, match="at least two global views are needed, got 1"):
            pairing(squared, some_views(1), some_views(2))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradients_reach_every_view(pairing):
    views = some_views(5)

    def value(views):
        return PAIRINGS[pairing](LOSSES["vicreg"], views[:2], views[2:])[0]

    assert all(np.abs(grad).max() > 1e-3 for grad in jax.grad(value)(views))
