"""Which changes to configs/cpu.py gain at equal time? Three seeds each, read on held-out images.

    python -m benchmarks.levers --workdir runs/levers --out benchmarks/results/levers.json

Every lever trains as long as configs/cpu.py does: its pace and that of cpu.py are first measured in
turns, on an otherwise idle machine; after that only steps count. Levers that the package has no key
for are plugged into its parts here. Finished runs are read, not repeated. The test set is not read.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.figures import (
    parse,
    parser,
    percent,
    stored,
    training_images,
    write_document,
)
from configs import cpu
from jepa_jax import losses
from jepa_jax.augment import two_views
from jepa_jax.data import Dataset
from jepa_jax.evaluation import evaluate_representation
from jepa_jax.loop import make_runner
from jepa_jax.pace import with_epochs
from jepa_jax.plan import Plan, clean_images, initial_state, make_plan
from jepa_jax.representation import reestimate_batch_stats
from jepa_jax.train_step import AugmentFn, LossFn

_VIEW_SIZE, _NUM_IMAGES = cpu.get_config().data.view_size, 50_000
_TURNS, _TURN_SECONDS = 5, 2.0
Overrides = dict[str, Any]


# --- parts that the package has no key for ----------------------------------------------------


def opposite_flips(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two views of which one, by the toss of a coin, is mirrored and the other is not."""
    x1, x2 = two_views(key, images, size=_VIEW_SIZE, flip_prob=0.0)
    toss = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
    return jnp.where(toss, x1[:, :, ::-1], x1), jnp.where(toss, x2, x2[:, :, ::-1])


def sigreg(key, z1, z2, hparams):
    """The reference's SIGReg, whatever the config's coefficients."""
    del hparams
    return losses.sigreg_loss(key, z1, z2)


# --- levers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lever:
    """One change to configs/cpu.py.

    Attributes:
      what: in words.
      overrides: of the config.
      augment_fn, loss_fn: in place of the config's.
      parts: (share of the time, overrides) one after the other, where a run changes on its way.
      ema: decay of an average of the parameters that is judged in their place; 0 for none.
    """

    what: str
    overrides: Overrides = dataclasses.field(default_factory=dict)
    augment_fn: AugmentFn | None = None
    loss_fn: LossFn | None = None
    parts: tuple[tuple[float, Overrides], ...] = ((1.0, {}),)
    ema: float = 0.0


BASELINE = "cpu.py"
LEVERS = {
    BASELINE: Lever("as it is"),
    "random stem": Lever("no eigenvectors in the stem", {"model.stem_init": "random"}),
    "adamw": Lever("AdamW at 0.003", {"optim.name": "adamw", "optim.lr": 0.003}),
    "lars": Lever("LARS at 0.3", {"optim.name": "lars", "optim.lr": 0.3}),
    "32 pixels": Lever("views of 32 pixels", {"data.view_size": 32}),
    "16 then 32": Lever(
        "views of 16 pixels, and of 32 in the last 40 % of the time",
        parts=((0.6, {}), (0.4, {"data.view_size": 32})),
    ),
    "opposite flips": Lever("one view mirrored, the other not", augment_fn=opposite_flips),
    "four views": Lever(
        "four views of half as many images",
        {"data.num_views": 4, "data.batch_size": 48},
    ),
    "average": Lever("weights averaged over steps, decay 0.98", ema=0.98),
    "sigreg": Lever(
        "SIGReg in place of VICReg, 10, D 128",
        {"model.proj_output_dim": 128},
        loss_fn=sigreg,
    ),
}


