"""Every configuration once, trained as long as configs/cpu.py: time, ridge, neighbours, RankMe.

    python -m benchmarks.configurations --workdir runs/configurations

Writes benchmarks/results/configurations.json and the table in docs/results.md. A configuration
trains for the time of cpu.py's 1.4 epochs on the same machine: its pace and that of cpu.py are
measured in turns, after that only steps count. Finished rows are read, not repeated; a row that is
missing says so. One seed: a difference of a point or two between rows is no finding.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.figures import parse, write_document
from jepa_jax.config_flags import given_config
from jepa_jax.data import Dataset
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import make_runner, variables_of
from jepa_jax.metrics import read_json, write_json
from jepa_jax.pace import Pace, with_epochs
from jepa_jax.plan import Plan, clean_images, initial_state, load_fitting, make_plan
from jepa_jax.representation import reestimate_batch_stats

ROOT = pathlib.Path(__file__).parent.parent
_TURNS = 3
# Training images that the probes are fitted to, and those they choose on: a large network takes
# minutes on two cores to embed more.
NUM_FITTED, NUM_VAL = 10_000, 5_000
_MARKS = ("<!-- table -->", "<!-- end of table -->")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is trained: a config with overrides as flags, and how the table calls it."""

    what: str
    flags: str


BASELINE = "vicreg"
_CPU, _VIT = "--config=configs/cpu.py", "--config=configs/transformers.py:cpu"
CONFIGURATIONS = {
    BASELINE: Configuration("VICReg", _CPU),
    "sigreg": Configuration("SIGReg", "--config=configs/objectives.py:sigreg"),
    "lejepa": Configuration("LeJEPA", "--config=configs/objectives.py:lejepa"),
    "barlow": Configuration("Barlow Twins", "--config=configs/objectives.py:barlow"),
    "simclr": Configuration("SimCLR", "--config=configs/objectives.py:simclr"),
    "jepa": Configuration("JEPA: the other view's embedding", "--config=configs/jepa.py"),
    "blocks": Configuration(
        "JEPA: masked blocks, a transformer", "--config=configs/jepa.py:blocks"
    ),
    "four_views": Configuration(
        "four views of half as many images",
        f"{_CPU} --config.data.num_views=4 --config.data.batch_size=48",
    ),
    "multicrop": Configuration(
        "two views and three local crops, pairs", "--config=configs/multicrop.py"
    ),
    "multicrop_mean": Configuration(
        "the same against the mean",
        "--config=configs/multicrop.py --config.loss.pairing=mean",
    ),
    "resnet34": Configuration(
        "ResNet-34, a quarter of its width",
        f"{_CPU} --config.model.stage_sizes=(3,4,6,3) --config.model.width=16",
    ),
    "resnet50": Configuration(
        "ResNet-50, a quarter of its width",
        f"{_CPU} --config.model.stage_sizes=(3,4,6,3) --config.model.width=16 "
        "--config.model.block=bottleneck",
    ),
    "wide": Configuration("cpu.py's network, twice its width", f"{_CPU} --config.model.width=64"),
    "vit_ti4": Configuration("ViT-Ti, 4 blocks, patches of 4", _VIT),
    "vit_s8": Configuration(
        "ViT-S, patches of 8",
        f"{_VIT} --config.model.type=vit_s --config.model.patch_size=8 --config.model.depth=0 "
        "--config.data.view_size=0",
    ),
    "vit_s4": Configuration(
        "ViT-S, patches of 4", f"{_VIT} --config.model.type=vit_s --config.model.depth=0"
    ),
    "vit_b8": Configuration(
        "ViT-B, patches of 8",
        f"{_VIT} --config.model.type=vit_b --config.model.patch_size=8 --config.model.depth=0 "
        "--config.data.view_size=0",
    ),
}


def plan_of(name: str, dataset: Dataset, epochs: float = 0.0) -> Plan:
    """The plan of a configuration, with `epochs` in place of its own where given."""
    config = given_config(CONFIGURATIONS[name].flags.split()).config
    if epochs:
        config = with_epochs(config, epochs)
    return make_plan(config, pathlib.Path(), dataset, None, None, None, None)


def equal_epochs(name: str, dataset: Dataset) -> dict[str, Any]:
    """Epochs that take as long as cpu.py's, and the seconds of an epoch of both by turns."""
    base = plan_of(BASELINE, dataset)
    epochs = base.config.optim.epochs
    if name == BASELINE:
        return {"epochs": epochs, "epoch_seconds": None}
    own, reference = Pace(plan_of(name, dataset)), Pace(base)
    turns = [(own.epoch_seconds(), reference.epoch_seconds()) for _ in range(_TURNS)]
    ratio = statistics.median(theirs / ours for ours, theirs in turns)
    return {"epochs": float(f"{epochs * ratio:.6g}"), "epoch_seconds": turns}


