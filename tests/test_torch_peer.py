"""The PyTorch side of the benchmark computes what ours does: pip install -e '.[parity]'."""

import json
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import optax
import pytest

from jepa_jax import augment, vicreg_loss
from jepa_jax.interop.torch_names import to_torch
from jepa_jax.models import CIFAR10_MEAN, CIFAR10_STD, ImageJEPA, Projector, ResNet, linen_model
from jepa_jax.optim import create_optimizer

pytest.importorskip("torch", reason="needs the extra parity")

# What importing torch warns of is torch's to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

    from benchmarks.torch_peer import __main__ as peer_command
    from benchmarks.torch_peer import augment as peer_augment
    from benchmarks.torch_peer import batches, network, recipe, training

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = {
    "batch_size": 8,
    "stage_sizes": [1, 1],
    "width": 8,
    "stem_kernel": 3,
    "stem_stride": 2,
    "stem_padding": 1,
    "stem_pool": False,
    "expand_dim": 0,
    "view_size": 32,
    "use_projector": True,
    "proj_hidden_dim": 16,
    "proj_output_dim": 12,
    "sim_coeff": 1.0,
    "std_coeff": 25.0,
    "cov_coeff": 3.0,
    "optimizer": "lars",
    "lr": 0.3,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "num_images": 16,
}
COEFFS = {name: RECIPE[name] for name in ("sim_coeff", "std_coeff", "cov_coeff")}


