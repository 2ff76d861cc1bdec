"""Optimisers against loops over their formulas in numpy, and the schedule against optax's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax.optim import (
    OPTIMIZERS,
    create_optimizer,
    lars,
    late_epoch_warmup_cosine,
    warmup_cosine,
)

SHAPES = {"conv": (3, 3, 2, 4), "dense": (5, 8), "zero": (2, 3), "bias": (8,), "scale": (4,)}


def some_params():
    """Weights of four, two and one axes, one of them all zero."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    params["zero"][:] = 0.0
    return params


def some_gradients(step):
    """Random, but zero now and then: for one weight at a time."""
    rng = np.random.default_rng(100 + step)
    size = 10.0 ** rng.uniform(-2, 1)
    gradients = {
        name: (size * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()
    }
    if step % 5 == 2:
        gradients["conv"][:] = 0.0
    if step % 5 == 3:
        gradients["bias"][:] = 0.0
    return gradients


def run(optimizer, num_steps):
    """Parameters after every step."""
    params = some_params()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for index in range(num_steps):
        params, state = step(params, state, some_gradients(index))
        history.append(jax.device_get(params))
    return history


def assert_same_history(found, expected, rtol=2e-5):
    for step, (params, wanted) in enumerate(zip(found, expected, strict=True)):
        for name, value in wanted.items():
            np.testing.assert_allclose(
                params[name], value, rtol=rtol, atol=1e-6, err_msg=f"{name}, step {step}"
            )


def lars_in_numpy(num_steps, rate, *, weight_decay, momentum, trust, clip):
    """The reference's LARS, in float64."""
    params = {name: value.astype(np.float64) for name, value in some_params().items()}
    momenta = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(num_steps):
        for name, gradient in some_gradients(step).items():
            p, g = params[name], gradient.astype(np.float64)
            p_norm, g_norm = np.sqrt(np.sum(p**2)), np.sqrt(np.sum(g**2))
            if p.ndim > 1 and p_norm > 0 and g_norm > 0:
                ratio = trust * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
                if clip:
                    ratio = min(ratio / rate(step), 1.0)
                g = (g + weight_decay * p) * ratio
            momenta[name] = momentum * momenta[name] + g
            params[name] = p - rate(step) * momenta[name]
        yield dict(params)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_lars_equals_the_references_formula(clip, scheduled):
    """At rates between which the clipping binds for some steps and not for others."""
    schedule = optax.linear_schedule(0.3, 0.003, 15)
    options = {"weight_decay": 0.05, "momentum": 0.8}
    optimizer = lars(schedule if scheduled else 0.02, trust_coefficient=0.03, clip=clip, **options)
    rates = [float(schedule(step)) if scheduled else 0.02 for step in range(20)]
    expected = lars_in_numpy(20, rates.__getitem__, trust=0.03, clip=clip, **options)
    assert_same_history(run(optimizer, 20), expected)


def test_lars_defaults_are_the_references():
    """Weight decay 0, momentum 0.9, trust coefficient 0.02, clipped."""
    expected = lars_in_numpy(
        6, lambda step: 0.05, weight_decay=0.0, momentum=0.9, trust=0.02, clip=True
    )
    assert_same_history(run(lars(0.05), 6), expected)


def test_lars_without_parameters_is_refused():
    optimizer = lars(0.1)
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="parameters"):
        optimizer.update(params, optimizer.init(params))


def sgd_in_numpy(num_steps, rate, weight_decay, momentum):
    params = some_params()
    momenta = {name: 0.0 for name in params}
    for step in range(num_steps):
        for name, g in some_gradients(step).items():
            decay = weight_decay if g.ndim > 1 else 0.0
            momenta[name] = momentum * momenta[name] + g + decay * params[name]
            params[name] = params[name] - rate * momenta[name]
        yield dict(params)


def adamw_in_numpy(num_steps, rate, weight_decay):
    params = some_params()
    first = {name: 0.0 for name in params}
    second = {name: 0.0 for name in params}
    for step in range(num_steps):
        for name, g in some_gradients(step).items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - 0.999 ** (step + 1))
            decay = weight_decay if g.ndim > 1 else 0.0
            update = mean / (np.sqrt(square) + 1e-8) + decay * params[name]
            params[name] = params[name] - rate * update
        yield dict(params)


def test_sgd_is_heavy_ball_with_l2_decay_of_the_weights():
    optimizer = create_optimizer("sgd", 0.01, weight_decay=0.3, momentum=0.7)
    assert_same_history(run(optimizer, 5), sgd_in_numpy(5, 0.01, 0.3, 0.7))


def test_adamw_decays_the_weights_decoupled_from_the_gradient():
    optimizer = create_optimizer("adamw", 0.01, weight_decay=0.3)
    assert_same_history(run(optimizer, 5), adamw_in_numpy(5, 0.01, 0.3), rtol=1e-4)


