"""Configs: rapid.py mirrors rapid.yaml, the others say what they change, mistakes are one line."""

import ast
import copy
import importlib
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import cpu, default, full, rapid, rapid_fixed
from jepa_jax import device
from jepa_jax.config import (
    blur_kernel,
    changed_keys,
    compute_dtype,
    create_encoder,
    feature_dim,
    flatten,
    has_blur,
    hparams_from,
    known_keys,
    local_side,
    num_local_crops,
    num_parameters,
    validate,
    view_options,
)
from jepa_jax.config_flags import given_config
from jepa_jax.errors import ConfigError
from jepa_jax.losses import paper_cov_coeff
from jepa_jax.models import Encoder, ModelFns

# Every key and value of the reference's rapid.yaml.
RAPID_YAML = {
    "meta.seed": 42,
    "meta.device": "auto",
    "data.dataset": "cifar10",
    "data.batch_size": 3072,
    "data.num_workers": 16,
    "model.type": "resnet",
    "model.use_projector": True,
    "model.proj_hidden_dim": 4096,
    "model.proj_output_dim": 4096,
    "loss.type": "vicreg",
    "loss.std_coeff": 25.0,
    "loss.cov_coeff": 1.0,
    "optim.epochs": 50,
    "optim.lr": 0.707,
    "optim.weight_decay": 1e-4,
    "optim.warmup_epochs": 5,
    "optim.warmup_start_lr": 3e-5,
    "optim.min_lr": 0.0,
    "training.use_amp": True,
    "training.dtype": "bfloat16",
    "logging.log_wandb": False,
    "logging.log_every": 5,
    "logging.save_every": 50,
    "logging.tqdm_silent": False,
}
# The environment of the reference also sets this one.
ALSO_IN_USE = {"meta.model_folder"}
# Beside those: new keys at the values with which the code does what the reference does.
REFERENCE_BEHAVIOUR = {
    "loss.sim_coeff": 1.0,
    "model.stem_kernel": 3,
    "model.stem_padding": 2,
    "model.stem_stride": 1,
    "model.stem_pool": False,
    "model.stem_init": "random",
    "model.stage_sizes": (2, 2, 2, 2),
    "model.width": 64,
    "optim.name": "lars",
    "optim.momentum": 0.9,
    "data.mean": (0.4914, 0.4822, 0.4465),
    "data.std": (0.2023, 0.1994, 0.2010),
}
CONFIG_FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_config_is_valid_and_names_its_command(path):
    module = importlib.import_module(f"configs.{path.stem}")
    config = module.get_config()
    validate(config)
    assert list(flatten(config)) == list(flatten(rapid.get_config()))
    assert f"--config=configs/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
    for length, epochs in getattr(module, "EPOCHS", {}).items():
        config = module.get_config(length)
        validate(config)
        assert config.optim.epochs == epochs
        assert feature_dim(config.model) == 512
        assert config.loss.cov_coeff == round(paper_cov_coeff(config.model.proj_output_dim))


def test_rapid_mirrors_rapid_yaml():
    flat = flatten(rapid.get_config())
    assert {key: flat[key] for key in RAPID_YAML} == RAPID_YAML
    assert {key: flat[key] for key in REFERENCE_BEHAVIOUR} == REFERENCE_BEHAVIOUR


def test_keys_that_are_not_in_rapid_yaml_are_marked_as_new():
    marked = {}
    for line in pathlib.Path(rapid.__file__).read_text().splitlines():
        if line.strip().startswith("config.") and "ConfigDict" not in line:
            key, _, rest = line.strip().removeprefix("config.").partition(" = ")
            marked[key] = "# new" in rest
    old = {*RAPID_YAML, *ALSO_IN_USE}
    assert marked == {key: key not in old for key in known_keys()}


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (full, {"data.batch_size": 512, "optim.lr": 0.3, "optim.epochs": 800}),
        (
            default,
            {
                "data.batch_size": 256,
                "model.proj_hidden_dim": 2048,
                "model.proj_output_dim": 2048,
                "loss.std_coeff": 1.0,
                "loss.cov_coeff": 80.0,
                "optim.lr": 0.3,
                "optim.epochs": 300,
                "optim.warmup_epochs": 10.0,
            },
        ),
    ],
)
def test_full_and_default_differ_from_rapid_in_the_named_keys_alone(module, changes):
    base, flat = flatten(rapid.get_config()), flatten(module.get_config())
    assert {key: value for key, value in flat.items() if value != base[key]} == changes


