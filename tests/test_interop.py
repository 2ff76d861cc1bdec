"""PyTorch's files: what they mean, what PyTorch computes from them, and what is never run."""

import collections
import contextlib
import copyreg
import os
import pathlib
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_archive import pickled, storage, tensor, write_archive, write_safetensors

from jepa_jax import import_torch
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.interop import encoder_tensors, projector_tensors, torch_pickle
from jepa_jax.interop.torch_file import read_file
from jepa_jax.interop.torch_names import from_torch, to_torch
from jepa_jax.models import CIFAR10_MEAN, CIFAR10_STD, ImageJEPA, Projector, ResNet

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
with np.load(FIXTURES / "torch_features.npz") as arrays:
    TORCH = collections.defaultdict(dict)
    for file, kind in (name.split("/") for name in arrays if not name.startswith("_")):
        TORCH[file][kind] = arrays[f"{file}/{kind}"]
FILES = list(TORCH)
EB_JEPA, SOLO_LEARN = FIXTURES / "torch_eb_jepa.pth", FIXTURES / "torch_solo_learn.ckpt"
CIFAR = FIXTURES / "torch_cifar.safetensors"


@pytest.fixture(scope="module")
def images(cifar_arrays):
    """Those that make_torch_files.py used."""
    return cifar_arrays["train_images"][96:352]


@pytest.fixture(scope="module")
def models():
    return {name: import_torch(FIXTURES / name) for name in FILES}


@pytest.fixture
def refusal():
    """Calls something that must end in one line of a CheckpointError; returns the line."""

    def call(function, *args, **kwargs):
        with pytest.raises(CheckpointError) as error:
            function(*args, **kwargs)
        text = str(error.value)
        assert text and text.isprintable(), repr(text)
        return text

    return call


def state_dict(name=EB_JEPA.name):
    """The tensors of a fixture's model, by the file's own names."""
    content, _ = read_file(FIXTURES / name)
    for key in ("model_state_dict", "state_dict", "model"):
        content = content.get(key, content)
    return dict(content)


