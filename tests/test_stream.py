"""Laws of streaming: the batches asked for, in that order, whoever decodes and whoever dies."""

import io
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import Records, records, stream_batches
from jepa_jax.data.readers import FolderReader, Names
from jepa_jax.errors import DataError

NUM_IMAGES = 60
REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(cifar_arrays):
    return cifar_arrays["train_images"][:NUM_IMAGES]


@pytest.fixture(scope="module")
def labels(cifar_arrays):
    return cifar_arrays["train_labels"][:NUM_IMAGES] % 3


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


class Memory:
    """A reader of contents in memory; those without any are broken."""

    folder = "memory"

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def read(self, positions):
        return [self.contents[position] for position in positions], None

    def name_of(self, position):
        return f"image {position}"

    def too_many_broken(self, what):
        return DataError(what)


class Telling(Memory):
    """What a worker knows of itself comes back as the error of a reader."""

    def read(self, positions):
        if multiprocessing.parent_process() is None:
            return super().read(positions)
        xla_bridge = sys.modules.get("jax._src.xla_bridge")
        backends = xla_bridge and list(xla_bridge._backends)
        cuda = os.environ["CUDA_VISIBLE_DEVICES"]
        raise DataError(f"backends {backends}, devices {cuda!r}, {sorted(sys.modules)}")


@pytest.fixture
def pool(images):
    """Records of PNGs with two workers, which end with the test."""
    made = []

    def make(contents=None, **options):
        options = {"num_workers": 2, **options}
        made.append(Records(Memory(contents or [png(i) for i in images]), **options))
        return made[-1]

    yield make
    for some in made:
        some.close()


def worker_pids():
    return {child.pid for child in multiprocessing.active_children()}


def some_rows(num_batches, batch_size, seed=0):
    return np.random.default_rng(seed).integers(0, NUM_IMAGES, (num_batches, batch_size))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_are_those_asked_for_whatever_their_size_and_number(pool, images, num_workers):
    streamed = pool(num_workers=num_workers)
    # Pieces of batches: less than one, exactly one, several; and more batches than fit the ring.
    for num_batches, batch_size in ((30, 3), (3, 64), (2, 200), (0, 5)):
        rows = some_rows(num_batches, batch_size)
        found = list(streamed.batches(rows))
        assert len(found) == num_batches
        for row, batch in zip(rows, found, strict=True):
            assert batch.dtype == np.uint8
            np.testing.assert_array_equal(batch, images[row])


def test_what_is_left_of_an_epoch_is_the_end_of_the_whole(pool):
    rows = some_rows(9, 8)
    whole, rest = list(pool().batches(rows)), list(pool().batches(rows[4:]))
    np.testing.assert_array_equal(whole[4:], rest)


def test_workers_stay_over_epochs_and_after_an_early_end(pool, images):
    streamed, rows = pool(), some_rows(20, 10)
    before = worker_pids()
    list(streamed.batches(rows))
    workers = worker_pids() - before
    assert len(workers) == min(2, os.cpu_count())
    for taken in (1, 5):
        batches = streamed.batches(rows)
        for row in rows[:taken]:
            np.testing.assert_array_equal(next(batches), images[row])
        batches.close()
        for row, batch in zip(rows[7:], streamed.batches(rows[7:]), strict=True):
            np.testing.assert_array_equal(batch, images[row])
    assert worker_pids() - before == workers
    streamed.close()
    assert worker_pids() == before
    np.testing.assert_array_equal(next(streamed.batches(rows)), images[rows[0]])


def test_two_streams_at_once_do_not_meet(pool, images):
    streamed, one, two = pool(num_workers=1), some_rows(6, 10, 1), some_rows(6, 10, 2)
    pairs = zip(streamed.batches(one), streamed.batches(two), strict=True)
    for k, (first, second) in enumerate(pairs):
        np.testing.assert_array_equal(first, images[one[k]])
        np.testing.assert_array_equal(second, images[two[k]])


def test_workers_end_with_the_records_that_they_belong_to(images):
    before = worker_pids()
    streamed = Records(Memory([png(image) for image in images]), num_workers=1)
    taken = streamed.take(np.arange(10))
    next(taken.batches(np.array([[3, 4]])))
    del streamed
    assert worker_pids() - before
    del taken
    assert worker_pids() == before


