"""The command that converts weights, and what it writes: read by this package, JAX and PyTorch."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import uuid

import jax
import numpy as np
import pytest
import safetensors.numpy

from jepa_jax import (
    api,
    convert,
    export_encoder,
    import_torch,
    interop,
    load_encoder,
    loop,
    train,
)
from jepa_jax.errors import CheckpointError
from jepa_jax.interop.torch_file import read_file

ROOT = pathlib.Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
EB_JEPA, SOLO_LEARN = FIXTURES / "torch_eb_jepa.pth", FIXTURES / "torch_solo_learn.ckpt"
IMAGENET, CIFAR = FIXTURES / "torch_torchvision.pth", FIXTURES / "torch_cifar.safetensors"


def run(arguments, cwd, **environment):
    """A real process: (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def images(cifar_arrays):
    return cifar_arrays["test_images"][:6]


@pytest.fixture(scope="module")
def workdir(tiny_config, small_cifar, tmp_path_factory):
    """A finished run, with a projector."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.train_and_evaluate(tiny_config, folder, dataset=small_cifar)
    return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The run, by the command in a process of its own: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("exports")
    code, out, err = run(["-m", "jepa_jax.convert", str(workdir), "new/export"], folder)
    assert (code, err) == (0, "")
    return folder / "new" / "export", out


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folders made from PyTorch's files, by file name."""
    folder = tmp_path_factory.mktemp("imports")
    for path in (EB_JEPA, SOLO_LEARN, IMAGENET, CIFAR):
        convert.main([str(path), str(folder / path.name)])
    return folder


@pytest.fixture
def refused(capsys):
    """Runs the command in this process; it must end with 2 and one line, which comes back."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            convert.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable()
        return err

    return call


# --- out -----------------------------------------------------------------------------------------


def test_an_export_has_its_files_and_they_are_what_the_card_says(exported, workdir):
    folder, out = exported
    names = ["card.json", "encoder.safetensors", "encoder.stablehlo", "projector.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    card = json.loads((folder / "card.json").read_text())
    assert list(card["files"]) == names[1:]
    for name, described in card["files"].items():
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert described == {"sha256": digest, "bytes": len(content)}
        assert name in out
    stored = json.loads((workdir / "config.json").read_text())
    assert card["config"] == stored["config"] and card["imported"] is None
    assert card["metrics"] == json.loads((workdir / "summary.json").read_text())
    preprocessing = card["preprocessing"]
    assert preprocessing["mean"] == [0.4914, 0.4822, 0.4465]
    assert preprocessing["image_shape"] == [32, 32, 3] and preprocessing["range"] == [0.0, 1.0]
    architecture = card["architecture"]
    assert architecture["stage_sizes"] == [1, 1] and architecture["stem_stride"] == 2
    assert architecture["feature_dim"] == 8 and architecture["projector"] == [8, 8, 8]
    assert architecture["compute_dtype"] == "float32"
    assert card["versions"]["jax"] == jax.__version__ and card["schema_version"] == 1
    assert "ResNet of 1, 1 basic blocks, width 4; 3x3 stem of stride 2, padding 1" in out


def test_exported_weights_have_torchvisions_names_and_are_the_runs(exported, workdir):
    tensors = safetensors.numpy.load_file(exported[0] / "encoder.safetensors")
    expected = safetensors.numpy.load_file(CIFAR)
    shapes = {name: array.shape for name, array in expected.items()}
    shapes = {name: shape for name, shape in shapes.items() if "num_batches" not in name}
    assert {name: array.shape for name, array in tensors.items()} == shapes
    model = import_torch(exported[0] / "encoder.safetensors")
    _, variables = load_encoder(workdir)
    for kind, tree in model.variables.items():
        jax.tree.map(np.testing.assert_array_equal, tree["encoder"], variables[kind]["encoder"])
    head = safetensors.numpy.load_file(exported[0] / "projector.safetensors")
    names = [*(f"{n}.{leaf}" for n in (0, 1, 3, 4, 6) for leaf in ("weight", "bias"))]
    statistics = {f"{n}.running_{leaf}" for n in (1, 4) for leaf in ("mean", "var")}
    assert set(head) == statistics | set(names)
    kernel = variables["params"]["projector"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(head["0.weight"], np.asarray(kernel).T)


RELOAD = """
import sys
sys.modules["jepa_jax"] = sys.modules["flax"] = None
import numpy as np
import jax, safetensors.numpy
images = np.load("images.npy")
program = jax.export.deserialize(open("encoder.stablehlo", "rb").read())
h = [program.call(safetensors.numpy.load_file("encoder.safetensors"), images[:n]) for n in (1, 6)]
np.savez("h.npz", *h)
print(program.platforms, program.out_avals[0].shape)
"""


def test_the_exported_program_runs_without_this_package(exported, workdir, images, tmp_path):
    for name in ("encoder.stablehlo", "encoder.safetensors"):
        (tmp_path / name).write_bytes((exported[0] / name).read_bytes())
    np.save(tmp_path / "images.npy", np.float32(images / 255))
    code, out, err = run(["-c", RELOAD], tmp_path)
    assert code == 0, err
    assert out == "('cpu', 'cuda', 'tpu') (b, 8)\n"
    encoder, variables = load_encoder(workdir)
    expected = np.asarray(encoder.apply(variables, images))
    with np.load(tmp_path / "h.npz") as h:
        for found in h.values():
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [EB_JEPA.name, IMAGENET.name])
def test_what_came_in_goes_out_as_it_came(name, imported, tmp_path):
    """Bit for bit, in a folder that exists and is empty; the program takes the file's own stem."""
    (tmp_path / "out").mkdir()
    convert.main([str(imported / name), str(tmp_path / "out")])
    state, _ = read_file(FIXTURES / name)
    state = state.get("model_state_dict", state)
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "encoder.safetensors")
    prefix = "backbone.backbone." if name == EB_JEPA.name else ""
    assert len(tensors) > 20
    for key, array in tensors.items():
        np.testing.assert_array_equal(array, state[prefix + key])
    assert (tmp_path / "out" / "projector.safetensors").exists() == (name == EB_JEPA.name)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["metrics"] is None and card["imported"]["file"] == name
    side = 32 if name == EB_JEPA.name else 224
    program = jax.export.deserialize((tmp_path / "out" / "encoder.stablehlo").read_bytes())
    assert program.in_avals[-1].shape[1:] == (side, side, 3)
    rng = np.random.default_rng(0)
    larger = np.float32(rng.uniform(size=(2, side, side, 3)))
    encoder, variables = load_encoder(imported / name)
    expected = np.asarray(encoder.apply(variables, larger))
    np.testing.assert_allclose(program.call(tensors, larger), expected, rtol=1e-5, atol=1e-5)


