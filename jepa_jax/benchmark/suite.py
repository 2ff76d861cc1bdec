"""All that the owner of a GPU should measure, in pieces of which none is measured twice.

A piece is a process or a few, ends within eight minutes and leaves one JSON file. The same command
goes on with those that are missing; suite.json and suite.md are written at the end of every call.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from jepa_jax.benchmark import measure, peer, startup, sweep, whole_run
from jepa_jax.benchmark.processes import ROOT, MeasurementError, run_json
from jepa_jax.benchmark.step import NUM_IMAGES
from jepa_jax.benchmark.table import NOT_MEASURED, Table, as_markdown, number, percent
from jepa_jax.config import flatten
from jepa_jax.config_flags import GivenConfig, given_config
from jepa_jax.errors import JepaError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.progress import duration, say

_MOST_SECONDS = 460.0
_RUN_SECONDS = 420.0
# A whole run is cut into stretches: the shortest that is worth its start, and what a stop needs.
_LEAST_STRETCH, _SECONDS_TO_SAVE = 150.0, 30.0
_MINIATURE = {
    "data.batch_size": 100,
    "data.num_val": 80,
    "model.stage_sizes": (1, 1),
    "model.width": 4,
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
    warm_repeats: int = 3
    repeats: int = 5
    variants: tuple[peer.Variant, ...] = peer.VARIANTS
    ratios: tuple[peer.Ratio, ...] = peer.RATIOS
    num_pairs: int = peer.PAIRS
    most_seconds: float = _MOST_SECONDS
    run_seconds: float = _RUN_SECONDS


_SMALL = _Size(
    num_images=400,
    batch_sizes=(20, 100),
    dims=(16,),
    warm_repeats=1,
    repeats=2,
    variants=(peer.Variant("eager", "float32", "contiguous"),),
    ratios=(peer.Ratio("float32", "device"),),
    num_pairs=1,
    most_seconds=100.0,
    run_seconds=60.0,
)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One measurement: its file's name, the seconds it should take, and how it is made."""

    name: str
    seconds: float
    measure: Callable[[], dict[str, Any]]
    absent: str = ""


