"""Budgets: a number of epochs from what they cost, stored, and used again."""

import pytest

from jepa_jax import pace
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.metrics import read_json
from jepa_jax.pace import Cost, chosen_epochs, epochs_within, fit_to_budget
from jepa_jax.progress import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1.5h", 5400), ("1h 2m 3s", 3723), ("0.5m", 30)],
)
def test_a_time_in_words(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "ten", "0s", "-5m", "5m3", "1..2s", "3s2m", "1d"])
def test_what_is_no_time_is_one_line(text):
    with pytest.raises(ConfigError, match="written as 90s, 10m or 1h30m") as error:
        seconds_of(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps_per_epoch", [4, 104, 520])
@pytest.mark.parametrize("per_epoch", [0.0, 2.5])
@pytest.mark.parametrize("seconds", [13.0, 60.0, 97.3, 600.0, 3601.0])
def test_epochs_fill_the_time_to_a_step_and_never_pass_it(seconds, per_epoch, steps_per_epoch):
    """Against a walk, step by step, that pays for an epoch's end when it begins one."""
    cost = Cost(fixed=7.0, epoch=11.0, per_epoch=per_epoch)
    steps, spent = 0, cost.fixed
    while True:
        due = cost.epoch / steps_per_epoch + (per_epoch if steps % steps_per_epoch == 0 else 0.0)
        if spent + due > seconds:
            break
        steps, spent = steps + 1, spent + due
    epochs = epochs_within(seconds, cost, steps_per_epoch)
    assert abs(round(epochs * steps_per_epoch) - steps) <= 1  # of rounding
    assert epochs * steps_per_epoch == pytest.approx(round(epochs * steps_per_epoch), abs=1e-2)


def test_a_budget_below_the_fixed_costs_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--budget=30s is not enough: .* about 40 s"):
        chosen_epochs(tmp_path / "run", 30.0, lambda: (Cost(40.0, 1.0), 4))
    assert not (tmp_path / "run").exists()


def test_what_was_chosen_is_used_again_and_another_budget_is_refused(tmp_path):
    assert chosen_epochs(tmp_path, 30.0, lambda: (Cost(10.0, 1.0), 4)) == 20.0
    assert read_json(tmp_path / "budget.json")["epochs"] == 20.0
    assert chosen_epochs(tmp_path, 30.0, lambda: pytest.fail("it is stored")) == 20.0
    with pytest.raises(CheckpointError, match="was begun with --budget=30s"):
        chosen_epochs(tmp_path, 60.0, lambda: pytest.fail("it is refused"))


def test_a_runs_costs_are_measured_and_its_schedule_keeps_its_shape(
    tiny_config, small_cifar, tmp_path, monkeypatch
):
    monkeypatch.setattr(pace, "_TURN_SECONDS", 0.01)
    monkeypatch.setattr(pace, "make_plan", lambda *args: make_plan(args[0], args[1], small_cifar))
    config, dataset = fit_to_budget(tiny_config, tmp_path, 3600.0, spent=100.0)
    stored = read_json(tmp_path / "budget.json")
    cost = Cost(**stored["cost"])
    assert dataset is small_cifar and cost.fixed > 100.0
    assert 0 < cost.epoch < 60 and 0 < cost.per_epoch < 60
    assert config.optim.epochs == stored["epochs"] == epochs_within(3600.0, cost, 4)
    share = tiny_config.optim.warmup_epochs / tiny_config.optim.epochs
    assert config.optim.warmup_epochs / config.optim.epochs == pytest.approx(share, rel=1e-4)


def make_plan(config, workdir, dataset):
    from jepa_jax import plan

    return plan.make_plan(config, workdir, dataset, None, None, None, None)
