"""Promise 3: a full disk, a folder that may not be written, a drive that goes away.

    python -m tests.faults.disk [long]

mounts small file systems, for which it has to be root, or in a user namespace of its own:

    unshare --map-root-user --mount python -m tests.faults.disk

A run is disturbed at a moment drawn from `SEED`. It goes on or ends in one line; with the disk as
it was, the same command ends in the parameters of a run that nobody disturbed.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from jepa_jax.metrics import read_metrics
from tests.faults.cases import small_arrays
from tests.faults.processes import TINY, environment, run_command, with_small_cifar
from tests.faults.table import Row, as_markdown, row_of

SEED = 13
_NUM_EPOCHS = 8
_RUN = [*TINY, f"--config.optim.epochs={_NUM_EPOCHS}", "--noreport"]
_SIZE = "12m"
_SECONDS = 180.0


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextlib.contextmanager
def _drive(folder: pathlib.Path, size: str = _SIZE) -> Iterator[pathlib.Path]:
    """A small file system of its own at a folder."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _fill(drive: pathlib.Path) -> Callable[[], None]:
    """Leaves no byte of a drive; what comes back makes room again."""
    ballast = drive / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast.unlink


def _forbid(drive: pathlib.Path) -> Callable[[], None]:
    """Makes a drive read-only; what comes back undoes that."""
    # A file that is open for writing forbids the plain remount, and bound over itself it is obeyed.
    _mount("--bind", str(drive), str(drive))
    _mount("-o", "remount,bind,ro", str(drive))
    return lambda: subprocess.run(["umount", "-l", str(drive)], check=True)


def _take_away(drive: pathlib.Path) -> Callable[[], None]:
    """Unmounts a drive in use, with an empty read-only one in its place; then puts it back."""
    kept = drive.with_name(drive.name + "-kept")
    kept.mkdir()
    _mount("--bind", str(drive), str(kept))
    subprocess.run(["umount", "-l", str(drive)], check=True)
    _mount("-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", str(drive))

    def put_back():
        subprocess.run(["umount", "-l", str(drive)], check=True)
        _mount("--bind", str(kept), str(drive))
        subprocess.run(["umount", "-l", str(kept)], check=True)

    return put_back


_FAULTS = {"a full disk": _fill, "a read-only drive": _forbid, "a drive taken away": _take_away}


def _is_whole(workdir: pathlib.Path) -> str | None:
    """None if every JSON file and every line of metrics.jsonl but the last can be read."""
    for path in workdir.glob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            return f"{path.name}: {error}"
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines[:-1]):
        try:
            json.loads(line)
        except ValueError:
            return f"line {number} of metrics.jsonl is broken: {line[:60]!r}"
    return None


