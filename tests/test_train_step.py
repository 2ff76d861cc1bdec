"""The training step: against a hand-written one, and the laws of scan, vmap, keys and guards."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax.augment import to_float
from jepa_jax.models import ImageJEPA, ModelFns, Projector, ResNet, linen_model
from jepa_jax.optim import create_optimizer
from jepa_jax.train_step import (
    HParams,
    TrainState,
    create_train_state,
    fault_places,
    learning_rate,
    make_train_epoch,
    make_train_step,
    probe_logits,
    stream_key,
    vicreg,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NUM_CLASSES = 10
BATCH = 8


def some_hparams(**changes):
    numbers = {
        "lr": 0.3,
        "weight_decay": 0.01,
        "momentum": 0.8,
        "warmup_start_lr": 0.1,
        "min_lr": 0.05,
        "warmup_steps": 2,
        "num_steps": 10,
        "sim_coeff": 1.5,
        "std_coeff": 2.5,
        "cov_coeff": 3.5,
        "probe_lr": 0.01,
        "late_epoch_steps": 0,
    }
    numbers = {name: np.float32(value) for name, value in {**numbers, **changes}.items()}
    return HParams(seed=np.uint32(numbers.pop("seed", 7)), **numbers)


def dimmed(key, images):
    """A cheap pair of views: every image times a factor of its own."""
    factors = jax.random.uniform(key, (2, images.shape[0], 1, 1, 1), minval=0.3)
    images = to_float(images)
    return factors[0] * images, factors[1] * images


def normalised(view):
    return (np.asarray(view) - np.float32(MEAN)) / np.float32(STD)


def dense_init(key, images):
    """One layer: what compiles fast, for the laws that hold for every model."""
    size = images[0].size
    return {"params": {"w": jax.random.normal(key, (size, 6)) / size**0.5, "b": jnp.zeros(6)}}


def dense_apply(variables, images, train):
    params = variables["params"]
    h = images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None, :]
    return (h, jnp.tanh(h)), {}


DENSE = ModelFns(dense_init, dense_apply)
MODULE = ImageJEPA(ResNet(stage_sizes=(1,), width=4, stem_stride=2), Projector(6, 5))
RESNET = linen_model(MODULE)


def new_state(model, hparams, **options):
    create = functools.partial(
        create_train_state, model, image_shape=(8, 8, 3), num_classes=NUM_CLASSES
    )
    return jax.jit(functools.partial(create, **options))(hparams)


def new_step(model, augment_fn=dimmed, **options):
    return make_train_step(model, augment_fn=augment_fn, mean=MEAN, std=STD, **options)


def assert_trees_close(found, expected, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6, **tolerance}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


def assert_trees_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def data(cifar_arrays):
    """Forty real images, cut to 8x8, and their labels, on the device."""
    images = np.ascontiguousarray(cifar_arrays["train_images"][::10, 12:20, 12:20])
    return jax.device_put(images), jax.device_put(cifar_arrays["train_labels"][::10])


@pytest.fixture(scope="module")
def batch(data):
    return data[0][:BATCH], data[1][:BATCH]


@pytest.fixture(scope="module")
def dense_step():
    return jax.jit(new_step(DENSE))


@pytest.fixture(scope="module")
def resnet_state():
    """A state in the middle of a training: its momenta and its probe are not zero."""
    create = functools.partial(
        create_train_state, RESNET, image_shape=(8, 8, 3), num_classes=NUM_CLASSES
    )
    rng = np.random.default_rng(0)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full(leaf.shape, 3, leaf.dtype)
        return jnp.float32(0.1 + 0.3 * np.abs(rng.normal(size=leaf.shape)))

    state = jax.tree.map(draw, jax.eval_shape(create, some_hparams()))
    # Moments of Adam as small as its gradients, which would not show beside larger ones.
    adam, *rest = state.probe.opt_state
    adam = adam._replace(mu=jax.tree.map(lambda m: 1e-2 * m, adam.mu))
    adam = adam._replace(nu=jax.tree.map(lambda v: 1e-4 * v, adam.nu))
    return state.replace(probe=state.probe.replace(opt_state=(adam, *rest)))


@pytest.fixture(scope="module")
def resnet_step(resnet_state, batch):
    return jax.jit(new_step(RESNET)).lower(resnet_state, *batch, some_hparams()).compile()


@pytest.fixture(scope="module")
def resnet_epoch(resnet_state, data):
    """A program of five steps over the resident data."""
    indices = jax.ShapeDtypeStruct((5, BATCH), jnp.int32)
    epoch = jax.jit(make_train_epoch(new_step(RESNET)))
    return epoch.lower(resnet_state, *data, indices, some_hparams()).compile()


# --- one step, by hand ---------------------------------------------------------------------------


def vicreg_by_hand(z1, z2, hparams):
    def regulariser(z):
        covariance = jnp.cov(z, rowvar=False)
        variances = jnp.diag(covariance)
        hinge = jnp.mean(jnp.maximum(0.0, 1.0 - jnp.sqrt(variances + 1e-4)))
        squares = (jnp.sum(covariance**2) - jnp.sum(variances**2)) / (z.shape[1] * (z.shape[1] - 1))
        return hparams.std_coeff * hinge + hparams.cov_coeff * squares

    return hparams.sim_coeff * jnp.mean((z1 - z2) ** 2) + regulariser(z1) + regulariser(z2)


@jax.jit
def forward_by_hand(params, batch_stats, key, images, hparams):
    """(loss, (h of the first view, batch_stats)) and gradients, by the module's own apply alone."""
    views = [
        (view - np.float32(MEAN)[None, None, None]) / np.float32(STD)[None, None, None]
        for view in dimmed(key, images)
    ]

    def loss(params):
        stats, outputs = batch_stats, []
        for view in views:
            output, updated = MODULE.apply(
                {"params": params, "batch_stats": stats}, view, True, mutable=["batch_stats"]
            )
            stats = updated["batch_stats"]
            outputs.append(output)
        (h, z1), (_, z2) = outputs
        return vicreg_by_hand(z1, z2, hparams), (h, stats)

    return jax.value_and_grad(loss, has_aux=True)(params)


