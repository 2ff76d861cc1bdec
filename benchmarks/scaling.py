"""How much is sent in a step of many devices, and what that costs: counted, modelled, measured.

    python -m benchmarks.scaling --config=configs/rapid.py --devices 8 --out scaling.json
    python -m benchmarks.scaling --measure --out measured.json

The first compiles the step for so many virtual CPU devices and counts the bytes of every
collective in the compiled program; nothing is run. The second times configs/cpu.py on one core, on
both and in two processes of a core each, in turns.
"""

import argparse
import math
import pathlib
import re
from typing import Any

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# One shape, or a tuple of them, then the operation and, at the end, who did it.
_LINE = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-start)?\(.*?op_name=\"([^\"]*)\"")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(program: str, num_devices: int) -> list[dict[str, Any]]:
    """Every collective of a compiled program, with the bytes that each device sends.

    By the ring algorithms: (N - 1) / N of the result for an all-gather, as much of the operand for
    a reduce-scatter, twice that for an all-reduce; whatever is permuted.
    """
    found = []
    for shapes, kind, name in _LINE.findall(program):
        size = sum(
            _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in _SHAPE.findall(shapes)
            if dtype in _BYTES
        )
        share = (num_devices - 1) / num_devices
        times = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share}
        # The result of a reduce-scatter is one part of what went in.
        times["reduce-scatter"] = num_devices - 1
        sent = times.get(kind, 1.0) * size
        found.append({"kind": kind, "bytes": size, "sent": sent, "purpose": _purpose(name)})
    return found


def _purpose(name: str) -> str:
    """What a collective is for, by the scopes of the step and the modules of the network."""
    is_backward = "transpose(" in name
    if "BatchNorm" in name or "_norm" in name:
        return "BatchNorm, backward" if is_backward else "BatchNorm, forward"
    if "loss" in name:
        return "loss, backward" if is_backward else "loss, forward"
    if "model" in name:
        return "gradients" if is_backward else "model, forward"
    for scope in ("augment", "optimizer", "finite", "probe"):
        if scope in name:
            return scope
    return "other"


def count(arguments: argparse.Namespace) -> dict[str, Any]:
    """The collectives of one step, summed by purpose."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)

    import numpy as np

    from jepa_jax.config_flags import load_config
    from jepa_jax.data import from_arrays
    from jepa_jax.loop import make_runner
    from jepa_jax.plan import make_plan

    config = load_config(arguments.config)
    config.training.scan_steps = 1
    config.training.use_amp = False
    config.model.stem_init = "random"
    config.training.shard_params = arguments.shard_params
    config.data.placement = "stream"
    config.data.num_val = 100
    batch = config.data.batch_size = arguments.batch_size or config.data.batch_size
    images = np.zeros((batch, arguments.size, arguments.size, 3), np.uint8)
    dataset = from_arrays(images, np.arange(batch) % 10)
    config.optim.warmup_epochs = 0.0
    plan = make_plan(config, pathlib.Path(), dataset, None, None, None, None, jax.devices())
    state = jax.eval_shape(plan.create_state, plan.hparams)
    program = make_runner(plan, state).program
    found = collectives(program.as_text(), arguments.devices)
    by_purpose: dict[str, Any] = {}
    for one in found:
        row = by_purpose.setdefault(
            one["purpose"], {"count": 0, "sent_megabytes": 0.0, "kinds": {}}
        )
        row["count"] += 1
        row["sent_megabytes"] += one["sent"] / 1e6
        row["kinds"][one["kind"]] = row["kinds"].get(one["kind"], 0) + 1
    return {
        "config": arguments.config,
        "devices": arguments.devices,
        "batch_size": batch,
        "shard_params": arguments.shard_params,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "flops_per_device": (program.cost_analysis() or {}).get("flops"),
        "sent_megabytes": sum(row["sent_megabytes"] for row in by_purpose.values()),
        "by_purpose": by_purpose,
    }
