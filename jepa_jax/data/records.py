"""Encoded images that read like an array of pixels, whatever holds them and however broken."""

import concurrent.futures
import copy
import math
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np

from jepa_jax.data.readers import BrokenImage, Reader, decode_into, decoded
from jepa_jax.data.workers import Broken, Workers
from jepa_jax.progress import say

# Broken images that are named; of more of them only the number is said.
_NAMED = 20
_CHUNK = 1024
# In place of one that no reader gives.
_NO_LABEL = np.iinfo(np.int32).min


class _Broken:
    """The broken images of a reader, found so far: said, counted, and not too many.

    Args:
      reader: of the images.
      most: the share that may be broken.
    """

    def __init__(self, reader: Reader, most: float):
        self._reader, self._most = reader, most
        self.reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def add(self, position: int, reason: str) -> None:
        """Notes a broken image.

        Raises:
          DataError: with it there are too many.
        """
        with self._lock:
            if position in self.reasons:
                return
            self.reasons[position] = reason
            self._say(position, reason)
        if len(self.reasons) > self._most * len(self._reader):
            raise self.error()

    def _say(self, position: int, reason: str) -> None:
        count = len(self.reasons)
        if count <= _NAMED:
            name = self._reader.name_of(position)
            line = f"{'broken':<10}{name}: {reason}; another image stands in"
            say(line, everywhere=True)
        elif math.log2(count / _NAMED).is_integer():
            say(f"{'broken':<10}{count} of {len(self._reader)} images so far")

    def error(self) -> Exception:
        """With the first of them."""
        position, reason = next(iter(self.reasons.items()))
        name, count = self._reader.name_of(position), len(self.reasons)
        share = f"{count} of {len(self._reader)} images are broken, more than "
        share += f"config.data.max_broken={self._most:g} allows"
        return self._reader.too_many_broken(f"{share}, such as {name}: {reason}")


class _IdleWorkers:
    """Workers between two uses, which end with the last of the records that they belong to."""

    def __init__(self, start: Callable[[], Workers]):
        self._start, self._idle = start, []

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    @property
    def first(self) -> Workers | None:
        return self._idle[0] if self._idle else None

    def take(self) -> Workers:
        try:
            return self._idle.pop()
        except IndexError:
            return self._start()

    def give_back(self, workers: Workers) -> None:
        self._idle.append(workers)


