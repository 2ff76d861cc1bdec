"""Encoders of other frameworks, by dotted path: the three of examples/, and what can be wrong."""

import importlib
import json
import shutil
import sys

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jepa_jax
from jepa_jax.config import create_encoder, validate
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.evaluate import evaluate_run
from jepa_jax.models import EncoderFns
from jepa_jax.train import train_and_evaluate
from tests.tiny import tiny_config

FRAMEWORKS = ("nnx", "equinox", "haiku")


def path_of(framework):
    return f"examples.{framework}_encoder:create"


def config_for(path, **overrides):
    return tiny_config(
        model__type=path,
        model__stem_init="random",
        model__stage_sizes=(1,),
        **{"optim__epochs": 2.0, **overrides},
    )


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Haiku's moving average mixes whole and real numbers, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def small_images():
    images = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), np.uint8)
    return jepa_jax.from_arrays(images, np.arange(400) % 4)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def trained(request, tmp_path_factory, small_images):
    """(framework, workdir, first state, last state)."""
    workdir = tmp_path_factory.mktemp(request.param)
    config = config_for(path_of(request.param))
    state = train_and_evaluate(config, workdir, dataset=small_images)
    encoder = create_encoder(config)
    first = encoder.model.init(jax.random.key(1), jnp.zeros((2, 16, 16, 3), jnp.float32))
    return request.param, workdir, first, state


def test_parameters_and_statistics_move(trained):
    _, workdir, first, state = trained
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["feature_dim"] == 32
    assert np.isfinite(summary["ridge_probe_acc"] or summary["val_ridge_probe_acc"])
    assert jax.tree.structure(first["params"]) == jax.tree.structure(state.params)
    drawn = jax.tree.leaves(first["batch_stats"]["encoder"])
    for before, after in zip(drawn, jax.tree.leaves(state.batch_stats["encoder"]), strict=True):
        assert before.dtype == after.dtype
        assert not np.array_equal(before, after)
    # A bias begins at zero in every framework but Equinox, a scale at one.
    for leaf in jax.tree.leaves(state.params["encoder"]):
        assert not np.isin(np.asarray(leaf), (0.0, 1.0)).all()


def test_a_finished_run_is_loaded_and_judged_by_its_folder_alone(trained, small_images):
    _, workdir, _, state = trained
    encoder, variables = jepa_jax.load_encoder(workdir)
    h = encoder.apply(variables, small_images.train_images[:5])
    assert h.shape == (5, 32)
    result = evaluate_run(workdir, dataset=small_images, parts=("ridge",))
    assert 0 <= result["probes"]["ridge"]["encoder"]["val"]["acc"] <= 1
    assert (workdir / "report.html").exists() or jepa_jax.write_report([workdir])


def test_evaluation_reads_the_statistics_and_training_does_not(trained, small_images):
    """A batch of its own moments in training; one image alone by the running ones."""
    _, workdir, _, _ = trained
    encoder, variables = jepa_jax.load_encoder(workdir)
    images = encoder.normalize(small_images.train_images[:8])
    (both, _), same = encoder.model.apply(variables, images, False)
    (alone, _), _ = encoder.model.apply(variables, images[:1], False)
    np.testing.assert_allclose(alone, both[:1], rtol=1e-3, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, variables["batch_stats"])
    (trained_h, _), _ = encoder.model.apply(variables, images, True)
    (trained_alone, _), _ = encoder.model.apply(variables, images[:2], True)
    assert np.abs(trained_h[:2] - trained_alone).max() > 1e-3


def test_re_estimated_statistics_are_the_moments_of_clean_images(trained, small_images):
    """Evaluation of those images then equals training on them in one batch."""
    _, workdir, _, _ = trained
    encoder, variables = jepa_jax.load_encoder(workdir)
    images = encoder.normalize(small_images.train_images)
    (in_evaluation, _), _ = encoder.model.apply(variables, images, False)
    (in_training, _), _ = encoder.model.apply(variables, images, True)
    np.testing.assert_allclose(in_evaluation, in_training, rtol=0.02, atol=0.01)


def own_gradient(framework, key, images):
    """Leaves of the gradient of sum(h**2), taken in the framework itself."""
    example = importlib.import_module(f"examples.{framework}_encoder")
    if framework == "nnx":
        model = example.ConvNet(nnx.Rngs(key))
        grads = nnx.grad(lambda model: jnp.sum(model(images, True) ** 2))(model)
        return jax.tree.leaves(nnx.to_pure_dict(grads))
    if framework == "equinox":
        model, state = eqx.nn.make_with_state(example.ConvNet)(key)

        @eqx.filter_grad
        def grad(model):
            h, _ = jax.vmap(model, (0, None), (0, None), axis_name="batch")(images, state)
            return jnp.sum(h**2)

        return jax.tree.leaves(grad(model))
    net = hk.transform_with_state(example.conv_net)
    params, state = net.init(key, images, True)

    def loss(params):
        return jnp.sum(net.apply(params, state, None, images, True)[0] ** 2)

    return jax.tree.leaves(jax.grad(loss)(params))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gradients_are_those_taken_in_the_framework_itself(framework):
    example = importlib.import_module(f"examples.{framework}_encoder")
    key, images = jax.random.key(0), jax.random.normal(jax.random.key(1), (6, 8, 8, 3))
    encoder = example.create()
    variables = encoder.init(key, images)

    def loss(params):
        h, _ = encoder.apply({**variables, "params": params}, images, True)
        return jnp.sum(h**2)

    grads = jax.tree.leaves(jax.grad(loss)(variables["params"]))
    wanted = own_gradient(framework, key, images)
    assert max(float(jnp.abs(g).max()) for g in wanted) > 1e-3
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_example_has_at_most_forty_lines(framework):
    source = importlib.import_module(f"examples.{framework}_encoder").__file__
    with open(source) as lines:
        assert len(lines.readlines()) <= 40


