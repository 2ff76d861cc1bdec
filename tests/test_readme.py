"""What the README shows works: its snippets run as they stand, its commands name real files."""

import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest

import jepa_jax
from jepa_jax import train
from jepa_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workdir(tiny_config, small_cifar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "runs" / "cpu"
    train.train_and_evaluate(tiny_config, folder, dataset=small_cifar)
    jepa_jax.export_encoder(folder, folder.parent.parent / "exported")
    shutil.copy(FIXTURES / "torch_eb_jepa.pth", folder.parent.parent / "latest.pth.tar")
    return folder


@pytest.fixture
def ran(workdir, cifar_arrays, tiny_config, monkeypatch):
    """Runs a snippet with the reader's own names, beside runs/cpu, its export and a checkpoint."""
    monkeypatch.chdir(workdir.parent.parent)

    def run(snippet, **others):
        names = {
            "images": cifar_arrays["train_images"][:128],
            "labels": cifar_arrays["train_labels"][:128],
            "config": tiny_config,
            "batches": cifar_arrays["train_images"][:192].reshape(3, 64, 32, 32, 3),
            **others,
        }
        # A reader's code runs under JAX's defaults.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(snippet, "README.md", "exec"), names)
        return names

    return run


def the_snippet(*words):
    (found,) = [snippet for snippet in SNIPPETS if all(word in snippet for word in words)]
    return found


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_runs(snippet, ran):
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 20
    names = ran(snippet)
    if "h" in names:
        assert names["h"].shape == (128, 8)
    if "loss" in names:
        assert jnp.isfinite(names["loss"]) and names["loss"] > 0


def squares(tree):
    return sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))


def kernels(tree):
    """Of a bias that is added to all embeddings alike the loss sees nothing."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


def test_the_linen_loop_trains_every_kernel_by_its_schedule(ran):
    snippet = the_snippet("flax.linen", "vicreg_loss", "lars")
    names, start = ran(snippet), kernels(ran(snippet, batches=[])["variables"])
    pairs = list(zip(start, kernels(names["variables"]), strict=True))
    assert len(pairs) == 2 and not any(jnp.array_equal(old, new) for old, new in pairs)
    assert int(names["opt_state"].count) == 3
    # The warm-up begins at a rate of 0.
    once = ran(snippet, batches=[names["batches"][0]])
    assert all(map(jnp.array_equal, start, kernels(once["variables"])))


def test_the_nnx_loop_trains_every_kernel(ran):
    from flax import nnx

    snippet = the_snippet("nnx", "vicreg_loss", "lars")
    names, start = ran(snippet), ran(snippet, batches=[])
    pairs = [kernels(nnx.state(found["model"], nnx.Param)) for found in (start, names)]
    pairs = list(zip(*pairs, strict=True))
    assert len(pairs) == 2 and not any(jnp.array_equal(old, new) for old, new in pairs)
    assert int(names["optimizer"].step[...]) == 3


def test_the_grain_pipeline_is_one_epoch_whose_views_follow_from_its_seed(ran):
    snippet = the_snippet("grain", "two_views")
    names = ran(snippet)
    assert names["x1"].shape == names["x2"].shape == (32, 32, 32, 3)
    assert float(names["x1"].min()) >= 0 and float(names["x1"].max()) <= 1
    views = [x1 for x1, _ in names["loader"].random_map(names["views"])]
    assert len(views) == 4
    assert jnp.array_equal(views[-1], names["x1"])
    assert not jnp.array_equal(names["x1"], names["x2"])
    other = ran(snippet.replace(".seed(0)", ".seed(1)"))
    assert not jnp.array_equal(other["x1"], names["x1"])


def test_in_the_equinox_model_the_encoder_is_frozen_and_the_head_learns(ran):
    names = ran(the_snippet("equinox", "load_encoder"))
    _, before = jepa_jax.load_encoder("runs/cpu")
    after = names["model"].variables
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, after))
    assert squares(names["grads"].head) > 0 and squares(names["grads"].variables) == 0
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, _ = names["loss_and_grad"](names["model"], names["images"], names["labels"])
    assert loss < names["loss"]


def test_the_words_on_fine_tuning_in_equinox_are_true(ran):
    """With the gradient of `batch_stats` alone stopped, the parameters learn and nothing else."""
    snippet = the_snippet("equinox", "load_encoder").replace(
        "jax.lax.stop_gradient(self.variables)",
        '{**self.variables, "batch_stats": jax.lax.stop_gradient(self.variables["batch_stats"])}',
    )
    grads = ran(snippet)["grads"].variables
    assert squares(grads["params"]["encoder"]) > 0 and squares(grads["batch_stats"]) == 0


def test_the_loss_of_ones_own_trains_by_its_path(tiny_config, small_cifar, tmp_path, monkeypatch):
    """The README's file under the name that it has there, by the flag that follows it."""
    (snippet,) = [snippet for snippet in SNIPPETS if "# my_module.py" in snippet]
    (path,) = re.findall(r"--config\.loss\.type=(\w+:\w+)", README)
    (tmp_path / "my_module.py").write_text(snippet)
    monkeypatch.chdir(tmp_path)
    config = tiny_config.copy_and_resolve_references()
    config.loss.type, config.optim.epochs = path, 1.0
    train.train_and_evaluate(config, "run", dataset=small_cifar)
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    total = row["train/pull"] * config.loss.sim_coeff
    total += row["train/spread"] * config.loss.std_coeff
    assert row["train/loss"] == pytest.approx(total, rel=1e-5)


def test_commands_name_files_that_exist():
    named = set(re.findall(r"configs/\w+\.py", README)) | set(
        re.findall(r"\]\(([\w/]+\.\w+)\)", README)
    )
    assert named and all((ROOT / name).is_file() for name in named)


def test_the_architecture_section_names_every_module():
    modules = {path.name for path in (ROOT / "jepa_jax").glob("*.py")} - {"__init__.py"}
    assert not [name for name in modules if name not in README]
    assert set(jepa_jax.__all__)