def test_a_run_in_bfloat16_is_exported_as_it_was_evaluated(workdir, images, tmp_path):
    stored = json.loads((workdir / "config.json").read_text())
    stored["config"]["training"] |= {"use_amp": True, "dtype": "bfloat16"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "encoder").symlink_to(workdir / "encoder")
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    # Flax's BatchNorm normalises in float32 whatever the compute dtype is.
    with jax.numpy_dtype_promotion("standard"):
        export_encoder(tmp_path / "run", tmp_path / "out")
        encoder, variables = load_encoder(tmp_path / "run")
        expected = np.asarray(encoder.apply(variables, images))
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["architecture"]["compute_dtype"] == "bfloat16"
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "encoder.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    program = jax.export.deserialize((tmp_path / "out" / "encoder.stablehlo").read_bytes())
    found = np.asarray(program.call(tensors, np.float32(images / 255)))
    assert np.max(np.abs(found - expected)) <= 2e-2 * np.max(np.abs(expected))
    exact, _ = load_encoder(workdir)
    assert np.max(np.abs(found - exact.apply(variables, images))) > 1e-5


def test_an_export_that_fails_leaves_nothing(workdir, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "serialize_encoder", broken)
    with pytest.raises(KeyboardInterrupt):
        export_encoder(workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_an_encoder_of_its_own_is_refused(workdir, tmp_path):
    stored = json.loads((workdir / "config.json").read_text()) | {"custom": {"encoder": "my.Net"}}
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"of its own, my.Net: only the package's ResNet"):
        export_encoder(tmp_path / "run", tmp_path / "out")


