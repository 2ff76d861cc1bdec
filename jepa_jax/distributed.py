"""Several devices and several processes: who is there, what lies where, what all agree on.

All arrays of a step are global: one mesh axis, `data`, over every device of every process, and
`jit` sees the whole batch. The parameters are on every device, a batch is divided among them, and
the compiler adds what has to be sent (docs/scaling.md counts it).

Process 0 alone reads and writes the run's folder. What it decides there it tells the others, and
an error of its own ends them all.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jepa_jax.errors import ConfigError, ElsewhereError, JepaError
from jepa_jax.progress import quiet

# What JAX waits for a process that has fallen silent. Its own 100 s would be a minute and more of
# a whole cluster; a process that computes, compiles or swaps goes on sending all the while.
HEARTBEAT_SECONDS = 20
_START_SECONDS = 300
_END_SECONDS = 30
_GUARD = pathlib.Path(__file__).with_name("last_words.py")
# In the errors of a collective whose other end has gone.
_OF_A_CONNECTION = ("Gloo", "NCCL", "UNAVAILABLE", "onnection")
# How many processes a launcher says it has started.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")

# Held, for a process that is forgotten is waited for, with a warning.
_last_words: subprocess.Popen | None = None


# --- processes ----------------------------------------------------------------------------------


def initialize(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run, before JAX's first use; a process of its own does nothing.

    SLURM, Open MPI, an indexed job of Kubernetes and Cloud TPU are found by JAX itself; elsewhere
    every process is given all three arguments.

    Args:
      coordinator: address and free port of process 0, 'host:port'.
      num_processes: how many there are.
      process_id: which of them this one is, from 0.

    Raises:
      ConfigError: if one of the three is missing or wrong, or the others do not come.
    """
    given = (bool(coordinator), num_processes is not None, process_id is not None)
    if any(given) and not all(given):
        raise ConfigError("--coordinator, --num_processes and --process_id go together")
    if any(given):
        _check(coordinator, num_processes, process_id)
    if num_processes == 1 or not (any(given) or _is_launched() or _may_be_in_a_cluster()):
        return
    # JAX would take SIGTERM, and then lose it: the training loop has its own agreement.
    jax.config.update("jax_enable_preemption_service", False)
    # On a CPU two programs under way at once may send in another order here than elsewhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if not (any(given) or _is_launched() or _is_named()):
            return
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the processes of this run did not come together ({reason})") from error
    if jax.process_count() > 1:
        _watch_over_the_end()


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator):
        raise ConfigError(f"--coordinator must be host:port, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id must be in [0, --num_processes), got {process_id} of {num_processes}"
        )


def _is_launched() -> bool:
    """Whether a launcher that JAX knows says that it has started more processes than this one."""
    counts = [os.environ.get(name, "") for name in _COUNTS]
    return any(count.isdigit() and int(count) > 1 for count in counts)


def _may_be_in_a_cluster() -> bool:
    """Whether JAX should look for others, which it does over the network: as a pod, or on a TPU."""
    return _is_named() or importlib.util.find_spec("libtpu") is not None


def _is_named() -> bool:
    """Whether somebody has said that there are others: alone, each would train all of it."""
    return "JAX_COORDINATOR_ADDRESS" in os.environ or "JOB_COMPLETION_INDEX" in os.environ


