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


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_runs(snippet, workdir, cifar_arrays, tiny_config, monkeypatch):
    """With `images` for the reader's own; in a folder with runs/cpu, its export, a checkpoint."""
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(workdir.parent.parent)
    names = {
        "images": cifar_arrays["train_images"][:128],
        "labels": cifar_arrays["train_labels"][:128],
        "config": tiny_config,
        "apply": lambda params, x: jnp.mean(x, axis=(1, 2)) @ params,
    }
    # A reader's code runs under JAX's defaults.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(snippet, "README.md", "exec"), names)
        if "train_step" in names:
            params, key = jnp.eye(3), jax.random.key(0)
            opt_state = names["optimizer"].init(params)
            new, _, loss, terms = jax.jit(names["train_step"])(
                params, opt_state, key, names["images"]
            )
            assert float(loss) > 0 and set(terms) == {"invariance_loss", "var_loss", "cov_loss"}
            assert not jnp.array_equal(new, params)
    if "h" in names:
        assert names["h"].shape == (128, 8)


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


def test_there_are_snippets_for_the_encoder_and_for_a_hand_written_step():
    assert any("load_encoder" in snippet for snippet in SNIPPETS)
    assert any("evaluate_representation" in snippet for snippet in SNIPPETS)
    assert any("vicreg_loss" in snippet and "lars" in snippet for snippet in SNIPPETS)


def test_commands_name_files_that_exist():
    named = set(re.findall(r"configs/\w+\.py", README)) | set(
        re.findall(r"\]\(([\w/]+\.\w+)\)", README)
    )
    assert named and all((ROOT / name).is_file() for name in named)


def test_the_architecture_section_names_every_module():
    modules = {path.name for path in (ROOT / "jepa_jax").glob("*.py")} - {"__init__.py"}
    assert not [name for name in modules if name not in README]
    assert set(jepa_jax.__all__)
