"""One compiled program that trains one cell of a sweep, or several side by side.

A lane holds the state of one cell. Side by side means `vmap` over lanes on a device and
`shard_map` over devices, so that a sweep has one program whatever it runs on.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jepa_jax.errors import ConfigError
from jepa_jax.loop import make_runner, train_step_of
from jepa_jax.plan import Plan, training_labels
from jepa_jax.runner import check_memory
from jepa_jax.train_step import HParams, TrainState, make_train_epoch

# A stack has to be faster by this share before it is taken: the measurement has noise.
_WORTH_IT = 0.95
_MEASURE_SECONDS = 1.0
_AXIS = "lanes"


class Lanes(Protocol):
    """What the training loop needs of one lane or of many."""

    num_lanes: int
    piece: int

    def load(self, lane: int, state: TrainState, hparams: HParams) -> None:
        """Puts a cell into a lane, in place of what was there."""

    def state(self, lane: int) -> TrainState:
        """The newest state of a lane."""

    def run(self, rows: np.ndarray) -> Iterator[tuple[Any, int]]:
        """Runs `rows [L, S, B]`, dataset indices; yields (metrics of [L * n] values, n)."""


class OneLane:
    """A single lane: the very program of `train_and_evaluate`, whatever its data's placement."""

    num_lanes = 1

    def __init__(self, plan: Plan, state: TrainState):
        self._runner = make_runner(plan, state)
        self.piece = self._runner.piece

    def load(self, lane: int, state: TrainState, hparams: HParams) -> None:
        """See `Lanes`."""
        del lane
        self._state, self._hparams = state, hparams

    def state(self, lane: int) -> TrainState:
        """See `Lanes`."""
        del lane
        return self._state

    def run(self, rows: np.ndarray) -> Iterator[tuple[Any, int]]:
        """See `Lanes`."""
        with contextlib.closing(self._runner.run(self._state, rows[0], self._hparams)) as pieces:
            for self._state, metrics, count in pieces:
                yield metrics, count


class Stack:
    """Several lanes, as many on each device.

    Args:
      plan: of any of the cells, with resident data.
      state: of any of the cells; all lanes begin with it.
      num_lanes: L, a multiple of the number of devices.
      devices: over which the lanes are spread.

    Raises:
      ConfigError: if it does not fit into memory.
    """

    def __init__(self, plan: Plan, state: TrainState, num_lanes: int, devices: Sequence[Any]):
        self.num_lanes = num_lanes
        pieces = math.ceil(plan.steps_per_epoch / plan.scan_steps)
        self.piece = math.ceil(plan.steps_per_epoch / pieces)
        mesh = Mesh(np.asarray(devices), (_AXIS,))
        self._by_lane = NamedSharding(mesh, PartitionSpec(_AXIS))
        everywhere = NamedSharding(mesh, PartitionSpec())
        images = np.asarray(plan.dataset.train_images[:])
        self._resident = jax.device_put((images, training_labels(plan)), everywhere)
        self._states = self._stacked(state)
        self._hparams = self._stacked(plan.hparams)
        batch = plan.config.data.batch_size
        rows = jax.ShapeDtypeStruct(
            (num_lanes, self.piece, batch), jnp.int32, sharding=self._by_lane
        )
        function = _side_by_side(_many_steps(plan, self.piece), num_lanes // len(devices), mesh)
        jitted = jax.jit(function, donate_argnums=0)
        lowered = jitted.lower(self._states, *self._resident, rows, self._hparams)
        self._program = lowered.compile()
        # The CPU's devices share one memory, and each holds the images.
        others = len(devices) - 1 if devices[0].platform == "cpu" else 0
        check_memory(self._program, batch, others * images.nbytes)
        self._put = jax.jit(
            lambda all_, one, lane: jax.tree.map(lambda a, o: a.at[lane].set(o), all_, one),
            donate_argnums=0,
            out_shardings=self._by_lane,
        )

    def _stacked(self, tree: Any) -> Any:
        tree = jax.device_get(tree)
        stacked = jax.tree.map(lambda leaf: np.stack([leaf] * self.num_lanes), tree)
        return jax.device_put(stacked, self._by_lane)

    def load(self, lane: int, state: TrainState, hparams: HParams) -> None:
        """See `Lanes`."""
        index = np.int32(lane)
        self._states = self._put(self._states, jax.device_get(state), index)
        self._hparams = self._put(self._hparams, jax.device_get(hparams), index)

    def state(self, lane: int) -> TrainState:
        """See `Lanes`."""
        return jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf[lane]), self._states))

    def run(self, rows: np.ndarray) -> Iterator[tuple[Any, int]]:
        """See `Lanes`."""
        for start in range(0, rows.shape[1], self.piece):
            part = rows[:, start : start + self.piece]
            padded = np.full((self.num_lanes, self.piece, rows.shape[2]), -1, np.int32)
            padded[:, : part.shape[1]] = part
            padded = jax.device_put(padded, self._by_lane)
            self._states, metrics = self._program(
                self._states, *self._resident, padded, self._hparams
            )
            yield metrics, part.shape[1]


