"""Promise 5: a run ends well or in a line that says what diverged, never in a column of nan.

python -m tests.faults.numbers [long]
"""

import json
import math
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator

from tests.faults.cases import small_dataset
from tests.faults.table import Row, as_markdown, row_of
from tests.tiny import tiny_config

_RATES = (0.1, 1.5, 10.0, 1e3, 1e6)
_WEIGHTS = {"rapid's weights": (25.0, 1.0), "balanced weights": (1.0, 0.28)}
_LINE = re.compile(r"^[^\n]+ became [^\n]+ at step \d+[^\n]*$")


def _rapid() -> object:
    """rapid.py, its network and its weights, in 12 steps of 64 images at a rate of 1.5."""
    from configs import rapid

    config = rapid.get_config()
    few = {"data.batch_size": 64, "data.num_val": 80, "optim.epochs": 2.0, "optim.lr": 1.5}
    config.update_from_flattened_dict({**few, "optim.warmup_epochs": 0.0})
    config.training.use_amp = False
    return config


def _outcome(folder: pathlib.Path, config, name: str) -> str | None:
    """None if the run ended in finite figures, or in the line that it should."""
    from jepa_jax.errors import TrainingError
    from jepa_jax.metrics import read_metrics
    from jepa_jax.train import train_and_evaluate

    try:
        train_and_evaluate(config, folder, dataset=small_dataset())
    except TrainingError as error:
        if not _LINE.match(str(error)):
            return f"{name}: {error}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    for row in read_metrics(folder / "metrics.jsonl"):
        figures = [value for key, value in row.items() if key.startswith("train/")]
        if not all(type(value) is float and math.isfinite(value) for value in figures):
            return f"{name}: {row}"
    return None


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Rates up to a million with every optimiser, each told to stop and to back off.

    Args:
      is_long: else the highest rate and LARS alone.
      folder: for the runs.
    """
    optimizers = ("lars", "sgd", "adamw", "muon") if is_long else ("lars",)
    rates = _RATES if is_long else (1e6,)
    number = 0
    for on_nan, words in (("stop", "told to stop"), ("back_off", "told to back off")):
        outcomes = []
        for optimizer in optimizers:
            for std, cov in _WEIGHTS.values() if is_long else [(25.0, 1.0)]:
                for rate in rates:
                    number += 1
                    config = tiny_config(
                        optim__warmup_epochs=0.0,
                        optim__name=optimizer,
                        optim__lr=rate,
                        loss__std_coeff=std,
                        loss__cov_coeff=cov,
                        training__on_nan=on_nan,
                    )
                    name = f"{optimizer}, rate {rate:g}, {on_nan}"
                    outcomes.append(_outcome(folder / str(number), config, name))
        span = f"rates from {rates[0]:g} to {rates[-1]:g}" if is_long else f"a rate of {rates[0]:g}"
        yield row_of(5, f"{span}, {words}", outcomes)
    if is_long:
        found = [_outcome(folder / "rapid", _rapid(), "rapid.py")]
        yield row_of(5, "a rate of 1.5 in rapid.py, in 12 steps of 64 images", found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = list(rows("long" in sys.argv, pathlib.Path(name)))
    print(as_markdown(found))
    print(json.dumps([failure for row in found for failure in row.failures], indent=1))
