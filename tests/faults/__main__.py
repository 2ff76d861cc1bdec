"""The long form of all attacks: its table, for docs/reliability.md.

    python -m tests.faults                       # all of them, about two hours on two cores
    python -m tests.faults damage disk           # some of them; those of before are kept

Results go to benchmarks/results/faults.json, and the table between its marks in
docs/reliability.md. The disks have to be mounted by root, else:

    unshare --map-root-user --mount python -m tests.faults
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import time

from jepa_jax.environment import describe_environment
from tests.faults.processes import ROOT
from tests.faults.table import Row, as_markdown

# By the promise that they attack.
ATTACKS = (
    "kill",
    "signals",
    "damage",
    "disk",
    "lock",
    "numbers",
    "bad_input",
    "fuzz",
    "determinism",
    "long_run",
)
_RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
_PAGE = ROOT / "docs" / "reliability.md"
_MARKS = ("<!-- table -->\n", "<!-- end of table -->\n")


def _run(name: str) -> dict:
    began, environment = time.monotonic(), describe_environment()
    found = []
    with tempfile.TemporaryDirectory(prefix="jepa_jax_faults_") as folder:
        attack = importlib.import_module(f"tests.faults.{name}")
        for row in attack.rows(True, pathlib.Path(folder)):
            found.append(row)
            print(f"{row.survived} of {row.tried}  {row.what}", file=sys.stderr, flush=True)
            for failure in row.failures:
                print(f"    {failure}", file=sys.stderr, flush=True)
    return {
        "rows": [dataclasses.asdict(row) for row in found],
        "seconds": round(time.monotonic() - began, 1),
        "environment": environment,
    }


def assert_survived(name: str, folder: pathlib.Path) -> None:
    """Runs the short form of an attack in an empty folder, and fails if a promise did not hold."""
    found = list(importlib.import_module(f"tests.faults.{name}").rows(False, folder))
    failures = [failure for row in found for failure in row.failures]
    assert found and not failures, "\n".join(failures)
    assert all(row.survived == row.tried > 0 for row in found)


def main() -> None:
    """Runs the attacks that are named, by default all, and writes what was counted."""
    # Of a job in the background it is ignored, and would be by every command that is attacked.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attacks", nargs="*", help=f"of {', '.join(ATTACKS)}; by default all")
    wanted = parser.parse_args().attacks or ATTACKS
    if unknown := set(wanted) - set(ATTACKS):
        parser.error(f"unknown attacks: {', '.join(sorted(unknown))}")
    if "disk" in wanted and os.geteuid():
        parser.error("disk has to mount: unshare --map-root-user --mount python -m tests.faults")
    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    for name in wanted:
        results[name] = _run(name)
        kept = {attack: results[attack] for attack in ATTACKS if attack in results}
        _RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    rows = [
        Row(**{**row, "failures": tuple(row["failures"])})
        for name in ATTACKS
        for row in results.get(name, {"rows": []})["rows"]
    ]
    table = as_markdown(sorted(rows, key=lambda row: row.promise))
    print(table)
    before, _, rest = _PAGE.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    _PAGE.write_text(f"{before}{_MARKS[0]}\n{table}\n\n{_MARKS[1]}{after}")
    sys.exit(any(row.failures for row in rows))


if __name__ == "__main__":
    main()
