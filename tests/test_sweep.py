"""Sweeps: what is swept, equality with single runs, halving, restart, the command."""

import dataclasses
import html
import io
import json
import math
import sys
import types

import numpy as np
import pytest

from jepa_jax.errors import CheckpointError, ConfigError, Interrupted
from jepa_jax.metrics import read_json, read_metrics
from jepa_jax.pace import with_epochs
from jepa_jax.plan import make_plan
from jepa_jax.report import write_report
from jepa_jax.report.plots import render
from jepa_jax.report.sweep_page import _half_width, charts_of
from jepa_jax.report.sweep_table import as_markdown, table
from jepa_jax.report.theme import LIGHT
from jepa_jax.sweep import lanes, run, tracks
from jepa_jax.sweep.axes import Range, as_flags, axes_of_file, axes_of_text, points, split_values
from jepa_jax.sweep.cells import by_program, make_cell
from jepa_jax.sweep.live import Live, ordered
from jepa_jax.sweep.result import halve, notes_of, rung_shares, spread, winner_of, work_with_rungs
from jepa_jax.sweep.run import Sweep
from jepa_jax.sweep.shared import shared_steps
from jepa_jax.train import train_and_evaluate

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
RATES = [{"optim.lr": 0.1}, {"optim.lr": 0.3}, {"optim.lr": 1e6}]


@pytest.fixture(scope="module")
def config(tiny_config):
    """Two epochs of four steps."""
    return with_epochs(tiny_config, 2.0)


def parse(key, text):
    return (int if key.startswith(("data.", "model.width")) else float)(text)


# --- what is swept --------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_zipped_keys_go_together():
    axes = axes_of_text(
        ["optim.lr=0.1,0.3", "loss.std_coeff=1,25"],
        ["optim.epochs=5,10,15", "data.batch_size=32,64,128"],
        [],
        parse,
    )
    found = points(axes)
    assert len(found) == axes.num_points == 2 * 2 * 3
    assert {(p["optim.lr"], p["loss.std_coeff"]) for p in found} == {
        (0.1, 1.0),
        (0.1, 25.0),
        (0.3, 1.0),
        (0.3, 25.0),
    }
    pairs = {(p["optim.epochs"], p["data.batch_size"]) for p in found}
    assert pairs == {(5.0, 32), (10.0, 64), (15.0, 128)}


def test_a_point_given_twice_is_one():
    assert points(axes_of_text(["optim.lr=0.1,0.10,0.3"], [], [], parse)) == RATES[:2]


def test_draws_lie_in_their_range_by_their_law_and_more_of_them_add_points():
    texts = ["optim.lr=0.01..1:log", "loss.std_coeff=1..25", "data.batch_size=32..512"]
    few, many = (points(axes_of_text([], [], [n, *texts], parse)) for n in ("20", "1000"))
    assert many[:20] == few
    rates = np.array([p["optim.lr"] for p in many])
    weights = np.array([p["loss.std_coeff"] for p in many])
    # The decimal logarithm of 0.01..1 is uniform in [-2, 0]: 1000 draws have a mean within 0.06.
    assert rates.min() >= 0.01 and rates.max() <= 1 and abs(np.log10(rates).mean() + 1) < 0.06
    assert weights.min() >= 1 and weights.max() <= 25 and abs(weights.mean() - 13) < 0.8
    assert abs(np.corrcoef(np.log(rates), weights)[0, 1]) < 0.1
    assert all(type(p["data.batch_size"]) is int for p in many)


@pytest.mark.parametrize("is_log", [True, False])
def test_a_range_ends_at_its_bounds(is_log):
    of = Range(0.02, 5.0, is_log)
    assert of.draw(0.0) == 0.02 and of.draw(1.0) == 5.0


def test_a_comma_in_brackets_separates_nothing():
    assert split_values("(1, 1),(2, 2, 2)") == ["(1, 1)", "(2, 2, 2)"]
    assert split_values("0.1,0.3") == ["0.1", "0.3"]