def trained(plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The last state, and the seconds, steps and last figures of the training."""
    state = initial_state(plan)
    runner = make_runner(plan, state)
    metrics, began = None, time.perf_counter()
    for epoch in range(plan.num_epochs):
        for newest, metrics, _ in runner.run(state, plan.batches_of(epoch)):
            state = newest
            jax.block_until_ready(metrics["loss"])
    last = {key: float(np.ravel(value)[-1]) for key, value in jax.device_get(metrics).items()}
    seconds = time.perf_counter() - began
    images = plan.num_steps * plan.config.data.batch_size
    return state, {"seconds": seconds, "steps": plan.num_steps, "images": images, "last": last}


def measure(name: str, dataset: Dataset, epochs: float) -> dict[str, Any]:
    """Trains a configuration and judges its last step and the same network untrained."""
    plan = plan_of(name, dataset, epochs)
    untrained = variables_of(initial_state(plan))
    state, figures = trained(plan)
    images = clean_images(dataset.train_images)
    network, floor = (
        reestimate_batch_stats(plan.encoder, variables, images)
        for variables in (variables_of(state), untrained)
    )
    judged = dataset.with_num_train(NUM_FITTED + NUM_VAL)
    result = evaluate_representation(
        plan.encoder.apply,
        network,
        judged,
        num_val=NUM_VAL,
        embed=plan.encoder.embed,
        untrained=floor,
        parts=("ridge", "knn", "health"),
    )
    sizes = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    accuracies = {
        f"{probe}_{kind}": {split: scores[split]["acc"] for split in ("val", "test")}
        for probe in ("ridge", "knn")
        for kind, scores in result["probes"][probe].items()
        if kind in ("encoder", "untrained")
    }
    ranks = {kind: result["health"][kind]["h"]["rank_me"] for kind in ("encoder", "untrained")}
    return {
        **figures,
        **sizes,
        "feature_dim": result["feature_dim"],
        "epochs": plan.config.optim.epochs,
        **accuracies,
        "rank_me": ranks,
    }


def _pace(turns: list[list[float]] | None) -> str:
    """How many times as long as cpu.py's an image takes, the median and the range of the turns."""
    if turns is None:
        return "1"
    ratios = sorted(ours / theirs for ours, theirs in turns)
    return f"{statistics.median(ratios):.3g} ({ratios[0]:.3g}-{ratios[-1]:.3g})"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for every configuration, measured or not."""
    lines = [
        "| | command | an image takes | steps | images | ridge | untrained | 20-NN | untrained "
        "| RankMe | untrained | F | parameters |",
        "|---" * 13 + "|",
    ]
    for name, configuration in CONFIGURATIONS.items():
        lead = f"| {configuration.what} | `{configuration.flags}` |"
        if name not in rows:
            lines.append(f"{lead} not measured |" + " |" * 10)
            continue
        row = rows[name]

        def percent(probe: str, kind: str, row=row) -> str:
            return f"{100 * row[f'{probe}_{kind}']['test']:.1f}"

        cells = [
            _pace(row["pace"]["epoch_seconds"]),
            f"{row['steps']:,}",
            f"{row['images']:,}",
            f"**{percent('ridge', 'encoder')}**",
            percent("ridge", "untrained"),
            percent("knn", "encoder"),
            percent("knn", "untrained"),
            f"{row['rank_me']['encoder']:.0f}",
            f"{row['rank_me']['untrained']:.0f}",
            str(row["feature_dim"]),
            f"{row['parameters'] / 1e6:.1f} M",
        ]
        lines.append(f"{lead} {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(rows: dict[str, Any], out: pathlib.Path, page: pathlib.Path) -> None:
    what = "every configuration once, for the time of configs/cpu.py; one seed"
    command = "python -m benchmarks.configurations --workdir runs/configurations"
    flags = {name: row.flags for name, row in CONFIGURATIONS.items()}
    judged = f"probes fitted to {NUM_FITTED} images, chosen on {NUM_VAL} others"
    write_document(out, what, command, judged=judged, flags=flags, rows=rows)
    before, _, rest = page.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    page.write_text(f"{before}{_MARKS[0]}\n{table(rows)}\n\n{_MARKS[1]}{after}")


def main() -> None:
    """Measures what is missing, a row at a time, and writes the page after each."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--workdir", type=pathlib.Path, required=True)
    command.add_argument("--only", nargs="+", default=list(CONFIGURATIONS), metavar="NAME")
    command.add_argument("--pace-only", action="store_true", help="train nothing")
    results = ROOT / "benchmarks" / "results" / "configurations.json"
    command.add_argument("--out", type=pathlib.Path, default=results)
    command.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "results.md")
    arguments = parse(command)
    dataset = load_fitting("cifar10", placement="device")

    def kept(kind: str, name: str, compute) -> dict[str, Any]:
        path = arguments.workdir / f"{name} {kind}.json"
        if not path.exists():
            print(f"measuring {path.stem}", flush=True)
            write_json(path, compute())
        return read_json(path)

    for name in arguments.only:
        pace = kept("pace", name, functools.partial(equal_epochs, name, dataset))
        if not arguments.pace_only:
            kept("run", name, functools.partial(measure, name, dataset, pace["epochs"]))
        rows = {
            other: {**read_json(run), "pace": read_json(run.with_name(f"{other} pace.json"))}
            for other in CONFIGURATIONS
            if (run := arguments.workdir / f"{other} run.json").exists()
        }
        _write(rows, arguments.out, arguments.page)
    print(table(rows))


if __name__ == "__main__":
    main()
