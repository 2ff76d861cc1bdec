"""Checkpoints by orbax: the latest and the best kept, a half-written one never picked up."""

import gc
import logging
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jepa_jax.errors import CheckpointError

_SELECTED_BY = "val/online_probe_acc"
# Below any accuracy: a checkpoint saved in the middle of an epoch is never the best.
_UNMEASURED = -1.0


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[_SELECTED_BY]


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`, one per step.

    Kept are the latest and the one with the best validation accuracy. (orbax's `max_to_keep` with
    `best_fn` would delete the newest when it is not the best, and resume would go back in time.)

    Args:
      workdir: the run's folder.
      read_only: for another run's checkpoints: nothing is created or cleaned up.
    """

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(1),
                    preservation_policy.BestN(
                        get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            # Another process may be writing a run that is only read here.
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._folder = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

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
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave(dict(progress)),
                shapes=ocp.args.JsonSave(shapes_of(state)),
            ),
            metrics={_SELECTED_BY: metrics.get(_SELECTED_BY, _UNMEASURED)},
        )

    def restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """(state, progress) of a step.

        Args:
          step: one that exists.
          template: a pytree of arrays or jax.ShapeDtypeStruct.

        Raises:
          CheckpointError: if the checkpoint is damaged, or of another model than the template.
        """

        def read():
            args = ocp.args.Composite(shapes=ocp.args.JsonRestore())
            check_shapes(self._manager.restore(step, args=args).shapes, template)
            return self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
                ),
            )

        restored = _read_or_one_line(
            read,
            f"checkpoint {self._folder / str(step)} cannot be restored: it is damaged or holds "
            "another model",
        )
        return restored.state, restored.progress

    def wait(self) -> None:
        """Returns when the save under way, if any, is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a save under way and ends orbax's threads."""
        self._manager.close()


def _read_or_one_line(read: Callable[[], Any], message: str) -> Any:
    """What `read` returns; any error of it becomes a CheckpointError of one line.

    orbax leaves the other reads of a failed restore pending on a closed event loop, held by the
    error's traceback. Their end prints warnings whenever the collector comes by, in whatever the
    user does then; so the error is dropped, and they end here, in silence.
    """
    try:
        return read()
    except Exception as error:  # orbax, tensorstore and json each raise their own kinds
        first = (str(error).strip() or "no message").splitlines()[0]
        reason = f"{type(error).__name__}: {first[:200]}"
    asyncio_log = logging.getLogger("asyncio")
    disabled, asyncio_log.disabled = asyncio_log.disabled, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "coroutine was never awaited"
        gc.collect()
    asyncio_log.disabled = disabled
    raise CheckpointError(f"{message} ({reason})")


def shapes_of(tree: Any) -> dict[str, list[int]]:
    """Slash-separated names of a pytree's arrays to their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


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


def load_latest(workdir: pathlib.Path) -> Any:
    """The newest state of another run, as nested dicts on this machine's device.

    Of a folder of imported weights, which has no checkpoints, the 'params' and 'batch_stats' of
    its encoder.

    Raises:
      CheckpointError: if there is none, or it is damaged.
    """
    if not (workdir / "checkpoints").is_dir():
        if (workdir / "encoder").is_dir():
            return load_tree(workdir / "encoder")
        raise CheckpointError(f"{workdir} holds no checkpoints")
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    checkpoints.close()
    if step is None:
        raise CheckpointError(f"{workdir} holds no checkpoints")
    # With the saved devices a run of a GPU could not be read on a CPU.
    return load_tree(workdir / "checkpoints" / str(step) / "state")


def save_tree(folder: pathlib.Path, tree: Any) -> None:
    """Writes a pytree to a folder of its own, in place of what was there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def load_tree(folder: pathlib.Path) -> Any:
    """Reads a pytree written by `save_tree`, as nested dicts of arrays on the default device.

    Raises:
      CheckpointError: if it is damaged.
    """

    def read():
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder.absolute()).item_metadata.tree
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            template = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                metadata,
            )
            return checkpointer.restore(folder.absolute(), template)

    return _read_or_one_line(read, f"{folder} cannot be read")
