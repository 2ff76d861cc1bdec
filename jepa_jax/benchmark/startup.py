"""From the command to its first step: processes with an empty compilation cache, then with it."""

import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jepa_jax.benchmark.processes import MeasurementError, failure, watch
from jepa_jax.benchmark.timing import spread
from jepa_jax.progress import say

# What the command prints: seconds since Python was ready, later than the launch.
FIRST_STEP = re.compile(r"^first step\s+([\d.]+) s")
_COLD_REPEATS, _WARM_REPEATS = 3, 5
# A cold launch that takes longer is made once.
_LONG_SECONDS = 60.0
_MOST_SECONDS = 400.0
# So that what is measured is the command's own way with its cache.
_WITHOUT = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)


def first_step_seconds(
    arguments: Sequence[str],
    environment: Mapping[str, str | None],
    folder: pathlib.Path,
    most_seconds: float = _MOST_SECONDS,
) -> dict[str, float]:
    """Launches Python, waits for its line about the first step, and ends it.

    Args:
      arguments: of Python; they name what to run.
      environment: see `processes.process`.
      folder: for what the process says on stderr.
      most_seconds: after which it is ended.

    Returns:
      `seconds` until the line came, and what the process `said` itself.

    Raises:
      MeasurementError: if the process ended without the line.
    """
    found: dict[str, float] = {}

    def on_line(seconds: float, line: str) -> bool:
        if match := FIRST_STEP.search(line):
            found.update(seconds=seconds, said=float(match[1]))
        return bool(match)

    errors = folder / "stderr"
    ending = watch(
        arguments, errors=errors, seconds=most_seconds, on_line=on_line, environment=environment
    )
    if not found and ending.is_out_of_time:
        raise MeasurementError(f"no first step in {most_seconds:.0f} s")
    if not found:
        raise failure(errors.read_text(), ending.code, "the command ended before its first step: ")
    return found


def measure_startup(
    config_flags: Sequence[str],
    *,
    cold_repeats: int = _COLD_REPEATS,
    warm_repeats: int = _WARM_REPEATS,
    seconds_left: Callable[[], float] = lambda: _MOST_SECONDS,
) -> dict[str, Any]:
    """Seconds from launching `python -m jepa_jax.main` to its first step.

    Args:
      config_flags: --config and the overrides.
      cold_repeats: launches with an empty cache; one only if that takes over a minute.
      warm_repeats: launches with the cache that the first one has filled.
      seconds_left: for a launch.

    Returns:
      `cold` and `warm`, each with its spread and what the processes `said` themselves.
    """
    launches: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def launch(kind: str, cache: str) -> float:
            number = sum(map(len, launches.values()))
            workdir = f"--workdir={folder / f'run{number}'}"
            found = first_step_seconds(
                ["-m", "jepa_jax.main", *config_flags, workdir, "--noreport"],
                {**dict.fromkeys(_WITHOUT), "XDG_CACHE_HOME": str(folder / cache)},
                folder,
                seconds_left(),
            )
            launches[kind].append(found)
            say(f"{'start-up':<10}{found['seconds']:.1f} s, {kind} compilation cache")
            return found["seconds"]

        is_long = launch("cold", "cache0") > _LONG_SECONDS
        for _ in range(warm_repeats):
            launch("warm", "cache0")
        for number in range(1, 1 if is_long else cold_repeats):
            launch("cold", f"cache{number}")
    return {
        kind: {
            **spread([launch["seconds"] for launch in found]),
            "said": [launch["said"] for launch in found],
        }
        for kind, found in launches.items()
    }
