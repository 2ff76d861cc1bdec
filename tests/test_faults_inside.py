"""The short form of the attacks that work mostly in one process; see test_faults.py."""

import pytest

from tests.faults.__main__ import ATTACKS, assert_survived

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

INSIDE = ("damage", "numbers", "bad_input", "fuzz", "long_run")
OUTSIDE = ("kill", "signals", "lock", "determinism", "disk")


def test_every_attack_has_its_short_form():
    assert sorted((*INSIDE, *OUTSIDE)) == sorted(ATTACKS)


@pytest.mark.parametrize("name", INSIDE)
def test_every_promise_holds(name, tmp_path):
    assert_survived(name, tmp_path)
