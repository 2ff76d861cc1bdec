"""configs/folder.py: every size is legal, balanced, and trains a step on images of that size."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from configs import folder, rapid
from jepa_jax.benchmark import roofline
from jepa_jax.config import feature_dim, flatten, num_parameters, validate
from jepa_jax.data import from_arrays
from jepa_jax.loop import train_step_of
from jepa_jax.losses import paper_cov_coeff
from jepa_jax.plan import initial_state, make_plan

DATASHEET = (pathlib.Path(__file__).parent.parent / "docs" / "datasheet.md").read_text()
SIDES = {"96": 96, "160": 160, "224": 224}


def test_there_is_no_other_size():
    assert tuple(SIDES) == folder.SIZES
    with pytest.raises(ValueError, match="has the sizes 96, 160, 224, not 32"):
        folder.get_config("32")


@pytest.mark.parametrize("size", folder.SIZES)
def test_every_size_is_legal_and_has_the_papers_balance(size):
    config = folder.get_config(size)
    validate(config)
    assert list(flatten(config)) == list(flatten(rapid.get_config()))
    assert (config.data.view_size or config.data.image_size) == SIDES[size]
    assert config.loss.cov_coeff == round(paper_cov_coeff(config.model.proj_output_dim))
    assert config.training.dtype == "bfloat16" and config.training.use_amp
    assert feature_dim(config.model) == (2048 if size == "224" else 512)


def test_one_and_the_same_folder_needs_no_other_key():
    """The default names no split of one dataset alone: any folder of images can take its place."""
    config, base = folder.get_config(), rapid.get_config()
    for key in ("train_split", "unlabelled_split", "test_split"):
        assert config.data[key] == base.data[key]


@pytest.mark.parametrize("size", folder.SIZES)
def test_every_size_trains_a_step(size):
    """Of a narrow, short network of the same kind on four images as the config keeps them."""
    config = folder.get_config(size)
    short = (1,) * len(config.model.stage_sizes)
    config.model.update(width=4, stage_sizes=short, proj_hidden_dim=8, proj_output_dim=8)
    config.data.update(batch_size=4, num_val=2)
    config.training.use_amp = False  # Flax's BatchNorm mixes dtypes, which the tests forbid
    side = config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    dataset = from_arrays(images, np.arange(4) % 2)
    plan = make_plan(config, pathlib.Path(), dataset, None, None, None, None)
    views = jax.eval_shape(plan.views_fn, jax.random.key(0), images)
    assert [view.shape for view in views] == [(4, SIDES[size], SIDES[size], 3)] * 2
    assert plan.augment_fn.keywords["blur_kernel"] == {"96": 9, "160": 17, "224": 23}[size]
    assert plan.feature_dim == (128 if size == "224" else 32)
    state = initial_state(plan)
    # A rate of its own: the warm-up begins at 0.
    hparams = dataclasses.replace(plan.hparams, warmup_steps=np.float32(0))
    labels = np.zeros(4, np.int32)
    after, metrics = jax.jit(train_step_of(plan))(state, images, labels, hparams)
    assert np.isfinite(jax.device_get(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, after.params)
    assert np.all(np.isfinite(jax.tree.leaves(moved))) and max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("size", folder.SIZES)
def test_the_datasheets_figures_are_those_of_the_config(size):
    """Its formula of the memory, written down anew, and the multiply-adds."""
    config = folder.get_config(size)
    model = config.model.to_dict()
    layers = roofline.encoder_layers(model, SIDES[size])
    outputs = sum(layer.out_side**2 * layer.out_channels for layer in layers)
    num_views = config.data.batch_size * config.data.num_views
    step = (4 * num_views * outputs + 12 * num_parameters(model)) / 1e9
    multiply_adds = sum(layer.multiply_adds for layer in layers) / 1e9
    shown = {
        "multiply-adds a view, 10^9": f"{multiply_adds:.2f}",
        "memory a view, bfloat16": f"{4 * outputs / 1e6:.1f} MB",
        "memory of a step, bfloat16": f"{step:.1f} GB" if step < 10 else f"{step:.0f} GB",
        "`optim.epochs`": f"{config.optim.epochs:g}",
        "`augment.blur_prob`": f"{config.augment.blur_prob:g}",
        "`data.batch_size`": str(config.data.batch_size),
        "`data.num_val`": f"{config.data.num_val:,}".replace("1,000", "1000"),
        "`optim.weight_decay`": f"{config.optim.weight_decay:.0e}".replace("e-0", "e-"),
    }
    column = {"96": 3, "160": 4, "224": 5}[size]
    rows = [line.strip("| ").split(" | ") for line in DATASHEET.splitlines() if line[:2] == "| "]
    table = {row[0]: row for row in rows}
    assert {name: table[name][column] for name in shown} == shown
