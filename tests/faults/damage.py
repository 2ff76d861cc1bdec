"""Promise 2: a damaged checkpoint is never trusted, and the newest is never the first to go.

python -m tests.faults.damage [long]
"""

import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from tests.faults.cases import small_dataset
from tests.faults.table import Row, as_markdown, row_of
from tests.tiny import tiny_config

SEED = 11
_HARMS = ("emptied", "cut", "turned", "deleted")


def harm(path: pathlib.Path, how: str, place: float = 0.5) -> None:
    """Empties a file, cuts it, turns one bit of it, or deletes it; `place` is a share of it."""
    content = path.read_bytes()
    at = int(place * len(content))
    if how == "deleted":
        path.unlink()
    elif how == "turned":
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.write_bytes(b"" if how == "emptied" else content[:at])


def _trained(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], object]]:
    """A run with the checkpoints of steps 4, 8 and 12, and what gives a fresh state's shapes."""
    from jepa_jax.plan import initial_state, make_plan
    from jepa_jax.train import train_and_evaluate

    dataset, config = small_dataset(), tiny_config()
    train_and_evaluate(config, folder, dataset=dataset)
    plan = make_plan(config, folder, dataset, None, None, None, None)
    return folder, lambda: jax.eval_shape(lambda: initial_state(plan))


def _same(one: object, other: object) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def _damaged(
    run: pathlib.Path,
    file: pathlib.Path,
    how: str,
    place: float,
    saved: dict[int, tuple],
    template: object,
) -> str | None:
    """Damages one file of the newest checkpoint in a copy; what went wrong, if anything."""
    from jepa_jax.checkpoint import Checkpoints

    newest = max(saved)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "run"
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        harm(copy / "checkpoints" / str(newest) / file, how, place)
        try:
            with contextlib.closing(Checkpoints(copy)) as checkpoints:
                step, state, progress = checkpoints.restore_latest(template)
        except Exception as error:
            return f"{file} {how}: {type(error).__name__}: {error}"
    if not _same((state,), (saved[step][0],)) or progress != saved[step][1]:
        return f"{file} {how}: another state than that of step {step}"
    return None


def _moments(file: pathlib.Path, is_long: bool, random: np.random.Generator) -> list[tuple]:
    if not file.stat().st_size:
        return [("deleted", 0.5)]
    moments = [(how, random.uniform(0, 1)) for how in _HARMS]
    return moments + [("turned", random.uniform(0, 1)) for _ in range(10 if is_long else 0)]


def _newest_stays(folder: pathlib.Path) -> list[str | None]:
    """Watches the folder of a run that saves at every step: the newest whole step never falls."""
    from jepa_jax.train import train_and_evaluate

    config = tiny_config()
    config.logging.save_every_minutes = 1e-9
    seen, done = [], threading.Event()

    def look():
        while not done.wait(0.0005):
            steps = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdecimal()]
            seen.append(max(steps, default=-1))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        train_and_evaluate(config, folder, dataset=small_dataset())
    finally:
        done.set()
        watcher.join()
    falls = [(a, b) for a, b in zip(seen, seen[1:], strict=False) if b < a]
    fall = {b: f"the newest was {a}, then {b}" for a, b in falls}
    return [fall.get(step) for step in sorted({*seen, *fall} - {-1})]


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Files of a checkpoint, each in four ways.

    Args:
      is_long: every file, and ten more turned bits each; else six that are drawn.
      folder: for the runs.
    """
    from jepa_jax.checkpoint import Checkpoints

    run, template = _trained(folder / "run")
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        saved = {step: checkpoints.restore(step, template()) for step in checkpoints.steps()}
    newest = run / "checkpoints" / str(max(saved))
    random, shapes = np.random.default_rng(SEED), template()
    outcomes: dict[str, list[str | None]] = {how: [] for how in _HARMS}
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    if not is_long:
        files = [files[index] for index in sorted(random.permutation(len(files))[:6])]
    for path in files:
        for how, place in _moments(path, is_long, random):
            file = path.relative_to(newest)
            outcomes[how].append(_damaged(run, file, how, place, saved, shapes))
    words = {"turned": "one bit of a checkpoint's file turned"}
    for how, found in outcomes.items():
        yield row_of(2, words.get(how, f"a checkpoint's file {how}"), found)
    yield row_of(
        2,
        "steps that were the newest checkpoint, each until a newer one was whole",
        _newest_stays(folder / "watched"),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = list(rows("long" in sys.argv, pathlib.Path(name)))
    print(as_markdown(found))
    print(json.dumps([failure for row in found for failure in row.failures], indent=1))