def with_value(key, value):
    """rapid with one value replaced, whatever its type."""
    content = rapid.get_config().to_dict()
    group, name = key.split(".")
    content[group][name] = value
    return ConfigDict(content)


BAD_VALUES = [
    ("meta.seed", -1, "in [0, 2**32), got -1"),
    ("meta.seed", 2**32, "in [0, 2**32)"),
    ("meta.seed", 1.0, "must be of type int, got 1.0 (float)"),
    ("meta.seed", True, "must be of type int, got True (bool)"),
    ("meta.device", "tpuu", "one of auto, cpu, gpu"),
    ("meta.device", "gpuu", "(did you mean gpu?)"),
    ("meta.model_folder", None, "must be of type str, got None (NoneType)"),
    ("data.dataset", "", "the name of a tfds dataset"),
    ("data.batch_size", 1, "at least 2 and at most 1,048,576, got 1"),
    ("data.batch_size", 10**12, "at most 1,048,576"),
    ("data.batch_size", "512", "must be of type int, got '512' (str)"),
    ("data.num_workers", 0, "at least 1"),
    ("data.num_workers", 10**9, "at most 1,024"),
    ("data.data_dir", "a\0b", "a text without control characters"),
    ("data.data_dir", "a\nb", "a text without control characters"),
    ("data.dataset", "half a character \ud800", "the name of a tfds dataset"),
    ("data.view_size", 10**12, "0, or at least 8 and at most 4,096"),
    ("data.placement", "devise", "(did you mean device?)"),
    ("data.num_val", 0, "at least 1"),
    ("data.num_train", 1, "0, or at least 2"),
    ("data.num_train", 10**12, "at most 2,147,483,647"),
    ("data.mean", (True, True, True), "must hold numbers"),
    ("data.mean", (10**400, 0, 0), "must hold numbers, got (1000"),
    ("data.mean", (1e300, 0.0, 0.0), "three numbers in [-1000, 1000]"),
    ("augment.scale", (0.0, 1.0), "0 < from <= to <= 1"),
    ("augment.scale", (0.5, 0.4), "0 < from <= to <= 1"),
    ("augment.hue", 0.6, "in [0, 0.5]"),
    ("augment.flip_prob", 1.1, "in [0, 1]"),
    ("augment.contrast", -0.1, "at least 0"),
    ("data.num_views", 3, "2, 4 or 6, got 3"),
    ("data.num_local_crops", 11, "in [0, 10], got 11"),
    ("data.local_size", 4, "0, or at least 8 and at most 4,096, got 4"),
    ("augment.local_scale", (0.3, 0.2), "0 < from <= to <= 1"),
    ("loss.pairing", "means", "one of pairs, mean, got 'means' (did you mean "),
    ("data.mean", (0.5, 0.5), "three numbers"),
    ("data.mean", 0.5, "must be of type tuple"),
    ("data.std", (0.2, 0.2, 0.0), "three numbers in [1e-6, 1000]"),
    ("data.std", (0.2, 0.2, "x"), "must hold numbers"),
    ("data.std", (0.2, 0.2, float("nan")), "must hold numbers"),
    ("model.type", "resnet50", "(did you mean resnet?)"),
    ("model.use_projector", 1, "must be of type bool, got 1 (int)"),
    ("model.proj_hidden_dim", 0, "at least 1"),
    ("model.proj_output_dim", 1, "at least 2"),
    ("model.proj_output_dim", 10**12, "at most 262,144"),
    ("model.stage_sizes", (), "one positive whole number a stage"),
    ("model.stage_sizes", (2, 0), "one positive whole number a stage"),
    ("model.stage_sizes", (10**6,), "at most 10 stages and 1000 blocks"),
    ("model.stage_sizes", (1,) * 11, "at most 10 stages and 1000 blocks"),
    ("model.stage_sizes", (2.5,), "one positive whole number a stage"),
    ("model.stage_sizes", "2222", "must be of type tuple"),
    ("model.width", 0, "at least 1"),
    ("model.width", 10**9, "at most 65,536"),
    ("model.stem_stride", 3, "1 or 2"),
    ("model.stem_kernel", 5, "3 or 7"),
    ("model.stem_padding", 0, "1, 2 or 3"),
    ("model.stem_pool", 1, "must be of type bool"),
    ("model.stem_init", "whitenning", "(did you mean whitening?)"),
    ("model.predictor", 1, "must be of type bool"),
    ("model.target_ema", 1.0, "in [0, 1)"),
    ("model.mask", "block", "(did you mean blocks?)"),
    ("model.pred_hidden_dim", 0, "at least 1"),
    ("model.pred_dim", 100, "a multiple of 32"),
    ("model.pred_depth", 0, "at least 1"),
    ("loss.pred_coeff", -1.0, "at least 0"),
    ("loss.type", "vicregg", "(did you mean vicreg?)"),
    ("loss.type", "siglip", "one of vicreg, sigreg, bcs, lejepa, barlow, simclr, or one's own as "),
    ("loss.type", "my_module:", "or one's own as my_module:my_loss, got 'my_module:'"),
    ("loss.type", "my-module:my_loss", "or one's own as my_module:my_loss"),
    ("loss.type", "my_module.py:my_loss()", "or one's own as my_module:my_loss"),
    ("loss.sigreg_coeff", -1.0, "at least 0"),
    ("loss.num_directions", 0, "at least 1"),
    ("loss.num_directions", 256.0, "must be of type int"),
    ("loss.redundancy_coeff", -1.0, "at least 0"),
    ("loss.temperature", 0.0, "at least 0.001"),
    ("loss.sim_coeff", -0.1, "at least 0"),
    ("loss.std_coeff", "25", "must be of type float"),
    ("loss.cov_coeff", float("inf"), "a finite number"),
    ("optim.name", "larz", "(did you mean lars?)"),
    ("optim.epochs", 0, "above 0"),
    ("optim.epochs", -5.0, "above 0 and at most 1,000,000, got -5"),
    ("optim.epochs", "2", "must be of type float"),
    ("optim.epochs", 1e300, "above 0 and at most 1,000,000, got 1e+300"),
    ("optim.epochs", 10**400, "a finite number, got 1000"),
    ("optim.epochs", 10**6000, "a finite number, got a huge int"),
    ("optim.lr", 1e300, "at most 1,000,000"),
    ("optim.lr", 0.0, "above 0"),
    ("optim.lr", -0.3, "above 0 and at most 1,000,000, got -0.3"),
    ("optim.lr", float("nan"), "a finite number, got nan"),
    ("optim.weight_decay", -1e-4, "at least 0"),
    ("optim.momentum", 1.0, "in [0, 1)"),
    ("optim.warmup_epochs", -1.0, "at least 0"),
    ("optim.warmup_start_lr", -1.0, "at least 0"),
    ("optim.min_lr", -1.0, "at least 0"),
    ("optim.schedule", "epoch", "one of step, late_epoch, got 'epoch' (did you mean "),
    ("optim.probe_lr", 0.0, "above 0"),
    ("training.dtype", "bfloat", "(did you mean bfloat16?)"),
    ("training.dtype", "float16", "one of bfloat16, float32"),
    ("training.scan_steps", -1, "at least 0"),
    ("training.early_stop_epochs", -1, "at least 0"),
    ("logging.log_every", 0, "at least 1"),
    ("logging.save_every", 0, "at least 1"),
    ("logging.tqdm_silent", "yes", "must be of type bool"),
]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    BAD_VALUES,
    ids=[f"{n}-{key}" for n, (key, _, _) in enumerate(BAD_VALUES)],
)
def test_a_bad_value_is_one_line_that_names_the_key_and_the_rule(key, value, reason):
    with pytest.raises(ConfigError) as error:
        validate(with_value(key, value))
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    assert message.startswith(f"config.{key} must ")
    assert reason in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", 1),  # a whole number where a float is meant
        ("optim.warmup_epochs", 50.0),  # as long as the training
        ("optim.warmup_epochs", 0.0),
        ("meta.seed", 2**32 - 1),
        ("model.stage_sizes", [1, 1]),
        ("data.batch_size", 2),
        ("optim.momentum", 0.0),
        ("loss.type", "bcs"),
        ("loss.type", "my.module_2:my_loss"),
        ("loss.temperature", 1e-3),
    ],
)
def test_values_at_the_edge_are_legal(key, value):
    validate(with_value(key, value))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"optim.warmup_epochs": 51.0}, ["optim.warmup_epochs (51)", "optim.epochs (50)"]),
        ({"model.stem_init": "whitening", "model.width": 31}, ["model.stem_init", "model.width"]),
        ({"model.target_ema": 0.9}, ["model.target_ema=0.9", "model.predictor=True"]),
        ({"model.mask": "blocks"}, ["model.mask=blocks", "model.predictor=True"]),
        (
            {"model.predictor": True, "training.microbatches": 2},
            ["model.predictor=True", "training.microbatches=1"],
        ),
        ({"model.width": 60_000}, ["network of 9.8e+12 parameters", "config.model.width"]),
        ({"model.proj_hidden_dim": 200_000}, ["4.1e+10 parameters", "smaller projector dims"]),
    ],
)
def test_combinations_that_cannot_be_are_one_line_naming_both_keys(changes, names):
    config = rapid.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("optim.lrr", "optim.lr"),
        ("loss.std_coef", "loss.std_coeff"),
        ("data.batchsize", "batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(misspelt, nearest):
    with pytest.raises(ConfigError) as error:
        validate(with_value(misspelt, 1.0))
    assert str(error.value).startswith(f"config.{misspelt} is not a known key (did you mean ")
    assert nearest in str(error.value)


def test_an_unknown_key_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ConfigError, match=r"^config\.meta\.zzz is not a known key$"):
        validate(with_value("meta.zzz", 1))


