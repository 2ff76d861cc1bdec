"""What is released, built, installed and run where nothing of the repository is."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from tiny import FLAGS

import jepa_jax
from jepa_jax import configs
from jepa_jax.config_flags import given_config
from jepa_jax.data.cifar10 import write_cifar10

ROOT = pathlib.Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*"
)


def run(*command, cwd, **environment):
    environment = {**os.environ, **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    return result.returncode, result.stdout, result.stderr


def build(kind, source, out):
    """One file, by the backend that pyproject.toml names; no network is asked."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    returncode, output, error = run(sys.executable, "-c", code, cwd=source, PYTHONPATH=None)
    assert returncode == 0, error
    return out / output.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist): the wheel from the sdist, as a package index would have it."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    sdist = build("sdist", folder / "source", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder), sdist


@pytest.fixture(scope="module")
def installed(built, cifar_arrays, tmp_path_factory):
    """A function that runs a command of the installed wheel in an unrelated folder."""
    folder = tmp_path_factory.mktemp("installed")
    site, data = folder / "site", folder / "data"
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site]
    code, _, error = run(sys.executable, "-m", "pip", "install", *options, built[0], cwd=folder)
    assert code == 0, error
    arrays = cifar_arrays
    write_cifar10(
        data,
        train=(arrays["train_images"], arrays["train_labels"]),
        test=(arrays["test_images"], arrays["test_labels"]),
    )

    def call(command, *arguments, cwd=folder):
        program = {"jepa-jax": [sys.executable, site / "bin" / "jepa-jax"]}
        return run(
            *program.get(command, [sys.executable, *command.split()]),
            *arguments,
            cwd=cwd,
            PYTHONPATH=str(site),
            EBJEPA_DSETS=str(data),
            HOME=str(folder),
        )

    return call


def test_the_wheel_has_the_package_and_its_configs_and_nothing_else(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"jepa_jax", f"jepa_jax-{jepa_jax.__version__}.dist-info"}
    kept = {name.removeprefix("jepa_jax/_configs/") for name in names if "_configs" in name}
    files = (path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py"))
    assert kept == {path.as_posix() for path in files}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jepa_jax").rglob("*.py")}
    assert modules | {"jepa_jax/py.typed", "jepa_jax/__init__.pyi"} <= names
    assert not {name for name in names if re.search(r"(^|/)(tests|benchmarks|docs)/", name)}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "jepa-jax = jepa_jax.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in text and "Classifier: Typing :: Typed" in text


def test_the_sdist_has_what_a_packager_builds_and_tests_with(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"configs/cpu.py", "configs/sweeps/lr_search.py", "constraints.txt"} <= names
    assert {"tests/conftest.py", "tests/fixtures/cifar10_small.npz", "docs/api.md"} <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith("runs/")}


def test_the_installed_command_trains_from_an_unrelated_folder(installed, tmp_path):
    flags = [*FLAGS, "--config.optim.epochs=0.5", "--config.optim.warmup_epochs=0"]
    # A person's own folder of that name, which is not ours and must not be taken for it.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not for you')\n")
    code, _, error = installed("jepa-jax", "--config=cpu", *flags, "--workdir=run", cwd=tmp_path)
    assert code == 0, error
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    # The difference to rapid.py, which is in the wheel too.
    assert "differ from configs/rapid.py" in (tmp_path / "run" / "report.html").read_text()


def test_bad_input_of_the_installed_command_is_one_line_and_help_has_its_flags(installed, tmp_path):
    code, _, error = installed("jepa-jax", "--config=rapd")
    assert (code, error) == (2, "error: config file rapd does not exist (did you mean rapid.py?)\n")
    (tmp_path / "mine.py").write_text("from configs import rapid\nget_config = rapid.get_config\n")
    code, _, error = installed("jepa-jax", "--config=mine", cwd=tmp_path)
    assert code == 2 and len(error.splitlines()) == 1
    assert error.endswith("(those of the package: from jepa_jax.configs import rapid)\n")
    code, out, _ = installed("jepa-jax", "--help")
    assert code == 1 and "--workdir" in out and "--config" in out


SHIPPED = sorted(path.stem for path in configs.FOLDER.glob("*.py"))
FIND_ALL = f"""
import pathlib, sys
import jepa_jax
from jepa_jax.config import validate
from jepa_jax.config_flags import given_config
from jepa_jax.sweep.axes import axes_of_file

site = pathlib.Path(jepa_jax.__file__).parents[1]
assert not site.is_relative_to({str(ROOT)!r})
for name in {SHIPPED!r}:
    for spelling in (name, name + ".py", "configs/" + name + ".py"):
        given = given_config(["--config=" + spelling])
        assert pathlib.Path(given.path).is_relative_to(site), given.path
        assert given.name == name
    validate(given.config)
assert given_config(["--config=cpu:5m"]).name == "cpu-5m"
assert given_config(["--config", "cpu.py:5m"]).config.optim.epochs == 4.7
parse = lambda key, text: float(text) if text[0].isdigit() else text
for spelling in ("lr_search", "lr_search.py", "configs/sweeps/lr_search.py"):
    assert axes_of_file(spelling, parse).keys == ["optim.lr"]
from jepa_jax.configs import rapid
from jepa_jax.configs.cpu import get_config
assert "configs" not in sys.modules and str(site / "jepa_jax") not in sys.path
"""


def test_every_config_of_the_wheel_is_found_by_any_spelling(installed):
    code, _, error = installed("-c", FIND_ALL)
    assert code == 0, error


def test_every_other_command_takes_the_same_names(installed, tmp_path):
    """Each gets as far as a complaint that it makes only after it has the config."""
    bad = "--config.data.dataset=nonesuch"
    for command, arguments in (
        ("-m jepa_jax.sweep", ["--config=cpu", "--axes=loss_weights"]),
        ("-m jepa_jax.compare", ["cpu", "optim.lr=0.04"]),
    ):
        code, _, error = installed(command, *arguments, bad, cwd=tmp_path)
        assert code == 2 and "nonesuch" in error and "Traceback" not in error, error


# --- names --------------------------------------------------------------------------------------


def test_a_file_of_ones_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = [pathlib.Path("rapid.py"), pathlib.Path("configs/cpu.py")]
    for path in own:
        path.touch()
    assert configs.find("rapid") == configs.find("rapid.py") == own[0]
    assert configs.find("configs/cpu.py") == configs.find("configs/cpu") == own[1]
    assert configs.find("cpu") == configs.FOLDER / "cpu.py"
    assert not configs.is_shipped(own[1]) and configs.is_shipped(configs.find("full"))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize("flags", [["--config=cpu:5m"], ["--config", "configs/cpu.py:5m"]])
def test_a_name_keeps_its_argument(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = given_config([*flags, "--config.optim.lr=0.5"])
    assert (given.name, given.config.optim.epochs, given.config.optim.lr) == ("cpu-5m", 4.7, 0.5)


@pytest.mark.parametrize("name", ["", ".", "nonesuch", "../configs/cpu.py", "elsewhere/cpu.py"])
def test_what_is_no_files_name_comes_back(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find(name) == pathlib.Path(name)
    assert not configs.find(name).is_file()


@pytest.mark.parametrize("path", sorted(configs.FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_configs_import_each_other_by_a_name_that_is_theirs_alone(path):
    """`from configs import rapid` would find whatever folder of that name a user has."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] != "configs"
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "configs" for alias in node.names)


# --- one version, one licence -------------------------------------------------------------------


def test_the_version_and_the_licence_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert project["dynamic"] == ["version"] and citation["version"] == jepa_jax.__version__
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and headings[1] == jepa_jax.__version__