def _config(lever: Lever, seed: int, more: Mapping[str, Any], num_steps: int = 0) -> ConfigDict:
    """cpu.py with a lever; with `num_steps`, so many, of which the same share is warm-up."""
    config = cpu.get_config()
    config.update_from_flattened_dict({**lever.overrides, **more, "meta.seed": seed})
    if not num_steps:
        return config
    return with_epochs(config, num_steps / (_NUM_IMAGES // config.data.batch_size))


def _plans(lever: Lever, dataset: Dataset, seed: int, num_steps: int = 0) -> list[Plan]:
    """One for every part; they share all but the size of the views."""
    return [
        make_plan(
            _config(lever, seed, overrides, num_steps),
            pathlib.Path(),
            dataset,
            lever.loss_fn,
            None,
            lever.augment_fn,
            None,
        )
        for _, overrides in lever.parts
    ]


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _average(mean: Any, params: Any, decay: float) -> Any:
    return jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, mean, params)


class _Training:
    """The steps of a lever, part after part; `mean` holds averaged parameters, if it has them."""

    def __init__(self, lever: Lever, plans: list[Plan]):
        self.lever, self.plans = lever, plans
        self.state = initial_state(plans[0])
        self.runners = [make_runner(plan, self.state) for plan in plans]
        self.mean = jax.tree.map(jnp.copy, self.state.params) if lever.ema else None
        self.loss: Any = None

    def run(self, part: int, order: np.ndarray) -> None:
        """Steps on these batches, indices [S, B]; the loss of the newest is waited for."""
        for state, metrics, _ in self.runners[part].run(self.state, order):
            self.state, self.loss = state, float(metrics["loss"])
            if self.mean is not None:
                self.mean = _average(self.mean, state.params, self.lever.ema)
        jax.block_until_ready(self.mean)


def _batches(plan: Plan, start: int, stop: int) -> Iterator[np.ndarray]:
    """The batches of steps `start` to `stop`, an epoch's at a time."""
    while start < stop:
        epoch, offset = divmod(start, plan.steps_per_epoch)
        rows = plan.batches_of(epoch)[offset : offset + stop - start]
        yield rows
        start += len(rows)


# --- equal time -------------------------------------------------------------------------------


def _step_seconds(training: _Training, part: int) -> float:
    """A turn: the median second of some steps, an average of the parameters included."""
    order, seconds = training.plans[part].batches_of(0), []
    while not seconds or sum(seconds) < _TURN_SECONDS:
        row = len(seconds) % len(order)
        began = time.perf_counter()
        training.run(part, order[row : row + 1])
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure_pace(name: str, dataset: Dataset) -> list[list[float]]:
    """For every part of a lever the ratios, by turns, of its step's time to that of cpu.py's."""
    lever, base = LEVERS[name], LEVERS[BASELINE]
    training, baseline = (_Training(one, _plans(one, dataset, 0)) for one in (lever, base))
    for part in range(len(lever.parts)):
        _step_seconds(training, part)
    _step_seconds(baseline, 0)
    return [
        [_step_seconds(training, part) / _step_seconds(baseline, 0) for _ in range(_TURNS)]
        for part in range(len(lever.parts))
    ]


def steps_of(lever: Lever, pace: list[list[float]], base_steps: int) -> list[int]:
    """Steps of every part, so that all of them take as long as `base_steps` of cpu.py."""
    return [
        math.floor(share * base_steps / statistics.median(ratios))
        for (share, _), ratios in zip(lever.parts, pace, strict=True)
    ]


# --- runs -------------------------------------------------------------------------------------


def measure_run(name: str, seed: int, steps: list[int], dataset: Dataset) -> dict[str, Any]:
    """Trains a lever; its accuracies in [0, 1] on validation images at the last step."""
    lever, images = LEVERS[name], clean_images(dataset.train_images)
    plans = _plans(lever, dataset, seed, sum(steps))
    training, done = _Training(lever, plans), 0
    for part, count in enumerate(steps):
        for order in _batches(plans[part], done, done + count):
            training.run(part, order)
        done += count
    state = training.state
    params = state.params if training.mean is None else training.mean
    variables = {"params": params, "batch_stats": state.batch_stats}
    variables = reestimate_batch_stats(plans[0].encoder, variables, images)
    num_val, probes = plans[0].config.data.num_val, ("ridge", "knn")
    result = evaluate_representation(
        plans[0].encoder.apply, variables, dataset, num_val=num_val, parts=probes
    )
    accuracies = {probe: result["probes"][probe]["encoder"]["val"]["acc"] for probe in probes}
    batch_size = plans[0].config.data.batch_size
    return {"steps": steps, "images": batch_size * done, "loss": training.loss, **accuracies}


# --- table ------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: every lever beside cpu.py, and the difference of equal seeds."""
    base = rows[BASELINE]["runs"]
    lines = [
        "| change | a step takes | images | ridge, val | difference | 20-NN, val |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        runs = row["runs"]
        ridge, knn = ([run[probe] for run in runs] for probe in ("ridge", "knn"))
        ratio = " and ".join(f"{statistics.median(ratios):.2f}" for ratios in row["pace"])
        gains = [run["ridge"] - other["ridge"] for run, other in zip(runs, base, strict=True)]
        difference = "" if name == BASELINE else percent(gains)
        lines.append(
            f"| {LEVERS[name].what} | {ratio} | {runs[0]['images']:,} | {percent(ridge)} | "
            f"{difference} | {percent(knn)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, prints the table and writes the figures."""
    command = parser(__doc__)
    command.add_argument("--levers", nargs="+", default=list(LEVERS), choices=list(LEVERS))
    arguments, dataset = parse(command), training_images()
    base_steps = _plans(LEVERS[BASELINE], dataset, 0)[0].num_steps
    rows: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys([BASELINE, *arguments.levers])
    for name in names:
        measure = functools.partial(measure_pace, name, dataset)
        path = arguments.workdir / f"{name} pace.json"
        pace = [[1.0]] if name == BASELINE else stored(path, measure)
        rows[name] = {"pace": pace, "runs": []}
    for seed in range(arguments.seeds):
        for name in names:
            steps = steps_of(LEVERS[name], rows[name]["pace"], base_steps)
            measure = functools.partial(measure_run, name, seed, steps, dataset)
            rows[name]["runs"].append(stored(arguments.workdir / f"{name} {seed}.json", measure))
    print(table(rows))
    if arguments.out:
        what = "changes to configs/cpu.py at equal time, on validation images"
        write_document(arguments.out, what, "python -m benchmarks.levers", levers=rows)


if __name__ == "__main__":
    main()
