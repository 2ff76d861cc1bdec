"""Names the process whose loss ended this one: run by `distributed.initialize`, never imported.

JAX ends a process that has lost another one from C++, with a stack trace and without a word to
Python. So what a process writes to stderr goes through this small one, which outlives it, and adds
a line where the end was of that kind.
"""

import re
import signal
import sys

_FATAL = "JAX distributed service detected fatal errors"
_SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\d+\s*,?\s*)+)")
_LEADER = "Failed to send RPC to coordination service"
_KEPT = 1 << 16


def last_words(text: str, process_id: int) -> str:
    """The line to end with, of the last that a process wrote; '' for any other end."""
    if _FATAL not in text:
        return ""
    lost = "another process"
    if found := _SILENT.search(text):
        others = [number for number in re.findall(r"\d+", found[1]) if int(number) != process_id]
        if others:
            lost = f"process{'es' * (len(others) > 1)} {', '.join(others)}"
    elif _LEADER in text:
        lost = "process 0"
    return (
        f"error: {lost} was lost, and process {process_id} with it: the same command in all "
        "processes goes on from the last checkpoint"
    )


def _main() -> None:
    # It ends with the process that it reads from, and not before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    kept = b""
    while piece := sys.stdin.buffer.raw.read(1 << 16):
        sys.stderr.buffer.write(piece)
        sys.stderr.buffer.flush()
        kept = (kept + piece)[-_KEPT:]
    if line := last_words(kept.decode(errors="replace"), int(sys.argv[1])):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    _main()
