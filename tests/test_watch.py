"""The collapse watch: what it measures, what it makes of it, and the balance of a loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import cpu, default, full, rapid, rapid_fixed
from jepa_jax.models import ModelFns
from jepa_jax.train_step import HParams
from jepa_jax.watch import Watch, diagnose, explain, loss_balance

HPARAMS = HParams(np.uint32(3), *[np.float32(1.0)] * 11)
UNTRAINED = {"h_std_mean": 0.4, "z_std_mean": 0.3, "z_rank_me": 100.0, "h_rank_me": 20.0}


def as_it_is(key, images):
    """Two views: the image, and its negative."""
    return images.astype(jnp.float32) / 255, 1.0 - images.astype(jnp.float32) / 255


def apply(variables, images, train):
    """h [B, 3] = w * colour, z [B, 2] = h P."""
    assert train
    h = variables["params"]["encoder"]["w"] * jnp.mean(images, axis=(1, 2))
    return (h, h @ variables["params"]["projector"]), {}


def loss_fn(key, z1, z2, hparams):
    terms = {"sum": jnp.mean(z1 + z2), "square": jnp.mean(z1 * z1)}
    # The slope of a root is infinite at 0.
    return terms["sum"], {**terms, "steep": jnp.sqrt(jnp.mean(z1 - z1))}


def watch_of(apply, images, *, term_weights=None, batch_size=70):
    return Watch(
        ModelFns(lambda key, x: {}, apply),
        augment_fn=as_it_is,
        loss_fn=loss_fn,
        term_weights=term_weights or {},
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        images=images,
        batch_size=batch_size,
        hparams=HPARAMS,
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (70, 2, 2, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def variables():
    projector = jnp.array([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]])
    return {"params": {"encoder": {"w": jnp.float32(1.5)}, "projector": projector}}


@pytest.fixture(scope="module")
def watch(images):
    return watch_of(apply, images, term_weights={"square": 4.0}, batch_size=32)


def exp_entropy(shares):
    shares = shares[shares > 0]
    return np.exp(-np.sum(shares * np.log(shares)))


def test_figures_are_those_of_whole_chunks_of_first_views(watch, variables, images):
    found = watch.representation(variables)
    h = 1.5 * images[np.linspace(0, 69, 64).astype(int)].mean((1, 2)) / 255
    z = h @ np.asarray(variables["params"]["projector"], np.float64)
    for name, matrix in (("h", h), ("z", z)):
        singular = np.linalg.svd(matrix, compute_uv=False)
        rank = exp_entropy(singular / singular.sum())
        assert found[f"{name}_rank_me"] == pytest.approx(rank, rel=1e-3)
        std = matrix.std(0, ddof=1)
        assert found[f"{name}_std_min"] == pytest.approx(std.min(), rel=1e-4)
        assert found[f"{name}_std_mean"] == pytest.approx(std.mean(), rel=1e-4)
        spectrum = np.linalg.eigvalsh(np.cov(matrix.T))[::-1]
        np.testing.assert_allclose(found[f"{name}_spectrum"], spectrum, rtol=1e-3)
        assert found[f"{name}_spectrum_ranks"] == list(range(1, matrix.shape[1] + 1))


def test_a_long_spectrum_is_thinned_and_keeps_its_ends(images):
    wide = jnp.asarray(np.random.default_rng(1).normal(size=(12, 300)), jnp.float32)

    def flat(variables, x, train):
        z = x.reshape(len(x), -1) @ wide
        return (z, z), {}

    watch = watch_of(flat, images)
    found = watch.representation({"params": {}})
    ranks = found["z_spectrum_ranks"]
    assert ranks[0] == 1 and ranks[-1] == 300 and len(ranks) == len(set(ranks)) <= 64
    assert found["z_spectrum"] == sorted(found["z_spectrum"], reverse=True)


def test_gradient_norms_are_those_of_weighted_terms_by_the_encoder_alone(watch, variables, images):
    """d mean(z1 + z2) / dw and 4 d mean(z1^2) / dw, with z = w c P, by hand."""
    colour = images[np.linspace(0, 69, 64).astype(int)[:32]].mean((1, 2)) / 255
    projector = np.asarray(variables["params"]["projector"], np.float64)
    by_sum = np.mean((colour + (1 - colour)) @ projector)
    by_square = np.mean(4 * 2 * 1.5 * (colour @ projector) ** 2)
    found = watch.gradient_norms(variables)
    assert np.isnan(found.pop("steep"))
    assert found == pytest.approx({"sum": abs(by_sum), "square": by_square}, rel=1e-4)


@pytest.mark.parametrize(
    ("measured", "terms", "kind"),
    [
        ({}, {"var_loss": 1.4}, None),
        ({"z_std_mean": 0.01}, {"var_loss": 1.9}, "constant"),
        # A small embedding of an untrained network is no collapse, nor is one that grows.
        ({"z_std_mean": 0.35}, {"var_loss": 1.3}, None),
        ({"z_rank_me": 10.0, "h_rank_me": 6.0, "z_std_mean": 1.1}, {"var_loss": 0.02}, "low rank"),
        ({"z_rank_me": 10.0, "h_rank_me": 6.0}, {}, "low rank"),
        # The embedding alone says nothing: training narrows it, and the loss asks no more of it.
        ({"z_rank_me": 10.0, "h_rank_me": 18.0, "z_std_mean": 1.1}, {"var_loss": 0.02}, None),
        ({"h_std_mean": 1e-9}, {"var_loss": 2.0}, "dead"),
        ({"h_std_mean": float("nan")}, {"var_loss": 2.0}, "dead"),
    ],
)
def test_figures_have_the_right_name(measured, terms, kind):
    assert diagnose({**UNTRAINED, **measured}, UNTRAINED, terms) == kind


@pytest.mark.parametrize("kind", ["constant", "low rank", "dead"])
def test_an_explanation_is_one_line_with_both_figures_and_the_advice(kind):
    line = explain(kind, {**UNTRAINED, "z_rank_me": 7.0}, UNTRAINED, "try this")
    assert line.startswith(f"collapse ({kind})") and line.endswith("; try this")
    assert "untrained" in line and "\n" not in line


def balance_of(module):
    config = module.get_config()
    weights = {name: config.loss[name] for name in ("sim_coeff", "std_coeff", "cov_coeff")}
    return loss_balance(config.model.proj_output_dim, **weights)


def test_rapids_loss_is_out_of_balance_and_the_line_says_how_to_mend_it():
    weights, warning = balance_of(rapid)
    assert weights == "1 : 25 : 0.00024"
    assert "variance is 25 times too strong and covariance is 164 times too weak" in warning
    assert "configs/rapid_fixed.py" in warning
    assert "--config.loss.std_coeff=1 --config.loss.cov_coeff=163.8" in warning
    assert balance_of(full)[1]


@pytest.mark.parametrize("module", [cpu, default, rapid_fixed])
def test_balanced_recipes_raise_no_warning(module):
    weights, warning = balance_of(module)
    assert weights.startswith("1 : 1 : 0.0") and not warning


def test_the_papers_own_weights_are_its_balance():
    """25 : 25 : 1 with the covariances' sum over D reads 25 : 25 : D - 1 with their mean."""
    weights, warning = loss_balance(257, sim_coeff=25.0, std_coeff=25.0, cov_coeff=256.0)
    assert weights == "1 : 1 : 0.04" and not warning


def test_a_term_without_weight_is_called_so():
    assert (
        "variance has no weight and covariance has no weight"
        in (loss_balance(64, sim_coeff=1.0, std_coeff=0.0, cov_coeff=0.0)[1])
    )
    assert "invariance" in loss_balance(64, sim_coeff=0.0, std_coeff=1.0, cov_coeff=1.0)[1]


def test_parameters_of_any_tree_will_do(images):
    def apply(variables, x, train):
        h = variables["params"][0] * jnp.mean(x, axis=(1, 2))
        return (h, h), {}

    watch = watch_of(apply, images)
    assert watch.gradient_norms({"params": (jnp.float32(1.0),)})["sum"] > 0
