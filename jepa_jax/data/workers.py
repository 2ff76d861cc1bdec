"""Processes that decode images, kept from epoch to epoch; grain starts them and keeps their order.

Parent and workers share one piece of memory, a ring of slots. A slot holds the positions of a piece
of a batch, written by the parent, and the pixels of its images, written by a worker; through
grain's queues goes only the word that a piece is done. So the memory is bounded, no image is copied
twice, and what the workers do next is never fixed for more than the length of the ring.
"""

import collections
import contextlib
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import types
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from jepa_jax.data.readers import Reader, decode_into
from jepa_jax.data.shared import SharedMemory
from jepa_jax.errors import DataError, JepaError

# Images of a piece, and bytes: long enough to hide what a message costs, short enough to spread
# one batch over many workers.
_PIECE_IMAGES, _PIECE_BYTES = 64, 2**22
# Slots of the ring for every worker: one in its hand, the others ready or waiting.
_SLOTS_EACH = 4
_EMPTY, _CLOSED = -1, -2
# For an error to be written to a pipe.
_LAST_WORD_SECONDS = 0.05
_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.0005, 0.02
# A source has a length; this one is never reached.
_ENDLESS = 2**40
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Piece(NamedTuple):
    """Positions of neighbouring images of a batch, and the size of the whole batch."""

    positions: np.ndarray
    batch_size: int


class Broken(NamedTuple):
    """An image of a batch that could not be decoded; its pixels are undefined."""

    slot: int
    position: int
    reason: str


class _Ring:
    """Memory that parent and workers share: per slot a note from the parent, then pixels.

    A note is int64 [3 + P]: which piece it is, how many images it has, a checksum, the positions.
    The checksum is for processors on which another one may see the parts of a note in any order.
    """

    def __init__(self, slots: int, images: int, shape: tuple[int, ...]):
        self.slots, self.images, self._shape = slots, images, shape
        self._note_bytes = 8 * (3 + images)
        self._start = math.ceil(slots * self._note_bytes / mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = SharedMemory(self._start + slots * images * math.prod(shape))
        self._mark(_EMPTY)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [slots, P, H, W, 3]."""
        return self._memory.content[self._start :].reshape(self.slots, self.images, *self._shape)

    def _mark(self, state: int) -> None:
        for slot in range(self.slots):
            os.pwrite(self._memory.file, np.int64(state).tobytes(), slot * self._note_bytes)

    def write(self, piece: int, positions: np.ndarray) -> None:
        """The parent's note: which images piece number `piece` has."""
        note = np.zeros(3 + self.images, np.int64)
        note[0], note[1], note[3 : 3 + len(positions)] = piece, len(positions), positions
        note[2] = zlib.crc32(note.tobytes())
        os.pwrite(self._memory.file, note.tobytes(), piece % self.slots * self._note_bytes)

    def read(self, piece: int) -> np.ndarray | None:
        """The positions of a piece once they are there; None once the ring is closed."""
        wait, place = _WAIT_SECONDS, piece % self.slots * self._note_bytes
        while True:
            content = os.pread(self._memory.file, self._note_bytes, place)
            note = np.frombuffer(content, np.int64).copy()
            if note[0] == _CLOSED:
                return None
            checksum, note[2] = note[2], 0
            if note[0] == piece and checksum == zlib.crc32(note.tobytes()):
                return note[3 : 3 + note[1]]
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT_SECONDS)

    def close(self) -> None:
        """Tells the workers that there is no more."""
        self._mark(_CLOSED)


class _Pieces:
    """What a worker runs: element k decodes piece k into its slot."""

    def __init__(self, ring: _Ring, reader: Reader, size: int):
        self._ring, self._reader, self._size = ring, reader, size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, piece: int) -> tuple[Any, ...]:
        """(seconds of reading, seconds of decoding, (slot, reason) of what is broken ...)."""
        positions = self._ring.read(piece)
        if positions is None:
            # The error reaches the thread of grain that waits for this worker, which then sees no
            # more than twice a second whether it is to end: so it ends by itself.
            threading.Timer(_LAST_WORD_SECONDS, os._exit, (1,)).start()
            raise IndexError
        began = time.perf_counter()
        contents, _ = self._reader.read(positions)
        read = time.perf_counter()
        pixels = self._ring.pixels[piece % self._ring.slots]
        slots = np.arange(len(positions))
        broken = decode_into(pixels, slots, contents, self._reader, self._size)
        return (read - began, time.perf_counter() - read, *broken)