class Suite:
    """The pieces of one config, and those of them that a folder already has.

    Args:
      given: the config.
      folder: created.
      is_miniature: the same code at sizes that measure nothing.
    """

    def __init__(self, given: GivenConfig, folder: pathlib.Path, *, is_miniature: bool):
        if is_miniature:
            given = given_config(given.flags(**_MINIATURE))
        self.given, self.folder = given, folder
        self.size = _SMALL if is_miniature else _Size()
        self.is_miniature = is_miniature
        self.errors: dict[str, str] = {}
        self._deadline = math.inf
        folder.mkdir(parents=True, exist_ok=True)
        self._arguments = [f"--images={self.size.num_images}", f"--repeats={self.size.repeats}"]
        self._key = {
            "schema_version": measure.SCHEMA_VERSION,
            "config": _plain(flatten(given.config.to_dict())),
            "versions": measure.versions(),
            "is_miniature": is_miniature,
        }

    # --- the pieces -------------------------------------------------------------------------------

    def pieces(self) -> list[_Piece]:
        """In the order in which they are measured: what everything else is compared with first."""
        size = self.size
        batch_points = sweep.points(size.batch_sizes, size.dims)
        return [
            _Piece("rates", 90.0, self._rates),
            _Piece("step", 300.0, self._step),
            _Piece("startup", 240.0, self._startup),
            _Piece(
                "rapid",
                _LEAST_STRETCH,
                functools.partial(self._in_full, "rapid", self.given.flags()),
            ),
            *(
                _Piece(f"{kind}-{value}", 180.0, functools.partial(self._point, kind, value))
                for kind, value in batch_points
            ),
            self._ladder_piece(),
            *self._peer_pieces(),
            _Piece("profile", 180.0, self._profile),
        ]

    def _rates(self) -> dict[str, Any]:
        return self._run(["--measure-rates", *["--miniature"] * self.is_miniature])

    def _step(self) -> dict[str, Any]:
        partial = self.folder / "step.partial.json"
        small = ["--miniature"] * self.is_miniature
        self._run(
            ["--no-startup", f"--out={partial}", f"--images={self.size.num_images}", *small]
            + self.given.flags(),
            prints_json=False,
        )
        result = read_json(partial)
        partial.unlink()
        return result

    def _startup(self) -> dict[str, Any]:
        flags, repeats = self.given.flags(), self.size.warm_repeats
        return startup.measure_startup(flags, warm_repeats=repeats)

    def _point(self, kind: str, value: int) -> dict[str, Any]:
        smallest = self.figures(f"batch-{min(self.size.batch_sizes)}")
        return sweep.measure_point(
            self.given,
            kind,
            value,
            smallest=smallest,
            arguments=self._arguments,
            timeout=self.size.most_seconds,
        )

    def _in_full(self, name: str, flags: list[str]) -> dict[str, Any]:
        left = self._deadline - time.perf_counter() - _SECONDS_TO_SAVE
        seconds = min(self.size.run_seconds, left)
        return whole_run.run_in_full(flags, self.folder / name, seconds)

    def _profile(self) -> dict[str, Any]:
        seconds = min(self.size.run_seconds, 150.0)
        return whole_run.run_profile(self.given.flags(), self.folder / "profile", seconds)

    def _ladder_piece(self) -> _Piece:
        path = ROOT / "configs" / "speedrun.py"
        work = functools.partial(self._in_full, "ladder", [f"--config={path}"])
        absent = "" if path.is_file() else "no configs/speedrun.py here"
        return _Piece("ladder", _LEAST_STRETCH, work, absent)

    def _peer_pieces(self) -> list[_Piece]:
        absent = ""
        if importlib.util.find_spec("torch") is None:
            absent = "PyTorch is not installed"
        elif not (ROOT / "benchmarks").is_dir():
            absent = "benchmarks/ is not here"
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
            python=sys.executable,
            num_images=self.size.num_images,
            num_workers=min(self.given.config.data.num_workers, os.cpu_count() or 1),
            timeout=self.size.most_seconds,
        )

    def _screen(self, variant: peer.Variant) -> dict[str, Any]:
        return self._peer.theirs(variant, "none")

    def _pair(self, ratio: peer.Ratio) -> dict[str, Any]:
        variant = peer.fastest(self._screened(), ratio.dtype)
        return {**self._peer.pair(ratio, variant), "variant": variant.name}

    def _screened(self) -> dict[peer.Variant, Any]:
        found = {at: self.figures(f"peer-{at.name}") for at in self.size.variants}
        return {at: figures for at, figures in found.items() if figures}

    def _run(self, arguments: list[str], *, prints_json: bool = True) -> dict[str, Any]:
        command = ["-m", "jepa_jax.benchmark", *arguments]
        return run_json(command, timeout=self.size.most_seconds, expects_json=prints_json)

    # --- files ------------------------------------------------------------------------------------

    def figures(self, name: str) -> dict[str, Any] | None:
        """Those of a piece that was measured, of this config with these versions."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            stored = read_json(path)
        except JepaError:
            return None
        return stored["figures"] if stored.get("key") == self._key else None

    def measure(self, minutes: float | None = None) -> bool:
        """Measures what is missing; whether everything is there or was tried.

        Args:
          minutes: no piece is begun that may not end in so many.
        """
        if minutes:
            self._deadline = time.perf_counter() + 60 * minutes
        for piece in self.pieces():
            while not piece.absent and self.figures(piece.name) is None:
                if time.perf_counter() + piece.seconds > self._deadline:
                    return False
                if self._measure(piece):
                    break
        return True

    def _measure(self, piece: _Piece) -> bool:
        """Whether the piece is over: written or failed, not only begun."""
        say(f"{'measuring':<10}{piece.name}")
        began = time.perf_counter()
        try:
            figures = piece.measure()
        except whole_run.Unfinished:
            return False
        except MeasurementError as error:
            self.errors[piece.name] = str(error)
            say(f"{'failed':<10}{piece.name}: {error}")
            return True
        what = f"{piece.name}, one piece of --suite"
        seconds = time.perf_counter() - began
        content = measure.document(what, key=self._key, seconds=seconds, figures=figures)
        write_json(self.folder / f"{piece.name}.json", content)
        return True

    def write(self) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes suite.json and suite.md from what is there; their paths."""
        pieces = {piece.name: self.figures(piece.name) for piece in self.pieces()}
        reasons = {piece.name: self._reason(piece) for piece in self.pieces()}
        missing = {name: reasons[name] for name, figures in pieces.items() if figures is None}
        devices = sorted({text for text in map(_device_of, pieces.values()) if text})
        json_path, text_path = self.folder / "suite.json", self.folder / "suite.md"
        write_json(
            json_path,
            measure.document(
                "everything that --suite measures",
                key=self._key,
                devices=devices,
                not_measured=missing,
                pieces=pieces,
            ),
        )
        lines = [f"# {self.given.name} on {', '.join(devices) or 'no device yet'}", ""]
        if len(devices) > 1:
            lines += ["The pieces were measured on different devices: compare none of them.", ""]
        if self.is_miniature:
            lines += ["In miniature: no figure here says anything about speed.", ""]
        found = ", ".join(f"{name} {text}" for name, text in self._key["versions"].items())
        lines += [f"Versions: {found}.", "", *map(as_markdown, self._tables(pieces, reasons))]
        text_path.write_text("\n".join(lines) + "\n")
        return json_path, text_path

    def _reason(self, piece: _Piece) -> str:
        return piece.absent or self.errors.get(piece.name, "not yet")

    def _tables(self, pieces: dict[str, Any], reasons: dict[str, str]) -> list[Table]:
        rates, step, started = (pieces[name] for name in ("rates", "step", "startup"))
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
        found: list[Table] = []
        if rates:
            found.append(measure.rates_table(rates["rates"]))
        else:
            found.append(_missing("Rates of the device", reasons["rates"]))
        if step:
            found += measure.step_tables(step)
        else:
            found.append(_missing("A step and its shares", reasons["step"]))
        found.append(measure.startup_table(started or {"error": reasons["startup"]}))
        found.append(_run_table(f"{self.given.name} in full", pieces["rapid"], reasons["rapid"]))
        found += sweep.sweep_tables(rows, rates and rates["rates"]["matmul"])
        found.append(_ladder_table(pieces["ladder"], reasons["ladder"]))
        found += self._peer_tables(pieces, reasons)
        found.append(_profile_table(pieces["profile"], reasons["profile"]))
        return found

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


