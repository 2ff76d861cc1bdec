"""The command as a process: how it ended, what it said, what memory it took."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
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
        peak_bytes, deadline = 0, time.monotonic() + timeout
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _most_memory(process.pid))
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.02)
        code = process.returncode
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Ended(code, *texts, peak_bytes=peak_bytes)


def _most_memory(pid: int) -> int:
    """What a process has held at most, in bytes; 0 for one that has ended.

    The system's own account of an ended child (ru_maxrss) begins with what its parent held.
    """
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def with_small_cifar(arrays: Mapping, root: pathlib.Path) -> pathlib.Path:
    """A data folder with the fixture's images as a genuine tfds cifar10."""
    from jepa_jax.data.cifar10 import write_cifar10

    write_cifar10(
        root,
        (arrays["train_images"], arrays["train_labels"]),
        (arrays["test_images"], arrays["test_labels"]),
    )
    return root