@pytest.mark.parametrize(
    ("grid", "zipped", "drawn", "message"),
    [
        (["optim.lrr=1"], [], [], r"optim.lrr is not a known key \(did you mean optim.lr\?\)"),
        (["optim.lr"], [], [], "takes KEY=VALUE"),
        (["optim.lr="], [], [], "has no values"),
        (["optim.lr=0.1,,1"], [], [], "has an empty value"),
        (["optim.lr=1", "optim.lr=2"], [], [], "given twice"),
        (["meta.seed=1"], [], [], "set by --seeds"),
        (["logging.log_every=1"], [], [], "does not change what is learnt"),
        ([], ["optim.lr=1,2", "optim.epochs=1"], [], "optim.lr has 2, optim.epochs has 1"),
        ([], [], ["x", "optim.lr=1..2"], "takes a number of draws"),
        ([], [], ["0", "optim.lr=1..2"], "takes a number of draws"),
        ([], [], ["5"], "needs a range"),
        ([], [], ["5", "optim.lr=2..1"], "empty or not finite"),
        ([], [], ["5", "optim.lr=0..1:log"], "starts above 0"),
        ([], [], ["5", "optim.lr=1..2:exp"], "ends in :log"),
        ([], [], [], "nothing is swept"),
    ],
)
def test_what_cannot_be_swept_is_one_line(grid, zipped, drawn, message):
    with pytest.raises(ConfigError, match=message) as error:
        axes_of_text(grid, zipped, drawn, parse)
    assert "\n" not in str(error.value)


def test_an_axis_file_says_the_same_as_flags(tmp_path):
    path = tmp_path / "axes.py"
    path.write_text(
        "def get_sweep():\n"
        "    return {'grid': {'optim.lr': (0.1, 0.3)}, 'zip': {'optim.epochs': [2.0, 4.0]},\n"
        "            'random': {'loss.std_coeff': (1.0, 25.0, 'log')}, 'num_random': 3,\n"
        "            'config': {'optim.warmup_epochs': 1.0}}\n"
    )
    found = axes_of_file(path, parse)
    same = axes_of_text(
        ["optim.lr=0.1,0.3"], ["optim.epochs=2,4"], ["3", "loss.std_coeff=1..25:log"], parse
    )
    assert points(found) == points(same)
    assert found.config == {"optim.warmup_epochs": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("x = 1", r"has no function get_sweep\(\)"),
        ("1 / 0", "ZeroDivisionError"),
        ("def get_sweep(): return {'grids': {}}", "returns a dict of"),
        ("def get_sweep(): return {'grid': {'optim.lr': ()}}", "has no values"),
    ],
)
def test_a_wrong_axis_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "axes.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        axes_of_file(path, parse)
    assert "\n" not in str(error.value)


def test_points_of_numbers_share_a_program_and_points_of_shapes_do_not(config, tmp_path):
    def program(**changes):
        point = {key.replace("__", "."): value for key, value in changes.items()}
        return make_cell(config, point, 0, tmp_path).program

    same = {
        program(),
        program(optim__lr=0.2),
        program(optim__epochs=4.0),
        program(loss__cov_coeff=3.0),
        program(optim__weight_decay=0.1),
        program(augment__hue=0.3),
        program(augment__scale=(0.5, 1.0)),
        make_cell(config, {}, 7, tmp_path).program,
    }
    assert len(same) == 1
    for changes in ({"data__batch_size": 50}, {"model__width": 8}, {"optim__name": "sgd"}):
        assert program(**changes) not in same
    blurred = {program(augment__blur_prob=share) for share in (0.1, 0.5)}
    assert len(blurred) == 1 and not blurred & same
    assert program(augment__blur_sigma=(1.0, 2.0)) in same
    cells = [make_cell(config, {"model.width": w}, s, tmp_path) for w in (4, 8) for s in (0, 1)]
    assert [len(group) for group in by_program(cells).values()] == [2, 2]
    assert len({cell.folder for cell in cells}) == 4


# --- arithmetic -----------------------------------------------------------------------------------


def test_spread_is_the_mean_and_the_sample_standard_deviation():
    values = [0.3, 0.5, 0.9]
    found = spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert spread([0.3]) == {"mean": 0.3, "std": None, "n": 1} and spread([]) is None