def _device_of(figures: dict[str, Any] | None) -> str:
    measured = (figures or {}).get("measured") or figures or {}
    return measured.get("environment", {}).get("device", "")


def _missing(title: str, reason: str) -> Table:
    return Table(title, ("", "figure"), [["all of it", NOT_MEASURED]], reason)


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


def _ladder_table(run: dict[str, Any] | None, reason: str) -> Table:
    if run is None:
        return _missing("The recipe ladder", reason)
    rows = [
        [f"{float(rung):.0%} on validation images, s of steps", number(seconds)]
        for rung, seconds in run["seconds_to_accuracy"].items()
    ]
    return Table("The recipe ladder", ("", "figure"), rows, "One run.")


def _profile_table(profile: dict[str, Any] | None, reason: str) -> Table:
    if profile is None:
        return _missing("Profile", reason)
    rows = [[name, f"{size:,} bytes"] for name, size in profile["files"].items()]
    return Table("Profile", ("file", "size"), rows, f"In {profile['folder']}.")


def run_suite(
    given: GivenConfig, folder: pathlib.Path, *, minutes: float | None, is_miniature: bool
) -> int:
    """Measures what is missing and writes the tables; the command's exit code."""
    suite = Suite(given, folder, is_miniature=is_miniature)
    began = time.perf_counter()
    try:
        is_over = suite.measure(minutes)
    finally:
        paths = suite.write()
    for path in paths:
        say(f"{'written':<10}{path}")
    taken = duration(time.perf_counter() - began)
    if not is_over:
        say(f"stopped after {taken}; the same command goes on with what is missing")
    else:
        say(f"all pieces done in {taken}, {len(suite.errors)} failed")
    return 1 if suite.errors else 0
