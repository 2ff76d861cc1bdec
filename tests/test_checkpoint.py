"""Checkpoints: what comes back is what was saved, and what is damaged is refused."""

import asyncio
import contextlib
import gc
import resource
import shutil
import signal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jepa_jax.checkpoint import (
    Checkpoints,
    DamagedError,
    NotSavedError,
    _read_or_one_line,
    load_latest,
    load_tree,
    save_tree,
)
from jepa_jax.errors import CheckpointError


@flax.struct.dataclass
class State:
    """A pytree with the node and leaf kinds of a training state."""

    step: jax.Array
    params: dict
    opt_state: tuple


def some_state(seed=0, width=5):
    rng = np.random.default_rng(seed)
    kernel = jnp.float32(rng.normal(size=(3, width)))
    return State(
        step=jnp.int32(seed),
        params={"dense": {"kernel": kernel, "bias": jnp.full(width, -0.0)}},
        opt_state=(jnp.uint32(7), {"mu": kernel.astype(jnp.bfloat16)}, ()),
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def same_bits(a, b):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same_bits, found, expected)


@contextlib.contextmanager
def opened(workdir, **options):
    with contextlib.closing(Checkpoints(workdir, **options)) as checkpoints:
        yield checkpoints


def save(checkpoints, step, *, val=None, seed=None):
    metrics = {} if val is None else {"val/online_probe_acc": val, "train/loss": 1.0}
    checkpoints.save(step, some_state(step if seed is None else seed), {"epoch": step}, metrics)
    checkpoints.wait()


def one_line(error):
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with the checkpoint of step 3."""
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 3, val=0.5)
    return tmp_path


def test_a_state_comes_back_bit_for_bit_when_the_folder_is_opened_again(workdir):
    with opened(workdir) as checkpoints:
        assert checkpoints.latest_step() == 3
        state, progress = checkpoints.restore(3, some_state(seed=99))
    assert_same(state, some_state(3))
    assert progress == {"epoch": 3}


def test_the_template_may_be_shapes(workdir):
    shapes = jax.eval_shape(some_state)
    with opened(workdir) as checkpoints:
        state, _ = checkpoints.restore(3, shapes)
    assert_same(state, some_state(3))


def test_the_latest_state_of_another_run_comes_back_as_nested_dicts(workdir, tmp_path):
    assert_same(load_latest(workdir)["params"], some_state(3).params)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for empty in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="holds no checkpoints"):
            load_latest(empty)


def test_an_empty_folder_has_no_step(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None


def test_the_latest_two_and_the_best_are_kept_and_the_others_dropped(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step, val in ((1, 0.3), (2, 0.6), (3, 0.5), (4, 0.4), (5, 0.2)):
            save(checkpoints, step, val=val)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
        for step in (2, 4, 5):
            assert_same(checkpoints.restore(step, some_state())[0], some_state(step))
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"2", "4", "5"}


def test_a_checkpoint_without_a_validation_accuracy_is_never_the_best(tmp_path):
    """As one in the middle of an epoch, when a signal stops the run."""
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, val=0.2)
        save(checkpoints, 2)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)
        save(checkpoints, 3, val=0.3)
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 3)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


def test_a_step_that_is_there_is_not_written_again(workdir):
    with opened(workdir) as checkpoints:
        save(checkpoints, 3, val=0.9, seed=50)
        assert_same(checkpoints.restore(3, some_state())[0], some_state(3))


def test_a_save_that_was_cut_off_is_never_picked_up(workdir):
    """A killed process leaves a folder under a temporary name."""
    whole = workdir / "checkpoints" / "3"
    shutil.copytree(whole, whole.with_name("4.orbax-checkpoint-tmp"))
    with opened(workdir) as checkpoints:
        assert checkpoints.latest_step() == 3


def damage(folder):
    """Cuts off the end of every file that holds arrays."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files, "orbax keeps arrays in another place than this test knows"
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])


# A single array: orbax leaves the other reads of a failed restore behind, and their end is noisy.
SINGLE = {"kernel": jnp.arange(12.0)}


@pytest.mark.parametrize("harm", [damage, shutil.rmtree])
def test_a_damaged_checkpoint_is_one_line(harm, tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, SINGLE, {"epoch": 1}, {})
    harm(tmp_path / "checkpoints" / "3" / "state")
    with opened(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(3, SINGLE)
    assert "checkpoints/3 is damaged" in one_line(error)


@pytest.mark.parametrize("other", ["wider", "renamed"])
def test_a_checkpoint_of_another_model_is_refused(other, workdir):
    template = some_state(width=6)
    if other == "renamed":
        template = some_state()
        template.params["other"] = template.params.pop("dense")
    with opened(workdir) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(3, template)
    difference = {
        "wider": "opt_state/1/mu is [3, 5], expected [3, 6]",
        "renamed": "params/dense/bias is [5], expected absent",
    }
    assert "holds another model" in one_line(error)
    assert difference[other] in one_line(error)


def test_a_tree_comes_back_bit_for_bit_in_place_of_what_was_there(tmp_path):
    for seed in (1, 2):
        tree = {"params": some_state(seed).params, "batch_stats": {"mean": jnp.arange(3.0)}}
        save_tree(tmp_path / "encoder", tree)
        assert_same(load_tree(tmp_path / "encoder"), tree)


def test_reading_a_tree_or_another_run_warns_of_nothing(workdir, tmp_path, caplog):
    save_tree(tmp_path / "encoder", SINGLE)
    load_tree(tmp_path / "encoder")
    load_latest(workdir)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def fails_with_a_read_pending(*_args, **_options):
    """What orbax does when one of several reads fails: the loop is closed over the others."""

    async def other():
        await asyncio.sleep(60)

    async def read():
        task = asyncio.get_running_loop().create_task(other())
        raise OSError(f"damaged, with {task.get_name()} under way")

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(read())
    finally:
        loop.close()


def test_reads_that_a_failed_restore_leaves_behind_end_in_silence(tmp_path, monkeypatch, caplog):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, SINGLE, {}, {})
        checkpoints.wait()
        monkeypatch.setattr(ocp.CheckpointManager, "restore", fails_with_a_read_pending)
        with pytest.raises(CheckpointError, match="damaged, with"):
            checkpoints.restore(3, SINGLE)
    gc.collect()  # a coroutine left over warns here, and pytest makes that an error
    assert not [record for record in caplog.records if record.name == "asyncio"]


