"""Does the collapse watch name what collapses, and only that? Ten seeds of every scenario.

    python -m benchmarks.collapse --seeds 10 --out benchmarks/results/collapse.json

Narrow networks, two epochs each: two losses without their guards, rapid's own weights, and
two healthy recipes. Prints a line a run and exits with 1 if one was misnamed.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import platform
import shutil
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import views32
from jepa_jax import from_arrays, load_dataset, train_and_evaluate
from jepa_jax.device import describe
from jepa_jax.errors import TrainingError
from jepa_jax.metrics import read_metrics

NUM_IMAGES = 6400
_NUM_VAL = 256
_D = 512
_BALANCED = (_D - 1) / 25


@dataclasses.dataclass(frozen=True)
class Scenario:
    """An optimiser, a rate and VICReg's std and cov weights; and what should be said of them."""

    optimizer: str
    lr: float
    std_coeff: float
    cov_coeff: float
    kind: str | None


SCENARIOS = {
    "constant": Scenario("lars", 0.3, 0.0, 0.0, "constant"),
    "low rank": Scenario("lars", 0.3, 25.0, 0.0, "low rank"),
    "rapid's weights": Scenario("lars", 0.3, 25.0, 1.0, "low rank"),
    "healthy, LARS": Scenario("lars", 0.3, 1.0, _BALANCED, None),
    "healthy, Muon": Scenario("muon", 0.02, 1.0, _BALANCED, None),
}


def run(
    name: str, seed: int, images: np.ndarray, workdir: pathlib.Path, *, stop: bool = False
) -> list[dict[str, Any]]:
    """Trains a scenario for two epochs without labels; its rows of metrics.jsonl."""
    scenario, config = SCENARIOS[name], views32.get_config()
    config.update(
        {
            "meta": {"seed": seed},
            "data": {"batch_size": 128, "num_val": _NUM_VAL},
            "model": {"width": 16, "proj_hidden_dim": _D, "proj_output_dim": _D},
            "loss": {"std_coeff": scenario.std_coeff, "cov_coeff": scenario.cov_coeff},
            "optim": {"name": scenario.optimizer, "lr": scenario.lr, "warmup_epochs": 0.3},
            "logging": {"tqdm_silent": True, "stop_on_collapse": stop},
        }
    )
    train_and_evaluate(config, workdir, dataset=from_arrays(images))
    return read_metrics(workdir / "metrics.jsonl")


def _one(name: str, seed: int, images: np.ndarray) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                rows = run(name, seed, images, pathlib.Path(folder))
        except TrainingError as error:
            return {"scenario": name, "seed": seed, "named": str(error), "epoch": None}
    # What a person was told, once: the first.
    told = next((row for row in rows if row["watch/collapse"]), rows[-1])
    figures = ("z_rank_me", "h_rank_me", "z_std_mean", "h_std_mean")
    return {
        "scenario": name,
        "seed": seed,
        "named": told["watch/collapse"],
        "epoch": told["epoch"] if told["watch/collapse"] else None,
        **{figure: rows[-1][f"watch/{figure}"] for figure in figures},
    }


def main() -> None:
    """Runs every scenario with every seed and writes what was said of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    # The seeds of a scenario, and scenarios of one optimiser, run the same programs.
    cache = tempfile.mkdtemp(prefix="jepa_jax_collapse_")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    images = load_dataset("cifar10").train_images[:NUM_IMAGES]
    runs = []
    for name, scenario in SCENARIOS.items():
        for seed in range(arguments.seeds):
            runs.append({**_one(name, seed, images), "expected": scenario.kind})
            print(runs[-1], flush=True)
    shutil.rmtree(cache)
    wrong = [run for run in runs if run["named"] != run["expected"]]
    print(f"{len(runs) - len(wrong)} of {len(runs)} runs named as they should be")
    if arguments.out:
        content = {
            "what": "the collapse watch on narrow networks, two epochs of 6,400 CIFAR-10 images",
            "command": f"python -m benchmarks.collapse --seeds {arguments.seeds}",
            "environment": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "device": describe(),
            },
            "runs": runs,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
