"""VICReg against the paper's formula, written with explicit loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.losses import covariance_loss, paper_cov_coeff, variance_loss, vicreg_loss

SHAPES = [(5, 9), (7, 7), (12, 4)]

# Compiled once a shape: operation by operation every first use would be compiled on its own.
vicreg = jax.jit(vicreg_loss)
vicreg_gradients = jax.jit(jax.value_and_grad(vicreg_loss, argnums=(0, 1), has_aux=True))


def embeddings(shape, seed=0):
    """Two correlated views, some dimensions below the variance hinge and some above."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=shape) * np.linspace(0.3, 2.0, shape[1]) + rng.normal(size=shape[1])
    return common + 0.3 * rng.normal(size=shape), common + 0.3 * rng.normal(size=shape)


def loop_terms(z1, z2):
    """(invariance, variance, covariance) by the definitions, one entry at a time."""
    num_rows, num_dims = z1.shape
    invariance = sum((a - b) ** 2 for a, b in zip(z1.ravel(), z2.ravel(), strict=True)) / z1.size
    variance = covariance = 0.0
    for z in (z1, z2):
        means = [sum(z[:, j]) / num_rows for j in range(num_dims)]
        for i in range(num_dims):
            for j in range(num_dims):
                entry = sum((z[:, i] - means[i]) * (z[:, j] - means[j])) / (num_rows - 1)
                if i == j:
                    variance += max(0.0, 1.0 - (entry + 1e-4) ** 0.5) / num_dims
                else:
                    covariance += entry**2 / (num_dims * (num_dims - 1))
    return invariance, variance, covariance


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_equal_the_definitions(shape):
    z1, z2 = embeddings(shape)
    coeffs = {"sim_coeff": 0.7, "std_coeff": 1.3, "cov_coeff": 2.1}
    loss, terms = vicreg(np.float32(z1), np.float32(z2), **coeffs)
    expected = loop_terms(z1, z2)
    names = ("invariance_loss", "var_loss", "cov_loss")
    assert set(terms) == set(names)
    np.testing.assert_allclose([terms[name] for name in names], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, np.dot([0.7, 1.3, 2.1], expected), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_finite_differences_of_the_definitions(shape):
    views = embeddings(shape, seed=1)
    _, gradients = vicreg_gradients(*np.float32(views), cov_coeff=2.1)
    rng = np.random.default_rng(2)
    for view in (0, 1):
        direction = rng.normal(size=shape)

        def moved(step, view=view, direction=direction):
            changed = list(views)
            changed[view] = views[view] + step * direction
            return np.dot([1.0, 1.0, 2.1], loop_terms(*changed))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradients[view] * direction), slope, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 8), (40, 8)])
def test_without_cov_coeff_it_is_the_papers_25_25_1_divided_by_25(shape):
    z1, z2 = embeddings(shape, seed=3)
    invariance, _, _ = loop_terms(z1, z2)
    papers = 25.0 * invariance
    for z in (z1, z2):
        covariance = np.cov(z, rowvar=False)
        hinge = np.maximum(0.0, 1.0 - np.sqrt(np.diag(covariance) + 1e-4))
        off_diagonal = covariance - np.diag(np.diag(covariance))
        papers += 25.0 * np.mean(hinge) + np.sum(off_diagonal**2) / shape[1]
    loss, _ = vicreg(np.float32(z1), np.float32(z2))
    np.testing.assert_allclose(25.0 * loss, papers, rtol=1e-5)
    assert paper_cov_coeff(2048) == pytest.approx(81.88)


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_in_the_views_and_invariant_to_the_order_of_rows_and_dimensions(shape):
    z1, z2 = np.float32(embeddings(shape, seed=4))
    rng = np.random.default_rng(5)
    rows, dims = rng.permutation(shape[0]), rng.permutation(shape[1])
    loss, terms = vicreg(z1, z2)
    for other in ((z2, z1), (z1[rows], z2[rows]), (z1[:, dims], z2[:, dims])):
        other_loss, other_terms = vicreg(*other)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for name, term in terms.items():
            np.testing.assert_allclose(other_terms[name], term, rtol=1e-5)