class Records:
    """Encoded images, decoded when they are indexed.

    Indexing with an int array or a slice reads like a uint8 array [N, H, W, 3]. See `decode_image`
    for what becomes of other images than RGB.

    For a broken image another one stands in: the next good one with the same label, in the
    reader's order and after its end from its beginning. Which one that is depends on nothing else,
    so that a batch is the same whoever reads it.

    Args:
      reader: of the images.
      size: 0, or the side that they are resized and cut to.
      num_workers: threads that decode what is indexed, and processes that decode what is streamed;
        at most one a core.
      max_broken: the share of the images that may be broken.

    Raises:
      DataError: on construction or on reading, for what cannot be read, for images that differ in
        size, and for too many broken ones.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, reader: Reader, *, size: int = 0, num_workers: int = 2, max_broken: float = 0.01
    ):
        self._reader, self._size = reader, size
        self._num_workers = max(1, min(num_workers, os.cpu_count() or 1))
        self._labels: np.ndarray | None = None
        self._broken = _Broken(reader, max_broken)
        self._stands_in: dict[int, int] = {}
        self._positions = np.arange(len(reader))
        image_shape = (size, size, 3) if size else self._first_shape()
        self.shape: tuple[int, ...] = (len(reader), *image_shape)
        self._idle = _IdleWorkers(lambda: Workers(reader, image_shape, size, num_workers))

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def nbytes(self) -> int:
        """Size of all images once they are decoded."""
        return math.prod(self.shape)

    @property
    def broken(self) -> np.ndarray:
        """Positions in the reader, int64, of the broken images found so far, sorted."""
        return np.array(sorted(self._broken.reasons), np.int64)

    def with_labels(self, labels: np.ndarray | None) -> "Records":
        """The same records, who stands in for whom being decided by labels int32 [N].

        Raises:
          ValueError: they are not all of the reader's records.
        """
        if len(self) != len(self._reader) or labels is not None and len(labels) != len(self):
            raise ValueError("the labels of all records, and of no others, are needed")
        labelled = copy.copy(self)
        labelled._labels, labelled._stands_in = labels, {}
        return labelled

    def take(self, index: np.ndarray) -> "Records":
        """The records at an int array, none of them decoded."""
        taken = copy.copy(self)
        taken._positions = self._positions[index]
        taken.shape = (len(taken._positions), *self.shape[1:])
        return taken

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        positions = self._resolved(self._positions[index])
        images = np.empty((len(positions), *self.shape[1:]), np.uint8)
        self._mend(images, self._decode(positions, images))
        return images

    def read_all(
        self, on_progress: Callable[[int], None] = lambda count: None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """All images of the reader, uint8 [N, H, W, 3], and their labels, int32 [N] or None.

        The labels are those that lie beside the images, else those of `with_labels`.
        """
        images = np.empty((len(self._reader), *self.shape[1:]), np.uint8)
        labels = np.full(len(images), _NO_LABEL, np.int32)
        broken: list[Broken] = []
        for start in range(0, len(images), _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, len(images)))
            rows = slice(start, start + len(chunk))
            found = self._decode(chunk, images[rows], labels[rows])
            for _, position, reason in found:
                self._broken.add(position, reason)
            broken += [Broken(position, position, reason) for _, position, reason in found]
            on_progress(len(chunk))
        beside = self._labels if (labels == _NO_LABEL).all() else labels
        self.with_labels(beside)._mend(images, broken)
        return images, beside

    def read_labels(
        self, on_progress: Callable[[int], None] = lambda count: None
    ) -> np.ndarray | None:
        """The labels that lie beside the images of the reader, int32 [N], or None."""
        labels = []
        for start in range(0, len(self._reader), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(self._reader)))
            labels.append(self._reader.read(chunk)[1])
            on_progress(len(chunk))
        return None if labels[0] is None else np.concatenate(labels).astype(np.int32)

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The batches at rows of indices, int [S, B], decoded ahead by other processes.

        Yields:
          uint8 [B, H, W, 3]: `self[row]` for each row in turn.
        """
        workers = self._idle.take()
        try:
            # One after another: what is found to be broken by then is not sent again.
            positions = (self._resolved(self._positions[row]) for row in rows)
            for images, broken in workers.batches(positions):
                self._mend(images, broken)
                yield images
        except GeneratorExit:
            self._idle.give_back(workers)
            raise
        except BaseException:
            workers.close()
            raise
        self._idle.give_back(workers)

    @property
    def workers(self) -> Workers | None:
        """Those that wait for more to do, with what they have spent; None before any has begun."""
        return self._idle.first

    def close(self) -> None:
        """Ends the processes that wait for more to do; they start again when they are needed."""
        self._idle.close()

    def _first_shape(self) -> tuple[int, ...]:
        """(H, W, 3) of the first image that is not broken."""
        for position in range(len(self._reader)):
            try:
                content = self._reader.read([position])[0][0]
                return decoded(content, self._size).shape
            except BrokenImage as error:
                self._broken.add(position, str(error))
        raise self._broken.error()

    def _decode(
        self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray | None = None
    ) -> list[Broken]:
        """Decodes into images and, if they lie beside them, labels; returns what is broken."""

        def fill(slots: np.ndarray) -> list[Broken]:
            contents, beside = self._reader.read(positions[slots])
            if labels is not None and beside is not None:
                labels[slots] = beside
            found = decode_into(images, slots, contents, self._reader, self._size)
            return [Broken(slot, int(positions[slot]), reason) for slot, reason in found]

        # Pillow and the readers release the GIL while they work.
        with concurrent.futures.ThreadPoolExecutor(self._num_workers) as pool:
            parts = np.array_split(np.arange(len(positions)), self._num_workers)
            return [broken for part in pool.map(fill, parts) for broken in part]

    # --- broken images --------------------------------------------------------------------------

    def _mend(self, images: np.ndarray, broken: list[Broken]) -> None:
        """Puts another image in the place of each broken one."""
        for slot, position, reason in broken:
            self._broken.add(position, reason)
            images[slot] = self._instead_of(position)

    def _instead_of(self, position: int) -> np.ndarray:
        """The image [H, W, 3] that stands in for the broken one at `position`."""
        image = np.empty((1, *self.shape[1:]), np.uint8)
        for candidate in self._after(position):
            if candidate in self._broken.reasons:
                continue
            broken = self._decode(np.array([candidate]), image)
            if not broken:
                self._stands_in[position] = candidate
                return image[0]
            self._broken.add(candidate, broken[0].reason)
        name = self._reader.name_of(position)
        raise self._reader.too_many_broken(f"{name} and all images with its label are broken")

    def _after(self, position: int) -> Iterator[int]:
        """The other positions with the same label, from the next one on and round to the first."""
        if self._labels is None:
            alike = np.arange(len(self._reader))
        else:
            alike = np.flatnonzero(self._labels == self._labels[position])
        place = np.searchsorted(alike, position)
        yield from (int(other) for other in np.concatenate([alike[place + 1 :], alike[:place]]))

    def _resolved(self, positions: np.ndarray) -> np.ndarray:
        """The positions, those of known broken images replaced."""
        if not self._stands_in:
            return positions
        return np.array([self._stands_in.get(int(p), int(p)) for p in positions], np.int64)