def test_a_missing_key_is_named():
    config = rapid.get_config()
    with config.unlocked():
        del config.optim.lr
    with pytest.raises(ConfigError, match=r"lacks config\.optim\.lr"):
        validate(config)


def test_amp_off_computes_in_float32_whatever_the_dtype():
    found = {
        (amp, dtype): compute_dtype(with_amp(amp, dtype))
        for amp in (True, False)
        for dtype in ("bfloat16", "float32")
    }
    assert found.pop((True, "bfloat16")) is jnp.bfloat16
    assert set(found.values()) == {jnp.float32}


def with_amp(amp, dtype):
    config = rapid.get_config()
    config.training.use_amp, config.training.dtype = amp, dtype
    return config


def sizes(encoder, side=32):
    """Number of parameters, and shapes and dtypes of h and z, without computing any."""
    images = jnp.zeros((2, side, side, 3))
    # Flax's BatchNorm itself mixes bfloat16 and float32.
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.eval_shape(encoder.model.init, jax.random.key(0), images)
        outputs, _ = jax.eval_shape(lambda v: encoder.model.apply(v, images, False), variables)
    leaves = jax.tree.leaves(variables["params"])
    assert {leaf.dtype for leaf in [*leaves, *outputs]} == {jnp.dtype(jnp.float32)}
    return sum(math.prod(leaf.shape) for leaf in leaves), *(output.shape for output in outputs)