def test_a_shift_of_both_views_changes_nothing():
    z1, z2 = np.float32(embeddings((7, 7), seed=6))
    shift = np.linspace(-3.0, 3.0, 7, dtype=np.float32)
    np.testing.assert_allclose(vicreg(z1 + shift, z2 + shift)[0], vicreg(z1, z2)[0], rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_collapsed_embeddings_have_the_full_hinge_and_finite_gradients(shape):
    constant = np.full(shape, 0.3, np.float32)
    (loss, terms), gradients = vicreg_gradients(constant, constant)
    assert terms["invariance_loss"] == 0.0
    np.testing.assert_allclose(terms["var_loss"], 2 * (1.0 - 0.01), rtol=1e-5)
    np.testing.assert_allclose(terms["cov_loss"], 0.0, atol=1e-6)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_collapsed_batch_feels_the_invariance_alone(shape):
    """Exactly: the rounding of a mean, through the hinge's slope at zero, would be felt too."""
    rows = np.random.default_rng(11).normal(size=(2, 1, shape[1]))
    z1, z2 = np.float32(np.broadcast_to(rows, (2, *shape)))
    _, gradients = vicreg_gradients(z1, z2, std_coeff=1e4, cov_coeff=1e4)
    slope = 2 * (z1 - z2) / np.float32(z1.size)
    np.testing.assert_allclose(gradients, [slope, -slope], rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_squares_of_the_covariance_overflow_nothing_is_nan(shape):
    z1, z2 = np.float32(embeddings(shape)) * np.float32(1e12)
    (loss, terms), gradients = vicreg_gradients(z1, z2)
    assert loss == terms["cov_loss"] == np.inf
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_standardised_uncorrelated_dimensions_cost_nothing():
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    z = np.float32(np.tile(hadamard[:, 1:], (2, 1)) * 1.2)
    loss, _ = vicreg(z, z)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_the_hinge_is_about_the_margin():
    z = np.random.default_rng(7).normal(size=(50, 3))
    loss = jax.jit(variance_loss)(np.float32(z), margin=4.0, eps=0.0)
    np.testing.assert_allclose(loss, np.mean(4.0 - np.std(z, axis=0, ddof=1)), rtol=1e-5)


@pytest.mark.parametrize("num_pairs", [2, 3])
def test_of_several_pairs_invariance_is_over_all_pairs_of_an_images_views(num_pairs):
    views = np.random.default_rng(10).normal(size=(2 * num_pairs, 5, 3))
    z1, z2 = (np.float32(np.concatenate(half)) for half in np.split(views, 2))
    loss, terms = vicreg_loss(z1, z2, sim_coeff=3.0, cov_coeff=5.0, num_pairs=num_pairs)
    wanted = np.mean([np.mean((a - b) ** 2) for a, b in itertools.combinations(views, 2)])
    np.testing.assert_allclose(terms["invariance_loss"], wanted, rtol=1e-5)
    _, of_rows = vicreg_loss(z1, z2)
    for name in ("var_loss", "cov_loss"):
        np.testing.assert_array_equal(terms[name], of_rows[name])
    total = 3.0 * wanted + terms["var_loss"] + 5.0 * terms["cov_loss"]
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
    z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in embeddings((12, 4), seed=8))
    half = vicreg(z1, z2)
    full = vicreg(z1.astype(jnp.float32), z2.astype(jnp.float32))
    assert jax.tree.map(lambda x: x.dtype, half) == jax.tree.map(lambda x: x.dtype, full)
    assert half[0].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, half, full)


def test_coefficients_may_be_traced_and_scale_their_terms():
    z1, z2 = np.float32(embeddings((12, 4), seed=9))
    names = ("invariance_loss", "var_loss", "cov_loss")
    for weights in np.eye(3, dtype=np.float32):
        sim, std, cov = weights  # arguments of `vicreg`, which is jitted
        loss, terms = vicreg(z1, z2, sim_coeff=sim, std_coeff=std, cov_coeff=cov)
        np.testing.assert_allclose(loss, np.dot(weights, [terms[n] for n in names]), rtol=1e-5)


def test_covariance_is_the_same_through_either_side_of_the_gram_matrix():
    """The formula must not jump where B passes D: padding with zero dimensions only rescales."""
    z = np.random.default_rng(10).normal(size=(6, 5))
    padded = np.concatenate([z, np.zeros((6, 4))], axis=1)
    loss = jax.jit(covariance_loss)
    np.testing.assert_allclose(
        9 * 8 * loss(np.float32(padded)), 5 * 4 * loss(np.float32(z)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shape1", "shape2", "message"),
    [
        ((4, 3), (4, 2), r"\(4, 3\) and \(4, 2\)"),
        ((4, 3, 2), (4, 3, 2), r"\[B, D\]"),
        ((4,), (4,), r"\[B, D\]"),
        ((1, 3), (1, 3), r"B >= 2 and D >= 2, got \(1, 3\)"),
        ((3, 1), (3, 1), r"B >= 2 and D >= 2, got \(3, 1\)"),
    ],
)
def test_shapes_that_have_no_loss_are_refused(shape1, shape2, message):
    with pytest.raises(ValueError, match=message):
        vicreg_loss(jnp.zeros(shape1), jnp.zeros(shape2))


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_rows_that_are_not_so_many_views_of_each_image_are_refused(num_pairs):
    with pytest.raises(ValueError, match=f"5 rows are not num_pairs = {num_pairs} views"):
        vicreg_loss(jnp.zeros((5, 3)), jnp.zeros((5, 3)), num_pairs=num_pairs)
