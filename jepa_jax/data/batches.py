"""From one order of indices to batches on the device, whether the data is resident or streamed."""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import device
from jepa_jax.data.records import Records
from jepa_jax.errors import ConfigError


def choose_placement(placement: str, num_bytes: int) -> Literal["device", "host", "stream"]:
    """Where the training images lie: on the device, in the host's memory, or where they come from.

    Args:
      placement: 'device', 'host' or 'stream', or 'auto', which keeps the data on the device when
        it takes at most a third of its memory, the rest being for the model and its activations,
        and else streams it.
      num_bytes: size of the training images.

    Returns:
      'device', 'host' or 'stream'.

    Raises:
      ConfigError: another placement.
    """
    if placement not in ("auto", "device", "host", "stream"):
        raise ConfigError(f"data.placement must be auto, device, host or stream, got {placement!r}")
    if placement != "auto":
        return placement
    return "device" if num_bytes <= device.memory_limit() / 3 else "stream"


def epoch_order(key: jax.Array, num_images: int, batch_size: int) -> jax.Array:
    """The order of one epoch: a permutation of the images, cut into batches.

    Returns:
      int32 [num_images // batch_size, batch_size]; a last incomplete batch is dropped.

    Raises:
      ConfigError: a batch is larger than the dataset, or smaller than one image.
    """
    if not 1 <= batch_size <= num_images:
        raise ConfigError(f"batch size {batch_size} does not fit a dataset of {num_images} images")
    return _epoch_order(key, num_images, batch_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _epoch_order(key: jax.Array, num_images: int, batch_size: int) -> jax.Array:
    num_batches = num_images // batch_size
    order = jax.random.permutation(key, jnp.arange(num_images, dtype=jnp.int32))
    return order[: num_batches * batch_size].reshape(num_batches, batch_size)


@jax.jit
def take(
    images: jax.Array, labels: jax.Array | None, indices: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One batch of data that is resident on the device.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int32 [N], or None.
      indices: int32 [B] in [0, N).

    Returns:
      Images [B, H, W, 3] and labels [B]; without labels these are -1.
    """
    if labels is None:
        return images[indices], jnp.full(indices.shape, -1, jnp.int32)
    return images[indices], labels[indices]


def stream_batches(
    images: np.ndarray | Records,
    labels: np.ndarray | None,
    indices: np.ndarray | jax.Array,
    *,
    prefetch: int = 2,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The batches that `take` would give, gathered on the host by a thread that runs ahead.

    Args:
      images: uint8 [N, H, W, 3], in memory or as records. What has a method `batches`, rows int
        [S, B] to an iterator of uint8 [B, H, W, 3], is read by it, all else by indexing.
      labels: int32 [N], or None.
      indices: int [S, B] in [0, N), one row a batch.
      prefetch: batches that may wait on the device.
      put: brings the images of a batch, and its labels, to the device or the devices.

    Yields:
      Images [B, H, W, 3] and labels [B] on the device; without labels these are -1.

    Raises:
      What reading the images raises, at the batch where it happened. Closing the generator early
      ends the thread.
    """
    rows = np.asarray(indices)
    ready = queue.Queue(maxsize=prefetch)
    closed = threading.Event()

    def produce() -> None:
        try:
            # Closed at once, not when it is forgotten: it may hold processes.
            with contextlib.closing(_read(images, rows)) as batches:
                for row, batch in zip(rows, batches, strict=True):
                    targets = np.full(len(row), -1, np.int32) if labels is None else labels[row]
                    ready.put((put(batch), put(targets)))
                    if closed.is_set():
                        return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=produce, name="stream_batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while thread.is_alive():
            # The thread may be waiting for room in the queue.
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(timeout=0.01)


def _read(images: np.ndarray | Records, rows: np.ndarray) -> Iterator[np.ndarray]:
    if hasattr(images, "batches"):
        yield from images.batches(rows)
    else:
        yield from (images[row] for row in rows)