def projector_size(inputs, hidden, outputs):
    """Three linear layers with biases, two BatchNorms with scale and bias."""
    linear = inputs * hidden + hidden + hidden * hidden + hidden + hidden * outputs + outputs
    return linear + 2 * 2 * hidden


def test_rapids_model_is_the_references_resnet_with_its_projector():
    encoder = create_encoder(rapid.get_config())
    size = 11_168_832 + projector_size(512, 4096, 4096)
    assert sizes(encoder) == (size, (2, 512), (2, 4096))
    assert (encoder.mean, encoder.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_every_model_key_reaches_the_model():
    config = cpu.get_config()
    config.model.update(
        stage_sizes=(1, 1), width=8, expand_dim=0, proj_hidden_dim=7, proj_output_dim=5
    )
    stem = 27 * 8 + 16
    first = 2 * (9 * 8 * 8 + 16)
    second = 9 * 8 * 16 + 9 * 16 * 16 + 8 * 16 + 3 * 32
    size = stem + first + second
    assert sizes(create_encoder(config)) == (size + projector_size(16, 7, 5), (2, 16), (2, 5))
    config.model.use_projector = False
    assert sizes(create_encoder(config)) == (size, (2, 16), (2, 16))
    assert feature_dim(config.model) == 16
    config.model.expand_dim = 20
    size += 16 * 20 + 2 * 20
    assert sizes(create_encoder(config)) == (size, (2, 20), (2, 20))
    assert feature_dim(config.model) == 20
    config.model.update(block="bottleneck", expand_dim=0)
    first = (8 + 72) * 8 + 8 * 32 + 8 * 32 + 2 * (8 + 8 + 32 + 32)
    second = (32 + 9 * 16) * 16 + 16 * 64 + 32 * 64 + 2 * (16 + 16 + 64 + 64)
    assert sizes(create_encoder(config)) == (stem + first + second, (2, 64), (2, 64))
    assert feature_dim(config.model) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"model.pred_hidden_dim": 7},
        {"model.type": "vit_ti", "model.depth": 1, "model.mask": "blocks", "model.pred_dim": 64},
    ],
)
def test_a_predictor_is_counted_and_lies_beside_a_network_that_stays_as_it_is(changes):
    config = cpu.get_config()
    config.update_from_flattened_dict({"model.stem_init": "random", **changes})
    plain = sizes(create_encoder(config))
    config.model.predictor = True
    with_it = sizes(create_encoder(config))
    counted = num_parameters(config.model)
    config.model.predictor = False
    assert with_it[0] - plain[0] == counted - num_parameters(config.model) > 0
    assert with_it[1:] == plain[1:]


