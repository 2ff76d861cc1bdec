"""The host loop: resuming, stopping, refusing, and the seams for a user's own parts."""

import itertools
import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jepa_jax
from jepa_jax import checkpoint, device, loop, plan, runner, train
from jepa_jax.augment import resized_crop, to_float
from jepa_jax.config import create_encoder, validate
from jepa_jax.data import from_arrays
from jepa_jax.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from jepa_jax.metrics import read_metrics
from jepa_jax.models import ModelFns, linen_model, patch_whitening_kernel
from jepa_jax.optim import warmup_cosine
from jepa_jax.representation import split_validation
from jepa_jax.train_step import probe_logits, stream_key, vicreg

STEPS_PER_EPOCH = 4


def train_tiny(config, workdir, dataset, overrides=None, **options):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides or {})
    state = train.train_and_evaluate(config, workdir, dataset=dataset, **options)
    return jax.device_get(state), workdir


@pytest.fixture
def run(tiny_config, small_cifar, tmp_path):
    """Trains the tiny config in a folder below tmp_path; returns the state and the folder."""

    def call(folder="run", dataset=small_cifar, overrides=None, **options):
        return train_tiny(tiny_config, tmp_path / folder, dataset, overrides, **options)

    return call


@pytest.fixture(scope="module", params=[1, 3], ids=["loop", "scan"])
def scan_steps(request):
    return request.param


