"""Judging a run: the right checkpoint, the right floors, files, tables and one-line errors."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import api, evaluate
from jepa_jax.data import from_arrays
from jepa_jax.errors import CheckpointError, ConfigError, DataError
from jepa_jax.evaluate import evaluate_run
from jepa_jax.interop import import_torch
from jepa_jax.metrics import read_json, read_metrics
from jepa_jax.models import ModelFns
from jepa_jax.train import train_and_evaluate

RIDGE = ("ridge",)


@pytest.fixture(scope="module")
def finished(tiny_config, small_cifar, tmp_path_factory):
    """A finished run; for reading alone."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train_and_evaluate(tiny_config, folder, dataset=small_cifar)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def ridge_of(result):
    return result["probes"]["ridge"]


def test_it_finds_what_training_found_at_its_end(run, small_cifar):
    """The encoder, the untrained floor and the online probe are those of the run itself."""
    at_the_end = read_json(run / "evaluation.json")
    result = evaluate_run(run, dataset=small_cifar, parts=RIDGE)
    assert read_json(run / "evaluation.json") == result
    for name in ("encoder", "untrained"):
        assert ridge_of(result)[name] == ridge_of(at_the_end)[name]
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert result["probes"]["online"]["encoder"]["test"]["acc"] == last["test/online_probe_acc"]
    assert result["online_gap"] == at_the_end["online_gap"]
    assert result["online_gap"].startswith("online ")
    summary = read_json(run / "summary.json")
    assert summary["ridge_probe_acc"] == ridge_of(result)["encoder"]["test"]["acc"]
    assert result["checkpoint"] == {"which": "latest", "step": summary["steps"]}


def test_a_step_is_read_from_its_checkpoint_with_statistics_of_clean_images(run, small_cifar):
    latest = evaluate_run(run, dataset=small_cifar, parts=RIDGE)
    step = latest["checkpoint"]["step"]
    by_number = evaluate_run(run, which=str(step), dataset=small_cifar, parts=RIDGE)
    assert ridge_of(by_number) == ridge_of(latest)
    shutil.rmtree(run / "encoder")  # as of a run that is not finished
    assert ridge_of(evaluate_run(run, dataset=small_cifar, parts=RIDGE)) == ridge_of(latest)


def test_best_is_the_kept_step_of_the_best_validation_accuracy(run, small_cifar):
    rows = read_metrics(run / "metrics.jsonl")
    accs = {row["step"]: row["val/online_probe_acc"] for row in rows}
    result = evaluate_run(run, which="best", dataset=small_cifar, parts=RIDGE)
    assert accs[result["checkpoint"]["step"]] == max(accs.values())
    assert result["checkpoint"]["which"] == "best"


def test_another_dataset_has_a_file_and_no_online_probe(run, small_cifar):
    before = (run / "evaluation.json").read_text()
    other = from_arrays(small_cifar.train_images, 9 - small_cifar.train_labels, name="other/one")
    result = evaluate_run(run, dataset=other, parts=RIDGE)
    assert read_json(run / "evaluation_other_one.json") == result
    assert (run / "evaluation.json").read_text() == before
    assert set(result["probes"]) == {"ridge"} and ridge_of(result)["untrained"]


def test_a_dataset_given_in_python_has_to_be_given_again(run):
    with pytest.raises(DataError, match="was trained on 'arrays', a dataset given in Python"):
        evaluate_run(run)


def test_other_arrays_are_another_dataset_whatever_their_name(run, small_cifar):
    fewer = from_arrays(small_cifar.train_images[:200], small_cifar.train_labels[:200])
    assert fewer.name == small_cifar.name
    result = evaluate_run(run, dataset=fewer, parts=RIDGE)
    assert (run / "evaluation_arrays.json").exists() and "online" not in result["probes"]
    assert result["dataset"]["num_val"] == 40