def test_create_optimizer_passes_its_numbers_on_to_lars():
    expected = lars_in_numpy(
        5, lambda step: 0.02, weight_decay=0.4, momentum=0.5, trust=0.02, clip=True
    )
    optimizer = create_optimizer("lars", 0.02, weight_decay=0.4, momentum=0.5)
    assert_same_history(run(optimizer, 5), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_weights_and_never_one_axis_parameters(name):
    plain, decayed = (run(create_optimizer(name, 0.1, weight_decay=w), 2)[-1] for w in (0.0, 0.5))
    for parameter, shape in SHAPES.items():
        if len(shape) == 1:
            np.testing.assert_array_equal(decayed[parameter], plain[parameter])
        elif parameter != "zero":
            assert np.max(np.abs(decayed[parameter] - plain[parameter])) > 1e-3


def test_muon_orthogonalises_convolutions_and_leaves_one_axis_parameters_to_adam():
    """The first update is -rate * polar factor of the gradient * sqrt(max(1, fan_out / fan_in))."""
    rate = 0.1
    before, after = some_params(), run(create_optimizer("muon", rate), 1)[0]
    for name in ("conv", "dense"):
        update = (before[name] - after[name]).reshape(-1, SHAPES[name][-1]) / rate
        gradient = some_gradients(0)[name].reshape(update.shape)
        factor = max(1.0, update.shape[1] / update.shape[0]) ** 0.5
        # The Newton-Schulz iteration stops near 1, between about 0.7 and 1.2.
        singular_values = np.linalg.svd(update, compute_uv=False) / factor
        assert np.all((singular_values > 0.6) & (singular_values < 1.3))
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        polar = left @ right
        cosine = np.sum(polar * update) / np.linalg.norm(polar) / np.linalg.norm(update)
        assert cosine > 0.95
    for name in ("bias", "scale"):
        # The first step of Adam in Nesterov's form, which looks one step ahead.
        ahead = 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)
        expected = -0.1 * rate * ahead * np.sign(some_gradients(0)[name])
        np.testing.assert_allclose(after[name] - before[name], expected, rtol=1e-3)


def test_muon_leaves_the_projector_to_adam_and_treats_the_encoder_as_if_alone():
    params, grads = some_params(), some_gradients(0)
    tree, tree_grads = (
        {"encoder": {"conv": leaves["conv"]}, "projector": {"dense": leaves["dense"]}}
        for leaves in (params, grads)
    )
    optimizer = create_optimizer("muon", 0.1)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(tree_grads, optimizer.init(tree), tree)
    alone = run(optimizer, 1)[0]["conv"] - params["conv"]
    np.testing.assert_allclose(updates["encoder"]["conv"], alone, rtol=1e-3, atol=1e-6)
    ahead = 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)
    expected = -0.01 * ahead * np.sign(grads["dense"])
    np.testing.assert_allclose(updates["projector"]["dense"], expected, rtol=1e-3)


def test_unknown_optimiser_names_the_known_ones():
    with pytest.raises(ValueError, match="'adam' is not one of lars, sgd, adamw, muon"):
        create_optimizer("adam", 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_may_be_traced_and_changing_them_does_not_recompile(name):
    traces = []
    params = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}

    @jax.jit
    def step(params, rate, weight_decay, momentum):
        traces.append(name)
        optimizer = create_optimizer(name, rate, weight_decay=weight_decay, momentum=momentum)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(params, optimizer.init(params), params)[0]

    small = step(params, np.float32(0.1), np.float32(0.0), np.float32(0.9))
    large = step(params, np.float32(0.2), np.float32(0.0), np.float32(0.8))
    step(params, np.float32(0.2), np.float32(0.1), np.float32(0.8))
    assert len(traces) == 1
    np.testing.assert_allclose(large["b"], 2 * small["b"], rtol=1e-5)


def closed_form(step, peak, num_steps, warmup_steps, start, end):
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if step >= num_steps:
        return end
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return end + (peak - end) * (1 + np.cos(np.pi * progress)) / 2


schedule = jax.jit(
    lambda step, peak, num_steps, warmup_steps, start, end: warmup_cosine(
        step, peak=peak, num_steps=num_steps, warmup_steps=warmup_steps, start=start, end=end
    )
)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 39, 40])
def test_warmup_cosine_equals_its_closed_form_with_traced_arguments(warmup_steps):
    steps = np.arange(45)
    found = schedule(steps, np.float32(0.7), 40, warmup_steps, np.float32(0.01), np.float32(0.1))
    expected = [closed_form(step, 0.7, 40, warmup_steps, 0.01, 0.1) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 39])
def test_warmup_cosine_equals_optax_where_that_is_defined(warmup_steps):
    steps = np.arange(45)
    optaxs = optax.warmup_cosine_decay_schedule(0.01, 0.7, warmup_steps, 40, 0.1)
    found = schedule(steps, np.float32(0.7), 40, warmup_steps, np.float32(0.01), np.float32(0.1))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(found, jax.vmap(optaxs)(steps), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_the_references_schedule_is_set_after_each_epoch_and_the_first_runs_at_the_peak(warmup):
    """Against a loop that does what the reference's does, epoch by epoch."""
    peak, start, end, epochs, epoch_steps = 0.7, 3e-5, 0.1, 12, 4
    rate, wanted = peak, []
    for epoch in range(epochs):
        wanted += [rate] * epoch_steps
        if epoch < warmup:
            rate = start + epoch * (peak - start) / (warmup - 1)
        else:
            progress = (epoch - warmup) / (epochs - warmup)
            rate = end + 0.5 * (peak - end) * (1 + math.cos(math.pi * progress))
    found = jax.vmap(
        lambda step: late_epoch_warmup_cosine(
            step,
            peak=peak,
            num_steps=epochs * epoch_steps,
            warmup_steps=warmup * epoch_steps,
            epoch_steps=epoch_steps,
            start=start,
            end=end,
        )
    )(jnp.arange(epochs * epoch_steps))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_warmup_cosine_defaults_have_no_warmup_and_end_at_zero():
    rate = functools.partial(warmup_cosine, peak=2.0, num_steps=4)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4)], [2.0, 1.0, 0.0], atol=1e-6)
