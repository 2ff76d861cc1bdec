"""Against what PyTorch and torchvision computed once: fixtures/torch_reference.npz.

The rows and what is asked of each stand in parity.py; docs/parity.md is the same table, with the
worst error seen on whole tensors.
"""

import json
import pathlib
import re

import numpy as np
import optax
import parity
import pytest

from jepa_jax.optim import matrices_only

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "parity.md"


@pytest.fixture(scope="module")
def torchs():
    path = pathlib.Path(__file__).parent / "fixtures" / "torch_reference.npz"
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def sides(torchs):
    """Digests of this package's tensors and of PyTorch's; of schedules, 256 steps by chance."""
    return parity.both_sides(torchs, whole=False)


@pytest.mark.parametrize("row", parity.ROWS, ids=lambda row: row.piece)
def test_every_piece_is_as_close_as_asked(row, sides):
    name, value = parity.compare(row, *sides)
    assert parity.holds(row, value), f"{name}: {row.measure.words} is {value}"


def test_every_tensor_of_pytorchs_is_in_a_row(sides):
    _, wanted = sides
    # What went in, the second precision of the plot, and terms that the loss is the sum of.
    not_compared = "_about|lars/start|lars/.*/gradient|training/float64|training/float32/[^l]"
    for name in wanted:
        rows = [row for row in parity.ROWS if re.match(row.pattern, name)]
        assert bool(rows) != bool(re.match(not_compared, name)), name


def test_the_schedules_equal_the_closed_formula_at_every_step():
    found, wanted = parity.schedules({}), parity.closed_formulas()
    assert {name: rates.shape for name, rates in found.items()} == {
        "schedule/rapid": (800,),
        "schedule/full": (77_600,),
    }
    for name, rates in wanted.items():
        np.testing.assert_allclose(found[name], rates, rtol=0, atol=1e-6 * np.max(rates))


def test_optax_lars_is_another_optimiser(torchs):
    """With the same rate, decay, momentum, trust coefficient and exceptions it goes elsewhere."""
    masks = {"weight_decay_mask": matrices_only, "trust_ratio_mask": matrices_only}
    options = {**parity.inputs.LARS_OPTIONS, "trust_coefficient": 0.02, **masks}
    last = parity.follow(optax.lars(parity.lars_rate, **options), torchs)[-1]
    name = "lars/19/parameter/conv.weight"
    found = {name: parity.inputs.digest(name, last["conv.weight"])}
    assert parity.RELATIVE.compute(name, found[name], torchs) > 0.1


def test_the_fixture_says_where_it_comes_from(torchs):
    about = json.loads(str(torchs["_about"]))
    assert about["command"] == "python tests/fixtures/make_reference.py"
    assert {"seed", "python", "numpy", "torch", "torchvision", "pillow"} <= set(about)


def test_the_document_has_every_row_and_none_that_does_not_hold():
    lines = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.M)
    table = {piece: (words, asked, seen) for piece, words, asked, seen in lines}
    for row in (*parity.ROWS, *parity.WEIGHT_ROWS):
        words, asked, seen = table[row.piece]
        assert words == row.measure.words
        assert float(asked.removeprefix("at least ")) == row.asked
        assert parity.holds(row, float(seen))


def test_a_digest_notices_a_change_that_it_kept_and_a_nan(sides):
    """The comparison itself can fail."""
    found, wanted = sides
    row = parity.ROWS[1]
    name, _ = parity.compare(row, found, wanted)
    for change in (lambda x: 1.01 * x, lambda x: np.full_like(x, np.nan), np.zeros_like):
        changed = {**found, name: change(found[name])}
        assert not parity.holds(row, parity.compare(row, changed, wanted)[1])
    with pytest.raises(ValueError, match="same names"):
        parity.compare(row, {k: v for k, v in found.items() if k != name}, wanted)
