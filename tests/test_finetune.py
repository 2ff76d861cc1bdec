"""The fine-tuning command: its columns, what chooses, its file, resume and one-line errors."""

import dataclasses
import shutil

import numpy as np
import optax
import pytest

from jepa_jax import api, evaluate, finetune
from jepa_jax.data import from_arrays
from jepa_jax.errors import ConfigError, DataError
from jepa_jax.evaluation import score_of
from jepa_jax.finetune import COLUMNS, finetune_run, over_seeds, steps_for
from jepa_jax.finetuning import Rates, fine_tune
from jepa_jax.interop import import_torch
from jepa_jax.metrics import read_json
from jepa_jax.representation import extract_features
from jepa_jax.train import train_and_evaluate
from jepa_jax.train_step import probe_logits

FEW = {"labels": (0.1,), "num_steps": 2}


@pytest.fixture(scope="module")
def finished(tiny_config, small_cifar, tmp_path_factory):
    """A finished run; for reading alone."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    config = tiny_config.copy_and_resolve_references()
    config.optim.epochs, config.optim.warmup_epochs = 1.0, 0.0
    train_and_evaluate(config, folder, dataset=small_cifar)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_command_prints_every_column_and_writes_the_file(run, small_cifar, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_own_dataset", lambda *args, **options: small_cifar)
    finetune.main([f"--workdir={run}", "--labels=0.1", "--steps=2", "--seeds=2"])
    printed, result = capsys.readouterr().out, read_json(run / "finetune.json")
    for title in (
        *COLUMNS.values(),
        "10 %",
        "over 2 seeds",
        "test images",
        "on 80 others",
    ):
        assert title in printed
    assert [row["labels"] for row in result["rows"]] == [0.1]
    assert 25 <= result["rows"][0]["num_labels"] <= 40
    for row in result["rows"]:
        assert row["seeds"] == [0, 1]
        for name in COLUMNS:
            assert row[name]["val"]["count"] == 80 and row[name]["test"]["count"] == 200
            assert row[name]["test"]["low"] <= row[name]["test"]["acc"] <= row[name]["test"]["high"]
    for trial in result["trials"]:
        assert trial["chance"]["test"]["acc"] == 0.1
    assert result["environment"]["jax"] and result["recipe"]["num_steps"] == 2


def test_val_chooses_and_test_never_does(run, small_cifar, monkeypatch):
    """Another test set changes test/* alone; the choice is the better one on val."""
    first = finetune_run(run, dataset=small_cifar, **FEW)["trials"][0]
    wrong = dataclasses.replace(small_cifar, test_labels=(small_cifar.test_labels + 1) % 10)
    (run / "finetune.json").unlink()
    second = finetune_run(run, dataset=wrong, **FEW)["trials"][0]
    alone = []
    for choice in finetune.CHOICES:
        (run / "finetune.json").unlink()
        monkeypatch.setattr(finetune, "CHOICES", (choice,))
        alone.append(finetune_run(run, dataset=small_cifar, **FEW)["trials"][0])
    for name in ("fine_tuned", "scratch"):
        assert first[name]["val"] == second[name]["val"]
        assert first[name]["rates"] == second[name]["rates"]
        assert first[name]["test"] != second[name]["test"]
        best = max(alone, key=lambda trial, name=name: trial[name]["val"]["acc"])
        assert first[name] == best[name]


def test_both_start_from_probes_and_the_pretrained_one_is_the_frozen_probe(
    run, small_cifar, monkeypatch
):
    """Before the first step the scores are the probe's, exactly."""
    starts = []

    def recorded(key, encoder, variables, head, images, labels, **options):
        h = extract_features(encoder.apply, variables, images)
        starts.append((h, head, labels))
        options["num_steps"] = 0
        return fine_tune(key, encoder, variables, head, images, labels, **options)

    monkeypatch.setattr(finetune, "fine_tune", recorded)
    monkeypatch.setattr(finetune, "CHOICES", finetune.CHOICES[:1])
    trial = finetune_run(run, dataset=small_cifar, **FEW)["trials"][0]
    for split in ("val", "test"):
        assert trial["fine_tuned"][split] == trial["probe"][split]
    assert len(starts) == 2
    for h, head, labels in starts:
        # Fitted to these very images: the fit is better than that of the classes' frequencies.
        losses = optax.softmax_cross_entropy_with_integer_labels(probe_logits(head, h), labels)
        shares = np.bincount(labels) / len(labels)
        assert float(losses.mean()) < -np.sum(shares * np.log(shares)) - 0.05


def test_finished_trials_are_kept_and_another_recipe_begins_anew(run, small_cifar, monkeypatch):
    whole = finetune_run(run, dataset=small_cifar, labels=(1.0, 0.1), num_steps=2)
    assert [row["labels"] for row in whole["rows"]] == [0.1, 1.0]
    assert whole["rows"][1]["num_labels"] == 320
    (run / "finetune.json").unlink()
    with monkeypatch.context() as patch:
        trial = finetune._Bench.trial

        def stopped(self, share, seed):
            if share == 1.0:
                raise KeyboardInterrupt
            return trial(self, share, seed)

        patch.setattr(finetune._Bench, "trial", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetune_run(run, dataset=small_cifar, labels=(0.1, 1.0), num_steps=2)
    assert len(read_json(run / "finetune.json")["trials"]) == 1
    told = []
    options = {"labels": (0.1, 1.0), "num_steps": 2, "on_progress": told.append}
    assert finetune_run(run, dataset=small_cifar, **options)["trials"] == whole["trials"]
    assert told == ["1 of the labels, seed 0"]
    monkeypatch.setattr(finetune, "CHOICES", (Rates(0.0, 0.1),))
    other = finetune_run(run, dataset=small_cifar, **FEW)
    assert len(other["trials"]) == 1 and other["trials"][0]["fine_tuned"]["rates"]["encoder"] == 0


def test_imported_weights_and_another_dataset(tmp_path, small_cifar, request, capsys):
    folder = tmp_path / "imported"
    api.save_import(import_torch(request.path.parent / "fixtures" / "torch_eb_jepa.pth"), folder)
    with pytest.raises(ConfigError, match="--dataset says what to judge them on"):
        finetune_run(folder)
    other = from_arrays(small_cifar.train_images, small_cifar.train_labels, name="other/one")
    result = finetune_run(folder, dataset=other, labels=(0.1,), num_steps=1)
    assert read_json(folder / "finetune_other_one.json") == result
    assert result["rows"][0]["fine_tuned"]["test"] is None
    finetune.print_finetune(result)
    assert "chosen on the same images" in capsys.readouterr().out


def test_no_labels_is_an_error(run, small_cifar):
    with pytest.raises(DataError, match="no labels to fine-tune"):
        finetune_run(run, dataset=from_arrays(small_cifar.train_images))


def test_seeds_have_a_mean_and_a_spread():
    found = over_seeds([score_of(acc, 100) for acc in (0.4, 0.5, 0.6)])
    assert found["acc"] == pytest.approx(0.5) and found["std"] == pytest.approx(0.1)
    # Student's 0.975 quantile of 2 degrees of freedom, from a printed table.
    assert found["high"] - 0.5 == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)
    assert over_seeds([score_of(0.4, 100)]) == score_of(0.4, 100)
    assert over_seeds([None, None]) is None


def test_steps_follow_the_labels_within_bounds():
    assert [steps_for(n) for n in (10, 450, 45_000)] == [50, 70, 1000]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workdir=nowhere"], "nowhere holds no run: config.json is missing"),
        (["--workdir={run}", "--labels=0.1,2"], "--labels must be shares such as 0.01,0.1,1"),
        (["--workdir={run}", "--labels=few"], "--labels must be shares such as 0.01,0.1,1"),
        (["--workdir={run}", "--seeds=0"], "--seeds must be 1 or more"),
        (["--workdir={run}", "--steps=-1"], "--steps must be 0 or more"),
        (["--workdir={run}", "--dataset=no_such_set"], "no_such_set"),
    ],
)
def test_what_a_person_can_mend_is_one_line(arguments, complaint, finished, capsys, monkeypatch):
    monkeypatch.setenv("EBJEPA_DSETS", str(finished.parent / "datasets"))
    with pytest.raises(SystemExit) as exit_:
        finetune.main([argument.format(run=finished) for argument in arguments])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert complaint in printed.err and printed.err.count("\n") == 1