# --- resume, and what can be wrong --------------------------------------------------------------

OWN = """
import flax.linen as nn
import jax.numpy as jnp
from jepa_jax import EncoderFns

class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(6)(jnp.mean(images, axis=(1, 2)))

number = 3
def integers(): return EncoderFns(lambda key, x: {"params": {}}, lambda v, x, t: (x, {}))
def fails(): raise RuntimeError("two\\nlines")
def nothing(): return None
def needs(size): return Linear()
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current folder, and nowhere else."""
    (tmp_path / "mine_of_test.py").write_text(OWN)
    (tmp_path / "broken_of_test.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_of_test"
    sys.modules.pop("mine_of_test", None)


def test_a_linen_class_in_the_current_folder_resumes_and_ends_in_the_same_bits(
    own_module, tmp_path, small_images
):
    path = f"{own_module}:Linear"
    config, interrupted = config_for(path, logging__save_every=1), tmp_path / "run"
    whole = train_and_evaluate(config, interrupted, dataset=small_images)
    (interrupted / "summary.json").unlink()
    shutil.rmtree(interrupted / "checkpoints" / "8")
    again = train_and_evaluate(config, interrupted, dataset=small_images)
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    encoder, variables = jepa_jax.load_encoder(interrupted)
    assert encoder.apply(variables, small_images.train_images[:3]).shape == (3, 6)
    (tmp_path / "mine_of_test.py").unlink()
    del sys.modules[own_module]
    with pytest.raises(ConfigError, match=r"model.type=mine_of_test:Linear: no module mine_of"):
        jepa_jax.load_encoder(interrupted)
    with pytest.raises((CheckpointError, ConfigError), match="mine_of_test:Linear"):
        jepa_jax.export_encoder(interrupted, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no_such_module:encoder", "no module no_such_module in the current folder"),
        ("broken_of_test:encoder", "importing broken_of_test failed: ModuleNotFoundError"),
        ("mine_of_test:Liner", r"mine_of_test has no Liner \(did you mean Linear\?\)"),
        ("mine_of_test:number", "is a int; it must be a function or a class"),
        ("mine_of_test:fails", "called without arguments: RuntimeError: two lines"),
        ("mine_of_test:needs", "called without arguments: TypeError"),
        ("mine_of_test:nothing", "must return a Linen module or .*EncoderFns.*, got a NoneType"),
    ],
)
def test_what_is_no_encoder_is_one_line(own_module, path, what):
    config = config_for(path)
    validate(config)
    with pytest.raises(ConfigError, match=what) as caught:
        create_encoder(config)
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)


def test_a_path_that_is_none_is_refused_before_anything_is_imported():
    for path in ("a:b:c", "my-module:encoder", "module:", "vit_tiny", ":f", "a/b:c"):
        with pytest.raises(ConfigError, match="config.model.type must be one of resnet, vit_ti"):
            validate(config_for(path))


class Maps(nn.Module):
    """A map in place of a vector."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Conv(4, (3, 3))(images)


def raises(variables, images, train):
    raise ValueError("no\nsuch images")


@pytest.mark.parametrize(
    ("encoder", "what"),
    [
        (Maps(), r"must give float representations \[B, F\], of 2 images it gives float32\[2, 16"),
        (
            EncoderFns(lambda key, x: {"params": {"w": x[0]}}, lambda v, x, t: (x[0, 0], {})),
            r"it gives float32\[16, 3\]",
        ),
        (EncoderFns(lambda key, x: {"params": {}}, raises), "no such images"),
    ],
)
def test_wrong_outputs_are_one_line(tmp_path, small_images, encoder, what):
    config = config_for("resnet", model__use_projector=False)
    with pytest.raises(ConfigError, match=what) as caught:
        train_and_evaluate(config, tmp_path / "run", dataset=small_images, encoder=encoder)
    assert "\n" not in str(caught.value)


def test_whitening_is_for_a_resnet():
    for kind in ("vit_s", path_of("nnx")):
        config = config_for(kind)
        config.model.stem_init = "whitening"
        with pytest.raises(ConfigError, match="give --config.model.stem_init=random"):
            validate(config)
