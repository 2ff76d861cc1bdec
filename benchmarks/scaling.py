"""How much is sent in a step of many devices, and what that costs: counted, modelled, measured.

    python -m benchmarks.scaling --config=configs/rapid.py --devices 8 --out scaling.json
    python -m benchmarks.scaling --measure --out measured.json

The first compiles the step for so many virtual CPU devices and counts the bytes of every
collective in the compiled program; nothing is run. The second times configs/cpu.py on one core, on
both and in two processes of a core each, in turns.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import socket
import statistics
import subprocess
import sys
from typing import Any

from jepa_jax.command import Parser, errors_as_lines

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# One shape, or a tuple of them, then the operation and, at the end, who did it.
_LINE = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-start)?\(.*?op_name=\"([^\"]*)\"")
# Published, per GPU and direction: NVLink of an H100 inside a node, InfiniBand NDR between nodes.
_LINKS = (
    (8, "NVLink, 450 GB/s", 450.0),
    (64, "InfiniBand NDR, 50 GB/s", 50.0),
    (1024, "InfiniBand NDR, 50 GB/s", 50.0),
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(program: str, num_devices: int) -> list[dict[str, Any]]:
    """Every collective of a compiled program, with the bytes that each device sends.

    By the ring algorithms: (N - 1) / N of the result for an all-gather, as much of the operand for
    a reduce-scatter, twice that for an all-reduce; whatever is permuted.
    """
    found = []
    share = (num_devices - 1) / num_devices
    # The result of a reduce-scatter is one part of what went in.
    times = {"all-reduce": 2 * share, "reduce-scatter": num_devices - 1, "collective-permute": 1.0}
    for shapes, kind, name in _LINE.findall(program):
        for dtype, dims in _SHAPE.findall(shapes):
            # XLA sends several arrays in one collective, which has the name of one of them.
            shape = [int(n) for n in dims.split(",") if n]
            size = _BYTES[dtype] * math.prod(shape)
            sent = times.get(kind, share) * size
            found.append({"kind": kind, "sent": sent, "purpose": _purpose(name, len(shape))})
    return found


def _purpose(name: str, num_axes: int) -> str:
    """What an array is sent for, by the scopes of the step."""
    is_backward = "transpose(" in name
    if "loss" in name:
        return "loss, backward" if is_backward else "loss, forward"
    if "model" in name and num_axes > 1:
        return "gradients of weights"
    if "model" in name:
        return "BatchNorm and biases, " + ("backward" if is_backward else "forward")
    return "the rest"


def count(arguments: argparse.Namespace) -> dict[str, Any]:
    """The collectives of one step, summed by purpose."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)

    import numpy as np

    from jepa_jax import device
    from jepa_jax.config_flags import given_config
    from jepa_jax.data import from_arrays
    from jepa_jax.loop import make_runner
    from jepa_jax.plan import make_plan

    # Nothing is run: a step may be larger than this machine.
    device.memory_limit = lambda: math.inf
    config = given_config([f"--config={arguments.config}"]).config
    batch = arguments.batch_size or config.data.batch_size
    changes = {
        "data.batch_size": batch,
        "data.num_val": 2,
        "data.placement": "stream",
        "model.stem_init": "random",
        "optim.warmup_epochs": 0.0,
        "training.shard_params": arguments.shard_params,
        "training.use_amp": False,
    }
    config.update_from_flattened_dict(changes)
    dataset = from_arrays(np.zeros((batch, 32, 32, 3), np.uint8), np.arange(batch) % 10)
    plan = make_plan(config, pathlib.Path(), dataset, None, None, None, None, jax.devices())
    state = jax.eval_shape(plan.create_state, plan.hparams)
    program = make_runner(plan, state).program
    rows: dict[str, Any] = {}
    for one in collectives(program.as_text(), arguments.devices):
        row = rows.setdefault(one["purpose"], {"count": 0, "sent_megabytes": 0.0, "kinds": {}})
        row["count"] += 1
        row["sent_megabytes"] += one["sent"] / 1e6
        row["kinds"][one["kind"]] = row["kinds"].get(one["kind"], 0) + 1
    return {
        "config": arguments.config,
        "devices": arguments.devices,
        "batch_size": batch,
        "shard_params": arguments.shard_params,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "sent_megabytes": sum(row["sent_megabytes"] for row in rows.values()),
        "by_purpose": rows,
    }