def test_blocks_need_an_encoder_of_patches():
    config = cpu.get_config()
    config.model.update(predictor=True, mask="blocks")
    with pytest.raises(ConfigError, match=r"model\.mask=blocks needs an encoder of patches"):
        create_encoder(config)


def test_a_config_without_a_block_is_of_basic_ones():
    """As older runs have stored it."""
    config = cpu.get_config()
    expected = num_parameters(config.model), sizes(create_encoder(config))
    del config.model["block"]
    assert (num_parameters(config.model), sizes(create_encoder(config))) == expected
    assert feature_dim(config.model) == 512


@pytest.mark.parametrize(
    ("side", "kernel"), [(8, 3), (16, 3), (32, 3), (64, 7), (96, 9), (160, 17), (224, 23)]
)
def test_a_blurs_kernel_is_the_odd_number_nearest_a_tenth_of_the_view(side, kernel):
    config = cpu.get_config()
    assert not has_blur(config) and blur_kernel(config, side) == 0
    assert not [name for name in view_options(config) if name.startswith("blur")]
    config.augment.blur_prob = 0.1
    assert has_blur(config) and blur_kernel(config, side) == kernel
    assert abs(kernel - side / 10) <= 1 or kernel == 3
    assert view_options(config)["blur_sigma"] == (0.1, 2.0)
    assert view_options({"augment": {}}) == {} and not has_blur({"augment": {}})


def test_local_crops_are_half_as_large_as_the_views_unless_their_side_is_given():
    config = cpu.get_config()
    assert num_local_crops(config) == num_local_crops({}) == 0
    assert "local_scale" not in view_options(config)
    config.data.num_local_crops = 3
    assert num_local_crops(config) == 3
    assert view_options(config)["local_scale"] == (0.05, 0.2)
    assert local_side(config, 16) == 8 and local_side(config, 33) == 16
    with pytest.raises(ConfigError, match="half of the views' 15 pixels, below 8"):
        local_side(config, 15)
    config.data.local_size = 12
    assert local_side(config, 12) == local_side(config, 16) == 12
    with pytest.raises(ConfigError, match=r"local_size \(12\) is larger than the views of 11"):
        local_side(config, 11)


