"""A against B: the statistic, equal time, what is kept, and the command."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from scipy import stats
from tiny import FLAGS

from jepa_jax import device, loop, pace, plan
from jepa_jax.compare import SIDES, equal_time, pairs
from jepa_jax.compare.__main__ import main
from jepa_jax.compare.equal_time import (
    differing_keys,
    epochs_of_equal_time,
    measure_turns,
    run_one_program,
    step_arguments,
)
from jepa_jax.compare.pairs import compare_configs
from jepa_jax.compare.statistic import paired_interval, verdict
from jepa_jax.config import hparams_from, view_options
from jepa_jax.data import from_arrays
from jepa_jax.data.cifar10 import write_cifar10
from jepa_jax.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from jepa_jax.loop import train_step_of
from jepa_jax.metrics import read_json, write_json
from jepa_jax.pace import with_epochs
from jepa_jax.plan import initial_state, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(__file__).parent.parent
CPU = str(ROOT / "configs" / "cpu.py")


@pytest.fixture
def config(tiny_config):
    """Two epochs of four steps."""
    return with_epochs(tiny_config, 2.0)


@pytest.fixture
def other(config):
    """Calls for a config that differs in these keys."""

    def call(**changes):
        copy = config.copy_and_resolve_references()
        copy.update_from_flattened_dict(
            {key.replace("__", "."): value for key, value in changes.items()}
        )
        return copy

    return call


# --- the statistic ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_interval_is_that_of_the_paired_t_test(n):
    random = np.random.default_rng(n)
    a, b = random.normal(0.5, 0.02, n), random.normal(0.51, 0.02, n)
    found = paired_interval(list(b - a))
    wanted = stats.ttest_rel(b, a).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [wanted.low, wanted.high], rtol=1e-9)
    np.testing.assert_allclose([found.mean, found.std], [(b - a).mean(), (b - a).std(ddof=1)])
    assert found.n == n


def test_one_difference_has_no_interval():
    with pytest.raises(ValueError, match="at least two differences, got 1"):
        paired_interval([0.1])


def test_the_verdict_is_that_of_the_test_at_five_percent():
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a, b = random.normal(0, 1, 5), random.normal(random.normal(), 1, 5)
        test = stats.ttest_rel(b, a)
        wanted = "no difference seen"
        if test.pvalue < 0.05:
            wanted = "better" if test.statistic > 0 else "worse"
        word, sentence = verdict(paired_interval(list((b - a) / 100)))
        assert word == wanted and sentence.startswith(wanted)
        seen.add(word)
    assert seen == {"better", "worse", "no difference seen"}


def test_the_words_carry_the_figures():
    """Of three differences the interval is 4.303 standard errors to either side."""
    assert verdict(paired_interval([0.02, 0.03, 0.04]))[1] == (
        "better: B is 3.00 points above A (95 % interval +0.52 to +5.48, n = 3 pairs)"
    )
    assert verdict(paired_interval([-0.02, -0.03, -0.04]))[1] == (
        "worse: B is 3.00 points below A (95 % interval -5.48 to -0.52, n = 3 pairs)"
    )
    assert verdict(paired_interval([-0.01, 0.0, 0.01]))[1] == (
        "no difference seen at n = 3: a difference of less than 2.48 points would not show "
        "(B - A is +0.00 points, 95 % interval -2.48 to +2.48)"
    )


# --- equal time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_epochs_times_seconds_of_an_epoch_are_equal(ratio):
    load = [1.0, 1.3, 4.0]  # of a machine that does other things too
    turns = [(7.0 * slower, 7.0 * ratio * slower) for slower in load]
    epochs = epochs_of_equal_time(1.5, turns)
    assert epochs * 7.0 * ratio == pytest.approx(1.5 * 7.0, rel=1e-5)
    turns += [(700.0, 7.0 * ratio), (7.0, 700.0 * ratio)]  # in which one of the two was disturbed
    assert epochs_of_equal_time(1.5, turns) == epochs


def test_the_warm_up_keeps_its_share(config):
    config = config.copy_and_resolve_references()
    config.optim.warmup_epochs = 0.5
    longer = with_epochs(config, 3.0)
    assert longer.optim.epochs == 3.0 and longer.optim.warmup_epochs == 0.75
    config.optim.warmup_epochs = 2.0  # all of it: never above by rounding
    for epochs in (2 / 3, 1.7, 1 / 7):
        assert with_epochs(config, epochs).optim.warmup_epochs <= epochs
    with config.ignore_type():
        config.optim.epochs = 2  # as a person may write
    assert with_epochs(config, 1.25).optim.epochs == 1.25


@pytest.mark.parametrize("blur_prob", [0.0, 0.5])
def test_what_the_step_takes_as_arguments_changes_no_program(blur_prob, other, small_cifar):
    """All of these keys at once: other numbers, the same program before it is compiled."""
    config = other(augment__blur_prob=blur_prob)
    changed = config.copy_and_resolve_references()

    def numbers(config):
        return {**vars(hparams_from(config, 4)), **view_options(config)}

    moved = set()
    others = {"meta.seed": 7, "optim.schedule": "late_epoch", "augment.scale": (0.3, 0.9)}
    others["augment.blur_sigma"] = (0.2, 1.5)
    without_use = {"augment.local_scale"}
    without_use |= set() if blur_prob else {"augment.blur_prob", "augment.blur_sigma"}
    for key in step_arguments() - without_use:
        section, name = key.split(".")
        before = numbers(changed)
        changed[section][name] = others.get(key) or changed[section][name] * 0.5 + 0.13
        after = numbers(changed)
        moved |= {field for field in after if after[field] != before[field]}
    # Epochs are the comparison's to set; the augmentation's strengths are in by name; whether there
    # is a target network at all decides on the program.
    assert moved == set(numbers(config)) - {"num_steps", "augment", "target_ema"}
    texts = []
    for each in (config, changed):
        found = make_plan(each, pathlib.Path(), small_cifar, None, None, None, None)
        state = jax.eval_shape(lambda found=found: initial_state(found))
        images = jax.ShapeDtypeStruct((100, 32, 32, 3), np.uint8)
        labels = jax.ShapeDtypeStruct((100,), np.int32)
        lowered = jax.jit(train_step_of(found)).lower(state, images, labels, found.hparams)
        texts.append(lowered.as_text())
    assert texts[0] == texts[1]
    assert run_one_program(config, changed)


def test_views_with_a_blur_and_without_one_are_not_of_one_program(config, other):
    blurred = other(augment__blur_prob=0.5)
    assert set(differing_keys(config, blurred)) <= step_arguments()
    assert not run_one_program(config, blurred)
    assert run_one_program(blurred, other(augment__blur_prob=0.1, augment__blur_sigma=(1.0, 2.0)))


def test_what_is_compared(config, other):
    same = other(meta__seed=3, optim__epochs=1.0, logging__log_every=7, data__data_dir="elsewhere")
    assert differing_keys(config, same) == {}
    assert differing_keys(config, other(optim__lr=0.5)) == {"optim.lr": [0.3, 0.5]}
    assert set(differing_keys(config, other(optim__lr=0.5))) <= step_arguments()
    for changes in ({"data__batch_size": 50}, {"optim__name": "sgd"}, {"model__width": 6}):
        assert not set(differing_keys(config, other(**changes))) & step_arguments()


def test_speeds_are_taken_in_turns_and_by_the_epoch(config, other, small_cifar, monkeypatch):
    """B has twice the steps in an epoch; both are given seconds of a step."""
    seconds_of_step, log = {4: 0.25, 8: 0.5}, []

    def run(self, num_steps):
        log.append(len(self._order))
        return num_steps * seconds_of_step[len(self._order)]

    monkeypatch.setattr(pace, "initial_state", lambda plan: None)
    monkeypatch.setattr(
        pace, "make_runner", lambda *args: types.SimpleNamespace(piece=2, place=lambda state: state)
    )
    monkeypatch.setattr(pace.Pace, "_run", run)
    sides = {"A": config, "B": other(data__batch_size=50)}
    plans = {
        side: make_plan(each, pathlib.Path(), small_cifar, None, None, None, None)
        for side, each in sides.items()
    }
    turns = measure_turns(plans)
    assert turns == [(1.0, 4.0)] * len(turns) and len(turns) > 1
    assert log[-2 * len(turns) :] == [4, 8] * len(turns)
    assert 4 in log[: -2 * len(turns)] and 8 in log[: -2 * len(turns)]  # warmed up before


# --- what is kept -----------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch, small_cifar):
    """Puts a trainer in place that writes what a config's accuracy is; returns who was trained.

    The accuracy is lr plus a hundredth of the seed's own, so that differences are known.
    """
    log = []

    def stand_in(config, workdir, *, dataset):
        log.append((workdir.parent.name, config.meta.seed))
        acc = config.optim.lr + [0.01, 0.04, 0.02, 0.05][config.meta.seed]
        if config.optim.lr > 0.4:
            acc += 0.001 * config.meta.seed  # or the differences would have no spread
        write_json(workdir / "config.json", {"config": json.loads(config.to_json())})
        summary = {f"val_{name}_acc": acc for name in ("ridge_probe", "online_probe")}
        summary.update(val_untrained_ridge_probe_acc=0.1, ridge_probe_acc=0.9876, collapse=None)
        summary.update(steps=8, epochs=config.optim.epochs, train_seconds=10.0)
        write_json(workdir / "summary.json", summary)
        print("test acc 98.76 %")

    monkeypatch.setattr(pairs, "train_and_evaluate", stand_in)
    return log


def compare(a, b, tmp_path, small_cifar, num_seeds=2):
    return compare_configs(a, b, tmp_path / "run", num_seeds=num_seeds, dataset=small_cifar)


def test_pairs_alternate_and_end_in_a_verdict(
    trained, config, other, tmp_path, small_cifar, capsys
):
    found = compare(config, other(optim__lr=0.5), tmp_path, small_cifar, 3)
    assert trained == [(side, seed) for seed in range(3) for side in SIDES]
    assert found["verdict"] == "better"
    assert found["statistics"]["mean"] == pytest.approx(0.201) and found["statistics"]["n"] == 3
    assert found["equal_time"]["epochs"] == {"A": 2.0, "B": 2.0}
    assert found["equal_time"]["epoch_seconds"] is None
    assert read_json(tmp_path / "run" / "compare.json") == found
    text = (tmp_path / "run" / "compare.md").read_text()
    assert f"**{found['sentence']}**" in text and "optim.lr: 0.3 in A, 0.5 in B" in text
    # The test set is for the last look.
    for shown in (capsys.readouterr().out, text, json.dumps(found)):
        assert "98.76" not in shown and "0.9876" not in shown and "test acc" not in shown
    assert "98.76" in (tmp_path / "run" / "A" / "seed0" / "log.txt").read_text()
    assert str(tmp_path) not in text + json.dumps(found)


def test_the_other_way_round_is_worse(trained, config, other, tmp_path, small_cifar):
    found = compare(other(optim__lr=0.5), config, tmp_path, small_cifar, 3)
    assert found["verdict"] == "worse"
    assert found["statistics"]["mean"] == pytest.approx(-0.201)


def test_what_is_finished_is_read_and_more_seeds_add_pairs(
    trained, config, other, tmp_path, small_cifar, monkeypatch
):
    b = other(optim__lr=0.5)
    first = compare(config, b, tmp_path, small_cifar)
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "make_plan", lambda *args: pytest.fail("no data is needed"))
        assert compare(config, b, tmp_path, small_cifar) == first
    (tmp_path / "run" / "A" / "seed1" / "summary.json").unlink()
    assert compare(config, b, tmp_path, small_cifar) == first
    assert trained == [("A", 1)]
    trained.clear()
    assert len(compare(config, b, tmp_path, small_cifar, 4)["rows"]) == 4
    assert trained == [("A", 2), ("B", 2), ("A", 3), ("B", 3)]


def test_epochs_of_b_are_measured_once(trained, config, other, tmp_path, small_cifar, monkeypatch):
    """An epoch of B takes twice as long; its own 6 epochs are replaced, half of them warm-up."""
    turns = [(1.0, 2.0)] * 5
    monkeypatch.setattr(equal_time, "measure_turns", lambda plans: turns)
    b = other(model__width=6, optim__epochs=6.0, optim__warmup_epochs=3.0)
    stand_in, stopped = pairs.train_and_evaluate, []

    def stop(*args, **options):
        if len(trained) == 1 and not stopped:
            stopped.append(True)
            raise Interrupted("stopped", signal.SIGTERM)
        stand_in(*args, **options)

    monkeypatch.setattr(pairs, "train_and_evaluate", stop)
    with pytest.raises(Interrupted):
        compare(config, b, tmp_path, small_cifar)
    assert stopped and trained == [("A", 0)]
    assert read_json(tmp_path / "run" / "compare.json")["equal_time"]["epochs"]["B"] == 1.0
    monkeypatch.setattr(equal_time, "measure_turns", lambda plans: pytest.fail("it is stored"))
    found = compare(config, b, tmp_path, small_cifar)
    assert trained == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]
    assert [row["B"]["epochs"] for row in found["rows"]] == [1.0, 1.0]
    assert [row["A"]["epochs"] for row in found["rows"]] == [2.0, 2.0]
    stored = read_json(tmp_path / "run" / "B" / "seed0" / "config.json")["config"]["optim"]
    assert stored["epochs"] == 1.0 and stored["warmup_epochs"] == 0.5
    text = found["equal_time"]["text"]
    assert "2.000 times as long" in text and text.endswith("in place of its own 6")


def test_a_diverged_run_is_a_row_and_its_pair_counts_as_none(
    trained, config, other, tmp_path, small_cifar, monkeypatch
):
    stand_in, tries = pairs.train_and_evaluate, []

    def diverge(config, workdir, **options):
        if (workdir.parent.name, config.meta.seed) == ("B", 1):
            tries.append(1)
            raise TrainingError("loss became nan at step 3: try a lower config.optim.lr")
        stand_in(config, workdir, **options)

    monkeypatch.setattr(pairs, "train_and_evaluate", diverge)
    b = other(optim__lr=0.5)
    found = compare(config, b, tmp_path, small_cifar, 3)
    assert found["verdict"] == "better" and found["statistics"]["n"] == 2
    assert found["statistics"]["mean"] == pytest.approx((0.2 + 0.202) / 2)
    assert found["lost"] == ["B, seed 1: loss became nan at step 3"]
    assert found["sentence"].endswith("2 of 3 pairs remain")
    assert "try a lower" in (tmp_path / "run" / "B" / "seed1" / "log.txt").read_text()
    found = compare(config, b, tmp_path, small_cifar, 2)
    assert found["verdict"] is None and found["sentence"] == "no verdict: 1 of 2 pairs remain"
    assert tries == [1]
    assert "no verdict" in (tmp_path / "run" / "compare.md").read_text()


@pytest.mark.parametrize("seconds", [(10.0, 10.4), (10.0, 10.6), (10.0, 9.0)])
def test_unequal_time_is_said(trained, config, other, tmp_path, small_cifar, monkeypatch, seconds):
    stand_in = pairs.train_and_evaluate

    def timed(config, workdir, **options):
        stand_in(config, workdir, **options)
        summary = read_json(workdir / "summary.json")
        summary["train_seconds"] = seconds["AB".index(workdir.parent.name)]
        write_json(workdir / "summary.json", summary)

    monkeypatch.setattr(pairs, "train_and_evaluate", timed)
    found = compare(config, other(optim__lr=0.5), tmp_path, small_cifar)
    wanted = {
        10.4: None,
        10.6: "B trained 6.0 % longer than A: this is not equal time",
        9.0: "B trained 10.0 % shorter than A: this is not equal time",
    }
    assert found["warning"] == wanted[seconds[1]]


def test_another_comparisons_folder_is_refused(trained, config, other, tmp_path, small_cifar):
    compare(config, other(optim__lr=0.5), tmp_path, small_cifar)
    with pytest.raises(CheckpointError, match=r"another B \(optim.lr: 0.5 -> 0.6\)"):
        compare(config, other(optim__lr=0.6), tmp_path, small_cifar)
    (tmp_path / "run" / "compare.json").unlink()
    with pytest.raises(CheckpointError, match=r"B/seed0 holds a run of another config"):
        compare(config, other(optim__lr=0.6), tmp_path, small_cifar)


def test_what_cannot_be_compared_is_refused(trained, config, other, tmp_path, small_cifar):
    refused = {
        "learn the same": {"optim__epochs": 2.0, "meta__seed": 9},
        "num_val is 80 in A and 90 in B": {"data__num_val": 90},
        "dataset is cifar10 in A and cifar100 in B": {"data__dataset": "cifar100"},
        "must be one for A and B": {"meta__device": "gpu"},
        "larger than the 400": {"data__batch_size": 500},
    }
    for words, changes in refused.items():
        with pytest.raises(ConfigError, match=words):
            compare(config, other(**changes), tmp_path, small_cifar)
    with pytest.raises(ConfigError, match="at least 2 seeds, got 1"):
        compare(config, other(optim__lr=0.5), tmp_path, small_cifar, 1)
    unlabelled = from_arrays(small_cifar.train_images)
    with pytest.raises(ConfigError, match="no labels"):
        compare(config, other(optim__lr=0.5), tmp_path, unlabelled)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        compare_configs(config, other(optim__lr=0.5), tmp_path / "file" / "run")
    assert not trained


# --- the command --------------------------------------------------------------------------------


def test_the_command_from_flags_to_verdict(cifar_arrays, tmp_path, monkeypatch, capsys):
    """Without a stand-in: timed, for B is streamed; trained and judged."""
    write_cifar10(
        tmp_path / "data",
        train=(cifar_arrays["train_images"], cifar_arrays["train_labels"]),
        test=(cifar_arrays["test_images"], cifar_arrays["test_labels"]),
    )
    monkeypatch.setattr(device, "select", lambda name: None)
    monkeypatch.setattr(pace, "_TURN_SECONDS", 0.01)
    # The most expensive part of a run so small, and none of the comparison.
    monkeypatch.setattr(loop, "_watch_collapse", lambda *args: {"watch/collapse": None})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("EBJEPA_DSETS", str(tmp_path / "data"))
    monkeypatch.setenv("EBJEPA_CKPTS", str(tmp_path / "runs"))
    length = ["--config.optim.epochs=0.5", "--config.optim.warmup_epochs=0.25"]
    common = [*FLAGS, *length, "--config.optim.lr=0.2"]
    main([CPU, "optim.lr=0.3", "--seeds=2", *common, "data.placement=stream"])
    printed = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    found = read_json(folder / "compare.json")
    assert f"verdict   {found['sentence']}" in printed.out and "test acc" not in printed.out
    names = found["names"]
    assert names["A"] == "cpu.py" and names["B"] == "cpu.py optim.lr=0.3 data.placement=stream"
    assert "optim.epochs=0.5" in names["both"] and f"both      {names['both']}" in printed.out
    assert found["differing"] == {"data.placement": ["auto", "stream"], "optim.lr": [0.2, 0.3]}
    turns = found["equal_time"]["epoch_seconds"]
    assert all(seconds > 0 for turn in turns for seconds in turn)
    accs = {}
    for side in SIDES:
        paths = [folder / side / f"seed{seed}" / "summary.json" for seed in (0, 1)]
        summaries = [read_json(path) for path in paths]
        assert [summary["seed"] for summary in summaries] == [0, 1]
        accs[side] = np.array([summary["val_ridge_probe_acc"] for summary in summaries])
        steps = round(4 * found["equal_time"]["epochs"][side])
        for row, summary in zip(found["rows"], summaries, strict=True):
            assert row[side].items() >= {k: summary[k] for k in ("steps", "train_seconds")}.items()
            assert row[side]["steps"] == steps and row[side]["images"] == 100 * steps
            floor = summary["val_untrained_ridge_probe_acc"]
            assert row[side]["val_untrained_ridge_probe_acc"] == floor
    differences = accs["B"] - accs["A"]
    half = stats.t.ppf(0.975, 1) * differences.std(ddof=1) / np.sqrt(2)
    assert found["statistics"]["low"] == pytest.approx(differences.mean() - half)
    assert found["statistics"]["high"] == pytest.approx(differences.mean() + half)


def test_it_is_a_module_of_its_own(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "jepa_jax.compare", CPU, CPU],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "A and B learn the same" in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture
def command(trained, small_cifar, monkeypatch, tmp_path):
    """Runs the command in this process, on a small dataset and with the trainer's stand-in."""
    monkeypatch.setattr(device, "select", lambda name: None)
    monkeypatch.setattr(plan, "load_fitting", lambda name, **options: small_cifar)
    # Of files outside the repository, `configs` is found there.
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments):
        common = ["--config.data.batch_size=100", "--config.data.num_val=80"]
        main([*arguments, *common, f"--workdir={tmp_path / 'run'}"])

    return call


