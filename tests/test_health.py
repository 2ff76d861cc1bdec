"""Health of representations: closed forms, and numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import health

SHAPES = pytest.mark.parametrize("shape", [(90, 20), (20, 90)])


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def with_singular_values(seed, shape, singular):
    """A matrix of given singular values and random directions."""
    left, _, right = np.linalg.svd(normal(seed, shape), full_matrices=False)
    return jnp.float32((left * singular) @ right)


def exact_rank_me(z):
    singular = np.linalg.svd(np.asarray(z, np.float64), compute_uv=False)
    shares = singular / singular.sum() + 1e-7
    return np.exp(-np.sum(shares * np.log(shares)))


def isotropic(num_dims):
    """2 D points whose mean is 0 and whose covariance is a multiple of the identity."""
    return jnp.concatenate([jnp.eye(num_dims), -jnp.eye(num_dims)])


@SHAPES
def test_spectrum_equals_numpy(shape):
    z = normal(0, shape) * np.logspace(0, -2, shape[1]) + 3.0
    found = health.covariance_spectrum(jnp.float32(z))
    expected = np.linalg.eigvalsh(np.cov(z, rowvar=False))[::-1]
    assert found.shape == (shape[1],)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (found >= 0).all()
    assert (jnp.diff(found) <= 0).all()
    rank = min(shape[0] - 1, shape[1])
    assert (found[:rank] > 0).all()


@pytest.mark.parametrize("num_dims", [2, 64])
def test_rank_me_of_the_identity_is_its_size(num_dims):
    assert health.rank_me(7.0 * jnp.eye(num_dims)) == pytest.approx(num_dims, rel=1e-4)


@SHAPES
def test_rank_me_of_a_rank_is_that_rank(shape):
    for rank in (1, 2, 5):
        singular = np.r_[np.ones(rank), np.zeros(20 - rank)]
        z = with_singular_values(1, shape, singular)
        assert health.rank_me(z) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(120, 80), (80, 120)])
def test_rank_me_sees_singular_values_that_a_gram_matrix_would_lose(shape):
    """Many directions of 1e-5 of the largest, and of nothing; a Gram matrix has 3e-4 on each."""
    for small in (1e-3, 1e-5, 1e-7, 0.0):
        z = with_singular_values(2, shape, np.r_[1.0, np.full(79, small)])
        assert health.rank_me(z) == pytest.approx(exact_rank_me(z), rel=1e-3)
    z = with_singular_values(3, shape, np.logspace(0, -6, 80))
    assert health.rank_me(z) == pytest.approx(exact_rank_me(z), rel=1e-3)


def test_effective_rank_of_closed_forms():
    z = isotropic(16)
    assert health.effective_rank(z) == pytest.approx(16, rel=1e-4)
    line = normal(4, (50, 1)) * np.ones((1, 30)) + normal(5, (1, 30))
    assert health.effective_rank(jnp.float32(line)) == pytest.approx(1, rel=1e-3)
    # Eigenvalues 9 : 1 are shares 0.9 and 0.1; the square roots, of which RankMe is, 3 : 1.
    two = isotropic(2) * jnp.float32([[3.0, 1.0]])
    for found, share in ((health.effective_rank(two), 0.9), (health.rank_me(two), 0.75)):
        entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
        assert found == pytest.approx(np.exp(entropy), rel=1e-4)


def test_a_common_offset_has_no_say_in_the_effective_rank_but_in_rank_me():
    z = isotropic(16)
    assert health.effective_rank(z + 1000.0) == pytest.approx(16, rel=1e-3)
    assert health.rank_me(z + 1000.0) < 1.1


def test_rank_me_is_jitted_and_takes_a_scale_and_half_precision():
    z = jnp.float32(normal(6, (40, 12)))
    expected = exact_rank_me(z)
    assert jax.jit(health.rank_me)(1e-3 * z) == pytest.approx(expected, rel=1e-3)
    half = z.astype(jnp.bfloat16)
    assert health.rank_me(half) == pytest.approx(exact_rank_me(half.astype(jnp.float32)), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1000.3])
def test_a_constant_representation_is_dead_and_of_rank_one(value):
    z = jnp.full((50, 8), value)
    assert health.dead_fraction(z) == 1.0
    assert health.rank_me(z) == pytest.approx(1.0, abs=1e-3)
    assert health.effective_rank(z) == pytest.approx(1.0)
    assert (health.dimension_std(z) == 0).all()
    assert (health.covariance_spectrum(z) == 0).all()
    numbers = health.summarise(z, z, z)
    assert all(jnp.isfinite(number).all() for number in numbers.values())


def test_dimension_std_equals_numpy():
    z = normal(7, (30, 5)) * [1, 2, 3, 0, 1e-3] + 50.0
    np.testing.assert_allclose(
        health.dimension_std(jnp.float32(z)), z.std(axis=0, ddof=1), rtol=1e-2, atol=1e-6
    )
    assert health.dimension_std(jnp.float32([[0.0], [2.0]])) == pytest.approx(np.sqrt(2))


def test_dead_dimensions_are_those_below_a_hundredth_of_the_size():
    z = isotropic(4) * jnp.float32([[1.0, 1.0, 0.01, 0.0001]])
    # Their size is about 0.35: of 0.01 and 0.0001 the one is above a hundredth, the other below.
    assert health.dead_fraction(z) == 0.25
    assert health.dead_fraction(1e4 * z) == 0.25
    assert health.dead_fraction(z + 100.0) == 1.0


def test_alignment_and_cosine_of_closed_forms():
    z = jnp.float32(normal(8, (20, 6)))
    turned = jnp.stack([-z[:, 1], z[:, 0], -z[:, 3], z[:, 2], -z[:, 5], z[:, 4]], axis=1)
    for other, cosine in ((3.0 * z, 1.0), (-z, -1.0), (turned, 0.0)):
        assert health.mean_cosine(z, other) == pytest.approx(cosine, abs=1e-6)
        assert health.alignment(z, other) == pytest.approx(2 - 2 * cosine, abs=1e-5)


def test_uniformity_of_closed_forms():
    z = jnp.float32(normal(9, (12, 5)))
    assert health.uniformity(jnp.tile(z[:1], (10, 1))) == pytest.approx(0.0, abs=1e-5)
    assert health.uniformity(jnp.stack([z[0], -2.0 * z[0]])) == pytest.approx(-8.0, abs=1e-4)
    # Any two of an orthonormal frame are sqrt(2) apart.
    assert health.uniformity(3.0 * jnp.eye(6)) == pytest.approx(-4.0, abs=1e-5)
    unit = np.asarray(z) / np.linalg.norm(z, axis=1, keepdims=True)
    terms = [np.exp(-2 * np.sum((unit[i] - unit[j]) ** 2)) for i in range(12) for j in range(i)]
    assert health.uniformity(z) == pytest.approx(np.log(np.mean(terms)), rel=1e-4)


def test_rows_of_zeros_give_numbers():
    z = jnp.zeros((5, 3)).at[0, 0].set(1.0)
    assert health.mean_cosine(z, z) == pytest.approx(0.2)
    assert jnp.isfinite(health.uniformity(z))


def test_summary_has_what_its_parts_say():
    z, z1, z2 = (jnp.float32(normal(seed, (40, 6))) for seed in (10, 11, 12))
    found = health.summarise(z, z1, z2)
    std = health.dimension_std(z)
    expected = {
        "rank_me": health.rank_me(z),
        "effective_rank": health.effective_rank(z),
        "std_min": std.min(),
        "std_mean": std.mean(),
        "std_max": std.max(),
        "dead_fraction": health.dead_fraction(z),
        "alignment": health.alignment(z1, z2),
        "uniformity": health.uniformity(z),
        "mean_cosine": health.mean_cosine(z1, z2),
        "spectrum": health.covariance_spectrum(z),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "measure", [health.covariance_spectrum, health.rank_me, health.dimension_std, health.uniformity]
)
def test_what_is_no_matrix_of_two_rows_is_refused(measure):
    for shape in ((4,), (1, 5), (3, 0)):
        with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            measure(jnp.zeros(shape))


def test_pairs_of_different_shapes_are_refused():
    z, other = jnp.ones((5, 3)), jnp.ones((5, 4))
    for measure in (health.alignment, health.mean_cosine):
        with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 4\)"):
            measure(z, other)
    with pytest.raises(ValueError, match=r"\(5, 3\), \(5, 4\)"):
        health.summarise(z, other, other)
