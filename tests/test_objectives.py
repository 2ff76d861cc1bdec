"""What loss.type names: every objective trains, says what it is, and one's own is found by path."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cpu, objectives, sigreg
from jepa_jax import load_encoder, train
from jepa_jax.compare.equal_time import run_one_program
from jepa_jax.config import flatten, validate
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.losses import barlow_twins_loss, lejepa_loss, nt_xent_loss, sigreg_loss, vicreg_loss
from jepa_jax.metrics import read_metrics
from jepa_jax.objectives import OBJECTIVES, described, make_loss_fn, term_weights
from jepa_jax.plan import make_plan
from jepa_jax.report import write_report
from jepa_jax.sweep.cells import make_cell
from jepa_jax.sweep.run import Sweep
from jepa_jax.train_step import HParams

HPARAMS = HParams(
    np.uint32(0),
    *[np.float32(1.0)] * 7,
    sim_coeff=np.float32(0.7),
    std_coeff=np.float32(1.3),
    cov_coeff=np.float32(2.1),
    probe_lr=np.float32(1.0),
    sigreg_coeff=np.float32(3.1),
    redundancy_coeff=np.float32(0.2),
    temperature=np.float32(0.4),
)
OWN = """
import jax.numpy as jnp


def pull(key, z1, z2, hparams):
    loss = jnp.mean((z1 - z2) ** 2)
    return hparams.sim_coeff * loss, {"pull_loss": loss}


def two(z1, z2):
    return 0.0, {}


def only(key, z1, z2, hparams):
    return jnp.mean(z1)


def rows(key, z1, z2, hparams):
    return jnp.mean(z1), {"rows": z1}


