"""Accuracy against time: what its clock counts, that it trains the same run, what is kept."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jepa_jax import progress, train
from jepa_jax.benchmark import __main__ as command
from jepa_jax.benchmark import time_to_accuracy as whole
from jepa_jax.benchmark import time_to_accuracy_curve as curve
from jepa_jax.benchmark import time_to_accuracy_plot as plot
from jepa_jax.benchmark import time_to_accuracy_tables as tables
from jepa_jax.benchmark.table import as_text
from jepa_jax.data import from_arrays
from jepa_jax.errors import ConfigError, Interrupted, TrainingError
from jepa_jax.metrics import read_json
from jepa_jax.plan import make_plan
from jepa_jax.train_step import TrainState

# Of ml_collections, when it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
CPU = f"--config={ROOT / 'configs' / 'cpu.py'}"
TINY = [
    "--config.data.batch_size=100",
    "--config.data.num_val=80",
    "--config.model.stage_sizes=(1,1)",
    "--config.model.width=4",
    "--config.model.proj_hidden_dim=8",
    "--config.model.proj_output_dim=8",
    "--config.optim.name=lars",
    "--config.optim.epochs=1.0",
    "--config.optim.warmup_epochs=0.5",
]


class Pixels(nn.Module):
    """An encoder that compiles at once: no convolution."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.relu(nn.Dense(8)(x[:, ::4, ::4].reshape(len(x), -1)))


@pytest.fixture
def plan_of(tiny_config, small_cifar):
    def make(dataset=small_cifar, encoder=None, **overrides):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        return make_plan(config, pathlib.Path(), dataset, None, encoder, None, None)

    return make


# --- when, and with what clock ----------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 1040, 25_000])
def test_probes_come_ever_more_rarely_and_at_both_ends(num_steps):
    steps = curve.probe_steps(num_steps)
    assert steps[0] == 0 and steps[-1] == num_steps
    assert steps == sorted(set(steps))
    # But for rounding to whole steps, and for the last one, which comes early.
    assert all(after <= 1.4 * step + 1.5 for step, after in zip(steps[1:], steps[2:], strict=False))
    assert num_steps < 40 or 10 <= len(steps) <= 12


class Fake:
    """A run on a device on which work takes time when it is waited for, not when it is begun."""

    step, stem, statistics, probe = 2.0, 30.0, 500.0, 7000.0

    def __init__(self, monkeypatch):
        self.now = self.queued = 0.0
        self.read: list[bool] = []
        self.loss = 1.0
        monkeypatch.setattr(jax, "block_until_ready", self.wait)
        for module in (curve, progress):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        state = TrainState(jnp.int32(0), {}, {}, (), None)
        monkeypatch.setattr(curve, "initial_state", lambda plan: state)
        monkeypatch.setattr(curve, "make_runner", lambda plan, state: self)
        monkeypatch.setattr(curve, "whitening_stem", lambda *_: self.spend(self.stem))
        monkeypatch.setattr(curve, "reestimate_batch_stats", self.reestimate)
        monkeypatch.setattr(curve, "_scores", self.scores)

    def spend(self, seconds):
        self.now += seconds

    def wait(self, arrays):
        self.now, self.queued = self.now + self.queued, 0.0
        return arrays

    def run(self, state, order):
        for _ in order:
            self.queued += self.step
            yield state, {"loss": jnp.float32(self.loss)}, 1

    def reestimate(self, encoder, variables, images):
        self.queued += self.statistics
        return variables

    def scores(self, apply, variables, dataset, num_val):
        assert not self.queued
        self.read.append(dataset.test_images is not None)
        self.spend(self.probe)
        return {"encoder": {probe: {"val": 0.5, "test": None} for probe in curve.PROBES}}


def test_the_clock_counts_stem_steps_and_the_last_statistics_and_waits(plan_of, monkeypatch):
    fake = Fake(monkeypatch)
    _, figures = curve.measure_curve(plan_of(**{"optim.epochs": 2.5}))
    rows = figures["rows"]
    assert [row["step"] for row in rows] == curve.probe_steps(10)
    for row in rows[:-1]:
        assert row["seconds"] == fake.stem + fake.step * row["step"]
    assert rows[-1]["seconds"] == fake.stem + 10 * fake.step + fake.statistics
    assert sum(figures["clock"].values()) == rows[-1]["seconds"]
    outside = figures["outside"]
    assert outside["probes"] == len(rows) * fake.probe + (len(rows) - 1) * fake.statistics
    assert outside["warming up"] == fake.step
    assert [row["images"] for row in rows] == [100 * row["step"] for row in rows]
    assert rows[-1]["epochs"] == 2.5
    # The test images: of the untrained network and of the last step.
    assert fake.read == [True, *[False] * (len(rows) - 2), True]


