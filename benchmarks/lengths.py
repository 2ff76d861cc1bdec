"""What a config reaches in each of its lengths: those of configs/cpu.py and configs/speedrun.py.

    python -m benchmarks.lengths --config=configs/cpu.py --workdir runs/cpu --every-probe 90s
    python -m benchmarks.lengths --config=configs/speedrun.py --workdir runs/speedrun --out all.json

Runs `jepa_jax.main` for every length and seed, one after the other, then `jepa_jax.evaluate` where
every probe is asked for; finished runs are read, not repeated, and one that was stopped goes on. A
length without a finished run is a row that says so. On an otherwise idle machine.
"""

import argparse
import datetime
import os
import pathlib
import platform
import runpy
import statistics
from collections.abc import Sequence
from typing import Any

from jepa_jax.benchmark.processes import MeasurementError, process
from jepa_jax.benchmark.table import NOT_MEASURED, Table, as_markdown
from jepa_jax.command import Parser, errors_as_lines, fail
from jepa_jax.config import changed_keys
from jepa_jax.config_flags import given_config
from jepa_jax.errors import ConfigError
from jepa_jax.metrics import read_json, write_json
from jepa_jax.progress import say
from jepa_jax.signals import stop_on_signals

_PROBES = {
    "linear": "logistic regression",
    "ridge": "ridge regression",
    "knn": "20 nearest neighbours",
    "few_shot_100": "100 labels a class",
    "few_shot_10": "10 labels a class",
    "online": "online linear probe",
}
_INTERRUPTED = "interrupted; the same command goes on with what is missing"

# --- runs -------------------------------------------------------------------------------------


def _run(*arguments: str) -> None:
    """Runs Python and shows what it says.

    Raises:
      MeasurementError: if it fails; it has said why.
    """
    with process(["-m", *arguments], errors=None) as child:
        for line in child.stdout:
            print(line, end="", flush=True)
        if code := child.wait():
            raise MeasurementError(f"{arguments[0]} ended with exit code {code}")


def _runs_of(arguments: argparse.Namespace) -> list[tuple[str, list[str], pathlib.Path]]:
    """The length, the flags and the folder of every run that was asked for."""
    return [
        (
            length,
            [f"--config={arguments.config}:{length}", f"--config.meta.seed={seed}"],
            arguments.workdir / f"{length}-seed{seed}",
        )
        for length in arguments.lengths
        for seed in range(arguments.seeds)
    ]


def _finish(flags: Sequence[str], folder: pathlib.Path, *, every_probe: bool) -> None:
    """Runs what is missing of one run."""
    if not (folder / "summary.json").exists():
        _run("jepa_jax.main", *flags, "--noreport", f"--workdir={folder}")
    if every_probe and "linear" not in read_json(folder / "evaluation.json")["probes"]:
        _run("jepa_jax.evaluate", f"--workdir={folder}")


def _check_is_of(flags: Sequence[str], folder: pathlib.Path) -> None:
    """Refuses a finished run of another config, as jepa_jax.main refuses to go on with one.

    Raises:
      ConfigError: naming the folder and the keys.
    """
    if not (folder / "summary.json").exists():
        return
    stored = read_json(folder / "config.json")["config"]
    # A CPU computes in float32 where the file says bfloat16.
    changed = [
        line
        for line in changed_keys(stored, given_config(flags).config)
        if not line.startswith("training.use_amp:")
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of another config ({'; '.join(changed)}): give another --workdir"
        )


# --- figures ----------------------------------------------------------------------------------


def _figures(length: str, folder: pathlib.Path) -> dict[str, Any]:
    """Those of a finished run: its summary, its device and every probe's accuracies."""
    probes = {
        name: {
            kind: {split: score and score["acc"] for split, score in splits.items()}
            for kind, splits in (
                (kind, {split: row[kind].get(split) for split in ("val", "test")})
                for kind in ("encoder", "untrained", "pixels")
                if row.get(kind)
            )
        }
        for name, row in read_json(folder / "evaluation.json")["probes"].items()
    }
    return {
        "length": length,
        **read_json(folder / "summary.json"),
        "environment": read_json(folder / "config.json")["environment"],
        "probes": probes,
    }


def _percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def _range(values: Sequence[float]) -> str:
    """Whole numbers; below ten one digit more, since a rung of the speedrun is seconds."""
    digits = 1 if max(values) < 10 else 0
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return low if low == high else f"{low}-{high}"