def test_two_files_with_an_argument(command, tmp_path, capsys):
    lines = [
        "from configs import cpu",
        "def get_config(text):",
        "    config = cpu.get_config()",
        "    config.optim.lr = float(text)",
        "    return config",
    ]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    command(f"{tmp_path}/mine.py:0.5", f"{tmp_path}/mine.py:0.3", "--seeds=3")
    printed = capsys.readouterr().out
    assert "verdict   worse: B is 20.10 points below A" in printed
    assert read_json(tmp_path / "run" / "compare.json")["names"]["A"] == "mine.py:0.5"


def test_a_stop_keeps_what_is_done(command, trained, monkeypatch, tmp_path, capsys):
    arguments = [CPU, "optim.lr=0.5", "--seeds=2"]
    stand_in = pairs.train_and_evaluate

    def stopped(*args, **options):
        if len(trained) == 3:
            signal.raise_signal(signal.SIGTERM)
        stand_in(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "train_and_evaluate", stopped)
        with pytest.raises(SystemExit) as exit_:
            command(*arguments)
    err = capsys.readouterr().err
    assert exit_.value.code == 128 + signal.SIGTERM
    assert err.count("\n") == 1 and "the same command goes on" in err
    command(*arguments)
    assert trained == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]


def test_no_pair_left_is_exit_code_one(command, monkeypatch, capsys):
    def diverge(*args, **options):
        raise TrainingError("loss became nan at step 3: try a lower rate")

    monkeypatch.setattr(pairs, "train_and_evaluate", diverge)
    with pytest.raises(SystemExit) as exit_:
        command(CPU, "optim.lr=0.5", "--seeds=2")
    printed = capsys.readouterr()
    assert exit_.value.code == 1
    assert printed.err == "error: no verdict: 0 of 2 pairs remain\n"
    assert "A, seed 1: loss became nan at step 3" in printed.out


