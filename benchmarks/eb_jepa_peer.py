"""Is benchmarks.torch_peer a fair peer? The original code's own epoch beside its steps.

    git clone https://github.com/facebookresearch/eb_jepa && git -C eb_jepa checkout 966e61e
    python -m benchmarks.eb_jepa_peer --repo eb_jepa --out benchmarks/results/eb_jepa_peer.json

Both train rapid's network in one process, on the same fixed views without augmentation, eager and
contiguous, in turns A B A B: the original by its own `train_epoch`, with the model, loss and LARS
that its image example builds; ours by `torch_peer`'s step. Exits with 1 if ours is below 0.9x.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.torch_peer import batches
from benchmarks.torch_peer.recipe import Recipe
from benchmarks.torch_peer.training import NUM_CLASSES, Trainer

LEAST_RATIO = 0.9
COMMIT = "966e61e"


def rapid(batch_size: int) -> Recipe:
    """configs/rapid.py at another batch size."""
    return Recipe(
        batch_size=batch_size,
        stage_sizes=(2, 2, 2, 2),
        width=64,
        stem_kernel=3,
        stem_stride=1,
        stem_padding=2,
        stem_pool=False,
        expand_dim=0,
        view_size=32,
        use_projector=True,
        proj_hidden_dim=4096,
        proj_output_dim=4096,
        sim_coeff=1.0,
        std_coeff=25.0,
        cov_coeff=1.0,
        optimizer="lars",
        lr=0.707,
        weight_decay=1e-4,
        momentum=0.9,
        num_images=batch_size,
    )


class _Absent(types.ModuleType):
    """Stands for a package that the original imports and that no step uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_original(repo: pathlib.Path) -> types.ModuleType:
    """The image example's main module."""
    batches.import_torchvision()
    for name in ("fire", "wandb", "omegaconf"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = _Absent(name)
    sys.path.insert(0, str(repo))
    return importlib.import_module("examples.image_jepa.main")


def original_steps(
    main: types.ModuleType, recipe: Recipe, dtype: str, batch: batches.Batch
) -> Callable[[int], None]:
    """A function that trains for so many steps, set up as the original's `run` does it."""
    torch.manual_seed(0)
    backbone = main.ResNet18()
    model = main.ImageSSL(
        backbone,
        features_dim=backbone.features_dim,
        proj_hidden_dim=recipe.proj_hidden_dim,
        proj_output_dim=recipe.proj_output_dim,
    )
    probe = main.LinearProbe(feature_dim=backbone.features_dim, num_classes=NUM_CLASSES)
    optimizer = main.LARS(
        [
            {"params": model.parameters(), "lr": recipe.lr},
            {"params": probe.parameters(), "lr": 0.1},
        ],
        weight_decay=recipe.weight_decay,
        eta=0.02,
        clip_lr=True,
        exclude_bias_n_norm=True,
        momentum=recipe.momentum,
    )
    loss_fn = main.VICRegLoss(std_coeff=recipe.std_coeff, cov_coeff=recipe.cov_coeff)
    use_amp = dtype == "bfloat16"
    scaler = main.GradScaler("cpu", enabled=use_amp)
    scheduler = types.SimpleNamespace(step=lambda epoch: None)
    *views, labels = batch

    def run(num_steps: int) -> None:
        main.train_epoch(
            model,
            [(views, labels)] * num_steps,
            optimizer,
            scheduler,
            probe,
            scaler,
            torch.device("cpu"),
            0,
            loss_fn,
            use_amp,
            torch.bfloat16,
            True,
        )

    return run


def peer_steps(recipe: Recipe, dtype: str, batch: batches.Batch) -> Callable[[int], None]:
    """The same of torch_peer."""
    trainer = Trainer(
        recipe,
        mode="eager",
        dtype=dtype,
        memory_format=torch.contiguous_format,
        device=torch.device("cpu"),
    )

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            trainer.step(*batch)

    return run


def _compare(main: types.ModuleType, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = rapid(arguments.batch_size)
    batch = next(batches.fixed(recipe, torch.device("cpu"), torch.contiguous_format))
    sides = {
        "eb_jepa": original_steps(main, recipe, dtype, batch),
        "torch_peer": peer_steps(recipe, dtype, batch),
    }
    for run in sides.values():
        run(2)
    seconds = {name: [] for name in sides}
    for _ in range(arguments.pairs):
        for name, run in sides.items():
            began = time.perf_counter()
            run(arguments.steps)
            seconds[name].append((time.perf_counter() - began) / arguments.steps)
    pairs = zip(seconds["eb_jepa"], seconds["torch_peer"], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    return {
        "dtype": dtype,
        "step_seconds": seconds,
        "images_per_second": {
            name: recipe.batch_size / statistics.median(values) for name, values in seconds.items()
        },
        "ratio": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "n": len(ratios),
        },
    }


def main() -> None:
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repo", type=pathlib.Path, required=True, help=f"eb_jepa at {COMMIT}")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, help="in one timing")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    found = subprocess.run(
        ["git", "-C", arguments.repo, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if not found.stdout.startswith(COMMIT):
        parser.error(f"{arguments.repo} is not a checkout of eb_jepa at {COMMIT}")
    original = import_original(arguments.repo.resolve())
    rows = []
    for dtype in ("float32", "bfloat16"):
        rows.append(_compare(original, dtype, arguments))
        rate, ratio = rows[-1]["images_per_second"], rows[-1]["ratio"]
        print(
            f"{dtype:<9} eb_jepa {rate['eb_jepa']:6.1f} images/s, torch_peer "
            f"{rate['torch_peer']:6.1f}: {ratio['median']:.2f}x "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}, n={ratio['n']})",
            flush=True,
        )
    if arguments.out:
        content = {
            "what": "rapid's network without augmentation, eager and contiguous on both sides; "
            "ratio is torch_peer's speed over eb_jepa's",
            "command": " ".join(["python -m benchmarks.eb_jepa_peer", *sys.argv[1:]]),
            "eb_jepa": COMMIT,
            "batch_size": arguments.batch_size,
            "steps_per_timing": arguments.steps,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            },
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(row["ratio"]["median"] < LEAST_RATIO for row in rows))


if __name__ == "__main__":
    main()
