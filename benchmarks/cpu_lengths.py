"""What configs/cpu.py reaches in each of its lengths: the tables of README and docs/recipe.md.

    python -m benchmarks.cpu_lengths --workdir runs/cpu_lengths --out benchmarks/results/cpu.json

Runs `jepa_jax.main` for every length and seed, one after the other, then `jepa_jax.evaluate` where
every probe is asked for; finished runs are read, not repeated. On an otherwise idle machine.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from configs.cpu import EPOCHS

_PROBES = {
    "linear": "logistic regression",
    "ridge": "ridge regression",
    "knn": "20 nearest neighbours",
    "few_shot_100": "100 labels a class",
    "few_shot_10": "10 labels a class",
    "online": "online linear probe",
}


def _finished(length: str, seed: int, workdir: pathlib.Path, *, every_probe: bool) -> None:
    """Runs what is missing of one run."""
    if not (workdir / "summary.json").exists():
        flags = [f"--config=configs/cpu.py:{length}", f"--config.meta.seed={seed}", "--noreport"]
        command = [sys.executable, "-m", "jepa_jax.main", *flags, f"--workdir={workdir}"]
        subprocess.run(command, check=True)
    if every_probe and "linear" not in _read(workdir, "evaluation")["probes"]:
        command = [sys.executable, "-m", "jepa_jax.evaluate", f"--workdir={workdir}"]
        subprocess.run(command, check=True)


def _read(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    return json.loads((workdir / f"{name}.json").read_text())


def _row(length: str, workdir: pathlib.Path) -> dict[str, Any]:
    evaluation = _read(workdir, "evaluation")
    probes = {
        name: {
            kind: {split: score and score["acc"] for split, score in splits.items()}
            for kind, splits in (
                (kind, {split: row[kind].get(split) for split in ("val", "test")})
                for kind in ("encoder", "untrained", "pixels")
                if row.get(kind)
            )
        }
        for name, row in evaluation["probes"].items()
    }
    return {"length": length, **_read(workdir, "summary"), "probes": probes}


def _percent(values: list[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low}-{high}"


def _lengths_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| config | on the clock | images seen | ridge, test | ridge, val | untrained, test | gain "
        "| seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        runs = [row for row in rows if row["length"] == length]
        images = [round(run["images_per_second"] * run["train_seconds"]) for run in runs]
        accs = {
            name: [run[name] for run in runs]
            for name in ("ridge_probe_acc", "val_ridge_probe_acc", "untrained_ridge_probe_acc")
        }
        gains = [run["ridge_probe_acc"] - run["untrained_ridge_probe_acc"] for run in runs]
        lines.append(
            f"| `cpu.py:{length}` | {_range([run['clock_seconds'] for run in runs])} s | "
            f"{_range(images)} | **{_percent(accs['ridge_probe_acc'])}** | "
            f"{_percent(accs['val_ridge_probe_acc'])} | "
            f"{_percent(accs['untrained_ridge_probe_acc'])} | {_percent(gains)} | {len(runs)} |"
        )
    return "\n".join(lines)


def _probes_table(rows: list[dict[str, Any]]) -> str:
    """Every probe of the runs that have all of them."""
    runs = [row for row in rows if "linear" in row["probes"]]
    lines = ["| probe | pretrained | untrained | raw pixels |", "|---|---|---|---|"]
    for name, text in _PROBES.items():

        def cell(kind, split="test", name=name):
            scores = [run["probes"][name].get(kind, {}).get(split) for run in runs]
            return _percent(scores) if scores and None not in scores else ""

        pixels = cell("pixels").split(" ±")[0]
        lines.append(
            f"| {text} | **{cell('encoder')}** ({cell('encoder', 'val')}) | {cell('untrained')} | "
            f"{pixels} |"
        )
    return "\n".join(lines)


def _machine() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {sum(line.startswith('processor') for line in lines)} cores"


def main() -> None:
    """Runs, prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every-probe", nargs="*", default=["90s"], choices=list(EPOCHS))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = []
    for length in arguments.lengths:
        for seed in range(arguments.seeds):
            workdir = arguments.workdir / f"{length}-seed{seed}"
            _finished(length, seed, workdir, every_probe=length in arguments.every_probe)
            rows.append(_row(length, workdir))
    print(_lengths_table(rows))
    if arguments.every_probe:
        print("\n" + _probes_table(rows))
    if arguments.out:
        content = {
            "what": "configs/cpu.py in its lengths, one run after the other",
            "date": datetime.date.today().isoformat(),
            "machine": _machine(),
            "command": "python -m benchmarks.cpu_lengths",
            "environment": _read(workdir, "config")["environment"],
            "runs": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
