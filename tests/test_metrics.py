"""metrics.jsonl and the trackers behind the same call."""

import contextlib
import json
import math
import resource
import signal
import sys
import types

import pytest

from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.metrics import MetricsWriter, read_json, read_metrics, write_json


def rows_of(*steps):
    return [{"step": step, "train/loss": 0.1 * step} for step in steps]


def write(workdir, rows, *, step=0, **trackers):
    with contextlib.closing(
        MetricsWriter(workdir, step=step, run_id="id", config={}, **trackers)
    ) as writer:
        for row in rows:
            writer.write(row)


def test_rows_come_back_in_order(tmp_path):
    write(tmp_path, rows_of(1, 2, 3))
    assert read_metrics(tmp_path / "metrics.jsonl") == rows_of(1, 2, 3)


def test_a_row_is_on_the_disk_before_the_writer_is_closed(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, step=0, run_id="id", config={})) as writer:
        writer.write({"step": 1, "train/loss": 2.5})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5}]


def test_a_resumed_run_drops_the_rows_of_later_steps(tmp_path):
    write(tmp_path, rows_of(10, 20, 30))
    write(tmp_path, [{"step": 30, "train/loss": 7.0}], step=20)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        *rows_of(10, 20),
        {"step": 30, "train/loss": 7.0},
    ]


def test_a_last_line_broken_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, rows_of(1, 2))
    with path.open("a") as file:
        file.write('{"step": 3, "train/lo')
    assert read_metrics(path) == rows_of(1, 2)
    write(tmp_path, rows_of(3), step=2)
    assert read_metrics(path) == rows_of(1, 2, 3)
    assert all(json.loads(line) for line in path.read_text().splitlines())


@contextlib.contextmanager
def files_no_larger_than(num_bytes):
    """What a full disk does to a write: a part of it is done, and then none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_rows_that_find_no_room_wait_and_leave_no_half_of_one(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(MetricsWriter(tmp_path, step=0, run_id="id", config={})) as writer:
        for row in rows_of(1, 2):
            writer.write(row)
        with files_no_larger_than(path.stat().st_size + 10):
            for row in rows_of(3, 4):
                writer.write(row)
        assert read_metrics(path) == rows_of(1, 2)
        writer.write(*rows_of(5))
        assert read_metrics(path) == rows_of(1, 2, 3, 4, 5)
        assert all(json.loads(line) for line in path.read_text().splitlines())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "rows wait until it can" in printed[0] and "2 rows" in printed[1]


def test_rows_that_never_found_room_are_counted_and_the_others_stay(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, step=0, run_id="id", config={})
    writer.write(*rows_of(1))
    with files_no_larger_than(path.stat().st_size + 10):
        writer.write(*rows_of(2))
        writer.close()
    assert path.read_text().count("\n") == 1 and read_metrics(path) == rows_of(1)
    assert "1 rows of metrics.jsonl are lost" in capsys.readouterr().out


def test_a_line_broken_in_the_middle_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, rows_of(1, 2, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff{" + lines[1] + b"7\n" + lines[2])
    assert read_metrics(path) == rows_of(1, 3)


def test_a_run_that_goes_back_drops_what_it_will_write_again(tmp_path):
    with contextlib.closing(MetricsWriter(tmp_path, step=0, run_id="id", config={})) as writer:
        for row in rows_of(10, 20, 30):
            writer.write(row)
        writer.go_back(10)
        writer.write({"step": 20, "train/loss": 7.0})
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found == [*rows_of(10), {"step": 20, "train/loss": 7.0}]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write(tmp_path, [{"step": 1, "a": math.nan, "b": -math.inf, "c": 1.5, "d": 2, "e": "text"}])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": 1.5, "d": 2, "e": "text"}


def test_json_files_are_replaced_whole_and_leave_nothing_behind(tmp_path):
    path = tmp_path / "summary.json"
    for content in ({"steps": 1}, {"steps": 2, "nested": [1.5, None]}):
        write_json(path, content)
        assert read_json(path) == content
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert read_json(path) == {"steps": 2, "nested": [1.5, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("content", [None, '{"steps": ', b"\xff\xfe"])
def test_an_absent_or_damaged_json_file_is_one_line_that_names_it(content, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read") as error:
        read_json(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tracker", "module", "extra"),
    [("wandb", "wandb", "wandb"), ("tensorboard", "tensorboardX", "tensorboard")],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    tracker, module, extra, tmp_path, monkeypatch
):
    """And leaves the rows that are there alone."""
    write(tmp_path, rows_of(1, 2))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"log_{tracker}=True .*\.\[{extra}\]") as error:
        MetricsWriter(tmp_path, step=0, run_id="id", config={}, **{tracker: True})
    assert "\n" not in str(error.value)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows_of(1, 2)


class Recorder:
    """Stands in for both trackers' packages and remembers what they are told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_trackers_get_the_finite_numbers_of_each_row(tmp_path, monkeypatch):
    wandb, board = Recorder(), Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(
        sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=board.SummaryWriter)
    )
    with contextlib.closing(
        MetricsWriter(
            tmp_path, step=0, run_id="id", config={"seed": 1}, wandb=True, tensorboard=True
        )
    ) as writer:
        writer.write({"step": 5, "train/loss": 0.5, "val/acc": math.nan, "name": "x"})
    (_, _, started), *logged = wandb.calls
    assert started["config"] == {"seed": 1}
    assert (started["id"], started["resume"]) == ("id", "allow")
    assert logged == [("log", ({"step": 5, "train/loss": 0.5},), {"step": 5}), ("finish", (), {})]
    assert board.calls == [
        ("SummaryWriter", (str(tmp_path / "tensorboard"),), {}),
        ("add_scalar", ("step", 5, 5), {}),
        ("add_scalar", ("train/loss", 0.5, 5), {}),
        ("close", (), {}),
    ]


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match="no API key configured.*WANDB_MODE=offline") as refused:
        MetricsWriter(tmp_path, step=0, run_id="id", config={}, wandb=True)
    assert "\n" not in str(refused.value)
