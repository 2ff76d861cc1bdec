"""SIGReg, LeJEPA, Barlow Twins and SimCLR against their formulas in float64, and their laws."""

import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.losses import (
    barlow_twins_loss,
    epps_pulley,
    lejepa_loss,
    nt_xent_loss,
    random_directions,
    sigreg_loss,
)

KEY = jax.random.key(3)
NUM_DIRECTIONS = 8


def views_of(shape, num_pairs=1, seed=0):
    """2P correlated views of B / P images, [2P, N, D]."""
    rng = np.random.default_rng(seed)
    num_rows, num_dims = shape[0] // num_pairs, shape[1]
    common = rng.normal(size=(num_rows, num_dims)) * np.linspace(0.4, 1.6, num_dims)
    common += rng.normal(size=num_dims)
    return common + 0.4 * rng.normal(size=(2 * num_pairs, num_rows, num_dims))


def halves(views):
    """z1 and z2 of `views_of`, as `pairs_of_views` stacks them."""
    return [np.float32(half.reshape(-1, views.shape[-1])) for half in np.split(views, 2)]


# --- the definitions ----------------------------------------------------------------------------


def statistic_by_hand(view, limit, num_points):
    """Epps-Pulley of the directions of KEY, by complex exponentials."""
    directions = np.float64(random_directions(KEY, view.shape[1], NUM_DIRECTIONS, jnp.float32))
    knots = np.linspace(-limit, limit, num_points)
    normal = np.exp(-(knots**2) / 2)
    found = []
    for direction in directions.T:
        empirical = np.mean(np.exp(1j * np.outer(view @ direction, knots)), axis=0)
        found.append(np.trapezoid(np.abs(empirical - normal) ** 2 * normal, knots))
    return np.mean(found)


def sigreg_by_hand(views):
    pairs = itertools.combinations(views, 2)
    invariance = np.mean([np.mean((a - b) ** 2) for a, b in pairs])
    return invariance, np.mean([statistic_by_hand(view, 3, 10) for view in views])


def lejepa_by_hand(views):
    prediction = np.mean([np.mean((view - np.mean(views, axis=0)) ** 2) for view in views])
    num_rows = views.shape[1]
    return prediction, np.mean([num_rows * statistic_by_hand(view, 5, 17) for view in views])


def barlow_by_hand(views):
    invariance, redundancy = [], []
    num_dims = views.shape[-1]
    for a, b in itertools.combinations(views, 2):
        correlation = np.corrcoef(a, b, rowvar=False)[:num_dims, num_dims:]
        invariance.append(sum((1 - correlation[i, i]) ** 2 for i in range(num_dims)))
        others = [(i, j) for i in range(num_dims) for j in range(num_dims) if i != j]
        redundancy.append(sum(correlation[place] ** 2 for place in others))
    return np.mean(invariance), np.mean(redundancy)


def simclr_by_hand(views, temperature=0.3):
    """The mean of -log(exp(s_ij / T) / sum over k != i of exp(s_ik / T)), as two summands."""
    num_images = views.shape[1]
    rows = views.reshape(-1, views.shape[-1])
    alignment, uniformity = [], []
    for i, anchor in enumerate(rows):
        similarity = rows @ anchor / np.linalg.norm(rows, axis=1) / np.linalg.norm(anchor)
        others = [k for k in range(len(rows)) if k != i]
        positives = [k for k in others if k % num_images == i % num_images]
        total = sum(math.exp((similarity[k] - 1) / temperature) for k in others)
        alignment.append(np.mean([(1 - similarity[k]) / temperature for k in positives]))
        uniformity.append(math.log(total))
    return np.mean(alignment), np.mean(uniformity)


def sketched(loss, z1, z2, **options):
    return loss(KEY, z1, z2, num_directions=NUM_DIRECTIONS, **options)


