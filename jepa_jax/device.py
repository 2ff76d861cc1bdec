"""Which device computes, what it is called, how much memory it has, and how XLA is set up for it.

What XLA is told here is for whole processes, so only commands call `select`; a program of one's
own that trains on a CPU may do the same before JAX's first use.
"""

import contextlib
import os
import pathlib
import platform
import shutil
import zlib

import jax
import jaxlib

from jepa_jax.errors import ConfigError

# XLA hands a CPU's convolutions to YNNPACK, which computes their gradients at half Eigen's speed
# (docs/performance.md). It still gets products and sums. An unknown flag ends the process, so this
# one is for the versions it was tried with (0.10.2 and 0.12.0) and what lies between.
_XLA_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_XLA_FLAG_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
_FLAG_VERSIONS = ((0, 10), (0, 13))
_MANY_CPUS = "xla_force_host_platform_device_count"
# A training program takes seconds to compile, but so do a hundred small ones together.
_CACHED_FROM_SECONDS = 0.1


def select(device: str) -> None:
    """Gets JAX ready, before its first use, to run on 'cpu', 'gpu' or, if 'auto', on either.

    Compiled programs are kept in the user's cache folder, and on a CPU XLA's faster convolutions
    are chosen; JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and XLA_FLAGS come first.

    Raises:
      ConfigError: if 'gpu' is asked for and JAX cannot use one.
    """
    prepare(device)
    check(device)


def prepare(device: str) -> None:
    """The part of `select` that starts no backend: other processes may be joined after it."""
    _choose_convolutions()
    _keep_compiled_programs()
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if _MANY_CPUS in os.environ.get("XLA_FLAGS", ""):
        # On few cores steps that overlap may wait for each other's threads.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def check(device: str) -> None:
    """The part of `select` that starts the backend.

    Raises:
      ConfigError: if 'gpu' is asked for and JAX cannot use one.
    """
    if device != "gpu":
        return
    try:
        found = jax.default_backend() != "cpu"
    except RuntimeError:
        found = False
    if not found:
        raise ConfigError(f"config.meta.device=gpu, but JAX sees no GPU{_nvidia_hint()}")


def split_cpu() -> None:
    """Makes every core a CPU device, before JAX's first use; GPUs stay what they are.

    Two small networks on a core each train faster than one after another on both cores
    (docs/sweeps.md). A number of devices in XLA_FLAGS comes first, and where JAX has started
    already its devices stay what they are.
    """
    if _MANY_CPUS not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", os.cpu_count())


def _choose_convolutions() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    lowest, above = _FLAG_VERSIONS
    version = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
    if lowest <= version < above and _XLA_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_XLA_FLAG}={_XLA_FLAG_VALUE}".strip()


def _keep_compiled_programs() -> None:
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM_SECONDS)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    # A home folder may be shared by machines, and a program holds one processor's instructions.
    folder = root / "jepa_jax" / f"{platform.machine()}-{zlib.crc32(_processor_features()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor_features() -> bytes:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features"))}))


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
