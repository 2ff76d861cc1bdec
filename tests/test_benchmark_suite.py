"""The suite as its owner runs it, in miniature: real processes, killed and started again."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from configs import speedrun
from jepa_jax.benchmark import processes, suite, whole_run
from jepa_jax.config_flags import given_config
from jepa_jax.data.cifar10 import write_cifar10
from jepa_jax.errors import ConfigError
from jepa_jax.metrics import write_json

# Of ml_collections, when it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
RAPID = f"--config={ROOT / 'configs' / 'rapid.py'}"
TITLES = (
    "A step of",
    "Roofline",
    "Shares of a step",
    "After an epoch",
    "From the command to its first step",
    "rapid in full",
    "Over Batch size",
    "Over Embedding dimension D",
    "The recipe ladder",
    "PyTorch's variants",
    "Beside PyTorch",
    "Profile",
    "Rates of the device",
)


@pytest.fixture(scope="module")
def environment(cifar_arrays, tmp_path_factory):
    """With a data folder that holds a small but genuine tfds cifar10."""
    folder, arrays = tmp_path_factory.mktemp("datasets"), cifar_arrays
    write_cifar10(
        folder,
        train=(arrays["train_images"], arrays["train_labels"]),
        test=(arrays["test_images"], arrays["test_labels"]),
    )
    return {**os.environ, "EBJEPA_DSETS": str(folder), "PYTHONPATH": str(ROOT)}


def start(folder, environment, *arguments):
    command = [sys.executable, "-m", "jepa_jax.benchmark", "--suite", "--miniature"]
    return subprocess.Popen(
        [*command, f"--out={folder}", RAPID, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_started_again_it_measures_what_is_missing(environment, tmp_path):
    folder = tmp_path / "suite"
    process = start(folder, environment)
    deadline = time.monotonic() + 200
    while not (folder / "rates.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    first = {path.name: path.read_text() for path in folder.glob("*.json")}
    missing = json.loads(first["suite.json"])["not_measured"]
    assert missing["profile"] == "not yet" and "rates" not in missing
    # It is over at once when nothing may begin.
    process = start(folder, environment, "--minutes=0.01")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0 and "the same command goes on" in out, err

    process = start(folder, environment)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert (folder / "rates.json").read_text() == first["rates.json"]
    assert "measuring rates" not in out and "measuring profile" in out
    page = (folder / "suite.md").read_text()
    for title in TITLES:
        assert f"### {title}" in page
    result = json.loads((folder / "suite.json").read_text())
    assert result["key"]["device"].startswith("CPU (")
    assert set(result["not_measured"].values()) <= {"PyTorch is not installed"}
    for name in result["not_measured"]:
        assert name.startswith("peer-")
    rapid = result["pieces"]["rapid"]
    assert rapid["epochs"] == 2 and rapid["first_step_to_last_probe_seconds"] > 0
    assert rapid["accuracy"]["val_online_probe_acc"] > 0
    rung = result["pieces"]["ladder-55"]
    assert rung["epochs"] == 2 and rung["config"]["optim.name"] == "muon"
    assert rung["clock_seconds"] > 0 and rung["compile_seconds"] > 0
    assert result["pieces"]["profile"]["files"]


# --- the pieces without their processes -------------------------------------------------------


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """A suite whose processes are replaced, and the calls that were made of them."""
    calls = []

    def run(command, *_, **options):
        if "--measure-device" in command:
            return {"environment": {"device": devices[-1], "processor": "some"}}
        calls.append((command, options))
        raise processes.MeasurementError("it cannot be measured here")

    monkeypatch.setattr(suite, "run_json", run)
    monkeypatch.setattr(suite.sweep, "run_json", run)
    monkeypatch.setattr(suite.peer, "run_json", run)
    monkeypatch.setattr(suite.startup, "measure_startup", run)
    monkeypatch.setattr(suite.whole_run, "run_in_full", run)
    monkeypatch.setattr(suite.whole_run, "run_profile", run)

    devices = ["one"]

    def make(*flags, device="one"):
        devices.append(device)
        return suite.Suite(
            given_config([RAPID, *flags]), tmp_path, is_miniature=True, peer_python=sys.executable
        )

    return make, calls


def test_a_piece_that_fails_is_a_row_with_its_reason_and_the_others_go_on(quiet, tmp_path):
    make, calls = quiet
    whole = make()
    assert whole.measure()
    tried = [piece for piece in whole.pieces() if not piece.absent]
    assert set(whole.errors) == {piece.name for piece in tried}
    whole.write()
    page = (tmp_path / "suite.md").read_text()
    for title in ("Rates of the device", "A step", "Roofline", "rapid in full", "Profile"):
        assert f"### {title}" in page
    assert page.count("not measured") > 10 and "it cannot be measured here" in page
    before = len(calls)
    assert make().measure() and len(calls) == 2 * before  # what failed is tried again


def test_a_piece_of_another_config_version_or_device_is_measured_again(quiet, tmp_path):
    make, _ = quiet
    whole = make()
    content = {"key": whole._key, "figures": {"a": 1}}
    write_json(tmp_path / "rates.json", content)
    assert whole.figures("rates") == {"a": 1}
    assert make("--config.optim.momentum=0.5").figures("rates") is None
    assert make(device="another").figures("rates") is None
    assert make().figures("rates") == {"a": 1}
    other = {**whole._key, "versions": {**whole._key["versions"], "jax": "0.0.0"}}
    write_json(tmp_path / "rates.json", {**content, "key": other})
    assert whole.figures("rates") is None
    (tmp_path / "rates.json").write_text("{")
    assert whole.figures("rates") is None


def test_a_run_that_was_stopped_in_time_goes_on_until_time_is_up(quiet, monkeypatch):
    make, _ = quiet
    whole, stretches = make(), []

    def stops_twice(flags, folder, seconds):
        if folder == whole._run_folder("rapid"):
            stretches.append(folder)
            if len(stretches) < 3:
                raise whole_run.Unfinished
        return {"done": True}

    monkeypatch.setattr(suite.whole_run, "run_in_full", stops_twice)
    assert whole.measure() and len(stretches) == 3
    assert whole.figures("rapid") == {"done": True}
    # A run of another config, version or device goes on in another folder.
    assert make()._run_folder("rapid") == stretches[0]
    assert make(device="another")._run_folder("rapid") != stretches[0]
    assert make("--config.optim.momentum=0.5")._run_folder("rapid") != stretches[0]


def test_only_the_pieces_that_are_wanted_are_measured(quiet):
    make, calls = quiet
    assert make().measure(only=["epoch", "rates"])
    assert [command[2] for command, _ in calls] == ["--measure-rates", "--measure-epoch"]
    with pytest.raises(ConfigError, match="rate is no piece of the suite: rates, step"):
        make().check(["rate"])


def test_nothing_begins_that_may_not_end_in_time(quiet):
    make, calls = quiet
    assert not make().measure(minutes=0.01)
    assert not calls


def test_no_process_is_given_more_time_than_there_is(quiet):
    make, calls = quiet
    assert not make().measure(minutes=1.6)
    ((command, options),) = calls  # rates; the next piece may not end in time
    assert "--measure-rates" in command and f"{RAPID}" in command
    assert 0 < options["timeout"] <= 96
    calls.clear()
    make().measure(minutes=60)
    timeouts = [options["timeout"] for _, options in calls if "timeout" in options]
    assert timeouts and max(timeouts) <= suite._SMALL.most_seconds


def test_a_piece_cut_short_by_the_minutes_is_missing_and_no_failure(quiet, monkeypatch):
    make, _ = quiet
    whole, now = make(), [0.0]

    def is_cut(command, *, timeout):
        now[0] += timeout
        raise processes.MeasurementError("it took too long")

    monkeypatch.setattr(suite, "run_json", is_cut)
    monkeypatch.setattr(suite.time, "perf_counter", lambda: now[0])
    assert not whole.measure(minutes=1.6) and whole.errors == {} and now[0] == 96.0
    assert not whole.measure(minutes=4) and list(whole.errors) == ["rates"]


def test_a_pair_counts_while_its_variant_is_the_fastest(quiet, tmp_path, monkeypatch):
    make, _ = quiet
    slow, fast = (
        suite.peer.Variant(mode, "float32", "contiguous", "device") for mode in ("eager", "compile")
    )
    small = dataclasses.replace(suite._SMALL, variants=(slow, fast))
    monkeypatch.setattr(suite, "_SMALL", small)
    monkeypatch.setattr(suite.peer, "has_torch", lambda python: True)
    whole = make()

    def store(name, figures):
        write_json(tmp_path / f"{name}.json", {"key": whole._key, "figures": figures})

    def pair():
        name = "peer-float32-device-pair0"
        return next(piece for piece in whole.pieces() if piece.name == name)

    store(pair().name, {"variant": slow.name})
    assert whole._current(pair()) is None  # nothing was screened yet
    store(f"peer-{slow.name}", {"images_per_second": [10.0]})
    assert whole._current(pair()) == {"variant": slow.name}
    store(f"peer-{fast.name}", {"images_per_second": [20.0]})
    assert whole._current(pair()) is None


def test_without_pytorch_in_its_python_the_peer_is_absent(quiet, monkeypatch):
    make, _ = quiet
    asked = []
    monkeypatch.setattr(suite.peer, "has_torch", lambda python: asked.append(python))
    absent = {piece.absent for piece in make().pieces() if piece.name.startswith("peer-")}
    assert absent == {"PyTorch is not installed"} and asked == [sys.executable]


# --- the ladder -------------------------------------------------------------------------------


def rung(whole, length="55"):
    (piece,) = (piece for piece in whole.pieces() if piece.name == f"ladder-{length}")
    return piece


def test_a_rung_is_a_length_of_the_speedrun_and_nothing_of_the_suites_own_config(quiet):
    make, calls = quiet
    whole = make("--config.optim.momentum=0.5")
    with pytest.raises(processes.MeasurementError):
        rung(whole).measure()
    flags, _ = calls[-1]
    assert flags[0] == f"--config={ROOT / 'configs' / 'speedrun.py'}:55"
    assert not any("momentum" in flag for flag in flags)
    # In miniature it is small too.
    assert "--config.optim.epochs=2.0" in flags and "--config.model.width=4" in flags


def test_rapid_saves_every_epoch_and_a_rung_as_its_config_says(quiet, monkeypatch):
    make, saves = quiet[0], {}

    def run(flags, folder, seconds):
        saves[flags[0].split("/")[-1]] = [flag for flag in flags if "save_every" in flag]
        return {"done": True}

    monkeypatch.setattr(suite.whole_run, "run_in_full", run)
    make().measure()
    assert saves == {"rapid.py": ["--config.logging.save_every=1"], "speedrun.py:55": []}


def test_the_rungs_are_the_lengths_of_the_config():
    assert list(suite._LADDER) == list(speedrun.EPOCHS)
    assert suite._Size().rungs == tuple(speedrun.EPOCHS)


def test_a_rung_counts_while_its_config_is_the_same(quiet, tmp_path, monkeypatch):
    make, _ = quiet
    monkeypatch.setattr(suite.configs, "FOLDER", tmp_path / "configs")
    path = tmp_path / "configs" / "speedrun.py"
    path.parent.mkdir()
    source = pathlib.Path(speedrun.__file__).read_text()
    path.write_text(source)
    folders = []

    def run(flags, folder, seconds):
        folders.append(folder)
        return {"done": True}

    monkeypatch.setattr(suite.whole_run, "run_in_full", run)
    whole = make()
    assert whole.measure() and whole._current(rung(whole))["done"]
    changed = source.replace("config.optim.lr = ", "config.optim.weight_decay = 0.5 * ")
    assert changed != source
    path.write_text(changed)
    again = make()
    assert again._current(rung(again)) is None
    # Nor does the new one go on where the old one stopped.
    before = folders.copy()
    rung(again).measure()
    assert folders[-1] not in before
    path.unlink()
    assert rung(make()).absent == "no configs/speedrun.py here"


def test_the_table_of_the_ladder_marks_what_was_not_measured():
    figures = {
        "clock_seconds": 61.2,
        "compile_seconds": 33.0,
        "images_per_second": 45_678.9,
        "command_to_first_step_seconds": [12.0, 8.0],
        "accuracy": {
            "ridge_probe_acc": 0.8012,
            "val_ridge_probe_acc": 0.8123,
            "val_online_probe_acc": 0.7788,
        },
    }
    pieces = {"ladder-80": figures, "ladder-92": None}
    reasons = {"ladder-80": "not yet", "ladder-92": "it does not fit"}
    table = suite._ladder_table(("80", "92"), pieces, reasons)
    measured, missing = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert measured == {
        "rung": "80 %",
        "par, s": "60",
        "goal, s": "15",
        "on the clock, s": "61.2",
        "compile, s": "33",
        "ridge, test": "80.1 %",
        "ridge, val": "81.2 %",
        "online, val": "77.9 %",
        "images/s": "45,679",
        "processes": "2",
    }
    assert list(missing.values()) == ["92 %", "1,380", "480", *["not measured"] * 7]
    assert "92 %: it does not fit." in table.note and "80 %:" not in table.note


# --- whole runs -------------------------------------------------------------------------------


def test_a_whole_run_is_stopped_in_time_and_goes_on(tmp_path, monkeypatch):
    summary = {
        "seconds": {
            "compile": 7.0,
            "training": 3.0,
            "online evaluation": 1.0,
            "watch": 0.5,
            "setup": 9.0,
        },
        "clock_seconds": 3.5,
        "epochs": 2,
        "steps": 8,
        "images_per_second": 100.0,
        "total_seconds": 20.0,
        "online_probe_acc": 0.5,
        "val_online_probe_acc": 0.6,
        "ridge_probe_acc": 0.7,
        "val_ridge_probe_acc": 0.8,
    }
    # At the launch's clock, saved step, and how the process ended.
    stretches = [(12.5, 4, (128 + signal.SIGTERM, True)), (7.5, 8, (0, False))]

    def watch(arguments, *, errors, seconds, on_line):
        at, step, ending = stretches.pop(0)
        on_line(at - 1.0, "compiling the training step")
        on_line(at, "first step 2.5 s after the start, 1.5 s of them for compiling it")
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
        if not ending[0]:
            write_json(tmp_path / "run" / "summary.json", summary)
        return processes.Ending(*ending)

    monkeypatch.setattr(whole_run, "watch", watch)
    with pytest.raises(whole_run.Unfinished):
        whole_run.run_in_full([], tmp_path, 1.0)
    result = whole_run.run_in_full([], tmp_path, 1.0)
    assert result["first_step_to_last_probe_seconds"] == 4.5
    # From the launch of the process, not from where its own clock starts.
    assert result["command_to_first_step_seconds"] == [12.5, 7.5]
    assert result["clock_seconds"] == 3.5 and result["compile_seconds"] == 7.0
    assert result["accuracy"] == {name: summary[name] for name in summary if "probe" in name}


@pytest.mark.parametrize(
    ("ending", "step", "expected"),
    [
        ((-signal.SIGTERM, True), 5, (whole_run.Unfinished, "")),
        ((-signal.SIGKILL, True), 5, (whole_run.Unfinished, "")),
        ((128 + signal.SIGTERM, True), 4, (processes.MeasurementError, "no step further in 9 s")),
        ((-signal.SIGTERM, True), 4, (processes.MeasurementError, "no step further in 9 s")),
        ((-signal.SIGTERM, False), 5, (processes.MeasurementError, "stopped, exit code -15")),
        ((1, True), 5, (processes.MeasurementError, "stopped")),
    ],
)
def test_only_a_stop_by_the_clock_that_came_further_goes_on(
    ending, step, expected, tmp_path, monkeypatch
):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "4").mkdir(parents=True)
    (checkpoints / "6.orbax-checkpoint-tmp").mkdir()

    def watch(arguments, *, errors, seconds, on_line):
        (checkpoints / str(step)).mkdir(exist_ok=True)
        errors.write_text("error: stopped")
        return processes.Ending(*ending)

    monkeypatch.setattr(whole_run, "watch", watch)
    kind, words = expected
    with pytest.raises(kind, match=words or None):
        whole_run.run_in_full([], tmp_path, 9.0)


def test_an_old_trace_is_not_taken_for_a_new_one(tmp_path, monkeypatch):
    trace = tmp_path / "profile" / "run" / "profile" / "old.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.touch()

    def watch(arguments, *, errors, seconds, on_line):
        errors.write_text("error: it broke")
        return processes.Ending(1, False)

    monkeypatch.setattr(whole_run, "watch", watch)
    with pytest.raises(processes.MeasurementError, match="it broke"):
        whole_run.run_profile([], tmp_path / "profile", 9.0)


def test_a_whole_run_that_fails_says_why(tmp_path):
    with pytest.raises(processes.MeasurementError, match="no-such-flag"):
        whole_run.run_in_full(["--no-such-flag"], tmp_path, 60.0)
    with pytest.raises(processes.MeasurementError, match="no-such-flag"):
        whole_run.run_profile(["--no-such-flag"], tmp_path / "profile", 60.0)