def test_a_loss_that_is_not_finite_ends_the_run(plan_of, monkeypatch):
    fake = Fake(monkeypatch)
    fake.loss = float("nan")
    with pytest.raises(TrainingError, match="the loss became nan at step 0"):
        curve.measure_curve(plan_of())


@pytest.mark.parametrize("scan_steps", [1, 3])
def test_it_trains_the_very_run_that_train_does(
    plan_of, tiny_config, small_cifar, tmp_path, scan_steps
):
    overrides = {"optim.epochs": 2.5, "training.scan_steps": scan_steps}
    state, figures = curve.measure_curve(plan_of(encoder=Pixels(), **overrides))
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    expected = train.train_and_evaluate(config, tmp_path, dataset=small_cifar, encoder=Pixels())
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert int(state.step) == 10
    summary, (first, *_, last) = read_json(tmp_path / "summary.json"), figures["rows"]
    for row, name in ((first, "untrained_ridge_probe_acc"), (last, "ridge_probe_acc")):
        assert row["ridge"] == {"val": summary[f"val_{name}"], "test": summary[name]}
    assert figures["feature_dim"] == summary["feature_dim"] == 8
    seconds = [row["seconds"] for row in figures["rows"]]
    assert seconds == sorted(seconds) and seconds[0] == 0 < seconds[1]


def test_without_labels_there_is_no_accuracy(plan_of, cifar_arrays):
    plan = plan_of(from_arrays(cifar_arrays["train_images"], name="mine"))
    with pytest.raises(ConfigError, match="mine has none") as caught:
        curve.measure_curve(plan)
    assert "\n" not in str(caught.value)


def test_floors_say_how_many_features_they_have(small_cifar):
    floors = curve.measure_pixels(small_cifar, 80)
    labels = small_cifar.test_labels
    share = max(np.mean(labels == label) for label in range(10))
    assert floors["chance"]["ridge"]["test"] <= share
    assert floors["pixels"]["feature_dim"] == 32 * 32 * 3
    patches = curve.measure_patches(small_cifar, 80, 64)
    assert patches["feature_dim"] == 64
    assert patches["ridge"]["test"] > floors["chance"]["ridge"]["test"]


# --- tables and plot --------------------------------------------------------------------------


def rows_of(*points):
    return [
        {
            "step": step,
            "seconds": seconds,
            "images": 100 * step,
            "epochs": step / 4,
            "ridge": {"val": val, "test": 0.99},
            "knn": {"val": val - 0.1, "test": None},
        }
        for step, (seconds, val) in enumerate(points)
    ]


def figures_of(*points):
    return {"rows": rows_of(*points), "feature_dim": 8, "outside": {"probes": 1.0, "compiling": 2}}


@pytest.fixture
def two_seeds():
    figures = {
        0: figures_of((1.0, 0.3), (10.0, 0.5), (20.0, 0.49)),
        1: figures_of((1.0, 0.3), (14.0, 0.4), (30.0, 0.6)),
    }
    return tables.Curves("one", figures, {})


FLOOR = tables.Floor("raw pixels", 3072, dict.fromkeys(("ridge", "knn"), {"val": 0.4, "test": 0.4}))


def test_a_crossing_is_the_first_probe_at_or_above_on_validation_images(two_seeds):
    rows = two_seeds.figures[0]["rows"]
    assert tables.first_crossing(rows, "ridge", 50) == 10.0
    assert tables.first_crossing(rows, "ridge", 30) == 1.0
    # Neither the test images nor the other probe.
    assert tables.first_crossing(rows, "ridge", 51) is None
    assert tables.first_crossing(rows, "knn", 40) == 10.0


def test_crossings_say_how_many_seeds_crossed(two_seeds):
    found = tables.crossings(two_seeds, "ridge", 50)
    assert found == {"seconds": [10.0, 30.0], "crossed": 2, "of": 2}
    assert tables.crossings(two_seeds, "ridge", 55) == {"seconds": [30.0], "crossed": 1, "of": 2}
    assert tables.crossings(two_seeds, "ridge", 61) == {"seconds": [], "crossed": 0, "of": 2}


def test_the_tables_have_every_figure_beside_its_floor(two_seeds):
    absent = tables.Curves("two", {}, {0: "the loss became nan"})
    floors = [FLOOR, *tables.untrained_floors([two_seeds, absent])]
    text = "\n".join(map(as_text, tables.tables([two_seeds, absent], floors, [50, 55, 61])))
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert "20 s (10-30), 2 of 2" in text and "30 s, 1 of 2" in text
    assert "not reached, 0 of 2" in text and "two, seed 0: the loss became nan." in text
    assert lines["raw pixels"][2:] == ["3072", "40.0", "40.0", "40.0", "40.0"]
    assert lines["untrained, one"][2:] == ["8", "30.0", "99.0", "20.0", "-"]
    mean, spread = 54.5, 100 * np.std([0.49, 0.6], ddof=1)
    assert f"{mean:.1f} ± {spread:.1f}" in text
    assert f"{mean - 30:.1f} ± {spread:.1f}" in text
    # What came before the clock is without the probes.
    assert "2.0 ± 0.0" in text