def lars_by_hand(p, g, m, rate, hparams):
    p, g, m = (np.asarray(x, np.float64) for x in (p, g, m))
    p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
    if p.ndim > 1 and p_norm > 0 and g_norm > 0:
        ratio = 0.02 * p_norm / (g_norm + hparams.weight_decay * p_norm + 1e-8)
        g = (g + hparams.weight_decay * p) * min(ratio / rate, 1.0)
    m = hparams.momentum * m + g
    return p - rate * m, m


def probe_by_hand(probe, h, labels, rate):
    """Cross-entropy, accuracy, and the parameters after one step of Adam."""
    params = {name: np.asarray(value, np.float64) for name, value in probe.params.items()}
    logits = h @ params["kernel"] + params["bias"]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    error = (shares - np.eye(NUM_CLASSES)[labels]) / len(labels)
    gradients = {"kernel": h.T @ error, "bias": error.sum(0)}
    adam = probe.opt_state[0]
    count = int(adam.count) + 1
    after = {}
    for name, g in gradients.items():
        first = 0.9 * np.asarray(adam.mu[name]) + 0.1 * g
        second = 0.999 * np.asarray(adam.nu[name]) + 0.001 * g**2
        mean, square = first / (1 - 0.9**count), second / (1 - 0.999**count)
        after[name] = params[name] - rate * mean / (np.sqrt(square) + 1e-8)
    return -np.mean(np.log(shares[rows, labels])), np.mean(logits.argmax(1) == labels), after


