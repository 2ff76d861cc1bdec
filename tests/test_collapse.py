"""Whole runs of narrow networks, collapsed and healthy: what is said of each, and once."""

import numpy as np
import pytest

from benchmarks import collapse
from jepa_jax.errors import TrainingError


@pytest.fixture(scope="module")
def images(cifar_arrays):
    """As many as the benchmark takes; here the same few again and again."""
    return np.tile(cifar_arrays["train_images"], (collapse.NUM_IMAGES // 400, 1, 1, 1))


@pytest.mark.parametrize("scenario", ["low rank", "rapid's weights", "healthy, LARS"])
def test_collapses_are_named_within_two_epochs_and_healthy_runs_are_not(
    scenario, images, tmp_path, capsys
):
    """One seed of those that share an optimiser; benchmarks/collapse.py runs ten of all."""
    rows = collapse.run(scenario, 0, images, tmp_path / "run")
    expected = collapse.SCENARIOS[scenario].kind
    assert [row["watch/collapse"] for row in rows][-1] == expected
    assert capsys.readouterr().out.count("collapse (") == (expected is not None)


def test_stop_on_collapse_saves_and_ends_with_a_line(images, tmp_path, capsys):
    with pytest.raises(TrainingError, match=r"collapsed \(constant\): stopped at"):
        collapse.run("constant", 0, images, tmp_path / "run", stop=True)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    # Asked again it stops where it stands.
    with pytest.raises(TrainingError, match=r"collapsed \(constant\): stopped at step 50 of 100"):
        collapse.run("constant", 0, images, tmp_path / "run", stop=True)
    # Told not to mind, the same run goes on to its end.
    rows = collapse.run("constant", 0, images, tmp_path / "run")
    assert [row["watch/collapse"] for row in rows] == ["constant"] * 2
    assert capsys.readouterr().out.count("collapse (constant)") == 1
