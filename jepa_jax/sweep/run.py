"""A sweep as a whole: cells, programs, halving, files."""

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import pathlib
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jepa_jax
from jepa_jax import checkpoint, device
from jepa_jax.config import validate
from jepa_jax.data import Dataset
from jepa_jax.errors import CheckpointError, ConfigError, JepaError
from jepa_jax.lock import only_process_in
from jepa_jax.metrics import read_json, write_json
from jepa_jax.pace import Cost, chosen_epochs, with_epochs
from jepa_jax.paths import home_expanded
from jepa_jax.plan import DATASET_KEYS, Plan, initial_state, make_plan
from jepa_jax.progress import Phases, say
from jepa_jax.report.sweep_table import DIVERGED, FINISHED, as_markdown, scale_of
from jepa_jax.sweep import SCHEMA_VERSION
from jepa_jax.sweep.axes import Point, label
from jepa_jax.sweep.cells import (
    WAITING,
    Cell,
    by_program,
    make_cell,
    result_key,
)
from jepa_jax.sweep.judge import (
    encoder_variables,
    judge,
    score,
    score_name,
    untrained_score,
)
from jepa_jax.sweep.lanes import Lanes, choose_lanes, make_lanes, seconds_per_step
from jepa_jax.sweep.live import Live, figures_text
from jepa_jax.sweep.result import (
    TEST,
    halve,
    notes_of,
    row_of,
    rung_shares,
    spread,
    winner_of,
    work_with_rungs,
)
from jepa_jax.sweep.shared import SharedStarts
from jepa_jax.sweep.tracks import Track, train_tracks


@dataclasses.dataclass
class _Program:
    """What one compiled program needs: the plan it was made for, and its lanes."""

    plan: Plan
    lanes: Lanes
    alone: Lanes | None


def _environment() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": device.describe(),
        "python": platform.python_version(),
        "jepa_jax": jepa_jax.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