def test_the_plot_has_a_line_a_seed_a_mean_and_labelled_floors(two_seeds, tmp_path):
    floors = [FLOOR, *tables.untrained_floors([two_seeds])]
    figure = plot._figure([two_seeds], floors, plot.LIGHT)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    axes = figure.axes[0]
    drawn = [line.get_ydata() for line in axes.get_lines()]
    for expected in ([50, 49], [40, 60], [45, 54.5], [40, 40], [30, 30]):
        assert any(np.shape(y) == (2,) and np.allclose(y, expected) for y in drawn)
    words = {text.get_text() for text in axes.texts}
    assert words == {"one 54.5 (8)", "raw pixels 40.0 (3072)", "untrained, one 30.0 (8)"}
    plot.write_plot(tmp_path / "plot.png", [two_seeds], floors)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def run(small_cifar, tmp_path, monkeypatch):
    """The command in a folder of its own, on the fixture's images, with few features of patches."""
    monkeypatch.setattr(whole, "_load", lambda *_: small_cifar)
    monkeypatch.setattr(whole, "_PATCH_DIMS", (16,))

    def call(*arguments, configs=(CPU,)):
        flags = ["--time-to-accuracy", *configs, *TINY, f"--out={tmp_path}", *arguments]
        monkeypatch.setattr(command.sys, "argv", ["benchmark", *flags])
        command.main(flags)
        return read_json(tmp_path / "time_to_accuracy.json")

    return call


@pytest.fixture
def without_floors(monkeypatch):
    scores = dict.fromkeys(("ridge", "knn"), {"val": 0.4, "test": 0.4})
    figures = {"feature_dim": 8, **scores}
    monkeypatch.setattr(curve, "measure_pixels", lambda *_: {"pixels": figures})
    monkeypatch.setattr(curve, "measure_patches", lambda *_: figures)


def forbidden(*_, **__):
    raise AssertionError("it was measured again")


def test_from_command_to_files_and_nothing_is_measured_twice(run, tmp_path, monkeypatch, capsys):
    content = run("--seeds=2", "--targets=1,99.5")
    text = capsys.readouterr().out
    page = (tmp_path / "time_to_accuracy.md").read_text()
    for title in (
        "At the last step",
        "Floors",
        "Seconds to an accuracy on validation images, ridge",
    ):
        assert title in text and f"### {title}" in page
    seeds = content["curves"]["cpu"]
    floors = [(floor["name"], floor["feature_dim"]) for floor in content["floors"]]
    own = seeds["0"]["feature_dim"]
    patches = [("whitened random patches", dim) for dim in sorted({own, 16})]
    assert floors == [
        ("chance", 0),
        ("raw pixels", 3072),
        *patches,
        ("untrained, cpu", own),
    ]
    crossings = content["crossings"]["cpu"]["ridge"]
    assert crossings["1"]["crossed"] == 2 and crossings["99.5"]["crossed"] == 0
    assert seeds["0"]["rows"][-1]["ridge"] != seeds["1"]["rows"][-1]["ridge"]
    for written in tmp_path.glob("*.json"):
        assert str(tmp_path) not in written.read_text() and str(ROOT) not in written.read_text()
    assert content["environment"]["versions"]["jax"] == jax.__version__
    assert content["configs"]["cpu"]["optim.epochs"] == 1.0
    assert (tmp_path / "time_to_accuracy.png").stat().st_size > 1000

    with monkeypatch.context() as patch:
        for name in ("measure_curve", "measure_pixels", "measure_patches"):
            patch.setattr(curve, name, forbidden)
        again = run("--seeds=2", "--targets=1,99.5")
        assert again["curves"] == content["curves"] and again["floors"] == content["floors"]
        # One seed of the two, from the same files.
        assert list(run("--seeds=1")["curves"]["cpu"]) == ["0"]
        with pytest.raises(AssertionError, match="again"):
            run("--seeds=1", "--config.optim.lr=0.1")


@pytest.mark.usefixtures("without_floors")
def test_what_is_torn_or_of_another_key_is_measured_again(run, tmp_path, monkeypatch):
    calls = []

    def measure_curve(plan, on_row):
        calls.append(int(plan.hparams.seed))
        return None, figures_of((1.0, 0.3), (2.0, 0.4))

    monkeypatch.setattr(curve, "measure_curve", measure_curve)
    run("--seeds=2")
    assert calls == [0, 1]
    torn, other = sorted(tmp_path.glob("cpu-seed-*.json"))
    torn.write_text(torn.read_text()[:100])
    stored = json.loads(other.read_text())
    stored["key"]["versions"]["jax"] = "0.0.1"
    other.write_text(json.dumps(stored))
    run("--seeds=2")
    assert calls == [0, 1, 0, 1]
    # Where results lie and what a run shows is no part of what it measures.
    run("--seeds=2", "--config.logging.log_every=7")
    assert len(calls) == 4


