"""Runs of the real command: a recipe in full, in stretches that a signal ends, and a profile."""

import pathlib
import signal
import threading
from typing import Any

from jepa_jax.benchmark.processes import Lines, MeasurementError, last_words, process
from jepa_jax.benchmark.startup import FIRST_STEP
from jepa_jax.metrics import read_json, read_metrics

# Of an interval from the first step to the last probe.
_PHASES = ("training", "online evaluation", "watch", "checkpoints")
RUNGS = (0.55, 0.70, 0.80, 0.85, 0.90)


class Unfinished(Exception):
    """A run was stopped in time and saved: the same call goes on."""


def _train(arguments: list[str], folder: pathlib.Path, seconds: float, until=None) -> int:
    """Runs main until it ends, is stopped after `seconds`, or `until()` is true; its exit code.

    Its lines are added to stdout.log, what it says on stderr is stderr.log.
    """
    errors = folder / "stderr.log"
    with (
        errors.open("w") as error_file,
        (folder / "stdout.log").open("a") as log,
        process(["-m", "jepa_jax.main", *arguments], errors=error_file) as child,
    ):
        timer = threading.Timer(seconds, child.terminate)
        timer.start()
        try:
            for _, line in Lines(child):
                print(line, file=log, flush=True)
                if until and until():
                    child.terminate()
            return child.wait()
        finally:
            timer.cancel()


def run_in_full(flags: list[str], folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """A recipe from its first step to its last probe, with a probe and a checkpoint every epoch.

    Args:
      flags: --config and overrides.
      folder: where the run lies, and where it goes on.
      seconds: after which it is stopped.

    Returns:
      seconds from the first step to the last probe, over all processes, and what they went to; the
      seconds from each process's command to its first step; speed, accuracy, and the seconds of
      steps until the online probe passed 55, 70, 80, 85 and 90 % on the validation images.

    Raises:
      Unfinished: it was stopped, and the same call goes on.
      MeasurementError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workdir = folder / "run"
    arguments = [*flags, f"--workdir={workdir}", "--noreport", "--config.logging.save_every=1"]
    code = _train(arguments, folder, seconds)
    if code == 128 + signal.SIGTERM:
        raise Unfinished
    if code:
        raise MeasurementError(last_words((folder / "stderr.log").read_text(), code))
    summary, rows = read_json(workdir / "summary.json"), read_metrics(workdir / "metrics.jsonl")
    phases = {name: summary["seconds"].get(name, 0.0) for name in _PHASES}
    output = (folder / "stdout.log").read_text()
    return {
        "first_step_to_last_probe_seconds": sum(phases.values()),
        "phases": phases,
        "command_to_first_step_seconds": [float(text) for text in FIRST_STEP.findall(output)],
        "epochs": summary["epochs"],
        "steps": summary["steps"],
        "images_per_second": summary["images_per_second"],
        "total_seconds": summary["total_seconds"],
        "accuracy": {
            name: summary.get(name)
            for name in ("online_probe_acc", "val_online_probe_acc", "ridge_probe_acc")
        },
        "seconds_to_accuracy": {str(rung): _seconds_to(rows, rung) for rung in RUNGS},
    }


def _seconds_to(rows: list[dict[str, Any]], rung: float) -> float | None:
    for row in rows:
        if row.get("val/online_probe_acc", 0.0) >= rung:
            return row["train_seconds"]
    return None


def run_profile(flags: list[str], folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """A run with --profile, ended once its trace is written.

    Raises:
      MeasurementError: it failed, or wrote no trace in `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = folder / "run" / "profile"

    def traces() -> list[pathlib.Path]:
        return sorted(path for path in profile.rglob("*") if path.is_file())

    arguments = [*flags, f"--workdir={folder / 'run'}", "--noreport", "--profile"]
    code = _train(arguments, folder, seconds, until=traces)
    if not traces():
        raise MeasurementError(last_words((folder / "stderr.log").read_text(), code))
    return {
        "files": {str(path.relative_to(profile)): path.stat().st_size for path in traces()},
        "folder": str(profile.relative_to(folder.parent)),
    }