def _disturbed(drive: pathlib.Path, data: pathlib.Path, disturb, epoch: int) -> tuple[str, list]:
    """Starts a run on a drive and disturbs it after an epoch.

    Returns:
      (what went wrong, or nothing; what makes the drive as it was).
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "jepa_jax.main", *_RUN, f"--workdir={drive / 'run'}"],
            env=environment(EBJEPA_DSETS=str(data)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        metrics, deadline = drive / "run" / "metrics.jsonl", time.monotonic() + _SECONDS
        while len(read_metrics(metrics)) < epoch and process.poll() is None:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                process.kill()
        undo = disturb(drive)
        try:
            code = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "no end"
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.strip()]
    is_fine = code == 0 and not lines
    is_one_line = code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")
    wrong = "" if is_fine or is_one_line else f"ended with {code}: {' | '.join(lines)[-600:]}"
    return wrong, [undo]


def _attack(
    name: str, epoch: int, folder: pathlib.Path, data: pathlib.Path
) -> tuple[str | None, str | None]:
    """One run disturbed after an epoch, and the same command after the disk was mended.

    Returns:
      (what went wrong, the digest of the parameters that it ended in), one of them None.
    """
    with _drive(folder) as drive:
        wrong, undo = _disturbed(drive, data, _FAULTS[name], epoch)
        undo[0]()
        wrong = wrong or _is_whole(drive / "run")
        again = run_command(
            [*_RUN, f"--workdir={drive / 'run'}"], EBJEPA_DSETS=str(data), timeout=_SECONDS
        )
        digest = None
        if again.code != 0:
            wrong = wrong or f"then ended with {again.code}: {again.err[-600:]}"
        elif not wrong:
            digest = json.loads((drive / "run" / "summary.json").read_text())["params_digest"]
            steps = [row["step"] for row in read_metrics(drive / "run" / "metrics.jsonl")]
            if steps != sorted(set(steps)):
                wrong = f"metrics.jsonl has the steps {steps}"
    return (f"{name} after epoch {epoch}: {wrong}" if wrong else None), digest


def _judged(outcome: tuple[str | None, str | None], digest: str | None) -> str | None:
    """What went wrong with an attack, `digest` being that of a run that nobody disturbed."""
    wrong, ended_in = outcome
    return wrong or (None if digest and ended_in == digest else "then ended in other parameters")


def _at_the_start(folder: pathlib.Path, data: pathlib.Path) -> Iterator[str | None]:
    """Drives that take nothing when a run begins: one line, exit code 2."""
    for name, disturb in _FAULTS.items():
        with _drive(folder / f"start {name}") as drive:
            undo = disturb(drive)
            found = run_command([*_RUN, f"--workdir={drive / 'run'}"], EBJEPA_DSETS=str(data))
            undo()
        yield None if found.is_one_line() else f"{name} at the start: {found.code}: {found.err}"


def _preparing(folder: pathlib.Path) -> Iterator[str | None]:
    """A data folder that is full or read-only while a dataset is written: one line, no rest."""
    code = (
        "import pathlib, sys, numpy as np\n"
        "from jepa_jax.command import errors_as_lines\n"
        "from jepa_jax.data import cifar10\n"
        "def source(root, staging):\n"
        "    images = np.random.default_rng(0).integers(0, 256, (10000, 3, 32, 32), np.uint8)\n"
        "    batch = cifar10._batch_bytes('a batch', images, [0] * 10000)\n"
        "    return {name: batch for name in cifar10.BATCH_MD5}\n"
        "cifar10._from_first_source = source\n"
        "with errors_as_lines(''):\n"
        "    cifar10.prepare(pathlib.Path(sys.argv[1]))\n"
    )
    for name, size, disturb in (("full", "2m", None), ("read-only", _SIZE, _forbid)):
        with _drive(folder / f"data {name}", size) as drive:
            undo = disturb(drive) if disturb else None
            found = subprocess.run(
                [sys.executable, "-c", code, str(drive)],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
            lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
            left = [path.name for path in drive.iterdir() if "preparing" in path.name]
            if undo:
                undo()
        is_fine = found.returncode == 2 and len(lines) == 1 and not left
        tail = f"{found.returncode}, left {left}: {found.stderr[-600:]}"
        yield None if is_fine and "Traceback" not in found.stderr else f"{name} data folder: {tail}"


def _report(folder: pathlib.Path, data: pathlib.Path) -> Iterator[str | None]:
    """A report that finds no room is a note at the end of a run that is done."""
    with _drive(folder / "report") as drive:
        run = [f"--workdir={drive / 'run'}"]
        first = run_command([*_RUN, *run], EBJEPA_DSETS=str(data))
        undo = _fill(drive)
        second = run_command([a for a in _RUN if a != "--noreport"] + run, EBJEPA_DSETS=str(data))
        undo()
    is_fine = first.code == second.code == 0 and "no report was written" in second.out
    wrong = f"report on a full disk: {first.code}, {second.code}: {second.err[-600:]}"
    yield None if is_fine and "Traceback" not in second.err else wrong


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Three kinds of disk at drawn epochs of a run; at its start; data folders; the report."""
    data = with_small_cifar(small_arrays(), folder / "data")
    random = np.random.default_rng(SEED)
    digest = None

    def digest_of_a_whole_run() -> str | None:
        whole = run_command([*_RUN, f"--workdir={folder / 'whole'}"], EBJEPA_DSETS=str(data))
        path = folder / "whole" / "summary.json"
        return None if whole.code else json.loads(path.read_text())["params_digest"]

    for name in _FAULTS if is_long else ["a full disk"]:
        epochs = random.integers(1, _NUM_EPOCHS, 8 if is_long else 1)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            attacks = [
                pool.submit(_attack, name, int(epoch), folder / f"{name} {place}", data)
                for place, epoch in enumerate(epochs)
            ]
            digest = digest or pool.submit(digest_of_a_whole_run).result()
            outcomes = [_judged(attack.result(), digest) for attack in attacks]
        yield row_of(3, f"{name} in the middle of a run, and the same command after it", outcomes)
    if not is_long:
        return
    yield row_of(
        3, "a disk that takes nothing when a run begins", list(_at_the_start(folder, data))
    )
    yield row_of(3, "one while a dataset is written", list(_preparing(folder)))
    yield row_of(3, "one while the report is written", list(_report(folder, data)))


def main(is_long: bool) -> None:
    """Prints the table, and what went wrong as JSON."""
    with tempfile.TemporaryDirectory() as name:
        found = list(rows(is_long, pathlib.Path(name)))
    print(as_markdown(found))
    print(json.dumps([failure for row in found for failure in row.failures], indent=1))
    sys.exit(any(row.failures for row in found))


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("mounting needs root: unshare --map-root-user --mount python -m tests.faults.disk")
    main("long" in sys.argv)