def _watch_over_the_end() -> None:
    """Sends what this process writes to stderr through one that outlives it, see last_words.py."""
    read_end, write_end = os.pipe()
    own = os.dup(2)
    command = [sys.executable, "-S", str(_GUARD), str(jax.process_index())]
    global _last_words
    _last_words = subprocess.Popen(command, stdin=read_end, stdout=subprocess.DEVNULL)
    os.close(read_end)
    sys.stderr.flush()
    os.dup2(write_end, 2)
    os.close(write_end)

    def forward_the_rest() -> None:
        sys.stderr.flush()
        os.dup2(own, 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _last_words.wait(timeout=1)

    atexit.register(forward_the_rest)


@contextlib.contextmanager
def one_of_many() -> Iterator[None]:
    """Around a command's work: process 0 alone speaks, and the loss of another has its name.

    On a CPU a broken connection is noticed at once, and which process it was only when its
    heartbeats are missed: JAX then ends this process, and last_words.py has the last word.
    """
    try:
        with quiet(not is_main()):
            yield
    except JepaError:
        raise
    except (RuntimeError, ValueError) as error:
        if jax.process_count() > 1 and any(word in str(error) for word in _OF_A_CONNECTION):
            time.sleep(2 * HEARTBEAT_SECONDS)
        raise


def is_main() -> bool:
    """Whether this is the process that reads and writes the run's folder."""
    return jax.process_index() == 0


def from_main(content: Any) -> Any:
    """What process 0 has, as JSON, in every process; all have to call it."""
    if jax.process_count() == 1:
        return content
    text = json.dumps(content).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Of few sizes: each is compiled for.
    size = max(4096, 1 << (size - 1).bit_length())
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def arrays_from_main(tree: Any) -> Any:
    """A pytree of arrays of process 0, as numpy arrays in every process; all have to call it."""
    tree = jax.tree.map(np.asarray, jax.device_get(tree))
    if jax.process_count() == 1:
        return tree
    # As bytes: what is sent is a sum over the processes, which would make -0.0 a 0.0.
    sent = jax.tree.map(lambda array: array.reshape(-1).view(np.uint8), tree)
    sent = multihost_utils.broadcast_one_to_all(sent)
    return jax.tree.map(lambda b, a: np.asarray(b).view(a.dtype).reshape(a.shape), sent, tree)


def on_main(work: Callable[[], Any], *, share: bool = True) -> Any:
    """What `work` returns, done by process 0; all have to call it.

    Args:
      work: called in process 0 alone.
      share: whether its result, then one that JSON can hold, is returned in every process; in the
        others None if not.

    Raises:
      Exception: of `work`; in the other processes an ElsewhereError that says which.
    """
    if jax.process_count() == 1:
        return work()
    result, error, told = None, None, {}
    if is_main():
        try:
            result = work()
        except Exception as raised:
            error = raised
            text = str(raised) if isinstance(raised, JepaError) else f"{raised!r:.300}"
            told = {"error": text, "exit_code": getattr(raised, "exit_code", 1)}
    told = from_main({"error": None, "result": result if share and not error else None, **told})
    if error is not None:
        raise error
    if told["error"] is not None:
        raise ElsewhereError(f"process 0 ended: {told['error']}", told["exit_code"])
    return told["result"] if share else result


class Agreement:
    """Numbers of which every process has its own, and all go by the largest.

    While steps run on an accelerator, asking costs no process a wait: the answer comes with the
    next question.
    """

    def __init__(self):
        self._is_alone = jax.process_count() == 1
        self._pending: jax.Array | None = None
        if not self._is_alone:
            layout = Layout(jax.devices())
            self._by_device = layout.batch
            self._largest = jax.jit(
                lambda rows: jnp.max(rows, axis=0), out_shardings=layout.everywhere
            )

    def _ask(self, values: Sequence[int]) -> jax.Array:
        rows = np.repeat(np.asarray(values, np.int32)[None], jax.local_device_count(), axis=0)
        return self._largest(jax.make_array_from_process_local_data(self._by_device, rows))

    def now(self, *values: int) -> list[int]:
        """The largest of every process's values, in this order."""
        self._pending = None
        if self._is_alone:
            return list(values)
        return np.asarray(self._ask(values)).tolist()

    def soon(self, *values: int) -> list[int]:
        """The answer to the call before this one, zeros at first; alone, the values themselves."""
        if self._is_alone:
            return list(values)
        before, self._pending = self._pending, self._ask(values)
        return [0] * len(values) if before is None else np.asarray(before).tolist()


# --- devices ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a training step lie, on one or many devices.

    Attributes:
      devices: all of them, of every process, in one order.
      shard_params: whether the optimiser's state, and the projector where the params have one, are
        divided among the devices too (stage 1 of ZeRO, arXiv 1910.02054, and a part of stage 3):
        less memory on each, more to send.
    """

    devices: tuple[jax.Device, ...]
    shard_params: bool = False

    def __post_init__(self):
        object.__setattr__(self, "devices", tuple(self.devices))

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.asarray(self.devices), ("data",), axis_types=(AxisType.Auto,))

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to divide."""
        return len(self.devices) == 1

    @property
    def everywhere(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self._mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """The first axis divided among the devices."""
        return NamedSharding(self._mesh, PartitionSpec("data"))

    @property
    def batches(self) -> NamedSharding:
        """The second axis divided among the devices: [steps, batch]."""
        return NamedSharding(self._mesh, PartitionSpec(None, "data"))

    def of_state(self, state: Any) -> Any:
        """The sharding of every array of a `TrainState`."""

        def sharding(path, leaf):
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            is_divided = "opt_state" in names or names[:2] == ["params", "projector"]
            axis = self._axis_of(leaf.shape) if self.shard_params and is_divided else None
            if axis is None:
                return self.everywhere
            return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, "data"))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def _axis_of(self, shape: tuple[int, ...]) -> int | None:
        """The longest axis that the devices can share evenly; of equal ones the first."""
        fitting = [axis for axis, size in enumerate(shape) if size % len(self.devices) == 0]
        return max(fitting, key=lambda axis: (shape[axis], -axis), default=None)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Global arrays of what every process holds whole; nothing is sent."""

        def place(array, sharding):
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        if isinstance(shardings, jax.sharding.Sharding):
            return jax.tree.map(lambda array: place(array, shardings), tree)
        return jax.tree.map(place, tree, shardings)

    def put_rows(self, rows: np.ndarray, batch_size: int) -> jax.Array:
        """A global batch [B, ...] of which this process holds its own rows, see `own_rows`."""
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(self.batch, rows, shape)

    def own_rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a batch the devices of this process hold, in order."""
        places = self.batch.addressable_devices_indices_map((batch_size,)).values()
        starts = {place[0].indices(batch_size)[:2] for place in places}
        return np.concatenate([np.arange(*ends) for ends in sorted(starts)])

    def here(self, tree: Any) -> Any:
        """The arrays, whole: of this process's first device, or brought together in host memory.

        All processes have to call it.
        """
        if self.is_single:
            return tree

        def whole(leaf):
            if leaf.is_fully_replicated:
                return leaf.addressable_data(0)
            # One after the other: together they may not fit on a device.
            return np.asarray(_gather(self.everywhere)(leaf).addressable_data(0))

        return jax.tree.map(whole, tree)


@functools.lru_cache(maxsize=4)
def _gather(everywhere: NamedSharding):
    return jax.jit(lambda array: array, out_shardings=everywhere)


def check_batch(batch_size: int, num_devices: int, microbatches: int = 1) -> None:
    """Refuses a batch that does not divide into equal parts.

    Raises:
      ConfigError: with the nearest sizes that do.
    """
    parts = num_devices * microbatches
    if batch_size % parts:
        pieces = f" and {microbatches} microbatches" if microbatches > 1 else ""
        below = batch_size // parts * parts
        near = [str(size) for size in (below, below + parts) if size > 1]
        raise ConfigError(
            f"config.data.batch_size ({batch_size}) does not divide into equal parts for "
            f"{num_devices} device{'s' * (num_devices > 1)}{pieces}: {' or '.join(near)} would"
        )
