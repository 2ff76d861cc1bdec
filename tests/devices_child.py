"""Trains on one and on eight virtual CPU devices and prints what each saw, as JSON.

Run by test_distributed.py, since a process has as many devices as it was started with.
"""

import json
import pathlib
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# As device.prepare does for several devices that XLA_FLAGS asks for.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# ruff: noqa: E402
import numpy as np
from tiny import tiny_config

from jepa_jax.data import from_arrays
from jepa_jax.loop import make_runner
from jepa_jax.plan import initial_state, make_plan
from jepa_jax.train_step import stream_key

# Wide and slow enough that rounding stays rounding: a tiny network's BatchNorm makes it grow.
BASE = {
    "data.batch_size": 200,
    "model.width": 16,
    "model.proj_hidden_dim": 64,
    "model.proj_output_dim": 64,
    "optim.lr": 0.005,
    "optim.epochs": 10.0,
}
CROPS = {
    "data.view_size": 16,
    "data.num_local_crops": 2,
    "optim.epochs": 3.0,
}
VARIANTS = {
    "one device": (1, {}),
    "resident": (8, {"data.placement": "device"}),
    "streamed": (8, {"data.placement": "stream"}),
    "shared state": (8, {"training.shard_params": True}),
    "one device, in pieces": (1, {"training.microbatches": 5}),
    "in pieces": (8, {"training.microbatches": 5}),
    "scanned": (8, {"training.scan_steps": 2}),
    "one device, sigreg": (1, {"loss.type": "sigreg", "optim.epochs": 2.0}),
    "sigreg": (8, {"loss.type": "sigreg", "optim.epochs": 2.0}),
    "one device, simclr": (1, {"loss.type": "simclr", "optim.epochs": 2.0}),
    "simclr": (8, {"loss.type": "simclr", "optim.epochs": 2.0}),
    "one device, crops": (1, CROPS),
    "crops": (8, CROPS),
}


def plan_of(dataset, num_devices, overrides):
    config = tiny_config()
    config.update_from_flattened_dict({**BASE, **overrides})
    devices = jax.devices()[:num_devices]
    return make_plan(config, pathlib.Path(), dataset, None, None, None, None, devices)


def trained(plan):
    """The losses of 20 steps, and where the arrays of the state lie."""
    state = initial_state(plan)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: state))
    runner = make_runner(plan, state)
    state, losses = runner.place(state), []
    for epoch in range(plan.num_epochs):
        for newest, metrics, count in runner.run(state, plan.batches_of(epoch)):
            state = newest
            losses += np.atleast_1d(jax.device_get(metrics["loss"]))[:count].tolist()
    here = runner.here(state)
    leaves = jax.tree.leaves(here)
    return {
        "losses": losses,
        "flops": runner.program.cost_analysis()["flops"],
        "bytes": sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "all_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "is_whole": all(
            leaf.shape == like.shape and (isinstance(leaf, np.ndarray) or len(leaf.devices()) == 1)
            for leaf, like in zip(leaves, shapes, strict=True)
        ),
        "step": int(here.step),
    }


def views(plan):
    """The views of step 3, through the sharding of a batch."""
    images = plan.dataset.train_images[plan.batches_of(0)[0]]
    placed = plan.layout.put_rows(images, len(images))
    make = jax.jit(plan.views_fn, out_shardings=plan.layout.batch)
    return make(stream_key(np.uint32(0), "views", np.int32(3)), placed)


def main(fixture: str) -> None:
    with np.load(fixture) as arrays:
        dataset = from_arrays(
            *(
                arrays[f"{split}_{kind}"]
                for split in ("train", "test")
                for kind in ("images", "labels")
            )
        )
    plans = {name: plan_of(dataset, *variant) for name, variant in VARIANTS.items()}
    found = {name: trained(plan) for name, plan in plans.items()}
    one, eight = (views(plans[name]) for name in ("one device", "resident"))
    found["views"] = {
        "are_equal": all(
            bool((np.asarray(a) == np.asarray(b)).all()) for a, b in zip(one, eight, strict=True)
        ),
        "num_shards": len({shard.device for shard in eight[0].addressable_shards}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
