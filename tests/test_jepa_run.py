"""Whole runs with a predictor and a target network: they stop, go on, start others, are judged."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import assert_same_state, rows_without_times, signal_after, train_tiny

from jepa_jax import load_encoder
from jepa_jax.errors import ConfigError, Interrupted
from jepa_jax.evaluate import evaluate_run
from jepa_jax.plan import initial_state, make_plan, starting_state
from jepa_jax.train_step import TargetState

BYOL = {"model.predictor": True, "model.target_ema": 0.9, "model.pred_hidden_dim": 8}


@pytest.fixture(scope="module")
def whole(tiny_config, small_cifar, tmp_path_factory):
    return train_tiny(tiny_config, tmp_path_factory.mktemp("jepa") / "run", small_cifar, BYOL)


def test_a_run_with_a_target_ends_in_the_same_bits(
    whole, tiny_config, small_cifar, tmp_path, monkeypatch
):
    state, folder = whole
    assert isinstance(state, TargetState)
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(Interrupted, match="stopped at step 6 of 12"):
            train_tiny(tiny_config, tmp_path / "halves", small_cifar, BYOL)
    resumed, halves = train_tiny(tiny_config, tmp_path / "halves", small_cifar, BYOL)
    assert_same_state(state, resumed)
    assert rows_without_times(folder) == rows_without_times(halves)
    assert all("train/pred_loss" in row for row in rows_without_times(halves))


def test_the_online_network_is_what_is_judged(whole, small_cifar):
    state, folder = whole
    _, variables = load_encoder(folder)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], state.params)
    found = evaluate_run(folder, dataset=small_cifar, which="12", parts=("ridge",))
    assert found["probes"]["ridge"]["encoder"]["val"]["count"] == 80


def test_a_target_begins_as_what_a_run_starts_from(whole, tiny_config, small_cifar, tmp_path):
    """And a run without a predictor takes over what there is of another network."""
    state, folder = whole

    class NoCheckpoints:
        def restore_latest(self, template):
            return None

    def start(overrides):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        plan = make_plan(config, tmp_path, small_cifar, None, None, None, str(folder))
        return starting_state(plan, NoCheckpoints(), initial_state(plan))[0]

    begun = start(BYOL)
    jax.tree.map(np.testing.assert_array_equal, begun.params, state.params)
    online = {name: tree for name, tree in begun.params.items() if name != "predictor"}
    jax.tree.map(np.testing.assert_array_equal, begun.target["params"], online)
    plain = start({})
    assert [field.name for field in dataclasses.fields(plain)][-1] == "probe"
    jax.tree.map(np.testing.assert_array_equal, plain.params, online)


def test_views_of_too_few_patches_are_refused(tiny_config, small_cifar, tmp_path):
    masked = {"model.predictor": True, "model.mask": "blocks", "model.type": "vit_ti"}
    with pytest.raises(ConfigError, match=r"blocks: a grid of 4x4 patches is too small"):
        train_tiny(
            tiny_config,
            tmp_path / "run",
            small_cifar,
            {**masked, "model.patch_size": 8, "model.stem_init": "random"},
        )
