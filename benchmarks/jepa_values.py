"""Which weight of the prediction and which momentum does configs/jepa.py need? On held-out images.

    python -m benchmarks.jepa_values --workdir runs/jepa_values \
        --out benchmarks/results/jepa_values.json

One seed of every pair of values, --seeds of the first and of the config's own. All train as many
steps as the row of docs/results.md, where they are what fits into the time of configs/cpu.py:
neither value changes the time of a step. Finished runs are read, not repeated. The test set is not
read.
"""

import functools
import pathlib
from typing import Any

from benchmarks.configurations import NUM_FITTED, NUM_VAL, trained
from benchmarks.figures import parse, parser, percent, stored, training_images, write_document
from configs import jepa
from jepa_jax.data import Dataset
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import variables_of
from jepa_jax.pace import with_epochs
from jepa_jax.plan import clean_images, make_plan
from jepa_jax.representation import reestimate_batch_stats

# Of the row "jepa" in benchmarks/results/configurations.json: 480 steps.
EPOCHS = 0.923905
# (loss.pred_coeff, model.target_ema), in the order in which they were tried.
TRIED = (
    (1.0, 0.99),
    (5.0, 0.99),
    (1.0, 0.9),
    (5.0, 0.9),
    (3.0, 0.5),
    (20.0, 0.99),
    (10.0, 0.9),
    (10.0, 0.5),
    (6.0, 0.5),
)


def measure(pred_coeff: float, target_ema: float, seed: int, dataset: Dataset) -> dict[str, Any]:
    """The figures of one run, its ridge on validation images and RankMe."""
    config = jepa.get_config()
    config.meta.seed = seed
    config.loss.pred_coeff, config.model.target_ema = pred_coeff, target_ema
    plan = make_plan(with_epochs(config, EPOCHS), pathlib.Path(), dataset, None, None, None, None)
    state, figures = trained(plan)
    images = clean_images(dataset.train_images)
    network = reestimate_batch_stats(plan.encoder, variables_of(state), images)
    result = evaluate_representation(
        plan.encoder.apply,
        network,
        dataset.with_num_train(NUM_FITTED + NUM_VAL),
        num_val=NUM_VAL,
        embed=plan.encoder.embed,
        parts=("ridge", "health"),
    )
    return {
        **figures,
        "ridge_val": result["probes"]["ridge"]["encoder"]["val"]["acc"],
        "rank_me": result["health"]["encoder"]["h"]["rank_me"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for every pair of values."""
    lines = [
        "| `loss.pred_coeff` | `model.target_ema` | seeds | ridge, val | pred_loss | invariance "
        "| RankMe |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        first = row["runs"][0]
        lines.append(
            f"| {row['pred_coeff']:g} | {row['target_ema']:g} | {len(row['runs'])} "
            f"| {percent([run['ridge_val'] for run in row['runs']])} "
            f"| {first['last']['pred_loss']:.2f} | {first['last']['invariance_loss']:.2f} "
            f"| {first['rank_me']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, prints the table and writes the figures."""
    arguments = parse(parser(__doc__))
    dataset, own, rows = training_images(), jepa.get_config(), []
    compared = (TRIED[0], (own.loss.pred_coeff, own.model.target_ema))
    for pred_coeff, target_ema in TRIED:
        num_seeds = arguments.seeds if (pred_coeff, target_ema) in compared else 1
        runs = [
            stored(
                arguments.workdir / f"{pred_coeff:g} {target_ema:g} seed {seed}.json",
                functools.partial(measure, pred_coeff, target_ema, seed, dataset),
            )
            for seed in range(num_seeds)
        ]
        rows.append({"pred_coeff": pred_coeff, "target_ema": target_ema, "runs": runs})
    print(table(rows))
    if arguments.out:
        command = "python -m benchmarks.jepa_values --workdir runs/jepa_values"
        what = "configs/jepa.py with other values; pred_loss and invariance of the last step"
        write_document(arguments.out, what, command, epochs=EPOCHS, rows=rows)


if __name__ == "__main__":
    main()