@pytest.mark.usefixtures("without_floors")
def test_configs_take_turns_and_an_interruption_keeps_what_is_done(run, tmp_path, monkeypatch):
    second = tmp_path / "other.py"
    second.write_text("from configs.cpu import get_config\n")
    done = []

    def measure_curve(plan, on_row):
        if len(done) == 3:
            raise Interrupted("interrupted", 15)
        done.append((plan.config.optim.lr, int(plan.hparams.seed)))
        return None, figures_of((1.0, 0.3), (2.0, 0.4))

    monkeypatch.setattr(curve, "measure_curve", measure_curve)
    configs = [CPU, "--config", str(second)]
    with pytest.raises(SystemExit) as stopped:
        run("--seeds=2", configs=configs)
    assert stopped.value.code == 128 + 15
    assert [seed for _, seed in done] == [0, 0, 1]
    content = read_json(tmp_path / "time_to_accuracy.json")
    assert {name: list(seeds) for name, seeds in content["curves"].items()} == {
        "cpu": ["0", "1"],
        "other": ["0"],
    }


@pytest.mark.usefixtures("without_floors")
def test_a_run_that_fails_is_said_and_the_others_go_on(run, monkeypatch, tmp_path):
    def measure_curve(plan, on_row):
        if int(plan.hparams.seed) == 0:
            raise TrainingError("the loss became nan at step 3")
        return None, figures_of((1.0, 0.3), (2.0, 0.4))

    monkeypatch.setattr(curve, "measure_curve", measure_curve)
    with pytest.raises(SystemExit) as ended:
        run("--seeds=2")
    assert ended.value.code == 1
    content = read_json(tmp_path / "time_to_accuracy.json")
    assert list(content["curves"]["cpu"]) == ["1"]
    assert content["failed"] == {"cpu seed 0": "the loss became nan at step 3"}
    assert "cpu, seed 0: the loss became nan" in (tmp_path / "time_to_accuracy.md").read_text()


def test_configs_of_one_name_are_told_apart(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "cpu.py").write_text("from configs.cpu import get_config\n")
    (folder / "timed.py").write_text(
        "from configs import cpu\n\n\ndef get_config(kind):\n    return cpu.get_config()\n"
    )
    flags = [CPU, f"--config={folder / 'cpu.py'}", f"--config={folder / 'timed.py'}:5m"]
    assert whole._names(command._each_config(flags)) == ["cpu", "cpu (2)", "timed:5m"]


BAD_INPUT = {
    "no seed": (["--seeds=0"], "--seeds must be at least 1"),
    "a target of nothing": (["--targets=0,50"], "above 0 and below 100, as 50,60; got '0,50'"),
    "a target of all": (["--targets=100"], "--targets must be percentages"),
    "no targets": (["--targets="], "--targets must be percentages"),
    "words": (["--targets=many"], "--targets must be percentages"),
    "not finite": (["--targets=nan"], "--targets must be percentages"),
    "another kind's option": (["--repeats=3"], "--repeats is no option of --time-to-accuracy"),
    "an unknown key": (["--config.optim.lrr=3"], "config.optim.lrr is not a known key"),
    "a bad value": (["--config.optim.lr=-3.0"], "config.optim.lr must be above 0"),
    "too large a batch": (["--config.data.batch_size=500"], "is larger than the 400"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(run, arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and words in line


def test_a_folder_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--time-to-accuracy", CPU])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "--time-to-accuracy needs --out DIR" in line


def test_a_folder_that_is_a_file_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run(f"--out={tmp_path / 'file'}")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "cannot be written" in line


def test_data_without_labels_is_one_line(run, cifar_arrays, monkeypatch, capsys):
    unlabelled = from_arrays(cifar_arrays["train_images"], name="mine")
    monkeypatch.setattr(whole, "_load", lambda *_: unlabelled)
    with pytest.raises(SystemExit) as ended:
        run()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "mine has none" in line


def test_configs_on_other_images_do_not_stand_in_one_table(run, tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text(
        "from configs import cpu\n\n\ndef get_config():\n    config = cpu.get_config()\n"
        "    config.data.dataset = 'svhn_cropped'\n    return config\n"
    )
    with pytest.raises(SystemExit) as ended:
        run(configs=(CPU, f"--config={other}"))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert "share config.data.dataset, got 'cifar10' and 'svhn_cropped'" in line