def test_a_step_equals_one_written_by_hand(resnet_step, resnet_state, batch):
    hparams, (images, labels) = some_hparams(), batch
    state, metrics = resnet_step(resnet_state, images, labels, hparams)
    key = stream_key(7, "views", 3)
    (loss, (h, batch_stats)), gradients = forward_by_hand(
        resnet_state.params, resnet_state.batch_stats, key, images, hparams
    )
    # Step 3 is one step after a warm-up of 2 in 10.
    rate = 0.05 + 0.25 * (1 + np.cos(np.pi / 8)) / 2
    moved = jax.tree.map(
        lambda p, g, m: lars_by_hand(p, g, m, rate, hparams),
        resnet_state.params,
        gradients,
        resnet_state.opt_state.momentum,
    )
    params, momentum = jax.tree.transpose(
        jax.tree.structure(gradients), jax.tree.structure((0, 0)), moved
    )
    assert int(state.step) == 4
    assert_trees_close(state.params, params, rtol=1e-4, atol=1e-5)
    assert_trees_close(state.opt_state.momentum, momentum, rtol=1e-3, atol=1e-5)
    assert_trees_close(state.batch_stats, batch_stats, rtol=1e-4)
    probe_loss, probe_acc, probe_params = probe_by_hand(
        resnet_state.probe, np.asarray(h, np.float64), np.asarray(labels), 0.01
    )
    assert_trees_close(state.probe.params, probe_params, rtol=1e-4, atol=1e-5)
    expected = {
        "loss": loss,
        "lr": rate,
        "grad_norm": optax.tree.norm(gradients),
        "fault": jnp.float32(0),
        "probe_loss": probe_loss,
        "probe_acc": probe_acc,
    }
    assert_trees_close({name: metrics[name] for name in expected}, expected, rtol=1e-4)
    terms = {"invariance_loss", "var_loss", "cov_loss"}
    assert set(metrics) == terms | set(expected)
    assert {(m.shape, m.dtype) for m in metrics.values()} == {((), jnp.dtype(jnp.float32))}


def a_fault(batch, model=DENSE, augment_fn=dimmed, loss_fn=vicreg, **numbers):
    """What the metric `fault` of one step says, in the words of `fault_places`; '' for 0."""
    hparams = some_hparams(**numbers)
    state = new_state(model, hparams, optimizer="sgd")
    step = new_step(model, augment_fn, loss_fn=loss_fn, optimizer="sgd")
    _, metrics = jax.jit(step)(state, *batch, hparams)
    number = int(metrics["fault"])
    return fault_places(state.params)[number - 1] if number else ""


def test_nothing_is_at_fault_in_a_step_of_finite_numbers(batch):
    assert a_fault(batch) == ""


def test_a_view_that_is_not_finite_is_told_before_all_that_follows_from_it(batch):
    def spoilt(key, images):
        x1, x2 = dimmed(key, images)
        return x1, x2.at[3, 0, 0, 0].set(jnp.inf)

    assert a_fault(batch, augment_fn=spoilt) == "a view of an image is not finite"


def test_a_loss_that_is_not_finite_spoils_every_gradient(batch):
    def infinite(key, z1, z2, hparams):
        loss, terms = vicreg(key, z1, z2, hparams)
        return loss * jnp.inf, terms

    assert a_fault(batch, loss_fn=infinite) == "no gradient is finite"


def test_one_gradient_that_is_not_finite_is_named(batch):
    """The root's slope at 0 is infinite: of the bias, which begins there, and of nothing else."""

    def apply(variables, images, train):
        params = variables["params"]
        h = images.reshape(images.shape[0], -1) @ params["w"]
        return (h, h + jnp.sqrt(params["b"])[None, :]), {}

    model = ModelFns(dense_init, apply)
    assert a_fault(batch, model=model) == "the gradient of b is not finite"


def test_a_parameter_that_overflows_in_its_update_is_named_at_this_very_step(batch):
    """By weight decay, which spares the bias; every gradient is finite."""
    numbers = {"lr": 1e30, "weight_decay": 1e30, "warmup_steps": 0}
    assert a_fault(batch, **numbers) == "the parameter w is not finite"


def test_the_rate_follows_the_steps_of_the_hparams():
    hparams = some_hparams()
    found = learning_rate(hparams, np.arange(11))
    falling = 0.05 + 0.25 * (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose(found, [0.1, 0.2, *falling], rtol=1e-5)


def test_vicreg_takes_each_coefficient_from_the_hparams():
    z = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)
    hparams = some_hparams()
    loss, _ = jax.jit(vicreg)(jax.random.key(0), z[0], z[1], hparams)
    np.testing.assert_allclose(loss, vicreg_by_hand(z[0], z[1], hparams), rtol=1e-5)


@jax.jit
def dense_gradients(params, views, hparams):
    def loss(params):
        z1, z2 = (dense_apply({"params": params}, view, True)[0][1] for view in views)
        return vicreg_by_hand(z1, z2, hparams)

    return jax.grad(loss)(params)


