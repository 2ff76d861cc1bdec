"""What the benchmarks of docs/recipe.md plug into the package, against independent formulas."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import ablation, levers
from configs import cpu, rapid
from jepa_jax import from_arrays
from jepa_jax.augment import two_views
from jepa_jax.config import hparams_from
from jepa_jax.data import take
from jepa_jax.loop import train_step_of
from jepa_jax.plan import initial_state, make_plan
from jepa_jax.train_step import HParams


@pytest.fixture(scope="module")
def plan(cifar_arrays):
    config = cpu.get_config()
    config.update_from_flattened_dict({**tiny.TINY, "optim.lr": 0.1, "optim.warmup_epochs": 0})
    arrays = cifar_arrays
    dataset = from_arrays(arrays["train_images"], arrays["train_labels"])
    return make_plan(config, pathlib.Path(), dataset, None, None, None, None)


def some_hparams():
    numbers = dict.fromkeys(HParams.__dataclass_fields__, 0.0)
    return HParams(**{**numbers, "sim_coeff": 3.0, "std_coeff": 2.0, "cov_coeff": 5.0})


# --- levers -----------------------------------------------------------------------------------


def test_of_two_views_with_opposite_flips_exactly_one_is_mirrored(cifar_arrays):
    images, key = jnp.asarray(cifar_arrays["train_images"][:16]), jax.random.key(3)
    found = levers.opposite_flips(key, images)
    plain = two_views(key, images, size=16, flip_prob=0.0)
    is_mirrored = [
        np.array([np.array_equal(f, p[:, ::-1]) for f, p in zip(*views, strict=True)])
        for views in zip(found, plain, strict=True)
    ]
    assert (is_mirrored[0] ^ is_mirrored[1]).all()
    assert 0 < is_mirrored[0].sum() < 16


def test_sigreg_is_the_epps_pulley_statistic_of_its_directions():
    z = np.random.default_rng(1).normal(size=(2, 30, 4)).astype(np.float32)
    key = jax.random.key(2)
    loss, terms = levers.sigreg(key, z[0], z[1], None)
    directions = np.array(jax.random.normal(key, (4, 256)), np.float64)
    directions /= np.linalg.norm(directions, axis=0)
    t = np.linspace(-3, 3, 10)

    def statistic(values):
        difference = np.exp(1j * values[:, None] * t).mean(0) - np.exp(-(t**2) / 2)
        return np.trapezoid(np.abs(difference) ** 2 * np.exp(-(t**2) / 2), t)

    wanted = np.mean([statistic(view @ column) for view in z for column in directions.T])
    np.testing.assert_allclose(terms["sigreg_loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(loss, np.mean((z[0] - z[1]) ** 2) + 10 * wanted, rtol=1e-4)


def test_the_parts_of_a_lever_share_the_time_and_see_every_batch_once(plan):
    lever = levers.LEVERS["16 then 32"]
    # Steps that take twice and four times as long as cpu.py's.
    assert levers.steps_of(lever, [[2.0, 1.9, 2.1], [4.0]], 100) == [30, 10]
    rows = [*levers._batches(plan, 0, 1), *levers._batches(plan, 1, plan.num_steps)]
    wanted = [plan.batches_of(epoch) for epoch in range(plan.num_epochs)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(wanted))


def test_a_lever_with_other_steps_keeps_the_share_of_its_warmup():
    lever = levers.Lever("larger batches", {"data.batch_size": 256})
    config = levers._config(lever, 1, {}, num_steps=39)
    hparams, default = hparams_from(config, 50_000 // 256), cpu.get_config().optim
    warmup = 39 * default.warmup_epochs / default.epochs
    assert (hparams.num_steps, hparams.warmup_steps) == (39, round(warmup))
    assert config.meta.seed == 1


def test_a_lever_takes_its_parts_one_after_the_other(plan, monkeypatch):
    """Every step of a part by its own program, all of one schedule; the mean of the parameters."""
    ran = []
    monkeypatch.setattr(levers, "_config", lambda *arguments: plan.config)
    monkeypatch.setattr(
        levers,
        "_batches",
        lambda plan, start, stop: ran.append((start, stop)) or [plan.batches_of(0)[:1]],
    )
    lever = levers.Lever("two parts", parts=((0.5, {}), (0.5, {})), ema=0.5)
    monkeypatch.setitem(levers.LEVERS, "two", lever)
    found = levers.measure_run("two", 0, [1, 1], plan.dataset)
    assert ran == [(0, 1), (1, 2)] and found["images"] == 2 * plan.config.data.batch_size
    assert {found[probe] for probe in ("ridge", "knn")} <= {k / 80 for k in range(81)}


# --- ablation ---------------------------------------------------------------------------------


def test_the_first_rung_in_full_is_rapid_with_the_references_schedule():
    written = rapid.get_config()
    written.optim.schedule = "late_epoch"
    written.meta.seed = 0
    assert ablation.config_of("rapid as written", scale=1).to_json() == written.to_json()


def test_at_an_eighth_steps_and_balance_are_those_of_rapid():
    for rung in ablation.RUNGS:
        full, eighth = (ablation.config_of(rung, scale=scale) for scale in (1, 8))
        assert 50_000 // full.data.batch_size == 6250 // eighth.data.batch_size
        weights = [
            config.loss.cov_coeff / (config.model.proj_output_dim - 1) for config in (full, eighth)
        ]
        np.testing.assert_allclose(*weights)
        assert full.optim.to_json() == eighth.optim.to_json()


def test_the_probe_beside_a_step_leaves_it_alone_and_ignores_rows_without_a_label(plan):
    state, tied = initial_state(plan), ablation._tied_init(plan, 10)
    rows = jax.device_put(plan.batches_of(0)[0])
    labels = np.asarray(plan.dataset.train_labels).astype(np.int32)
    images, batch_labels = take(*jax.device_put((plan.dataset.train_images, labels)), rows)
    wanted, _ = jax.jit(train_step_of(plan))(state, images, batch_labels, plan.hparams)
    with jax.numpy_dtype_promotion("standard"):
        step = ablation.make_step(plan)
        copies = jax.tree.map(jnp.copy, (state, tied))
        (found, taught), metrics = step(copies, images, batch_labels, plan.hparams)
        hidden = jnp.full_like(batch_labels, -1)
        copies = jax.tree.map(jnp.copy, (state, tied))
        (_, untaught), _ = step(copies, images, hidden, plan.hparams)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(taught["params"]["bias"]).max()) > 0
    for name, values in tied["params"].items():
        np.testing.assert_array_equal(untaught["params"][name], values)
    moved = [
        np.linalg.norm(new - old) / np.linalg.norm(old)
        for new, old in zip(
            jax.tree.leaves(wanted.params), jax.tree.leaves(state.params), strict=True
        )
        if np.ndim(old) > 1
    ]
    np.testing.assert_allclose(metrics["most_moved"], max(moved), rtol=1e-3)
