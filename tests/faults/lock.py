"""Promise 4: of two runs in one folder the second is refused, and a dead one blocks nobody.

python -m tests.faults.lock [long]
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from tests.faults.cases import small_arrays
from tests.faults.processes import TINY, environment, run_command, with_small_cifar
from tests.faults.table import Row, as_markdown, row_of

# Long enough to be there when the second comes.
_LENGTH = ["--config.optim.epochs=4000"]
_COMMANDS = {
    "jepa_jax.main": [*TINY, *_LENGTH, "--noreport"],
    "jepa_jax.sweep": [*TINY, *_LENGTH, "--grid", "optim.lr=0.1,0.2", "--seeds=1", "--stack=1"],
}
_SECONDS = 120.0


def _start(module: str, work: pathlib.Path, data: pathlib.Path) -> subprocess.Popen:
    """The command in the folder `run`, once it has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *_COMMANDS[module], "--workdir=run"],
        cwd=work,
        env=environment(EBJEPA_DSETS=str(data)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if json.loads((work / "run" / ".lock").read_text()).get("pid") == process.pid:
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    return process


def _end(process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)
    process.wait(_SECONDS)


def _attack(module: str, number: int, work: pathlib.Path, data: pathlib.Path) -> list[str | None]:
    """What went wrong with a second process beside a first, and with a third after its end."""
    work.mkdir()
    first = _start(module, work, data)
    arguments = [*_COMMANDS[module], "--workdir=run"]
    second = run_command(arguments, module=module, cwd=work, EBJEPA_DSETS=str(data))
    is_named = f"in use by process {first.pid} on" in second.err
    is_refused = second.is_one_line() and is_named and first.poll() is None
    _end(first, number)
    third = _start(module, work, data)
    has_it = third.poll() is None
    _end(third, signal.SIGKILL)
    return [
        None if is_refused else f"{module}: the second ended with {second.code}: {second.err}",
        None if has_it else f"{module}: after signal {number} the next one ended at once",
    ]


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Runs and sweeps, the first ended by a kill and by a polite signal."""
    data = with_small_cifar(small_arrays(), folder / "data")
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 3 if is_long else [signal.SIGKILL]
    refused, given_back = [], []
    for module in _COMMANDS if is_long else ["jepa_jax.main"]:
        for place, number in enumerate(numbers):
            found = _attack(module, number, folder / f"{module}-{place}", data)
            refused.append(found[0])
            given_back.append(found[1])
    yield row_of(4, "a second process in the folder of a run or a sweep", refused)
    yield row_of(4, "a process after one that died there", given_back)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = list(rows("long" in sys.argv, pathlib.Path(name)))
    print(as_markdown(found))
    print(json.dumps([failure for row in found for failure in row.failures], indent=1))
