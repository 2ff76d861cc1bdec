"""The parity proof against a PyTorch at hand, on whole tensors: pip install -e '.[parity]'."""

import pathlib
import warnings

import numpy as np
import parity
import pytest

pytest.importorskip("torch", reason="needs the extra parity")

# What importing torch and torchvision warns of is theirs to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import make_reference


@pytest.fixture(scope="module")
def torchs():
    """PyTorch's tensors, whole."""
    return {name: array for piece in make_reference.PIECES for name, array in piece().items()}


@pytest.fixture(scope="module")
def sides(torchs):
    return parity.both_sides(parity.digests(torchs, whole=True), whole=True)


@pytest.mark.parametrize("row", parity.ROWS, ids=lambda row: row.piece)
def test_every_piece_is_as_close_as_asked(row, sides):
    name, value = parity.compare(row, *sides)
    assert parity.holds(row, value), f"{name}: {row.measure.words} is {value}"


def test_the_fixture_is_what_its_script_computes(torchs):
    """To the same tolerances: another PyTorch rounds elsewhere."""
    with np.load(pathlib.Path(make_reference.TARGET)) as arrays:
        frozen = dict(arrays)
    live = parity.digests(torchs, whole=False)
    assert set(frozen) == {*live, "_about"}
    for row in parity.ROWS:
        if not row.pattern.startswith("schedule"):
            assert parity.holds(row, parity.compare(row, live, frozen)[1]), row.piece
