"""Checkpoints by orbax: the latest two and the best kept, none trusted before it is verified.

A half-written one is never picked up, since orbax renames a folder when it is whole. What happens
to its files later orbax does not notice; so every checkpoint holds the digests of what was saved,
and what is read back has to match them.
"""

import contextlib
import gc
import hashlib
import json
import logging
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jepa_jax.errors import CheckpointError, Interrupted
from jepa_jax.progress import say

_SELECTED_BY = "val/online_probe_acc"
# Below any accuracy: a checkpoint saved in the middle of an epoch is never the best.
_UNMEASURED = -1.0
# Where orbax's JSON items lie in a step's folder.
_METRICS, _DIGESTS = ("metrics", "metrics"), ("digests", "metadata")


class DamagedError(CheckpointError):
    """A checkpoint that does not hold what was saved."""


class NotSavedError(CheckpointError):
    """A checkpoint that could not be written, such as on a full disk."""


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[_SELECTED_BY]


# --- digests ----------------------------------------------------------------------------------


def _names(tree: Any) -> dict[str, Any]:
    """Slash-separated names of a pytree's arrays to the arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes_of(tree: Any) -> dict[str, list[int]]:
    """Slash-separated names of a pytree's arrays to their shapes."""
    return {name: list(leaf.shape) for name, leaf in _names(tree).items()}


