"""One config on this machine: step, shares, start-up, rates and the roofline, and their tables."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax import device
from jepa_jax.benchmark import roofline, shares, startup
from jepa_jax.benchmark.rates import measure_rates
from jepa_jax.benchmark.step import NUM_IMAGES, measure_step, synthetic_plan
from jepa_jax.benchmark.table import (
    NOT_MEASURED,
    Table,
    gigabytes,
    number,
    percent,
    with_range,
)
from jepa_jax.config import flatten, validate
from jepa_jax.config_flags import GivenConfig, fit_to_device
from jepa_jax.errors import JepaError
from jepa_jax.loop import make_runner, train_step_of
from jepa_jax.plan import Plan, initial_state
from jepa_jax.progress import say

SCHEMA_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of every package that computes."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment() -> dict[str, Any]:
    """The machine and the versions; starts JAX's backend."""
    return {
        "device": device.describe(),
        "platform": jax.default_backend(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": device.memory_limit(),
        "versions": versions(),
    }


def document(what: str, **content: Any) -> dict[str, Any]:
    """The head of every JSON file, and its content."""
    command = " ".join(["python -m jepa_jax.benchmark", *sys.argv[1:]])
    return {"schema_version": SCHEMA_VERSION, "what": what, "command": command, **content}


def xla_counts(plan: Plan) -> dict[str, Any]:
    """FLOPs and bytes of one step by XLA's own analysis; None where it has none.

    FLOPs are those of the step as it would go to a CPU's compiler: a compiled program hides the
    work of the libraries that it calls. Bytes are those of the compiled program.
    """
    single = dataclasses.replace(plan, scan_steps=1)
    compiled = make_runner(single, initial_state(single)).program.cost_analysis() or {}
    return {
        "flops_per_step": _flops_before_compiling(plan),
        "flops_of": "the step before compilation, for a CPU",
        "bytes_per_step": compiled.get("bytes accessed"),
        "bytes_of": "the compiled step",
    }


def _flops_before_compiling(plan: Plan) -> float | None:
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return None
    batch_size = plan.config.data.batch_size
    images = jax.ShapeDtypeStruct((batch_size, *plan.dataset.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    state = jax.eval_shape(lambda: initial_state(plan))
    with jax.default_device(cpu):
        lowered = jax.jit(train_step_of(plan)).lower(state, images, labels, plan.hparams)
    return (lowered.cost_analysis() or {}).get("flops")


def measure_config(
    given: GivenConfig,
    *,
    num_images: int = NUM_IMAGES,
    with_startup: bool = True,
    is_miniature: bool = False,
) -> dict[str, Any]:
    """Everything about one config; the start-up first, while no other process is on the device.

    Raises:
      ConfigError: for a config that cannot be run.
    """
    validate(given.config)
    started: dict[str, Any] = {"error": "--no-startup"}
    if with_startup:
        say(f"{'measuring':<10}start-up")
        try:
            started = startup.measure_startup(given.flags())
        except JepaError as error:
            started = {"error": str(error)}
            say(f"{'note':<10}{error}")
    device.select(given.config.meta.device)
    fit_to_device(given)
    plan = synthetic_plan(given.config, num_images=num_images, augment="device")
    say(f"{'measuring':<10}the step, on {device.describe()}")
    step = measure_step(plan)
    say(f"{'measuring':<10}shares")
    parts, xla, after = shares.step_parts(plan), xla_counts(plan), shares.epoch_parts(plan)
    say(f"{'measuring':<10}rates of the device")
    rates = measure_rates(is_miniature=is_miniature)
    return document(
        "one config: step, shares, start-up, rates and roofline; synthetic images",
        environment=environment(),
        config=flatten(given.config.to_dict()),
        **step_beside_rates(step, rates, xla),
        shares=shares.with_shares(parts, step["step_seconds"]["median"]),
        epoch=shares.of_an_epoch(after, step["images_per_second"]["median"]),
        startup=started,
        rates=rates,
    )


def step_beside_rates(
    step: dict[str, Any], rates: dict[str, Any], xla: dict[str, Any] | None
) -> dict[str, Any]:
    """`step` with its share of the matmul rate, and `roofline`.

    Args:
      step: of `measure_step`.
      rates: of `measure_rates`.
      xla: of `xla_counts`.
    """
    matmul = rates["matmul"][step["dtype"]]["flops_per_second"]["median"]
    copy = rates["copy"]["bytes_per_second"]["median"]
    floors = roofline.floors(step["counted"], flops_per_second=matmul, bytes_per_second=copy)
    return {
        "step": {**step, "share_of_matmul_rate": step["model_flops_per_second"] / matmul},
        "roofline": {"counted": step["counted"], "xla": xla, "floor_seconds": floors},
    }


# --- what a person reads ----------------------------------------------------------------------


def rates_table(rates: dict[str, Any]) -> Table:
    """The device's measured rates."""
    rows = [
        [f"matmul {dtype}, {at['size']} x {at['size']}", "TFLOP/s"]
        + [with_range(at["flops_per_second"], 1e-12)]
        for dtype, at in rates["matmul"].items()
    ]
    copied = with_range(rates["copy"]["bytes_per_second"], 1e-9)
    rows.append(["copy, read and written", "GB/s", copied])
    return Table("Rates of the device", ("", "unit", "median (range)"), rows)


def step_table(step: dict[str, Any]) -> Table:
    """Speed and memory of a step."""
    memory = step["memory"]
    rows = [
        ["step", "ms", with_range(step["step_seconds"], 1e3)],
        ["source images", "1/s", with_range(step["images_per_second"])],
        ["views", "1/s", number(step["views_per_second"])],
        ["model FLOP/s, by hand", "TFLOP/s", number(step["model_flops_per_second"] / 1e12)],
        ["of the matmul rate", "", percent(step["share_of_matmul_rate"])],
        ["peak memory, device", "", gigabytes(memory["device_peak_bytes"])],
        ["peak memory, host process", "", gigabytes(memory["host_peak_bytes"])],
    ]
    if program := memory["program"]:
        rows.append(["the program's temporaries", "", gigabytes(program["temp"])])
        rows.append(["its arguments", "", gigabytes(program["argument"])])
    title = (
        f"A step of {step['batch_size']} images, D {step['embedding_dim']}, {step['dtype']}, "
        f"{step['optimizer']}"
    )
    note = (
        f"n = {step['step_seconds']['n']}, each the mean of {step['steps_in_a_value']} steps; "
        f"{step['steps_in_a_program']} steps a program. Images are synthetic: no time depends on "
        "what is in them."
    )
    return Table(title, ("", "unit", "median (range)"), rows, note)


def roofline_table(roof: dict[str, Any], step: dict[str, Any]) -> Table:
    """What a step counts, by hand and by XLA, and the least time that this takes."""
    counted, xla = roof["counted"], roof["xla"]
    per_view, floor = counted["multiply_adds_per_view"], roof["floor_seconds"]

    def tera(value, scale):
        return NOT_MEASURED if value is None else number(value / scale)

    rows = [
        ["multiply-adds of a view, encoder", "M", number(per_view["encoder"] / 1e6), "-"],
        ["multiply-adds of a view, projector", "M", number(per_view["projector"] / 1e6), "-"],
        [
            "FLOPs of a step",
            "T",
            number(counted["flops_per_step"] / 1e12),
            tera(xla["flops_per_step"], 1e12),
        ],
    ]
    for name, seen in (("unfused", xla["bytes_per_step"]), ("fused", None)):
        by_xla = tera(seen, 1e9) if name == "unfused" else "-"
        moved = number(counted["bytes_per_step"][name] / 1e9)
        rows.append([f"bytes of a step, {name}", "GB", moved, by_xla])
    for name, text in (
        ("arithmetic", "floor by arithmetic"),
        ("memory_unfused", "floor by memory, unfused"),
        ("memory_fused", "floor by memory, fused"),
    ):
        rows.append([text, "ms", number(floor[name] * 1e3), "-"])
    rows.append(["the step", "ms", number(step["step_seconds"]["median"] * 1e3), "-"])
    note = f"By XLA: FLOPs of {xla['flops_of']}; bytes of {xla['bytes_of']}."
    return Table("Roofline", ("", "unit", "by hand", "by XLA"), rows, note)


def _share_rows(parts: dict[str, Any], scale: float) -> list[list[str]]:
    return [
        [name, str(part["n"]), with_range(part, scale), percent(part["share"])]
        for name, part in parts.items()
    ]


def shares_table(of_step: dict[str, Any]) -> Table:
    """The parts of a step."""
    rows = [*_share_rows(of_step["parts"], 1e3), ["sum", "", "", percent(of_step["sum"])]]
    note = (
        "Each part is compiled and timed alone, so the sum is not 100 %: XLA fuses across their "
        "borders and overlaps them."
    )
    return Table("Shares of a step", ("", "n", "ms, median (range)", "of the step"), rows, note)


def epoch_table(epoch: dict[str, Any]) -> Table:
    """What follows an epoch."""
    title = (
        f"After an epoch of {epoch['epoch_images']:,} images "
        f"({number(epoch['epoch_seconds'])} s of steps)"
    )
    header = ("", "n", "s, median (range)", "of the epoch")
    return Table(title, header, _share_rows(epoch["parts"], 1.0))


def startup_table(started: dict[str, Any]) -> Table:
    """Cold and warm."""
    header = ("", "n", "s, median (range)")
    title = "From the command to its first step"
    if "error" in started:
        rows = [[name, "0", NOT_MEASURED] for name in ("empty cache", "warm cache")]
        return Table(title, header, rows, started["error"])
    rows = [
        [f"{name} cache", str(started[kind]["n"]), with_range(started[kind])]
        for name, kind in (("empty", "cold"), ("warm", "warm"))
    ]
    return Table(title, header, rows)


def tables(result: dict[str, Any]) -> list[Table]:
    """All of `measure_config`."""
    return [
        step_table(result["step"]),
        roofline_table(result["roofline"], result["step"]),
        shares_table(result["shares"]),
        epoch_table(result["epoch"]),
        startup_table(result["startup"]),
        rates_table(result["rates"]),
    ]
