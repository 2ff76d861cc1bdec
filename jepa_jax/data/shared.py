"""Memory that several processes see, and that goes when the last of them does."""

import mmap
import os
import tempfile
import weakref

import numpy as np


class SharedMemory:
    """Bytes that a pickled copy, in a process that this one starts, shares.

    On Linux it has no name in any file system: nothing is left behind by processes that are
    killed, and a small /dev/shm does not limit it. Elsewhere it is a temporary file.

    Args:
      size: in bytes; they are 0 at first.
      path: of memory that another process has made.

    Attributes:
      file: its descriptor.
      content: uint8 [size].
    """

    def __init__(self, size: int, path: str = ""):
        self._size, self._path = size, path
        if path:
            self.file = os.open(path, os.O_RDWR)
        elif hasattr(os, "memfd_create"):
            self.file = os.memfd_create("jepa_jax")
            self._path = f"/proc/{os.getpid()}/fd/{self.file}"
        else:
            self.file, self._path = tempfile.mkstemp(prefix="jepa_jax_")
            weakref.finalize(self, os.unlink, self._path)
        # Views of the content outlive this: the memory goes with the last of them. At the end of
        # the process it closes by itself, and others that end then may still need it.
        weakref.finalize(self, os.close, self.file).atexit = False
        if not path:
            os.ftruncate(self.file, size)
        self.content = np.frombuffer(mmap.mmap(self.file, size), np.uint8)

    def __reduce__(self):
        return SharedMemory, (self._size, self._path)