@pytest.fixture(scope="module")
def whole_runs(tiny_config, small_cifar, tmp_path_factory):
    """The uninterrupted run: scan_steps -> (state, folder), looped and scanned in pieces of 2."""
    return {
        scan_steps: train_tiny(
            tiny_config,
            tmp_path_factory.mktemp("whole") / "run",
            small_cifar,
            {"training.scan_steps": scan_steps},
        )
        for scan_steps in (1, 3)
    }


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def rows_without_times(workdir):
    timed = ("images_per_second", "train_seconds", "total_seconds")
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def assert_same_state(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def signal_after(monkeypatch, step, number=signal.SIGTERM):
    """Delivers a signal to this process right after the dispatch of that many steps."""
    original = runner.Runner.run
    done = 0

    def interrupted(self, *arguments):
        nonlocal done
        for item in original(self, *arguments):
            before, done = done, done + item[2]
            if before < step <= done:
                signal.raise_signal(number)
            yield item

    monkeypatch.setattr(runner.Runner, "run", interrupted)


def test_a_run_leaves_its_numbers(whole_runs, tiny_config):
    state, workdir = whole_runs[1]
    summary = summary_of(workdir)
    for name in ("ridge_probe_acc", "untrained_ridge_probe_acc", "online_probe_acc"):
        assert 0 <= summary[name] <= 1 and 0 <= summary[f"val_{name}"] <= 1
    assert summary["feature_dim"] == 8 and summary["seed"] == tiny_config.meta.seed
    assert summary["steps"] == int(state.step) == 12 and summary["schema_version"] == 1
    assert summary["params_digest"] == train.params_digest(state.params)
    assert summary["total_seconds"] >= summary["clock_seconds"] > summary["train_seconds"] > 0
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    wanted = {"loss", "invariance_loss", "var_loss", "cov_loss", "lr", "probe_loss", "probe_acc"}
    assert {f"train/{name}" for name in wanted} <= rows[0].keys()
    assert {"val/online_probe_acc", "test/online_probe_acc", "images_per_second"} <= rows[0].keys()
    loss = rows[0]["train/invariance_loss"] + rows[0]["train/var_loss"]
    loss += tiny_config.loss.cov_coeff * rows[0]["train/cov_loss"]
    assert rows[0]["train/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_leaves_what_its_watch_saw_and_where_the_time_went(whole_runs):
    _, workdir = whole_runs[1]
    for row in read_metrics(workdir / "metrics.jsonl"):
        for name in ("h", "z"):
            assert 1 <= row[f"watch/{name}_rank_me"] <= 8.001
            assert 0 < row[f"watch/{name}_std_min"] <= row[f"watch/{name}_std_mean"]
            assert len(row[f"watch/{name}_spectrum"]) == 8
        for term in ("invariance_loss", "var_loss", "cov_loss"):
            assert row[f"watch/grad_norm/{term}"] > 0
        assert row["watch/collapse"] is None
    summary = summary_of(workdir)
    assert summary["collapse"] is None
    assert sum(summary["seconds"].values()) == pytest.approx(summary["total_seconds"], abs=0.1)
    assert summary["seconds"]["training"] == pytest.approx(summary["train_seconds"], abs=0.1)


def test_the_seconds_of_a_resumed_run_include_those_before(run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(Interrupted):
            run()
    _, workdir = run()
    summary = summary_of(workdir)
    assert summary["seconds"]["training"] == pytest.approx(summary["train_seconds"], abs=0.1)


def test_the_header_says_how_the_loss_is_balanced(run, capsys):
    run(overrides={"loss.cov_coeff": 0.28})
    assert "balance 1 : 1 : 0.04 (the paper's is 1 : 1 : 0.04)" in capsys.readouterr().out
    run("rapid", overrides={"loss.std_coeff": 25.0, "loss.cov_coeff": 0.001})
    printed = capsys.readouterr().out
    assert "variance is 25 times too strong and covariance is 280 times too weak" in printed
    assert "--config.loss.std_coeff=1 --config.loss.cov_coeff=0.28" in printed


@pytest.mark.parametrize("step", [4, 6])
def test_an_interrupted_run_ends_in_the_same_bits(run, whole_runs, monkeypatch, step, scan_steps):
    """Stopped at an epoch's end (4) or in its middle (6)."""
    overrides = {"training.scan_steps": scan_steps}
    whole, whole_dir = whole_runs[scan_steps]
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 12") as stopped:
            run("halves", overrides=overrides)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    resumed, resumed_dir = run("halves", overrides=overrides)
    assert_same_state(whole, resumed)
    assert rows_without_times(whole_dir) == rows_without_times(resumed_dir)
    digests = [summary_of(folder)["params_digest"] for folder in (whole_dir, resumed_dir)]
    assert digests[0] == digests[1]


def test_a_second_signal_does_not_wait(run, monkeypatch, tmp_path):
    signal_after(monkeypatch, 2, signal.SIGINT)
    monkeypatch.setattr(
        loop, "_finish_epoch", lambda *args: pytest.fail("the epoch should not be finished")
    )
    original = checkpoint.Checkpoints.save

    def save(self, *args):
        original(self, *args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    with pytest.raises(Interrupted, match="interrupted; the same command"):
        run()


def test_a_signal_during_the_last_save_is_not_lost(run, whole_runs, monkeypatch):
    original = checkpoint.Checkpoints.wait

    def wait(self):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(checkpoint.Checkpoints, "wait", original)
        original(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    with pytest.raises(Interrupted, match="stopped at step 12 of 12 and saved it"):
        run()
    assert_same_state(run()[0], whole_runs[1][0])


def test_scanned_equals_looped(whole_runs):
    """The path that accelerators use, forced, follows the loop to rounding."""
    (_, looped), (_, scanned) = whole_runs[1], whole_runs[3]
    # Twelve steps multiply the last bit in which the two programs differ: 1e-4 on some processors.
    for one, other in zip(rows_without_times(looped), rows_without_times(scanned), strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


def test_streamed_equals_resident_bit_for_bit(run, whole_runs):
    resident, _ = whole_runs[1]
    streamed, _ = run("streamed", overrides={"data.placement": "stream"})
    assert_same_state(resident, streamed)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(run, whole_runs):
    first, _ = whole_runs[1]
    second, _ = run("again")
    other, _ = run("other", overrides={"meta.seed": 1})
    assert_same_state(first, second)
    assert train.params_digest(first.params) != train.params_digest(other.params)


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    first, workdir = run()
    before = summary_of(workdir)
    monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("it trained again"))
    second, _ = run()
    assert_same_state(first, second)
    assert summary_of(workdir) == before


def test_an_evaluation_cut_short_is_done_on_the_next_call(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_representation", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    _, workdir = run()
    assert summary_of(workdir)["steps"] == 12


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.lr", 0.1), ("meta.seed", 7), ("model.width", 8), ("optim.epochs", 9)],
)
def test_a_changed_config_is_refused_with_its_key(tiny_config, small_cifar, whole_runs, key, value):
    _, workdir = whole_runs[1]
    with pytest.raises(CheckpointError, match=rf"{key}: .* -> {value}.*--init_from=") as refused:
        train_tiny(tiny_config, workdir, small_cifar, {"training.scan_steps": 1, key: value})
    assert "\n" not in str(refused.value)


def test_a_changed_dataset_is_refused(tiny_config, cifar_arrays, whole_runs):
    fewer = from_arrays(cifar_arrays["train_images"][:300], cifar_arrays["train_labels"][:300])
    with pytest.raises(CheckpointError, match="num_train: 400 -> 300"):
        train_tiny(tiny_config, whole_runs[1][1], fewer, {"training.scan_steps": 1})


def test_what_changes_nothing_learnt_may_change_on_resume(run, whole_runs, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(Interrupted):
            run()
    state, _ = run(overrides={"logging.save_every": 2, "data.placement": "stream"})
    assert_same_state(whole_runs[1][0], state)


def test_init_from_starts_from_another_runs_parameters(run, whole_runs, monkeypatch, tmp_path):
    source, workdir = whole_runs[1]
    seen = []
    original = loop.train
    monkeypatch.setattr(
        loop,
        "train",
        lambda plan, state, *rest: (
            seen.append(jax.device_get(state)),
            original(plan, state, *rest),
        )[1],
    )
    run("target", init_from=str(workdir), overrides={"optim.lr": 0.1})
    jax.tree.map(np.testing.assert_array_equal, seen[0].params, jax.device_get(source.params))
    assert seen[0].step == 0
    with pytest.raises(CheckpointError, match=r"another model.*params"):
        run("wider", init_from=str(workdir), overrides={"model.width": 8})
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run("nothing", init_from=str(tmp_path / "absent"))


def test_a_loss_that_diverges_names_step_and_term(run):
    def explodes(key, z1, z2, hparams):
        bad = jnp.where(jnp.mean(z1) > -jnp.inf, jnp.nan, 0.0)
        loss, terms = vicreg(key, z1, z2, hparams)
        return loss + bad, {**terms, "extra_loss": bad}

    with pytest.raises(TrainingError, match="extra_loss became nan at step 0"):
        run("bad", loss_fn=explodes)


def test_divergence_leaves_the_last_good_checkpoint(run, monkeypatch, tmp_path):
    original = runner.Runner.run
    done = 0

    def poisoned(self, *arguments):
        nonlocal done
        for newest, metrics, count in original(self, *arguments):
            done += count
            if done == 7:
                metrics = {**metrics, "cov_loss": jnp.float32(jnp.inf)}
            yield newest, metrics, count

    monkeypatch.setattr(runner.Runner, "run", poisoned)
    with pytest.raises(TrainingError, match="cov_loss became inf at step 6"):
        run()
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", read_only=True)
    assert checkpoints.latest_step() == STEPS_PER_EPOCH
    checkpoints.close()


def test_the_path_of_accelerators_runs_in_bfloat16(run):
    """rapid's own: scanned, in bfloat16; what is kept stays float32."""
    overrides = {"training.scan_steps": 3, "training.use_amp": True}
    # Flax's own BatchNorm mixes dtypes in bfloat16, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        state, workdir = run(overrides=overrides)
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    assert {leaf.dtype for leaf in leaves} <= {np.dtype("float32"), np.dtype("int32")}
    assert np.isfinite(read_metrics(workdir / "metrics.jsonl")[-1]["train/loss"])


def test_a_profile_leaves_a_trace_and_the_run_as_it_is(whole_runs, run, capsys):
    state, workdir = run(profile=True)
    assert_same_state(state, whole_runs[1][0])
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    out = capsys.readouterr().out
    assert f"{workdir / 'profile'}: 5 steps" in out
    assert out.count("first step ") == 1


def test_a_run_that_is_too_short_for_a_profile_says_so(run, capsys):
    _, workdir = run(overrides={"training.scan_steps": 4, "optim.epochs": 2}, profile=True)
    assert "too short for a profile" in capsys.readouterr().out
    assert not list(workdir.glob("*profile*"))


def test_a_run_that_goes_on_elsewhere_says_where(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(Interrupted):
            run()
    here = plan.describe_environment()
    there = {**here, "jax": "9.9.9", "command": "another", "JAX_COMPILATION_CACHE_DIR": "x"}
    capsys.readouterr()
    monkeypatch.setattr(plan, "describe_environment", lambda: there)
    _, workdir = run()
    assert f"conditions: jax was {jax.__version__} and is 9.9.9\n" in capsys.readouterr().out
    monkeypatch.setattr(plan, "describe_environment", lambda: here)
    run()  # it is finished: nothing goes on
    assert "conditions" not in capsys.readouterr().out
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["environment"] == here and stored["continued_in"] == [there]


def test_a_resumed_epoch_reports_its_true_speed(run, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 7)
        with pytest.raises(Interrupted):
            run()
    _, workdir = run()
    first, second, third = read_metrics(workdir / "metrics.jsonl")
    assert second["images_per_second"] == pytest.approx(
        400 / (second["train_seconds"] - first["train_seconds"])
    )


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"wide_loss": jnp.zeros(3)}, r"wide_loss has shape \(3,\)"),
        ({"lr": jnp.zeros(())}, "may not call a term 'lr'"),
    ],
)
def test_a_loss_that_returns_the_wrong_thing_is_told_so(run, terms, message):
    with pytest.raises(ValueError, match=message):
        run(loss_fn=lambda key, z1, z2, hparams: (jnp.mean(z1), terms))


def test_data_larger_than_the_device_is_refused_before_it_is_sent(run, monkeypatch):
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    with pytest.raises(ConfigError, match="use config.data.placement=stream"):
        run(overrides={"data.placement": "device"})


def test_early_stopping_reads_validation_only(run, monkeypatch):
    val_accs = iter([0.5, 0.4, 0.3])

    def measured(plan, state):
        return {
            "val/online_probe_acc": next(val_accs, 0.0),
            "test/online_probe_acc": float(state.step) / 100,
        }

    monkeypatch.setattr(loop, "online_probe", measured)
    monkeypatch.setattr(train, "online_probe", measured)
    state, workdir = run(overrides={"training.early_stop_epochs": 1})
    assert int(state.step) == 2 * STEPS_PER_EPOCH
    assert summary_of(workdir)["epochs"] == 2


class Flat(nn.Module):
    """An encoder that is nobody's ResNet."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        return nn.BatchNorm(use_running_average=not train)(x)


class Pair(nn.Module):
    """A whole model: h and z."""

    @nn.compact
    def __call__(self, x, train):
        h = Flat()(x, train)
        return h, nn.Dense(5)(h)


def invariance_only(key, z1, z2, hparams):
    loss = hparams.sim_coeff * jnp.mean(jnp.square(z1 - z2))
    return loss, {"pull_loss": loss}


def flips(key, images):
    images = images.astype(jnp.float32) / 255.0
    return images, images[:, :, ::-1]


def test_the_size_of_views_is_left_to_an_augmentation_of_ones_own(run):
    """Training, the stem's patches and the online probe are what they are without the key."""
    plain, plain_dir = run("plain", augment_fn=flips)
    sized, sized_dir = run("sized", augment_fn=flips, overrides={"data.view_size": 16})
    assert_same_state(sized, plain)
    assert rows_without_times(sized_dir) == rows_without_times(plain_dir)


@pytest.mark.parametrize("encoder", [Flat(), linen_model(Pair())], ids=["linen", "functions"])
def test_a_users_own_parts_train_and_load(run, cifar_arrays, encoder):
    state, workdir = run(encoder=encoder, loss_fn=invariance_only, augment_fn=flips)
    assert "train/pull_loss" in read_metrics(workdir / "metrics.jsonl")[0]
    assert summary_of(workdir)["feature_dim"] == 6
    with pytest.raises(CheckpointError, match="encoder of its own"):
        jepa_jax.load_encoder(workdir)
    loaded, variables = jepa_jax.load_encoder(workdir, encoder=encoder)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], state.params)
    assert loaded.apply(variables, cifar_arrays["test_images"][:3]).shape == (3, 6)


def test_a_run_is_not_resumed_with_another_loss(tiny_config, small_cifar, whole_runs):
    with pytest.raises(CheckpointError, match=r"custom.loss_fn: None -> .*invariance_only"):
        train_tiny(
            tiny_config,
            whole_runs[1][1],
            small_cifar,
            {"training.scan_steps": 1},
            loss_fn=invariance_only,
        )


def test_without_labels_there_are_no_probes(run, cifar_arrays):
    state, workdir = run(dataset=from_arrays(cifar_arrays["train_images"]))
    assert int(state.step) == 12
    rows = read_metrics(workdir / "metrics.jsonl")
    assert len(rows) == 3 and not [key for row in rows for key in row if "acc" in key]
    assert "ridge_probe_acc" not in summary_of(workdir)


def test_without_a_test_split_validation_remains(run, cifar_arrays):
    dataset = from_arrays(cifar_arrays["train_images"], cifar_arrays["train_labels"])
    _, workdir = run(dataset=dataset)
    summary = summary_of(workdir)
    assert summary["ridge_probe_acc"] is None and 0 < summary["val_ridge_probe_acc"] <= 1


def test_validation_labels_never_reach_training(run, monkeypatch, small_cifar):
    seen = []
    original = runner.Runner.__init__

    def spy(self, train_step, state, hparams, images, labels, **options):
        seen.append(labels)
        original(self, train_step, state, hparams, images, labels, **options)

    monkeypatch.setattr(runner.Runner, "__init__", spy)
    run()
    train_rows, val_rows = split_validation(small_cifar, 80)
    assert (seen[0][val_rows] == -1).all()
    np.testing.assert_array_equal(seen[0][train_rows], small_cifar.train_labels[train_rows])


def test_the_loaded_encoder_gives_what_the_probe_saw(run, cifar_arrays, small_cifar, monkeypatch):
    seen = []
    original = train.evaluate_representation
    monkeypatch.setattr(
        train,
        "evaluate_representation",
        lambda apply, variables, *args, **options: (
            seen.append(variables),
            original(apply, variables, *args, **options),
        )[1],
    )
    _, workdir = run()
    encoder, variables = jepa_jax.load_encoder(workdir)
    jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(seen[0]))
    images = cifar_arrays["test_images"][:5]
    np.testing.assert_allclose(
        encoder.apply(variables, images),
        encoder.apply(variables, images.astype(np.float32) / 255),
        rtol=1e-5,
    )