def test_the_rate_follows_the_references_schedule_when_its_epochs_steps_are_given():
    hparams = some_hparams(lr=0.7, min_lr=0.0, warmup_steps=4, num_steps=12, late_epoch_steps=2)
    rates = [float(learning_rate(hparams, step)) for step in range(0, 12, 2)]
    fall = [0.35 * (1 + np.cos(np.pi * k / 4)) for k in range(3)]
    np.testing.assert_allclose(rates, [0.7, 0.1, 0.7, *fall], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_named_optimiser_takes_the_step(name, batch):
    """Its chain, at this step's rate, on the gradient of the loss."""
    hparams = some_hparams(lr=0.02, warmup_start_lr=0.01, min_lr=0.0)
    state = new_state(DENSE, hparams, optimizer=name)
    after, _ = jax.jit(new_step(DENSE, optimizer=name))(state, *batch, hparams)
    views = [normalised(view) for view in dimmed(stream_key(7, "views", 0), batch[0])]
    optimizer = create_optimizer(name, 0.01, weight_decay=0.01, momentum=0.8)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(
            dense_gradients(state.params, views, hparams), state.opt_state, state.params
        )
    expected = optax.apply_updates(state.params, updates), opt_state
    assert_trees_close((after.params, after.opt_state), expected, rtol=1e-3, atol=1e-6)


# --- the state -----------------------------------------------------------------------------------


def test_a_fresh_state_is_a_function_of_the_seed():
    state, again = (new_state(DENSE, some_hparams()) for _ in range(2))
    assert_trees_equal(state, again)
    other = new_state(DENSE, some_hparams(seed=8))
    assert np.max(np.abs(other.params["w"] - state.params["w"])) > 0.01
    expected = DENSE.init(stream_key(7, "init"), jnp.zeros((1, 8, 8, 3)))["params"]
    assert_trees_close(state.params, expected)
    assert int(state.step) == 0
    assert_trees_equal(state.opt_state.momentum, jax.tree.map(jnp.zeros_like, state.params))
    assert jax.tree.map(jnp.shape, state.probe.params) == {"kernel": (6, 10), "bias": (10,)}


def test_the_state_holds_numeric_arrays_only(resnet_state, resnet_step, batch):
    """No key, no function, no optimiser: what orbax can store and a mesh can shard."""
    after, _ = resnet_step(resnet_state, *batch, some_hparams())
    for state in (resnet_state, after):
        for leaf in jax.tree.leaves(state):
            assert isinstance(leaf, jax.Array)
            assert jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.int32
    assert jax.tree.structure(after) == jax.tree.structure(resnet_state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), resnet_state
    )
    assert {field.name for field in dataclasses.fields(TrainState)} == {
        "step",
        "params",
        "batch_stats",
        "opt_state",
        "probe",
    }


# --- keys ----------------------------------------------------------------------------------------


def test_streams_seeds_and_indices_all_have_keys_of_their_own():
    keys = [
        tuple(jax.random.key_data(stream_key(np.uint32(seed), stream, index)).tolist())
        for seed in (0, 1)
        for stream in ("init", "views", "loss", "order")
        for index in (0, 1)
    ]
    assert len(set(keys)) == 16
    traced = jax.jit(lambda seed, index: stream_key(seed, "views", index))(np.uint32(1), 1)
    assert tuple(jax.random.key_data(traced).tolist()) in keys


def test_the_views_of_a_step_depend_on_seed_and_step_alone(batch):
    """Not on the state's history: what a resumed run draws is what it would have drawn."""
    step = jax.jit(new_step(DENSE, loss_fn=lambda key, z1, z2, hparams: (jnp.sum(z1 * z2), {})))
    hparams = some_hparams(lr=0.0, warmup_start_lr=0.0, min_lr=0.0)
    state = new_state(DENSE, hparams)
    losses = []
    for _ in range(3):
        state, metrics = step(state, *batch, hparams)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    jumped = new_state(DENSE, hparams).replace(step=jnp.int32(2))
    assert float(step(jumped, *batch, hparams)[1]["loss"]) == losses[2]
    other_seed = hparams.replace(seed=np.uint32(8))
    assert float(step(jumped, *batch, other_seed)[1]["loss"]) != losses[2]


def test_a_run_goes_on_bit_for_bit_from_a_state_that_was_stored(dense_step, batch):
    hparams = some_hparams()
    state = new_state(DENSE, hparams)
    for index in range(4):
        if index == 2:
            stored = jax.tree.map(np.array, state)
        state, metrics = dense_step(state, *batch, hparams)
    resumed = jax.tree.map(jnp.asarray, stored)
    for _ in range(2):
        resumed, again = dense_step(resumed, *batch, hparams)
    assert_trees_equal((resumed, again), (state, metrics))