def modelled(sent_megabytes: float, counted_at: int, step_seconds: float) -> list[dict[str, Any]]:
    """A model, not a measurement: the share of the time in which devices compute.

    Weak scaling: every device has the batch that took `step_seconds` alone. Nothing sent overlaps
    with computing, and every byte goes over the slowest link at its published speed.
    """
    rows = []
    for devices, link, gigabytes in _LINKS:
        share = (1 - 1 / devices) / (1 - 1 / counted_at)  # of the ring algorithms
        seconds = share * sent_megabytes / 1e3 / gigabytes
        rows.append(
            {
                "devices": devices,
                "link": link,
                "sending_milliseconds": 1e3 * seconds,
                "efficiency": step_seconds / (step_seconds + seconds),
            }
        )
    return rows


# --- measured -----------------------------------------------------------------------------------

_TIMED = """
import json, pathlib, sys, time
from jepa_jax import device, distributed
num_processes, process_id, port, seconds = map(int, sys.argv[1:])
device.prepare("cpu")
if num_processes > 1:
    distributed.initialize(f"127.0.0.1:{port}", num_processes, process_id)
import jax, numpy as np
from configs import cpu
from jepa_jax.data import from_arrays
from jepa_jax.loop import make_runner
from jepa_jax.plan import initial_state, make_plan
config = cpu.get_config()
config.update_from_flattened_dict({"data.num_val": 100, "model.stem_init": "random"})
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (9600, 32, 32, 3), np.uint8)
dataset = from_arrays(images, np.arange(9600) % 10)
plan = make_plan(config, pathlib.Path(), dataset, None, None, None, None, jax.devices())
state = initial_state(plan)
runner = make_runner(plan, state)
state, order, steps = runner.place(state), plan.batches_of(0), 0
def run(count):
    global state
    for newest, metrics, _ in runner.run(state, order[:count]):
        state = newest
    jax.block_until_ready(state)
run(5)
began = time.perf_counter()
run(len(order) * seconds // 10)
num_images = config.data.batch_size * (len(order) * seconds // 10)
print(num_images / (time.perf_counter() - began))
"""


def _images_per_second(cores: list[str], seconds: int) -> float:
    """Of one run in a process for each entry of `cores`, pinned to those."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        subprocess.Popen(
            ["taskset", "-c", own, sys.executable, "-c", _TIMED]
            + [str(n) for n in (len(cores), place, port, seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for place, own in enumerate(cores)
    ]
    outputs = [child.communicate()[0] for child in children]
    return float(outputs[0].splitlines()[-1])


def measure(repeats: int, seconds: int) -> dict[str, Any]:
    """Images/s of configs/cpu.py on one core, on two, and in two processes of a core each."""
    ways = {"one core": ["0"], "two cores": ["0,1"], "two processes of a core": ["0", "1"]}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, cores in ways.items():
            found[name].append(_images_per_second(cores, seconds))
    alone = found["one core"]
    return {
        name: {
            "images_per_second": values,
            "median": statistics.median(values),
            # Of two cores: what they do together over twice what one did in the same turn.
            "efficiency": [
                value / one / (1 if name == "one core" else 2)
                for value, one in zip(values, alone, strict=True)
            ],
        }
        for name, values in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--config", default="configs/rapid.py")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=0, help="over all devices")
    parser.add_argument("--shard_params", action="store_true")
    parser.add_argument("--step_seconds", type=float, help="of one device, for the model")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of a turn, about")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file, added to")
    arguments = parser.parse_args(argv)
    with errors_as_lines("interrupted; nothing was written"):
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        if arguments.measure:
            found = {"measured": measure(arguments.repeats, arguments.seconds)}
        else:
            counted = count(arguments)
            if arguments.step_seconds:
                counted["modelled"] = modelled(
                    counted["sent_megabytes"], arguments.devices, arguments.step_seconds
                )
            found = {"counted": [*before.get("counted", []), counted]}
        found["environment"] = {
            "python": platform.python_version(),
            "jax": importlib.metadata.version("jax"),
            "cores": os.cpu_count(),
        }
        arguments.out.write_text(json.dumps({**before, **found}, indent=2) + "\n")
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
