"""One process to a folder: held, refused, and given back however its holder ends."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from jepa_jax import lock
from jepa_jax.errors import CheckpointError
from jepa_jax.lock import only_process_in

HOLD = """
import pathlib, sys, time
from jepa_jax.lock import only_process_in
with only_process_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_refused_with_the_first_ones_name(holder, tmp_path):
    with (
        pytest.raises(CheckpointError) as error,
        only_process_in(tmp_path),
    ):
        pass
    text = str(error.value)
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in text
    assert "\n" not in text and "delete" not in text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_gives_it_back(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    with only_process_in(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == "{}"


def test_an_error_inside_gives_it_back(tmp_path):
    with pytest.raises(ZeroDivisionError), only_process_in(tmp_path):
        raise ZeroDivisionError
    with only_process_in(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00" * 50, '{"pid": "x"}'])
def test_whatever_a_file_says_a_free_lock_is_had(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with only_process_in(tmp_path):
        pass


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that knows none, as some network drives."""

    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def write(tmp_path, **holder):
    (tmp_path / ".lock").write_text(json.dumps(holder))


def test_without_locks_a_living_process_of_this_machine_holds_it(without_locks, holder, tmp_path):
    write(tmp_path, pid=holder.pid, host=socket.gethostname())
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"), only_process_in(tmp_path):
        pass


def test_without_locks_a_dead_one_is_stale(without_locks, holder, tmp_path):
    write(tmp_path, pid=holder.pid, host=socket.gethostname())
    holder.kill()
    holder.wait()
    with only_process_in(tmp_path):
        pass


def test_without_locks_one_of_another_machine_holds_it_and_the_line_says_what_to_do(
    without_locks, tmp_path
):
    write(tmp_path, pid=1, host="elsewhere")
    with pytest.raises(CheckpointError) as error, only_process_in(tmp_path):
        pass
    assert (
        f"on elsewhere: wait for it, or give another --workdir; if it is gone, delete {tmp_path}"
        in str(error.value)
    )
