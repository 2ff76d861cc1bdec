"""What a run's bits may depend on beside its config: versions, machine, flags, revision, command.

Stored with the run, so that a number can be made again: the same of all of these, and the same
config, is the same bits on a CPU.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

import jepa_jax
from jepa_jax import device

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-datasets",
    "ml_collections",
)
_ROOT = pathlib.Path(jepa_jax.__file__).parents[1]
# A disk that does not answer must not hold up a run.
_GIT_SECONDS = 2.0
# Set inside a hook, they would speak of another checkout.
_GIT_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


def describe_environment() -> dict[str, Any]:
    """What stands beside the config; starts JAX's backend, imports nothing else, never raises.

    Returns:
      strings, numbers and None, by name: 'python', every package's version (None if it is not
      installed), 'jepa_jax', 'git' (see `git_revision`), 'device', 'num_devices', 'processor',
      'cores' (that this process may use), 'memory_gib' (of the machine), 'system', 'command'
      (see `without_folders`), and XLA_FLAGS and every JAX_* variable that is set.
    """
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "jepa_jax": jepa_jax.__version__,
        "git": git_revision(_ROOT),
        "device": device.describe(),
        "num_devices": jax.local_device_count(),
        "processor": processor(),
        "cores": _usable_cores(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "command": " ".join(without_folders(sys.orig_argv)),
        **_flags(),
    }


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Arguments as they may be shown: of an absolute path, also after `--flag=`, its last part."""
    shown = []
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if not separator or pathlib.PurePath(argument).is_absolute():
            flag, separator, value = "", "", argument
        if pathlib.PurePath(value).is_absolute():
            value = pathlib.PurePath(value).name
        shown.append(f"{flag}{separator}{value}")
    return shown


def git_revision(root: pathlib.Path) -> str | None:
    """The commit of the checkout at `root`, with '+changes' if Python files differ from it.

    Changed are also files that git does not know and does not ignore; other kinds of file decide
    no number.

    Returns:
      None where `root` is no checkout's uppermost folder (a package's own folder may lie inside
      another project's), and without git, without its consent, or without a commit.
    """
    if not (root / ".git").exists():
        return None
    variables = {name: v for name, v in os.environ.items() if name not in _GIT_PLACES}
    # Both answers from one process; its lock could be in the way of a commit.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--", "*.py"]
    try:
        answer = subprocess.run(
            command,
            cwd=root,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.splitlines()
    commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if not commits or commits[0] == "(initial)":
        return None
    has_changes = any(not line.startswith("#") for line in lines)
    return f"{commits[0]}+changes" if has_changes else commits[0]


def processor() -> str:
    """The processor's name; of what kind it is, where it has none."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    # XLA makes as many threads, and the bits of a sum depend on them.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _flags() -> dict[str, str]:
    names = sorted(n for n in os.environ if n == "XLA_FLAGS" or n.startswith("JAX_"))
    return {name: " ".join(without_folders(os.environ[name].split())) for name in names}
