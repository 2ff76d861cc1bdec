"""The compiled step over a run's data: resident or streamed, scanned or looped."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import device
from jepa_jax.data import stream_batches, take
from jepa_jax.errors import ConfigError
from jepa_jax.train_step import HParams, Metrics, TrainState, make_train_epoch


def check_memory(compiled: jax.stages.Compiled, batch_size: int, beside: int) -> None:
    """Refuses, before its first call, a program that needs more memory than the device has.

    Args:
      compiled: the program.
      batch_size: that it was compiled for.
      beside: bytes that lie on the device and are not the program's arguments.

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
      batch_size: B.
      placement: 'device' keeps the images on the device; 'host' and 'stream' prefetch batches to
        it.
      scan_steps: steps of one program (resident data only); 1 is a loop of jitted steps, the
        faster way on a CPU, where a convolution inside a scan takes a slow path. An epoch is cut
        into equal pieces of at most this many steps.

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
    ):
        self._hparams, self._labels = hparams, labels
        self._streamed = None if placement == "device" else images
        if placement == "device":
            if images.nbytes > device.memory_limit():
                raise ConfigError(
                    f"the training images take {images.nbytes / 2**30:.1f} GiB and the device has "
                    f"{device.memory_limit() / 2**30:.1f} GiB: use config.data.placement=stream"
                )
            self._resident = jax.device_put((np.asarray(images[:]), labels))
        num_pieces = math.ceil(steps_per_epoch / scan_steps)
        self.piece = math.ceil(steps_per_epoch / num_pieces)
        if self.piece > 1:
            indices = jax.ShapeDtypeStruct((self.piece, batch_size), jnp.int32)
            function, inputs = make_train_epoch(train_step), (*self._resident, indices)
        else:
            batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), jnp.uint8)
            function = train_step
            inputs = (batch, jax.ShapeDtypeStruct((batch_size,), jnp.int32))
        jitted = jax.jit(function, donate_argnums=0)
        self.program = jitted.lower(state, *inputs, hparams).compile()
        # The loop's program sees a batch, not the images that lie beside it.
        beside = images.nbytes if placement == "device" and self.piece == 1 else 0
        check_memory(self.program, batch_size, beside)

    def run(
        self, state: TrainState, order: np.ndarray, hparams: HParams | None = None
    ) -> Iterator[tuple[TrainState, Any, int]]:
        """Runs the steps of `order [S, B]`, dataset indices.

        Args:
          state: donated.
          order: dataset indices.
          hparams: in place of those the runner was made with; the program is the same.

        Yields:
          (state, metrics of the newest steps, how many these are). The state that went in is
          donated: only the newest one yielded is alive. Nothing here waits for the device.
        """
        hparams = self._hparams if hparams is None else hparams
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
            state, metrics = self.program(state, *self._resident, jax.device_put(padded), hparams)
            yield state, metrics, len(rows)

    def _batches(self, order):
        if self._streamed is not None:
            yield from stream_batches(self._streamed, self._labels, order)
            return
        for row in order:
            yield take(*self._resident, jax.device_put(row))
