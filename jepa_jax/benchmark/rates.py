"""What the device does at best: matrix products and copies, measured."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.benchmark.timing import sample, spread

# The largest saturate the device; a smaller one may still be the fastest.
_SIZES = {"cpu": (1024, 2048), "other": (4096, 8192, 16384)}
_COPIED_BYTES = {"cpu": 2**28, "other": 2**31}


def _kind() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "other"


def matmul_rate(dtype: str, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """FLOP/s of square matrix products, at the fastest of several sizes.

    float32 products run at JAX's default precision, as the model's do: TF32 on a recent GPU.

    Args:
      dtype: 'float32' or 'bfloat16'.
      sizes: sides of the matrices; by default some that fill the device.
    """
    product = jax.jit(jnp.matmul)
    best: dict[str, Any] = {}
    for size in sizes or _SIZES[_kind()]:
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = sample(lambda matrix=matrix: product(matrix, matrix), budget_seconds=20)
        rates = spread([2 * size**3 / value for value in seconds])
        if not best or rates["median"] > best["flops_per_second"]["median"]:
            best = {"size": size, "flops_per_second": rates}
    return best


def copy_rate(num_bytes: int | None = None) -> dict[str, Any]:
    """Bytes per second of an elementwise pass over a large float32 array, read and written."""
    num_bytes = num_bytes or _COPIED_BYTES[_kind()]
    one = jnp.float32(1.0)  # without an addition XLA would hand the array back
    # In place: on a CPU the pages of a new array would cost more than the copy.
    add = jax.jit(jnp.add, donate_argnums=0)
    array = jnp.zeros((num_bytes // 4,), jnp.float32)

    def copy():
        nonlocal array
        array = add(array, one)
        return array

    seconds = sample(copy, budget_seconds=20)
    return {
        "bytes": num_bytes,
        "bytes_per_second": spread([2 * num_bytes / value for value in seconds]),
    }


def measure_rates(*, is_miniature: bool = False) -> dict[str, Any]:
    """matmul {float32, bfloat16} and copy; in miniature of sizes that saturate nothing."""
    sizes, num_bytes = ((128,), 2**20) if is_miniature else (None, None)
    return {
        "matmul": {dtype: matmul_rate(dtype, sizes) for dtype in ("float32", "bfloat16")},
        "copy": copy_rate(num_bytes),
    }
