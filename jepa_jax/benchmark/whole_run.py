"""Runs of the real command: a recipe in full, in stretches that a signal ends, and a profile."""

import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

from jepa_jax.benchmark.processes import Ending, MeasurementError, failure, watch
from jepa_jax.benchmark.startup import FIRST_STEP
from jepa_jax.metrics import read_json

# Of an interval from the first step to the last probe.
_PHASES = ("training", "online evaluation", "watch", "checkpoints")
# Exit codes of a run that was told to stop: it saved and said so, or was not yet, or no longer,
# listening, or did not listen for a minute.
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
_ACCURACIES = ("online_probe_acc", "val_online_probe_acc", "ridge_probe_acc", "val_ridge_probe_acc")


class Unfinished(Exception):
    """A run was stopped in time and saved: the same call goes on."""


def _train(
    arguments: list[str],
    folder: pathlib.Path,
    seconds: float,
    until: Callable[[], Any] = lambda: False,
) -> Ending:
    """Runs main until it ends, is stopped after `seconds`, or `until()` is true.

    Its lines are added to stdout.log, each after the seconds since the launch at which it came;
    what it says on stderr is stderr.log.
    """
    with (folder / "stdout.log").open("a") as log:

        def on_line(at: float, line: str) -> bool:
            print(f"{at:.2f} {line}", file=log, flush=True)
            return bool(until())

        return watch(
            ["-m", "jepa_jax.main", *arguments],
            errors=folder / "stderr.log",
            seconds=seconds,
            on_line=on_line,
        )


def _seconds_to_first_steps(log: str) -> list[float]:
    """From the launch of each process, in the order of the processes."""
    lines = [line.split(" ", 1) for line in log.splitlines() if " " in line]
    return [float(at) for at, said in lines if FIRST_STEP.search(said)]


def _saved_step(workdir: pathlib.Path) -> int:
    """The newest checkpoint's, -1 if there is none."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def run_in_full(flags: list[str], folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """A recipe from its first step to its last probe, with an online probe every epoch.

    Args:
      flags: --config and overrides.
      folder: where the run lies, and where it goes on.
      seconds: after which it is stopped.

    Returns:
      seconds from the first step to the last probe, over all processes, and what they went to; the
      seconds on the run's own clock and of compiling its step; those from each process's launch to
      its first step; speed and accuracy.

    Raises:
      Unfinished: it was stopped, and the same call goes on.
      MeasurementError: it failed, or in all its time came no step further.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workdir = folder / "run"
    arguments = [*flags, f"--workdir={workdir}", "--noreport"]
    step_before = _saved_step(workdir)
    ending = _train(arguments, folder, seconds)
    if ending.is_out_of_time and ending.code in _STOPPED:
        if _saved_step(workdir) == step_before:
            raise MeasurementError(f"no step further in {seconds:.0f} s")
        raise Unfinished
    if ending.code:
        raise failure((folder / "stderr.log").read_text(), ending.code)
    summary = read_json(workdir / "summary.json")
    phases = {name: summary["seconds"].get(name, 0.0) for name in _PHASES}
    output = (folder / "stdout.log").read_text()
    return {
        "first_step_to_last_probe_seconds": sum(phases.values()),
        "phases": phases,
        "clock_seconds": summary["clock_seconds"],
        "compile_seconds": summary["seconds"]["compile"],
        "command_to_first_step_seconds": _seconds_to_first_steps(output),
        "epochs": summary["epochs"],
        "steps": summary["steps"],
        "images_per_second": summary["images_per_second"],
        "total_seconds": summary["total_seconds"],
        "accuracy": {name: summary.get(name) for name in _ACCURACIES},
    }


def run_profile(flags: list[str], folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """A run with --profile, ended once its trace is written; an older one of the folder goes.

    Raises:
      MeasurementError: it failed, or wrote no trace in `seconds`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    profile = folder / "run" / "profile"

    def traces() -> list[pathlib.Path]:
        return sorted(path for path in profile.rglob("*") if path.is_file())

    arguments = [*flags, f"--workdir={folder / 'run'}", "--noreport", "--profile"]
    ending = _train(arguments, folder, seconds, until=traces)
    if not traces():
        raise failure((folder / "stderr.log").read_text(), ending.code)
    return {
        "files": {str(path.relative_to(profile)): path.stat().st_size for path in traces()},
        "folder": str(profile.relative_to(folder.parent)),
    }