def _init_worker(index: int, count: int) -> None:
    """A worker outlives no parent, and no GPU is ever its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # Also if that was killed and could tell nobody.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started in here is never interrupted: signals are for the parent to answer.

    Ctrl-C goes to all processes of a terminal at once. A blocked signal of the parent's own is not
    lost: it waits, or reaches another thread.
    """
    # Of multiprocessing; where it starts it unblocks both.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keeps a new process from importing the program that runs here.

    It would import all of it for nothing, and run it if it is a script without
    `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_workers(ring: _Ring, pieces: list[Iterator]) -> None:
    ring.close()
    # Forgotten as well: at the very end of a program grain's own clean-up fails, and says so.
    pieces.pop().close()


class Workers:
    """Processes that decode the images of one reader, in the order in which they are asked for.

    Args:
      reader: of encoded images.
      shape: (H, W, 3) of every image.
      size: see `decode_image`.
      num_workers: how many processes; at most one a core is started.

    Attributes:
      seconds: what has been spent so far, by 'reading' and 'decoding' (all workers together) and
        'waiting' and 'moving' (the parent).
    """

    def __init__(self, reader: Reader, shape: tuple[int, ...], size: int, num_workers: int):
        # Loaded here, because it loads JAX and many others.
        import grain

        if not flags.FLAGS.is_parsed():
            # Of a program without absl nobody parses them, and grain reads its own.
            flags.FLAGS.mark_as_parsed()
        self.num_workers = max(1, min(num_workers, os.cpu_count() or 1))
        images = max(1, min(_PIECE_IMAGES, _PIECE_BYTES // math.prod(shape)))
        self._ring = _Ring(_SLOTS_EACH * self.num_workers, images, shape)
        self._shape, self._written, self._done = shape, 0, 0
        self.seconds = dict.fromkeys(("reading", "decoding", "waiting", "moving"), 0.0)
        pieces = (
            grain.MapDataset.source(_Pieces(self._ring, reader, size))
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            .mp_prefetch(grain.MultiprocessingOptions(self.num_workers, _SLOTS_EACH), _init_worker)
        )
        self._pieces = [iter(pieces)]
        # Before grain's own, of priority 1, which would wait for workers that wait for the ring.
        self._end = multiprocessing.util.Finalize(
            self, _end_workers, (self._ring, self._pieces), exitpriority=10
        )
        try:
            with _signals_blocked(), _without_main():
                # One piece of nothing each: all are there once these are back.
                for _ in range(self.num_workers):
                    self._write(np.empty(0, np.int64))
                for _ in range(self.num_workers):
                    self._next()
        except BaseException:
            self.close()
            raise

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, list[Broken]]]:
        """The images at each row of positions, int [B], decoded ahead of their being asked for.

        A row is taken from the iterable when the first worker is to begin with it, no earlier.

        Yields:
          uint8 [B, H, W, 3] and which of these could not be decoded.

        Raises:
          DataError: of a worker, or for one that died. The workers cannot be used any more.
        """
        # Of a caller before, who did not take all.
        while self._done < self._written:
            self._next()
        pieces, ahead = self._cut(rows), collections.deque()

        def write_ahead() -> None:
            while len(ahead) < self._ring.slots and (piece := next(pieces, None)):
                self._write(piece.positions)
                ahead.append(piece)

        write_ahead()
        while ahead:
            batch = np.empty((ahead[0].batch_size, *self._shape), np.uint8)
            broken, end = [], 0
            while end < len(batch):
                piece, pixels = ahead.popleft(), self._ring.pixels[self._done % self._ring.slots]
                found = self._next()
                began = time.perf_counter()
                start, end = end, end + len(piece.positions)
                batch[start:end] = pixels[: end - start]
                self.seconds["moving"] += time.perf_counter() - began
                broken += [Broken(start + s, int(piece.positions[s]), why) for s, why in found]
                write_ahead()
            yield batch, broken

    def _cut(self, rows: Iterable[np.ndarray]) -> Iterator[_Piece]:
        for row in rows:
            for positions in np.array_split(row, math.ceil(len(row) / self._ring.images)):
                yield _Piece(positions, len(row))

    def _write(self, positions: np.ndarray) -> None:
        self._ring.write(self._written, positions)
        self._written += 1

    def _next(self) -> tuple[tuple[int, str], ...]:
        """(slot, reason) of what is broken in the next piece, once it is done."""
        began = time.perf_counter()
        try:
            reading, decoding, *broken = next(self._pieces[0])
        except JepaError:
            raise
        # Of grain: a worker that could not start or was killed.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"a process that decodes images has failed ({reason}): fewer "
                "config.data.num_workers need less memory"
            ) from error
        self._done += 1
        self.seconds["waiting"] += time.perf_counter() - began
        self.seconds["reading"] += reading
        self.seconds["decoding"] += decoding
        return tuple(broken)

    def close(self) -> None:
        """Ends the processes, as forgetting the workers or the end of the program does."""
        self._end()