def assert_close(found, expected):
    """To 1e-4 of the largest magnitude."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= 1e-4 * np.max(np.abs(expected))


# --- what PyTorch computes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_features_are_pytorchs(name, models, images):
    model = models[name]
    h = np.asarray(model.encoder.apply(model.variables, images))
    assert_close(h, TORCH[name]["h"])
    if "logits" in TORCH[name]:
        assert_close(h @ model.probe["kernel"] + model.probe["bias"], TORCH[name]["logits"])
    else:
        assert model.probe is None


def test_embeddings_are_pytorchs(models, images):
    model = models[EB_JEPA.name]
    _, z = model.module.apply(model.variables, model.encoder.normalize(images), False)
    assert_close(z, TORCH[EB_JEPA.name]["z"])


def test_the_stem_and_the_normalisation_belong_to_the_model(models):
    solo_std = (0.2470, 0.2435, 0.2616)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = {
        "torch_eb_jepa.pth": ("eb_jepa", 3, 2, CIFAR10_MEAN, CIFAR10_STD),
        "torch_solo_learn.ckpt": ("solo-learn", 3, 2, CIFAR10_MEAN, solo_std),
        "torch_torchvision.pth": ("torchvision", 7, 3, *imagenet),
        "torch_cifar.safetensors": ("torchvision", 3, 1, CIFAR10_MEAN, CIFAR10_STD),
    }
    for name, (source, kernel, padding, mean, std) in expected.items():
        model, encoder = models[name], models[name].module.encoder
        assert (model.source, encoder.stem_kernel, model.stem_padding) == (source, kernel, padding)
        assert (encoder.stem_stride, encoder.stem_pool) == (
            (1, False) if kernel == 3 else (2, True)
        )
        assert (model.mean, model.std) == (mean, std) == model.encoder[1:]
        assert model.encoder is model.encoder  # compiled once
        assert (encoder.stage_sizes, encoder.width) == ((1, 1), 4)
    assert models[EB_JEPA.name].module.projector == Projector(6, 5)


def test_padding_and_normalisation_can_be_given(images, models):
    given = {"stem_padding": 1, "mean": (0.5, 0.4, 0.3), "std": [0.2, 0.3, 0.4]}
    model = import_torch(EB_JEPA, **given)
    assert model.stem_padding == 1
    assert model.encoder[1:] == (given["mean"], tuple(given["std"]))
    module = ImageJEPA(ResNet((1, 1), 4, stem_padding=1), Projector(6, 5))
    x = (images / 255.0 - np.array(given["mean"])) / np.array(given["std"])
    h, _ = module.apply(models[EB_JEPA.name].variables, np.float32(x), False)
    assert_close(model.encoder.apply(model.variables, images), h)


@pytest.mark.parametrize(
    ("name", "argument", "text"),
    [
        (EB_JEPA.name, {"stem_padding": 3}, "stem_padding must be 1 or 2 for the 3x3 stem"),
        (EB_JEPA.name, {"stem_padding": 0}, "stem_padding must be 1 or 2"),
        ("torch_torchvision.pth", {"stem_padding": 1}, "must be 3 for the 7x7 stem"),
        (EB_JEPA.name, {"mean": (0.1, 0.2)}, r"mean must be three numbers in \[0, 1\], got"),
        (EB_JEPA.name, {"std": (0.1, 0.2, 0.0)}, "std must be three numbers above 0"),
        (EB_JEPA.name, {"mean": (0.1, 0.2, np.nan)}, "mean must be three numbers"),
        (EB_JEPA.name, {"mean": (125, 122, 113)}, "mean must be three numbers"),
        (EB_JEPA.name, {"mean": 0.5}, "mean must be three numbers"),
        (EB_JEPA.name, {"std": ("a", 1, 10**400)}, "std must be three numbers"),
        (EB_JEPA.name, {"stem_padding": True}, "stem_padding must be 1 or 2"),
        (EB_JEPA.name, {"stem_padding": 1.0}, "stem_padding must be 1 or 2"),
    ],
)
def test_arguments_out_of_range_are_refused(name, argument, text):
    with pytest.raises(ConfigError, match=text):
        import_torch(FIXTURES / name, **argument)


# --- names and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_weights_go_back_as_they_came(name, models, tmp_path):
    """PyTorch's names, layouts and bits; and what was written is read as what was written."""
    model, state = models[name], state_dict(name)
    parts = {"encoder": encoder_tensors(model.variables)}
    parts["projector"] = projector_tensors(model.variables)
    prefixes = {"eb_jepa": "backbone.backbone.", "solo-learn": "backbone.", "torchvision": ""}
    back = {prefixes[model.source] + key: array for key, array in parts["encoder"].items()}
    back |= {f"projector.{key}": array for key, array in parts["projector"].items()}
    for key, array in back.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert array.tobytes() == np.asarray(state[key], np.float32).tobytes()
        assert array.shape == state[key].shape
    kept = {key for key in state if not key.endswith("num_batches_tracked")}
    heads = {key for key in kept if key.split(".")[0] in ("fc", "classifier")}
    assert back.keys() == kept - heads - set(model.ignored)
    again = import_torch(write_safetensors(tmp_path / "back.safetensors", back))
    jax.tree.map(np.testing.assert_array_equal, again.variables, model.variables)


@pytest.mark.parametrize(
    ("stage_sizes", "expand_dim", "block"),
    [
        ((2, 2, 2, 2), 0, "basic"),
        ((3, 4, 6, 3), 0, "basic"),
        ((1, 1, 1), 10, "basic"),
        ((3, 4, 6, 3), 0, "bottleneck"),
        ((1, 2), 10, "bottleneck"),
    ],
)
def test_the_two_directions_are_inverse(stage_sizes, expand_dim, block, tmp_path):
    """For ResNets of any stages, whose sizes an import finds by the names."""
    encoder = ResNet(stage_sizes, width=2, expand_dim=expand_dim, block=block)
    module = ImageJEPA(encoder, Projector(3, 4))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: np.float32(rng.uniform(size=leaf.shape)), shapes)
    tensors = to_torch(variables)
    assert len(tensors) == len(jax.tree.leaves(variables))
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors, shapes), variables)
    found = {name.replace("encoder.", "backbone."): array for name, array in tensors.items()}
    model = import_torch(write_safetensors(tmp_path / "x.safetensors", found), stem_padding=1)
    assert model.module == module
    jax.tree.map(np.testing.assert_array_equal, model.variables, variables)
    last_norm = "bn3" if block == "bottleneck" else "bn2"
    last = f"encoder.layer{len(stage_sizes)}.{stage_sizes[-1] - 1}.{last_norm}.running_var"
    assert last in tensors
    kernel = variables["params"]["encoder"]["stem_conv"]["kernel"]
    assert tensors["encoder.conv1.weight"][1, 2, 0, 1] == kernel[0, 1, 2, 1]
    dense = variables["params"]["projector"]["Dense_1"]["kernel"]
    assert tensors["projector.3.weight"][2, 1] == dense[1, 2]