@pytest.mark.parametrize(("count", "factor"), [(6, 3), (2, 2), (9, 3), (100, 4), (1, 2)])
def test_halving_ends_with_one_point_and_costs_less_than_all(count, factor):
    shares = rung_shares(count, factor)
    left, before, cost = count, 0.0, 0.0
    for share in [*shares, 1.0]:
        cost += left * (share - before)
        before = share
        if share < 1:
            kept, of = halve({n: [float(n)] for n in range(count - left, count)}, 1, factor)
            assert of == left and kept == list(range(count - len(kept), count))
            left = len(kept)
    assert left == 1
    assert cost <= count and (count == 1 or cost < count)
    if (count, factor) == (6, 3):
        assert shares == pytest.approx([1 / 9, 1 / 3])
        # 6 points for a ninth, 2 to a third, 1 to the end.
        assert cost == pytest.approx(6 / 9 + 2 * 2 / 9 + 2 / 3)


@pytest.mark.parametrize(("count", "factor"), [(6, 3), (9, 3), (5, 2), (1, 3), (7, 0)])
def test_the_work_with_rungs_is_that_of_training_every_point_to_where_it_stops(count, factor):
    """By an independent count: epochs of every point, in thirds of thirds, one after another."""
    alive, lengths, judged = count, [], 0
    shares = rung_shares(count, factor) if factor else []
    for share in shares:
        judged += alive
        kept = math.ceil(alive / factor)
        lengths += [share] * (alive - kept)
        alive = kept
    lengths += [1.0] * alive
    judged += alive
    trained, judgements = work_with_rungs(count, factor)
    assert trained == pytest.approx(sum(lengths) / count) and judgements == judged / count


def test_a_point_that_lost_a_seed_ranks_below_those_that_did_not():
    kept, _ = halve({"a": [0.9], "b": [0.1, 0.2], "c": []}, 2, 3)
    assert kept == ["b"]


