"""Other processes: one at a time, ended with this one, their last line read as JSON."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jepa_jax.errors import JepaError

# `python -m benchmarks.torch_peer` and `configs/` are found from here.
ROOT = pathlib.Path(__file__).parent.parent.parent
_SECONDS_TO_STOP = 60


class MeasurementError(JepaError):
    """A measurement that could not be made; the others can."""

    exit_code = 1


@contextlib.contextmanager
def process(
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    errors: Any = subprocess.PIPE,
) -> Iterator[subprocess.Popen]:
    """Runs Python with these arguments in this folder, and stops it when the block ends."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        [python, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
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


def last_words(text: str, code: int) -> str:
    """The line in which a process said why it ended, without 'error: '."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or lines
    return (said[-1] if said else f"exit code {code}").removeprefix("error: ")[:300]


def run_json(
    arguments: Sequence[str],
    *,
    timeout: float | None = None,
    expects_json: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The JSON object in the last line that a process prints.

    Args:
      arguments: of Python.
      timeout: in seconds.
      expects_json: False for a process that writes its figures elsewhere.
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
        raise MeasurementError(last_words(err, child.returncode))
    if not expects_json:
        return {}
    try:
        return json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MeasurementError(f"{' '.join(arguments[:3])} printed no JSON: {error}") from error


class Lines:
    """A process's lines of stdout, with the seconds since its launch at which each came."""

    def __init__(self, child: subprocess.Popen):
        self._child, self._began = child, time.perf_counter()

    def __iter__(self) -> Iterator[tuple[float, str]]:
        for line in self._child.stdout:
            yield time.perf_counter() - self._began, line.rstrip("\n")