BAD_INPUT = {
    "nothing": ([], "name a second config file"),
    "no B": ([CPU], "name a second config file"),
    "a flag for both in place of B": ([CPU, "--config.optim.lr=1"], "holds for both"),
    "B is A": ([CPU, CPU], "A and B learn the same"),
    "an override that changes nothing": ([CPU, "data.placement=auto"], "A and B learn the same"),
    "unknown key": ([CPU, "optim.lrr=1"], "did you mean optim.lr?"),
    "unknown key for both": ([CPU, "optim.lr=1", "--config.optim.x=1"], "not a known key"),
    "unknown length": ([f"{CPU}:7m", "optim.lr=1"], "not 7m"),
    "missing A": (["configs/absent.py", CPU], "absent.py does not exist"),
    "missing B": ([CPU, CPU.replace("cpu", "rapd")], "did you mean rapid.py?"),
    "wrong type": ([CPU, "optim.lr=fast"], "optim.lr"),
    "out of range": ([CPU, "optim.lr=-1"], "config.optim.lr must be above 0"),
    "one seed": ([CPU, "optim.lr=1", "--seeds=1"], "--seeds must be at least 2"),
    "seeds in words": ([CPU, "optim.lr=1", "--seeds=five"], "--seeds"),
    "two files and an override": ([CPU, CPU, "optim.lr=1"], "B is one config file or overrides"),
    "three files": ([CPU, CPU, CPU], "B is one config file or overrides"),
    "epochs of B": ([CPU, "optim.epochs=3"], "B trains as long as A"),
    "a seed": ([CPU, "optim.lr=1", "--config.meta.seed=3"], "config.meta.seed is set here"),
    "a seed of B": ([CPU, "meta.seed=3"], "config.meta.seed is set here"),
    "a third config": ([CPU, "optim.lr=1", f"--config={CPU}"], "unrecognized arguments: --config="),
    "unknown flag": ([CPU, "optim.lr=1", "--wrkdir=x"], "unrecognized arguments: --wrkdir=x"),
}


@pytest.mark.parametrize(("arguments", "complaint"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err
