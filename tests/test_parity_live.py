"""The parity proof against a PyTorch at hand, on whole tensors: pip install -e '.[parity]'."""

import pathlib
import re
import warnings

import jax
import numpy as np
import parity
import pytest

from jepa_jax import export_encoder, import_torch
from jepa_jax.api import save_import
from jepa_jax.models import CIFAR10_MEAN, CIFAR10_STD
from jepa_jax.vit import ViT

pytest.importorskip("torch", reason="needs the extra parity")

# What importing torch and torchvision warns of is theirs to mend.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import make_reference

README = pathlib.Path(__file__).parent.parent / "README.md"


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a checkpoint of a ResNet-18 in eb_jepa's form, what PyTorch computes with it)."""
    path = tmp_path_factory.mktemp("saved") / "latest.pth.tar"
    return path, make_reference.weights(path)


@pytest.mark.parametrize("row", parity.WEIGHT_ROWS, ids=lambda row: row.piece)
def test_weights_of_a_real_checkpoint(row, saved):
    path, torchs = saved
    found = parity.digests(parity.weights(path), whole=True)
    name, value = parity.compare(row, found, parity.digests(torchs, whole=True))
    assert parity.holds(row, value), f"{name}: {row.measure.words} is {value}"


def test_torchvisions_resnet50_comes_and_goes(tmp_path):
    """Its own file, head included, gives its features; the export loads into it, strictly."""
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    network = make_reference.torchvision.models.resnet50().eval()
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    model = import_torch(tmp_path / "resnet50.pth")
    images = parity.inputs.large_images(224).astype(np.float32)
    (h, _), _ = jax.jit(model.encoder.model.apply, static_argnums=2)(model.variables, images, False)
    logits = np.asarray(h) @ model.probe["kernel"] + model.probe["bias"]
    planar = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network(planar).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    save_import(model, tmp_path / "run")
    export_encoder(tmp_path / "run", tmp_path / "exported")
    tensors = safetensors.torch.load_file(tmp_path / "exported" / "encoder.safetensors")
    again = make_reference.torchvision.models.resnet50()
    again.fc = torch.nn.Identity()
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        found = again.eval()(planar).numpy()
    np.testing.assert_allclose(found, h, atol=1e-4 * np.abs(found).max())


def transformer_params(tensors, depth):
    """Of torchvision's VisionTransformer, under the names of `ViT`."""

    def dense(name, where=""):
        weight, bias = tensors[f"{name}{where}weight"], tensors[f"{name}{where}bias"]
        return {"kernel": weight.T, "bias": bias}

    def norm(name):
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    positions = tensors["encoder.pos_embedding"][0]
    side = int(np.sqrt(len(positions) - 1))
    params = {
        "patch_embed": {
            "kernel": tensors["conv_proj.weight"].transpose(2, 3, 1, 0),
            "bias": tensors["conv_proj.bias"],
        },
        "class_token": tensors["class_token"][0, 0],
        "class_pos": positions[0],
        "pos_embed": positions[1:].reshape(side, side, -1),
        "norm": norm("encoder.ln"),
    }
    for i in range(depth):
        start = f"encoder.layers.encoder_layer_{i}"
        params[f"block{i}"] = {
            "attention_norm": norm(f"{start}.ln_1"),
            "qkv": dense(f"{start}.self_attention", ".in_proj_"),
            "attention_out": dense(f"{start}.self_attention.out_proj", "."),
            "mlp_norm": norm(f"{start}.ln_2"),
            "mlp_in": dense(f"{start}.mlp.0", "."),
            "mlp_out": dense(f"{start}.mlp.3", "."),
        }
    return params


@pytest.mark.parametrize(
    ("side", "patch", "dim", "depth", "heads"),
    [(32, 4, 192, 12, 3), (32, 8, 384, 12, 6), (224, 16, 768, 12, 12)],
    ids=["ti at 4", "s at 8", "vit_b_16"],
)
def test_torchvisions_vision_transformer(side, patch, dim, depth, heads):
    """Its output at the class token, of the same weights and images, to 1e-4 of the largest."""
    import torch

    torch.manual_seed(0)
    network = make_reference.torchvision.models.VisionTransformer(
        side, patch, depth, heads, dim, 4 * dim
    ).eval()
    network.heads = torch.nn.Identity()
    with torch.no_grad():
        for parameter in network.parameters():  # many of which begin at 0 or 1
            parameter += 0.02 * torch.randn_like(parameter)
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    module = ViT(patch, dim, depth, heads)
    params = transformer_params(tensors, depth)
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    h = jax.jit(module.apply)({"params": params}, images)
    with torch.no_grad():
        expected = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(h, expected, atol=1e-4 * np.abs(expected).max())


def test_exported_weights_load_into_torchvisions_resnet18(saved, tmp_path, monkeypatch):
    """By the README's own lines; and the exported projector into an nn.Sequential."""
    import safetensors.torch
    import torch

    path, torchs = saved
    save_import(import_torch(path), tmp_path / "run")
    export_encoder(tmp_path / "run", tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```\n(net = .*?)```", README.read_text(), flags=re.S)
    images = torch.tensor(parity.inputs.real_images()[:256]).permute(0, 3, 1, 2) / 255
    names = {
        "torch": torch,
        "torchvision": make_reference.torchvision,
        "safetensors": safetensors,
        "images": images,
        "mean": torch.tensor(CIFAR10_MEAN)[:, None, None],
        "std": torch.tensor(CIFAR10_STD)[:, None, None],
    }
    projector = make_reference.projector(2048, 2048)
    tensors = safetensors.torch.load_file("exported/projector.safetensors")
    projector.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        exec(compile(snippet, "README.md", "exec"), names)
        z = projector.eval()(names["h"])
    for found, name in ((names["h"], "weights/h"), (z, "weights/z")):
        np.testing.assert_allclose(found, torchs[name], atol=1e-5 * np.max(np.abs(torchs[name])))
