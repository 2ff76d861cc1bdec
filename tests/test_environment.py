"""What is stored beside a run's config."""

import json
import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

import jepa_jax
from jepa_jax import environment
from jepa_jax.environment import describe_environment, git_revision, without_folders


def git(folder, *arguments):
    result = subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=n@n", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one commit of package/module.py and README.md."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "module.py").write_text("a = 1\n")
    (folder / "README.md").write_text("text\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_versions_machine_and_command_are_told(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "x", "--workdir=/home/me/run"])
    told = describe_environment()
    assert told["python"] == platform.python_version() and told["jax"] == jax.__version__
    assert told["numpy"] == np.__version__ and told["jepa_jax"] == jepa_jax.__version__
    assert told["command"] == "python -m x --workdir=run"
    assert told["num_devices"] == jax.local_device_count()
    assert 1 <= told["cores"] <= os.cpu_count() and told["memory_gib"] > 0
    assert told["processor"] and told["system"] and told["device"]
    assert all(isinstance(value, str | int | float | None) for value in told.values())
    assert json.loads(json.dumps(told)) == told


def test_flags_are_told_where_they_are_set_and_without_folders(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/me/dump --xla_backend_extra=1")
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home/me/cache")
    told = describe_environment()
    assert told["XLA_FLAGS"] == "--xla_dump_to=dump --xla_backend_extra=1"
    assert told["JAX_ENABLE_X64"] == "0" and told["JAX_COMPILATION_CACHE_DIR"] == "cache"
    monkeypatch.delenv("XLA_FLAGS")
    assert "XLA_FLAGS" not in describe_environment()


def test_a_package_that_is_missing_is_none(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("no_such_package", "jax"))
    told = describe_environment()
    assert told["no_such_package"] is None and told["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/usr/bin/python", "python"),
        ("--config=configs/cpu.py", "--config=configs/cpu.py"),
        ("--config=/home/me/cpu.py:5m", "--config=cpu.py:5m"),
        ("--workdir=/runs/optim.lr=0.3/one", "--workdir=one"),
        ("/runs/optim.lr=0.3/one", "one"),
        ("--config.optim.lr=0.3", "--config.optim.lr=0.3"),
        ("--flag=", "--flag="),
    ],
)
def test_folders_are_not_shown(argument, shown):
    assert without_folders([argument]) == [shown]


def test_the_revision_says_whether_python_files_differ_from_it(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_revision(checkout) == commit and len(commit) == 40
    (checkout / "README.md").write_text("another text\n")
    (checkout / "out").mkdir()
    (checkout / "out" / "metrics.jsonl").write_text("{}\n")
    assert git_revision(checkout) == commit
    own = checkout / "own" / "loss.py"
    own.parent.mkdir()
    own.write_text("b = 2\n")
    assert git_revision(checkout) == f"{commit}+changes"
    own.unlink()
    (checkout / "package" / "module.py").write_text("a = 2\n")
    assert git_revision(checkout) == f"{commit}+changes"


def test_another_projects_checkout_is_not_ours(checkout, monkeypatch, tmp_path):
    assert git_revision(checkout / "package") is None
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    assert git_revision(other) is None  # no commit
    # As in a hook of that checkout.
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert len(git_revision(checkout)) == 40


def test_a_git_that_refuses_or_fails_is_none(checkout, monkeypatch):
    with monkeypatch.context() as patch:
        # git's own tests make it see another owner so; a machine's settings may trust everyone.
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        assert git_revision(checkout) is None
    assert git_revision(checkout) is not None
    (checkout / ".git" / "HEAD").write_text("damaged\n")
    assert git_revision(checkout) is None


def test_without_git_there_is_no_revision(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(checkout) is None


def test_a_git_that_does_not_answer_is_not_waited_for(checkout, monkeypatch, tmp_path):
    slow = tmp_path / "git"
    slow.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_GIT_SECONDS", 0.2)
    assert git_revision(checkout) is None


def test_the_processor_has_a_name_where_linux_tells_none(monkeypatch):
    def refused(*args, **options):
        raise OSError

    monkeypatch.setattr(environment.pathlib.Path, "read_text", refused)
    assert environment.processor() == (platform.processor() or platform.machine())


def test_asking_imports_nothing_heavy():
    program = (
        "import sys; from jepa_jax.environment import describe_environment; describe_environment()"
        "; print({'tensorflow', 'tensorflow_datasets', 'orbax.checkpoint'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