class Sweep:
    """The points of a sweep, as far as its folder has them.

    Args:
      config: the base, see `configs/`; seeds count up from its meta.seed.
      points: of `axes.points`.
      workdir: created; gets cells/, sweep.json and sweep.md.
      num_seeds: of every point.
      stack: how many cells are trained side by side; 0 measures what is fastest.
      factor: of successive halving; 0 for none.
      name, command: said in the result.
      dataset: in place of the config's.

    Raises:
      ConfigError: for a point that cannot be run, in one line that names it.
    """

    def __init__(
        self,
        config: ConfigDict,
        points: Sequence[Point],
        workdir: str | pathlib.Path,
        *,
        num_seeds: int = 3,
        stack: int = 0,
        factor: int = 0,
        name: str = "sweep",
        command: str = "",
        dataset: Dataset | None = None,
    ):
        if num_seeds < 1:
            raise ConfigError(f"a sweep needs at least 1 seed, got {num_seeds}")
        if factor == 1 or factor < 0:
            raise ConfigError(f"halving keeps one of 2 or more, got {factor}")
        self.workdir = home_expanded(workdir).absolute()
        self._config, self._points = config, list(points)
        self._seeds = range(config.meta.seed, config.meta.seed + num_seeds)
        self._stack, self._factor = stack, factor
        self._name, self._command, self._dataset = name, command, dataset
        self._cells = self._make_cells()
        self._programs: dict[str, _Program] = {}
        self._num_programs = 0
        self._steps_saved = 0
        self._phases = Phases()
        self._stopped: dict[int, str] = {}
        self._execution: dict[str, Any] | None = None
        self._floor: dict[str, Any] | None = None
        self._began = time.perf_counter()
        self._earlier: dict[str, float] = {}

    def _make_cells(self) -> list[list[Cell]]:
        folder, found = self.workdir / "cells", []
        for point in self._points:
            cells = [make_cell(self._config, point, seed, folder) for seed in self._seeds]
            _validate(cells[0].config, point)
            found.append(cells)
        return found

    # --- budget -------------------------------------------------------------------------------

    def fit_to_budget(self, seconds: float, spent: float = 0.0) -> None:
        """Chooses the epochs of every point so that the whole sweep takes so long.

        Measured once: a folder that has a budget.json gets the epochs that stand there. The
        schedule is that of the config, stretched or squeezed.

        Args:
          seconds: for compiling, training and evaluation.
          spent: how many of them have passed.

        Raises:
          ConfigError, CheckpointError: as `pace.chosen_epochs`.
        """
        _prepare(self.workdir)
        with only_process_in(self.workdir):
            epochs = chosen_epochs(self.workdir, seconds, functools.partial(self._measure, spent))
        self._config = with_epochs(self._config, epochs)
        self._cells = self._make_cells()
        self.__dict__.pop("_first_plan", None)

    def _measure(self, spent: float) -> tuple[Cost, int]:
        """What this sweep costs, an epoch being one of every point and seed."""
        began = time.perf_counter()
        say(f"{'measuring':<10}how fast these points train, for their budget")
        every = [cell for cells in self._cells for cell in cells]
        epoch = judging = 0.0
        trained, judged = work_with_rungs(len(self._points), self._factor)
        for cells in by_program(every).values():
            program = self._program(cells[0], len(cells))
            plan, lanes = program.plan, program.lanes
            state = initial_state(plan)
            for lane in range(lanes.num_lanes):
                lanes.load(lane, jax.tree.map(jnp.copy, state), plan.hparams)
            step = seconds_per_step(lanes, plan.batches_of(0))
            epoch += trained * len(cells) * step * plan.steps_per_epoch
            judge(plan, state, encoder_variables(plan, state))  # the first one compiles
            start = time.perf_counter()
            judge(plan, state, encoder_variables(plan, state))
            judging += judged * len(cells) * (time.perf_counter() - start)
        # The winner's floors and its look at the test images are judgements as well.
        judging *= 1 + 2 / (judged * len(self._points))
        fixed = spent + time.perf_counter() - began + judging
        return Cost(fixed, epoch), self._first_plan.steps_per_epoch

    # --- programs -----------------------------------------------------------------------------

    @functools.cached_property
    def _first_plan(self) -> Plan:
        cell = self._cells[0][0]
        return make_plan(cell.config, self.workdir, self._dataset, None, None, None, None)

    def _plan(self, cell: Cell) -> Plan:
        first = self._first_plan
        data, own = first.config.data, cell.config.data
        same = all(data[key] == own[key] for key in DATASET_KEYS)
        dataset = first.dataset if same else self._dataset
        return make_plan(cell.config, self.workdir, dataset, None, None, None, None)

    def _program(self, cell: Cell, num_cells: int) -> _Program:
        """The program of a cell, compiled when it is first asked for."""
        if cell.program not in self._programs:
            if not self._factor:  # with rungs every program is asked for again
                self._programs.clear()
                gc.collect()
            with self._phases("compile"):
                plan = self._plan(cell)
                state = jax.block_until_ready(initial_state(plan))
                lanes, alone = self._lanes_for(plan, state, num_cells)
            self._programs[cell.program] = _Program(plan, lanes, alone)
            self._num_programs += 1
        return self._programs[cell.program]

    def _lanes_for(self, plan: Plan, state: Any, num_cells: int) -> tuple[Lanes, Lanes | None]:
        """The lanes, and a single one where it has been compiled to choose them."""
        devices = jax.local_devices()
        if not self._stack and self._execution is None:
            lanes, alone, text = choose_lanes(plan, state, num_cells, devices)
            self._execution = {"lanes": lanes.num_lanes, "text": text}
            say(f"{'how':<10}{text}")
            return lanes, alone
        wanted = self._stack or (self._execution or {})["lanes"]
        if self._stack:
            text = "one after another" if wanted == 1 else f"{wanted} side by side"
            self._execution = {"lanes": wanted, "text": text}
        num_lanes = max(1, min(wanted, num_cells))
        # As many on each device.
        spread_over = max(n for n in range(1, len(devices) + 1) if num_lanes % n == 0)
        return make_lanes(plan, state, num_lanes, devices[:spread_over]), None

    # --- training -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains what is missing, judges it, and writes the result.

        Returns:
          the content of sweep.json.

        Raises:
          ConfigError, DataError: one line each.
          CheckpointError: another process is at work in the folder.
          Interrupted: on a signal, with what is finished on record.
        """
        _prepare(self.workdir)
        with only_process_in(self.workdir):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._read_earlier()
        unit = "RankMe" if not self._first_plan.has_labels else "ridge, val %"
        shares = rung_shares(len(self._points), self._factor) if self._factor else []
        active = list(range(len(self._points)))
        with Live(f"{len(self._points)} points, {len(self._seeds)} seeds", unit) as live:
            try:
                for share in [*shares, 1.0]:
                    self._train(active, share, live)
                    if share < 1:
                        active = self._halve(active, share)
            finally:
                document = self.write()
        if document["winner"] is None:
            return document
        with self._phases("evaluation"):
            self._conclude(document["winner"])
        return self.write()

    def _stop_of(self, plan: Plan, share: float) -> int:
        return max(1, round(share * plan.num_steps))

    def _train(self, active: Sequence[int], share: float, live: Live) -> None:
        # Every point with the first seed before any with the second: an early overview.
        order = [self._cells[place][n] for n in range(len(self._seeds)) for place in active]
        missing = [cell for cell in order if not self._is_there(cell, share)]
        for cells in by_program(missing).values():
            program = self._program(cells[0], len(cells))
            tracks = []
            for cell in cells:
                plan = program.plan.with_numbers(cell.config, cell.folder)
                tracks.append(Track(cell, plan, self._stop_of(plan, share)))
            if program.lanes.num_lanes > 1:
                # The longest first, so that no lane is left alone for long at the end.
                tracks.sort(key=lambda track: (track.cell.seed, -track.stop))
            on_stop = functools.partial(self._stop, live, share)
            on_lost = functools.partial(self._lose, live)
            queue = collections.deque(tracks)
            if not self._factor:  # rungs lie at shares of every cell's own steps
                shared = SharedStarts(tracks)
                queue = shared.queue
                on_stop, on_lost = shared.on_stop(on_stop), shared.on_lost(on_lost)
                self._steps_saved += shared.num_saved
            with self._phases("lanes"):
                seconds = train_tracks(
                    program.lanes,
                    queue,
                    alone=program.alone,
                    on_stop=on_stop,
                    on_lost=on_lost,
                    on_news=functools.partial(self._show, live),
                )
            self._phases.add({"steps": seconds})

    def _is_there(self, cell: Cell, share: float) -> bool:
        record = cell.record()
        if record is None:
            return False
        if record["status"] in (FINISHED, DIVERGED):
            return True
        return share < 1 and _rung(record, share) is not None

    def _record(self, track: Track, status: str, **figures: Any) -> dict[str, Any]:
        """Puts a track on record, with the rungs it had."""
        earlier = track.cell.record() or {}
        record = {
            "status": status,
            "steps": track.step,
            "reason": track.reason or None,
            "seconds": track.seconds,
            "images": track.step * track.plan.config.data.batch_size,
            "train_loss": track.curve[-1]["train/loss"] if track.curve else None,
            "curve": track.curve,
            "rungs": earlier.get("rungs", []),
            **figures,
        }
        track.cell.write(record)
        return record

    def _stop(self, live: Live, share: float, track: Track, state: Any) -> None:
        name = score_name(track.plan)
        cell = f"{label(track.cell.point)}, seed {track.cell.seed}"
        with self._phases("evaluation"):
            variables = encoder_variables(track.plan, state)
            if share < 1:
                figure = score(track.plan, variables)[name]
                track.save(state)
                rungs = (track.cell.record() or {}).get("rungs", [])
                rungs = [rung for rung in rungs if rung["share"] != share]
                rungs = [*rungs, {"share": share, "step": track.step, "score": figure}]
                record = {**self._record(track, WAITING, rungs=rungs), name: figure}
                live.line("rung", f"{cell} at step {track.step}: {figures_text(record, name)}")
                return
            figures = judge(track.plan, state, variables)
            checkpoint.save_tree(track.cell.folder / "encoder", variables)
            track.write_metrics()
            record = self._record(track, FINISHED, **figures)
            shutil.rmtree(track.cell.folder / "checkpoints", ignore_errors=True)
        live.line("done", f"{cell}: {figures_text(record, name)}")
        self.write()

    def _lose(self, live: Live, track: Track) -> None:
        self._record(track, DIVERGED)
        shutil.rmtree(track.cell.folder / "checkpoints", ignore_errors=True)
        live.line("diverged", f"{label(track.cell.point)}, seed {track.cell.seed}: {track.reason}")
        self.write()

    def _show(self, live: Live, running: Sequence[Track]) -> None:
        name = score_name(self._first_plan)
        scale = scale_of(name)
        under_way = {id(track.cell): track for track in running}
        rows = []
        for place, cells in enumerate(self._cells):
            done, scores, texts = 0.0, [], []
            for cell in cells:
                record = cell.record() or {}
                if (track := under_way.get(id(cell))) is not None:
                    done += track.step / max(1, track.plan.num_steps)
                    texts.append(f"seed {cell.seed} at step {track.step}")
                elif record.get("status") in (FINISHED, DIVERGED):
                    done += 1
                if record.get(name) is not None:
                    scores.append(record[name])
                if record.get("reason"):
                    texts.append(f"seed {cell.seed}: {record['reason']}")
            mean = scale * sum(scores) / len(scores) if scores else None
            text = "; ".join([*texts, *filter(None, [self._stopped.get(place)])])
            rows.append((label(self._points[place]), done / len(cells), mean, text))
        live.show(rows)

    def _halve(self, active: Sequence[int], share: float) -> list[int]:
        scores = {}
        for place in active:
            rungs = [_rung(cell.record() or {}, share) for cell in self._cells[place]]
            scores[place] = [rung["score"] for rung in rungs if rung is not None]
        kept, count = halve(scores, len(self._seeds), self._factor)
        for place in set(active) - set(kept):
            step = self._stop_of(self._first_plan, share)
            self._stopped[place] = f"not among the best {len(kept)} of {count} at step {step}"
        return kept

    # --- result -------------------------------------------------------------------------------

    def _read_earlier(self) -> None:
        path = self.workdir / "sweep.json"
        if not path.exists():
            return
        with contextlib.suppress(JepaError, KeyError, TypeError):
            earlier = read_json(path)
            if earlier["config"] == result_key(self._config):
                self._earlier = earlier["cost"]
                self._floor = earlier["floor"]
                if earlier["environment"] == _environment():
                    self._execution = earlier["execution"]

    def _cost(self) -> dict[str, Any]:
        own = self._phases.seconds
        now = {
            "wall_seconds": time.perf_counter() - self._began,
            "step_seconds": own.get("steps", 0.0),
            "compile_seconds": own.get("compile", 0.0),
            "evaluation_seconds": own.get("evaluation", 0.0),
            "programs": self._num_programs,
            "steps_saved": self._steps_saved,
        }
        total = {name: value + self._earlier.get(name, 0) for name, value in now.items()}
        parts = sum(total[f"{name}_seconds"] for name in ("step", "compile", "evaluation"))
        return {**total, "other_seconds": max(0.0, total["wall_seconds"] - parts)}

    def write(self) -> dict[str, Any]:
        """Writes sweep.json and sweep.md of what is on record now."""
        rows = [
            row_of(point, cells, self._stopped.get(place))
            for place, (point, cells) in enumerate(zip(self._points, self._cells, strict=True))
        ]
        name = score_name(self._first_plan)
        axes: dict[str, list[Any]] = {}
        for point in self._points:
            for key, value in point.items():
                if value not in axes.setdefault(key, []):
                    axes[key].append(value)
        halving = None
        if self._factor:
            rungs = rung_shares(len(self._points), self._factor)
            halving = {"factor": self._factor, "rungs": rungs}
        winner = winner_of(rows, name)
        for row in rows:
            if winner is None or row["point"] != winner["point"]:
                for cell in row["cells"]:  # of an earlier winner
                    cell.pop(TEST, None)
        document = {
            "schema_version": SCHEMA_VERSION,
            "command": self._command,
            "name": self._name,
            "environment": _environment(),
            "config": result_key(self._config),
            "axes": axes,
            "seeds": list(self._seeds),
            "score": name,
            "execution": self._execution or {"lanes": 1, "text": "all was on record"},
            "halving": halving,
            "rows": rows,
            "floor": self._floor,
            "winner": winner,
            "notes": notes_of(rows),
            "cost": self._cost(),
        }
        write_json(self.workdir / "sweep.json", document)
        (self.workdir / "sweep.md").write_text(as_markdown(document), encoding="utf-8")
        return document

    def _conclude(self, winner: Mapping[str, Any]) -> None:
        """Measures the floor of the winner, and puts its look at the test set on record."""
        cells = self._cells[self._points.index(winner["point"])]
        plan = self._plan(cells[0])
        if self._floor is None or self._floor["of"] != cells[0].program:
            scores = [
                untrained_score(plan.with_numbers(cell.config, cell.folder)) for cell in cells
            ]
            name = score_name(plan)
            self._floor = {
                name: spread([one[name] for one in scores]),
                "feature_dim": plan.feature_dim,
                "of": cells[0].program,
            }
        if plan.has_labels and plan.dataset.test_labels is not None:
            for cell in cells:
                self._test(plan, cell)

    def _test(self, plan: Plan, cell: Cell) -> None:
        record = cell.record() or {}
        if record.get(TEST) is None:
            variables = checkpoint.load_tree(cell.folder / "encoder")
            cell.write({**record, TEST: score(plan, variables, with_test=True)[TEST]})


def _rung(record: Mapping[str, Any], share: float) -> dict[str, Any] | None:
    return next((rung for rung in record.get("rungs", []) if rung["share"] == share), None)


def _validate(config: ConfigDict, point: Point) -> None:
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"point {label(point)}: {error}") from error


def _prepare(workdir: pathlib.Path) -> None:
    try:
        (workdir / "cells").mkdir(parents=True, exist_ok=True)
        (workdir / "sweep.md").touch()
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    if (workdir / "config.json").exists():
        raise CheckpointError(f"{workdir} holds a run: give the sweep a folder of its own")
