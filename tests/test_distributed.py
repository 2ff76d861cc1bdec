"""Laws of several devices and processes: what is learnt does not depend on how many there are."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from test_main import write_cifar10
from tiny import FLAGS

from jepa_jax import distributed, last_words
from jepa_jax.errors import ConfigError
from jepa_jax.metrics import read_metrics

HERE = pathlib.Path(__file__).parent
FIXTURE = HERE / "fixtures" / "cifar10_small.npz"
ROOT = HERE.parent


# --- devices ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_devices():
    """What training on one and on eight virtual devices saw."""
    child = subprocess.run(
        [sys.executable, str(HERE / "devices_child.py"), str(FIXTURE)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("how", ["resident", "streamed", "shared state", "scanned", "in pieces"])
def test_eight_devices_learn_what_one_does(on_devices, how):
    one = on_devices["one device, in pieces" if how == "in pieces" else "one device"]
    eight = on_devices[how]
    assert len(eight["losses"]) == eight["step"] == 20
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][0] - one["losses"][-1] > 0.01  # it did learn: a constant is always equal


@pytest.mark.parametrize("how", ["sigreg", "simclr"])
def test_eight_devices_have_the_loss_of_one_under_other_objectives(on_devices, how):
    """SIGReg's random directions are equal on all, and SimCLR contrasts with the whole batch."""
    one, eight = (on_devices[name]["losses"] for name in (f"one device, {how}", how))
    assert len(eight) == len(one) == 4
    np.testing.assert_allclose(eight[0], one[0], rtol=2e-5)
    np.testing.assert_allclose(eight, one, rtol=5e-4)  # steps multiply what the first one rounds


def test_eight_devices_see_the_local_crops_that_one_sees(on_devices):
    one, eight = on_devices["one device, crops"], on_devices["crops"]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    assert len(one["losses"]) == 6 and one["losses"][0] != one["losses"][-1]
    # Crops whose rows were laid out otherwise would be sent from one device to another.
    assert eight["flops"] < 1.1 / 8 * one["flops"]


def test_every_device_does_its_share(on_devices):
    for how in ("resident", "streamed", "shared state", "scanned"):
        assert on_devices[how]["flops"] < 1.1 / 8 * on_devices["one device"]["flops"], how


def test_the_views_are_the_same_bits_however_a_batch_is_divided(on_devices):
    assert on_devices["views"] == {"are_equal": True, "num_shards": 8}


def test_shard_params_divides_the_optimisers_state(on_devices):
    shared, copied = on_devices["shared state"], on_devices["resident"]
    assert copied["bytes"] == copied["all_bytes"] == shared["all_bytes"]
    # Some vectors have no eight equal parts.
    assert shared["bytes"] < shared["all_bytes"] / 6


@pytest.mark.parametrize("how", ["one device", "resident", "shared state"])
def test_a_state_is_brought_together(on_devices, how):
    assert on_devices[how]["is_whole"]