def test_the_revision_is_that_of_the_packages_own_checkout(monkeypatch, tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
        command = ["git", *settings, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "api.py"
    file.touch()
    monkeypatch.setattr(api, "__file__", str(file))
    assert api._git_revision() is None
    git("init")
    git("commit", "--allow-empty", "--message=somebody's own")
    assert api._git_revision() is None
    git("add", "api.py")
    git("commit", "--message=ours")
    assert api._git_revision() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    file.write_text("# changed")
    assert api._git_revision()["dirty"]
    monkeypatch.setenv("PATH", "")
    assert api._git_revision() is None


# --- in ------------------------------------------------------------------------------------------


def test_an_imported_folder_serves_as_a_runs_does(imported, images):
    for path in (EB_JEPA, SOLO_LEARN, CIFAR, IMAGENET):
        model = import_torch(path)
        encoder, variables = load_encoder(imported / path.name)
        jax.tree.map(np.testing.assert_array_equal, variables, model.variables)
        h = model.encoder.apply(model.variables, images)
        np.testing.assert_array_equal(encoder.apply(variables, images), h)
        probe = imported / path.name / "probe.safetensors"
        assert probe.exists() == (model.probe is not None)
        if model.probe is not None:
            found = safetensors.numpy.load_file(probe)
            jax.tree.map(np.testing.assert_array_equal, found, model.probe)


def test_an_imported_folder_says_where_it_comes_from(imported):
    stored = json.loads((imported / SOLO_LEARN.name / "config.json").read_text())
    digest = hashlib.sha256(SOLO_LEARN.read_bytes()).hexdigest()
    found = stored["imported"]
    assert (found["source"], found["file"], found["sha256"], found["stem_padding"]) == (
        "solo-learn",
        SOLO_LEARN.name,
        digest,
        2,
    )
    assert "momentum_backbone.conv1.weight" in found["ignored"]
    assert stored["schema_version"] == train.SCHEMA_VERSION and stored["custom"] == {}
    assert stored["dataset"] == {"image_shape": [32, 32, 3]}
    assert not stored["config"]["model"]["use_projector"]


PROJECTOR = {"model.proj_hidden_dim": 6, "model.proj_output_dim": 5}


@pytest.fixture
def start(tiny_config, small_cifar, tmp_path, monkeypatch):
    """(a folder to start from, changes of the config) -> the state before the first step."""

    class Started(Exception):
        """Ends a run where it would compile its step."""

    def stop(plan, state, *_):
        raise Started(jax.device_get(state))

    monkeypatch.setattr(loop, "train", stop)

    def call(init_from, changes):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict({"model.stem_init": "random", **changes})
        workdir = tmp_path / uuid.uuid4().hex
        try:
            train.train_and_evaluate(config, workdir, dataset=small_cifar, init_from=str(init_from))
        except Started as started:
            return started.args[0]

    return call


def test_training_starts_from_exactly_the_imported_parameters(imported, start):
    network = {"model.stem_stride": 1, "model.stem_padding": 2, **PROJECTOR}
    state = start(imported / EB_JEPA.name, network)
    model = import_torch(EB_JEPA)
    jax.tree.map(np.testing.assert_array_equal, state.params, model.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, model.variables["batch_stats"])


def test_training_keeps_its_projector_where_the_import_has_none(start, imported):
    state = start(imported / CIFAR.name, {"model.stem_stride": 1})
    model = import_torch(CIFAR)
    given, fresh = state.params, start("", {"model.stem_stride": 1}).params
    jax.tree.map(
        np.testing.assert_array_equal, given["encoder"], model.variables["params"]["encoder"]
    )
    jax.tree.map(np.testing.assert_array_equal, given["projector"], fresh["projector"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, r"params/projector/BatchNorm_0/bias is \[6\], expected \[8\]"),
        (PROJECTOR, "model.stem_stride was 1 there and is 2 here; model.stem_padding was 2 there"),
        ({**PROJECTOR, "model.stem_stride": 1}, "model.stem_padding was 2 there and is 1 here"),
    ],
)
def test_training_refuses_what_fits_in_another_network(changes, text, start, imported):
    """Stride and padding leave no trace in shapes."""
    with pytest.raises(CheckpointError, match="holds another model") as error:
        start(imported / EB_JEPA.name, changes)
    assert re.search(text, str(error.value)), error.value


# --- the command ---------------------------------------------------------------------------------


def test_the_command_reads_a_file_and_says_what_it_read(tmp_path):
    options = ["--stem_padding=1", "--mean=0.5,0.4,0.3", "--std", "0.2,0.2,0.25"]
    arguments = ["-m", "jepa_jax.convert", *options, str(SOLO_LEARN), "out"]
    code, out, err = run(arguments, tmp_path, JAX_PLATFORMS="cpu")
    assert (code, err) == (0, "")
    *lines, last = out.splitlines()
    rows = dict(line.split("  ", 1) for line in lines)
    rows = {name.strip(): text.strip() for name, text in rows.items()}
    assert rows["names of"] == "solo-learn" and rows["probe"] == "10 classes"
    assert rows["encoder"] == (
        "ResNet of 1, 1 basic blocks, width 4; 3x3 stem of stride 1, padding 1"
    )
    assert rows["mean"] == "0.5, 0.4, 0.3" and rows["std"] == "0.2, 0.2, 0.25"
    assert rows["assumed"] == "stride: weights do not tell"
    assert rows["left out"] == "queue (1), momentum_backbone (36), projector (9)"
    assert rows["parameters"] == "1,364" and rows["projector"] == "none"
    encoder, _ = load_encoder(tmp_path / "out")
    assert encoder.mean == (0.5, 0.4, 0.3)


def test_help_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(["--help"])
    out, _ = capsys.readouterr()
    assert stopped.value.code == 0
    words = ("SRC", "DST", "--stem_padding", "--init_from", "StableHLO", "safetensors")
    assert not [word for word in words if word.lower() not in out.lower()]


def test_bad_input_is_one_line(refused, workdir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").touch()
    new = tmp_path / "new"
    cases = [
        ([], "the following arguments are required: SRC, DST"),
        ([EB_JEPA], "required: DST"),
        ([EB_JEPA, new, "--padding=1"], "unrecognized arguments: --padding=1"),
        ([EB_JEPA, new, "--stem_padding=two"], "invalid int value: 'two'"),
        ([EB_JEPA, new, "--stem_padding=3"], "stem_padding must be 1 or 2"),
        ([EB_JEPA, new, "--mean=a,b,c"], "'a,b,c' is not of the form r,g,b"),
        ([EB_JEPA, new, "--mean=1,2"], "mean must be three numbers"),
        ([EB_JEPA, new, "--std=0,1,1"], "std must be three numbers above 0"),
        ([tmp_path / "absent", new], "does not exist"),
        ([tmp_path / ("a" * 300), new], "File name too long"),
        (["~nobody-here/x", new], "home"),
        ([EB_JEPA, "~nobody-here/x"], "home"),
        ([tmp_path / "empty", new], "is empty"),
        ([EB_JEPA, tmp_path / "full"], "exists and is not an empty folder"),
        ([EB_JEPA, tmp_path / "empty"], "exists and is not an empty folder"),
        ([EB_JEPA, tmp_path / "empty" / "below"], "cannot be written"),
        ([workdir, tmp_path / "full"], "exists and is not an empty folder"),
        ([workdir, new, "--stem_padding=1"], "--stem_padding is for a file"),
        ([tmp_path / "full", new], "holds no run: config.json is missing"),
    ]
    for arguments, text in cases:
        assert text in refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_an_imported_probe_is_exported_in_pytorchs_layout(imported, tmp_path):
    export_encoder(imported / EB_JEPA.name, tmp_path / "out")
    found = safetensors.numpy.load_file(tmp_path / "out" / "probe.safetensors")
    content, _ = read_file(EB_JEPA)
    for name, array in content["linear_probe_state_dict"].items():
        np.testing.assert_array_equal(found.pop(name.removeprefix("classifier.")), array)
    assert not found


def test_a_signal_while_writing_waits_and_leaves_nothing(monkeypatch, capsys, tmp_path):
    """orbax's threads cannot be stopped halfway: they would write on into what is cleaned up."""
    original = api.checkpoint.save_tree

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments)
        assert (arguments[0] / "_CHECKPOINT_METADATA").exists()

    monkeypatch.setattr(api.checkpoint, "save_tree", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        convert.main([str(EB_JEPA), str(tmp_path / "out")])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_current_folder_may_be_the_destination(monkeypatch, tmp_path, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = os.stat(".").st_ino
    convert.main([str(CIFAR), "."])
    assert os.stat(tmp_path / "here").st_ino == inode
    load_encoder(".")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"config": {}, "custom": {}}'])
def test_a_config_that_is_none_of_a_runs_is_one_line(content, refused, imported, tmp_path):
    shutil.copytree(imported / CIFAR.name, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    assert "config.json is not that of a run" in refused(tmp_path / "run", tmp_path / "out")
    stored = json.loads((imported / CIFAR.name / "config.json").read_text())
    del stored["config"]["model"]["stem_kernel"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    line = refused(tmp_path / "run", tmp_path / "out")
    assert "describes no encoder of this version" in line and "stem_kernel" in line


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(interop, "import_torch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        convert.main([str(EB_JEPA), str(tmp_path / "out")])
    assert stopped.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
