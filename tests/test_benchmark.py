"""The benchmark: what it times, what it prints, and what it says when it cannot."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import FLAGS

from jepa_jax.benchmark import __main__ as command
from jepa_jax.benchmark import measure, peer, processes, shares, startup, step, sweep, table, timing
from jepa_jax.benchmark.rates import measure_rates
from jepa_jax.config_flags import GivenConfig, given_config
from jepa_jax.errors import ConfigError, TrainingError

# Of ml_collections, when it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

IMAGES = 400


@pytest.fixture
def given(tiny_config) -> GivenConfig:
    return GivenConfig(tiny_config.copy_and_resolve_references(), "configs/cpu.py", {})


@pytest.fixture(autouse=True)
def short_values(monkeypatch):
    monkeypatch.setattr(step, "_SECONDS_OF_VALUE", 0.02)


# --- timing -----------------------------------------------------------------------------------


def test_a_spread_keeps_its_values():
    assert timing.spread([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "n": 3,
        "values": [3.0, 1.0, 2.0],
    }


def test_a_sample_warms_up_repeats_and_stops_when_the_budget_is_spent():
    calls = []

    def work():
        calls.append(0)
        return jnp.zeros(())

    assert len(timing.sample(work, repeats=4, min_seconds=0.0)) == 4
    assert len(calls) == 2 + 4
    assert len(timing.sample(work, repeats=4, min_seconds=0.0, budget_seconds=0.0)) == 1


def test_a_sample_is_the_mean_time_of_one_call(monkeypatch):
    now = 0.0

    def work():
        nonlocal now
        now += 0.03
        return jnp.zeros(())

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    values = timing.sample(work, repeats=2, min_seconds=0.1)
    np.testing.assert_allclose(values, [0.03, 0.03])
    assert now == pytest.approx(0.03 * (2 + 2 * 4))  # 0.1 s takes 4 calls


@pytest.fixture
def device(monkeypatch):
    """A device on which 0.5 s of work pass when it is waited for, not when it is asked for."""

    class Device:
        now = queued = 0.0

        def work(self):
            self.queued += 0.5
            return jnp.zeros(())

        def wait(self, arrays):
            self.now, self.queued = self.now + self.queued, 0.0
            return arrays

    device = Device()
    monkeypatch.setattr(jax, "block_until_ready", device.wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now)
    return device


def test_a_sample_waits_for_the_device(device):
    assert timing.sample(device.work, repeats=3, min_seconds=2.0) == [0.5] * 3
    assert device.queued == 0.0 and device.now == 0.5 * (2 + 3 * 4)


def test_a_timed_step_waits_for_the_device(device):
    class Runner:
        def run(self, state, order):
            for _ in order:
                yield state, {"loss": device.work()}, 1

    loop = step._Loop(Runner(), jnp.zeros(()), np.zeros((4, 2), np.int32))
    assert loop.run(6) == (0.5, 0.0)  # past the order's end
    assert device.queued == 0.0


def test_rates_are_positive_and_spread():
    rates = measure_rates(is_miniature=True)
    for at in rates["matmul"].values():
        assert 0 < at["flops_per_second"]["min"] <= at["flops_per_second"]["median"]
        assert at["flops_per_second"]["n"] == 5
    assert set(rates["matmul"]) == {"float32", "bfloat16"}
    assert rates["copy"]["bytes_per_second"]["median"] > 0


# --- step and shares --------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["device", "none"])
def test_the_step_of_a_run_is_timed_with_everything_beside(tiny_config, augment):
    plan = step.synthetic_plan(tiny_config, num_images=IMAGES, augment=augment)
    figures = step.measure_step(plan, repeats=3)
    assert figures["augment"] == augment
    assert figures["step_seconds"]["n"] == 3 and figures["step_seconds"]["min"] > 0
    times = np.array(figures["step_seconds"]["values"])
    np.testing.assert_allclose(figures["images_per_second"]["values"], 100 / times)
    assert figures["views_per_second"] == 2 * figures["images_per_second"]["median"]
    assert figures["model_flops_per_second"] == pytest.approx(
        figures["counted"]["flops_per_step"] / figures["step_seconds"]["median"]
    )
    assert figures["memory"]["host_peak_bytes"] > 1e8
    assert figures["memory"]["program"]["temp"] > 0
    assert np.isfinite(figures["loss"]["last"]) and figures["loss"]["first"] > 0


@pytest.mark.parametrize("augment", ["device", "none"])
def test_a_step_of_four_views_is_timed_with_all_its_parts(tiny_config, augment):
    config = tiny_config.copy_and_resolve_references()
    config.data.num_views = 4
    plan = step.synthetic_plan(config, num_images=IMAGES, augment=augment)
    figures = step.measure_step(plan, repeats=2)
    assert figures["views_per_second"] == 4 * figures["images_per_second"]["median"]
    assert shares.step_parts(plan)["online probe"]["median"] > 0


def test_a_scanned_and_a_streamed_step_are_timed_as_well(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.training.scan_steps = 3
    plan = step.synthetic_plan(config, num_images=IMAGES, augment="none")
    scanned = step.measure_step(plan, repeats=2)
    assert scanned["steps_in_a_program"] == 2  # 4 steps in equal pieces of at most 3
    assert scanned["steps_in_a_value"] % 2 == 0
    config.training.scan_steps = 0
    config.data.placement = "stream"
    plan = step.synthetic_plan(config, num_images=IMAGES, augment="none")
    streamed = step.measure_step(plan, repeats=2)
    assert streamed["placement"] == "stream"
    assert streamed["loss"]["first"] == pytest.approx(scanned["loss"]["first"], abs=1.0)


def test_fixed_views_hold_the_same_images_in_two_orders():
    images = jnp.asarray(step.synthetic_dataset(50).train_images[:6])
    first, second = step.fixed_views(jax.random.key(0), images)
    assert np.array_equal(first, second[::-1])
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(first, np.asarray(images) / 255, rtol=1e-6)


def test_synthetic_images_are_the_same_every_time():
    one, other = step.synthetic_dataset(50), step.synthetic_dataset(50)
    assert np.array_equal(one.train_images, other.train_images)
    assert one.train_images.shape == (50, 32, 32, 3) and len(one.test_images) == 10


def test_a_loss_that_is_not_finite_is_an_error_and_no_figure(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.update({"loss": {"std_coeff": 1e6, "cov_coeff": 1e6}})
    config.update({"optim": {"lr": 1e6, "warmup_start_lr": 1e6}})
    plan = step.synthetic_plan(config, num_images=IMAGES, augment="none")
    with pytest.raises(TrainingError, match="the loss became"):
        step.measure_step(plan, repeats=2)


def test_every_part_of_a_step_is_timed(tiny_config):
    plan = step.synthetic_plan(tiny_config, num_images=IMAGES, augment="device")
    parts = shares.step_parts(plan)
    assert set(parts) == {
        *("input", "augment", "forward", "loss", "backward", "optimizer", "online probe")
    }
    assert all(part["n"] >= 1 for part in parts.values())
    assert all(part["median"] > 0 for name, part in parts.items() if name != "backward")


def test_backward_is_what_the_gradient_takes_beyond_forward_and_loss():
    forward, loss, gradient = (timing.spread([value]) for value in (2.0, 1.0, 7.0))
    assert shares.backward_seconds(forward, loss, gradient)["median"] == 4.0
    assert shares.backward_seconds(gradient, loss, forward)["median"] == 0.0


def test_shares_are_of_the_whole():
    parts = {"one": {"median": 1.0}, "other": {"median": 3.0}}
    result = shares.with_shares(parts, 8.0)
    assert [part["share"] for part in result["parts"].values()] == [0.125, 0.375]
    assert result["sum"] == 0.5
    after = shares.of_an_epoch({"watch": {"median": 5.0}}, images_per_second=1000.0)
    assert after["epoch_seconds"] == 50.0 and after["parts"]["watch"]["share"] == 0.1


def test_what_follows_an_epoch_is_timed(tiny_config):
    plan = step.synthetic_plan(tiny_config, num_images=IMAGES, augment="device")
    parts = shares.epoch_parts(plan)
    blocking, whole = parts["checkpoint, blocking"], parts["checkpoint, until whole"]
    assert blocking["n"] == 5 and 0 < blocking["median"] < whole["median"]
    evaluated = parts["online evaluation"]
    assert evaluated["measured_on_images"] == IMAGES and evaluated["for_images"] == 15_000
    assert parts["watch"]["median"] > 0


def test_xla_counts_before_compiling_what_a_cpu_compiles(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.update({"width": 16, "proj_hidden_dim": 256, "proj_output_dim": 256})
    plan = step.synthetic_plan(config, num_images=IMAGES, augment="none")
    compiled = measure.make_runner(plan, step.initial_state(plan)).program.cost_analysis()
    found = measure.xla_counts(plan)
    # Here nothing is hidden in a library; the compiler adds and removes elementwise work.
    assert found["flops_per_step"] == pytest.approx(compiled["flops"], rel=0.05)
    assert found["bytes_per_step"] == compiled["bytes accessed"]


def test_a_step_is_set_beside_the_rates_of_its_dtype():
    figures = {
        "dtype": "bfloat16",
        "model_flops_per_second": 2e12,
        "counted": {"flops_per_step": 8e12, "bytes_per_step": {"unfused": 6e9, "fused": 2e9}},
    }
    matmul = {
        dtype: {"flops_per_second": {"median": rate}}
        for dtype, rate in (("float32", 1e12), ("bfloat16", 8e12))
    }
    rates = {"matmul": matmul, "copy": {"bytes_per_second": {"median": 2e9}}}
    beside = measure.step_beside_rates(figures, rates, {})
    assert beside["step"]["share_of_matmul_rate"] == 0.25
    floors = {"arithmetic": 1.0, "memory_unfused": 3.0, "memory_fused": 1.0}
    assert beside["roofline"]["floor_seconds"] == floors


# --- start-up ---------------------------------------------------------------------------------


SPEAKS = """
import os, time
assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and os.environ["XDG_CACHE_HOME"] == "here"
print("first step 0.5 s after the start, 0.2 s of them for compiling it", flush=True)
time.sleep(60)
"""


def test_the_first_step_is_waited_for_and_the_process_ended(tmp_path):
    environment = {"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": "here"}
    found = startup.first_step_seconds(["-c", SPEAKS], environment, tmp_path)
    assert found["said"] == 0.5 and found["seconds"] > 0


def test_a_command_that_ends_before_its_first_step_says_why(tmp_path):
    silent = "import sys; sys.exit('error: no dataset')"
    with pytest.raises(processes.MeasurementError, match="before its first step: no dataset$"):
        startup.first_step_seconds(["-c", silent], {}, tmp_path)


def test_a_command_that_never_gets_there_is_ended(tmp_path):
    with pytest.raises(processes.MeasurementError, match="no first step in 1 s"):
        startup.first_step_seconds(["-c", "import time; time.sleep(60)"], {}, tmp_path, 0.6)


@pytest.fixture
def launches(monkeypatch):
    """Launches that take 10, 20, 30 ... s, times what is given here."""
    made = []

    def launch(arguments, environment, folder, seconds):
        made.append((arguments, environment, seconds))
        return {"seconds": 10.0 * len(made) * made_slower, "said": 0.1}

    made_slower = 1.0

    def slower(factor):
        nonlocal made_slower
        made_slower = factor

    monkeypatch.setattr(startup, "first_step_seconds", launch)
    return made, slower


def test_warm_launches_share_a_cache_and_cold_ones_none(launches):
    made, _ = launches
    result = startup.measure_startup(["--config=c.py"], seconds_left=lambda: 77.0)
    assert result["warm"]["values"] == [20.0, 30.0, 40.0, 50.0, 60.0]
    assert result["cold"]["values"] == [10.0, 70.0, 80.0]
    assert result["cold"]["said"] == [0.1] * 3
    caches = [environment["XDG_CACHE_HOME"] for _, environment, _ in made]
    assert len(set(caches[:6])) == 1 and len(set(caches)) == 3
    assert len({arguments[-2] for arguments, _, _ in made}) == 8  # workdirs
    for _, environment, seconds in made:
        # Taken out of the environment: main's own policy is what is measured.
        assert environment["JAX_COMPILATION_CACHE_DIR"] is None and seconds == 77.0


def test_a_cold_launch_of_minutes_is_made_once(launches):
    made, slower = launches
    slower(6.1)
    result = startup.measure_startup([])
    assert result["cold"]["n"] == 1 and result["warm"]["n"] == 5 and len(made) == 6
    text = table.as_text(measure.startup_table(result))
    assert "empty cache  1" in text and "warm cache   5" in text


# --- other processes --------------------------------------------------------------------------


def test_the_last_line_is_read_as_json():
    assert processes.run_json(["-c", "print('words'); print('{\"a\": 1}')"]) == {"a": 1}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('error: two\\nlines')", "two"),
        ("raise ValueError('x')", "ValueError: x"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        (
            "import os, sys; sys.stderr.write('words'); sys.stderr.flush(); os.abort()",
            "exit code -6",
        ),
        ("pass", "printed no JSON"),
    ],
)
def test_a_process_that_fails_is_one_line_in_its_own_words(code, words):
    with pytest.raises(processes.MeasurementError, match=words) as caught:
        processes.run_json(["-c", code])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("RESOURCE_EXHAUSTED: 9 GiB\nTraceback\nSystemError: x", 1, "RESOURCE_EXHAUSTED: 9 GiB"),
        ("error: needs 9 GiB and the device has 8 GiB", 2, "needs 9 GiB and the device has 8 GiB"),
        ("CUDA out of memory.\nduring handling\nerror: it broke", 2, "CUDA out of memory."),
        ("", -9, "exit code -9"),
    ],
)
def test_a_lack_of_memory_is_found_wherever_it_is_said(text, code, words):
    error = processes.failure(text, code)
    assert error.is_out_of_memory and str(error) == words


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("ran out of memory, but this is not a failure\nerror: no dataset", 2, "no dataset"),
        ("I0000 all is well\nfatal", -11, "fatal, exit code -11"),
    ],
)
def test_another_end_is_no_lack_of_memory(text, code, words):
    error = processes.failure(text, code)
    assert not error.is_out_of_memory and str(error) == words


def test_a_process_has_a_session_of_its_own():
    code = "import json, os; print(json.dumps(os.getsid(0) == os.getpid()))"
    assert processes.run_json(["-c", code]) is True


WAITS = "import time; print('ready', flush=True); time.sleep(60)"


def test_a_watched_process_ends_with_its_line_its_time_or_itself(tmp_path):
    lines = []

    def watch(code, seconds, awaited):
        def on_line(at, line):
            lines.append((at, line))
            return line == awaited

        errors = tmp_path / "stderr"
        return processes.watch(["-c", code], errors=errors, seconds=seconds, on_line=on_line)

    assert watch(WAITS, 60.0, "ready") == (-15, False)
    assert watch(WAITS, 1.0, "nothing") == (-15, True)
    assert watch("import sys; sys.exit(3)", 60.0, "nothing") == (3, False)
    assert lines[0][1] == "ready" and 0 < lines[0][0] < 60


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(processes.MeasurementError, match="took longer than 1 s"):
        processes.run_json(["-c", "import time; time.sleep(60)"], timeout=1)


# --- sweep ------------------------------------------------------------------------------------


def measured(batch_size, seconds, platform="gpu", peak=2e9):
    return {
        "environment": {"platform": platform, "device": "one"},
        "step": {
            "batch_size": batch_size,
            "dtype": "float32",
            "step_seconds": timing.spread([seconds] * 3),
            "images_per_second": timing.spread([batch_size / seconds] * 3),
            "model_flops_per_second": 1e12,
            "memory": {"device_peak_bytes": peak, "host_peak_bytes": 1e9},
        },
    }


def test_a_point_changes_one_key(given, monkeypatch):
    calls = []
    monkeypatch.setattr(sweep, "run_json", lambda command, **_: calls.append(command) or {})
    sweep.measure_point(given, "batch", 128, smallest=None)
    sweep.measure_point(given, "dim", 1024, smallest=None)
    assert "--config.data.batch_size=128" in calls[0]
    assert "--config.model.proj_output_dim=1024" in calls[1]
    assert not any("batch_size" in word for word in calls[1])


def test_a_point_that_does_not_fit_is_a_row_and_another_failure_is_not(given, monkeypatch):
    def fails(words):
        def run(*_, **__):
            raise processes.failure(words, 1)

        return run

    monkeypatch.setattr(sweep, "run_json", fails("needs 90.0 GiB and the device has 80.0 GiB"))
    row = sweep.measure_point(given, "batch", 8192, smallest=None)
    assert row["measured"] is None and row["reason"].startswith("does not fit: needs 90.0 GiB")
    monkeypatch.setattr(sweep, "run_json", fails("no such dataset"))
    with pytest.raises(processes.MeasurementError, match="no such dataset"):
        sweep.measure_point(given, "batch", 8192, smallest=None)


def test_on_a_cpu_a_step_of_minutes_is_estimated_and_not_run(given, monkeypatch):
    monkeypatch.setattr(sweep, "run_json", lambda *_, **__: {"measured": "it was run"})
    slow = {"measured": measured(128, 2.0, platform="cpu")}
    row = sweep.measure_point(given, "batch", 8192, smallest=slow)
    assert row["measured"] is None and row["reason"] == "not measured: estimated 128 s a step"
    assert sweep.measure_point(given, "batch", 2048, smallest=slow)["measured"]
    on_gpu = {"measured": measured(128, 2.0)}
    assert sweep.measure_point(given, "batch", 8192, smallest=on_gpu)["measured"]


def test_the_tables_of_a_sweep():
    rows = [
        {"kind": "batch", "value": 128, "measured": measured(128, 0.2), "reason": ""},
        {"kind": "batch", "value": 512, "measured": measured(512, 0.4), "reason": ""},
        {"kind": "batch", "value": 8192, "measured": None, "reason": "does not fit: 9 GiB"},
        {"kind": "dim", "value": 512, "measured": measured(96, 0.1), "reason": ""},
    ]
    matmul = {"float32": {"flops_per_second": {"median": 4e12}}}
    batch, dim = sweep.sweep_tables(rows, matmul)
    text = table.as_text(batch)
    assert [row[0] for row in batch.rows] == ["128", "512", "8192"]
    assert batch.rows[0][3] == "2" and batch.rows[1][3] == "1"  # 1.5625 ms and 0.78 ms an image
    assert batch.rows[0][4] == "25.0 %" and batch.rows[0][5] == "2.00 GB"
    assert batch.rows[2][1] == "not measured" and "does not fit: 9 GiB" in text
    assert dim.rows[0][3] == "-"


def test_the_sweep_as_a_command_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def run(arguments, **_):
        assert "--config.model.width=4" in arguments
        if "--measure-rates" in arguments:
            rate = {"flops_per_second": {"median": 4e12}}
            return {"rates": {"matmul": {"float32": rate}}}
        if "--config.data.batch_size=1024" in arguments:
            raise processes.MeasurementError("it broke")
        return measured(100, 0.2)

    monkeypatch.setattr(sweep, "run_json", run)
    out = tmp_path / "sweep.json"
    command.main([*FLAGS, "--sweep", f"--out={out}"])
    text, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    assert [row["value"] for row in rows] == [*sweep.BATCH_SIZES, *sweep.DIMS]
    assert [row["value"] for row in rows if not row["measured"]] == [1024]
    assert "1024: it broke" in text and "Over Embedding dimension D" in text


# --- the peer ---------------------------------------------------------------------------------


def make_peer(given, tmp_path):
    return peer.Peer(given, tmp_path, python="py", num_images=IMAGES, num_workers=2)


def test_the_peer_is_told_the_recipe(given, tmp_path):
    sides = make_peer(given, tmp_path)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe == sides.recipe()
    assert recipe["batch_size"] == 100 and recipe["stage_sizes"] == [1, 1]
    assert recipe["optimizer"] == "lars" and sides.note == ""


def test_an_optimizer_that_the_peer_lacks_is_replaced_on_both_sides(given, tmp_path, monkeypatch):
    given.config.optim.name = "muon"
    sides, calls = make_peer(given, tmp_path), []
    monkeypatch.setattr(peer, "run_json", lambda command, **_: calls.append(command) or {})
    sides.ours("float32", "none")
    assert "muon is replaced by lars on both sides" in sides.note
    assert "--config.optim.name=lars" in calls[0]
    assert sides.recipe()["optimizer"] == "lars"


def test_a_blur_is_left_out_on_both_sides_and_bottlenecks_are_refused(given, tmp_path, monkeypatch):
    given.config.augment.blur_prob = 0.5
    sides, calls = make_peer(given, tmp_path), []
    monkeypatch.setattr(peer, "run_json", lambda command, **_: calls.append(command) or {})
    sides.ours("float32", "device")
    assert sides.note == "the blur is left out on both sides: the peer has none"
    assert "--config.augment.blur_prob=0.0" in calls[0]
    given.config.model.block = "bottleneck"
    with pytest.raises(ConfigError, match="compared with PyTorch: the peer has no bottleneck"):
        make_peer(given, tmp_path)


def test_both_sides_take_as_many_views_a_step_as_the_config_two_of_an_image(
    given, tmp_path, monkeypatch
):
    given.config.data.num_views = 4
    sides, calls = make_peer(given, tmp_path), []
    monkeypatch.setattr(peer, "run_json", lambda command, **_: calls.append(command) or {})
    sides.ours("float32", "none")
    assert {"--config.data.num_views=2", "--config.data.batch_size=200"} <= set(calls[0])
    assert sides.recipe()["batch_size"] == 200
    assert "4 views an image are replaced by 2 of 200 images a step" in sides.note


def test_pairs_alternate_and_give_the_ratio_of_medians(given, tmp_path, monkeypatch):
    calls = []

    def run(command, **options):
        is_theirs = "benchmarks.torch_peer" in command
        calls.append("theirs" if is_theirs else "ours")
        assert options["environment"] == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if is_theirs:
            assert options["python"] == "py"
            assert command[command.index("--seconds") + 1] == "2"
            speed = 200.0 if "compile" in command and "channels_last" in command else 100.0
            return {"images_per_second": [speed, speed, 1.0]}
        figures = measured(100, 0.25)["step"]
        return {"step": figures}

    monkeypatch.setattr(peer, "run_json", run)
    result = peer.run_peer(make_peer(given, tmp_path))
    assert len(result["screening"]) == 24
    # No process beside those that are compared.
    assert len(calls) == 24 + 2 * len(peer.RATIOS) * peer.PAIRS
    pairs = [
        side for ratio in peer.RATIOS for _ in range(peer.PAIRS) for side in ("ours", "theirs")
    ]
    assert calls[-len(pairs) :] == pairs
    for at in result["ratios"].values():
        assert at["ratio"]["values"] == [400 / 200] * 5
        assert at["variant"].endswith("compile-channels_last")
    of = {name: at["variant"].split("-")[1] for name, at in result["ratios"].items()}
    assert of["bfloat16-device"] == "device" and of["bfloat16-loader"] == "none"
    text = table.as_text(result["tables"][1])
    assert "2 (2-2)" in text and "loader" in text


def test_a_peer_that_cannot_run_is_named_and_the_rest_is_measured(given, tmp_path, monkeypatch):
    def run(command, **_):
        if "benchmarks.torch_peer" not in command:
            return {"step": measured(100, 0.25)["step"]}
        if "bfloat16" in command:
            raise processes.MeasurementError("no bfloat16 here")
        return {"images_per_second": [100.0]}

    monkeypatch.setattr(peer, "run_json", run)
    result = peer.run_peer(make_peer(given, tmp_path))
    assert set(result["ratios"]) == {"float32-device", "float32-none"}
    assert set(result["failed"]["ratios"]) == {
        *("bfloat16-device", "bfloat16-loader", "bfloat16-none")
    }
    screening, ratios = map(table.as_text, result["tables"])
    assert "no bfloat16 here" in screening and "not measured" in screening
    assert "no variant of the peer ran in bfloat16" in ratios


def test_the_peer_as_a_command(tmp_path, monkeypatch, capsys):
    def run(arguments, **_):
        is_theirs = "benchmarks.torch_peer" in arguments
        return {"images_per_second": [200.0]} if is_theirs else measured(100, 0.25)

    monkeypatch.setattr(peer, "run_json", run)
    monkeypatch.setattr(peer, "require_torch", lambda python: None)
    out = tmp_path / "peer.json"
    command.main(["--peer=torch", f"--out={out}"])
    text, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "Beside PyTorch" in text and "muon is replaced by lars" in text
    assert content["ratios"]["bfloat16-loader"]["ratio"]["n"] == 5
    assert content["note"].startswith("muon is replaced")


def test_without_pytorch_the_peer_is_one_line(monkeypatch):
    monkeypatch.setattr(peer, "has_torch", lambda python: False)
    with pytest.raises(ConfigError, match="PyTorch is not installed in py: pip install"):
        peer.require_torch("py")


def test_a_python_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match="cannot be run"):
        peer.require_torch("/no/such/python")


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567.0, "1,234,567"),
        (123.4, "123"),
        (12.34, "12.3"),
        (0.001234, "0.00123"),
        (0.0000123, "0.000012"),
        (None, "not measured"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert table.number(value) == text


def test_a_table_in_both_forms():
    shown = table.Table("Title", ("", "a"), [["one", "2"], ["three", "40"]], "note")
    assert table.as_text(shown) == "Title\n        a\none     2\nthree  40\nnote"
    assert "| three | 40 |" in table.as_markdown(shown)
    assert table.as_markdown(shown).startswith("### Title\n\n|  | a |\n| --- | --- |\n")


# --- the command ------------------------------------------------------------------------------


def test_one_config_from_command_to_json(tmp_path, capsys):
    out = tmp_path / "folder" / "cpu.json"
    small = ["--miniature", "--no-startup", f"--images={IMAGES}", f"--out={out}"]
    command.main([*FLAGS, *small])
    content, text = json.loads(out.read_text()), capsys.readouterr().out
    assert content["schema_version"] == measure.SCHEMA_VERSION
    assert content["environment"]["versions"]["jax"] == jax.__version__
    assert content["config"]["model.width"] == 4
    for title in ("A step of 100 images", "Roofline", "Shares of a step", "After an epoch"):
        assert title in text
    assert "From the command to its first step" in text and "not measured" in text
    assert content["startup"] == {"error": "--no-startup"}
    assert content["roofline"]["xla"]["flops_per_step"] > 0
    assert "the step before compilation, for a CPU" in text
    lines = [line.split() for line in text.splitlines()]
    # name, n, median, range, share
    assert [line for line in lines if line[:2] == ["forward", "5"]]


def test_the_step_as_a_line_of_json(capsys):
    command.main([*FLAGS, "--measure-step", f"--images={IMAGES}", "--repeats=2", "--augment=none"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["step"]["batch_size"] == 100 and figures["step"]["augment"] == "none"


def test_the_device_as_a_line_of_json(capsys):
    command.main(["--measure-device"])
    environment = json.loads(capsys.readouterr().out)["environment"]
    assert environment["platform"] == "cpu" and environment["device"].startswith("CPU (")


BAD_INPUT = {
    "misspelt flag": (["--swep"], "swep"),
    "stray word": (["rapid"], "unexpected argument 'rapid'"),
    "two kinds": (["--sweep", "--suite"], "not allowed with"),
    "suite without a folder": (["--suite"], "--suite needs --out DIR"),
    "no images": (["--images=0"], "at least 1"),
    "no minutes": (["--suite", "--out=x", "--minutes=0"], "--minutes must be above 0"),
    "minutes of one config": (["--minutes=3"], "--minutes is no option of the measurement of one"),
    "images of the suite": (
        ["--suite", "--out=x", "--images=9"],
        "--images is no option of --suite",
    ),
    "augment of a sweep": (["--sweep", "--augment=none"], "--augment is no option of --sweep"),
    "file of one line": (["--measure-step", "--out=x"], "--out is no option of --measure-step"),
    "no python for the suite": (["--suite", "--out=x", "--peer-python=/no/py"], "cannot be run"),
    "missing config": (["--config=configs/rapd.py"], "did you mean rapid.py?"),
    "unknown key": (["--config.optim.lrr=1"], "did you mean optim.lr?"),
    "wrong value": (["--config.optim.lr=-1"], "config.optim.lr must be above 0"),
    "batch above images": (["--images=50", *FLAGS, "--measure-step"], "larger than the 50"),
    "unknown peer": (["--peer=tensorflow"], "invalid choice"),
    "python that is not there": (["--peer=torch", "--peer-python=/no/python"], "cannot be run"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_a_config_by_flags_can_be_handed_on():
    given = given_config([*FLAGS, "--config.optim.lr=0.5"])
    assert isinstance(given.config, ConfigDict) and given.config.optim.lr == 0.5
    again = given_config(given.flags(**{"optim.lr": 0.25}))
    assert again.config.optim.lr == 0.25 and again.config.model.stage_sizes == (1, 1)
    assert again.name == "cpu"


def test_synthetic_images_are_as_large_as_the_configs_and_no_more_bytes(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.data.image_size = 64
    plan = step.synthetic_plan(config, augment="device")
    assert plan.dataset.image_shape == (64, 64, 3)
    assert plan.dataset.train_images.nbytes <= step.NUM_IMAGES * 32 * 32 * 3
