"""All that the owner of a GPU should measure, in pieces of which none is measured twice.

A piece is a process or a few, ends within eight minutes and leaves one JSON file. The same command
goes on with those that are missing; suite.json and suite.md are written at the end of every call.
A piece counts if it is of this config, these versions and this device.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Collection
from typing import Any

from jepa_jax import configs
from jepa_jax.benchmark import measure, peer, shares, startup, sweep, whole_run
from jepa_jax.benchmark.processes import ROOT, MeasurementError, run_json
from jepa_jax.benchmark.step import NUM_IMAGES
from jepa_jax.benchmark.table import NOT_MEASURED, Table, as_markdown, number, percent
from jepa_jax.config import flatten
from jepa_jax.config_flags import GivenConfig, given_config
from jepa_jax.errors import ConfigError, JepaError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.progress import duration, say

_MOST_SECONDS = 460.0
# A whole run is cut into stretches: the shortest that is worth its start, and what a stop needs.
_LEAST_STRETCH, _SECONDS_TO_SAVE = 150.0, 40.0
# The lengths of configs/speedrun.py, and the seconds that are asked of them on one H200: par, goal.
_LADDER = {"55": (5.0, 1.5), "80": (60.0, 15.0), "90": (420.0, 120.0), "92": (1380.0, 480.0)}
_MINIATURE = {
    "data.batch_size": 100,
    "data.num_val": 80,
    "data.view_size": 0,
    "model.stage_sizes": (1, 1),
    "model.width": 4,
    "model.expand_dim": 0,
    "model.proj_hidden_dim": 8,
    "model.proj_output_dim": 8,
    "optim.lr": 0.05,
    "optim.warmup_epochs": 1.0,
    "optim.epochs": 2,
    "training.use_amp": False,
}


@dataclasses.dataclass(frozen=True)
class _Size:
    """How much the suite measures."""

    num_images: int = NUM_IMAGES
    batch_sizes: tuple[int, ...] = sweep.BATCH_SIZES
    dims: tuple[int, ...] = sweep.DIMS
    rungs: tuple[str, ...] = tuple(_LADDER)
    cold_repeats: int = 3
    warm_repeats: int = 5
    repeats: int = 5
    variants: tuple[peer.Variant, ...] = peer.VARIANTS
    ratios: tuple[peer.Ratio, ...] = peer.RATIOS
    num_pairs: int = peer.PAIRS
    most_seconds: float = _MOST_SECONDS


_SMALL = _Size(
    num_images=400,
    batch_sizes=(20, 100),
    dims=(16,),
    rungs=("55",),
    cold_repeats=1,
    warm_repeats=1,
    repeats=2,
    variants=(peer.Variant("eager", "float32", "contiguous", "device"),),
    ratios=(peer.Ratio("float32", "device"),),
    num_pairs=1,
    most_seconds=100.0,
)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One measurement: its file's name, the seconds it should take, and how it is made.

    Attributes:
      absent: why it cannot be made here.
      is_current: whether figures that were stored still count.
    """

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]
    absent: str = ""
    is_current: Callable[[dict[str, Any]], bool] = lambda figures: True


