"""The command as a process: how it ended, what it said, what memory it took."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from tests.tiny import FLAGS

ROOT = pathlib.Path(__file__).parents[2]
TINY = [*FLAGS, "--config.optim.warmup_epochs=1", "--config.optim.epochs=3"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative for a signal), its texts, its peak memory."""

    code: int
    out: str
    err: str
    peak_bytes: int

    def is_one_line(self) -> bool:
        """Whether it refused as it should: exit code 1 or 2 and one `error:` line on stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return self.code in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")


def environment(**changes: str) -> dict[str, str]:
    """This process's, with the package on the path and the suite's compiled programs."""
    cache = os.environ.get("JEPA_JAX_TEST_CACHE")
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": cache or str(pathlib.Path(tempfile.gettempdir()) / "jepa_jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return {**os.environ, "PYTHONPATH": str(ROOT), **compiled, **changes}


def run_command(
    arguments: Sequence[str],
    *,
    module: str = "jepa_jax.main",
    cwd: pathlib.Path = ROOT,
    timeout: float = 300,
    **changes: str,
) -> Ended:
    """Runs `python -m module arguments` to its end; killed, code -9, after `timeout` seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        # wait4 gives the memory of this child alone.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Ended(code, *texts, peak_bytes=usage.ru_maxrss * 1024)


def with_small_cifar(arrays: Mapping, root: pathlib.Path) -> pathlib.Path:
    """A data folder with the fixture's images as a genuine tfds cifar10."""
    from jepa_jax.data.cifar10 import write_cifar10

    write_cifar10(
        root,
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
    )
    return root
