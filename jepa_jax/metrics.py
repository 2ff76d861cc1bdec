"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases on request.

One row per epoch, flat, with keys such as `train/loss` and `val/online_probe_acc`.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.progress import say

Row = dict[str, Any]


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file whole or not at all: a reader never sees half of it.

    Numbers that are not finite become null.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(content), indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
      CheckpointError: if it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics.jsonl, in order; a line broken by a crash or a disk is left out."""
    rows: list[Row] = []
    path = pathlib.Path(path)
    if not path.exists():
        return rows
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if type(row) is dict and "step" in row:
                rows.append(row)
    return rows


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl` and passes them on to the trackers asked for.

    A row that cannot be written, as on a full disk, waits for the next one: nothing stops for it,
    and no half of it stays in the file.

    Args:
      workdir: an existing folder.
      run_id: names the run to Weights & Biases; a resumed run gives the same one.
      step: rows of later steps are dropped: a run that resumes there will write them again.
      config: stored with the trackers.
      wandb: whether to log to Weights & Biases (WANDB_MODE=offline works).
      tensorboard: whether to write TensorBoard events to `workdir/tensorboard`.

    Raises:
      ConfigError: if a tracker's package is missing; names the extra that installs it.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int,
        run_id: str,
        config: Mapping[str, Any],
        wandb: bool = False,
        tensorboard: bool = False,
    ):
        self._wandb = _start_wandb(workdir, run_id, config) if wandb else None
        self._tensorboard = _start_tensorboard(workdir) if tensorboard else None
        self._path = workdir / "metrics.jsonl"
        self._waiting: list[bytes] = []
        self._begin(step)

    def _begin(self, step: int) -> None:
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self._path)
        self._file = self._path.open("r+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def go_back(self, step: int) -> None:
        """Drops the rows of later steps: the run goes on from there, and will write them again."""
        self._waiting = []
        self._file.close()
        self._begin(step)

    def write(self, row: Row) -> None:
        """Appends one row; it needs a `step`. Numbers that are not finite are written as null."""
        row = {key: _finite(value) for key, value in row.items()}
        self._append(json.dumps(row).encode() + b"\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, row["step"])

    def _append(self, line: bytes) -> None:
        was_waiting = len(self._waiting)
        self._waiting.append(line)
        try:
            self._file.truncate(self._size)  # what a failed attempt has left
            self._file.seek(self._size)
            text = b"".join(self._waiting)
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            if not was_waiting:
                say(
                    f"{'warning':<10}metrics.jsonl cannot be written ({error.strerror}): its rows "
                    "wait until it can"
                )
            return
        self._size, self._waiting = self._file.tell(), []
        if was_waiting:
            say(f"{'note':<10}metrics.jsonl is whole again: {was_waiting} rows had waited")

    def close(self) -> None:
        """Writes what waits, and closes every tracker."""
        if self._waiting:
            self._append(b"")
        if self._waiting:
            say(f"{'warning':<10}{len(self._waiting) - 1} rows of metrics.jsonl are lost")
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoMetrics:
    """`MetricsWriter` of a process that writes nothing: another one does."""

    def write(self, row: Row) -> None:
        """See `MetricsWriter`."""

    def go_back(self, step: int) -> None:
        """See `MetricsWriter`."""

    def close(self) -> None:
        """See `MetricsWriter`."""


def _finite(value: Any) -> Any:
    """The value with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(workdir: pathlib.Path, run_id: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "config.logging.log_wandb=True needs the package wandb: pip install -e '.[wandb]'"
        ) from error
    try:
        return wandb.init(
            project="jepa_jax",
            dir=workdir,
            id=run_id,
            name=workdir.name,
            resume="allow",
            config=dict(config),
        )
    except Exception as error:  # no account, no network, no terminal to ask on: kinds of its own
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"wandb cannot start ({reason}): WANDB_MODE=offline works without an account"
        ) from error


def _start_tensorboard(workdir: pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "config.logging.log_tensorboard=True needs the package tensorboardX: "
            "pip install -e '.[tensorboard]'"
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