def test_no_more_workers_than_cores(pool, images, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    streamed, before = pool(num_workers=16), worker_pids()
    list(streamed.batches(some_rows(1, 5)))
    assert len(worker_pids() - before) == 1


def test_a_part_of_the_records_is_streamed_by_its_own_indices(pool, images):
    kept = np.arange(NUM_IMAGES)[::-7]
    taken = pool(num_workers=1).take(kept)
    rows = np.array([[0, 3], [8, 1]])
    for row, batch in zip(rows, taken.batches(rows), strict=True):
        np.testing.assert_array_equal(batch, images[kept[row]])
        np.testing.assert_array_equal(batch, taken[row])


def test_the_stream_of_a_run_is_read_by_the_workers(pool, images, labels, monkeypatch):
    streamed, rows = pool(), some_rows(12, 6)
    monkeypatch.setattr(Records, "__getitem__", lambda *_: pytest.fail("decoded by a thread"))
    for row, (x, y) in zip(rows, stream_batches(streamed, labels, rows), strict=True):
        np.testing.assert_array_equal(x, images[row])
        np.testing.assert_array_equal(y, labels[row])
    batches = stream_batches(streamed, labels, rows)
    next(batches)
    batches.close()
    assert len(streamed._idle._idle) == 1  # given back, not forgotten in the thread


# Broken images


def expected_stand_ins(good, labels):
    found = {}
    for broken in np.flatnonzero(~good):
        place = broken
        while not good[place] or labels[place] != labels[broken]:
            place = (place + 1) % NUM_IMAGES
        found[broken] = place
    return found


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_for_a_broken_image_the_next_good_one_with_its_label_stands_in(
    pool, images, labels, with_labels, num_workers, capsys
):
    good = np.ones(NUM_IMAGES, bool)
    # Two neighbours of one label, and the last of all.
    good[[5, 17, NUM_IMAGES - 1, *np.flatnonzero(labels == labels[5])[1:3]]] = False
    contents = [png(image) if ok else b"broken" for image, ok in zip(images, good, strict=True)]
    alike = labels if with_labels else np.zeros(NUM_IMAGES, int)
    whole = images.copy()
    for broken, other in expected_stand_ins(good, alike).items():
        whole[broken] = images[other]
    streamed = pool(contents, max_broken=0.2, num_workers=num_workers)
    streamed = streamed.with_labels(labels if with_labels else None)
    rows = some_rows(30, 10)
    for _ in range(2):  # unknown at first, then known
        for row, batch in zip(rows, streamed.batches(rows), strict=True):
            np.testing.assert_array_equal(batch, whole[row])
    np.testing.assert_array_equal(streamed[np.arange(NUM_IMAGES)], whole)
    np.testing.assert_array_equal(streamed.take(np.array([17, 5]))[:], whole[[17, 5]])
    fresh = pool(contents, max_broken=0.2).with_labels(labels if with_labels else None)
    np.testing.assert_array_equal(fresh.read_all()[0], whole)
    assert set(fresh.broken) == set(streamed.broken) == set(np.flatnonzero(~good))
    said = capsys.readouterr().out.splitlines()
    for broken in np.flatnonzero(~good):
        assert sum(f"image {broken}:" in line for line in said) == 2  # once by each of the two


def test_broken_images_are_named_up_to_a_number(pool, images, capsys):
    contents = [png(images[0])] + 59 * [b""]
    reads = pool(contents, max_broken=1.0)
    np.testing.assert_array_equal(reads[np.arange(60)], np.repeat(images[:1], 60, axis=0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == records._NAMED + 1
    assert lines[0] == "broken    image 1: an empty file; another image stands in"
    assert lines[-1] == "broken    40 of 60 images so far"


@pytest.mark.parametrize("way", ["streamed", "indexed", "all"])
def test_too_many_broken_images_stop_a_run(pool, images, way):
    contents = [png(image) for image in images]
    contents[3] = contents[8] = contents[3][:100]
    rows = np.arange(NUM_IMAGES).reshape(6, 10)

    def read(max_broken):
        some = pool(contents, max_broken=max_broken, num_workers=1)
        if way == "streamed":
            return list(some.batches(rows))
        return some[rows.ravel()] if way == "indexed" else some.read_all()

    read(2 / NUM_IMAGES)
    with pytest.raises(DataError, match="^2 of 60 images are broken, more than") as caught:
        read(1.9 / NUM_IMAGES)
    assert "such as image 3: image file is truncated" in str(caught.value)
    assert "config.data.max_broken" in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_whose_whole_class_is_broken_is_one_line(pool, images):
    contents = [png(image) for image in images]
    contents[7] = b""
    lonely = np.zeros(NUM_IMAGES, np.int32)
    lonely[7] = 1
    reads = pool(contents, max_broken=1.0).with_labels(lonely)
    with pytest.raises(DataError, match="^image 7 and all images with its label are broken$"):
        reads[np.array([7])]


def test_an_image_of_another_size_is_one_line_with_the_way_out(pool, images):
    contents = [png(image) for image in images]
    contents[9] = png(images[9][:, :20])
    streamed = pool(contents, num_workers=1)
    with pytest.raises(DataError, match=r"differ in size .*\(32, 20, 3\).*image_size=32 ") as one:
        list(streamed.batches(np.array([[9, 1]])))
    with pytest.raises(DataError) as two:
        streamed[np.array([9])]
    assert str(one.value) == str(two.value)


# Processes


def test_an_error_of_a_reader_in_a_worker_is_its_own_line_in_the_parent(images):
    before = worker_pids()
    streamed = Records(Telling([png(image) for image in images]), num_workers=1)
    with pytest.raises(DataError) as caught:
        list(streamed.batches(np.array([[1, 2]])))
    assert str(caught.value).startswith("backends [], devices ''")
    assert "'tensorflow'" not in str(caught.value)
    assert worker_pids() == before


def test_a_killed_worker_is_one_line_and_the_next_stream_is_whole(pool, images):
    streamed, before = pool(num_workers=1), worker_pids()
    rows = some_rows(40, 10)
    batches = streamed.batches(rows)
    next(batches)
    (worker,) = worker_pids() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DataError, match="a process that decodes images has failed") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(list(streamed.batches(rows)), images[rows])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_for_the_parent(pool, images, number):
    streamed, before = pool(), worker_pids()
    rows = some_rows(20, 10)
    for k, batch in enumerate(streamed.batches(rows)):
        for worker in worker_pids() - before:
            os.kill(worker, number)
        np.testing.assert_array_equal(batch, images[rows[k]])


SCRIPT = """
import multiprocessing, os, signal, sys, time
import numpy as np
from jepa_jax.data import load_dataset
dataset = load_dataset("folder:" + sys.argv[1], lazy=True, num_workers=2)
for batch in dataset.train_images.batches(np.zeros((3, 4), int)):
    pass
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
if sys.argv[2] == "signals":
    before = multiprocessing.active_children()
    for child in before:
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.2)
    for batch in dataset.train_images.batches(np.zeros((30, 4), int)):
        pass
    assert multiprocessing.active_children() == before
"""


@pytest.fixture
def script(tmp_path, images):
    """Starts a program that streams and has no `if __name__ == "__main__"`."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k, image in enumerate(images[:5]):
        (folder / f"{k}.png").write_bytes(png(image))
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))

    def start(what):
        return subprocess.Popen(
            [sys.executable, path, folder, what],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def is_alive(pid):
    try:
        os.kill(pid, 0)
        # A dead one that nobody has asked about is still there, as a zombie.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("what", ["end", "signals"])
def test_a_script_without_a_main_guard_runs_once_and_ends(script, what):
    """Also if Ctrl-C and a shutdown reach its workers, which are its first processes of all."""
    output, errors = script(what).communicate(timeout=120)
    assert errors == ""
    (line,) = output.splitlines()
    assert not any(is_alive(int(pid)) for pid in line.split())


def test_workers_die_with_a_parent_that_is_killed(script):
    with script("wait") as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert workers and all(is_alive(pid) for pid in workers)
        process.kill()
    for _ in range(600):
        if not any(is_alive(pid) for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail("the workers live on")


def test_names_of_files_are_shared_and_any_bytes(tmp_path, images):
    names = ["a b.png", "übung/ß.png", os.fsdecode(b"\xff\xfe.png"), "x\ny.png"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(images[0]))
    kept = Names(names)
    assert [kept[k] for k in range(len(kept))] == names
    streamed = Records(FolderReader(str(tmp_path), kept), num_workers=1)
    (batch,) = streamed.batches(np.arange(4)[None])
    np.testing.assert_array_equal(batch, np.repeat(images[:1], 4, axis=0))
    assert streamed._reader.name_of(2).isprintable() and streamed._reader.name_of(3).isprintable()
