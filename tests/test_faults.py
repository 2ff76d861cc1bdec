"""The short form of the attacks that start processes; `python -m tests.faults` is the long form.

Those of one process are in test_faults_inside.py: the two files run beside each other.
"""

import os
import subprocess
import sys

import pytest

from tests.faults.__main__ import assert_survived
from tests.faults.processes import ROOT


# That of kill has a signal too, in place of the attack of that name.
@pytest.mark.parametrize("name", ["kill", "lock", "determinism"])
def test_every_promise_holds(name, tmp_path):
    assert_survived(name, tmp_path)


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