class Suite:
    """The pieces of one config, and those of them that a folder already has.

    Args:
      given: the config.
      folder: created.
      is_miniature: the same code at sizes that measure nothing.
      peer_python: of the environment with PyTorch.

    Raises:
      ConfigError: if that cannot be run.
      MeasurementError: if the device cannot be asked for its name.
    """

    def __init__(
        self, given: GivenConfig, folder: pathlib.Path, *, is_miniature: bool, peer_python: str
    ):
        if is_miniature:
            given = given_config(given.flags(**_MINIATURE))
        self.given, self.folder = given, folder
        self.size = _SMALL if is_miniature else _Size()
        self.is_miniature = is_miniature
        self.errors: dict[str, str] = {}
        self._deadline = math.inf
        self._piece_deadline = time.perf_counter() + self.size.most_seconds
        self._peer_python = peer_python
        self._peer_absent = ""
        if not peer.has_torch(peer_python):
            self._peer_absent = "PyTorch is not installed"
        elif not (ROOT / "benchmarks").is_dir():
            self._peer_absent = "benchmarks/ is not here"
        else:
            self._peer_absent = peer.what_it_lacks(given.config)
        environment = self._run("--measure-device")["environment"]
        self._key = {
            "schema_version": measure.SCHEMA_VERSION,
            "config": _plain(flatten(given.config.to_dict())),
            "versions": measure.versions(),
            **{name: environment[name] for name in ("device", "processor")},
            "is_miniature": is_miniature,
        }
        folder.mkdir(parents=True, exist_ok=True)

    # --- the pieces -------------------------------------------------------------------------------

    def pieces(self) -> list[_Piece]:
        """In the order in which they are measured: what everything else is compared with first."""
        size = self.size
        images = f"--images={size.num_images}"
        repeats = f"--repeats={size.repeats}"
        saving = {"logging.save_every": 1}  # what is asked for: a checkpoint every epoch
        of_run = functools.partial(self._in_full, "rapid", self.given.flags(**saving))
        return [
            _Piece("rates", 90.0, functools.partial(self._run, "--measure-rates", *self._small)),
            _Piece("step", 180.0, functools.partial(self._run, "--measure-step", images, repeats)),
            _Piece("shares", 300.0, functools.partial(self._run, "--measure-shares", images)),
            _Piece("epoch", 240.0, functools.partial(self._run, "--measure-epoch", images)),
            _Piece("startup", 300.0, self._startup),
            _Piece("rapid", _LEAST_STRETCH, of_run),
            *(
                _Piece(
                    f"{kind}-{value}",
                    180.0,
                    functools.partial(self._point, kind, value, [images, repeats]),
                )
                for kind, value in sweep.points(size.batch_sizes, size.dims)
            ),
            *map(self._rung, size.rungs),
            _Piece("profile", 180.0, self._profile),
            *self._peer_pieces(),
        ]

    @property
    def _small(self) -> list[str]:
        return ["--miniature"] * self.is_miniature

    def _seconds_left(self) -> float:
        """For the next process of the piece under way."""
        return max(1.0, self._piece_deadline - time.perf_counter())

    def _run(self, *arguments: str) -> dict[str, Any]:
        command = ["-m", "jepa_jax.benchmark", *arguments, *self.given.flags()]
        return run_json(command, timeout=self._seconds_left())

    def _startup(self) -> dict[str, Any]:
        return startup.measure_startup(
            self.given.flags(),
            cold_repeats=self.size.cold_repeats,
            warm_repeats=self.size.warm_repeats,
            seconds_left=self._seconds_left,
        )

    def _point(self, kind: str, value: int, arguments: list[str]) -> dict[str, Any]:
        return sweep.measure_point(
            self.given,
            kind,
            value,
            smallest=self.figures(f"batch-{min(self.size.batch_sizes)}"),
            arguments=arguments,
            timeout=self._seconds_left(),
        )

    def _run_folder(self, name: str, **of_run: Any) -> pathlib.Path:
        """Of this config, these versions and this device: no other run goes on in it.

        Args:
          name: of the piece.
          of_run: what a run decides beside them.
        """
        key = json.dumps({**self._key, **of_run}, sort_keys=True).encode()
        return self.folder / f"{name}-{zlib.crc32(key):08x}"

    def _in_full(self, name: str, flags: list[str], **of_run: Any) -> dict[str, Any]:
        seconds = self._seconds_left() - _SECONDS_TO_SAVE
        return whole_run.run_in_full(flags, self._run_folder(name, **of_run), seconds)

    def _profile(self) -> dict[str, Any]:
        seconds = self._seconds_left() - _SECONDS_TO_SAVE
        return whole_run.run_profile(self.given.flags(), self._run_folder("profile"), seconds)

    def _rung(self, length: str) -> _Piece:
        """A length of configs/speedrun.py in full, without the flags of the suite's own config."""
        name, path = f"ladder-{length}", configs.FOLDER / "speedrun.py"
        if not path.is_file():
            return _Piece(name, _LEAST_STRETCH, dict, "no configs/speedrun.py here")
        given = given_config([f"--config={path}:{length}"])
        if self.is_miniature:
            given = given_config(given.flags(**_MINIATURE))
        config = _plain(flatten(given.config.to_dict()))

        def work() -> dict[str, Any]:
            figures = self._in_full(name, given.flags(), config=config)
            return {"config": config, **figures}

        # The suite's key says nothing of this file.
        return _Piece(
            name, _LEAST_STRETCH, work, is_current=lambda figures: figures.get("config") == config
        )

    def _peer_pieces(self) -> list[_Piece]:
        absent = self._peer_absent
        screens = [
            _Piece(f"peer-{at.name}", 240.0, functools.partial(self._screen, at), absent)
            for at in self.size.variants
        ]
        pairs = [
            _Piece(
                f"peer-{ratio.name}-pair{number}",
                240.0,
                functools.partial(self._pair, ratio),
                absent,
                functools.partial(self._is_of_the_fastest, ratio),
            )
            for ratio in self.size.ratios
            for number in range(self.size.num_pairs)
        ]
        return [*screens, *pairs]

    @functools.cached_property
    def _peer(self) -> peer.Peer:
        return peer.Peer(
            self.given,
            self.folder,
            python=self._peer_python,
            num_images=self.size.num_images,
            num_workers=min(self.given.config.data.num_workers, os.cpu_count() or 1),
            seconds_left=self._seconds_left,
        )

    def _screen(self, variant: peer.Variant) -> dict[str, Any]:
        return self._peer.theirs(variant, variant.augment)

    def _pair(self, ratio: peer.Ratio) -> dict[str, Any]:
        variant = peer.fastest(self._screened(), ratio)
        return {**self._peer.pair(ratio, variant), "variant": variant.name}

    def _is_of_the_fastest(self, ratio: peer.Ratio, figures: dict[str, Any]) -> bool:
        try:
            return figures["variant"] == peer.fastest(self._screened(), ratio).name
        except MeasurementError:
            return False

    def _screened(self) -> dict[peer.Variant, Any]:
        found = {at: self.figures(f"peer-{at.name}") for at in self.size.variants}
        return {at: figures for at, figures in found.items() if figures}

    # --- files ------------------------------------------------------------------------------------

    def figures(self, name: str) -> dict[str, Any] | None:
        """Those of a piece that was measured, of this config, these versions and this device."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            stored = read_json(path)
        except JepaError:
            return None
        return stored["figures"] if stored.get("key") == self._key else None

    def _current(self, piece: _Piece) -> dict[str, Any] | None:
        figures = self.figures(piece.name)
        return figures if figures is not None and piece.is_current(figures) else None

    def check(self, names: Collection[str]) -> None:
        """ConfigError unless there is a piece of each name that can be measured here."""
        pieces = {piece.name: piece for piece in self.pieces()}
        for name in names:
            if name not in pieces:
                known = ", ".join(pieces)
                raise ConfigError(f"--only={name} is no piece of the suite: {known}")
            if absent := pieces[name].absent:
                raise ConfigError(f"--only={name} cannot be measured here: {absent}")

    def measure(self, minutes: float | None = None, only: Collection[str] = ()) -> bool:
        """Measures what is missing; whether everything is there or was tried.

        Args:
          minutes: no piece is begun that may not end in so many.
          only: the names of the pieces that are wanted; empty for all.
        """
        if minutes:
            self._deadline = time.perf_counter() + 60 * minutes
        for piece in self.pieces():
            if only and piece.name not in only:
                continue
            while not piece.absent and self._current(piece) is None:
                if time.perf_counter() + piece.seconds > self._deadline:
                    return False
                if self._measure(piece):
                    break
        return True

    def _measure(self, piece: _Piece) -> bool:
        """Whether the piece is over: written or failed, not only begun."""
        say(f"{'measuring':<10}{piece.name}")
        began = time.perf_counter()
        self._piece_deadline = min(began + self.size.most_seconds, self._deadline)
        try:
            figures = piece.measure()
        except whole_run.Unfinished:
            return False
        except MeasurementError as error:
            say(f"{'failed':<10}{piece.name}: {error}")
            # Cut short by --minutes it was only begun.
            if time.perf_counter() >= self._deadline:
                return False
            self.errors[piece.name] = str(error)
            return True
        what = f"{piece.name}, one piece of --suite"
        seconds = time.perf_counter() - began
        content = measure.document(what, key=self._key, seconds=seconds, figures=figures)
        write_json(self.folder / f"{piece.name}.json", content)
        return True

    def write(self) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes suite.json and suite.md from what is there; their paths."""
        of_suite = self.pieces()
        pieces = {piece.name: self._current(piece) for piece in of_suite}
        reasons = {piece.name: self._reason(piece) for piece in of_suite}
        missing = {name: reasons[name] for name, figures in pieces.items() if figures is None}
        json_path, text_path = self.folder / "suite.json", self.folder / "suite.md"
        what = "everything that --suite measures"
        content = measure.document(what, key=self._key, not_measured=missing, pieces=pieces)
        write_json(json_path, content)
        lines = [f"# {self.given.name} on {self._key['device']}", ""]
        if self.is_miniature:
            lines += ["In miniature: no figure here says anything about speed.", ""]
        found = ", ".join(f"{name} {text}" for name, text in self._key["versions"].items())
        lines += [f"Versions: {found}.", "", *map(as_markdown, self._tables(pieces, reasons))]
        text_path.write_text("\n".join(lines) + "\n")
        return json_path, text_path

    def _reason(self, piece: _Piece) -> str:
        return piece.absent or self.errors.get(piece.name, "not yet")

    def _tables(self, pieces: dict[str, Any], reasons: dict[str, str]) -> list[Table]:
        rows = [
            pieces[f"{kind}-{value}"]
            or {
                "kind": kind,
                "value": value,
                "measured": None,
                "reason": reasons[f"{kind}-{value}"],
            }
            for kind, value in sweep.points(self.size.batch_sizes, self.size.dims)
        ]
        rates = pieces["rates"]
        return [
            *_step_tables(pieces, reasons),
            measure.startup_table(pieces["startup"] or {"error": reasons["startup"]}),
            _run_table(f"{self.given.name} in full", pieces["rapid"], reasons["rapid"]),
            *sweep.sweep_tables(rows, rates and rates["rates"]["matmul"]),
            _ladder_table(self.size.rungs, pieces, reasons),
            _profile_table(pieces["profile"], reasons["profile"]),
            *self._peer_tables(pieces, reasons),
        ]

    def _peer_tables(self, pieces, reasons) -> list[Table]:
        names = [variant.name for variant in self.size.variants]
        failed = {name: reasons[f"peer-{name}"] for name in names if not pieces[f"peer-{name}"]}
        measured: dict[peer.Ratio, Any] = {}
        without: dict[str, str] = {}
        for ratio in self.size.ratios:
            of_ratio = [f"peer-{ratio.name}-pair{k}" for k in range(self.size.num_pairs)]
            pairs = [pieces[name] for name in of_ratio if pieces[name]]
            if pairs:
                measured[ratio] = {**peer.summary(pairs), "variant": pairs[0]["variant"]}
            else:
                without[ratio.name] = reasons[of_ratio[0]]
        screening = peer.screening_table(self._screened(), failed)
        note = "" if without and not measured else self._peer.note
        return [screening, peer.ratio_table(measured, without, note)]


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _missing(title: str, reason: str) -> Table:
    return Table(title, ("", "figure"), [["all of it", NOT_MEASURED]], reason)


