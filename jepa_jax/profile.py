"""A trace of a few steps of a run, for TensorBoard's profiler, XProf or Perfetto."""

import pathlib
import shutil

import jax

from jepa_jax.progress import say

# The first pieces of a run also wait for the compiler's caches and for the allocator.
_FIRST_PIECE, _NUM_STEPS = 3, 5


class Profile:
    """Traces the steps that follow the third piece, five or a whole piece, and then no more.

    In the trace every operation carries the scope it comes from: augment, encoder and projector,
    loss, optimizer, probe.

    Args:
      folder: what it becomes, whole or not at all; None traces nothing.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder, self._pieces, self._steps, self._is_tracing = folder, 0, 0, False

    @property
    def _partial(self) -> pathlib.Path:
        return self._folder.with_name(f".{self._folder.name}.partial")

    def piece_done(self, state: jax.Array, num_steps: int) -> None:
        """Counts a piece of `num_steps` that has been dispatched and whose result is `state`."""
        if self._folder is None:
            return
        self._pieces += 1
        if self._pieces < _FIRST_PIECE:
            return
        if self._pieces == _FIRST_PIECE:
            jax.block_until_ready(state)
            shutil.rmtree(self._partial, ignore_errors=True)
            jax.profiler.start_trace(self._partial)
            self._is_tracing = True
            return
        self._steps += num_steps
        if self._steps >= _NUM_STEPS:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way; a run may be shorter than it."""
        if self._folder is None:
            return
        folder = self._folder
        if self._is_tracing:
            jax.profiler.stop_trace()
        if self._steps:
            shutil.rmtree(folder, ignore_errors=True)
            self._partial.rename(folder)
            say(f"{'profile':<10}{folder}: {self._steps} steps")
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
            say(f"{'note':<10}the run was too short for a profile")
        self._folder = None
