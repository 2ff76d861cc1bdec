"""The compiled step over a run's data: resident or streamed, scanned or looped."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import device
from jepa_jax.data import stream_batches, take
from jepa_jax.distributed import Layout
from jepa_jax.errors import ConfigError
from jepa_jax.train_step import HParams, Metrics, TrainState, make_train_epoch


def check_memory(
    compiled: jax.stages.Compiled, batch_size: int, beside: int, multiple: int = 1
) -> None:
    """Refuses, before its first call, a program that needs more memory than the device has.

    Args:
      compiled: the program.
      batch_size: that it was compiled for.
      beside: bytes that lie on the device and are not the program's arguments.
      multiple: of which a batch size has to be.

    Raises:
      ConfigError: with what it needs, what there is, and a batch size that fits.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return
    held = (
        beside
        + stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    needed, limit = held + stats.temp_size_in_bytes, device.memory_limit()
    if needed > limit:
        fitting = int(0.9 * (limit - held) / (stats.temp_size_in_bytes / batch_size))
        fitting -= fitting % multiple
        advice = f"config.data.batch_size={fitting} fits" if fitting >= 2 else "use a smaller model"
        raise ConfigError(
            f"this model at config.data.batch_size={batch_size} needs {needed / 2**30:.1f} GiB and "
            f"the device has {limit / 2**30:.1f} GiB: {advice}"
        )


class Runner:
    """One compiled program that runs the steps of every epoch.

    Args:
      train_step: of `make_train_step`.
      state: what the program will be called with; only shapes are read.
      hparams: see `HParams`.
      images: uint8 [N, H, W, C], a numpy array or anything that indexes like one.
      labels: int32 [N], -1 for no label.
      steps_per_epoch: S.
      batch_size: B, over all devices.
      placement: 'device' keeps the images on every device, any other prefetches batches to them,
        each process its own part.
      scan_steps: steps of one program (resident data only); 1 is a loop of jitted steps, the
        faster way on a CPU, where a convolution inside a scan takes a slow path. An epoch is cut
        into equal pieces of at most this many steps.
      layout: the devices; the first one alone if None.

    Attributes:
      program: the compiled piece.
      piece: how many steps it runs.
    """

    def __init__(
        self,
        train_step: Callable[..., tuple[TrainState, Metrics]],
        state: TrainState,
        hparams: HParams,
        images: Any,
        labels: np.ndarray,
        *,
        steps_per_epoch: int,
        batch_size: int,
        placement: str,
        scan_steps: int,
        layout: Layout | None = None,
    ):
        self._layout = None if layout is None or layout.is_single else layout
        self._labels, self._batch_size = labels, batch_size
        self._streamed = None if placement == "device" else images
        if placement == "device":
            if images.nbytes > device.memory_limit():
                raise ConfigError(
                    f"the training images take {images.nbytes / 2**30:.1f} GiB and the device has "
                    f"{device.memory_limit() / 2**30:.1f} GiB: use config.data.placement=stream"
                )
            self._resident = self._everywhere((np.asarray(images[:]), labels))
        num_pieces = math.ceil(steps_per_epoch / scan_steps)
        self.piece = math.ceil(steps_per_epoch / num_pieces)
        self._hparams = self._everywhere(hparams)
        self.program = self._compiled(train_step, state, images.shape[1:])
        # The loop's program sees a batch, not the images that lie beside it.
        beside = images.nbytes if placement == "device" and self.piece == 1 else 0
        check_memory(self.program, batch_size, beside, len(layout.devices) if layout else 1)

    def _compiled(self, train_step, state, image_shape) -> jax.stages.Compiled:
        batch, layout = self._batch_size, self._layout
        if self.piece > 1:
            of_rows = layout and layout.batches
            rows = jax.ShapeDtypeStruct((self.piece, batch), jnp.int32, sharding=of_rows)
            function, inputs = make_train_epoch(train_step), (*self._resident, rows)
        else:
            of_rows = layout and layout.batch
            function = train_step
            inputs = (
                jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8, sharding=of_rows),
                jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=of_rows),
            )
        if layout is None:
            jitted = jax.jit(function, donate_argnums=0)
        else:
            shardings = layout.of_state(state)
            jitted = jax.jit(
                function, donate_argnums=0, out_shardings=(shardings, layout.everywhere)
            )
            state = jax.tree.map(
                lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                state,
                shardings,
            )
            self._take = jax.jit(take, out_shardings=layout.batch)
        return jitted.lower(state, *inputs, self._hparams).compile()

    def _everywhere(self, tree: Any) -> Any:
        if self._layout is None:
            return jax.device_put(tree)
        return self._layout.put(jax.device_get(tree), self._layout.everywhere)

    def place(self, state: TrainState) -> TrainState:
        """A state that every process holds whole, laid out as the program takes it; used up."""
        if self._layout is None:
            return state
        placed = self._layout.put(jax.device_get(state), self._layout.of_state(state))
        for leaf in jax.tree.leaves(state):
            # Whoever still holds it would hold a device's memory.
            if isinstance(leaf, jax.Array):
                leaf.delete()
        return placed

    def here(self, state: TrainState) -> TrainState:
        """A state of `run`, whole, see `Layout.here`; all processes have to call it."""
        return state if self._layout is None else self._layout.here(state)

    def run(
        self, state: TrainState, order: np.ndarray, hparams: HParams | None = None
    ) -> Iterator[tuple[TrainState, Any, int]]:
        """Runs the steps of `order [S, B]`, dataset indices.

        Args:
          state: of `place` or of an earlier call; donated.
          order: dataset indices.
          hparams: in place of those the runner was made with; the program is the same.

        Yields:
          (state, metrics of the newest steps, how many these are). The state that went in is
          donated: only the newest one yielded is alive. Nothing here waits for the device.
        """
        hparams = self._hparams if hparams is None else self._everywhere(hparams)
        if self.piece > 1:
            yield from self._run_scanned(state, order, hparams)
            return
        for images, labels in self._batches(order):
            state, metrics = self.program(state, images, labels, hparams)
            yield state, metrics, 1

    def _run_scanned(self, state, order, hparams):
        for start in range(0, len(order), self.piece):
            rows = order[start : start + self.piece]
            padded = np.full((self.piece, order.shape[1]), -1, np.int32)
            padded[: len(rows)] = rows
            padded = self._placed(padded, self._layout and self._layout.batches)
            state, metrics = self.program(state, *self._resident, padded, hparams)
            yield state, metrics, len(rows)

    def _placed(self, rows: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
        return jax.device_put(rows) if where is None else self._layout.put(rows, where)

    def _batches(self, order):
        layout = self._layout
        if self._streamed is not None:
            put = jax.device_put
            if layout is not None:
                order = order[:, layout.own_rows(self._batch_size)]
                put = functools.partial(layout.put_rows, batch_size=self._batch_size)
            yield from stream_batches(self._streamed, self._labels, order, put=put)
            return
        gather = take if layout is None else self._take
        for row in order:
            yield gather(*self._resident, self._placed(row, layout and layout.batch))