# Name to (loss, its formula's terms in order, their weights by default, the terms' names).
LOSSES = {
    "sigreg": (
        functools.partial(sketched, sigreg_loss),
        sigreg_by_hand,
        (1.0, 10.0),
        ("invariance_loss", "sigreg_loss"),
    ),
    "lejepa": (
        functools.partial(sketched, lejepa_loss),
        lejepa_by_hand,
        (0.95, 0.05),
        ("prediction_loss", "sigreg_loss"),
    ),
    "barlow": (
        functools.partial(barlow_twins_loss, eps=0.0),
        barlow_by_hand,
        (1.0, 0.005),
        ("invariance_loss", "redundancy_loss"),
    ),
    "simclr": (
        functools.partial(nt_xent_loss, temperature=0.3),
        simclr_by_hand,
        (1.0, 1.0),
        ("alignment_loss", "uniformity_loss"),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def compiled(name, num_pairs=1):
    """(loss, terms) and the gradients by z1 and z2; compiled once a shape."""
    loss = functools.partial(LOSSES[name][0], num_pairs=num_pairs)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@every_loss
@pytest.mark.parametrize(("shape", "num_pairs"), [((6, 9), 1), ((12, 4), 1), ((12, 4), 2)])
def test_value_and_terms_are_those_of_the_definition(name, shape, num_pairs):
    _, by_hand, weights, names = LOSSES[name]
    views = views_of(shape, num_pairs)
    (loss, terms), _ = compiled(name, num_pairs)(*halves(views))
    expected = by_hand(views)
    assert set(terms) == set(names)
    np.testing.assert_allclose([terms[key] for key in names], expected, rtol=5e-5)
    np.testing.assert_allclose(loss, np.dot(weights, expected), rtol=5e-5)


@every_loss
@pytest.mark.parametrize(("shape", "num_pairs"), [((6, 9), 1), ((12, 4), 1), ((12, 4), 2)])
def test_gradients_are_slopes_of_the_definition(name, shape, num_pairs):
    _, by_hand, weights, _ = LOSSES[name]
    views = views_of(shape, num_pairs, seed=1)
    _, gradients = compiled(name, num_pairs)(*halves(views))
    gradients = np.stack(gradients).reshape(views.shape)
    rng = np.random.default_rng(2)
    for _ in range(3):
        step = 1e-5 * rng.normal(size=views.shape)
        slope = np.dot(weights, np.subtract(by_hand(views + step), by_hand(views - step))) / 2
        scale = np.linalg.norm(gradients) * np.linalg.norm(step)
        np.testing.assert_allclose(np.sum(gradients * step), slope, atol=2e-4 * scale, rtol=0)


# --- what holds for all -------------------------------------------------------------------------


@every_loss
def test_symmetric_in_the_views_and_invariant_to_the_order_of_images(name):
    z1, z2 = halves(views_of((12, 4), seed=4))
    order = np.random.default_rng(5).permutation(len(z1))
    (loss, _), _ = compiled(name)(z1, z2)
    for other in ((z2, z1), (z1[order], z2[order])):
        np.testing.assert_allclose(compiled(name)(*other)[0][0], loss, rtol=1e-5)


@every_loss
def test_bfloat16_is_computed_in_float32(name):
    z = [jnp.asarray(half, jnp.bfloat16) for half in halves(views_of((12, 4)))]
    loss = LOSSES[name][0]
    (half, terms), (full, _) = loss(*z), loss(*(x.astype(jnp.float32) for x in z))
    assert {half.dtype, *(term.dtype for term in terms.values())} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(half, full, rtol=1e-6)


@every_loss
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_collapsed_batch_has_a_finite_loss_and_gradients(name, value):
    """With the losses' own eps: a constant dimension has no correlation, a zero row no angle."""
    loss = {"barlow": barlow_twins_loss}.get(name, LOSSES[name][0])
    z = np.full((12, 4), value, np.float32)
    (found, _), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(z, z)
    assert np.isfinite(found) and all(np.all(np.isfinite(gradient)) for gradient in gradients)


@every_loss
@pytest.mark.parametrize(
    ("shape1", "shape2", "num_pairs", "message"),
    [
        ((4, 3), (4, 2), 1, r"one shape \[B, D\], got \(4, 3\) and \(4, 2\)"),
        ((4, 3, 2), (4, 3, 2), 1, r"\[B, D\]"),
        ((4,), (4,), 1, r"\[B, D\]"),
        ((5, 3), (5, 3), 2, "5 rows are not num_pairs = 2 views"),
        ((5, 3), (5, 3), 0, "5 rows are not num_pairs = 0 views"),
    ],
)
def test_shapes_that_have_no_loss_are_refused(name, shape1, shape2, num_pairs, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name][0](jnp.zeros(shape1), jnp.zeros(shape2), num_pairs=num_pairs)


@pytest.mark.parametrize("loss", [barlow_twins_loss, nt_xent_loss])
def test_one_image_has_neither_a_correlation_nor_a_contrast(loss):
    with pytest.raises(ValueError, match=r"2 images or more, got 1 in \(2, 3\)"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), num_pairs=2)


@pytest.mark.parametrize(
    ("loss", "coeffs"),
    [
        (sketched, {"loss": sigreg_loss, "sim_coeff": 3.0, "sigreg_coeff": 7.0}),
        (sketched, {"loss": lejepa_loss, "sim_coeff": 3.0, "sigreg_coeff": 7.0}),
        (barlow_twins_loss, {"redundancy_coeff": 7.0}),
    ],
    ids=["sigreg", "lejepa", "barlow"],
)
def test_coefficients_may_be_traced_and_scale_their_terms(loss, coeffs):
    z1, z2 = halves(views_of((12, 4), seed=9))
    fixed = {"loss": coeffs.pop("loss")} if "loss" in coeffs else {}
    traced = {name: np.float32(value) for name, value in coeffs.items()}
    found, terms = jax.jit(lambda c: loss(z1=z1, z2=z2, **fixed, **c))(traced)
    first, second = terms.values()  # in the order of their names, as jit gives them back
    weights = [coeffs.get("sim_coeff", 1.0), [*coeffs.values()][-1]]
    np.testing.assert_allclose(found, weights[0] * first + weights[1] * second, rtol=1e-5)


# --- SIGReg and LeJEPA --------------------------------------------------------------------------


def test_the_statistic_is_the_integral_over_all_t_in_closed_form():
    """Gaussian integrals in place of knots: exp(-t^2/2), exp(-t^2) and exp(-3t^2/2) times cos."""
    samples = np.random.default_rng(0).normal(0.3, 1.4, size=40)
    gaps = samples[:, None] - samples[None, :]
    exact = math.sqrt(2 * math.pi) * np.mean(np.exp(-(gaps**2) / 2))
    exact -= 2 * math.sqrt(math.pi) * np.mean(np.exp(-(samples**2) / 4))
    exact += math.sqrt(2 * math.pi / 3)
    found = epps_pulley(jnp.float32(samples)[:, None], limit=8.0, num_points=65)
    np.testing.assert_allclose(found, [exact], rtol=1e-4)


@pytest.mark.parametrize(("limit", "num_points"), [(3.0, 10), (5.0, 17), (4.0, 11)])
def test_it_vanishes_for_the_quantiles_of_a_normal_and_for_nothing_else(limit, num_points):
    places = (np.arange(4096) + 0.5) / 4096
    normal = np.array([statistics.NormalDist().inv_cdf(place) for place in places])
    others = [2 * normal, normal + 0.5, np.sign(normal), 3.4 * places - 1.7, 0 * normal]
    x = jnp.float32(np.stack([normal, *others], axis=1))
    found = epps_pulley(x, limit=limit, num_points=num_points)
    assert found[0] < 1e-6 and np.min(found[1:]) > 1e-3


def test_of_n_normal_samples_it_is_one_nth_of_a_constant():
    """The mean over sets of samples: (1 - exp(-t^2)) / N against the weight exp(-t^2 / 2)."""
    constant = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    for num_samples in (16, 64):
        x = jax.random.normal(jax.random.key(1), (num_samples, 4000))
        mean = jnp.mean(epps_pulley(x, limit=5.0, num_points=17))
        np.testing.assert_allclose(num_samples * mean, constant, rtol=0.1)


def test_lejepas_term_counts_the_images():
    z = halves(views_of((12, 4)))
    twice = [np.tile(half, (2, 1)) for half in z]
    for loss, factor in ((sigreg_loss, 1), (lejepa_loss, 2)):
        _, terms = sketched(loss, *z)
        _, of_twice = sketched(loss, *twice)
        np.testing.assert_allclose(
            of_twice["sigreg_loss"], factor * terms["sigreg_loss"], rtol=1e-4
        )


@pytest.mark.parametrize("loss", [sigreg_loss, lejepa_loss])
def test_a_rotation_changes_nothing_but_the_draw(loss):
    rng = np.random.default_rng(6)
    z = np.float32(rng.normal(size=(64, 6)) * np.linspace(0.3, 2.0, 6))
    rotation = np.float32(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    options = {"num_directions": 4096}
    _, terms = loss(KEY, z, z, **options)
    _, of_rotated = loss(KEY, z @ rotation, z @ rotation, **options)
    np.testing.assert_allclose(of_rotated["sigreg_loss"], terms["sigreg_loss"], rtol=0.1)


@pytest.mark.parametrize("loss", [sigreg_loss, lejepa_loss])
def test_a_collapsed_batch_scores_far_above_a_gaussian_one(loss):
    gaussian = jax.random.normal(jax.random.key(2), (256, 16))
    low_rank = gaussian[:, :1] * jnp.ones((1, 16))
    found = [
        loss(KEY, z, z)[1]["sigreg_loss"] for z in (gaussian, low_rank, jnp.zeros_like(gaussian))
    ]
    assert min(found[1:]) > 10 * found[0]


def test_directions_are_unit_vectors_of_no_preferred_side_and_those_of_their_key():
    directions = random_directions(KEY, 5, 4000, jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(directions, axis=0), np.ones(4000), rtol=1e-5)
    np.testing.assert_allclose(directions @ directions.T / 4000, np.eye(5) / 5, atol=0.02)
    z1, z2 = halves(views_of((12, 4)))
    losses = [sigreg_loss(jax.random.key(seed), z1, z2)[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


# --- Barlow Twins and SimCLR --------------------------------------------------------------------


def test_barlow_twins_does_not_see_scale_and_shift_of_a_dimension():
    z1, z2 = halves(views_of((12, 4), seed=7))
    scale, shift = np.float32([0.5, 2.0, 7.0, 1.0]), np.float32([3.0, -1.0, 0.0, 2.0])
    (loss, _), _ = compiled("barlow")(z1, z2)
    np.testing.assert_allclose(compiled("barlow")(z1 * scale + shift, z2)[0][0], loss, rtol=1e-4)


def test_equal_views_of_uncorrelated_dimensions_are_what_barlow_twins_wants():
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    z = np.float32(np.tile(hadamard[:, 1:], (2, 1)))
    np.testing.assert_allclose(barlow_twins_loss(z, z)[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(barlow_twins_loss(z, -z)[0], 3 * 4.0, rtol=1e-4)


def test_simclr_does_not_see_the_length_of_an_embedding():
    z1, z2 = halves(views_of((12, 4), seed=8))
    lengths = np.float32(np.linspace(0.1, 1e4, 12))[:, None]
    (loss, _), _ = compiled("simclr")(z1, z2)
    np.testing.assert_allclose(compiled("simclr")(z1 * lengths, z2)[0][0], loss, rtol=1e-5)


@pytest.mark.parametrize("num_pairs", [1, 3])
def test_where_all_embeddings_are_equal_simclr_can_only_guess(num_pairs):
    z = np.ones((12, 4), np.float32)
    loss, terms = nt_xent_loss(z, z, temperature=0.1, num_pairs=num_pairs)
    np.testing.assert_allclose(loss, math.log(24 - 1), rtol=1e-5)
    np.testing.assert_allclose(terms["alignment_loss"], 0.0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_no_temperature_overflows(temperature):
    z1, z2 = np.float32(np.random.default_rng(9).normal(size=(2, 6, 4)))
    for pair in ((z1, z2), (z1, -z1), (z1, z1)):
        loss = functools.partial(nt_xent_loss, temperature=temperature)
        (found, _), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*pair)
        assert np.isfinite(found) and all(np.all(np.isfinite(g)) for g in gradients)
    warm = nt_xent_loss(z1, z2, temperature=1e3)[0]
    np.testing.assert_allclose(warm, math.log(12 - 1), rtol=1e-2)