def test_the_live_view_has_the_best_on_top_and_the_unfinished_below():
    rows = [("a", 0.1, None, ""), ("b", 1.0, 40.0, ""), ("c", 0.9, None, ""), ("d", 1.0, 50.0, "")]
    assert [row[0] for row in ordered(rows)] == ["d", "b", "c", "a"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_the_points_and_a_file_gets_lines(is_terminal, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return is_terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with Live("2 points, 3 seeds", "ridge, val %") as live:
        live.show([("0.1", 0.25, None, "seed 0 at step 7"), ("0.3", 1.0, 51.234, "")])
        live.line("done", "0.3, seed 2")
    text = screen.getvalue()
    if not is_terminal:
        assert text == "done      0.3, seed 2\n"
        return
    last = text[text.rindex("2 points, 3 seeds") :]
    assert last.index("51.23") < last.index("seed 0 at step 7")
    assert "100 %" in last and "25 %" in last and "done      " not in text


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(config, small_cifar, tmp_path_factory):
    """(document, workdir) of two rates and one that diverges, two seeds each."""
    workdir = tmp_path_factory.mktemp("sweep")
    sweep = Sweep(config, RATES, workdir, num_seeds=2, stack=1, dataset=small_cifar)
    return sweep.run(), workdir


def cells_of(document):
    return {(row["label"], c["seed"]): c for row in document["rows"] for c in row["cells"]}


def test_a_cell_is_the_single_run_of_its_config(swept, config, small_cifar, tmp_path):
    document, workdir = swept
    own = config.copy_and_resolve_references()
    own.optim.lr, own.meta.seed = 0.3, config.meta.seed + 1
    train_and_evaluate(own, tmp_path / "run", dataset=small_cifar)
    summary = read_json(tmp_path / "run" / "summary.json")
    cell = cells_of(document)["0.3", config.meta.seed + 1]
    for name in ("val_ridge_probe_acc", "val_online_probe_acc", "steps"):
        assert cell[name] == summary[name], name
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["train/loss"] for row in cell["curve"]] == [row["train/loss"] for row in rows]
    assert cell["train_loss"] == rows[-1]["train/loss"]


def test_the_floor_is_the_same_network_untrained_and_test_is_the_winners_alone(
    swept, config, small_cifar, tmp_path
):
    document, _ = swept
    winner = document["winner"]
    accs, floors = [], []
    for seed in document["seeds"]:
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict({**winner["point"], "meta.seed": seed})
        train_and_evaluate(own, tmp_path / str(seed), dataset=small_cifar)
        summary = read_json(tmp_path / str(seed) / "summary.json")
        accs.append(summary["ridge_probe_acc"])
        floors.append(summary["val_untrained_ridge_probe_acc"])
    assert winner["test_ridge_probe_acc"]["mean"] == pytest.approx(np.mean(accs))
    assert document["floor"]["val_ridge_probe_acc"]["mean"] == pytest.approx(np.mean(floors))
    for row in document["rows"]:
        has_test = any("test_ridge_probe_acc" in cell for cell in row["cells"])
        assert not has_test or row["label"] == winner["label"]


def test_a_diverged_point_is_a_row_that_says_when_and_which_term(swept):
    document, _ = swept
    row = document["rows"][2]
    assert row["status"] == "diverged" and row["val_ridge_probe_acc"] is None
    for cell in row["cells"]:
        assert cell["reason"].split(" became ")[0].endswith(("loss", "grad_norm"))
        assert f"at step {cell['steps']} (" in cell["reason"] and cell["steps"] < 8
    assert [one["status"] for one in document["rows"][:2]] == ["finished"] * 2
    assert "diverged" in as_markdown(document) and document["winner"]["label"] != "1e+06"


def test_one_program_serves_every_rate_and_seed(swept):
    assert swept[0]["cost"]["programs"] == 1


def test_the_winner_is_the_best_on_val_and_its_flags_are_its_point(swept):
    document, _ = swept
    best = max(document["rows"][:2], key=lambda row: row["val_ridge_probe_acc"]["mean"])
    assert document["winner"]["point"] == best["point"]
    assert document["winner"]["flags"] == f"--config.optim.lr={best['point']['optim.lr']}"
    header, *rows = table(document)
    assert header[0] == "optim.lr" and [row[0] for row in rows] == [
        "0.1",
        "0.3",
        "1e+06",
        "untrained",
    ]


def test_points_that_are_judged_on_other_images_are_named():
    def notes(key):
        points = [
            {"point": {key: n}, "label": str(n), "epochs": 2, "warmup_epochs": 1} for n in (1, 2)
        ]
        return " ".join(notes_of(points))

    assert "of another data.num_train are judged on other images" in notes("data.num_train")
    assert "other images" not in notes("optim.lr") and "flatters" in notes("optim.lr")


def test_without_a_whole_point_there_is_no_winner():
    row = {"status": "finished", "label": "x", "point": {}, "val_ridge_probe_acc": {"mean": 1.0}}
    rows = [{**row, "cells": [{"status": "finished"}, {"status": "diverged"}]}]
    assert winner_of(rows, "val_ridge_probe_acc") is None


def test_flags_are_pasteable():
    assert as_flags({"optim.lr": 0.5, "model.stage_sizes": (1, 1)}) == (
        "--config.optim.lr=0.5 --config.model.stage_sizes=(1,1)"
    )


@pytest.mark.parametrize("stack", [2, 4])
def test_a_stacked_row_is_its_single_run_to_float_tolerance(
    swept, config, small_cifar, tmp_path, stack
):
    """With 6 cells, lanes take their next cell when one of theirs diverges or ends."""
    one = cells_of(swept[0])
    sweep = Sweep(config, RATES, tmp_path, num_seeds=2, stack=stack, dataset=small_cifar)
    found = cells_of(sweep.run())
    assert found.keys() == one.keys()
    for name, cell in found.items():
        single = one[name]
        assert (cell["status"], cell["steps"]) == (single["status"], single["steps"]), name
        for row, other in zip(cell["curve"], single["curve"], strict=True):
            # bfloat16 rounds at 4e-3, and XLA may round a stack elsewhere than a single run.
            assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-2)