def test_the_whitening_stem_is_part_of_the_untrained_network(run, monkeypatch):
    plans = []
    original = train.initial_state
    monkeypatch.setattr(
        train, "initial_state", lambda plan: (plans.append(plan), original(plan))[1]
    )
    run()
    state = original(plans[0])
    kernel = state.params["encoder"]["stem_conv"]["kernel"]
    np.testing.assert_allclose(kernel[..., :2], -kernel[..., 2:], rtol=1e-6)
    # What a later evaluation takes for untrained, without a plan.
    config, images = plans[0].config, plans[0].dataset.train_images
    again = plan.untrained_variables(plans[0].encoder, config, images)
    jax.tree.map(np.testing.assert_array_equal, again["params"], state.params)


def test_a_stem_with_more_filters_than_eigenvectors_keeps_random_ones(tiny_config, small_cifar):
    kernels = {}
    for stem_init in ("whitening", "random"):
        config = tiny_config.copy_and_resolve_references()
        config.model.update(width=56, stage_sizes=(1,), stem_init=stem_init)
        validate(config)
        encoder = create_encoder(config)
        variables = plan.untrained_variables(encoder, config, small_cifar.train_images)
        kernels[stem_init] = np.asarray(variables["params"]["encoder"]["stem_conv"]["kernel"])
    # Each of the 3 * 3 * 3 eigenvectors with both signs.
    first = kernels["whitening"][..., :27]
    np.testing.assert_array_equal(kernels["whitening"][..., 27:54], -first)
    directions = first.reshape(27, 27) / np.linalg.norm(first.reshape(27, 27), axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(27), atol=1e-5)
    np.testing.assert_array_equal(kernels["whitening"][..., 54:], kernels["random"][..., 54:])


