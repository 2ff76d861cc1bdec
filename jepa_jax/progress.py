"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import contextlib
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm

from jepa_jax.errors import ConfigError

_SURE_AFTER_SECONDS = 5.0
# Of the package's own losses, as an epoch's line shows them.
_TERMS = (
    "invariance_loss",
    "prediction_loss",
    "pred_loss",
    "var_loss",
    "cov_loss",
    "sigreg_loss",
    "redundancy_loss",
    "alignment_loss",
    "uniformity_loss",
)


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s' or '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def seconds_of(text: str) -> float:
    """'90s', '10m' or '1h30m' in seconds.

    Raises:
      ConfigError: for anything else, and for nothing at all.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.replace(" ", ""))
    try:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except (AttributeError, ValueError):
        hours = minutes = seconds = 0.0
    total = 3600 * hours + 60 * minutes + seconds
    if not total > 0:
        raise ConfigError(f"a time is written as 90s, 10m or 1h30m, got {text!r}")
    return total


_is_quiet = False


def say(text: str, *, everywhere: bool = False) -> None:
    """Prints a line above any bar, at once; with `everywhere`, also where others are quiet."""
    if everywhere or not _is_quiet:
        tqdm.tqdm.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """In the block nothing is said if `is_quiet`: of several processes one speaks."""
    global _is_quiet
    before, _is_quiet = _is_quiet, _is_quiet or is_quiet
    try:
        yield
    finally:
        _is_quiet = before


class Progress:
    """Shows the steps of a run as they are done.

    Args:
      first_step: where this process starts; not 0 after a resume.
      num_steps: of the whole run.
      batch_size: images per step.
      silent: no bar.
    """

    def __init__(self, first_step: int, num_steps: int, batch_size: int, *, silent: bool):
        self._num_steps, self._batch_size = num_steps, batch_size
        # disable=None: no bar where stderr is not a terminal.
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=True if silent else None,
            dynamic_ncols=True,
        )
        self._shown: dict[str, str] = {}
        self._announced = False
        self._steps, self._seconds, self._is_first = 0, 0.0, True

    def update(self, num_steps: int, seconds: float, loss: float) -> None:
        """Counts `num_steps` more steps that took `seconds`, the last with this loss."""
        speed = num_steps * self._batch_size / max(seconds, 1e-9)
        self._show(loss=f"{loss:.4f}", images_per_s=f"{speed:.0f}")
        self._bar.update(num_steps)

    def go_back(self, step: int) -> None:
        """Shows that the run stands at an earlier step again."""
        self._bar.n = step
        self._bar.refresh()

    def expect(self, num_steps: int, seconds: float, steps_left: int) -> None:
        """Says once, a few seconds into the training, how long it will take."""
        if self._is_first:  # the slowest of all: it waits for whatever is to start
            self._is_first = False
            return
        self._steps, self._seconds = self._steps + num_steps, self._seconds + seconds
        if not self._announced and self._seconds > _SURE_AFTER_SECONDS:
            self._announced = True
            left = steps_left * self._seconds / self._steps
            say(f"{'expected':<10}{duration(left)} of training from here")

    def epoch(self, row: Mapping[str, float], num_epochs: float, *, as_line: bool) -> None:
        """Shows an epoch's row on the bar and, where asked, as a line."""
        if "val/online_probe_acc" in row:
            self._show(val_acc=f"{row['val/online_probe_acc']:.1%}")
        if as_line:
            parts = [f"epoch {row['epoch']:.3g}/{num_epochs:.3g}", f"loss {row['train/loss']:.4f}"]
            for name in _TERMS:
                if f"train/{name}" in row:
                    parts.append(f"{name.removesuffix('_loss')} {row[f'train/{name}']:.4f}")
            for split in ("val", "test"):
                if f"{split}/online_probe_acc" in row:
                    parts.append(f"{split} acc {row[f'{split}/online_probe_acc']:.1%}")
            parts.append(f"{row['images_per_second']:.0f} images/s")
            say("  ".join(parts))

    def close(self) -> None:
        """Ends the bar's line."""
        self._bar.close()

    def _show(self, **values: str) -> None:
        self._shown.update(values)
        self._bar.set_postfix(self._shown, refresh=False)


def print_summary(summary: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Prints the final figures of a run; the probes only where there were labels."""

    def percent(value):
        return "-" if value is None else f"{100 * value:.2f} %"

    say("")
    if "ridge_probe_acc" in summary:
        say(f"{'probe':<26}{'test':>10}{'val':>10}")
        for label, name in (
            ("ridge, trained", "ridge_probe_acc"),
            ("ridge, untrained", "untrained_ridge_probe_acc"),
            ("online linear, trained", "online_probe_acc"),
        ):
            say(f"{label:<26}{percent(summary[name]):>10}{percent(summary['val_' + name]):>10}")
        dims = summary["feature_dim"]
        say(f"on {dims} features of the last step; the test set is shown, never chosen on")
    say(
        f"{summary['steps']} steps, {summary['images_per_second']:.0f} images/s, "
        f"{duration(summary['train_seconds'])} of training "
        f"({summary['clock_seconds']:.1f} s with the initial state and the re-estimation), "
        f"{duration(summary['total_seconds'])} in all"
    )
    say(
        f"written   {workdir}: summary.json, evaluation.json, metrics.jsonl, encoder/, checkpoints/"
    )


class Stopwatch:
    """Seconds of several stretches, added up, those of earlier processes included."""

    def __init__(self, seconds: float = 0.0):
        self._total, self._start = seconds, None

    def start(self) -> None:
        """Begins a stretch."""
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Ends the stretch, if one is under way."""
        self._total, self._start = self.seconds, None

    def add(self, seconds: float) -> None:
        """Counts an earlier process's seconds."""
        self._total += seconds

    @property
    def running(self) -> float:
        """Seconds of the stretch under way."""
        return time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """The total so far."""
        return self._total + (self.running if self._start is not None else 0.0)


class Phases:
    """Seconds by the name of what they were spent on, those of earlier processes included."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block's seconds."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts seconds measured elsewhere."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
