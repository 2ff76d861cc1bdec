"""Which device computes, what it is called, and how much memory it has."""

import os
import pathlib
import shutil

import jax

from jepa_jax.errors import ConfigError


def select(device: str) -> None:
    """Restricts JAX to 'cpu' or 'gpu' before its first use; 'auto' leaves the choice to JAX.

    Raises:
      ConfigError: if 'gpu' is asked for and JAX cannot use one.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "gpu":
        try:
            found = jax.default_backend() != "cpu"
        except RuntimeError:
            found = False
        if not found:
            raise ConfigError(f"config.meta.device=gpu, but JAX sees no GPU{_nvidia_hint()}")


def _nvidia_hint() -> str:
    if shutil.which("nvidia-smi") or pathlib.Path("/proc/driver/nvidia/version").exists():
        return "; an NVIDIA GPU is present: pip install -e '.[cuda12]' lets JAX use it"
    return ""


def describe() -> str:
    """The device in words, with a hint when an NVIDIA GPU is there that JAX cannot see."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return f"CPU ({os.cpu_count()} cores){_nvidia_hint()}"
    return f"{device.device_kind} ({device.platform})"


def memory_limit() -> int:
    """Bytes that arrays may take on the first local device: its own limit, or the host's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container's limit is below the host's memory, and passing it is fatal.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = min(limit, int(pathlib.Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return limit