def test_an_augmentation_of_ones_own_makes_as_many_views_as_the_config_says(run):
    with pytest.raises(ConfigError, match=r"makes 2 views of an image; .*num_views is 4"):
        run(augment_fn=flips, overrides={"data.num_views": 4})

    def two_pairs(key, images):
        return flips(key, jnp.concatenate([images, images]))

    with pytest.raises(ConfigError, match=r"makes 4 views of an image; .*num_views is 2"):
        run(augment_fn=two_pairs)
    plain, _ = run("plain", augment_fn=flips, loss_fn=invariance_only)
    state, _ = run(augment_fn=two_pairs, loss_fn=invariance_only, overrides={"data.num_views": 4})
    assert int(state.step) == int(plain.step)


CROPS = {"data.num_local_crops": 2, "data.local_size": 8}


def test_an_augmentation_of_ones_own_makes_as_many_local_crops_as_the_config_says(run):
    with pytest.raises(ConfigError, match=r"makes 0 local crops of an image; .*local_crops is 2"):
        run(augment_fn=flips, overrides=CROPS)

    def with_crops(key, images):
        x1, x2 = flips(key, images)
        return x1, x2, jnp.repeat(x1[:, :8, :8], 2, axis=0)

    with pytest.raises(ConfigError, match=r"makes 2 local crops of an image; .*local_crops is 0"):
        run(augment_fn=with_crops)


