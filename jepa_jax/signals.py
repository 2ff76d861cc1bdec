"""SIGINT and SIGTERM as a request to stop at the next good moment."""

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jepa_jax.errors import Interrupted

# Far more than a busy machine keeps a thread from leaving a function.
_AGAIN_SECONDS = 0.5


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag while `deferring`, else into Interrupted at once."""

    def __init__(self, message: str):
        self.message = message
        self.signal_number = 0
        self.deferring = False

    def handle(self, signal_number: int, frame: Any) -> None:
        del frame
        if self.deferring and not self.signal_number:
            self.signal_number = signal_number
            return
        raise Interrupted(self.message, signal_number)


def _again(number: int, left: threading.Event) -> None:
    """Sends a signal to the main thread, some time after the hook was left."""
    left.wait()
    time.sleep(_AGAIN_SECONDS)
    signal.pthread_kill(threading.main_thread().ident, number)


@contextlib.contextmanager
def never_swallowed() -> Iterator[None]:
    """In the block a signal comes again whose exception landed where Python drops exceptions.

    That is in a callback of the collector, JAX has one, and in whatever finalises an object.
    """
    previous = sys.unraisablehook

    @functools.wraps(previous)  # what others have noted on their hook stays on it
    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, Interrupted | KeyboardInterrupt):
            number = getattr(error, "signal_number", signal.SIGINT)
            # Not from here: what the handler raises in this hook is dropped, too.
            left = threading.Event()
            threading.Thread(target=_again, args=(number, left), daemon=True).start()
            left.set()
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = previous


@contextlib.contextmanager
def stop_on_signals(message: str) -> Iterator[StopRequest]:
    """Handles SIGINT and SIGTERM inside the block; the previous handlers come back after it."""
    request = StopRequest(message)
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python allows handlers in the main thread alone
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, request.handle) for number in numbers]
    try:
        with never_swallowed():
            yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