def test_a_custom_loss_receives_its_own_key_and_the_hparams(batch):
    """And its terms come back; drawing from its key moves no view."""

    def loss_fn(key, z1, z2, hparams):
        return jnp.sum(z1 * z2), {"draw": jax.random.uniform(key), "weight": hparams.cov_coeff}

    step = jax.jit(new_step(DENSE, loss_fn=loss_fn))
    hparams = some_hparams(cov_coeff=4.25)
    state = new_state(DENSE, hparams)
    draws = []
    for index in range(2):
        state, metrics = step(state, *batch, hparams)
        draws.append(float(metrics["draw"]))
        expected = float(jax.random.uniform(stream_key(7, "loss", index)))
        assert draws[-1] == pytest.approx(expected)
    assert metrics["weight"] == 4.25
    assert draws[0] != draws[1]


# --- the probe -----------------------------------------------------------------------------------


def with_random_probe(state):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.float32(0.3 * rng.normal(size=p.shape)), state.probe.params)
    return state.replace(probe=state.probe.replace(params=params))


def test_the_probe_never_reaches_the_encoder(resnet_step, resnet_state, batch):
    images, labels = batch
    with_labels, _ = resnet_step(resnet_state, images, labels, some_hparams())
    without, _ = resnet_step(resnet_state, images, jnp.full_like(labels, -1), some_hparams())
    for part in ("params", "batch_stats", "opt_state"):
        assert_trees_equal(getattr(with_labels, part), getattr(without, part))
    moved = with_labels.probe.params["kernel"] - without.probe.params["kernel"]
    assert np.max(np.abs(moved)) > 1e-4