def _of_text(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _of_array(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}".encode() + array.tobytes()).hexdigest()


def _digests(tree: Any, progress: Any, metrics: Any) -> dict[str, Any]:
    """What a checkpoint has to match: shapes and SHA-256 of all that is saved, and of itself."""
    arrays = _names(jax.device_get(tree))
    content = {
        "shapes": {name: list(array.shape) for name, array in arrays.items()},
        "arrays": {name: _of_array(array) for name, array in arrays.items()},
        "progress": _of_text(progress),
        "metrics": _of_text(metrics),
    }
    return {**content, "itself": _of_text(content)}


def _sound(digests: Any) -> dict[str, Any]:
    """The digests, or ValueError if they are not what was written."""
    content = {name: value for name, value in digests.items() if name != "itself"}
    if digests.get("itself") != _of_text(content):
        raise ValueError("its digests are damaged")
    return content


def _check_arrays(tree: Any, digests: Mapping[str, Any]) -> None:
    arrays = _names(jax.device_get(tree))
    if arrays.keys() != digests["arrays"].keys():
        raise ValueError("arrays are missing")
    for name, array in arrays.items():
        if _of_array(array) != digests["arrays"][name]:
            raise ValueError(f"{name} is not what was saved")


def check_shapes(stored: Mapping[str, list[int]], template: Any) -> None:
    """ValueError unless the stored arrays have the template's names and shapes.

    Before any of them is read: orbax would stop at the first mismatch with other reads under way,
    and their end would print tracebacks.
    """
    wanted = shapes_of(template)
    for name in sorted({*stored, *wanted}):
        found, expected = stored.get(name, "absent"), wanted.get(name, "absent")
        if found != expected:
            raise ValueError(f"{name} is {found}, expected {expected}")


# --- the checkpoints of a run -----------------------------------------------------------------


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes this one reads and writes, without a word to the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, one per step.

    Kept are the latest two, the second in case the first is damaged one day, and the one with the
    best validation accuracy. (orbax's `max_to_keep` with `best_fn` would delete the newest when it
    is not the best, and resume would go back in time.)

    Args:
      workdir: the run's folder.
      read_only: for another run's checkpoints: nothing is created or cleaned up.

    Raises:
      CheckpointError: if the folder cannot be read.
    """

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False):
        self._folder = workdir.absolute() / "checkpoints"
        if not read_only:
            _drop_damaged_metrics(self._folder)
        self._manager = self._open(read_only)

    def _open(self, read_only: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(2),
                    preservation_policy.BestN(
                        get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            # Another process may be writing a run that is only read here.
            cleanup_tmp_directories=not read_only,
            create=False,
            multiprocessing_options=_alone(),
        )

        def manager() -> ocp.CheckpointManager:
            if not read_only:
                # By orbax it would be for all processes of a run together.
                self._folder.mkdir(parents=True, exist_ok=True)
            return ocp.CheckpointManager(self._folder, options=options)

        return _read_or_one_line(
            manager,
            CheckpointError,
            f"{self._folder} cannot be read",
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Of every whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best validation accuracy among those kept."""
        return self._manager.best_step()

    def save(
        self, step: int, state: Any, progress: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Starts an asynchronous save; does nothing for a step that is already there.

        Args:
          step: its name.
          state: a pytree of arrays.
          progress: what the host knows, as JSON.
          metrics: with 'val/online_probe_acc' when it was measured at this step.

        Raises:
          NotSavedError: if this save, or the one before it, could not be written.
        """
        if step in self._manager.all_steps():
            return
        # A copy in depth: the run goes on counting while orbax writes.
        progress = json.loads(json.dumps(dict(progress)))
        kept = {_SELECTED_BY: metrics.get(_SELECTED_BY, _UNMEASURED)}
        state = jax.device_get(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(progress),
            digests=ocp.args.JsonSave(_digests(state, progress, kept)),
        )
        self._written(lambda: self._manager.save(step, args=args, metrics=kept))

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """(state, progress) of a step, bit for bit what was saved.

        Args:
          step: one that exists.
          template: a pytree of arrays or jax.ShapeDtypeStruct.

        Raises:
          DamagedError: if it is not what was saved.
          CheckpointError: if it is of another model than the template.
        """
        where = self._folder / str(step)

        def read_digests():
            args = ocp.args.Composite(digests=ocp.args.JsonRestore())
            return _sound(self._manager.restore(step, args=args).digests)

        def read():
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=args)
            if _of_text(restored.progress) != digests["progress"]:
                raise ValueError("its progress is not what was saved")
            _check_arrays(restored.state, digests)
            return restored.state, restored.progress

        damaged = f"checkpoint {where} is damaged"
        digests = _read_or_one_line(read_digests, DamagedError, damaged)
        try:
            check_shapes(digests["shapes"], template)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {where} holds another model: {error}") from error
        return _read_or_one_line(read, DamagedError, damaged)

    def restore_latest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, progress) of the newest checkpoint that is sound; None if there is none.

        Newer ones that are damaged are moved to `workdir/damaged`, each with a line that says so.

        Raises:
          DamagedError: if there are checkpoints and none is sound; they are left where they are.
          CheckpointError: as `restore`.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                state, progress = self.restore(step, template)
            except DamagedError as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                kept = self._set_aside(other)
                say(f"{'warning':<10}{error}: going on from step {step}, and it lies in {kept}")
            return step, state, progress
        if damaged:
            first = next(iter(damaged.values()))
            raise DamagedError(
                f"{first}, and no other is whole: the run begins anew without {self._folder}"
            )
        return None

    def _set_aside(self, step: int) -> pathlib.Path:
        folder = self._folder.parent / "damaged"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        kept = folder / f"{step}-{number}"
        shutil.move(self._folder / str(step), kept)
        self._manager.reload()
        return kept

    def wait(self) -> None:
        """Returns when the save under way, if any, is whole.

        Raises:
          NotSavedError: if it could not be written.
        """
        self._written(self._manager.wait_until_finished)

    def _written(self, work: Callable[[], Any]) -> None:
        """Does `work`; after an error of it with a new manager, since the old would repeat it.

        The new one also takes away what the failed save has left, which may be what fills a disk.
        """

        def renewed():
            try:
                work()
            except Interrupted:  # a second signal, which does not wait for the save
                raise
            except Exception:
                self.close()
                with contextlib.suppress(CheckpointError):
                    self._manager = self._open(read_only=False)
                raise

        message = f"no checkpoint could be written to {self._folder}"
        _read_or_one_line(renewed, NotSavedError, message)

    def close(self) -> None:
        """Waits for a save under way and ends orbax's threads; `wait` tells how it went."""
        with contextlib.suppress(Exception):
            self._manager.close()


def _drop_damaged_metrics(folder: pathlib.Path) -> None:
    """Takes away what a checkpoint was chosen by where it is not what was saved.

    orbax reads the metrics of all steps when a folder is opened, and a damaged one would end that.
    """
    for step in folder.glob("[0-9]*"):
        try:
            metrics, digests = (
                json.loads(step.joinpath(*parts).read_text()) for parts in (_METRICS, _DIGESTS)
            )
            is_sound = _of_text(metrics) == _sound(digests)["metrics"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            is_sound = _is_of_the_system(error)
        if not is_sound:
            shutil.rmtree(step / _METRICS[0], ignore_errors=True)


def _one_line_of(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def _read_or_one_line(read: Callable[[], Any], kind: type[CheckpointError], message: str) -> Any:
    """What `read` returns; any error of it becomes one of `kind`, in one line.

    orbax leaves the other reads of a failed restore pending on a closed event loop, held by the
    error's traceback. Their end prints warnings whenever the collector comes by, in whatever the
    user does then; so the error is dropped, and they end here, in silence.
    """
    _silence_closed_loops()
    try:
        return read()
    except (Interrupted, MemoryError):
        raise
    except Exception as error:  # orbax, tensorstore and json each raise their own kinds
        reason = _one_line_of(error)
        if kind is DamagedError and _is_of_the_system(error):
            kind, message = CheckpointError, message.replace("is damaged", "cannot be read")
    asyncio_log = logging.getLogger("asyncio")
    disabled, asyncio_log.disabled = asyncio_log.disabled, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "coroutine was never awaited"
        gc.collect()
    asyncio_log.disabled = disabled
    raise kind(f"{message} ({reason})")


# In the errors of tensorstore, which are ValueErrors.
_SYSTEM_CODES = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


def _is_of_the_system(error: Exception) -> bool:
    """Too many open files, no permission, a drive that went away: the file itself may be sound."""
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, OSError):
        return not isinstance(error, missing)
    return any(f"{code}:" in str(error) for code in _SYSTEM_CODES)


def _silence_closed_loops() -> None:
    """From now on: orbax's reads that end after their loop was closed, on whatever thread."""
    otherwise = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        is_orbax = "orbax" in str(getattr(unraisable.object, "cr_code", ""))
        if not is_orbax and "Event loop is closed" not in str(unraisable.exc_value):
            otherwise(unraisable)

    hook.is_silent = True
    if not hasattr(otherwise, "is_silent"):
        sys.unraisablehook = hook


class NoCheckpoints:
    """`Checkpoints` of a process that neither reads nor writes any: another one does."""

    def latest_step(self) -> None:
        """See `Checkpoints`."""

    def save(self, step: int, state: Any, progress: Any, metrics: Any) -> None:
        """See `Checkpoints`."""

    def wait(self) -> None:
        """See `Checkpoints`."""

    def close(self) -> None:
        """See `Checkpoints`."""


# --- trees of their own -----------------------------------------------------------------------


def load_latest(workdir: pathlib.Path) -> Any:
    """The newest sound state of another run, as nested dicts on this machine's device.

    Of a folder of imported weights, which has no checkpoints, the 'params' and 'batch_stats' of
    its encoder.

    Raises:
      CheckpointError: if there is none, or all are damaged.
    """
    if not (workdir / "checkpoints").is_dir():
        if (workdir / "encoder").is_dir():
            return load_tree(workdir / "encoder")
        raise CheckpointError(f"{workdir} holds no checkpoints")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise CheckpointError(f"{workdir} holds no checkpoints")
    for step in reversed(steps):
        try:
            # With the saved devices a run of a GPU could not be read on a CPU.
            return load_tree(workdir / "checkpoints" / str(step))
        except DamagedError as error:
            if step == steps[0]:
                raise
            say(f"{'warning':<10}{error}: an older one is taken")


def save_tree(folder: pathlib.Path, tree: Any) -> None:
    """Writes a pytree to a folder of its own, in place of what was there.

    Raises:
      NotSavedError: if it cannot be written.
    """
    tree = jax.device_get(tree)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(tree),
        digests=ocp.args.JsonSave(_digests(tree, None, None)),
    )

    def write():
        options = ocp.CompositeOptions(multiprocessing_options=_alone())
        handler = ocp.CompositeCheckpointHandler(composite_options=options)
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(folder.absolute(), args=args, force=True)

    _read_or_one_line(write, NotSavedError, f"{folder} cannot be written")


def load_tree(folder: pathlib.Path) -> Any:
    """Reads a pytree written by `save_tree`, as nested dicts of arrays on the default device.

    Raises:
      DamagedError: if it is not what was saved.
    """

    def read():
        # Handlers, not Checkpointers, which warn of each part that it is no whole.
        with contextlib.closing(
            ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
        ) as handler:
            args = ocp.args.JsonRestore()
            digests = _sound(handler.restore(folder.absolute() / _DIGESTS[0], args=args))
        with contextlib.closing(
            ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
        ) as handler:
            where = folder.absolute() / "state"
            metadata = handler.metadata(where).tree
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            template = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                metadata,
            )
            check_shapes(digests["shapes"], template)
            tree = handler.restore(where, args=ocp.args.StandardRestore(template))
        _check_arrays(tree, digests)
        return tree

    return _read_or_one_line(read, DamagedError, f"{folder} cannot be read: it is damaged")