def _step_tables(pieces: dict[str, Any], reasons: dict[str, str]) -> list[Table]:
    """Of the device's rates, the step and its shares, each from the pieces that it needs."""
    rates, step, parts, after = (pieces[name] for name in ("rates", "step", "shares", "epoch"))
    beside: dict[str, Any] = {}
    if rates and step:
        xla = parts and parts["xla"]
        beside = measure.step_beside_rates(step["step"], rates["rates"], xla)

    def table(title: str, needs: tuple[str, ...], make: Callable[[], Table]) -> Table:
        lacking = [f"{name}: {reasons[name]}" for name in needs if not pieces[name]]
        return _missing(title, "; ".join(lacking)) if lacking else make()

    def speed(name: str) -> float:
        return step["step"][name]["median"]

    return [
        table("Rates of the device", ("rates",), lambda: measure.rates_table(rates["rates"])),
        table("A step", ("rates", "step"), lambda: measure.step_table(beside["step"])),
        table(
            "Roofline",
            ("rates", "step", "shares"),
            lambda: measure.roofline_table(beside["roofline"], beside["step"]),
        ),
        table(
            "Shares of a step",
            ("step", "shares"),
            lambda: measure.shares_table(shares.with_shares(parts["parts"], speed("step_seconds"))),
        ),
        table(
            "After an epoch",
            ("step", "epoch"),
            lambda: measure.epoch_table(
                shares.of_an_epoch(after["parts"], speed("images_per_second"))
            ),
        ),
    ]