def test_a_bottleneck_network_of_torchvisions_names_comes_with_its_head(tmp_path):
    """Its 4 * width * 2**(stages - 1) features are those of its fc."""
    module = ImageJEPA(
        ResNet((1, 1), 2, 7, 2, 3, stem_pool=True, block="bottleneck"),
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    tensors = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
    state = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    state |= {"fc.weight": np.ones((5, 16), np.float32), "fc.bias": np.zeros(5, np.float32)}
    model = import_torch(write_safetensors(tmp_path / "x.safetensors", state))
    assert (model.source, model.module) == ("torchvision", module)
    assert model.probe["kernel"].shape == (16, 5) and model.ignored == ()


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_models_are_the_models(wrapper, models, tmp_path):
    state = {wrapper + name: array for name, array in state_dict().items()}
    model = import_torch(write_safetensors(tmp_path / "x.safetensors", state))
    assert model.source == "eb_jepa"
    jax.tree.map(np.testing.assert_array_equal, model.variables, models[EB_JEPA.name].variables)


def test_solo_learn_keeps_a_projector_of_vicregs_form_and_lists_what_it_leaves(tmp_path, models):
    model = models[SOLO_LEARN.name]
    assert model.module.projector is None and "projector" not in model.variables["params"]
    groups = {name.split(".")[0] for name in model.ignored}
    assert groups == {"projector", "momentum_backbone", "queue"}
    projector = {n: a for n, a in state_dict().items() if n.startswith("projector.")}
    state = {n: a for n, a in state_dict(SOLO_LEARN.name).items() if n.startswith("backbone.")}
    model = import_torch(write_safetensors(tmp_path / "x.safetensors", state | projector))
    assert model.module.projector == Projector(6, 5) and model.ignored == ()
    np.testing.assert_array_equal(
        model.variables["params"]["projector"]["Dense_2"]["kernel"],
        projector["projector.6.weight"].T,
    )
    older = {n.replace("backbone.", "encoder."): a for n, a in state.items()}
    older = import_torch(write_safetensors(tmp_path / "older.safetensors", older))
    assert older.source == "solo-learn" and older.module.projector is None
    odd = {**projector, "projector.3.weight": np.float32(np.ones((7, 6)))}
    odd = import_torch(write_safetensors(tmp_path / "odd.safetensors", state | odd))
    assert odd.module.projector is None and set(projector) == set(odd.ignored)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_narrow_types_become_float32_exactly(dtype, tmp_path):
    state = {
        name: array.astype(dtype) if array.dtype == np.float32 else array
        for name, array in state_dict(CIFAR.name).items()
    }
    model = import_torch(write_safetensors(tmp_path / "x.safetensors", state))
    assert model.dtypes == (np.dtype(dtype).name,)
    for name, array in encoder_tensors(model.variables).items():
        np.testing.assert_array_equal(array, state[name].astype(np.float32))


def edited(changes):
    """The eb_jepa model's tensors with some replaced, or taken away where the value is None."""
    state = {**state_dict(), **changes}
    return {name: array for name, array in state.items() if array is not None}


START = "backbone.backbone."
MISFITS = {
    "one missing": ({f"{START}layer2.0.bn2.bias": None}, [f"missing {START}layer2.0.bn2.bias"]),
    "a projector cut short": ({"projector.6.bias": None}, ["missing projector.6.bias"]),
    "one unknown": ({f"{START}fc.weight": np.zeros(3, np.float32)}, [f"unknown {START}fc.weight"]),
    "outside": ({"queue\n\x1b": np.zeros(3, np.float32)}, ["unknown queue??"]),
    "a counter of nothing": (
        {f"{START}bn7.num_batches_tracked": np.zeros((), np.int64)},
        [f"unknown {START}bn7.num_batches_tracked"],
    ),
    "misshapen": (
        {f"{START}layer1.0.conv1.weight": np.zeros((4, 4, 3, 1), np.float32)},
        [f"{START}layer1.0.conv1.weight is [4, 4, 3, 1], wanted [4, 4, 3, 3]"],
    ),
    "not transposed": (
        {"projector.0.weight": np.zeros((8, 6), np.float32)},
        ["projector.0.weight is [8, 6], wanted [8, 8]"],
    ),
    "whole numbers": (
        {f"{START}bn1.bias": np.zeros(4, np.int64)},
        [f"{START}bn1.bias is int64, wanted a floating-point type"],
    ),
    "many": (
        {f"extra.{n}": np.zeros(1, np.float32) for n in range(8)} | {f"{START}bn1.bias": None},
        [
            f"missing {START}bn1.bias",
            "unknown extra.0, extra.1, extra.2, extra.3, extra.4 and 3",
        ],
    ),
    "another stem": (
        {f"{START}conv1.weight": np.zeros((4, 3, 5, 5), np.float32)},
        [f"{START}conv1.weight is [4, 3, 5, 5], wanted [width, 3, 3, 3]"],
    ),
    "bottleneck": (
        {f"{START}layer1.0.conv3.weight": np.zeros((16, 4, 1, 1), np.float32)},
        [f"missing {START}layer1.0.bn3.bias, ", f"{START}layer1.0.downsample.0.weight and 9 more"],
    ),
    "no stem": ({f"{START}conv1.weight": None}, ["holds no ResNet", f"but {START}bn1.bias"]),
    "twice": (
        {f"module.{START}bn1.bias": np.zeros(4, np.float32)},
        ["the same tensors under two names"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named(case, refusal, tmp_path):
    changes, texts = MISFITS[case]
    path = write_safetensors(tmp_path / "x.safetensors", edited(changes))
    line = refusal(import_torch, path)
    assert str(path) in line
    assert not [text for text in texts if text not in line], line


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(value, refusal, tmp_path):
    changes = {f"{START}layer1.0.bn1.weight": np.full(4, value, np.float32)}
    line = refusal(import_torch, write_safetensors(tmp_path / "x.safetensors", edited(changes)))
    assert f"{START}layer1.0.bn1.weight is not finite in float32" in line
    changes = {f"{START}bn1.running_var": np.float32([1.0, -1.0, 1.0, 1.0])}
    line = refusal(import_torch, write_safetensors(tmp_path / "x.safetensors", edited(changes)))
    assert f"{START}bn1.running_var is negative" in line


@pytest.mark.parametrize("blocks", [range(1, 2), range(200)])
def test_blocks_that_no_resnet_has_are_refused_before_they_are_built(blocks, refusal, tmp_path):
    """A name of a few bytes could ask for a network of any depth."""
    state = {f"{START}layer3.{n}.conv1.weight": np.zeros(1, np.float32) for n in blocks}
    line = refusal(import_torch, write_safetensors(tmp_path / "x.safetensors", edited(state)))
    assert "has blocks that no ResNet has" in line


def test_many_names_of_one_tensor_are_refused(refusal, tmp_path):
    """They are legal in a file of torch.save, and would fill the memory with copies."""
    module = ImageJEPA(ResNet((3, 3), width=32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    leaves = jax.eval_shape(to_torch, shapes)
    count, entries = max(leaf.size for leaf in leaves.values()), []
    for name, leaf in leaves.items():
        strides = tuple(int(np.prod(leaf.shape[axis + 1 :])) for axis in range(leaf.ndim))
        view = tensor(shape=leaf.shape, strides=strides, count=count)
        entries += [name.removeprefix("encoder."), view]
    path, storages = tmp_path / "x.pth", {"0": bytes(4 * count)}
    write_archive(path, program=pickled(b"}(", *entries, b"u"), storages=storages)
    assert "its tensors share them" in refusal(import_torch, path)


def test_keys_that_collide_are_refused(refusal, tmp_path):
    """Multiples of 2**61 - 1 have one hash."""
    program = pickle.dumps({(2**61 - 1) * n: n for n in range(3)}, 2)
    line = refusal(import_torch, write_archive(tmp_path / "x.pth", program=program))
    assert "a dictionary key of type int, or too large" in line


def test_a_head_of_another_size_is_named(refusal, tmp_path):
    state = state_dict(CIFAR.name) | {"fc.weight": np.zeros((10, 5), np.float32)}
    line = refusal(import_torch, write_safetensors(tmp_path / "x.safetensors", state))
    assert "missing fc.bias" in line
    state["fc.bias"] = np.zeros(10, np.float32)
    line = refusal(import_torch, write_safetensors(tmp_path / "x.safetensors", state))
    assert "fc.weight is [10, 5], wanted [10, 8]" in line


# --- reading what PyTorch wrote ------------------------------------------------------------------


def test_a_checkpoint_is_read_whole():
    content, digest = read_file(EB_JEPA)
    assert content["epoch"] == 3 and content["linear_val_acc"] == 12.5
    (group,) = content["optimizer_state_dict"]["param_groups"]
    assert group["momentum"] == 0.9 and group["nesterov"] is False
    momenta = content["optimizer_state_dict"]["state"]
    assert momenta[0]["momentum_buffer"].shape == (4, 3, 3, 3)
    assert len(digest) == 64
    counter = content["model_state_dict"]["projector.1.num_batches_tracked"]
    assert (counter.dtype, counter.shape, int(counter)) == (np.int64, (), 3)


def test_views_of_one_storage_are_the_tensors_they_were():
    """Transposed, interleaved, and parts of one storage; the safetensors file holds the same."""
    expected, found = state_dict(CIFAR.name), state_dict("torch_views.pth")
    assert not found["layer1.0.conv1.weight"].flags.c_contiguous
    assert found["bn1.weight"].strides == (8,)
    assert found["bn1.bias"].base is not None
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
        assert not array.flags.writeable


PLAIN = {
    "texts": ["", "a", "é" * 300, "\n"],
    "numbers": [0, 1, -1, 255, 256, 65536, 2**31, -(2**31), 2**70, 0.0, -1.5, 1e300],
    "others": [None, True, False, b"", b"\x00" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), tuple(range(9)), ((), ((),))],
    "nested": {1: {"a": [{"b": ()}]}, None: [], False: {}, "": [[]]},
    "long": [list(range(3000)), {str(n): n for n in range(3000)}],
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_containers_are_what_pickle_makes_of_them(protocol):
    shared = [1, 2]
    content = {**PLAIN, "shared": (shared, shared)}
    found = torch_pickle.read_pickle(pickle.dumps(content, protocol), {}.__getitem__)
    assert found == content and found["shared"][0] is found["shared"][1]
    types = [type(value) for value in found["numbers"] + found["others"]]
    assert types == [type(value) for value in PLAIN["numbers"] + PLAIN["others"]]


# --- what is refused -----------------------------------------------------------------------------


def test_files_of_other_kinds_are_named(refusal, tmp_path):
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    contents = {
        "empty": (b"", "is empty"),
        "legacy": (legacy, "the format of PyTorch before 1.6"),
        "pickle": (pickle.dumps({"a": 1}), "is a bare pickle"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "text": (b"<!DOCTYPE html>", "is neither a file of torch.save nor of safetensors"),
        "short": (b"PK", "is neither"),
    }
    for name, (content, text) in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert text in refusal(import_torch, path)
    assert "does not exist" in refusal(import_torch, tmp_path / "absent.pth")
    assert "is not a file" in refusal(import_torch, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(import_torch, tmp_path / "pipe")


def test_a_file_that_may_not_be_read_is_named(refusal, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", closed)
    assert "torch_eb_jepa.pth cannot be read: Permission denied" in refusal(import_torch, EB_JEPA)


ARCHIVES = {
    "TorchScript": ({"constants__pkl": b""}, "is a TorchScript program"),
    "TorchScript's code": ({"code/__torch__": b""}, "is a TorchScript program"),
    # As torch.jit.save writes it: its code is compressed.
    "TorchScript, compressed": (
        {"code/__torch__": b"", "compression": zipfile.ZIP_DEFLATED},
        "is a TorchScript program",
    ),
    "big-endian": ({"byteorder": b"big"}, "byte order b'big': only little is read"),
    "compressed": ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    "another storage": ({"program": pickled(tensor(key="1"))}, "no item named 'archive/data/1'"),
    "a number": ({"program": pickled(3)}, "holds a int, not a state dict"),
    "nothing known": ({"program": pickled({"epoch": 3})}, "or torchvision, but epoch"),
    "nothing": ({"program": pickled({})}, "or torchvision, but nothing"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_are_no_weights_are_named(case, refusal, tmp_path):
    options, text = ARCHIVES[case]
    options = {"program": pickled(tensor()), "storages": {"0": bytes(16)}, **options}
    assert text in refusal(import_torch, write_archive(tmp_path / "x.pth", **options))


def test_a_zip_of_something_else_and_of_two_pickles_is_refused(refusal, tmp_path):
    for names in (["a/other"], ["data.pkl"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            for name in names:
                archive.writestr(name, pickled({}))
        assert "but not one of torch.save" in refusal(import_torch, tmp_path / "x.pth")


def test_archives_of_impossible_members_are_refused(refusal, tmp_path):
    """One name for two members, and a member that claims more bytes than the file has."""
    path = tmp_path / "x.pth"
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", pickled({}))
    assert "two members of one name" in refusal(import_torch, path)
    content = bytearray(write_archive(path, pickled({})).read_bytes())
    sizes = content.index(b"PK\x01\x02") + 20
    content[sizes : sizes + 8] = 2 * (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    assert "members larger than the file" in refusal(import_torch, path)


def test_a_type_that_no_weights_have_is_named(refusal, tmp_path):
    state = {"conv1.weight\n": np.zeros(3, np.uint16)}
    path = write_safetensors(tmp_path / "x.safetensors", state)
    assert "conv1.weight? of type U16, which is not read" in refusal(import_torch, path)


BAD_TENSORS = {
    "beyond the end": tensor((5,)),
    "beyond by its offset": tensor((4,), offset=1),
    "beyond by its stride": tensor((2,), (4,)),
    "repeated": tensor((2**40,), (0,)),
    "repeated a little": tensor((5, 1), (0, 1)),
    "negative size": tensor((-1,)),
    "negative stride": tensor((2,), (-1,)),
    "negative offset": tensor((2,), offset=-1),
    "size and strides": tensor((2, 2), (1,)),
    "a size of text": tensor(("2",)),
    "a size of floats": tensor((2.0,)),
    "a size of truths": tensor((True,)),
    "a size that is a list": tensor([2]),
    "a huge size": tensor((2**70,)),
    "a huge empty size": tensor((0, 2**62, 2**62), (1, 1, 1)),
    "a huge stride": tensor((1,), (2**70,)),
    "many axes": tensor((1,) * 99, (1,) * 99),
    "a shorter storage": tensor((2,), count=2),
    "a longer storage": tensor(count=8),
    "another type": tensor(kind="DoubleStorage"),
    "a path for a key": tensor(key="../version"),
    "a number for a key": tensor(key=0),
    "a text for a count": tensor(count="4"),
    "an array without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"N" * 6 + b"tR",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_impossible_tensors_are_damage(case, refusal, tmp_path):
    program = pickled(b"}", "conv1.weight", BAD_TENSORS[case], b"s")
    path = write_archive(tmp_path / "x.pth", program, {"0": bytes(16)})
    assert "cut off or damaged (" in refusal(read_file, path)


def test_a_tensor_that_fits_is_read(tmp_path):
    """The other side of the test above: the helpers do write what is legal."""
    legal = {"all": tensor(), "part": tensor((2,), (2,), 1), "none": tensor((0, 9), (9, 1))}
    size = b"ctorch\nSize\n" + pickled(((2, 1),))[2:-1] + b"R"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x89ccollections\n"
    legal |= {"size": size, "parameter": parameter + b"OrderedDict\n)RtR"}
    items = [part for name, program in legal.items() for part in (name, program)]
    values = np.arange(4, dtype="<f4")
    program = pickled(b"}(", *items, b"u")
    found, _ = read_file(write_archive(tmp_path / "x.pth", program, {"0": values.tobytes()}))
    np.testing.assert_array_equal(found["all"], values)
    np.testing.assert_array_equal(found["part"], values[1::2])
    np.testing.assert_array_equal(found["parameter"], values)
    assert found["none"].shape == (0, 9) and found["size"] == (2, 1)


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
REFUSED = "which is neither a tensor nor a plain container: nothing was run"
DAMAGE = "cut off or damaged ("


def opcode(name):
    """What a refusal says of an instruction that tensors do not need."""
    return f"holds the pickle instruction {name}, {REFUSED}"


def malicious(marker):
    """Pickles that would run something, and what the refusal says."""
    command = f"touch {marker}"
    argument = pickled(command)[2:-1]
    system = b"cposix\nsystem\n"
    call = system + argument + b"\x85R"
    return {
        "reduce": (pickle.dumps(Call(os.system, command), 2), f"holds posix.system, {REFUSED}"),
        "in a dict": (pickle.dumps({"a": Call(os.system, command)}, 4), "holds posix.system"),
        "eval": (pickled(b"c__builtin__\neval\n", argument, b"\x85R"), "holds __builtin__.eval"),
        "getattr": (pickled(b"c__builtin__\ngetattr\n"), "holds __builtin__.getattr"),
        "stack global": (
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + argument + b"\x85R.",
            f"holds builtins.eval, {REFUSED}",
        ),
        "stack global of a known name with dots": (
            b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.fromkeys.xyz\x93.",
            "holds collections.OrderedDict.fromkeys.xyz",
        ),
        "stack global of no text": (b"\x80\x04K\x01K\x02\x93.", "holds 1.2"),
        "a name with a line break": (
            b"\x80\x04\x8c\x03a\nb\x8c\x03\x1b[m\x93.",
            "holds a?b.?[m",
        ),
        "a module not imported yet": (pickled(b"cthis\ns\n"), "holds this.s"),
        "in a tensor's arguments": (pickled(REBUILD, b"(", storage(), call), "holds posix.system"),
        "in an OrderedDict's": (pickled(ORDERED, b"(", call, b"tR"), "holds posix.system"),
        "OrderedDict of arguments": (pickled(ORDERED, [[("a", 1)]], b"\x85R"), "other arguments"),
        "build on a function": (pickled(REBUILD, {"__code__": 1}, b"b"), "state for what has none"),
        "build on a class": (pickled(ORDERED, {"fromkeys": 1}, b"b"), "state for what has none"),
        "build on a storage class": (
            pickled(b"ctorch\nFloatStorage\n", {"__module__": "os"}, b"b"),
            "state for what has none",
        ),
        "build on a tensor": (pickled(tensor(), {"shape": 1}, b"b"), "state for what has none"),
        "instance": (
            b"(" + argument + b"iposix\nsystem\n.",
            opcode("INST"),
        ),
        "object": (pickled(b"(", system, argument, b"o"), "holds posix.system"),
        "object of a known name": (
            pickled(b"(", ORDERED, b"o"),
            opcode("OBJ"),
        ),
        "new object": (
            pickled(ORDERED, b")\x81"),
            opcode("NEWOBJ"),
        ),
        "new object with keywords": (
            b"\x80\x04" + ORDERED + b")}\x92.",
            opcode("NEWOBJ_EX"),
        ),
        "extension 1": (
            pickled(b"\x82\xf0", argument, b"\x85R"),
            opcode("EXT1"),
        ),
        "extension 2": (pickled(b"\x83\xf0\x00"), opcode("EXT2")),
        "extension 4": (
            pickled(b"\x84\xf0\x00\x00\x00"),
            opcode("EXT4"),
        ),
        "copyreg": (pickled(b"ccopy_reg\n_reconstructor\n"), "holds copy_reg._reconstructor"),
        "add extension": (pickled(b"ccopyreg\nadd_extension\n"), "holds copyreg.add_extension"),
        "persistent id of text": (
            b"Pposix.system\n.",
            opcode("PERSID"),
        ),
        "persistent id of a number": (pickled(1, b"Q"), "a persistent id that is no storage's"),
        "persistent id of another kind": (
            pickled(("module", 1, "0", "cpu", 4), b"Q"),
            "a persistent id that is no storage's",
        ),
        "a storage of text": (
            pickled(("storage", "torch FloatStorage", "0", "cpu", 4), b"Q"),
            "a persistent id that is no storage's",
        ),
        "a storage of a function": (
            pickled(b"(", "storage", REBUILD, "0", "cpu", 4, b"tQ"),
            "a persistent id that is no storage's",
        ),
        "a storage called": (pickled(b"ctorch\nFloatStorage\n", (4,), b"R"), "other arguments"),
        "a text called": (pickled("posix system", (command,), b"R"), "a call of what is no"),
        "a tensor called": (pickled(tensor(), (), b"R"), "a call of what is no function"),
        "a method of a known name": (pickled(b"ctorch\nload\n"), "holds torch.load"),
        "another storage class": (pickled(b"ctorch\nUntypedStorage\n"), "holds torch.UntypedSto"),
        "numpy's scalar": (pickled(b"cnumpy.core.multiarray\nscalar\n"), "holds numpy.core.multi"),
        "a second pickle": (pickled({}) + pickle.dumps(Call(os.system, command)), "bytes after"),
        "no end": (pickled({})[:-1], DAMAGE),
        "nothing on the stack": (pickled(), DAMAGE),
        "too much on the stack": (pickled(1, 2), DAMAGE),
        "a memo that is not there": (pickled(b"h\x07"), DAMAGE),
        "items for a tuple": (pickled((), 1, b"a"), "items for what is no list"),
        "items for a name": (pickled(ORDERED, "a", 1, b"s"), "items for what is no dictionary"),
        "a tuple for a key": (pickled({}, (1, 2), 1, b"s"), "a dictionary key of type tuple"),
        "an odd item": (pickled({}, b"(", 1, b"u"), DAMAGE),
        "no mark": (pickled(b"u"), DAMAGE),
    }


CASES = list(malicious(""))


@contextlib.contextmanager
def extension():
    """os.system behind the number of an extension, where a pickle could find it by EXT."""
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        yield
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)


@pytest.mark.parametrize("case", CASES)
def test_a_pickle_is_never_run(case, refusal, tmp_path):
    marker = tmp_path / "marker"
    program, text = malicious(marker)[case]
    path = write_archive(tmp_path / "x.pth", program, {"0": bytes(16)})
    watched = [collections, collections.OrderedDict, torch_pickle]
    before = [dict(vars(thing)) for thing in watched]
    with extension():
        line = refusal(import_torch, path)
    assert text in line, line
    assert not marker.exists() and "this" not in sys.modules
    assert [dict(vars(thing)) for thing in watched] == before


def test_the_pickles_above_would_run(tmp_path):
    """By Python's own unpickler, or the test above would prove nothing."""
    program, _ = malicious(tmp_path / "marker")["reduce"]
    pickle.loads(program)
    assert (tmp_path / "marker").exists()


def test_a_refused_object_comes_with_a_way_out(refusal, tmp_path):
    program = pickled(b"}", "hyper_parameters", b"comegaconf.dictconfig\nDictConfig\n", b"s")
    line = refusal(import_torch, write_archive(tmp_path / "model.ckpt", program))
    assert "model.ckpt holds omegaconf.dictconfig.DictConfig, which is neither" in line
    assert "torch.save(model.state_dict(), 'weights.pth')" in line


def test_nothing_small_takes_long_or_much(refusal, tmp_path):
    """A key of two keys of two keys ..., and numbers that claim much memory."""
    doubled = b"".join(b"q%ch%c\x86" % (n, n) for n in range(200))
    bombs = [
        pickled(b"}", (1,), doubled, 1, b"s"),
        pickled(b"}r\xff\xff\xff\x7f", b"s"),
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
        pickled(b"\x8b" + (2**31 - 1).to_bytes(4, "little")),
    ]
    for bomb in bombs:
        assert DAMAGE in refusal(read_file, write_archive(tmp_path / "x.pth", bomb))


def test_a_header_or_a_file_of_absurd_size_is_not_read(refusal, tmp_path):
    """A header becomes objects of many times its size; a sparse file takes no disk."""
    path = tmp_path / "x"
    path.write_bytes((9 * 2**20).to_bytes(8, "little") + b"{" + b" " * 9 * 2**20)
    assert "a header of 9437184 bytes, far more than tensors need" in refusal(read_file, path)
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "has 1099511627776 bytes, more than any ResNet" in refusal(read_file, path)


def test_a_pickle_of_too_many_instructions_is_damage(refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MOST_INSTRUCTIONS", 1000)
    path = write_archive(tmp_path / "x.pth", pickled(b"N" * 1000))
    assert "a pickle of more than 1,000 instructions" in refusal(read_file, path)


# --- damage at random ----------------------------------------------------------------------------


def damaged_copies(content, rng, count):
    """Cut off anywhere; bytes changed anywhere; bytes changed near the start."""
    for number in range(count):
        copy = bytearray(content)
        if number % 3 == 0:
            del copy[rng.integers(len(copy)) :]
        else:
            end = len(copy) if number % 3 == 1 else min(2000, len(copy))
            for place in rng.integers(end, size=2):
                copy[place] = rng.integers(256)
        yield bytes(copy)


def is_refused(read, path):
    """Whether it ends in one line of a CheckpointError; any other error fails the test."""
    try:
        read(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return True
    return False


@pytest.mark.parametrize("name", ["torch_dtypes.pth", CIFAR.name])
def test_a_damaged_file_is_one_line(name, tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / name
    refused = 0
    for content in damaged_copies((FIXTURES / name).read_bytes(), rng, 300):
        path.write_bytes(content)
        refused += is_refused(read_file, path)
    assert refused > 150


def test_a_damaged_pickle_in_a_sound_archive_is_one_line(tmp_path):
    """As above with the checksums made right, so that the damage is read."""
    rng = np.random.default_rng(1)
    with zipfile.ZipFile(FIXTURES / "torch_views.pth") as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    program = members.pop("data.pkl")
    members = {name.replace(".", "__"): content for name, content in members.items()}
    refused = 0
    for damaged in damaged_copies(program, rng, 300):
        path = write_archive(tmp_path / "x.pth", damaged, **members)
        refused += is_refused(import_torch, path)
    assert refused > 150