def test_lanes_of_different_lengths_end_each_at_its_own_step(config, small_cifar, tmp_path):
    config = config.copy_and_resolve_references()
    config.optim.warmup_epochs = 1.0
    lengths = [{"optim.epochs": epochs} for epochs in (1.0, 1.5, 2.0)]
    documents = [
        Sweep(
            config, lengths, tmp_path / str(stack), num_seeds=1, stack=stack, dataset=small_cifar
        ).run()
        for stack in (1, 2)
    ]
    for row, other in zip(*(document["rows"] for document in documents), strict=True):
        assert row["cells"][0]["steps"] == round(4 * row["epochs"])
        assert row["train_loss"]["mean"] == pytest.approx(other["train_loss"]["mean"], rel=1e-3)
    # The first alone never left the warm-up.
    assert documents[0]["notes"][0].startswith("1 ended inside the warm-up (1 epochs, 1 of")


# --- starts in common -----------------------------------------------------------------------------

LENGTHS = [{"optim.epochs": epochs} for epochs in (1.0, 1.5, 2.0)]


@pytest.fixture(scope="module")
def of_lengths(config):
    """Lengths that share their warm-up, an epoch of four steps."""
    config = config.copy_and_resolve_references()
    config.optim.warmup_epochs = 1.0
    return config