@pytest.mark.parametrize(
    ("batch_size", "devices", "microbatches", "message"),
    [
        (100, 8, 1, r"batch_size \(100\) .* 8 devices: 96 or 104 would"),
        (96, 8, 5, "8 devices and 5 microbatches: 80 or 120 would"),
        (3, 1, 4, "1 device and 4 microbatches: 4 would"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch_size, devices, microbatches, message):
    with pytest.raises(ConfigError, match=message):
        distributed.check_batch(batch_size, devices, microbatches)
    distributed.check_batch(batch_size, 1)


# --- joining ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "go together"),
        (("", 2, 0), "go together"),
        (("host", 2, 0), "host:port"),
        (("host:1", 2, 2), r"in \[0, --num_processes\), got 2 of 2"),
        (("host:1", 2, -1), "got -1 of 2"),
    ],
)
def test_half_an_address_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.initialize(*arguments)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4"}],
)
def test_a_process_of_its_own_joins_nothing(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    distributed.initialize("host:1", 1, 0)
    assert distributed.is_main()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"])
def test_a_launcher_without_the_rest_of_its_environment_is_one_line(monkeypatch, name):
    """Not N processes that each train all of it."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match="did not come together"):
        distributed.initialize()


# What jaxlib 0.10.2 and 0.11.2 wrote when a process was killed, shortened.
_FATAL = (
    "F1126 client.h:80] Terminating process because the JAX distributed service detected fatal "
)
_FATAL += "errors. This most likely indicates that another task died"
_SILENT = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks"
)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (_FATAL + _SILENT.format("1"), "process 1 was lost"),
        (_FATAL + _SILENT.format("3\n1"), "processes 3, 1 was lost"),
        (_FATAL + "UNAVAILABLE: Failed to send RPC to coordination service.", "process 0 was lost"),
        # As process 2 may read of itself when it was silent for too long.
        (_FATAL + _SILENT.format("2\n1"), "process 1 was lost"),
        (_FATAL, "another process was lost"),
    ],
)
def test_the_last_line_names_the_lost_process(text, lost):
    assert last_words.last_words(f"a bar\n{text}", 2).startswith(f"error: {lost}, and process 2")


def test_any_other_end_has_no_last_line():
    assert last_words.last_words("Traceback\nValueError: no", 0) == ""


# --- two processes ------------------------------------------------------------------------------

WIDE = [
    *FLAGS,
    "--config.data.batch_size=200",
    "--config.model.width=16",
    "--config.model.proj_hidden_dim=64",
    "--config.model.proj_output_dim=64",
    "--config.optim.lr=0.02",
    "--config.optim.epochs=8.0",
    "--config.logging.log_every=1",
    "--noreport",
]

# Each process decodes its own rows.
STREAMED = "--config.data.placement=stream"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with np.load(FIXTURE) as arrays:
        write_cifar10(
            root,
            train=(arrays["train_images"], arrays["train_labels"]),
            test=(arrays["test_images"], arrays["test_labels"]),
        )
    return root


def free_port(among=(0,)):
    for port in among:
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return candidate.getsockname()[1]
    raise OSError("no port is free")


def start(data, workdir, num_processes, *flags, of_the_last=()):
    """The command in so many processes of 127.0.0.1, the last with further flags."""
    port = free_port()
    command = [sys.executable, "-m", "jepa_jax.main", "--config=configs/cpu.py"]
    command += [*WIDE, f"--workdir={workdir}", *flags]
    children = []
    for process_id in range(num_processes):
        shared = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={num_processes}",
            f"--process_id={process_id}",
        ]
        children.append(
            subprocess.Popen(
                command
                + shared * (num_processes > 1)
                + [*of_the_last] * (process_id == num_processes - 1),
                cwd=ROOT,
                env={**os.environ, "EBJEPA_DSETS": str(data)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return children


def ended(children):
    """(exit code, stdout, stderr) of each."""
    outputs = [child.communicate(timeout=300) for child in children]
    return [(child.returncode, *texts) for child, texts in zip(children, outputs, strict=True)]


def wait_for_epochs(workdir, count, children):
    while len(read_metrics(workdir / "metrics.jsonl")) < count:
        assert all(child.poll() is None for child in children), ended(children)
        time.sleep(0.05)


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def digest(workdir):
    return json.loads((workdir / "summary.json").read_text())["params_digest"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders and ends of runs of two processes, and of one."""
    folder = tmp_path_factory.mktemp("runs")
    ends = {"one": ended(start(data, folder / "one", 1))}
    ends["two"] = ended(start(data, folder / "two", 2, STREAMED))
    children = start(data, folder / "killed", 2, STREAMED)
    wait_for_epochs(folder / "killed", 2, children)
    children[1].kill()
    killed_at = time.monotonic()
    ends["killed"] = ended(children)
    ends["seconds"] = time.monotonic() - killed_at
    shutil.copytree(folder / "killed", folder / "on one")
    ends["again"] = ended(start(data, folder / "killed", 2, STREAMED))
    ends["on one"] = ended(start(data, folder / "on one", 1))
    children = start(data, folder / "stopped", 2, "--config.training.shard_params=True")
    wait_for_epochs(folder / "stopped", 1, children)
    children[1].send_signal(signal.SIGTERM)
    ends["stopped"] = ended(children)
    return folder, ends


def test_two_processes_learn_what_one_does(runs):
    folder, ends = runs
    assert [end[0] for end in ends["two"]] == [0, 0]
    assert len(losses(folder / "two")) == 8
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)


def test_process_0_alone_speaks(runs):
    _, ends = runs
    (_, main_out, _), (_, other_out, other_err) = ends["two"]
    assert "2 processes with 2 devices" in main_out and "epoch 8/8" in main_out
    told = [line for line in (other_out + other_err).splitlines() if "[Gloo]" not in line]
    assert told == []


