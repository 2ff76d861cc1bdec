"""The suite as its owner runs it, in miniature: real processes, killed and started again."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jepa_jax.benchmark import processes, suite, whole_run
from jepa_jax.config_flags import given_config
from jepa_jax.data.cifar10 import write_cifar10
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
    assert len(result["devices"]) == 1
    absent = {"no configs/speedrun.py here", "PyTorch is not installed"}
    assert set(result["not_measured"].values()) <= absent
    for name in result["not_measured"]:
        assert name == "ladder" or name.startswith("peer-")
    rapid = result["pieces"]["rapid"]
    assert rapid["epochs"] == 2 and rapid["first_step_to_last_probe_seconds"] > 0
    assert rapid["accuracy"]["val_online_probe_acc"] > 0
    assert result["pieces"]["profile"]["files"]


# --- the pieces without their processes -------------------------------------------------------


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """A suite whose processes are replaced, and the calls that were made of them."""
    calls = []

    def run(command, *_, **__):
        calls.append(command)
        raise processes.MeasurementError("it cannot be measured here")

    monkeypatch.setattr(suite, "run_json", run)
    monkeypatch.setattr(suite.sweep, "run_json", run)
    monkeypatch.setattr(suite.peer, "run_json", run)
    monkeypatch.setattr(suite.startup, "measure_startup", run)
    monkeypatch.setattr(suite.whole_run, "run_in_full", run)
    monkeypatch.setattr(suite.whole_run, "run_profile", run)

    def make(*flags):
        return suite.Suite(given_config([RAPID, *flags]), tmp_path, is_miniature=True)

    return make, calls


def test_a_piece_that_fails_is_a_row_with_its_reason_and_the_others_go_on(quiet, tmp_path):
    make, calls = quiet
    whole = make()
    assert whole.measure()
    tried = [piece for piece in whole.pieces() if not piece.absent]
    assert set(whole.errors) == {piece.name for piece in tried}
    whole.write()
    page = (tmp_path / "suite.md").read_text()
    for title in ("Rates of the device", "A step and its shares", "rapid in full", "Profile"):
        assert f"### {title}" in page
    assert page.count("not measured") > 10 and "it cannot be measured here" in page
    before = len(calls)
    assert make().measure() and len(calls) == 2 * before  # what failed is tried again


def test_a_piece_of_another_config_or_version_is_measured_again(quiet, tmp_path):
    make, _ = quiet
    whole = make()
    content = {"key": whole._key, "figures": {"a": 1}}
    write_json(tmp_path / "rates.json", content)
    assert whole.figures("rates") == {"a": 1}
    assert make("--config.optim.momentum=0.5").figures("rates") is None
    other = {**whole._key, "versions": {**whole._key["versions"], "jax": "0.0.0"}}
    write_json(tmp_path / "rates.json", {**content, "key": other})
    assert whole.figures("rates") is None
    (tmp_path / "rates.json").write_text("{")
    assert whole.figures("rates") is None


def test_a_run_that_was_stopped_in_time_goes_on_until_time_is_up(quiet, monkeypatch):
    make, _ = quiet
    whole, stretches = make(), []

    def stops_twice(flags, folder, seconds):
        stretches.append(folder)
        if len(stretches) < 3:
            raise whole_run.Unfinished
        return {"done": True}

    monkeypatch.setattr(suite.whole_run, "run_in_full", stops_twice)
    assert whole.measure() and len(stretches) == 3
    assert whole.figures("rapid") == {"done": True}


def test_nothing_begins_that_may_not_end_in_time(quiet):
    make, calls = quiet
    assert not make().measure(minutes=0.01)
    assert not calls


def test_figures_of_two_devices_are_not_compared(quiet, tmp_path):
    make, _ = quiet
    whole = make()
    for name, device in (("batch-20", "one"), ("batch-100", "another")):
        row = {"kind": "batch", "value": 20, "measured": None, "reason": "x"}
        figures = {**row, "environment": {"device": device}}
        write_json(tmp_path / f"{name}.json", {"key": whole._key, "figures": figures})
    whole.write()
    assert "measured on different devices" in (tmp_path / "suite.md").read_text()


def test_a_whole_run_is_stopped_in_time_and_goes_on(tmp_path, monkeypatch):
    summary = {
        "seconds": {"training": 3.0, "online evaluation": 1.0, "watch": 0.5, "setup": 9.0},
        "epochs": 2,
        "steps": 8,
        "images_per_second": 100.0,
        "total_seconds": 20.0,
        "online_probe_acc": 0.5,
        "val_online_probe_acc": 0.6,
        "ridge_probe_acc": 0.7,
    }
    codes = [128 + signal.SIGTERM, 0]

    def train(arguments, folder, seconds, until=None):
        code = codes.pop(0)
        with (folder / "stdout.log").open("a") as log:
            log.write("first step  2.5 s after the command began\n")
        if not code:
            (folder / "run").mkdir()
            write_json(folder / "run" / "summary.json", summary)
            rows = [(0.3, 1.0), (0.56, 2.0), (0.6, 3.0)]
            (folder / "run" / "metrics.jsonl").write_text(
                "".join(
                    json.dumps({"val/online_probe_acc": acc, "train_seconds": seconds}) + "\n"
                    for acc, seconds in rows
                )
            )
        return code

    monkeypatch.setattr(whole_run, "_train", train)
    with pytest.raises(whole_run.Unfinished):
        whole_run.run_in_full([], tmp_path, 1.0)
    result = whole_run.run_in_full([], tmp_path, 1.0)
    assert result["first_step_to_last_probe_seconds"] == 4.5
    assert result["command_to_first_step_seconds"] == [2.5, 2.5]
    assert result["seconds_to_accuracy"]["0.55"] == 2.0
    assert result["seconds_to_accuracy"]["0.7"] is None


def test_a_whole_run_that_fails_says_why(tmp_path):
    with pytest.raises(processes.MeasurementError, match="no-such-flag"):
        whole_run.run_in_full(["--no-such-flag"], tmp_path, 60.0)
    with pytest.raises(processes.MeasurementError, match="no-such-flag"):
        whole_run.run_profile(["--no-such-flag"], tmp_path / "profile", 60.0)