@pytest.mark.parametrize("changes", [{}, {"expand_dim": 30}, {"use_projector": False}])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stage_sizes", [(1,), (2, 3, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("stem_kernel", [3, 7])
def test_parameters_are_counted_without_building_any(changes, block, stage_sizes, stem_kernel):
    config = rapid.get_config()
    sizes_of = {"width": 4, "block": block, "proj_hidden_dim": 7, "proj_output_dim": 5}
    config.model.update(stage_sizes=stage_sizes, stem_kernel=stem_kernel, **sizes_of, **changes)
    assert num_parameters(config.model) == sizes(create_encoder(config))[0]


def test_a_stored_config_is_checked_before_a_model_is_made_of_it():
    config = rapid.get_config()
    config.model.width = 10**9
    with pytest.raises(ConfigError, match="config.model.width must be at least 1 and at most"):
        create_encoder(config)
    with config.unlocked():
        del config.meta, config.loss, config.optim  # as imported weights have it
    config.model.width = 4
    create_encoder(config)


def test_a_network_that_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"gradients they take 0\.\d GiB and the device has 0\.0"):
        create_encoder(rapid.get_config())
    create_encoder(rapid.get_config(), Colours())


def test_more_steps_than_can_be_counted_are_refused():
    config = rapid.get_config()
    config.optim.epochs = 1e6
    assert hparams_from(config, 2000).num_steps == np.float32(2e9)
    with pytest.raises(
        ConfigError, match=r"config.optim.epochs \(1e\+06\) is 2.5e\+09 steps of 2500"
    ):
        hparams_from(config, 2500)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be run: "),
        (bytes(range(256)), "cannot be run: "),
        (b"def get_config():\n    return 3\n", "gives a int, not a ConfigDict"),
        (b"def get_config():\n    return None\n", "gives a NoneType, not a ConfigDict"),
        (b"def get_config():\n    return get_config()\n", "cannot be run: RecursionError"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_a_config_file_that_is_none_is_one_line(content, complaint, tmp_path, capsys):
    path = tmp_path / "c.py"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        given_config([f"--config={path}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: config file {path}")
    assert complaint in line


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--config=" + 5000 * "n"], "cannot be read: File name too long"),
        (["--config=configs"], "configs is not a file"),
        (["--flagfile=absent"], "Unable to open flagfile"),
        (["--config.optim=3"], "config.optim is not a known key"),
    ],
)
def test_flags_that_lead_nowhere_are_one_line(flags, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        given_config(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and complaint in line and len(line) < 300


@pytest.mark.parametrize(("stride", "padding", "side"), [(1, 1, 8), (1, 2, 10), (2, 1, 4)])
def test_stem_and_dtype_keys_reach_the_convolution(stride, padding, side):
    config = rapid.get_config()
    config.model.update(stem_stride=stride, stem_padding=padding, stage_sizes=(1,), width=4)
    model = create_encoder(config).model
    images = jnp.zeros((2, 8, 8, 3))
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        traced = jax.make_jaxpr(lambda v: model.apply(v, images, False))(variables)
    stem = next(e for e in traced.eqns if e.primitive.name == "conv_general_dilated").outvars[0]
    assert (stem.aval.shape, stem.aval.dtype) == ((2, side, side, 4), jnp.bfloat16)


class Colours(nn.Module):
    """An encoder of one's own: the mean colour."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(6)(jnp.mean(images, axis=(1, 2)))


def test_an_encoder_of_ones_own_gets_the_configs_projector_and_a_whole_model_nothing():
    config = cpu.get_config()
    config.model.update(proj_hidden_dim=7, proj_output_dim=5)
    config.data.mean = (0.1, 0.2, 0.3)
    encoder = create_encoder(config, Colours())
    assert sizes(encoder) == (3 * 6 + 6 + projector_size(6, 7, 5), (2, 6), (2, 5))
    assert encoder.mean == (0.1, 0.2, 0.3)
    model = ModelFns(lambda key, x: {}, lambda v, x, train: ((x, x), {}))
    assert create_encoder(config, model) == Encoder(model, (0.1, 0.2, 0.3), config.data.std)


def test_hparams_are_the_configs_numbers_in_steps():
    config = default.get_config()
    config.optim.warmup_epochs = 0.2
    hparams = hparams_from(config, 195)
    expected = {
        "lr": 0.3,
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "warmup_start_lr": 3e-5,
        "min_lr": 0.0,
        "warmup_steps": 39,
        "num_steps": 300 * 195,
        "sim_coeff": 1.0,
        "std_coeff": 1.0,
        "cov_coeff": 80.0,
        "sigreg_coeff": 10.0,
        "redundancy_coeff": 0.005,
        "temperature": 0.5,
        "pred_coeff": 1.0,
        "target_ema": 0.0,
        "probe_lr": 1e-3,
        "late_epoch_steps": 0,
    }
    found = vars(hparams).copy()
    seed = found.pop("seed")
    assert found.pop("augment") == {}  # of a plan, whose views they are for
    assert (seed, seed.dtype) == (42, np.uint32)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert found == {name: np.float32(value) for name, value in expected.items()}


def test_the_references_schedule_needs_the_steps_of_its_epochs():
    config = rapid.get_config()
    config.optim.schedule = "late_epoch"
    assert hparams_from(config, 16).late_epoch_steps == 16


@pytest.mark.parametrize("warmup_epochs", [1.0, 0.5])
def test_the_references_schedule_refuses_the_warmup_at_which_it_divides_by_zero(warmup_epochs):
    config = rapid.get_config()
    config.optim.update(schedule="late_epoch", warmup_epochs=warmup_epochs)
    with pytest.raises(ConfigError, match="whole number of config.optim.warmup_epochs other than"):
        validate(config)
    config.optim.warmup_epochs = 0.0
    validate(config)


def test_each_repair_of_rapid_fixed_is_one_override_away_from_rapid():
    undone = rapid_fixed.get_config()
    undone.loss.update(std_coeff=25.0, cov_coeff=1.0)
    undone.data.batch_size = 3072
    assert undone.to_json() == rapid.get_config().to_json()
    fixed = rapid_fixed.get_config()
    assert fixed.loss.cov_coeff == round(paper_cov_coeff(fixed.model.proj_output_dim))


def test_changed_keys_lists_what_decides_the_result_and_ignores_the_rest():
    stored = json.loads(rapid.get_config().to_json())
    config = copy.deepcopy(rapid.get_config())
    assert changed_keys(stored, config) == []
    config.logging.log_every = 1
    config.logging.log_wandb = True
    config.meta.device = "cpu"
    config.meta.model_folder = "elsewhere"
    config.data.data_dir = "elsewhere"
    config.data.num_workers = 3
    assert changed_keys(stored, config) == []
    config.optim.lr = 0.3
    config.model.stage_sizes = (1, 1)
    config.meta.seed = 1
    assert changed_keys(stored, config) == [
        "meta.seed: 42 -> 1",
        "model.stage_sizes: (2, 2, 2, 2) -> (1, 1)",
        "optim.lr: 0.707 -> 0.3",
    ]


def test_a_key_that_an_older_version_lacked_is_what_leaves_its_recipe_alone():
    config = rapid.get_config()
    stored = json.loads(config.to_json())
    del stored["loss"]["sim_coeff"], stored["model"]["predictor"], stored["model"]["target_ema"]
    assert changed_keys(stored, config) == []
    config.loss.sim_coeff, config.model.predictor = 2.0, True
    assert changed_keys(stored, config) == [
        "loss.sim_coeff: 1.0 -> 2.0",
        "model.predictor: False -> True",
    ]
    assert changed_keys({}, {"custom": "mine"}) == ["custom: None -> mine"]


def test_cpu_is_the_full_method_at_another_size():
    """What the default run leaves out would not be tried by anyone without a GPU."""
    flat = flatten(cpu.get_config())
    assert flat["loss.type"] == "vicreg"
    assert flat["model.use_projector"]
    assert flat["data.dataset"] == "cifar10"