def _row(title: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    if not runs:
        return [title, *[NOT_MEASURED] * 7, "0"]
    trained, val, untrained = (
        [run[name] for run in runs]
        for name in ("ridge_probe_acc", "val_ridge_probe_acc", "untrained_ridge_probe_acc")
    )
    return [
        title,
        f"{_range([run['clock_seconds'] for run in runs])} s",
        _range([run["seconds"]["compile"] for run in runs]),
        _range([round(run["images_per_second"] * run["train_seconds"]) for run in runs]),
        f"**{_percent(trained)}**",
        _percent(val),
        _percent(untrained),
        _percent([after - before for after, before in zip(trained, untrained, strict=True)]),
        str(len(runs)),
    ]


def lengths_table(name: str, lengths: Sequence[str], runs: Sequence[dict[str, Any]]) -> Table:
    """A row for each length: seconds, images and ridge regression, mean and deviation over seeds.

    Args:
      name: of the config's file.
      lengths: in the order of the rows.
      runs: the figures of those that are finished, each with its "length".
    """
    header = ("config", "on the clock", "compile, s", "images seen", "ridge, test", "ridge, val")
    rows = [
        _row(f"`{name}:{length}`", [run for run in runs if run["length"] == length])
        for length in lengths
    ]
    devices = dict.fromkeys(run["environment"]["device"] for run in runs)
    note = "Device: " + ", ".join(devices) if devices else ""
    return Table(f"{name} by length", (*header, "untrained, test", "gain", "seeds"), rows, note)


def probes_table(name: str, length: str, runs: Sequence[dict[str, Any]]) -> Table:
    """A row for each probe, on test images and in brackets on validation images.

    Args:
      name: of the config's file.
      length: that of the runs.
      runs: the figures of those that have every probe.
    """
    rows = []
    for probe, text in _PROBES.items():
        if not all(probe in run["probes"] for run in runs):
            continue  # of a data set with too few labels for it

        def cell(kind, split="test", probe=probe):
            scores = [run["probes"][probe].get(kind, {}).get(split) for run in runs]
            return "" if None in scores else _percent(scores)

        pixels = cell("pixels").split(" ±")[0]  # no seed changes them
        own = f"**{cell('encoder')}** ({cell('encoder', 'val')})"
        rows.append([text, own, cell("untrained"), pixels])
    header = ("probe", "pretrained", "untrained", "raw pixels")
    return Table(f"{name}:{length} by every probe", header, rows)


# --- the command ------------------------------------------------------------------------------


def _machine() -> str:
    """In words, and without JAX: a backend of this process would take the runs' GPU memory."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _write(arguments: argparse.Namespace, tables: Sequence[Table], runs: Sequence[Any]) -> None:
    """The figures as JSON, and the tables beside them as Markdown."""
    path, out = arguments.config, arguments.out
    name = f"{path.absolute().parent.name}/{path.name}"
    content = {
        "what": f"{name} in its lengths, one run after the other",
        "date": datetime.date.today().isoformat(),
        # Figures may have come from elsewhere.
        **({} if arguments.table_only else {"machine": _machine()}),
        "command": f"python -m benchmarks.lengths --config={name}",
        "runs": runs,
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, content)
        out.with_suffix(".md").write_text("\n".join(map(as_markdown, tables)))
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be written: {error.strerror}") from error
    say(f"{'written':<10}{out}, {out.with_suffix('.md')}")


def _report(arguments: argparse.Namespace) -> None:
    """Prints, and writes if asked to, what is there."""
    runs = [
        _figures(length, folder)
        for length, _, folder in _runs_of(arguments)
        if (folder / "summary.json").exists()
    ]
    name = arguments.config.name
    tables = [lengths_table(name, arguments.lengths, runs)]
    for length in arguments.lengths:
        probed = [run for run in runs if run["length"] == length and "linear" in run["probes"]]
        if probed:
            tables.append(probes_table(name, length, probed))
    for table in tables:
        say("\n" + as_markdown(table))
    if arguments.out:
        _write(arguments, tables, runs)


def _measure(arguments: argparse.Namespace) -> int:
    """Runs what is missing; the number of runs that failed."""
    failed = 0
    for length, flags, folder in _runs_of(arguments):
        try:
            _finish(flags, folder, every_probe=length in arguments.every_probe)
        except MeasurementError as error:
            say(f"{'failed':<10}{folder}: {error}")
            failed += 1
    return failed


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.lengths", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=pathlib.Path, required=True, help="a file with EPOCHS")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--lengths", nargs="+", help="keys of EPOCHS; by default all")
    parser.add_argument("--seeds", type=int, default=3, help="of each length, by default 3")
    parser.add_argument("--every-probe", nargs="+", default=[], help="lengths to evaluate in full")
    parser.add_argument("--table-only", action="store_true", help="run nothing, say what is there")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; the tables go beside it")
    arguments = parser.parse_args(argv)
    if ":" in arguments.config.name:
        parser.error(f"--config={arguments.config} names a length: --lengths chooses")
    # Ends the command where there is no such file, and lets it import its neighbours.
    given_config([f"--config={arguments.config}"])
    known = runpy.run_path(str(arguments.config)).get("EPOCHS")
    if not known:
        parser.error(f"{arguments.config} has no EPOCHS: it has one length alone")
    arguments.lengths = arguments.lengths or list(known)
    for length in [*arguments.lengths, *arguments.every_probe]:
        if length not in known:
            parser.error(f"{arguments.config} has the lengths {', '.join(known)}, not {length}")
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the tables and writes the figures of what is there."""
    arguments = _parse(argv)
    failed = 0
    with errors_as_lines(_INTERRUPTED), stop_on_signals(_INTERRUPTED):
        for _, flags, folder in _runs_of(arguments):
            _check_is_of(flags, folder)
        try:
            if not arguments.table_only:
                failed = _measure(arguments)
        finally:
            _report(arguments)
    if failed:
        fail(f"{failed} of the runs failed; the same command tries them again", 1)


if __name__ == "__main__":
    main()
