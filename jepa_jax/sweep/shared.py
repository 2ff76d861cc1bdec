"""What cells have in common before their schedules part: trained once, for all of them.

Runs of one seed that differ in their number of epochs alone see the same batches, views and rates
until the first warm-up ends. The first of them trains those steps, the others begin there.
"""

import collections
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.plan import Plan
from jepa_jax.sweep.tracks import Track
from jepa_jax.train_step import TrainState, learning_rate

_LENGTH = "optim.epochs"


def shared_steps(plans: Sequence[Plan]) -> int:
    """Steps at the start, in whole epochs, at which the rates of all plans are the same."""
    num_steps = min(plan.num_steps for plan in plans)
    steps = jnp.arange(num_steps)
    rates = np.stack([jax.device_get(learning_rate(plan.hparams, steps)) for plan in plans])
    differs = np.flatnonzero((rates != rates[0]).any(axis=0))
    same = int(differs[0]) if len(differs) else num_steps
    return same - same % plans[0].steps_per_epoch


class SharedStarts:
    """The tracks of a program, those with a common start behind one that trains it.

    Args:
      tracks: none under way in a lane. One that has a checkpoint of its own shares nothing.

    Attributes:
      queue: what to train, in order; grows as the shared starts are done.
      num_saved: steps that need not be trained.
    """

    def __init__(self, tracks: Sequence[Track]):
        self._members: dict[int, list[Track]] = {}
        self.num_saved = 0
        starts, alone = [], []
        for family in _families(tracks):
            steps = shared_steps([track.plan for track in family]) if len(family) > 1 else 0
            if not steps:
                alone += family
                continue
            start = Track(family[0].cell, family[0].plan, steps)
            self._members[id(start)] = family
            self.num_saved += steps * (len(family) - 1)
            starts.append(start)
        # In the order given, so that a sweep's first seed comes before its second.
        places = {id(track): place for place, track in enumerate(tracks)}
        self.queue = collections.deque([*starts, *sorted(alone, key=lambda t: places[id(t)])])

    def on_stop(
        self, otherwise: Callable[[Track, TrainState], None]
    ) -> Callable[[Track, TrainState], None]:
        """Of `train_tracks`: hands a shared start to its members, leaves others to `otherwise`."""

        def stop(track: Track, state: TrainState) -> None:
            members = self._members.pop(id(track), None)
            if members is None:
                otherwise(track, state)
                return
            for member in members:
                member.take_over(track, state)
            self.queue.extend(members)

        return stop

    def on_lost(self, otherwise: Callable[[Track], None]) -> Callable[[Track], None]:
        """Of `train_tracks`: what diverges in a shared start does so in every member."""

        def lose(track: Track) -> None:
            members = self._members.pop(id(track), None)
            for member in members or []:
                member.lose_with(track)
                otherwise(member)
            if members is None:
                otherwise(track)

        return lose


def _families(tracks: Sequence[Track]) -> list[list[Track]]:
    """Tracks that nothing but their length tells apart, in order."""

    def but_for_length(track: Track) -> str:
        key: dict[str, Any] = {k: v for k, v in track.cell.key.items() if k != _LENGTH}
        own = str(track.cell.folder) if (track.cell.folder / "checkpoints").is_dir() else ""
        return json.dumps([own, key], sort_keys=True)

    keyed = sorted(((but_for_length(track), n) for n, track in enumerate(tracks)))
    groups = itertools.groupby(keyed, key=lambda pair: pair[0])
    families = [[tracks[n] for _, n in group] for _, group in groups]
    return sorted(families, key=lambda family: tracks.index(family[0]))