def _many_steps(plan: Plan, piece: int):
    """(state, images, labels, rows [piece, B], hparams) -> (state, metrics) of one lane."""
    step = train_step_of(plan)
    if piece > 1:
        return make_train_epoch(step)

    def one_step(state, images, labels, rows, hparams):
        return step(state, images[rows[0]], labels[rows[0]], hparams)

    return one_step


def _side_by_side(function, num_per_device: int, mesh: Mesh):
    if num_per_device > 1:
        many = jax.vmap(function, in_axes=(0, None, None, 0, 0))
    else:

        def many(state, images, labels, rows, hparams):
            first = jax.tree.map(lambda leaf: leaf[0], (state, rows, hparams))
            found = function(first[0], images, labels, first[1], first[2])
            return jax.tree.map(lambda leaf: leaf[None], found)

    if mesh.size == 1:
        return many
    lanes, everywhere = PartitionSpec(_AXIS), PartitionSpec()
    return jax.shard_map(
        many,
        mesh=mesh,
        in_specs=(lanes, everywhere, everywhere, lanes, lanes),
        out_specs=lanes,
        check_vma=False,
    )


# --- how many ---------------------------------------------------------------------------------


def seconds_per_step(lanes: Lanes, order: np.ndarray, seconds: float = _MEASURE_SECONDS) -> float:
    """Of one step of one cell, all lanes busy; the states that are loaded are used up.

    Args:
      lanes: loaded.
      order: int32 [S, B], batches to train on.
      seconds: how long to measure, at least; one piece at least, after one to warm up.
    """
    rows = np.stack([order[: lanes.piece]] * lanes.num_lanes)
    jax.block_until_ready(list(lanes.run(rows)))
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < seconds:
        jax.block_until_ready(list(lanes.run(rows)))
        count += rows.shape[1]
    return (time.perf_counter() - began) / count / lanes.num_lanes


def make_lanes(plan: Plan, state: TrainState, num_lanes: int, devices: Sequence[Any]) -> Lanes:
    """`num_lanes` lanes over the devices; one lane is the program of a single run."""
    if num_lanes == 1:
        return OneLane(plan, state)
    if plan.placement != "device":
        raise ConfigError("a stack needs the data on the device: config.data.placement=device")
    return Stack(plan, state, num_lanes, devices)


def choose_lanes(
    plan: Plan, state: TrainState, most: int, devices: Sequence[Any]
) -> tuple[Lanes, Lanes, str]:
    """The fastest lanes, by measuring ever larger stacks until one is not worth it.

    Args:
      plan: of any of the cells.
      state: of any of the cells.
      most: cells there are.
      devices: those at hand.

    Returns:
      (the lanes, a single one for a cell that is left alone, what was measured in words).
    """
    best = alone = make_lanes(plan, state, 1, devices[:1])
    if plan.placement != "device" or most < 2:
        return best, alone, "one after another"
    order = plan.batches_of(0)

    def measured(lanes):
        for lane in range(lanes.num_lanes):
            lanes.load(lane, jax.tree.map(jnp.copy, state), plan.hparams)
        return seconds_per_step(lanes, order)

    best_seconds = measured(best)
    texts = [f"1: {1e3 * best_seconds:.1f} ms"]
    # A device of its own is worth it for every lane; a core may not be, and two never share one.
    is_cpu = devices[0].platform == "cpu"
    num_lanes = 2 if is_cpu or len(devices) == 1 else min(len(devices), most)
    most = min(most, len(devices)) if is_cpu else most
    while num_lanes <= most:
        try:
            lanes = make_lanes(plan, state, num_lanes, devices[:num_lanes])
        except ConfigError:
            texts.append(f"{num_lanes} do not fit")
            break
        seconds = measured(lanes)
        texts.append(f"{num_lanes}: {1e3 * seconds:.1f} ms")
        if seconds > _WORTH_IT * best_seconds:
            break
        best, best_seconds = lanes, seconds
        num_lanes *= 2
    how = "one after another" if best.num_lanes == 1 else f"{best.num_lanes} side by side"
    return best, alone, f"{how}; a step of one point by lanes: {', '.join(texts)}"
