"""One config on this machine: step, shares, start-up, rates and the roofline, and their tables."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import sys
from typing import Any

import jax

from jepa_jax import device
from jepa_jax.benchmark import roofline, shares, startup
from jepa_jax.benchmark.rates import measure_rates
from jepa_jax.benchmark.step import (
    NUM_IMAGES,
    make_runner,
    measure_step,
    synthetic_plan,
)
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


def _xla_counts(plan: Plan) -> dict[str, float] | None:
    """FLOPs and bytes of one step by XLA's analysis of the compiled program."""
    single = dataclasses.replace(plan, scan_steps=1)
    analysis = make_runner(single, initial_state(single)).program.cost_analysis()
    if not analysis:
        return None
    return {
        "flops_per_step": analysis.get("flops"),
        "bytes_per_step": analysis.get("bytes accessed"),
    }


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
    of_step = shares.step_shares(plan, step["step_seconds"]["median"])
    of_epoch = shares.epoch_shares(plan, step["images_per_second"]["median"])
    say(f"{'measuring':<10}rates of the device")
    rates = measure_rates(is_miniature=is_miniature)
    matmul = rates["matmul"][step["dtype"]]["flops_per_second"]["median"]
    copy = rates["copy"]["bytes_per_second"]["median"]
    return document(
        "one config: step, shares, start-up, rates and roofline; synthetic images",
        environment=environment(),
        config=flatten(given.config.to_dict()),
        step={**step, "share_of_matmul_rate": step["model_flops_per_second"] / matmul},
        shares=of_step,
        epoch=of_epoch,
        startup=started,
        rates=rates,
        roofline={
            "counted": step["counted"],
            "xla": _xla_counts(plan),
            "floor_seconds": roofline.floors(
                step["counted"], flops_per_second=matmul, bytes_per_second=copy
            ),
        },
    )


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


def _step_table(step: dict[str, Any]) -> Table:
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


def _roofline_table(roof: dict[str, Any], step: dict[str, Any]) -> Table:
    counted, xla = roof["counted"], roof["xla"] or {}
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
            tera(xla.get("flops_per_step"), 1e12),
        ],
    ]
    for name, seen in (("unfused", xla.get("bytes_per_step")), ("fused", None)):
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
    return Table("Roofline", ("", "unit", "by hand", "by XLA"), rows)


def _share_tables(result: dict[str, Any]) -> list[Table]:
    parts = result["shares"]["parts"]
    rows = [[name, with_range(part, 1e3), percent(part["share"])] for name, part in parts.items()]
    rows.append(["sum", "", percent(result["shares"]["sum"])])
    note = (
        "Each part is compiled and timed alone, so the sum is not 100 %: XLA fuses across their "
        "borders and overlaps them."
    )
    epoch = result["epoch"]
    after = [
        [name, with_range(part), percent(part["share"])] for name, part in epoch["parts"].items()
    ]
    title = (
        f"After an epoch of {epoch['epoch_images']:,} images "
        f"({number(epoch['epoch_seconds'])} s of steps)"
    )
    return [
        Table("Shares of a step", ("", "ms, median (range)", "of the step"), rows, note),
        Table(title, ("", "s, median (range)", "of the epoch"), after),
    ]


def startup_table(started: dict[str, Any]) -> Table:
    """Cold and warm."""
    header = ("", "n", "s, median (range)")
    title = "From the command to its first step"
    if "error" in started:
        rows = [[name, "0", NOT_MEASURED] for name in ("empty cache", "warm cache")]
        return Table(title, header, rows, started["error"])
    warm = started["warm"]
    rows = [
        ["empty cache", "1", number(started["cold"]["seconds"])],
        ["warm cache", str(warm["n"]), with_range(warm)],
    ]
    return Table(title, header, rows)


def tables(result: dict[str, Any]) -> list[Table]:
    """All of `measure_config`."""
    return [
        *step_tables(result),
        startup_table(result["startup"]),
        rates_table(result["rates"]),
    ]


def step_tables(result: dict[str, Any]) -> list[Table]:
    """Those of `measure_config` about the step and the epoch."""
    return [
        _step_table(result["step"]),
        _roofline_table(result["roofline"], result["step"]),
        *_share_tables(result),
    ]
