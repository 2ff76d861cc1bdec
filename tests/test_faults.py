"""The short form of the attacks of docs/reliability.md; `python -m tests.faults` is the long."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.faults.__main__ import ATTACKS
from tests.faults.processes import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


# The short form of signals is part of that of kill.
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("disk", "signals")])
def test_every_promise_holds(name, tmp_path):
    attack = importlib.import_module(f"tests.faults.{name}")
    rows = list(attack.rows(False, tmp_path))
    failures = [failure for row in rows for failure in row.failures]
    assert rows and not failures, "\n".join(failures)
    assert all(row.survived == row.tried > 0 for row in rows)


def test_a_full_disk_costs_nothing_that_was_there():
    """Mounts; without root in a user namespace, where that is allowed."""
    alone = [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    found = subprocess.run(
        [*alone, sys.executable, "-m", "tests.faults.disk"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout + found.stderr
