"""benchmarks/lengths.py: what its tables say of the runs that are there, and of those that are not.

No run is made here: folders hold what a run leaves.
"""

import json
import pathlib
import re
import statistics

import pytest

from benchmarks import lengths
from configs import cpu, speedrun
from jepa_jax.benchmark.processes import MeasurementError
from jepa_jax.metrics import read_json, write_json

# Of ml_collections, when it reads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIGS = pathlib.Path(cpu.__file__).parent


def finished(length, seed=0, *, device="one", **changes):
    """The figures of a run as `_figures` reads them."""
    return {
        "length": length,
        "seed": seed,
        "clock_seconds": 60.0 + seed,
        "train_seconds": 50.0,
        "images_per_second": 1000.0,
        "ridge_probe_acc": 0.80 + 0.01 * seed,
        "val_ridge_probe_acc": 0.81,
        "untrained_ridge_probe_acc": 0.45,
        "seconds": {"compile": 30.0},
        "environment": {"device": device},
        "probes": {},
        **changes,
    }


def leave(folder, config, run):
    """What such a run leaves in its folder."""
    folder.mkdir(parents=True)
    summary = {name: run[name] for name in run if name not in ("length", "environment", "probes")}
    write_json(folder / "summary.json", summary)
    write_json(folder / "evaluation.json", {"probes": run["probes"]})
    stored = json.loads(config.to_json())
    write_json(
        folder / "config.json",
        {"config": stored, "environment": run["environment"]},
    )


def rows_of(table):
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_a_row_is_the_mean_and_deviation_of_its_seeds_at_their_last_steps():
    runs = [finished("80", seed) for seed in range(3)]
    (row,) = rows_of(lengths.lengths_table("speedrun.py", ["80"], runs))
    accs = [100 * run["ridge_probe_acc"] for run in runs]
    spread = f"{statistics.fmean(accs):.2f} ± {statistics.stdev(accs):.2f}"
    assert row == {
        "config": "`speedrun.py:80`",
        "on the clock": "60-62 s",
        "compile, s": "30",
        "images seen": "50,000",
        "ridge, test": f"**{spread}**",
        "ridge, val": "81.00 ± 0.00",
        "untrained, test": "45.00 ± 0.00",
        "gain": f"{statistics.fmean(accs) - 45:.2f} ± {statistics.stdev(accs):.2f}",
        "seeds": "3",
    }


def test_one_seed_has_no_deviation_and_few_seconds_keep_a_digit():
    runs = [finished("55", clock_seconds=1.46)]
    (row,) = rows_of(lengths.lengths_table("speedrun.py", ["55"], runs))
    assert (row["ridge, test"], row["on the clock"]) == ("**80.00**", "1.5 s")


def test_a_length_without_a_finished_run_is_not_measured():
    table = lengths.lengths_table("speedrun.py", ["55", "80"], [finished("80", device="two")])
    missing, measured = rows_of(table)
    assert list(missing.values()) == ["`speedrun.py:55`", *["not measured"] * 7, "0"]
    assert "not measured" not in measured.values()
    assert table.note == "Device: two"
    assert lengths.lengths_table("speedrun.py", ["55"], []).note == ""


