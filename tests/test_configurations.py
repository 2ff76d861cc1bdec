"""benchmarks/configurations.py: every configuration trains; the table says what is there."""

import math
import pathlib

import jax
import numpy as np
import pytest

from benchmarks import configurations
from benchmarks.configurations import CONFIGURATIONS
from jepa_jax.config import flatten, validate
from jepa_jax.config_flags import given_config
from jepa_jax.data import from_arrays
from jepa_jax.loop import make_runner
from jepa_jax.plan import initial_state, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
# Of the same kind and small: every branch of the program stays.
SMALL = {
    "data.batch_size": 8,
    "data.num_val": 8,
    "model.width": 4,
    "model.expand_dim": 0,
    "model.proj_hidden_dim": 16,
    "model.proj_output_dim": 16,
    "model.depth": 1,
    "model.pred_hidden_dim": 8,
    "model.pred_dim": 32,
    "model.pred_depth": 1,
    "optim.warmup_epochs": 0.0,
}


def small_plan(name, images):
    config = given_config(CONFIGURATIONS[name].flags.split()).config
    config.update_from_flattened_dict(SMALL)
    config.model.stage_sizes = (1,) * len(config.model.stage_sizes)
    config.optim.epochs = 3.0
    validate(config)
    dataset = from_arrays(images, np.arange(len(images)) % 4)
    return make_plan(config, pathlib.Path(), dataset, None, None, None, None)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_trains_a_few_steps(name, cifar_arrays):
    plan = small_plan(name, cifar_arrays["train_images"][:16])
    state = initial_state(plan)
    before = jax.device_get(state.params)
    # Linen's BatchNorm and JAX's attention mix dtypes in some of them.
    with jax.numpy_dtype_promotion("standard"):
        runner = make_runner(plan, state)
        for epoch in range(2):
            for newest, found, _ in runner.run(state, plan.batches_of(epoch)):
                state, metrics = newest, found
    assert int(state.step) == 4
    assert math.isfinite(float(metrics["loss"])) and float(metrics["fault"]) == 0
    moved = jax.tree.map(
        lambda old, new: bool((old != np.asarray(new)).any()), before, state.params
    )
    assert all(jax.tree.leaves(moved)), moved


def test_every_config_file_has_every_key():
    keys = set(flatten(given_config(["--config=configs/rapid.py"]).config))
    for configuration in CONFIGURATIONS.values():
        assert set(flatten(given_config(configuration.flags.split()).config)) == keys


def test_a_row_is_measured(monkeypatch, small_cifar):
    """What the table reads of it is there, and is that of a network of this size."""
    monkeypatch.setattr(configurations, "NUM_FITTED", 200)
    monkeypatch.setattr(configurations, "NUM_VAL", 100)
    small = SMALL | {"model.stage_sizes": (1, 1, 1)}
    flags = " ".join(f"--config.{key}={value}".replace(", ", ",") for key, value in small.items())
    base = CONFIGURATIONS["vicreg"]
    monkeypatch.setitem(
        CONFIGURATIONS, "vicreg", configurations.Configuration("", f"{base.flags} {flags}")
    )
    found = configurations.measure("vicreg", small_cifar, 0.1)
    assert found["steps"] == 5 and found["images"] == 40 and found["feature_dim"] == 16
    line = configurations.table({"vicreg": {**found, "pace": {"epoch_seconds": None}}})
    assert "not measured" not in line.splitlines()[2]
    assert 0 < found["ridge_untrained"]["test"] < 1 and 1 < found["rank_me"]["encoder"] <= 16


def row(ridge):
    floors = {"test": 0.25, "val": 0.26}
    return {
        "pace": {"epoch_seconds": [[2.0, 1.0], [6.0, 2.0], [8.0, 2.0]]},
        "steps": 1000,
        "images": 48_000,
        "ridge_encoder": {"test": ridge, "val": 0.6},
        "ridge_untrained": floors,
        "knn_encoder": {"test": 0.5, "val": 0.5},
        "knn_untrained": floors,
        "rank_me": {"encoder": 123.4, "untrained": 45.6},
        "feature_dim": 512,
        "parameters": 1_250_000,
    }


def test_the_table_has_a_line_for_each_measured_or_not():
    first, *others = CONFIGURATIONS
    header, rule, line, *rest = configurations.table({first: row(0.615)}).splitlines()
    assert {text.count("|") for text in (header, rule, line, *rest)} == {14}
    cells = [cell.strip() for cell in line.split("|")][3:-1]
    assert cells[:4] == ["3 (2-4)", "1,000", "48,000", "**61.5**"]
    assert cells[4:] == ["25.0", "50.0", "25.0", "123", "46", "512", "1.2 M"]
    assert len(rest) == len(others) and all("not measured" in text for text in rest)


def test_a_configuration_gets_the_epochs_of_equal_time(monkeypatch, cifar_arrays):
    """An epoch that takes four times as long as cpu.py's leaves a quarter of its epochs."""
    seconds = {"four_views": iter([4.0, 9.0, 8.0]), "vicreg": iter([1.0, 2.0, 2.0])}

    class Pace:
        def __init__(self, name):
            self.epoch_seconds = lambda: next(seconds[name])

    monkeypatch.setattr(configurations, "Pace", Pace)
    monkeypatch.setattr(configurations, "plan_of", lambda name, dataset: PlanOf(name))

    class PlanOf(str):
        class config:
            class optim:
                epochs = 1.4

    found = configurations.equal_epochs("four_views", None)
    assert found["epochs"] == pytest.approx(1.4 / 4) and len(found["epoch_seconds"]) == 3