number = 3
"""


def loss_section(**changes):
    return {**cpu.get_config().loss.to_dict(), "num_directions": 16, **changes}


@pytest.fixture(scope="module")
def config(tiny_config):
    """One epoch of four steps."""
    config = tiny_config.copy_and_resolve_references()
    config.optim.epochs, config.optim.warmup_epochs = 1.0, 0.25
    config.loss.num_directions = 16
    return config


def with_loss(config, name, **changes):
    config = config.copy_and_resolve_references()
    config.loss.update(type=name, **changes)
    return config


@pytest.fixture
def own_module(tmp_path, monkeypatch, request):
    """The name of a module in the current folder, another one for every test."""
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


# --- the seam -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_every_name_is_its_loss_with_the_coefficients_of_the_step(num_pairs):
    key = jax.random.key(1)
    z = np.float32(np.random.default_rng(0).normal(size=(2, 8, 4)))
    sketched = {"sim_coeff": 0.7, "sigreg_coeff": 3.1, "num_directions": 16}
    expected = {
        "vicreg": (vicreg_loss, (), {"sim_coeff": 0.7, "std_coeff": 1.3, "cov_coeff": 2.1}),
        "sigreg": (sigreg_loss, (key,), sketched),
        "bcs": (sigreg_loss, (key,), sketched),
        "lejepa": (lejepa_loss, (key,), sketched),
        "barlow": (barlow_twins_loss, (), {"redundancy_coeff": 0.2}),
        "simclr": (nt_xent_loss, (), {"temperature": 0.4}),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, (loss, first, options) in expected.items():
        found = make_loss_fn(loss_section(type=name), num_pairs)(key, *z, HPARAMS)
        wanted = loss(*first, *z, **options, num_pairs=num_pairs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_weighted_terms_are_the_loss(name):
    """What the watch and the report make of a loss is all of it."""
    z = np.float32(np.random.default_rng(1).normal(size=(2, 8, 4)))
    section = loss_section(type=name, sim_coeff=0.7, sigreg_coeff=3.1, redundancy_coeff=0.2)
    section |= {"std_coeff": 1.3, "cov_coeff": 2.1}
    loss, terms = make_loss_fn(section, 1)(jax.random.key(1), *z, HPARAMS)
    weights = term_weights(section)
    assert weights.keys() == terms.keys()
    np.testing.assert_allclose(sum(weights[t] * terms[t] for t in terms), loss, rtol=1e-5)


def test_an_older_runs_section_has_the_weights_it_speaks_of():
    older = {"type": "vicreg", "sim_coeff": 1.0, "std_coeff": 2.0, "cov_coeff": 3.0}
    assert list(term_weights(older).values()) == [1.0, 2.0, 3.0]
    assert term_weights({**older, "type": "sigreg"}) == {}
    assert term_weights({"type": "mine:loss"}) == {}


def test_a_loss_is_described_by_what_it_reads():
    assert described(loss_section(type="simclr")) == "simclr, temperature 0.5"
    assert described(loss_section(type="mine:loss")) == "mine:loss"
    assert described(loss_section(type="sigreg")) == (
        "sigreg, sim_coeff 1, sigreg_coeff 10, num_directions 16"
    )


def test_numbers_are_arguments_of_one_program_and_sizes_are_not(config, tmp_path):
    def program(**changes):
        point = {f"loss.{key}": value for key, value in changes.items()}
        return make_cell(config, point, 0, tmp_path).program

    numbers = {"sigreg_coeff": 3.0, "redundancy_coeff": 0.1, "temperature": 0.2}
    assert program(**numbers) == program()
    assert len({program(), program(num_directions=8), program(type="simclr")}) == 3
    assert run_one_program(config, with_loss(config, "vicreg", **numbers))
    assert not run_one_program(config, with_loss(config, "barlow"))


# --- a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"vicreg", "bcs"}))
def test_an_objective_trains_and_vicreg_is_not_spoken_of(
    name, config, small_cifar, tmp_path, capsys
):
    config = with_loss(config, name)
    train.train_and_evaluate(config, tmp_path / "run", dataset=small_cifar)
    printed = capsys.readouterr().out
    assert f"loss      {described(config.loss)}\n" in printed
    assert not any(word in printed.lower() for word in ("balance", "vicreg", "std_coeff"))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    weights = term_weights(config.loss)
    total = sum(weight * row[f"train/{term}"] for term, weight in weights.items())
    assert row["train/loss"] == pytest.approx(total, rel=1e-4)
    for term in weights:
        assert row[f"watch/grad_norm/{term}"] > 0
        assert f"{term.removesuffix('_loss')} {row[f'train/{term}']:.4f}" in printed
    page = write_report([tmp_path / "run"]).read_text()
    assert "Last epoch:" in page and "VICReg" not in page


def test_advice_on_a_collapse_is_that_of_the_loss(config, small_cifar, tmp_path):
    from jepa_jax.loop import _what_to_try

    for name, word in {
        "sigreg": "sigreg_coeff",
        "lejepa": "sigreg_coeff",
        "barlow": "redundancy_coeff",
        "simclr": "temperature",
        "vicreg": "optim.lr",
    }.items():
        plan = make_plan(
            with_loss(config, name, cov_coeff=0.28), tmp_path, small_cifar, *[None] * 4
        )
        advice = _what_to_try(plan, "low rank")
        assert f"config.loss.{word}" in advice or f"config.{word}" in advice
        assert "vicreg" not in advice.lower()


def test_four_views_train_under_every_objective(config, small_cifar, tmp_path):
    """The static number of pairs reaches the loss: by shapes alone, nothing is compiled."""
    for name in OBJECTIVES:
        changed = with_loss(config, name)
        changed.data.num_views = 4
        plan = make_plan(changed, tmp_path, small_cifar, *[None] * 4)
        assert plan.loss_fn.keywords["num_pairs"] == 2


# --- one's own ----------------------------------------------------------------------------------


def test_ones_own_function_trains_from_the_current_folder(
    own_module, config, small_cifar, tmp_path, capsys
):
    config = with_loss(config, f"{own_module}:pull", sim_coeff=2.0)
    train.train_and_evaluate(config, "run", dataset=small_cifar)
    assert f"loss      {own_module}:pull\n" in capsys.readouterr().out
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["train/loss"] == pytest.approx(2.0 * row["train/pull_loss"], rel=1e-5)
    assert row["watch/grad_norm/pull_loss"] > 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["loss"]["type"] == f"{own_module}:pull" and not stored["custom"]
    with pytest.raises(CheckpointError, match=r"loss.type: own_.*:pull -> vicreg"):
        train.train_and_evaluate(
            with_loss(config, "vicreg", sim_coeff=2.0), "run", dataset=small_cifar
        )
    # A run is read without the code that it was trained by.
    (tmp_path / f"{own_module}.py").write_text("1 / 0")
    load_encoder("run")
    assert "pull" in write_report(["run"]).read_text()


def test_a_sweep_of_ones_own_function_is_one_program(own_module, config, small_cifar, tmp_path):
    points = [{"loss.sim_coeff": value} for value in (0.0, 1.0)]
    swept = Sweep(
        with_loss(config, f"{own_module}:pull"),
        points,
        tmp_path / "sweep",
        num_seeds=1,
        stack=2,
        dataset=small_cifar,
    ).run()
    assert swept["cost"]["programs"] == 1
    first, second = (row["train_loss"]["mean"] for row in swept["rows"])
    assert sorted([first, second])[0] == 0.0 < max(first, second)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent_module:pull", "no module absent_module in the current folder"),
        ("absent.module:pull", "no module absent in the current folder"),
        ("{own}:pul", "has no pul (did you mean pull?)"),
        ("{own}:number", "number is a int, not a function"),
        ("{own}:two", "two must take (key, z1, z2, hparams): too many positional arguments"),
        ("{own}:only", "it must return (loss, terms)"),
        ("{own}:rows", "loss_fn must return scalars; rows has shape (100, 8)"),
        ("breaks:pull", "importing breaks failed: ZeroDivisionError: division by zero"),
        ("needs:pull", "importing needs failed: ModuleNotFoundError: No module named 'absent_"),
    ],
)
def test_what_is_no_loss_is_one_line(path, message, own_module, config, small_cifar, tmp_path):
    (tmp_path / "breaks.py").write_text("x = (\n    1 / 0\n)")
    (tmp_path / "needs.py").write_text("import absent_module")
    path = path.format(own=own_module)
    config = with_loss(config, path)
    validate(config)  # the module is looked for when a run begins
    with pytest.raises(ConfigError) as error:
        make_plan(config, tmp_path, small_cifar, *[None] * 4)
    text = str(error.value)
    assert text.startswith(f"config.loss.type={path}: ") and message in text and "\n" not in text


def test_a_loss_given_in_python_stands_above_the_configs(config, small_cifar, tmp_path):
    def own(key, z1, z2, hparams):
        return jnp.mean(z1), {}

    plan = make_plan(
        with_loss(config, "absent_module:pull"), tmp_path, small_cifar, own, None, None, None
    )
    assert plan.loss_fn is own and plan.loss_weights == {} and plan.balance == ("", "")


# --- configs/objectives.py ----------------------------------------------------------------------


def test_each_objective_has_one_short_command_at_the_scale_of_cpu_py():
    base = flatten(cpu.get_config())
    docs = pathlib.Path(objectives.__file__).read_text()
    for name in objectives.OBJECTIVES:
        config = objectives.get_config(name)
        validate(config)
        assert config.loss.type == name and name in docs.split('"""')[1]
        changed = {key for key, value in flatten(config).items() if value != base[key]}
        assert all(key.startswith("loss.") for key in changed - {"model.proj_output_dim"})
    assert flatten(objectives.get_config("vicreg")) == base
    assert flatten(sigreg.get_config()) == flatten(objectives.get_config("sigreg"))
    assert objectives.OBJECTIVES.keys() == OBJECTIVES.keys() - {"bcs"}
    with pytest.raises(ValueError, match="has vicreg, sigreg, lejepa, barlow, simclr, not byol"):
        objectives.get_config("byol")