def made(**changes):
    content = {**RECIPE, **changes}
    return recipe.Recipe(**{**content, "stage_sizes": tuple(content["stage_sizes"])})


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- loss, network, optimisers ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)], ids=["B<D", "B>D"])
def test_loss_terms_and_gradient_are_ours(shape):
    z1, z2 = 0.5 * normal(0, *shape), 0.5 * normal(1, *shape) + 3.0
    (loss, terms), gradient = jax.jit(
        jax.value_and_grad(lambda z: vicreg_loss(z, z2, **COEFFS), has_aux=True)
    )(z1)
    tensor = torch.tensor(z1, requires_grad=True)
    found, found_terms = network.vicreg_loss(tensor, torch.tensor(z2), **COEFFS)
    found.backward()
    np.testing.assert_allclose(found.item(), loss, rtol=1e-5)
    assert set(found_terms) == set(terms)
    for name, value in terms.items():
        np.testing.assert_allclose(found_terms[name].item(), value, rtol=1e-5)
    np.testing.assert_allclose(tensor.grad, gradient, atol=1e-5 * np.max(np.abs(gradient)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stem_stride": 1, "stem_padding": 2, "stage_sizes": [2, 1, 1]},
        {"stem_kernel": 7, "stem_padding": 3, "stem_pool": True, "use_projector": False},
        {"stem_stride": 1, "expand_dim": 24, "view_size": 16},
    ],
    ids=["cpu at 32 pixels", "rapid", "imagenet stem", "cpu"],
)
def test_network_with_our_weights_gives_our_embeddings_and_loss(changes):
    wanted = made(**changes)
    encoder = ResNet(
        stage_sizes=wanted.stage_sizes,
        width=wanted.width,
        stem_kernel=wanted.stem_kernel,
        stem_stride=wanted.stem_stride,
        stem_padding=wanted.stem_padding,
        stem_pool=wanted.stem_pool,
        expand_dim=wanted.expand_dim,
    )
    projector = Projector(wanted.proj_hidden_dim, wanted.proj_output_dim)
    model = linen_model(ImageJEPA(encoder, projector if wanted.use_projector else None))
    views = normal(2, 2, 8, wanted.view_size, wanted.view_size, 3)

    @jax.jit
    def ours(variables):
        (h, z1), batch_stats = model.apply(variables, views[0], True)
        (_, z2), batch_stats = model.apply(
            {**variables, "batch_stats": batch_stats}, views[1], True
        )
        loss, _ = vicreg_loss(z1, z2, **COEFFS)
        return h, z1, z2, loss, {**variables, "batch_stats": batch_stats}

    variables = jax.jit(model.init)(jax.random.key(0), views[0])
    *expected, after = ours(variables)

    peer = network.Model(wanted).train()
    tensors = {name: torch.tensor(np.array(a)) for name, a in to_torch(variables).items()}
    missing = peer.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    x1, x2 = torch.tensor(views).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        (h, z1), (_, z2) = peer(x1), peer(x2)
        loss, _ = network.vicreg_loss(z1, z2, **COEFFS)
    assert h.shape[1] == wanted.num_features
    for found, array in zip((h, z1, z2, loss), expected, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-4, atol=1e-4)
    state = peer.state_dict()
    for name, array in to_torch(after).items():
        np.testing.assert_allclose(state[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", recipe.OPTIMIZERS)
def test_five_updates_are_ours(name):
    """A weight of zeros among them, and gradients large and small, so that LARS clips some."""
    shapes = {"conv": (4, 3, 3, 3), "linear": (5, 4), "zero": (3, 4), "bias": (5,)}
    params = {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
    params["zero"] *= 0
    lr = {"lars": 0.3, "sgd": 0.3, "adamw": 0.01}[name]
    options = {"weight_decay": 0.01, "momentum": 0.9}
    optimizer = create_optimizer(name, np.float32(lr), **options)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    theirs = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in params.items()}
    peer = training.create_optimizer(
        made(optimizer=name, lr=lr, **options), iter(theirs.values()), compiled=False
    )
    for step in range(5):
        scale = 10.0 ** (step - 3)
        grads = {n: scale * normal(10 + step, *shape) for n, shape in shapes.items()}
        # optax raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        for n, param in theirs.items():
            param.grad = torch.tensor(grads[n])
        peer.step()
        for n, param in theirs.items():
            np.testing.assert_allclose(param.detach(), params[n], rtol=1e-5, atol=1e-6, err_msg=n)


# A network that hardly moves: what the probe reads stays in place.
@pytest.mark.parametrize(("part", "lr"), [("loss", 0.3), ("probe loss", 1e-6)])
def test_steps_train_the_model_and_the_probe(part, lr):
    device, index = torch.device("cpu"), ("loss", "probe loss").index(part)
    trainer = training.Trainer(
        made(lr=lr),
        mode="eager",
        dtype="float32",
        memory_format=torch.channels_last,
        device=device,
    )
    batch = next(batches.fixed(made(), device, torch.channels_last))
    before = trainer.losses(*batch)
    assert trainer.step(*batch).item() == pytest.approx(before[0].item(), rel=1e-5)
    for _ in range(30):
        trainer.step(*batch)
    assert trainer.losses(*batch)[index].item() < 0.98 * before[index].item()


# --- augmentation -------------------------------------------------------------------------------


def planar(images):
    """[N, H, W, 3] to the peer's [N, H, 3, W]."""
    return torch.tensor(np.array(images)).transpose(2, 3).contiguous()


def test_augmentation_with_given_parameters_is_ours(cifar_arrays):
    images = augment.to_float(cifar_arrays["train_images"][:24])
    torch.manual_seed(0)
    parameters = peer_augment.random_parameters(24, 32, 32, torch.device("cpu"))
    for i, choice in enumerate(("is_grey", "is_solarized", "is_flipped")):
        parameters[choice] = torch.arange(24) // 2**i % 2 == 1
    arrays = {name: tensor.numpy() for name, tensor in parameters.items()}

    @jax.jit
    @jax.vmap
    def ours(image, given):
        box = [given[name] for name in ("top", "left", "height", "width")]
        view = augment.resized_crop(image, *box, 32)
        view = augment.color_jitter(
            view,
            given["order"],
            brightness=given["factors"][0],
            contrast=given["factors"][1],
            saturation=given["factors"][2],
            hue=given["hue"],
        )
        view = jax.numpy.where(given["is_grey"], augment.rgb_to_grayscale(view), view)
        view = jax.numpy.where(given["is_solarized"], augment.solarize(view, 128 / 255), view)
        return jax.numpy.where(given["is_flipped"], view[:, ::-1], view)

    arrays["order"] = arrays["order"].astype(np.int32)
    expected = ours(images, arrays)
    found = peer_augment.augment(planar(images), parameters, 32).transpose(2, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_random_parameters_have_the_laws_of_ours():
    torch.manual_seed(0)
    parameters = peer_augment.random_parameters(20_000, 32, 32, torch.device("cpu"))
    drawn = {name: tensor.numpy() for name, tensor in parameters.items()}
    keys = jax.random.split(jax.random.key(0), 20_000)
    box = jax.jit(jax.vmap(lambda key: augment.random_crop_box(key, 32, 32)))(keys)
    for name, ours in zip(("top", "left", "height", "width"), box, strict=True):
        # Twenty thousand whole numbers up to 32 each: means within some five standard errors.
        assert abs(np.mean(drawn[name]) - np.mean(ours)) < 0.5, name
        assert abs(np.std(drawn[name]) - np.std(ours)) < 0.4, name
    assert np.max(drawn["top"] + drawn["height"]) <= 32
    assert np.max(drawn["left"] + drawn["width"]) <= 32
    for choice, share in (("is_grey", 0.2), ("is_solarized", 0.1), ("is_flipped", 0.5)):
        assert abs(np.mean(drawn[choice]) - share) < 0.02, choice
    is_jittered = np.any(drawn["factors"] != 1.0, axis=1)
    assert abs(np.mean(is_jittered) - 0.8) < 0.02
    assert not np.any(drawn["hue"][~is_jittered])
    jittered = drawn["factors"][is_jittered]
    np.testing.assert_allclose(jittered.min(0), [0.6, 0.6, 0.8], atol=1e-3)
    np.testing.assert_allclose(jittered.max(0), [1.4, 1.4, 1.2], atol=1e-3)
    np.testing.assert_allclose(np.abs(drawn["hue"]).max(), 0.1, atol=1e-3)
    orders, counts = np.unique(drawn["order"], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 0.8 * 20_000 / 24


def test_views_are_normalised_from_the_unit_range(cifar_arrays):
    images = planar(cifar_arrays["train_images"][:64])
    torch.manual_seed(0)
    views = peer_augment.two_views(images, torch.channels_last, 32)
    assert peer_augment.MEAN == CIFAR10_MEAN
    assert peer_augment.STD == CIFAR10_STD
    for view in views:
        assert view.shape == (64, 3, 32, 32)
        assert view.is_contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(c)[:, None, None] for c in (CIFAR10_MEAN, CIFAR10_STD))
        pixels = view * std + mean
        assert -1e-6 < pixels.min() < 0.05
        assert 0.95 < pixels.max() < 1 + 1e-6
    assert not torch.equal(*views)


# --- timing -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(peer_command.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_a_value_is_as_many_steps_as_fill_its_seconds(clock):
    counts = []

    def run(num_steps):
        # The first two compile.
        for _ in range(num_steps):
            clock.now += 0.5 if len(counts) > 1 else 5.0
            counts.append(1)
        return torch.tensor(float(len(counts)))

    found = peer_command.time_steps(run, warmup=5, period=1, seconds=2.0, repeats=3)
    assert found["step_seconds"] == [0.5] * 3 and found["steps_in_a_value"] == 4
    assert found["warmup_steps"] == 5
    assert len(counts) == 5 + 1 + 3 * 4  # one step says how many fill a value
    assert found["first_step_seconds"] == 5.0
    assert found["loss"] == {"first": 1.0, "last": 18.0}


def test_no_batch_that_was_made_ahead_is_in_a_value(clock):
    """A loader whose queue is full before the first step, and that takes 1 s a batch after it.

    An epoch of 10 batches ends with an empty queue.
    """
    queue, in_epoch = 24, 0

    def run(num_steps):
        nonlocal queue, in_epoch
        for _ in range(num_steps):
            clock.now += 0.0 if queue else 1.0
            queue = max(queue - 1, 0)
            in_epoch += 1
            if in_epoch == 10:
                queue = in_epoch = 0
        return torch.zeros(())

    found = peer_command.time_steps(run, warmup=3, period=10, seconds=0.5, repeats=2)
    assert found["step_seconds"] == [1.0, 1.0]
    assert found["warmup_steps"] == 10 and found["steps_in_a_value"] == 10


def test_the_period_of_a_loader_is_ten_queues_or_an_epoch():
    assert batches.loader_period(made(batch_size=8, num_images=8 * 1000), 2) == 10 * 2 * 4
    assert batches.loader_period(made(batch_size=8, num_images=8 * 16 + 3), 2) == 16
    assert batches.loader_period(made(batch_size=8, num_images=8000), 0) == 1


# --- the command --------------------------------------------------------------------------------


def command(tmp_path, *arguments, **changes):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**RECIPE, **changes}))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.torch_peer", f"--recipe={path}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("how", ["none", "device", "loader"])
def test_the_command_prints_one_json_object(how, tmp_path):
    result = command(
        tmp_path,
        f"--augment={how}",
        "--dtype=bfloat16",
        "--memory-format=channels_last",
        "--warmup=1",
        "--seconds=0.001",
        "--repeats=2",
        "--workers=1",
        "--device=cpu",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["framework"] == "torch"
    assert found["variant"] == {
        "mode": "eager",
        "dtype": "bfloat16",
        "memory_format": "channels_last",
        "augment": how,
        "workers": 1 if how == "loader" else 0,
    }
    assert len(found["step_seconds"]) == 2
    for seconds, rate in zip(found["step_seconds"], found["images_per_second"], strict=True):
        assert seconds * rate == pytest.approx(8)
    assert found["first_step_seconds"] > 0
    assert found["peak_memory_bytes"] > 1e6
    assert all(np.isfinite(found["loss"][when]) for when in ("first", "last"))
    assert {"python", "torch"} <= set(found["versions"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": "wide"}, "width cannot be 'wide'"),
        ({"width": 0}, "width must be at least 1"),
        ({"stage_sizes": 3}, "stage_sizes cannot be 3"),
        ({"lr": float("nan")}, "lr cannot be nan"),
        ({"optimizer": "muon"}, "not one of lars, sgd, adamw"),
        ({"num_images": 4}, "num_images must be at least 8"),
        ({"colour": 1}, "unknown colour"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_recipe_is_refused(changes, said, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**RECIPE, **changes}))
    with pytest.raises(recipe.PeerError, match=said):
        recipe.load_recipe(path)


def test_a_broken_recipe_ends_the_command_in_one_line(tmp_path):
    result = command(tmp_path, width=-1)
    assert result.returncode == 2
    assert result.stderr == "error: width cannot be -1\n"
    assert not result.stdout
    result = command(tmp_path, "--seconds=0")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "above 0" in result.stderr
