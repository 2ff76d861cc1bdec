"""The command as a person runs it: real processes, real files, real signals."""

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
from jepa_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
TINY = [*FLAGS, "--config.optim.warmup_epochs=1", "--config.optim.epochs=3"]


@pytest.fixture(scope="module")
def datasets(cifar_arrays, tmp_path_factory):
    """A data folder with a small but genuine tfds cifar10."""
    folder = tmp_path_factory.mktemp("datasets")
    arrays = cifar_arrays
    write_cifar10(
        folder,
        train=(arrays["train_images"], arrays["train_labels"]),
        test=(arrays["test_images"], arrays["test_labels"]),
    )
    return folder


@pytest.fixture
def start(datasets, tmp_path):
    """Starts the command in an empty folder, with a minute to live."""

    def call(*arguments, cwd=tmp_path, **environment):
        environment = {
            "EBJEPA_DSETS": str(datasets),
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            **environment,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "jepa_jax.main", *arguments],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call


@pytest.fixture
def run(start):
    """Runs the command to its end: (exit code, stdout, stderr)."""

    def call(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return call


def test_a_run_from_command_to_summary(run, tmp_path):
    code, out, err = run(*TINY, "--workdir=run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 12
    for text in ("device", "cifar10, 400 training images", "epoch 3/3", "ridge, untrained"):
        assert text in out
    assert f"{100 * summary['ridge_probe_acc']:.2f} %" in out
    page = tmp_path / "run" / "report.html"
    assert f"report    {page}" in out and "<html" in page.read_text()
    assert "Traceback" not in err and "WARNING" not in err


def test_the_guides_folders_and_environment(run, tmp_path):
    elsewhere = {"EBJEPA_CKPTS": str(tmp_path / "ckpts")}
    code, _, err = run(*TINY, "--noreport", "--config.optim.lr=0.1", **elsewhere)
    assert code == 0, err
    (folder,) = (tmp_path / "ckpts").iterdir()
    assert folder.name.startswith("cpu,") and "optim.lr=0.1" in folder.name
    assert not (folder / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_note_at_the_end_of_a_good_run(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report").touch()  # where its figures would go
    code, out, err = run(*TINY, "--config.meta.model_folder=mine", "--config.meta.device=cpu")
    assert code == 0, err
    assert (tmp_path / "mine" / "summary.json").exists()
    assert "note      no report was written" in out and "Traceback" not in err


def test_killed_and_started_again_it_ends_in_the_same_bits(run, start, tmp_path):
    arguments = [*TINY, "--config.optim.epochs=16", "--config.logging.save_every=2", "--noreport"]
    process = start(*arguments, "--workdir=killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    killed_after = len(read_metrics(metrics))
    assert 3 <= killed_after < 16 and not (tmp_path / "killed" / "summary.json").exists()
    code, out, err = run(*arguments, "--workdir=killed")
    assert code == 0, err
    assert "resumed   at step" in out
    assert run(*arguments, "--workdir=whole")[0] == 0
    digests = [
        json.loads((tmp_path / name / "summary.json").read_text())["params_digest"]
        for name in ("killed", "whole")
    ]
    assert digests[0] == digests[1]
    assert [row["epoch"] for row in read_metrics(metrics)] == list(range(1, 17))


def test_ctrl_c_saves_and_says_how_to_go_on(start, tmp_path):
    arguments = [*TINY, "--config.optim.epochs=4000", "--workdir=run"]
    process = start(*arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not read_metrics(metrics) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "the same command goes on from there" in line and "Traceback" not in err
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert f"stopped at step {max(saved)} of 16000" in line


BAD_INPUT = {
    "misspelt key": (["--config.optim.learning_rate=1"], "optim.learning_rate is not a known key"),
    "near miss": (["--config.optim.lrr=1"], "did you mean optim.lr?"),
    "misspelt section": (["--config.optimm.lr=1"], "did you mean optim.lr?"),
    "misspelt flag": (["--wrkdir=x"], "wrkdir"),
    "stray word": (["cpu.py"], "unexpected argument 'cpu.py'"),
    "wrong type": (["--config.optim.epochs=many"], "config.optim.epochs"),
    "no epochs": (["--config.optim.epochs=0"], "config.optim.epochs must be above 0"),
    "negative batch": (["--config.data.batch_size=-1"], "config.data.batch_size must be at least"),
    "zero rate": (["--config.optim.lr=0"], "config.optim.lr must be above 0"),
    "rate that is no number": (["--config.optim.lr=nan"], "config.optim.lr must be a finite"),
    "long warm-up": (["--config.optim.warmup_epochs=99"], "warmup_epochs (99) is longer"),
    "unknown model": (["--config.model.type=resent"], "did you mean resnet?"),
    "unknown loss": (["--config.loss.type=vicregg"], "did you mean vicreg?"),
    "unknown optimiser": (["--config.optim.name=larc"], "did you mean lars?"),
    "unknown dtype": (["--config.training.dtype=float16"], "one of bfloat16, float32"),
    "unknown device": (["--config.meta.device=tpu"], "one of auto, cpu, gpu"),
    "unknown dataset": (["--config.data.dataset=cifar1O"], "did you mean cifar10?"),
    "missing config": (["--config=configs/rapd.py"], "did you mean rapid.py?"),
    "batch above dataset": (["--config.data.batch_size=500"], "larger than the 400 training"),
    "workdir below a file": (["--workdir=file/run"], "cannot be written"),
    "absent init_from": (["--init_from=absent", "--config.data.num_val=80"], "holds no checkpoint"),
    "override before config": (["--config.optim.lr=1", "--config=c.py"], "config"),
    "config that raises": (["--config=raises.py"], "cannot be run: ZeroDivisionError"),
    "unknown length": ([f"--config={ROOT}/configs/cpu.py:7m"], "the lengths 90s, 5m, 12m, not 7m"),
    "config without keys": (["--config=empty.py"], "lacks config.meta.seed"),
    "config with a key too many": (["--config=extra.py"], "config.optim.rate is not a known key"),
}


def test_bad_input_gets_one_line(start, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "c.py").touch()
    (tmp_path / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    header = "from ml_collections import ConfigDict\nfrom configs import cpu\n\n\n"
    empty = "def get_config():\n    return ConfigDict()\n"
    (tmp_path / "empty.py").write_text(header + empty)
    extra = "def get_config():\n    c = cpu.get_config()\n    c.optim.rate = 1.0\n    return c\n"
    (tmp_path / "extra.py").write_text(header + extra)
    cases = list(BAD_INPUT.items())
    wrong = []
    for first in range(0, len(cases), 2):  # two at a time, one a core
        batch = [(name, start(*flags), text) for name, (flags, text) in cases[first : first + 2]]
        for name, process, text in batch:
            _, err = process.communicate(timeout=60)
            lines = [line for line in err.splitlines() if line.strip()]
            if process.returncode != 2 or len(lines) != 1 or text not in lines[0]:
                wrong.append(f"{name}: exit {process.returncode}, {err}")
            elif not lines[0].startswith("error: "):
                wrong.append(f"{name}: {lines[0]}")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.glob("runs/*/checkpoints/*")), "nothing may be trained"


def test_a_missing_tracker_package_is_one_line_that_names_the_extra(start, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('not here')\n")
    path = f"{blocked}{os.pathsep}{ROOT}"
    process = start(*TINY, "--config.logging.log_wandb=True", PYTHONPATH=path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "pip install -e '.[wandb]'" in err
    assert len(err.strip().splitlines()) == 1
