"""Other processes: one at a time, ended with this one, their last line read as JSON."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jepa_jax.errors import JepaError

# `python -m benchmarks.torch_peer` and `configs/` are found from here.
ROOT = pathlib.Path(__file__).parent.parent.parent
_SECONDS_TO_STOP = 60
# An allocator and runner.check_memory; -9 is how Linux ends a process when memory runs out.
_OUT_OF_MEMORY = ("resource_exhausted", "the device has", "out of memory", "outofmemory")
# What XLA says when it tries a faster algorithm that does not fit.
_HARMLESS = "not a failure"


class MeasurementError(JepaError):
    """A measurement that could not be made; the others can."""

    exit_code = 1

    def __init__(self, message: str, *, is_out_of_memory: bool = False):
        super().__init__(message)
        self.is_out_of_memory = is_out_of_memory


@contextlib.contextmanager
def process(
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str | None] | None = None,
    errors: Any = subprocess.PIPE,
) -> Iterator[subprocess.Popen]:
    """Runs Python with these arguments, and stops it when the block ends.

    In a session of its own: a Ctrl-C reaches this process alone, which stops that one once.

    Args:
      arguments: of Python.
      python: which.
      environment: beside this process's own; None takes a variable out of it.
      errors: where its stderr goes.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    with subprocess.Popen(
        [python, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            stop(child)


def stop(child: subprocess.Popen) -> None:
    """Asks a process to end, and waits for it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def failure(text: str, code: int, prefix: str = "") -> MeasurementError:
    """The error of a process that ended with this exit code and said this on stderr.

    In its own words: the line that names the lack of memory, if any does, else its 'error: ' line,
    else its last one. A signal that ended it is said too.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    no_memory = [
        line
        for line in lines
        if _HARMLESS not in line and any(sign in line.lower() for sign in _OUT_OF_MEMORY)
    ]
    said = no_memory[:1] or [line for line in lines if line.startswith("error: ")] or lines
    words = [said[-1].removeprefix("error: ")[:300]] if said else []
    if code < 0 or not words:
        words.append(f"exit code {code}")
    is_out_of_memory = bool(no_memory) or code == -signal.SIGKILL
    return MeasurementError(prefix + ", ".join(words), is_out_of_memory=is_out_of_memory)


def run_json(
    arguments: Sequence[str],
    *,
    timeout: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The JSON object in the last line that a process prints.

    Args:
      arguments: of Python.
      timeout: in seconds.
      **options: of `process`.

    Raises:
      MeasurementError: in the words of the process, if it fails or takes too long.
    """
    with process(arguments, **options) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"it took longer than {timeout:.0f} s") from error
    if child.returncode:
        raise failure(err, child.returncode)
    try:
        return json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MeasurementError(f"{' '.join(arguments[:3])} printed no JSON: {error}") from error


class Ending(NamedTuple):
    """How a watched process ended."""

    code: int
    is_out_of_time: bool


def watch(
    arguments: Sequence[str],
    *,
    errors: pathlib.Path,
    seconds: float,
    on_line: Callable[[float, str], bool],
    environment: Mapping[str, str | None] | None = None,
) -> Ending:
    """Runs Python until it ends, time is up, or one of its lines is what was waited for.

    Args:
      arguments: of Python.
      errors: the file for what the process says on stderr.
      seconds: after which it is stopped.
      on_line: called with the seconds since the launch and a line of stdout; True stops it.
      environment: see `process`.
    """
    is_out_of_time = threading.Event()
    with errors.open("w") as file:
        began = time.perf_counter()
        with process(arguments, environment=environment, errors=file) as child:

            def time_is_up():
                is_out_of_time.set()
                stop(child)

            timer = threading.Timer(max(seconds, 0.0), time_is_up)
            timer.start()
            try:
                for line in child.stdout:
                    if on_line(time.perf_counter() - began, line.rstrip("\n")):
                        stop(child)
                        break
                code = child.wait()
            finally:
                timer.cancel()
    return Ending(code, is_out_of_time.is_set())
