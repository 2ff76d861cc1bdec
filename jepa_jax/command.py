"""What every command shares: one line on stderr and a non-zero exit for what a person can mend."""

import argparse
import atexit
import contextlib
import os
import pathlib
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import logging

from jepa_jax.errors import JepaError
from jepa_jax.signals import never_swallowed


def fail(message: str, exit_code: int = 2) -> NoReturn:
    """Ends the command with one line on stderr, also where a name in it has breaks or codes."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, and which keeps the help text's lines."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help says more")


_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_THP = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages() -> None:
    """Starts this process anew, once, with an allocator that asks Linux for huge pages.

    XLA allocates its buffers anew in every step, and on a CPU some tenth of a step goes into
    page faults of 4 KiB (docs/performance.md). glibc reads the setting when a process starts.
    Nothing is done where it would change nothing: without glibc, or where the kernel gives huge
    pages to nobody or to everybody.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc":
        return
    try:
        is_on_request = "[madvise]" in _THP.read_text()
    except OSError:
        return
    if is_on_request:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}".strip(":")
        os.execv(sys.executable, sys.orig_argv)


_MOST_SECONDS_TO_END = 10.0


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Around a command's work: after the block a signal ends the process at once, without a word.

    All is written by then. What Python, JAX and others still tidy up takes a signal badly: with a
    traceback, or a segmentation fault. Nor does the process wait long for their threads: those of
    orbax wait minutes for a folder that could not be made.
    """
    code = 1
    try:
        yield
        code = 0
    except KeyboardInterrupt as error:
        code = 128 + getattr(error, "signal_number", signal.SIGINT)
        sys.exit(code)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        _flush()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # of a job in the background
                signal.signal(number, signal.SIG_DFL)
        end_at_last = threading.Timer(_MOST_SECONDS_TO_END, os._exit, (code,))
        end_at_last.daemon = True
        end_at_last.start()
        if code > 128:
            # What XLA had under way goes on, and would read what the interpreter takes apart.
            atexit._run_exitfuncs()
            _flush()
            os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A pipe that nobody reads any more; closed, or none at all.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then ends what Ctrl-C ends: no `except Exception` takes it for an error."""

    signal_number = signal.SIGTERM


def _terminate(number: int, frame: Any) -> NoReturn:
    del number, frame
    raise _Terminated


@contextlib.contextmanager
def errors_as_lines(interrupted: str) -> Iterator[None]:
    """Turns the block's errors into a line and an exit code.

    Args:
      interrupted: what to say on Ctrl-C and on SIGTERM.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        with _as_lines(interrupted), never_swallowed():
            yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _as_lines(interrupted: str) -> Iterator[None]:
    # orbax warns of what is as it should be, and what went wrong is said in a line of our own.
    logging.set_verbosity(logging.FATAL)
    # A name that the terminal cannot show must not end what has been done.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except JepaError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except MemoryError:
        fail("this machine has not enough memory for that")
    except RuntimeError as error:
        # jax.errors.JaxRuntimeError; JAX is not imported for its name alone.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail("the device has not enough memory for that: use a smaller batch or model")
    except _Terminated:
        fail(interrupted, 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        fail(interrupted, 128 + signal.SIGINT)
