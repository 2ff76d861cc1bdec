"""The training loop of a sweep: every cell to where it has to stop, some of them side by side.

A cell that diverges leaves its lane, and the next one takes it.
"""

import collections
import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jepa_jax import checkpoint
from jepa_jax.divergence import what_is_bad
from jepa_jax.metrics import MetricsWriter
from jepa_jax.plan import Plan, claim_workdir, initial_state
from jepa_jax.progress import say
from jepa_jax.sweep.cells import Cell
from jepa_jax.sweep.lanes import Lanes
from jepa_jax.train_step import FAULT, TrainState


class Track:
    """A cell under way.

    Args:
      cell: its folder may hold the state of an earlier stop.
      plan: of the cell's own config.
      stop: the step after which it leaves its lane.

    Attributes:
      step: steps done.
      curve: a row an epoch.
      seconds: of its own training, its share of a stack's.
      reason: why it cannot go on, in words; empty as long as it can.
    """

    def __init__(self, cell: Cell, plan: Plan, stop: int):
        self.cell, self.plan, self.stop = cell, plan, stop
        self.step, self.seconds, self.reason = 0, 0.0, ""
        self.curve: list[dict[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._count = 0

    def start(self) -> TrainState:
        """The state of the last stop on record, else that of step 0."""
        state = initial_state(self.plan)
        if (self.cell.folder / "checkpoints").is_dir():
            with contextlib.closing(checkpoint.Checkpoints(self.cell.folder)) as checkpoints:
                found = self._stored(checkpoints, state)
                if found is not None and found[0] <= self.stop:
                    step, state, progress = found
                    self.step, self.seconds = step, progress["seconds"]
                    self.curve = list(progress["curve"])
                    self._sums, self._count = dict(progress["sums"]), progress["count"]
                    return state
        self.cell.clear()
        claim_workdir(self.plan, False)
        return state

    def _stored(self, checkpoints: checkpoint.Checkpoints, state: TrainState) -> Any:
        """(step, state, progress) of the last sound stop; None without one: a cell begins anew."""
        try:
            return checkpoints.restore_latest(state)
        except checkpoint.DamagedError as error:
            say(f"{'warning':<10}{error}")
            return None

    def take_over(self, other: "Track", state: TrainState) -> None:
        """Begins where another one stands, whose steps so far are this one's as well."""
        self.cell.clear()
        claim_workdir(self.plan, False)
        self._follow(other)
        self.save(state)

    def lose_with(self, other: "Track") -> None:
        """Ends where another one diverged, whose steps so far are this one's as well."""
        self._follow(other)
        self.reason = other.reason

    def _follow(self, other: "Track") -> None:
        self.step, self.seconds, self.curve = other.step, other.seconds, list(other.curve)
        self._sums, self._count = dict(other._sums), other._count

    def save(self, state: TrainState) -> None:
        """Puts the state where `start` finds it, whole before this returns."""
        progress = {
            "seconds": self.seconds,
            "curve": self.curve,
            "sums": self._sums,
            "count": self._count,
        }
        with contextlib.closing(checkpoint.Checkpoints(self.cell.folder)) as checkpoints:
            checkpoints.save(self.step, state, progress, {})
            checkpoints.wait()

    def write_metrics(self) -> None:
        """Writes the curve as a run's metrics.jsonl."""
        writer = MetricsWriter(self.cell.folder, step=-1, run_id="", config={})
        with contextlib.closing(writer):
            for row in self.curve:
                writer.write(row)

    @property
    def num_left(self) -> int:
        """Steps to the end of the epoch or to the stop, whichever comes first."""
        steps = self.plan.steps_per_epoch
        return min(self.stop, (self.step // steps + 1) * steps) - self.step

    def rows(self, count: int) -> np.ndarray:
        """The next batches of this epoch, int32 [count, B]."""
        epoch, place = divmod(self.step, self.plan.steps_per_epoch)
        return self.plan.batches_of(epoch)[place : place + count]

    def collect(self, metrics: dict[str, np.ndarray], count: int, seconds: float) -> None:
        """Counts `count` steps with their metrics, [count] each, and the time they took."""
        if self.reason:
            return
        self.seconds += seconds
        if bad := what_is_bad(metrics, self.step, self.plan.fault_places):
            self.reason = bad
            return
        for name, values in metrics.items():
            if name == FAULT:
                continue
            for value in values:
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self.step, self._count = self.step + count, self._count + count
        plan = self.plan
        if self.step % plan.steps_per_epoch == 0 or self.step == plan.num_steps:
            means = {f"train/{name}": of / self._count for name, of in self._sums.items()}
            self.curve.append(
                {
                    "step": self.step,
                    "epoch": self.step / plan.steps_per_epoch,
                    **means,
                    "train_seconds": self.seconds,
                }
            )
            self._sums, self._count = {}, 0


def _advance(lanes: Lanes, running: list[Track | None]) -> float:
    """Every running track to the nearest of their ends of an epoch, or until one diverges.

    Returns:
      seconds it took.
    """
    tracks = [track for track in running if track is not None]
    count = min(track.num_left for track in tracks)
    idle = np.full((count, tracks[0].plan.config.data.batch_size), -1, np.int32)
    rows = np.stack([idle if track is None else track.rows(count) for track in running])
    began = last = time.perf_counter()

    def collect(metrics: Any, done: int) -> bool:
        nonlocal last
        found = {
            name: np.reshape(values, (len(running), -1))
            for name, values in jax.device_get(metrics).items()
        }
        now = time.perf_counter()
        for lane, track in enumerate(running):
            if track is not None:
                own = {name: values[lane, :done] for name, values in found.items()}
                track.collect(own, done, (now - last) / len(tracks))
        last = now
        return any(track.reason for track in tracks)

    # The metrics of one piece are fetched while the next one runs: the device never waits.
    pending = None
    with contextlib.closing(lanes.run(rows)) as pieces:
        for newest in pieces:
            if pending is not None and collect(*pending):
                pending = newest
                break
            pending = newest
    if pending is not None:
        collect(*pending)
    return last - began


def train_tracks(
    lanes: Lanes,
    tracks: collections.deque[Track],
    *,
    alone: Lanes | None = None,
    on_stop: Callable[[Track, TrainState], None],
    on_lost: Callable[[Track], None],
    on_news: Callable[[list[Track]], None] = lambda running: None,
) -> float:
    """Trains every track to its stop.

    Args:
      lanes: of a program that serves them all.
      tracks: in the order in which they begin; `on_stop` may add to them.
      alone: a single lane, for a track that nothing is left to run beside: next to idle lanes it
        would be no faster than with all of them busy.
      on_stop: called with each that reached its stop, and its state.
      on_lost: called with each that diverged.
      on_news: called with those under way, an epoch of steps later at most.

    Returns:
      seconds of all steps together.
    """
    many, seconds = lanes, 0.0
    running: list[Track | None] = [None] * lanes.num_lanes
    while True:
        if tracks and not any(running):  # also after one that was alone and left others behind
            lanes, running = many, [None] * many.num_lanes
        for lane, track in enumerate(running):
            if track is None and tracks:
                following = tracks.popleft()
                lanes.load(lane, following.start(), following.plan.hparams)
                running[lane] = following
        left = [(lane, track) for lane, track in enumerate(running) if track is not None]
        if not left:
            return seconds
        if len(left) == 1 < lanes.num_lanes and alone is not None:
            ((lane, track),) = left
            alone.load(0, lanes.state(lane), track.plan.hparams)
            lanes, running = alone, [track]
        on_news([track for _, track in left])
        seconds += _advance(lanes, running)
        for lane, track in enumerate(running):
            if track is not None and track.reason:
                on_lost(track)
                running[lane] = None
            elif track is not None and track.step >= track.stop:
                on_stop(track, lanes.state(lane))
                running[lane] = None
