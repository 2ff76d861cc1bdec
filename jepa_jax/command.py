"""What every command shares: one line on stderr and a non-zero exit for what a person can mend."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import logging

from jepa_jax.errors import JepaError


def fail(message: str, exit_code: int = 2) -> NoReturn:
    """Ends the command with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, and which keeps the help text's lines."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help says more")


@contextlib.contextmanager
def errors_as_lines(interrupted: str) -> Iterator[None]:
    """Turns the block's errors into a line and an exit code.

    Args:
      interrupted: what to say on Ctrl-C.
    """
    # orbax warns of what is as it should be.
    logging.set_verbosity(logging.ERROR)
    # A name that the terminal cannot show must not end what has been done.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except JepaError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(interrupted, 128 + signal.SIGINT)
