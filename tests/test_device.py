"""What commands tell XLA, the allocator and the compilation cache before JAX starts."""

import os
import pathlib
import platform
import subprocess
import sys

import jaxlib
import pytest

from configs import cpu, rapid
from jepa_jax import command, device
from jepa_jax.config_flags import GivenConfig, fit_to_device

ROOT = pathlib.Path(__file__).parent.parent
# A convolution and its gradients, as a command would have them compiled.
COMPILE = """
import jax, jax.numpy as jnp
from jepa_jax import device
device.select("cpu")
def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
def loss(x, w):
    return jnp.sum(jnp.square(conv(x, w)))
x, w = jnp.ones((8, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).compile()
lines = compiled.as_text().splitlines()
print(sum(" convolution(" in line for line in lines))
print(jax.config.jax_compilation_cache_dir)
"""


def python(code, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "GLIBC_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_this_jaxlib_takes_the_flag_and_computes_its_own_convolutions(tmp_path):
    done = python(COMPILE, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    count, cache = done.stdout.split()
    # Forward, by input and by weights; in the hands of YNNPACK they would be custom fusions.
    assert int(count) == 3
    assert pathlib.Path(cache).parent == tmp_path / "jepa_jax"


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "jepa_jax").write_text("in the way")
    done = python(COMPILE, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "None"


def test_a_cache_of_the_users_own_stays(tmp_path):
    own = str(tmp_path / "own")
    done = python(COMPILE, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=own)
    assert done.stdout.split()[1] == own
    assert not (tmp_path / "jepa_jax").exists()


@pytest.mark.parametrize(
    ("version", "given", "wanted"),
    [
        ("0.10.2", "--a=1", f"--a=1 {device._XLA_FLAG}={device._XLA_FLAG_VALUE}"),
        ("0.10.2", "", f"{device._XLA_FLAG}={device._XLA_FLAG_VALUE}"),
        ("0.10.2", f"{device._XLA_FLAG}=", f"{device._XLA_FLAG}="),  # a person's own choice
        ("0.9.1", "--a=1", "--a=1"),
        ("0.13.0", "", ""),  # a flag that XLA has dropped would end the process
        ("1.0.0", "", ""),
    ],
)
def test_xla_flags_keep_what_was_there_and_unknown_versions_get_none(
    monkeypatch, version, given, wanted
):
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.setenv("XLA_FLAGS", given)
    device._choose_convolutions()
    assert os.environ["XLA_FLAGS"] == wanted


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """Has the kernel offer pages in a way, and collects what a restart would run."""

    def call(kernel, tunables, libc="glibc"):
        calls = []
        (tmp_path / "enabled").write_text(kernel)
        monkeypatch.setattr(command, "_THP", tmp_path / "enabled")
        monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.36"))
        monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
        command.with_huge_pages()
        return calls, os.environ["GLIBC_TUNABLES"]

    return call


ON_REQUEST = "always [madvise] never\n"


def test_a_command_restarts_itself_once_to_be_given_huge_pages(restarts):
    calls, tunables = restarts(ON_REQUEST, "")
    assert calls == [(sys.executable, sys.orig_argv)]
    assert tunables == "glibc.malloc.hugetlb=1"
    assert restarts(ON_REQUEST, tunables)[0] == []


def test_other_tunables_are_kept(restarts):
    assert restarts(ON_REQUEST, "glibc.malloc.arena_max=2")[1] == (
        "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    )


@pytest.mark.parametrize(
    "case",
    [
        ("[always] madvise never\n", "", "glibc"),
        ("always madvise [never]\n", "", "glibc"),
        (ON_REQUEST, "", "musl"),
        (ON_REQUEST, "glibc.malloc.hugetlb=0", "glibc"),  # a person's own choice
    ],
)
def test_nothing_restarts_where_it_would_change_nothing(restarts, case):
    assert restarts(*case)[0] == []


def test_the_restart_runs_the_same_command():
    code = (
        "import sys; from jepa_jax.command import with_huge_pages as again; again(); print('ran')"
    )
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def given(module, **overrides):
    config = module.get_config()
    config.update_from_flattened_dict(overrides)
    return GivenConfig(config, "config.py", overrides)


def test_bfloat16_is_not_computed_in_on_a_cpu_unless_a_flag_asks(capsys):
    for overrides in ({}, {"optim.lr": 0.1}):
        chosen = given(rapid, **overrides)
        fit_to_device(chosen)
        assert not chosen.config.training.use_amp
        assert "computing in float32" in capsys.readouterr().out
    for chosen in (given(rapid, **{"training.use_amp": True}), given(cpu)):
        before = chosen.config.to_json()
        fit_to_device(chosen)
        assert chosen.config.to_json() == before
    assert capsys.readouterr().out == ""
