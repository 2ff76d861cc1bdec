"""One process to a folder: two runs in one would write over each other's files."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from jepa_jax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NAME = ".lock"


@contextlib.contextmanager
def only_process_in(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a folder; the system takes it back from a process that dies.

    Where the file system knows no locks, the process named in the file holds it as long as it
    lives; one of another machine, of which that cannot be told, until its file is deleted.

    Args:
      folder: an existing one, of a run or a sweep.

    Raises:
      CheckpointError: if another process holds it, with its number and its machine.
      OSError: if the folder cannot be written.
    """
    path = folder / _NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        holder = _holder(descriptor)
        if not _take(descriptor, holder):
            raise CheckpointError(
                f"{folder} is in use by process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'this machine')}: wait for it, or give another --workdir"
                + ("" if _is_ours(holder) else f"; if it is gone, delete {path}")
            )
        _write(descriptor, {"pid": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        finally:
            _write(descriptor, {})
    finally:
        os.close(descriptor)


def _write(descriptor: int, holder: dict) -> None:
    with contextlib.suppress(OSError):  # a full disk: the system's lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> dict:
    """The process that the file names: pid and host, or nothing."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
        return found if type(found) is dict else {}
    except ValueError:
        return {}


def _is_ours(holder: dict) -> bool:
    return holder.get("host", socket.gethostname()) == socket.gethostname()


def _take(descriptor: int, holder: dict) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (AttributeError, OSError):  # no fcntl, or a file system without locks
        return not holder or (_is_ours(holder) and not _is_alive(holder.get("pid")))


def _is_alive(pid: object) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