def test_a_run_of_fewer_images_is_judged_on_its_own(tiny_config, small_cifar, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.data.num_train, config.optim.epochs, config.optim.warmup_epochs = 250, 1.0, 0.0
    state = train_and_evaluate(config, tmp_path, dataset=small_cifar)
    assert int(state.step) == 2  # of 100 images each
    trained = read_json(tmp_path / "evaluation.json")
    fewer = small_cifar.with_num_train(250)
    for dataset in (small_cifar, fewer):
        result = evaluate_run(tmp_path, dataset=dataset, parts=RIDGE)
        assert result["dataset"]["num_train"] == 250 - config.data.num_val
        assert ridge_of(result) == ridge_of(trained)


def test_the_runs_own_images_without_their_labels_have_health_alone(run, small_cifar):
    unlabelled = from_arrays(small_cifar.train_images)
    result = evaluate_run(run, dataset=unlabelled, parts=("health", "ridge"))
    assert result["probes"] == {} and result["health"]["encoder"]["z"]["dim"] == 8


def test_a_folder_that_cannot_be_written_is_one_line(run, small_cifar):
    (run / "evaluation.json").unlink()
    (run / "evaluation.json").mkdir()
    with pytest.raises(CheckpointError, match="evaluation.json cannot be written"):
        evaluate_run(run, dataset=small_cifar, parts=("health",))


def test_imported_weights_are_judged_as_they_came(tmp_path, small_cifar, request):
    fixture = request.path.parent / "fixtures" / "torch_eb_jepa.pth"
    folder = tmp_path / "imported"
    api.save_import(import_torch(fixture), folder)
    with pytest.raises(ConfigError, match="--dataset says what to judge them on"):
        evaluate_run(folder)
    with pytest.raises(CheckpointError, match="no checkpoints, so no 'best'"):
        evaluate_run(folder, which="best", dataset=small_cifar)
    result = evaluate_run(folder, dataset=small_cifar, parts=RIDGE)
    assert result["checkpoint"] == {"which": "latest", "step": None}
    assert ridge_of(result)["untrained"] is not None and "online_gap" not in result


def test_an_encoder_of_ones_own_is_asked_for(tiny_config, small_cifar, tmp_path):
    def apply(variables, images, train):
        h = jnp.mean(images, axis=(1, 2)) * variables["params"]["w"][None, :]
        return (h, h), {}

    mine = ModelFns(lambda key, images: {"params": {"w": jnp.ones(3)}}, apply)
    config = tiny_config.copy_and_resolve_references()
    config.optim.lr = 1e-4
    train_and_evaluate(config, tmp_path / "run", dataset=small_cifar, encoder=mine)
    with pytest.raises(CheckpointError, match="an encoder of its own, .*: pass it in Python"):
        evaluate_run(tmp_path / "run", dataset=small_cifar)
    at_the_end = ridge_of(read_json(tmp_path / "run" / "evaluation.json"))
    result = evaluate_run(tmp_path / "run", dataset=small_cifar, encoder=mine, parts=RIDGE)
    assert ridge_of(result)["untrained"] == at_the_end["untrained"]


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_the_file(run, small_cifar, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_own_dataset", lambda *args, **options: small_cifar)
    evaluate.main([f"--workdir={run}"])
    printed = capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    score = result["probes"]["linear"]["encoder"]["test"]
    shown = f"{100 * score['acc']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    row = next(line for line in printed.splitlines() if line.startswith("linear, logistic"))
    assert shown in row and row.endswith("10.0")
    for words in ("20 nearest neighbours", "10 labels a class", "RankMe", "airplane", "online "):
        assert words in printed
    assert "test images are only scored" in printed


def test_many_classes_are_left_to_the_file(run, monkeypatch, capsys):
    labels = np.arange(400) % 40
    images = np.zeros((400, 32, 32, 3), np.uint8)
    result = evaluate_run(run, dataset=from_arrays(images, labels, name="many"), parts=RIDGE)
    evaluate.print_evaluation(result)
    assert "taken for" not in capsys.readouterr().out and len(result["confusion"]) == 40


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workdir=nowhere"], "nowhere holds no run: config.json is missing"),
        (["--workdir={run}", "--checkpoint=7"], "no checkpoint '7': there are latest, best and "),
        (["--workdir={run}", "--augmented_epochs=-1"], "--augmented_epochs must be 0 or more"),
        ([], "--workdir"),
        (["--workdir={run}", "--dataset=no_such_set"], "no_such_set"),
    ],
)
def test_what_a_person_can_mend_is_one_line(arguments, complaint, finished, capsys, monkeypatch):
    monkeypatch.setenv("EBJEPA_DSETS", str(finished.parent / "datasets"))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([argument.format(run=finished) for argument in arguments])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert complaint in printed.err and printed.err.count("\n") == 1