def test_every_probe_is_beside_its_floors():
    scores = {"encoder": {"test": 0.7, "val": 0.72}, "untrained": {"test": 0.4}}
    probes = {name: {**scores, "pixels": {"test": 0.3}} for name in lengths._PROBES}
    probes["online"] = scores | {"untrained": {}}
    del probes["few_shot_100"]  # there were too few labels for it
    runs = [finished("80", seed, probes=probes) for seed in range(2)]
    rows = rows_of(lengths.probes_table("speedrun.py", "80", runs))
    assert rows[0] == {
        "probe": "logistic regression",
        "pretrained": "**70.00 ± 0.00** (72.00 ± 0.00)",
        "untrained": "40.00 ± 0.00",
        "raw pixels": "30.00",
    }
    assert (rows[-1]["untrained"], rows[-1]["raw pixels"]) == ("", "")
    assert len(rows) == len(probes)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The processes that would have been started; each fails."""
    calls = []

    def run(*arguments):
        calls.append(arguments)
        raise MeasurementError("it cannot be run here")

    monkeypatch.setattr(lengths, "_run", run)
    return calls


def test_table_only_reads_what_is_there_and_runs_nothing(tmp_path, started, capsys):
    config = speedrun.get_config("55")
    leave(tmp_path / "runs" / "55-seed0", config, finished("55"))
    out = tmp_path / "figures" / "all.json"
    lengths.main(
        [
            f"--config={CONFIGS / 'speedrun.py'}",
            f"--workdir={tmp_path / 'runs'}",
            "--table-only",
            f"--out={out}",
        ]
    )
    said = capsys.readouterr().out
    cells = dict(re.findall(r"`speedrun\.py:(\d+)` \| ([^|]+) ", said))
    assert cells == {"55": "60 s", **dict.fromkeys(("80", "90", "92"), "not measured")}
    assert not started
    (run,) = read_json(out)["runs"]
    assert (run["length"], run["seed"]) == ("55", 0)
    table = out.with_suffix(".md").read_text().strip()
    assert table in said and "speedrun.py:92" in table


def test_a_finished_run_is_read_and_a_failed_one_keeps_the_others(tmp_path, started, capsys):
    config = cpu.get_config("90s")
    leave(tmp_path / "90s-seed0", config, finished("90s"))
    arguments = [
        f"--config={CONFIGS / 'cpu.py'}",
        f"--workdir={tmp_path}",
        "--lengths",
        "90s",
        "5m",
    ]
    with pytest.raises(SystemExit) as error:
        lengths.main([*arguments, "--seeds=1"])
    assert error.value.code == 1
    ((module, config_flag, seed_flag, *_),) = started
    assert module == "jepa_jax.main" and config_flag == f"--config={CONFIGS / 'cpu.py'}:5m"
    assert seed_flag == "--config.meta.seed=0"
    said = capsys.readouterr()
    assert "`cpu.py:90s` | 60 s" in said.out and "`cpu.py:5m` | not measured" in said.out
    assert said.err.count("\n") == 1 and "1 of the runs failed" in said.err


def test_every_probe_is_asked_for_where_it_is_missing(tmp_path, started):
    for seed, probes in enumerate(({}, {"linear": {}})):
        config = cpu.get_config("90s")
        config.meta.seed = seed
        leave(tmp_path / f"90s-seed{seed}", config, finished("90s", seed, probes=probes))
    arguments = argparse_of(tmp_path, "--lengths", "90s", "--every-probe", "90s", "--seeds=2")
    lengths._measure(arguments)
    assert started == [("jepa_jax.evaluate", f"--workdir={tmp_path / '90s-seed0'}")]


def argparse_of(workdir, *rest):
    return lengths._parse([f"--config={CONFIGS / 'cpu.py'}", f"--workdir={workdir}", *rest])


def test_a_finished_run_of_another_config_is_refused(tmp_path, started, capsys):
    config = speedrun.get_config("55")
    leave(tmp_path / "55-seed0", config, finished("55"))
    # A CPU computes in float32: no other config.
    config.training.use_amp = False
    config.meta.seed = 1
    leave(tmp_path / "55-seed1", config, finished("55", 1))
    arguments = [f"--config={CONFIGS / 'speedrun.py'}", f"--workdir={tmp_path}", "--table-only"]
    lengths.main(arguments)
    config.meta.seed = 2
    config.optim.lr = 0.5
    leave(tmp_path / "55-seed2", config, finished("55", 2))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        lengths.main(arguments)
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert "55-seed2" in said and "optim.lr: 0.5 -> " in said and "use_amp" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cpuu.py"], "did you mean cpu.py?"),
        (["rapid.py"], "has no EPOCHS"),
        (["cpu.py:5m"], "--lengths chooses"),
        (["cpu.py", "--lengths", "6m"], "has the lengths 90s, 5m, 12m, not 6m"),
        (["cpu.py", "--every-probe", "6m"], "not 6m"),
        (["cpu.py", "--seeds=0"], "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(arguments, words, tmp_path, capsys, started):
    name, *rest = arguments
    with pytest.raises(SystemExit) as error:
        lengths.main([f"--config={CONFIGS / name}", *rest, f"--workdir={tmp_path}"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1 and words in said
    assert not started