def test_an_encoder_that_does_not_take_crops_is_one_line(run):
    class Dense(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return nn.Dense(8)(images.reshape(len(images), -1))

    with pytest.raises(ConfigError, match=r"no local crops of 8x8 pixels.*local_size: .*Dense_0"):
        run(encoder=Dense(), overrides=CROPS)


def test_local_crops_are_drawn_paired_and_evaluated(run, monkeypatch, capsys):
    """The first step's loss is the mean over every view with every other view, a crop among them.

    A user's own loss is one of two views still.
    """
    plans, original = [], train.make_plan
    monkeypatch.setattr(train, "make_plan", lambda *args: plans.append(original(*args)) or plans[0])
    one_step = {"optim.epochs": 0.25, "optim.warmup_epochs": 0.0}
    _, workdir = run(loss_fn=invariance_only, overrides={**CROPS, **one_step})
    assert "batch 100 of 2 views and 2 local crops each" in capsys.readouterr().out

    images = plans[0].dataset.train_images[plans[0].batches_of(0)[0]]
    state, encoder = plan.initial_state(plans[0]), plans[0].encoder
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    views = plans[0].augment_fn(stream_key(plans[0].hparams.seed, "views"), images)
    assert [view.shape for view in views] == [(100, 32, 32, 3)] * 2 + [(200, 8, 8, 3)]
    z1, z2, crops = (
        np.asarray(encoder.model.apply(variables, encoder.normalize(view), True)[0][1])
        for view in views
    )
    globals_, crops = [z1, z2], [crops[::2], crops[1::2]]
    pairs = [(z1, z2), (z2, z1), *itertools.product(globals_, crops)]
    wanted = np.mean([np.mean((a - b) ** 2) for a, b in pairs])
    found = read_metrics(workdir / "metrics.jsonl")[0]["train/loss"]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_four_views_of_an_image_are_drawn_pulled_together_and_evaluated(run, monkeypatch, capsys):
    plans, original = [], train.make_plan
    monkeypatch.setattr(train, "make_plan", lambda *args: plans.append(original(*args)) or plans[0])
    one_step = {"optim.epochs": 0.25, "optim.warmup_epochs": 0.0}
    _, workdir = run(overrides={"data.num_views": 4, **one_step})
    assert "batch 100 of 4 views each" in capsys.readouterr().out
    assert summary_of(workdir)["steps"] == 1

    images = plans[0].dataset.train_images[plans[0].batches_of(0)[0]]
    state, encoder = plan.initial_state(plans[0]), plans[0].encoder
    variables, embedded = {"params": state.params, "batch_stats": state.batch_stats}, []
    for view in plans[0].augment_fn(stream_key(plans[0].hparams.seed, "views"), images):
        assert len(view) == 200
        (_, z), _ = encoder.model.apply(variables, encoder.normalize(view), True)
        embedded += np.split(np.asarray(z), 2)
    wanted = np.mean([np.mean((a - b) ** 2) for a, b in itertools.combinations(embedded, 2)])
    found = read_metrics(workdir / "metrics.jsonl")[0]["train/invariance_loss"]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_views_of_another_size_are_what_training_and_its_online_probe_see(run, monkeypatch):
    """The step and the online probe see 16 pixels; the ridge probe sees whole images."""
    plans, original = [], train.make_plan
    monkeypatch.setattr(train, "make_plan", lambda *args: plans.append(original(*args)) or plans[0])
    overrides = {"data.view_size": 16, "model.stem_stride": 1}
    state, workdir = run(overrides=overrides)
    dataset, encoder = plans[0].dataset, plans[0].encoder
    views = plans[0].augment_fn(jax.random.key(0), dataset.train_images[:3])
    assert [view.shape for view in views] == [(3, 16, 16, 3)] * 2

    whole = to_float(dataset.test_images)
    small = jax.vmap(lambda image: resized_crop(image, 0, 0, 32, 32, 16))(whole)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = probe_logits(state.probe.params, encoder.apply(variables, small))
    hits = np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(dataset.test_labels))
    found = read_metrics(workdir / "metrics.jsonl")[-1]["test/online_probe_acc"]
    assert found == pytest.approx(hits, abs=1.5 / len(whole))  # a tie may fall either way

    # The stem's patches are those of small images too.
    kernel = plan.initial_state(plans[0]).params["encoder"]["stem_conv"]["kernel"]
    clean = to_float(plan.clean_images(dataset.train_images))
    clean = jax.vmap(lambda image: resized_crop(image, 0, 0, 32, 32, 16))(clean)
    expected = patch_whitening_kernel(encoder.normalize(clean), kernel.shape[-1])
    # The first filter alone: the next two have nearly the same eigenvalue.
    first, wanted = np.asarray(kernel)[..., 0], np.asarray(expected)[..., 0]
    np.testing.assert_allclose(np.abs(first), np.abs(wanted), rtol=1e-2)
    again = plan.untrained_variables(encoder, plans[0].config, dataset.train_images)
    np.testing.assert_array_equal(again["params"]["encoder"]["stem_conv"]["kernel"], kernel)