@pytest.fixture(scope="module")
def lengths_alone(of_lengths, small_cifar, tmp_path_factory):
    """Cells of a sweep a length, which therefore share nothing."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for place, point in enumerate(LENGTHS):
        sweep = Sweep(
            of_lengths, [point], folder / str(place), num_seeds=2, stack=1, dataset=small_cifar
        )
        document = sweep.run()
        assert document["cost"]["steps_saved"] == 0
        found |= cells_of(document)
    return found


def results_of(cell):
    """What a cell came to, without what its time was and when its test images were looked at."""
    curve = [{k: v for k, v in row.items() if k != "train_seconds"} for row in cell["curve"]]
    kept = ("status", "steps", "images", "reason", "train_loss", "val_ridge_probe_acc")
    return curve, {name: cell.get(name) for name in kept}


def test_a_warm_up_in_common_is_trained_once_and_changes_nothing(
    of_lengths, lengths_alone, small_cifar, tmp_path
):
    sweep = Sweep(of_lengths, LENGTHS, tmp_path, num_seeds=2, stack=1, dataset=small_cifar)
    document = sweep.run()
    assert document["cost"]["steps_saved"] == 2 * 2 * 4  # seeds, other lengths, steps of warm-up
    found = cells_of(document)
    assert found.keys() == lengths_alone.keys()
    for name, cell in found.items():
        assert results_of(cell) == results_of(lengths_alone[name]), name
        assert cell["seconds"] > cell["curve"][0]["train_seconds"] > 0 or cell["steps"] == 4
    assert not list(tmp_path.glob("cells/*/checkpoints"))


def test_a_stop_after_a_shared_start_loses_nothing_of_it(
    of_lengths, lengths_alone, small_cifar, tmp_path, monkeypatch
):
    def sweep():
        return Sweep(of_lengths, LENGTHS, tmp_path, num_seeds=2, stack=1, dataset=small_cifar)

    def stopped(*args):
        raise Interrupted("stopped", 15)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_stop", stopped)
        with pytest.raises(Interrupted):
            sweep().run()
    document = sweep().run()
    assert document["cost"]["steps_saved"] == 2 * 2 * 4  # nothing of it a second time
    for name, cell in cells_of(document).items():
        assert results_of(cell) == results_of(lengths_alone[name]), name


def test_what_diverges_in_a_shared_start_does_so_in_every_length(of_lengths, small_cifar, tmp_path):
    config = of_lengths.copy_and_resolve_references()
    config.optim.lr = config.optim.warmup_start_lr = config.loss.cov_coeff = 1e6
    config.loss.sim_coeff = config.loss.std_coeff = 1e6
    document = Sweep(config, LENGTHS, tmp_path, num_seeds=1, stack=1, dataset=small_cifar).run()
    reasons = {cell["reason"] for cell in cells_of(document).values()}
    assert [row["status"] for row in document["rows"]] == ["diverged"] * 3
    assert len(reasons) == 1 and "at step" in reasons.pop()


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_cell_that_is_left_alone_takes_the_program_of_a_single_one(
    of_lengths, lengths_alone, small_cifar, tmp_path, monkeypatch, num_seeds
):
    """With one seed the shared start is alone, and what begins at its end is not."""
    alone, widths = [], []

    def two_lanes(plan, state, most, devices):
        alone.append(lanes.make_lanes(plan, state, 1, devices))
        return lanes.make_lanes(plan, state, 2, devices), alone[0], "two"

    def advance(lanes_now, running):
        widths.append((lanes_now is alone[0], sum(track is not None for track in running)))
        return own_advance(lanes_now, running)

    own_advance = tracks._advance
    monkeypatch.setattr(run, "choose_lanes", two_lanes)
    monkeypatch.setattr(tracks, "_advance", advance)
    sweep = Sweep(of_lengths, LENGTHS, tmp_path, num_seeds=num_seeds, dataset=small_cifar)
    found = cells_of(sweep.run())
    assert all(is_alone == (count == 1) for is_alone, count in widths)
    assert {count for _, count in widths} == {1, 2}
    for name, cell in found.items():
        assert cell["steps"] == lengths_alone[name]["steps"]
        assert cell["train_loss"] == pytest.approx(lengths_alone[name]["train_loss"], rel=1e-2)


def test_rates_of_their_own_share_no_steps(of_lengths, small_cifar, tmp_path):
    plan = make_plan(of_lengths, tmp_path, small_cifar, None, None, None, None)

    def with_(**changes):
        config = of_lengths.copy_and_resolve_references()
        config.optim.update(changes)
        return plan.with_numbers(config, tmp_path)

    assert shared_steps([plan, with_(epochs=1.5)]) == 4
    assert shared_steps([plan, with_(epochs=1.5, warmup_epochs=1.5)]) == 0
    assert shared_steps([with_(warmup_epochs=0.0), with_(warmup_epochs=0.0, epochs=1.5)]) == 0
    # In whole epochs: the rates part at step 6.
    longer = [with_(warmup_epochs=1.5), with_(warmup_epochs=1.5, epochs=1.75)]
    assert shared_steps(longer) == 4


def test_a_plan_lends_its_program_to_no_other_blur(config, small_cifar, tmp_path):
    plan = make_plan(config, tmp_path, small_cifar, None, None, None, None)
    blurred = config.copy_and_resolve_references()
    blurred.augment.blur_prob = 0.5
    with pytest.raises(ValueError, match="are two programs"):
        plan.with_numbers(blurred, tmp_path)
    own = make_plan(blurred, tmp_path, small_cifar, None, None, None, None)
    blurred.augment.update(blur_prob=0.25, blur_sigma=(0.5, 1.0))
    again = own.with_numbers(blurred, tmp_path)
    assert again.augment_fn is own.augment_fn
    assert (again.hparams.augment["blur_prob"], *again.hparams.augment["blur_sigma"]) == (
        *(0.25, 0.5, 1.0),
    )


# --- budget, page -------------------------------------------------------------------------------


def test_a_budget_chooses_the_epochs_of_every_point_once(
    config, small_cifar, tmp_path, monkeypatch
):
    """Of 6 cells, one program and their judgements; the schedule keeps its shape."""

    def sweep(factor=0):
        folder = tmp_path / str(factor)
        return Sweep(
            config, RATES, folder, num_seeds=2, stack=1, factor=factor, dataset=small_cifar
        )

    monkeypatch.setattr(run, "seconds_per_step", lambda *arguments: 0.5)
    for factor in (0, 2):
        fitted = sweep(factor)
        fitted.fit_to_budget(3600.0, spent=50.0)
        stored = read_json(tmp_path / str(factor) / "budget.json")
        work, _ = work_with_rungs(3, factor)
        assert stored["cost"]["epoch"] == pytest.approx(6 * work * 4 * 0.5)
        assert stored["cost"]["fixed"] > 50.0
        chosen = {cell.config.optim.epochs for cells in fitted._cells for cell in cells}
        assert chosen == {stored["epochs"]} and stored["epochs"] > 2 * config.optim.epochs
        share = config.optim.warmup_epochs / config.optim.epochs
        for cell in (cell for cells in fitted._cells for cell in cells):
            assert cell.config.optim.warmup_epochs == pytest.approx(
                share * stored["epochs"], rel=1e-4
            )
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "_measure", forbidden)
        again = sweep()
        again.fit_to_budget(3600.0)
        assert {c.config.optim.epochs for cells in again._cells for c in cells} == {
            read_json(tmp_path / "0" / "budget.json")["epochs"]
        }


def test_the_page_of_a_sweep_has_its_table_its_figures_and_the_winner(swept, tmp_path):
    document, workdir = swept
    page = write_report([workdir], out=tmp_path)
    text = html.unescape(page.read_text())
    for row in table(document):
        for cell in filter(None, row):
            assert f">{cell}<" in text, cell
    assert document["winner"]["flags"] in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "key-optim-lr.png",
        "time.png",
    }
    assert text.count("<figure") == 2 and "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    "points",
    [
        [{"loss.std_coeff": a, "loss.cov_coeff": b} for a in (1.0, 25.0) for b in (1.0, 5.0)],
        [{"model.stage_sizes": (1, 1)}, {"model.stage_sizes": (1, 1, 1)}],
        [{"optim.name": "lars"}, {"optim.name": "muon"}],
        [{"optim.lr": 0.1}],
    ],
)
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_kind_of_axis_has_a_figure_a_key_and_one_of_time(points, num_seeds):
    document = {
        **made_up(points, num_seeds),
        "floor": {"val_ridge_probe_acc": spread([0.4] * num_seeds)},
    }
    charts = charts_of(json.loads(json.dumps(document)))
    assert [chart.name for chart in charts] == [
        *(f"key-{key.replace('.', '-')}" for key in points[0]),
        "time",
    ]
    for chart in charts:
        svg = render(chart.draw, LIGHT).decode()
        assert "untrained 40.0" in svg and "ridge probe on validation images" in svg


def made_up(points, num_seeds):
    """The parts of sweep.json that figures are drawn from."""
    rows = []
    for place, point in enumerate(points):
        cells = [
            {"seed": n, "status": "finished", "reason": None, "val_ridge_probe_acc": 0.5 + 0.01 * n}
            for n in range(num_seeds)
        ]
        figure = spread([cell["val_ridge_probe_acc"] + 0.02 * place for cell in cells])
        rows.append(
            {
                "point": point,
                "label": str(place),
                "status": "finished",
                "cells": cells,
                "val_ridge_probe_acc": figure,
                "seconds": spread([60.0 * (1 + place)] * num_seeds),
            }
        )
    axes = {key: [] for key in points[0]}
    for point in points:
        for key, value in point.items():
            if value not in axes[key]:
                axes[key].append(value)
    return {"rows": rows, "axes": axes, "score": "val_ridge_probe_acc", "winner": None}


def test_the_interval_of_a_mean_is_students():
    """By the table of t at two degrees of freedom: 4.303."""
    figure = spread([0.50, 0.52, 0.54])
    assert _half_width(figure) == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)
    assert _half_width(spread([0.5])) == 0.0


def test_a_damaged_sweep_is_one_line(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not that of a sweep: run it again"):
        write_report([tmp_path])


# --- restart --------------------------------------------------------------------------------------


def forbidden(*args, **kwargs):
    raise AssertionError("this was to be kept")


def test_the_same_sweep_again_trains_nothing_and_a_larger_one_only_what_is_new(
    config, small_cifar, tmp_path, monkeypatch
):
    def call(points):
        return Sweep(
            config, points, tmp_path, num_seeds=1, stack=1, factor=0, dataset=small_cifar
        ).run()

    first = call(RATES[:1])
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_tracks", forbidden)
        again = call(RATES[:1])
    assert again["rows"] == first["rows"] and again["winner"] == first["winner"]
    started = []
    original = tracks.Track.start
    monkeypatch.setattr(
        tracks.Track, "start", lambda self: started.append(self.cell.point) or original(self)
    )
    call(RATES[:2])
    assert started == [RATES[1]]


def test_a_changed_base_config_is_another_sweep(config, small_cifar, tmp_path):
    Sweep(config, RATES[:1], tmp_path, num_seeds=1, stack=1, dataset=small_cifar).run()
    other = config.copy_and_resolve_references()
    other.loss.cov_coeff = 3.0
    found = Sweep(other, RATES[:1], tmp_path, num_seeds=1, stack=1, dataset=small_cifar).run()
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert found["rows"][0]["status"] == "finished"


def test_halving_stops_the_worst_and_changes_nothing_of_the_best(
    swept, config, small_cifar, tmp_path, monkeypatch
):
    def call():
        return Sweep(
            config, RATES, tmp_path, num_seeds=2, stack=1, factor=3, dataset=small_cifar
        ).run()

    document = call()
    statuses = sorted(row["status"] for row in document["rows"])
    assert statuses == ["diverged", "finished", "stopped"]
    winner = document["winner"]["label"]
    straight, halved = cells_of(swept[0]), cells_of(document)
    for seed in document["seeds"]:
        one, other = straight[winner, seed], halved[winner, seed]
        assert one["val_ridge_probe_acc"] == other["val_ridge_probe_acc"]
        assert [r["train/loss"] for r in one["curve"]] == [r["train/loss"] for r in other["curve"]]
    loser = next(row for row in document["rows"] if row["status"] == "stopped")
    # A rung at a third of 8 steps.
    assert {cell["steps"] for cell in loser["cells"]} == {3}
    assert "not among the best 1 of 3 at step 3" in as_markdown(document)
    monkeypatch.setattr(run, "train_tracks", forbidden)
    assert call()["rows"] == document["rows"]


def test_without_labels_rank_me_decides(config, small_cifar, tmp_path):
    dataset = dataclasses.replace(small_cifar, train_labels=None, test_labels=None)
    document = Sweep(
        config, RATES[:2], tmp_path, num_seeds=1, stack=1, factor=2, dataset=dataset
    ).run()
    assert document["score"] == "rank_me"
    finished = [row for row in document["rows"] if row["status"] == "finished"]
    assert len(finished) == 1 and 1 <= finished[0]["rank_me"]["mean"] <= 8
    assert "RankMe" in as_markdown(document)


@pytest.mark.parametrize(
    ("platform", "num_devices", "most", "seconds", "tried", "chosen"),
    [
        ("gpu", 1, 4, [1.0, 0.6, 0.58], [1, 2, 4], 2),  # 3 % are not worth it
        ("gpu", 1, 3, [1.0, 0.6], [1, 2], 2),  # no more than there are cells
        ("gpu", 4, 9, [1.0, 0.3, 0.2], [1, 4, 8], 8),
        ("gpu", 1, 4, [1.0, 1.2], [1, 2], 1),
        ("cpu", 4, 9, [1.0, 0.8, 0.7], [1, 2, 4], 4),  # no two on a core
        ("cpu", 1, 9, [1.0], [1], 1),
        ("gpu", 1, 1, [], [1], 1),
    ],
)
def test_the_choice_of_lanes_is_measured_and_said(
    monkeypatch, platform, num_devices, most, seconds, tried, chosen
):
    made, times = [], iter(seconds)

    def make(plan, state, num_lanes, devices):
        assert len(devices) == min(num_lanes, num_devices)
        made.append(num_lanes)
        return types.SimpleNamespace(num_lanes=num_lanes, load=lambda *cell: None)

    monkeypatch.setattr(lanes, "make_lanes", make)
    monkeypatch.setattr(lanes, "seconds_per_step", lambda *arguments: next(times))
    plan = types.SimpleNamespace(placement="device", batches_of=lambda epoch: None, hparams=None)
    devices = [types.SimpleNamespace(platform=platform)] * num_devices
    found, alone, text = lanes.choose_lanes(plan, {}, most, devices)
    assert (made, found.num_lanes, alone.num_lanes) == (tried, chosen, 1) and not list(times)
    for num_lanes, each in zip(tried, seconds, strict=False):
        assert f"{num_lanes}: {1e3 * each:.1f} ms" in text
