"""What an evaluation costs, and extraction beside training, on CIFAR-10 with 512 features.

    python -m benchmarks.evaluation --out benchmarks/results/evaluation.json

The network is that of benchmarks/views32.py, widened to 512 features and left untrained: how long
a probe takes depends on the size of the features and little on what they know. Training steps and
extraction are timed in turns, A B A B, after a warm-up, each until the device is done.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import views32
from jepa_jax import create_train_state, evaluate_representation, load_dataset, make_train_step
from jepa_jax.augment import two_views
from jepa_jax.config import create_encoder, hparams_from
from jepa_jax.device import describe
from jepa_jax.representation import extract_features

_STEPS, _NUM_EXTRACTED = 20, 3000


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def _speeds(config, encoder, dataset, repeats: int) -> dict[str, Any]:
    """Images/s of training steps and of extraction, in turns."""
    hparams = jax.device_put(hparams_from(config, 500))
    state = create_train_state(
        encoder.model, hparams, image_shape=(32, 32, 3), num_classes=10, optimizer="muon"
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    step = jax.jit(
        make_train_step(
            encoder.model,
            augment_fn=two_views,
            mean=encoder.mean,
            std=encoder.std,
            optimizer="muon",
        )
    )
    batch_size = config.data.batch_size
    batch = jax.device_put(
        (dataset.train_images[:batch_size], dataset.train_labels[:batch_size].astype(np.int32))
    )

    def train():
        current = state
        for _ in range(_STEPS):
            current, _ = step(current, *batch, hparams)
        return current

    def extract():
        return extract_features(encoder.apply, variables, dataset.train_images[:_NUM_EXTRACTED])

    train(), extract()
    pairs = [(_seconds(train), _seconds(extract)) for _ in range(repeats)]
    trained = [_STEPS * batch_size / a for a, _ in pairs]
    extracted = [_NUM_EXTRACTED / b for _, b in pairs]
    ratios = [b / a for a, b in zip(trained, extracted, strict=True)]
    return {
        "training_images_per_second": trained,
        "extraction_images_per_second": extracted,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=128, help="a quarter of the features")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    config, dataset = views32.get_config(), load_dataset("cifar10")
    config.model.width = arguments.width
    encoder = create_encoder(config)
    speeds = _speeds(config, encoder, dataset, arguments.repeats)
    print(json.dumps(speeds, indent=1), flush=True)
    keys = jax.random.split(jax.random.key(0))
    variables, other = (
        jax.jit(encoder.model.init)(key, np.zeros((2, 32, 32, 3), np.float32)) for key in keys
    )
    began = time.perf_counter()
    result = evaluate_representation(
        encoder.apply,
        variables,
        dataset,
        embed=encoder.embed,
        untrained=other,
        on_progress=lambda text: print(f"{time.perf_counter() - began:7.1f} s  {text}", flush=True),
    )
    seconds = {**result["seconds"], "total": time.perf_counter() - began}
    seconds["without_extraction"] = seconds["total"] - seconds["extraction"]
    print(json.dumps(seconds, indent=1))
    if arguments.out:
        packages = ("jax", "jaxlib", "flax", "numpy")
        content = {
            "what": "evaluate_representation with every part, on CIFAR-10: encoder, untrained "
            "network and raw pixels; compilation included",
            "command": "python -m benchmarks.evaluation",
            "feature_dim": result["feature_dim"],
            "environment": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
                "device": describe(),
            },
            "seconds": seconds,
            **speeds,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