def test_one_compilation_per_run(run, monkeypatch):
    """Nothing compiles after the first epoch, and the step itself is traced once."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **kwargs: (
            compiled.append(event) if "backend_compile" in event else 0
        )
    )
    counts, traces = [], []
    original_write, original_make = loop.MetricsWriter.write, loop.make_train_step
    monkeypatch.setattr(
        loop.MetricsWriter,
        "write",
        lambda self, row: (counts.append(len(compiled)), original_write(self, row)),
    )

    def counting(*args, **options):
        step = original_make(*args, **options)
        return lambda *inputs: (traces.append(1), step(*inputs))[1]

    monkeypatch.setattr(loop, "make_train_step", counting)
    run(overrides={"training.scan_steps": 1})
    assert counts[0] > 0 and counts[0] == counts[-1] and len(counts) == 3
    assert len(traces) == 1


def test_no_implicit_transfer_inside_an_epoch(run, monkeypatch, scan_steps):
    original = loop._train_epoch

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return original(*args)

    monkeypatch.setattr(loop, "_train_epoch", guarded)
    run(overrides={"training.scan_steps": scan_steps})
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        jnp.add(jnp.float32(1), np.ones(3, np.float32))  # the guard does guard


def test_a_model_that_does_not_fit_is_refused_with_a_batch_that_does(run, monkeypatch):
    monkeypatch.setattr(device, "memory_limit", lambda: 4 * 2**20)
    with pytest.raises(ConfigError, match=r"batch_size=100 needs .* GiB.*batch_size=\d+ fits"):
        run(overrides={"data.placement": "device"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.batch_size": 401}, "batch_size .401. is larger than the 400 training images"),
        ({"data.num_val": 400}, "num_val .400. leaves none of the 400"),
        ({"data.num_train": 401}, "num_train .401. is more than the 400 training images"),
        ({"data.num_train": 80, "data.batch_size": 50}, "num_val .80. leaves none of the 80"),
        ({"optim.warmup_epochs": 4.0}, "warmup_epochs .4. is longer than"),
        (
            {"data.placement": "stream", "training.scan_steps": 3},
            "scan_steps > 1 needs config.data.placement=device",
        ),
    ],
)
def test_impossible_combinations_are_refused(run, overrides, message):
    with pytest.raises(ConfigError, match=message) as refused:
        run(overrides=overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["flip_prob", "blur_prob"])
def test_the_configs_strengths_make_the_views(run, name):
    """With every chance at 0 and the whole image as the crop, both views are the image."""
    chances = ("jitter_prob", "grayscale_prob", "solarize_prob", "flip_prob", "blur_prob")
    weak = {"augment.scale": (1.0, 1.0), **{f"augment.{chance}": 0.0 for chance in chances}}
    for probability in (0.0, 0.5):
        overrides = {**weak, f"augment.{name}": probability, "optim.epochs": 1.0}
        _, workdir = run(f"{name}{probability}", overrides=overrides)
        row = read_metrics(workdir / "metrics.jsonl")[0]
        assert (row["train/invariance_loss"] < 1e-10) == (probability == 0)


def test_warmup_as_long_as_training_is_legal(run):
    state, _ = run(overrides={"optim.warmup_epochs": 3.0})
    assert int(state.step) == 12


@pytest.mark.parametrize("scan_steps", [1, 4])
def test_a_run_may_end_within_an_epoch_and_resumes_there(run, monkeypatch, scan_steps):
    overrides = {"optim.epochs": 2.5, "training.scan_steps": scan_steps}
    whole, workdir = run(overrides=overrides)
    assert int(whole.step) == 10
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 1), (8, 2), (10, 2.5)]
    assert summary_of(workdir)["epochs"] == 2.5
    # The schedule ends with the run: its last rate is the one a step before the cosine's end.
    last = warmup_cosine(9, peak=0.3, num_steps=10, warmup_steps=4, start=3e-5)
    assert rows[-1]["train/lr"] == pytest.approx(float(last))
    with monkeypatch.context() as patch:
        signal_after(patch, 9)
        with pytest.raises(Interrupted):
            run("resumed", overrides=overrides)
    assert_same_state(run("resumed", overrides=overrides)[0], whole)


def test_less_than_a_step_is_refused(run):
    with pytest.raises(ConfigError, match=r"epochs \(0.1\) is not one step: .* has 4") as refused:
        run(overrides={"optim.epochs": 0.1, "optim.warmup_epochs": 0.0})
    assert "\n" not in str(refused.value)


def test_a_workdir_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        run("file/run")


def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(
    run, whole_runs, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(Interrupted):
            run()
    for path in (tmp_path / "run" / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:100])
    state, workdir = run()
    printed = capsys.readouterr().out
    assert "checkpoints/6 is damaged" in printed and "going on from step 4" in printed
    assert "resumed   at step 4" in printed
    assert_same_state(state, whole_runs[1][0])
    assert rows_without_times(workdir) == rows_without_times(whole_runs[1][1])


# --- numbers ----------------------------------------------------------------------------------


@jax.custom_vjp
def poisoned(kernel, is_it):
    """The kernel, whose gradient is NaN when `is_it`; nothing else of a step is."""
    del is_it
    return kernel


poisoned.defvjp(
    lambda kernel, is_it: (kernel, is_it),
    lambda is_it, gradient: (jnp.where(is_it, jnp.nan, gradient), jnp.zeros_like(is_it)),
)


def poisoned_model(bad_step):
    """Two layers; the gradient of the second is NaN at a step, which its statistics count."""

    def init(key, images):
        size = images[0].size
        first = jax.random.normal(key, (size, 6)) / size**0.5
        params = {"first": {"kernel": first}, "second": {"kernel": jnp.eye(6)}}
        return {"params": params, "batch_stats": {"calls": jnp.zeros([])}}

    def apply(variables, images, train):
        params, calls = variables["params"], variables["batch_stats"]["calls"]
        h = images.reshape(len(images), -1) @ params["first"]["kernel"]
        z = h @ poisoned(params["second"]["kernel"], (calls == 2 * bad_step).astype(jnp.float32))
        return (h, z), {"calls": calls + np.float32(train)}

    return ModelFns(init, apply)


@pytest.mark.parametrize("scan_steps", [1, 2])
def test_a_nan_in_a_gradient_is_named_with_its_step_and_its_layer(run, tmp_path, scan_steps):
    overrides = {
        "training.scan_steps": scan_steps,
        "optim.lr": 0.01,  # the model has nothing that bounds its gradients
        "loss.cov_coeff": 0.2,
    }
    message = r"grad_norm became nan at step 6 \(the gradient of second/kernel is not finite\)"
    with pytest.raises(TrainingError, match=f"{message}.*on record is step 4") as error:
        run("bad", encoder=poisoned_model(6), overrides=overrides)
    assert "\n" not in str(error.value)
    assert len(read_metrics(tmp_path / "bad" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("scan_steps", [1, 2])
def test_a_nan_in_an_image_is_named_with_its_step(run, scan_steps):
    bad_key = jax.random.key_data(stream_key(np.uint32(0), "views", 6))

    def views(key, images):
        x1, x2 = flips(key, images)
        is_it = jnp.all(jax.random.key_data(key) == bad_key)
        return jnp.where(is_it, jnp.nan, x1), x2

    with pytest.raises(TrainingError, match=r"at step 6 \(a view of an image is not finite\)"):
        run("bad", augment_fn=views, overrides={"training.scan_steps": scan_steps})


def test_back_off_goes_back_halves_the_rate_and_is_the_same_after_a_stop(run, monkeypatch, capsys):
    """The second layer's gradient is spoilt at step 6 as long as the rate is the config's own."""

    def explodes(key, z1, z2, hparams):
        loss, terms = vicreg(key, z1, z2, hparams)
        is_bad = (hparams.lr > 0.2) & jnp.all(jax.random.key_data(key) == bad_key)
        return jnp.where(is_bad, jnp.inf, loss), terms

    bad_key = jax.random.key_data(stream_key(np.uint32(0), "loss", 6))
    options = {"loss_fn": explodes, "overrides": {"training.on_nan": "back_off"}}
    whole, workdir = run("whole", **options)
    printed = capsys.readouterr().out
    assert "loss became inf at step 6" in printed
    assert "back at step 4, with the rate halved to 0.15 (1 of 3)" in printed
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    # The rate of the last step of each epoch: the config's, then half of its.
    rates = [warmup_cosine(n, peak=0.3, num_steps=12, warmup_steps=4, start=3e-5) for n in (7, 11)]
    assert [row["train/lr"] for row in rows[1:]] == pytest.approx(
        [float(rate) / 2 for rate in rates], rel=1e-3
    )
    with monkeypatch.context() as patch:
        signal_after(patch, 12)  # of which 3 were in vain
        with pytest.raises(Interrupted):
            run("halves", **options)
    resumed, _ = run("halves", **options)
    assert_same_state(whole, resumed)


def test_back_off_gives_up_after_three_times(run, capsys):
    def explodes(key, z1, z2, hparams):
        loss, terms = vicreg(key, z1, z2, hparams)
        return loss * jnp.inf, terms

    with pytest.raises(TrainingError, match="at a rate halved 3 times.*no step is on record"):
        run(loss_fn=explodes, overrides={"training.on_nan": "back_off"})
    assert capsys.readouterr().out.count("with the rate halved to") == 3


def test_saves_by_the_clock_change_nothing_of_what_is_learnt(run, whole_runs, monkeypatch):
    """A checkpoint at every step, and a kill that leaves the last of them."""
    steps, original = [], checkpoint.Checkpoints.save

    def save(self, step, *rest):
        steps.append(step)
        original(self, step, *rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    overrides = {"logging.save_every_minutes": 1e-9, "logging.save_every": 10}
    state, workdir = run(overrides=overrides)
    assert steps == list(range(1, 13))
    assert_same_state(state, whole_runs[1][0])
    assert rows_without_times(workdir) == rows_without_times(whole_runs[1][1])


# --- the folder -------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused(run, tmp_path, monkeypatch):
    def second(*arguments):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"):
            run()
        raise TrainingError("enough")

    monkeypatch.setattr(train, "make_plan", second)
    with pytest.raises(TrainingError, match="enough"):
        run()


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_training(
    run, whole_runs, monkeypatch, capsys
):
    def full(self, step, *rest):
        raise checkpoint.NotSavedError("no checkpoint could be written (full)")

    monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
    state, _ = run()
    assert_same_state(state, whole_runs[1][0])
    assert capsys.readouterr().out.count("training goes on, no step is on record") == 3
    signal_after(monkeypatch, 6)
    with pytest.raises(Interrupted, match="step 6 of 12 and could not save it: no step is"):
        run("stopped")