def test_a_lost_process_ends_the_other_within_a_minute_and_by_name(runs):
    _, ends = runs
    (code, _, stderr), (killed, _, _) = ends["killed"]
    assert killed == -signal.SIGKILL and code != 0
    assert ends["seconds"] < 60
    assert stderr.splitlines()[-1].startswith("error: process 1 was lost, and process 0 with it")


def test_two_processes_resume_exactly_after_a_kill(runs):
    folder, ends = runs
    assert [end[0] for end in ends["again"]] == [0, 0]
    assert re.search(r"resumed   at step \d*[1-9]", ends["again"][0][1])
    assert digest(folder / "killed") == digest(folder / "two")
    assert losses(folder / "killed") == losses(folder / "two")


def test_one_process_goes_on_from_the_checkpoint_of_two(runs):
    folder, ends = runs
    ((code, stdout, _),) = ends["on one"]
    assert code == 0 and re.search(r"resumed   at step \d*[1-9]", stdout)
    np.testing.assert_allclose(losses(folder / "on one"), losses(folder / "two"), rtol=1e-5)


def test_sigterm_to_one_process_saves_and_ends_both(runs):
    folder, ends = runs
    assert [end[0] for end in ends["stopped"]] == [128 + signal.SIGTERM] * 2
    stopped = re.search(r"error: stopped at step (\d+) of 16 and saved it", ends["stopped"][0][2])
    assert stopped and (folder / "stopped" / "checkpoints" / stopped[1]).is_dir()
    # Their state was divided between them, and learnt what a whole one does.
    begun = losses(folder / "stopped")
    np.testing.assert_allclose(begun, losses(folder / "two")[: len(begun)], rtol=1e-5)


def test_an_error_of_process_0_ends_the_other(data, runs):
    folder, _ = runs
    (main, other) = ended(start(data, folder / "two", 2, "--config.optim.lr=0.5"))
    assert (main[0], other[0]) == (2, 2)
    assert main[2].splitlines()[-1].startswith(f"error: {folder / 'two'} holds a run of another")
    assert other[2].splitlines()[-1].startswith("error: process 0 ended: ")


_JOIN = """
import sys
from jepa_jax import distributed
distributed.initialize()
import jax
rows = distributed.Layout(jax.devices()).own_rows(8).tolist()
print(jax.process_index(), jax.process_count(), distributed.from_main({"of": rows}), rows)
"""


def _of_slurm(place, port):
    job = port - (65535 - 2**12 + 1)  # JAX makes the port of the job's number
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(place),
        "SLURM_LOCALID": str(place),
    }


def _of_open_mpi(place, port):
    del port
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(place),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(place),
    }


@pytest.mark.parametrize("launcher", [_of_slurm, _of_open_mpi])
def test_the_processes_of_a_launcher_find_each_other(launcher):
    port = free_port(among=range(65535 - 2**12 + 1 + os.getpid() % 1000, 65536))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _JOIN],
            env={**os.environ, **launcher(place, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in (0, 1)
    ]
    for place, (code, stdout, stderr) in enumerate(ended(children)):
        assert code == 0, stderr
        rows = [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert stdout.splitlines()[-1] == f"{place} 2 {{'of': {rows[0]}}} {rows[place]}"


# --- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_sweep.sbatch"])
@pytest.mark.parametrize("code", [0, 143, 2])
def test_a_job_goes_back_into_the_queue_if_it_was_told_to_stop(tmp_path, script, code):
    called = tmp_path / "called"
    for name, result in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\nexit {result}\n')
        program.chmod(0o755)
    job = subprocess.run(
        ["bash", str(ROOT / "examples" / script), "--config=configs/cpu.py"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "17",
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": "2",
        },
    )
    lines = called.read_text().splitlines()
    assert job.returncode == code
    assert lines[0].startswith("srun") and lines[0].endswith("--config=configs/cpu.py")
    number = "17_2" if "sweep" in script else "17"
    assert lines[1:] == ([f"scontrol requeue {number}"] if code == 143 else [])


def test_processes_that_would_not_do_the_same_are_refused(data, tmp_path):
    children = start(data, tmp_path / "run", 2, of_the_last=["--config.optim.lr=0.5"])
    (main, other) = ended(children)
    assert (main[0], other[0]) == (2, 2)
    assert "do not have the same config" in main[2].splitlines()[-1]
    assert other[2].splitlines()[-1].endswith("optim.lr: 0.02 -> 0.5")
    assert not (tmp_path / "run" / "config.json").exists()