def _run_table(title: str, run: dict[str, Any] | None, reason: str) -> Table:
    if run is None:
        return _missing(title, reason)
    first = run["command_to_first_step_seconds"]
    rows = [
        ["first step to last probe, s", number(run["first_step_to_last_probe_seconds"])],
        *([f"of that {name}, s", number(value)] for name, value in run["phases"].items()),
        ["command to first step, s", number(first[0]) if first else NOT_MEASURED],
        ["processes", str(len(first))],
        ["epochs", str(run["epochs"])],
        ["source images/s", number(run["images_per_second"])],
        *([name, percent(value)] for name, value in run["accuracy"].items()),
    ]
    return Table(title, ("", "figure"), rows, "One run, with a probe and a checkpoint every epoch.")


def _ladder_table(rungs: tuple[str, ...], pieces: dict[str, Any], reasons: dict[str, str]) -> Table:
    """The judged figure is ridge on test images; the clock is that of summary.json."""
    judged = ("ridge, test", "ridge, val", "online, val")
    header = ("rung", "par, s", "goal, s", "on the clock, s", "compile, s", *judged)
    header = (*header, "images/s", "processes")
    rows, notes = [], ["One run a rung, at its last step. Par and goal are those of one H200."]
    for rung in rungs:
        figures = pieces[f"ladder-{rung}"]
        given = [f"{rung} %", *map(number, _LADDER[rung])]
        if not figures:
            rows.append([*given, *[NOT_MEASURED] * (len(header) - len(given))])
            notes.append(f"{rung} %: {reasons[f'ladder-{rung}']}.")
            continue
        seconds = (figures["clock_seconds"], figures["compile_seconds"])
        names = ("ridge_probe_acc", "val_ridge_probe_acc", "val_online_probe_acc")
        rows.append(
            [
                *given,
                *map(number, seconds),
                *(percent(figures["accuracy"][name]) for name in names),
                number(figures["images_per_second"]),
                str(len(figures["command_to_first_step_seconds"])),
            ]
        )
    return Table("The recipe ladder", header, rows, " ".join(notes))


def _profile_table(profile: dict[str, Any] | None, reason: str) -> Table:
    if profile is None:
        return _missing("Profile", reason)
    rows = [[name, f"{size:,} bytes"] for name, size in profile["files"].items()]
    return Table("Profile", ("file", "size"), rows, f"In {profile['folder']}.")


def run_suite(
    given: GivenConfig,
    folder: pathlib.Path,
    *,
    minutes: float | None,
    only: Collection[str] = (),
    is_miniature: bool,
    peer_python: str,
) -> int:
    """Measures what is missing, and wanted, and writes the tables; the command's exit code."""
    suite = Suite(given, folder, is_miniature=is_miniature, peer_python=peer_python)
    suite.check(only)
    began = time.perf_counter()
    try:
        is_over = suite.measure(minutes, only)
    finally:
        paths = suite.write()
    for path in paths:
        say(f"{'written':<10}{path}")
    taken = duration(time.perf_counter() - began)
    if not is_over:
        say(f"stopped after {taken}; the same command goes on with what is missing")
    else:
        which = "the pieces of --only are" if only else "all pieces are"
        say(f"{which} done after {taken}, {len(suite.errors)} failed")
    return 1 if suite.errors else 0