def harmed(path, how):
    """A file emptied, cut, with one bit of its middle turned, or gone."""
    content = path.read_bytes()
    middle = len(content) // 2
    turned = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"emptied": b"", "cut": content[:middle], "turned": turned}[how])


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3, of which the last is the best."""
    folder = tmp_path_factory.mktemp("three")
    with opened(folder) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, val=0.1 * step)
    return folder


@pytest.mark.parametrize("how", ["emptied", "cut", "turned", "deleted"])
def test_any_file_damaged_it_is_what_was_saved_or_the_step_before(
    three_steps, tmp_path, capsys, how
):
    newest = three_steps / "checkpoints" / "3"
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) > 10
    fallen_back = 0
    for number, file in enumerate(files):
        folder = shutil.copytree(three_steps, tmp_path / str(number))
        if not (newest / file).stat().st_size and how != "deleted":
            continue  # nothing to damage
        harmed(folder / "checkpoints" / "3" / file, how)
        with opened(folder) as checkpoints:
            step, state, progress = checkpoints.restore_latest(some_state())
            assert_same(state, some_state(step))
            assert progress == {"epoch": step} and step in (2, 3), file
        printed = capsys.readouterr().out
        assert printed.count("warning") == printed.count("\n") == (step == 2), printed
        assert (folder / "damaged" / "3-0").exists() == (step == 2)
        fallen_back += step == 2
    assert fallen_back > 3


def test_a_turned_bit_of_a_large_array_is_noticed_wherever_it_is(tmp_path):
    """orbax verifies its own notes and small arrays; of large ones it reads whatever is there."""
    large = {"kernel": np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)}
    save_tree(tmp_path / "tree", large)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, large, {}, {})
    for folder in (tmp_path / "tree", tmp_path / "checkpoints" / "3"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        content = largest.read_bytes()
        assert len(content) > 32_000
        for place in range(2000, len(content), 9000):
            turned = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            largest.write_bytes(turned)
            with pytest.raises(DamagedError):
                load_tree(folder)
    with opened(tmp_path) as checkpoints, pytest.raises(DamagedError, match="is damaged"):
        checkpoints.restore(3, large)


def test_where_no_checkpoint_is_sound_none_is_touched(three_steps, tmp_path):
    folder = shutil.copytree(three_steps, tmp_path / "run")
    for path in folder.glob("checkpoints/*/progress/metadata"):
        harmed(path, "turned")
    before = sorted(folder.rglob("*"))
    with opened(folder) as checkpoints, pytest.raises(DamagedError, match="no other is whole"):
        checkpoints.restore_latest(some_state())
    assert set(before) <= set(folder.rglob("*")) and not (folder / "damaged").exists()


def test_a_disk_that_takes_no_checkpoint_is_said_and_costs_no_older_one(three_steps, tmp_path):
    folder = shutil.copytree(three_steps, tmp_path / "run")
    with opened(folder) as checkpoints:
        # Larger than any file may be: what the system says is that of a full disk, but for a word.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(NotSavedError, match="could be written") as error:
                save(checkpoints, 4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        one_line(error)
        assert checkpoints.latest_step() == 3
        save(checkpoints, 5)
        assert_same(checkpoints.restore(5, some_state())[0], some_state(5))
    with opened(folder) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert not list(folder.glob("checkpoints/*tmp*"))


def test_a_damaged_or_absent_tree_is_one_line(tmp_path):
    save_tree(tmp_path / "encoder", SINGLE)
    damage(tmp_path / "encoder")
    for folder in (tmp_path / "encoder", tmp_path / "absent"):
        with pytest.raises(CheckpointError) as error:
            load_tree(folder)
        assert f"{folder} cannot be read" in one_line(error)


def test_a_file_that_the_system_withholds_is_no_damage(tmp_path):
    def withheld():
        raise PermissionError(13, "Permission denied")

    def absent():
        raise FileNotFoundError(2, "No such file or directory")

    damaged = (DamagedError, "checkpoint 4 is damaged")
    with pytest.raises(CheckpointError, match="checkpoint 4 cannot be read .*Permission") as found:
        _read_or_one_line(withheld, *damaged)
    assert not isinstance(found.value, DamagedError)
    with pytest.raises(DamagedError, match="checkpoint 4 is damaged .*No such file"):
        _read_or_one_line(absent, *damaged)