def test_the_probe_gives_every_pair_of_views_its_image_s_label(batch):
    images, labels = batch
    hparams = some_hparams()
    state = with_random_probe(new_state(DENSE, hparams))

    def two_pairs(key, images):
        return dimmed(key, jnp.concatenate([images, images]))

    after, metrics = new_step(DENSE, augment_fn=two_pairs)(state, images, labels, hparams)
    view = normalised(two_pairs(stream_key(7, "views", 0), images)[0])
    h = np.asarray(DENSE.apply({"params": state.params}, view, True)[0][0], np.float64)
    both = np.concatenate([labels, labels])
    loss, acc, params = probe_by_hand(state.probe, h, both, 0.01)
    np.testing.assert_allclose(metrics["probe_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["probe_acc"], acc, rtol=1e-5)
    assert_trees_close(after.probe.params, params, rtol=1e-3, atol=1e-5)


def test_rows_that_are_not_the_views_of_the_images_are_refused(batch):
    state = new_state(DENSE, some_hparams())

    def one_more(key, images):
        return dimmed(key, jnp.concatenate([images, images[:1]]))

    with pytest.raises(ValueError, match="augment_fn made 9 views of 8 images"):
        new_step(DENSE, augment_fn=one_more)(state, *batch, some_hparams())

    def twice(variables, images, train):
        (h, z), stats = dense_apply(variables, images, train)
        return (jnp.concatenate([h, h]), z), stats

    with pytest.raises(ValueError, match="gave 16 representations of 8 views"):
        new_step(ModelFns(dense_init, twice))(state, *batch, some_hparams())


def test_images_without_a_label_do_not_count_for_the_probe(dense_step, batch):
    images, labels = batch
    hparams = some_hparams()
    state = with_random_probe(new_state(DENSE, hparams))
    hidden = labels.at[np.array([0, 3, 4])].set(-1)
    after, metrics = dense_step(state, images, hidden, hparams)
    view = normalised(dimmed(stream_key(7, "views", 0), images)[0])
    h = np.asarray(DENSE.apply({"params": state.params}, view, True)[0][0], np.float64)
    kept = np.array([1, 2, 5, 6, 7])
    loss, acc, params = probe_by_hand(state.probe, h[kept], np.asarray(labels)[kept], 0.01)
    np.testing.assert_allclose(metrics["probe_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["probe_acc"], acc, rtol=1e-5)
    assert_trees_close(after.probe.params, params, rtol=1e-3, atol=1e-5)


def test_a_batch_without_any_label_leaves_a_fresh_probe_alone(dense_step, batch):
    state = with_random_probe(new_state(DENSE, some_hparams()))
    after, metrics = dense_step(state, batch[0], jnp.full_like(batch[1], -1), some_hparams())
    assert_trees_equal(after.probe.params, state.probe.params)
    assert (metrics["probe_loss"], metrics["probe_acc"]) == (0.0, 0.0)


def test_without_classes_there_is_no_probe(dense_step, batch):
    hparams = some_hparams()
    state = new_state(DENSE, hparams, num_classes=0)
    after, metrics = dense_step(state, *batch, hparams)
    assert state.probe is after.probe is None
    assert not {"probe_loss", "probe_acc"} & set(metrics)
    expected, _ = dense_step(new_state(DENSE, hparams), *batch, hparams)
    assert_trees_close(after.params, expected.params)


def test_probe_logits_are_linear():
    params = {"kernel": jnp.float32([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.float32([0.5, -0.5])}
    logits = probe_logits(params, jnp.float32([[1.0, -1.0], [0.0, 2.0]]))
    np.testing.assert_array_equal(logits, [[-1.5, -2.5], [6.5, 7.5]])


# --- many steps, many runs -----------------------------------------------------------------------

INDICES = np.random.default_rng(2).permutation(40)[:24].reshape(3, BATCH).astype(np.int32)


def loop(step, state, data, rows, hparams):
    """The state and the stacked metrics of one step after the other."""
    history = []
    for row in rows:
        state, metrics = step(state, data[0][row], data[1][row], hparams)
        history.append(metrics)
    return state, jax.tree.map(lambda *values: np.stack(values), *history)


def test_scan_equals_the_loop_and_padding_rows_change_nothing(
    resnet_step, resnet_epoch, resnet_state, data
):
    padded = np.concatenate([INDICES, np.full((2, BATCH), -1, np.int32)])
    state, metrics = resnet_epoch(resnet_state, *data, padded, some_hparams())
    expected_state, expected_metrics = loop(
        resnet_step, resnet_state, data, INDICES, some_hparams()
    )
    assert_trees_close(state, expected_state, rtol=1e-3, atol=1e-4)
    assert_trees_close(jax.tree.map(lambda m: m[:3], metrics), expected_metrics, rtol=1e-3)
    assert all(np.all(values[3:] == 0.0) for values in metrics.values())
    # A program of padding alone gives back the very bits that came in.
    assert_trees_equal(
        resnet_epoch(state, *data, np.full_like(padded, -1), some_hparams())[0], state
    )


def test_every_row_of_a_vmapped_sweep_equals_its_single_run(dense_step, data):
    """vmap over hyper-parameters, seed included, of the scan over steps."""
    points = [some_hparams(), some_hparams(seed=11, lr=0.1, std_coeff=0.5, probe_lr=0.05)]
    sweep = jax.tree.map(lambda *values: np.stack(values), *points)
    create = functools.partial(
        create_train_state, DENSE, image_shape=(8, 8, 3), num_classes=NUM_CLASSES
    )
    states = jax.jit(jax.vmap(create))(sweep)
    epoch = make_train_epoch(new_step(DENSE))
    states, metrics = jax.jit(jax.vmap(epoch, in_axes=(0, None, None, None, 0)))(
        states, *data, INDICES, sweep
    )
    for row, hparams in enumerate(points):
        expected = loop(dense_step, new_state(DENSE, hparams), data, INDICES, hparams)
        found = jax.tree.map(lambda x, row=row: x[row], (states, metrics))
        assert_trees_close(found, expected, rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(states.params["w"][0] - states.params["w"][1])) > 0.01


# --- guards without clocks -----------------------------------------------------------------------


def test_changing_any_hyper_parameter_compiles_nothing_new(batch):
    traces = []

    def counted(key, images, strength):
        traces.append(key)
        return tuple(strength * view for view in dimmed(key, images))

    step = jax.jit(new_step(DENSE, counted))
    hparams = dataclasses.replace(some_hparams(), augment={"strength": np.float32(0.5)})
    state = new_state(DENSE, hparams)
    first = step(state, *batch, hparams)[1]
    for field in dataclasses.fields(HParams):
        value = jax.tree.map(lambda number: number + 1, getattr(hparams, field.name))
        step(state, *batch, dataclasses.replace(hparams, **{field.name: value}))
    assert len(traces) == 1
    for change in ({"cov_coeff": np.float32(9.0)}, {"augment": {"strength": np.float32(0.8)}}):
        changed = dataclasses.replace(hparams, **change)
        assert step(state, *batch, changed)[1]["loss"] != first["loss"]
    assert len(traces) == 1


def test_a_step_moves_nothing_between_host_and_device(dense_step, batch):
    hparams = jax.device_put(some_hparams())
    state = new_state(DENSE, hparams)
    dense_step(state, *batch, hparams)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = dense_step(state, *batch, hparams)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            dense_step(state, np.zeros((BATCH, 8, 8, 3), np.uint8), batch[1], hparams)


def instructions_in_loops(text):
    """The lines of a compiled program that some `while` runs, however deep."""
    bodies = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+) \(", block)
        if name:
            bodies[name[1]] = block.splitlines()[1:]

    def called(line):
        return bodies.keys() & set(re.findall(r"[\w.-]+", line.split(" = ")[-1]))

    reached = set()
    waiting = [line for body in bodies.values() for line in body if " while(" in line]
    while waiting:
        for name in called(waiting.pop()) - reached:
            reached.add(name)
            waiting += bodies[name]
    return [line for name in reached for line in bodies[name]]


def test_no_convolution_of_a_plain_step_lies_in_a_loop(resnet_step, resnet_epoch):
    """On the CPU such a convolution takes a path that is some 60 times slower."""

    def convolutions(compiled):
        text = compiled.as_text()
        parts = text.splitlines(), instructions_in_loops(text)
        return [sum("convolution(" in line for line in part) for part in parts]

    everywhere, looped = convolutions(resnet_step)
    assert everywhere >= 8
    assert looped == 0
    # The scanned epoch has all of its convolutions in one, which shows that the search finds them.
    everywhere, looped = convolutions(resnet_epoch)
    assert everywhere == looped >= 8


def test_a_profile_can_tell_the_parts_of_a_step_apart(batch):
    hparams = some_hparams()
    state = jax.eval_shape(lambda: new_state(RESNET, hparams))
    text = jax.jit(new_step(RESNET)).lower(state, *batch, hparams).as_text(debug_info=True)
    for scope in ("augment", "encoder", "projector", "loss", "optimizer", "probe"):
        assert re.search(rf'"[^"]*\b{scope}\b[^"]*"', text), scope


# --- more than two batches of views -------------------------------------------------------------


def pooled_apply(variables, images, train):
    """`dense_apply` on three by three mean colours: for images of every size."""
    batch, side = images.shape[0], images.shape[1] // 3
    images = images[:, : 3 * side, : 3 * side].reshape(batch, 3, side, 3, side, 3)
    return dense_apply(variables, jnp.mean(images, axis=(2, 4)), train)


POOLED = ModelFns(lambda key, images: dense_init(key, images[:, :3, :3]), pooled_apply)


def with_small_crops(key, images):
    """Two views of 8x8, and two crops of 5x5 below one another."""
    return *dimmed(key, images), jnp.concatenate([to_float(images)[:, :5, :5]] * 2)


def of_three(key, z1, z2, z3, hparams):
    """Rows n and n + B of z3 belong to image n."""
    loss, terms = vicreg(key, z1, z2, hparams)
    crops = jnp.mean(jnp.square(z3 - jnp.concatenate([z1, z2])))
    return loss + crops, {**terms, "crops_loss": crops}


def test_further_views_of_another_size_reach_the_loss_alone(resnet_state, batch):
    """Against a step written out; the statistics and the probe are those of the step without."""
    hparams = some_hparams()
    step = jax.jit(new_step(RESNET, with_small_crops, loss_fn=of_three))
    state, metrics = step(resnet_state, *batch, hparams)
    views = with_small_crops(stream_key(7, "views", resnet_state.step), batch[0])
    views = [jnp.asarray(normalised(view)) for view in views]

    @jax.jit
    def loss_of(params):
        given = {"params": params, "batch_stats": resnet_state.batch_stats}
        zs = [RESNET.apply(given, view, True)[0][1] for view in views]
        crops = jnp.stack([zs[2][:BATCH] - zs[0], zs[2][BATCH:] - zs[1]])
        return vicreg_by_hand(*zs[:2], hparams) + jnp.mean(crops**2)

    loss, grads = jax.value_and_grad(loss_of)(resnet_state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-3)
    assert float(metrics["crops_loss"]) > 0.01
    without, _ = jax.jit(new_step(RESNET))(resnet_state, *batch, hparams)
    assert_trees_close(state.batch_stats, without.batch_stats)
    assert_trees_close(state.probe, without.probe)


def test_crops_that_are_not_those_of_the_images_are_refused(batch):
    def one_more(key, images):
        x1, x2, crops = with_small_crops(key, images)
        return x1, x2, crops[:-1]

    step = new_step(POOLED, one_more, loss_fn=lambda key, z1, z2, z3, hparams: (jnp.mean(z1), {}))
    with pytest.raises(ValueError, match="augment_fn made 15 views of 8 images"):
        step(new_state(POOLED, some_hparams()), *batch, some_hparams())


def test_a_crop_that_is_not_finite_is_told_as_a_view(batch):
    def spoilt(key, images):
        x1, x2, crops = with_small_crops(key, images)
        return x1, x2, crops.at[-1, 0, 0, 0].set(jnp.nan)

    found = a_fault(batch, model=POOLED, augment_fn=spoilt, loss_fn=of_three)
    assert found == "a view of an image is not finite"


# --- microbatches -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_microbatches_change_nothing_of_an_encoder_without_batch_statistics(batch, num_pairs):
    def views(key, images):
        return dimmed(key, jnp.concatenate([images] * num_pairs))

    hparams = some_hparams()
    options = {"augment_fn": views, "loss_fn": functools.partial(vicreg, num_pairs=num_pairs)}
    states, metrics = [], []
    for microbatches in (1, 4):
        step = jax.jit(new_step(DENSE, microbatches=microbatches, **options))
        state = new_state(DENSE, hparams)
        for _ in range(3):
            state, found = step(state, *batch, hparams)
        states.append(state)
        metrics.append(found)
    assert_trees_close(states[1], states[0])
    assert_trees_close(metrics[1], metrics[0])


def test_microbatches_take_smaller_crops_too(batch):
    hparams, options = some_hparams(), {"augment_fn": with_small_crops, "loss_fn": of_three}
    state = new_state(POOLED, hparams)
    steps = [jax.jit(new_step(POOLED, microbatches=count, **options)) for count in (1, 4)]
    whole, pieces = (step(state, *batch, hparams) for step in steps)
    assert_trees_close(pieces, whole)


def test_microbatches_normalise_by_their_own_moments_and_the_loss_sees_the_whole_batch(batch):
    """Against a step written out: every piece by itself, one loss over all of them."""
    hparams, num_pieces = some_hparams(), 4
    state = new_state(RESNET, hparams)
    found, metrics = jax.jit(new_step(RESNET, microbatches=num_pieces))(state, *batch, hparams)

    views = dimmed(stream_key(hparams.seed, "views", state.step), batch[0])
    views = [jnp.asarray(normalised(view)) for view in views]
    kept = {"batch_stats": state.batch_stats}

    def embedded(params, view, stats):
        rows = [slice(piece, None, num_pieces) for piece in range(num_pieces)]
        given = {"params": params, "batch_stats": stats}
        parts = [RESNET.apply(given, view[row], True) for row in rows]
        z = jnp.zeros((BATCH, 5))
        for row, ((_, part), _) in zip(rows, parts, strict=True):
            z = z.at[row].set(part)
        stats = jax.tree.map(lambda *moved: sum(moved) / num_pieces, *(s for _, s in parts))
        return z, stats

    def loss_of(params):
        z1, stats = embedded(params, views[0], kept["batch_stats"])
        z2, stats = embedded(params, views[1], stats)
        return vicreg(None, z1, z2, hparams)[0], stats

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert_trees_close(found.batch_stats, stats)


def test_microbatches_of_a_network_with_batchnorm_are_another_step(batch):
    hparams = some_hparams()
    state = new_state(RESNET, hparams)
    losses = [
        float(jax.jit(new_step(RESNET, microbatches=n))(state, *batch, hparams)[1]["loss"])
        for n in (1, 4)
    ]
    assert abs(losses[1] - losses[0]) > 1e-3
