"""Does what makes XLA faster on a CPU change what is learnt? 200 steps, 3 seeds.

    python -m benchmarks.loss_curve --out benchmarks/results/loss_curve.json

The same steps of benchmarks/views32.py on the same real images, once as the commands set XLA up
(`device.select`) and once as JAX comes. Both round differently, and training amplifies it; so the
curves are compared with what another seed makes of them.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import numpy as np

_STEPS, _SEEDS = 200, 3
_LAST = 50


def _curves(is_set_up: bool) -> list[list[float]]:
    """Losses [seed, step] of this process."""
    import jax

    from benchmarks import views32
    from jepa_jax import create_train_state, device, load_dataset, make_train_step, two_views
    from jepa_jax.config import create_encoder, hparams_from
    from jepa_jax.data import epoch_order
    from jepa_jax.train_step import stream_key

    if is_set_up:
        device.select("cpu")
    config, dataset = views32.get_config(), load_dataset("cifar10")
    encoder, batch_size = create_encoder(config), config.data.batch_size
    name = config.optim.name
    step = jax.jit(
        make_train_step(
            encoder.model,
            augment_fn=two_views,
            mean=encoder.mean,
            std=encoder.std,
            optimizer=name,
        )
    )
    curves = []
    for seed in range(_SEEDS):
        config.meta.seed = seed
        hparams = jax.device_put(hparams_from(config, len(dataset.train_images) // batch_size))
        state = create_train_state(
            encoder.model, hparams, image_shape=(32, 32, 3), num_classes=10, optimizer=name
        )
        order = epoch_order(stream_key(seed, "order"), len(dataset.train_images), batch_size)
        losses = []
        for row in np.asarray(order)[:_STEPS]:
            labels = dataset.train_labels[row].astype(np.int32)
            state, metrics = step(state, dataset.train_images[row], labels, hparams)
            losses.append(metrics["loss"])
        curves.append([float(loss) for loss in losses])
    return curves


def _in_a_process(kind: str) -> np.ndarray:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.loss_curve", "--only", kind]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def _compared(set_up: np.ndarray, as_it_comes: np.ndarray) -> dict[str, Any]:
    between_seeds = [
        float(np.mean(np.abs(as_it_comes[one] - as_it_comes[other])))
        for one, other in ((0, 1), (0, 2), (1, 2))
    ]
    return {
        "steps": _STEPS,
        "difference_of_the_two": np.mean(np.abs(set_up - as_it_comes), axis=1).tolist(),
        "difference_between_seeds": between_seeds,
        "first_step": np.max(np.abs(set_up[:, 0] / as_it_comes[:, 0] - 1.0)).item(),
        f"mean_of_last_{_LAST}": {
            "set_up": set_up[:, -_LAST:].mean(axis=1).tolist(),
            "as_jax_comes": as_it_comes[:, -_LAST:].mean(axis=1).tolist(),
        },
    }


def main() -> None:
    """Trains, compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", choices=("set_up", "as_jax_comes"), help="one side's curves")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(_curves(arguments.only == "set_up")))
        return
    curves = {kind: _in_a_process(kind) for kind in ("set_up", "as_jax_comes")}
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    content = {
        "what": "losses of 200 steps of views32.py, 3 seeds; differences are means over steps",
        "command": "python -m benchmarks.loss_curve",
        "environment": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        **_compared(curves["set_up"], curves["as_jax_comes"]),
        "losses": {kind: np.round(curve, 5).tolist() for kind, curve in curves.items()},
    }
    print(json.dumps({k: v for k, v in content.items() if k != "losses"}, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
