"""From the command to its first step: a process with an empty compilation cache, then with it."""

import pathlib
import re
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from jepa_jax.benchmark.processes import Lines, MeasurementError, last_words, process, stop
from jepa_jax.benchmark.timing import spread
from jepa_jax.progress import say

# What the command prints.
FIRST_STEP = re.compile(r"first step\s+([\d.]+) s")
_WARM_REPEATS = 3
_MOST_SECONDS = 400.0


def first_step_seconds(
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: pathlib.Path,
    most_seconds: float = _MOST_SECONDS,
) -> dict[str, float]:
    """Launches Python, waits for its line about the first step, and ends it.

    Args:
      arguments: of Python; they name what to run.
      environment: beside this process's own.
      folder: for what the process says on stderr.
      most_seconds: after which it is ended.

    Returns:
      `seconds` until the line came, and what the process `said` itself.

    Raises:
      MeasurementError: if the process ended without the line.
    """
    errors = folder / "stderr"
    with (
        errors.open("w") as file,
        process(arguments, environment=environment, errors=file) as child,
    ):
        timer = threading.Timer(most_seconds, child.terminate)
        timer.start()
        try:
            for seconds, line in Lines(child):
                if match := FIRST_STEP.search(line):
                    stop(child)
                    return {"seconds": seconds, "said": float(match[1])}
            child.wait()
        finally:
            timer.cancel()
    reason = last_words(errors.read_text(), child.returncode)
    raise MeasurementError(f"the command ended before its first step ({reason})")


def measure_startup(
    config_flags: Sequence[str], *, warm_repeats: int = _WARM_REPEATS
) -> dict[str, Any]:
    """Seconds from launching `python -m jepa_jax.main` to its first step.

    Args:
      config_flags: --config and the overrides.
      warm_repeats: launches with a cache that the cold one has filled.

    Returns:
      `cold`, one launch, and `warm` with its spread.
    """
    values = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        for launch in range(1 + warm_repeats):
            workdir = f"--workdir={folder / f'run{launch}'}"
            command = ["-m", "jepa_jax.main", *config_flags, workdir, "--noreport"]
            values.append(first_step_seconds(command, environment, folder))
            kind = "warm" if launch else "empty"
            say(f"{'start-up':<10}{values[-1]['seconds']:.1f} s, compilation cache {kind}")
    return {
        "cold": {"seconds": values[0]["seconds"], "said": values[0]["said"], "n": 1},
        "warm": {
            **spread([value["seconds"] for value in values[1:]]),
            "said": [value["said"] for value in values[1:]],
        },
    }
