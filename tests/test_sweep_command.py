"""The sweep as whole processes: restart after a kill, several devices, bad input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tiny import FLAGS

from jepa_jax.data.cifar10 import write_cifar10
from jepa_jax.errors import CheckpointError
from jepa_jax.metrics import read_json
from jepa_jax.sweep import __main__ as cli
from jepa_jax.sweep.__main__ import main
from jepa_jax.sweep.axes import points
from jepa_jax.sweep.cells import by_program, make_cell
from jepa_jax.sweep.run import Sweep

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = pathlib.Path(__file__).parent.parent
CPU = str(ROOT / "configs" / "cpu.py")


def cells_of(document):
    return {(row["label"], c["seed"]): c for row in document["rows"] for c in row["cells"]}


@pytest.fixture(scope="module")
def prepared(cifar_arrays, tmp_path_factory):
    """A data folder with the fixture's images as CIFAR-10."""
    root = tmp_path_factory.mktemp("data")
    arrays = cifar_arrays
    write_cifar10(
        root,
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
    )
    return root


def command(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "jepa_jax.sweep", *arguments],
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


SHORT = [
    f"--config={CPU}",
    *FLAGS,
    "--config.optim.epochs=2",
    "--config.optim.warmup_epochs=1",
    "--stack=1",
]


def test_killed_in_the_middle_it_goes_on_with_what_is_missing(prepared, tmp_path):
    arguments = [
        *SHORT,
        "--grid",
        "optim.lr=0.1,0.2,0.3",
        "--seeds=2",
        f"--config.data.data_dir={prepared}",
        f"--workdir={tmp_path / 'sweep'}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jepa_jax.sweep", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    seen = 0
    for line in process.stdout:
        seen += line.startswith("done")
        if seen == 2:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    records = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "sweep" / "cells").glob("*/cell.json")
        if json.loads(path.read_text())["status"] == "finished"
    }
    assert 2 <= len(records) < 6
    time.sleep(0.01)
    found = command(*arguments)
    assert found.returncode == 0, found.stderr
    document = read_json(tmp_path / "sweep" / "sweep.json")
    assert [row["status"] for row in document["rows"]] == ["finished"] * 3
    assert all(len(row["cells"]) == 2 for row in document["rows"])
    kept = {json.loads(path.read_text())["status"] for path in records}
    assert kept == {"finished"}
    # The winner's records alone are written again, with their look at the test images.
    winners = [path for path in records if path.stat().st_mtime_ns != records[path]]
    assert all(json.loads(path.read_text())["test_ridge_probe_acc"] is not None for path in winners)
    assert found.stdout.count("\ndone ") == 6 - len(records)


def test_two_devices_share_the_points_of_one_program(prepared, tmp_path):
    arguments = [
        *SHORT[:-1],
        "--grid",
        "optim.lr=0.1,0.3",
        "--seeds=2",
        f"--config.data.data_dir={prepared}",
    ]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    found = command(
        *arguments, "--stack=2", f"--workdir={tmp_path / 'two'}", environment={"XLA_FLAGS": flags}
    )
    assert found.returncode == 0, found.stderr
    alone = command(*arguments, "--stack=1", f"--workdir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    two, one = (read_json(tmp_path / name / "sweep.json") for name in ("two", "one"))
    assert two["cost"]["programs"] == one["cost"]["programs"] == 1
    for name, cell in cells_of(two).items():
        assert cell["train_loss"] == pytest.approx(cells_of(one)[name]["train_loss"], rel=1e-3)


def test_a_budget_on_record_is_used_by_sweeps_and_runs(prepared, tmp_path):
    """Another process than the one that measured it takes the epochs that stand there."""
    common = [f"--config={CPU}", *FLAGS, f"--config.data.data_dir={prepared}", "--budget=10m"]
    programs = {
        "sweep": ["--grid", "optim.lr=0.1", "--seeds=1", "--stack=1"],
        "main": ["--noreport"],
    }
    for program, own in programs.items():
        folder = tmp_path / program
        folder.mkdir()
        (folder / "budget.json").write_text('{"seconds": 600.0, "epochs": 1.25, "cost": {}}')
        found = subprocess.run(
            [sys.executable, "-m", f"jepa_jax.{program}", *common, *own, f"--workdir={folder}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert found.returncode == 0, found.stderr
        assert "10 min 00 s: 1.25 epochs, as it was begun" in found.stdout
    cell = read_json(tmp_path / "sweep" / "sweep.json")["rows"][0]["cells"][0]
    summary = read_json(tmp_path / "main" / "summary.json")
    assert cell["steps"] == summary["steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "optim.lr=1", "--budget", "10"], "written as 90s, 10m or 1h30m"),
        (["--grid", "optim.epochs=1,2", "--budget", "10m"], "chooses config.optim.epochs"),
        ([], "nothing is swept"),
        (["--grid", "optim.lrr=1"], "did you mean optim.lr?"),
        (["--grid", "optim.lr=fast"], "optim.lr"),
        (["--grid", "data.batch_size=1.5"], "data.batch_size"),
        (["--grid", "optim.lr=0"], "point 0: config.optim.lr must be above 0"),
        (["--grid", "optim.lr=1", "--config.optim.lr=2"], "is swept and given a value"),
        (["--random", "1001", "optim.lr=1..2"], "1,001 points are more than 1,000"),
        (["--axes", "nowhere.py"], "does not exist"),
        (["--grid", "optim.lr=1", "--halving", "1"], "--halving must be at least 2"),
        (["--grid", "optim.lr=1", "--stack", "0"], "--stack is auto or a number"),
        (["--grid", "optim.lr=1", "--seeds", "0"], "--seeds must be at least 1"),
        (["--grid", "optim.lr=1", "--axes", "x.py"], "--axes is instead of"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        main([f"--config={CPU}", f"--workdir={tmp_path / 'sweep'}", *arguments])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text
    assert not (tmp_path / "sweep").exists()


def test_a_runs_folder_is_not_taken_for_a_sweep(tiny_config, small_cifar, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a run"):
        Sweep(tiny_config, [{"optim.lr": 0.1}], tmp_path, dataset=small_cifar).run()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.py")))
@pytest.mark.parametrize("name", ["cpu", "rapid"])
def test_the_shipped_axis_files_hold_for_the_shipped_configs(path, name, tmp_path):
    """Each point is a config that can be run; the count is that of the guide's tables."""
    arguments, common = cli._parse(
        [f"--config={ROOT / 'configs' / name}.py", f"--axes={path}", "--seeds=3"]
    )
    given, axes = cli._given(arguments, common)
    found = points(axes)
    counts = {"lr_search": 6, "epochs_tradeoff": 5, "loss_weights": 9}
    assert len(found) == counts[path.stem]
    cells = [make_cell(given.config, point, 0, tmp_path) for point in found]
    assert len(by_program(cells)) == 1
    Sweep(given.config, found, tmp_path)
