"""Bad input: what a person or a stranger may give to the commands, and one line for each."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jepa_jax.command import errors_as_lines
from jepa_jax.config import known_keys, validate
from jepa_jax.config_flags import given_config
from jepa_jax.errors import ConfigError
from tests.faults import bad_files
from tests.faults.processes import ROOT, TINY, Ended, run_command, with_small_cifar
from tests.faults.table import Row, row_of

PROMISE = 6
MOST_BYTES = 2 * 2**30
SEED, NUM_PROCESSES = 6, 120
LONG_NAME = "n" * 5000
# Where a command may write, in a case's folder; the last is the home of nobody but the case.
OWN = ("work", "data", "home")

MAIN, CONVERT, EVALUATE = "jepa_jax.main", "jepa_jax.convert", "jepa_jax.evaluate"


# What cases share is made once, and some are made with a changed writer.
_PREPARING = threading.Lock()


def _nothing(folder: pathlib.Path) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and the files it is given.

    Attributes:
      group: what kind of input is bad.
      name: what is bad about it.
      module: the command.
      arguments: its own, with paths from the case's folder, where it runs.
      prepare: makes the files in that folder.
      needs_process: whether it can only be tried as a process.
    """

    group: str
    name: str
    module: str
    arguments: tuple[str, ...]
    prepare: Callable[[pathlib.Path], None] = _nothing
    needs_process: bool = False


# --- config keys ------------------------------------------------------------------------------

# Of each kind a value as a Python object, and as the text of a flag (None: a flag cannot say it).
KINDS = {
    "none": (None, None),
    "list": ([1, "a"], None),
    "mapping": ({"a": 1}, None),
    "zero": (0, "0"),
    "negative": (-7, "-7"),
    "huge": (10**12, "1000000000000"),
    "huge float": (1e300, "1e300"),
    "beyond float": (10**400, "1" + "0" * 400),
    "beyond printing": (10**6000, None),
    "nan": (float("nan"), "nan"),
    "inf": (float("inf"), "inf"),
    "empty": ("", ""),
    "unicode": ("naïve 数据 🙂", "naïve 数据 🙂"),
    "NUL": ("a\0b", None),
    "two lines": ("a\nb", "a\nb"),
    "half a character": ("a\ud800b", None),
    "triple of nan": ((float("nan"),) * 3, "(nan, nan, nan)"),
    "triple of huge": ((10**300,) * 3, "(1e300, 1e300, 1e300)"),
    "triple of truths": ((True,) * 3, None),
    "triple of texts": (("a",) * 3, "('a', 'b', 'c')"),
    "one huge": ((10**6,), "(1000000,)"),
}
# What the documented rules allow of those, written down apart from the code that checks them.
TEXTS = {
    "meta.model_folder",
    "data.data_dir",
    "data.dataset",
    "data.train_split",
    "data.unlabelled_split",
    "data.test_split",
}
NEVER_EMPTY = {"data.dataset", "data.train_split"}
ZERO_IS_LEGAL = {
    "meta.seed",
    "data.view_size",
    "data.num_local_crops",
    "data.local_size",
    "data.num_train",
    "data.image_size",
    "data.max_broken",
    "augment.jitter_prob",
    "augment.brightness",
    "augment.contrast",
    "augment.saturation",
    "augment.hue",
    "augment.grayscale_prob",
    "augment.solarize_prob",
    "augment.flip_prob",
    "augment.blur_prob",
    "model.expand_dim",
    "model.depth",
    "loss.sim_coeff",
    "loss.std_coeff",
    "loss.cov_coeff",
    "loss.sigreg_coeff",
    "loss.redundancy_coeff",
    "loss.pred_coeff",
    "model.target_ema",
    "optim.weight_decay",
    "optim.momentum",
    "optim.warmup_epochs",
    "optim.warmup_start_lr",
    "optim.min_lr",
    "training.scan_steps",
    "training.early_stop_epochs",
}
# Counts that only postpone something.
HUGE_IS_LEGAL = {
    "training.scan_steps",
    "training.early_stop_epochs",
    "logging.log_every",
    "logging.save_every",
}
TRUTHS = {
    "model.predictor",
    "model.use_projector",
    "model.stem_pool",
    "training.use_amp",
    "training.remat",
    "training.shard_params",
    "logging.log_wandb",
    "logging.log_tensorboard",
    "logging.stop_on_collapse",
    "logging.tqdm_silent",
}


def is_legal(key: str, kind: str, by_flag: bool) -> bool:
    """By the tables above; a flag's text is a text, and 0 is a way to write False."""
    if key in TEXTS:
        if by_flag:
            return kind != "two lines" and not (key in NEVER_EMPTY and kind == "empty")
        return kind == "unicode" or (kind == "empty" and key not in NEVER_EMPTY)
    if kind == "zero":
        return key in ZERO_IS_LEGAL or (by_flag and key in TRUTHS)
    if kind in ("huge", "beyond float", "beyond printing"):
        return key in HUGE_IS_LEGAL
    return False


def _refusal(call: Callable[[], Any]) -> str | None:
    """None if the call ends in one line, as an error or as a command's; else what it did."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        return None if Ended(code, "", said.getvalue(), 0).is_one_line() else said.getvalue()
    except ConfigError as error:
        return None if str(error).isprintable() else f"lines: {str(error)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was accepted"


def _config_of(name: str, value: Any) -> Any:
    """configs/cpu.py with one value of any type."""
    from ml_collections import ConfigDict

    from configs import cpu

    content = cpu.get_config().to_dict()
    group, key = name.split(".")
    content[group][key] = value
    return ConfigDict(content)


def config_outcomes() -> list[str | None]:
    """Every key times every kind, as a flag and as a config file's value, where it is illegal."""
    outcomes = []
    for key in known_keys():
        for kind, (value, text) in KINDS.items():
            ways = {False: lambda key=key, value=value: validate(_config_of(key, value))}
            if text is not None:
                flag = f"--config.{key}={text}"
                ways[True] = lambda flag=flag: validate(given_config([flag]).config)
            for by_flag, call in ways.items():
                if not is_legal(key, kind, by_flag):
                    outcome = _refusal(call)
                    where = "flag" if by_flag else "value"
                    outcomes.append(outcome and f"{where} {key}, {kind}: {outcome[:300]}")
    return outcomes


def config_cases() -> Iterator[Case]:
    """The flags of the above as commands, and sizes that are legal one by one."""
    for key in known_keys():
        for kind, (_, text) in KINDS.items():
            if text is not None and not is_legal(key, kind, True):
                yield Case("config key", f"{key}, {kind}", MAIN, (f"--config.{key}={text}",))
    for name, flags in {
        "a wide network": ["model.width=60000", "model.stage_sizes=(1,1,1,1,1,1,1,1)"],
        "a wide projector": ["model.proj_hidden_dim=200000", "model.proj_output_dim=200000"],
        "many stages": ["model.stage_sizes=(1,)*11"],
        "more images than there are": ["data.num_train=2000000000"],
        "a large batch": ["data.batch_size=1000000"],
        "much held out": ["data.num_val=2000000000"],
        "long warm-up": ["optim.warmup_epochs=99"],
        "half a step": ["optim.epochs=0.001", "optim.warmup_epochs=0"],
    }.items():
        arguments = tuple(f"--config.{flag}" for flag in flags)
        yield Case("config key", name, MAIN, arguments, with_data)


# --- flags and paths --------------------------------------------------------------------------


def with_data(folder: pathlib.Path) -> None:
    """The small genuine cifar10 as the case's data."""
    shutil.copytree(_genuine_data(folder.parent), folder / "data", dirs_exist_ok=True)


@functools.cache
def _genuine_data(parent: pathlib.Path) -> pathlib.Path:
    with np.load(bad_files.FIXTURES / "cifar10_small.npz") as arrays:
        return with_small_cifar(dict(arrays), parent / "genuine")


def _loop(name: str) -> Callable[[pathlib.Path], None]:
    """A symbolic link to itself."""

    def prepare(folder: pathlib.Path) -> None:
        place = folder / name
        place.symlink_to(place.name)

    return prepare


def _file(name: str, content: bytes = b"") -> Callable[[pathlib.Path], None]:
    """A file of that content, below the case's folder."""

    def prepare(folder: pathlib.Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)

    return prepare


def _folder(name: str) -> Callable[[pathlib.Path], None]:
    def prepare(folder: pathlib.Path) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)

    return prepare


def _both(*prepares: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    def prepare(folder: pathlib.Path) -> None:
        for one in prepares:
            one(folder)

    return prepare


def flag_cases() -> Iterator[Case]:
    """What a person may write on the command line of each command."""
    for name, arguments in {
        "misspelt key": ["--config.optim.learning_rate=1"],
        "misspelt section": ["--config.optimm.lr=1"],
        "section": ["--config.optim=3"],
        "key of a key": ["--config.optim.lr.x=3"],
        "misspelt flag": ["--wrkdir=x"],
        "stray word": ["cpu.py"],
        "unknown length": [f"--config={ROOT}/configs/cpu.py:7m"],
        "no value": ["--config.optim.lr"],
        "no config": ["--config="],
        "config last": ["--config.optim.lr=1", "--config=c.py"],
        "no such flag file": ["--flagfile=absent"],
        "budget of words": ["--budget=soon"],
        "negative budget": ["--budget=-5s"],
        "no budget": ["--budget=0s"],
        "endless budget": ["--budget=1" + "0" * 400 + "h"],
        "budget and epochs": ["--budget=10m", "--config.optim.epochs=1"],
        "report of words": ["--report=perhaps"],
        "broken text": ["--config.model.type=\udcff\udcfe"],
        "terminal codes": ["--config.model.type=\x1b[31m\a"],
    }.items():
        needs_process = name in ("misspelt flag",) or "budget" in name or "report" in name
        yield Case("flag", name, MAIN, tuple(arguments), with_data, needs_process)
    weights = str(bad_files.FIXTURES / "torch_eb_jepa.pth")
    for name, arguments in {
        "nothing": [],
        "one path": [weights],
        "misspelt flag": [weights, "work/out", "--men=0,0,0"],
        "two numbers": [weights, "work/out", "--mean=0.1,0.2"],
        "words": [weights, "work/out", "--mean=a,b,c"],
        "nan": [weights, "work/out", "--mean=nan,0,0"],
        "zeros": [weights, "work/out", "--std=0,0,0"],
        "huge": [weights, "work/out", "--std=1e300,1,1"],
        "padding": [weights, "work/out", "--stem_padding=99999999999999999999"],
        "padding of words": [weights, "work/out", "--stem_padding=two"],
    }.items():
        yield Case("flag", f"convert, {name}", CONVERT, tuple(arguments))
    for name, arguments in {
        "no folder": [],
        "epochs": ["--workdir=work", "--augmented_epochs=-1"],
        "words": ["--workdir=work", "--augmented_epochs=many"],
        "checkpoint": ["--workdir=work", "--checkpoint=newest"],
        "dataset": ["--workdir=work", "--dataset=../x"],
        "stray word": ["--workdir=work", "x"],
    }.items():
        made = _run(json.dumps(bad_files.run_config()).encode())
        yield Case("flag", f"evaluate, {name}", EVALUATE, tuple(arguments), made)


CONFIG_FILES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "not Python": b"def get_config(:\n",
    "raises": b"def get_config():\n    return 1 / 0\n",
    "raises lines": b"def get_config():\n    raise ValueError('a\\nb\\n\\nc')\n",
    "calls itself": b"def get_config():\n    return get_config()\n",
    "None": b"def get_config():\n    return None\n",
    "a number": b"def get_config():\n    return 3\n",
    "a list": b"def get_config():\n    return []\n",
    "a dict": b"def get_config():\n    return {'optim': {'lr': 1.0}}\n",
    "another function": b"def config():\n    return None\n",
    "an import": b"import no_such_module\n",
    "a section that is a number": (
        b"from configs import cpu\n\n\ndef get_config():\n"
        b"    c = cpu.get_config()\n    with c.ignore_type():\n        c.optim = 3\n    return c\n"
    ),
    "no keys": b"from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    b"    return ConfigDict()\n",
}


def path_cases() -> Iterator[Case]:
    """Paths that lead nowhere, round in circles, or to another kind of thing."""
    for name, content in CONFIG_FILES.items():
        yield Case("path", f"config: {name}", MAIN, ("--config=c.py",), _file("c.py", content))
    for what, prepare, path in (
        ("absent", _nothing, "absent.py"),
        ("a loop", _loop("a.py"), "a.py"),
        ("a folder", _folder("d.py"), "d.py"),
        ("a long name", _nothing, LONG_NAME),
        ("below a file", _file("f"), "f/c.py"),
        ("no such user", _nothing, "~nobody-here/c.py"),
        ("a device", _nothing, "/dev/null"),
        ("two lines", _nothing, "a\nb.py"),
    ):
        yield Case("path", f"config: {what}", MAIN, (f"--config={path}",), prepare)
    for what, prepare, path in (
        ("a file", _file("f"), "f"),
        ("a loop", _loop("a"), "a"),
        ("below a loop", _loop("a"), "a/b"),
        ("a long name", _nothing, LONG_NAME),
        ("below a file", _file("f"), "f/x"),
        ("no such user", _nothing, "~nobody-here/x"),
        ("no file system for it", _nothing, "/proc/none/x"),
        ("a device", _nothing, "/dev/null"),
    ):
        made = _both(with_data, prepare)
        yield Case("path", f"workdir: {what}", MAIN, (f"--workdir={path}",), made)
        data = (f"--config.data.data_dir={path}",)
        yield Case("path", f"data: {what}", MAIN, data, prepare)
        yield Case("path", f"init_from: {what}", MAIN, (f"--init_from={path}",), made)
        yield Case("path", f"evaluate: {what}", EVALUATE, (f"--workdir={path}",), prepare)
        yield Case("path", f"convert from: {what}", CONVERT, (path, "work/out"), prepare)
        weights = str(bad_files.FIXTURES / "torch_eb_jepa.pth")
        yield Case("path", f"convert to: {what}", CONVERT, (weights, path), prepare)
    made = _both(with_data, _file("other/checkpoints"))
    yield Case("path", "init_from: checkpoints are a file", MAIN, ("--init_from=other",), made)


# --- archives and datasets --------------------------------------------------------------------


def _data_case(group: str, name: str, prepare: Callable[[pathlib.Path], None]) -> Case:
    return Case(group, name, MAIN, (), _both(_folder("data"), prepare))


def _tar(name: str, members: Callable[[pathlib.Path], dict]) -> Callable[[pathlib.Path], None]:
    return lambda folder: bad_files.write_tar(folder / "data" / name, members(folder))


def archive_cases() -> Iterator[Case]:
    """Archives of CIFAR-10 in the data folder that are damaged, or made to do harm."""
    from jepa_jax.data.cifar10 import ARCHIVES, BINARY_ARCHIVE, NPM_ARCHIVE, PYTHON_ARCHIVE

    for archive in ARCHIVES:
        for name, content in {"empty": b"", "a web page": b"<html>not found</html>"}.items():
            made = _file(f"data/{archive}", content)
            yield _data_case("archive", f"{archive}: {name}", made)
        yield _data_case("archive", f"{archive}: a loop", _loop(f"data/{archive}"))
        yield _data_case("archive", f"{archive}: a folder", _folder(f"data/{archive}"))
    whole = bad_files.gzip.compress(bad_files.tar_bytes(bad_files.binary_members()))
    for share in (0.01, 0.5, 0.99):
        made = _file(f"data/{BINARY_ARCHIVE}", whole[: int(share * len(whole))])
        yield _data_case("archive", f"cut at {share:.0%}", made)
    for name in bad_files.bad_tars(pathlib.Path()):
        made = _tar(BINARY_ARCHIVE, lambda f, name=name: bad_files.bad_tars(f / "out")[name])
        yield _data_case("archive", name, made)
    for name in bad_files.bad_labels():
        made = _tar(
            NPM_ARCHIVE, lambda f, n=name: bad_files.npm_members(train=bad_files.bad_labels()[n])
        )
        yield _data_case("archive", f"labels: {name}", made)
    for name in bad_files.bad_sprites():
        made = _tar(
            NPM_ARCHIVE,
            lambda f, n=name: bad_files.npm_members(data_batch_1=bad_files.bad_sprites()[n]),
        )
        yield _data_case("archive", f"sprite: {name}", made)
    for name in bad_files.malicious_batch(pathlib.Path()):

        def members(folder: pathlib.Path, name: str = name) -> dict[str, bytes]:
            program = bad_files.malicious_batch(folder / "marker")[name]
            return {f"cifar-10-batches-py/{batch}": program for batch in bad_files.BATCHES}

        yield _data_case("archive", f"pickle: {name}", _tar(PYTHON_ARCHIVE, members))
    batch = "cifar-10-batches-bin/data_batch_1.bin"
    for name, start, num_bytes in (
        ("a member of 10 TB, claimed", bad_files.claimed(batch, 10**13), 2**24),
        ("another member of 10 TB, claimed", bad_files.claimed("x", 10**13), 2**24),
        ("a bomb of 8 GB in a batch", bad_files.claimed(batch, 2**33), 2**33),
        ("a bomb of 8 GB beside them", bad_files.claimed("x", 2**33), 2**33),
        ("a name of 8 GB", bad_files.claimed("x", 2**33, tarfile.GNUTYPE_LONGNAME), 2**33),
        ("a header of 8 GB", bad_files.claimed("x", 2**33, tarfile.XHDTYPE), 2**33),
        ("a million members", bad_files.claimed("x", 0) * 10**6, 2**24),
        ("headers in headers", bad_files.claimed("x", 0, tarfile.XHDTYPE) * 10**5, 2**24),
    ):

        def bomb(folder: pathlib.Path, start: bytes = start, num_bytes: int = num_bytes) -> None:
            bad_files.write_gzip_of_zeros(folder / "data" / BINARY_ARCHIVE, start, num_bytes)

        yield _data_case("archive", name, bomb)


def dataset_cases() -> Iterator[Case]:
    """Prepared datasets whose files were changed, or that were never genuine."""
    for name, file, content in bad_files.damaged_datasets():

        def damage(folder: pathlib.Path, file=file, content=content) -> None:
            with_data(folder)
            path = folder / "data" / "cifar10" / "3.0.2" / file
            content = path.read_bytes()[: path.stat().st_size // 2] if content is None else content
            path.write_bytes(content)

        yield Case("dataset", name, MAIN, (), damage)
    for name, image in {
        "a PNG bomb": bad_files.png_bomb(),
        "a smaller PNG bomb": bad_files.png_bomb(9500, 9500),
        "an image of 8,000 pixels a side": bad_files.png_bomb(8000, 8000),
        "images of noise": b"no image at all",
        "images of two pixels": bad_files.png(np.zeros((1, 2, 3), np.uint8)),
    }.items():

        def write(folder: pathlib.Path, image: bytes = image) -> None:
            bad_files.write_dataset(folder / "data", image)

        yield Case("dataset", name, MAIN, (), write)
    for name in ("../../x", "cifar10:9.9.9", "cifar1O", "/etc/passwd", "x" * 5000, "数据", "a b"):
        flag = f"--config.data.dataset={name}"
        yield Case("dataset", f"named {name[:20]}", MAIN, (flag,), with_data)


# --- weights and runs -------------------------------------------------------------------------


def _run(config: bytes, name: str = "work") -> Callable[[pathlib.Path], None]:
    """Sound weights under a config.json of one's own."""

    def prepare(folder: pathlib.Path) -> None:
        shutil.copytree(bad_files.imported(folder.parent / "imported"), folder / name)
        (folder / name / "config.json").write_bytes(config)

    return prepare


def weights_cases() -> Iterator[Case]:
    """Files for `convert` that are no weights."""
    arguments = ("x", "work/out")
    for name, content in bad_files.bad_safetensors().items():
        yield Case("weights", f"safetensors: {name}", CONVERT, arguments, _file("x", content))
    for name in bad_files.bad_pickles(pathlib.Path()):

        def write(folder: pathlib.Path, name: str = name) -> None:
            program = bad_files.bad_pickles(folder / "marker")[name]
            bad_files.write_weights(folder / "x", program)

        yield Case("weights", f"pickle: {name}", CONVERT, arguments, write)

    def bomb(folder: pathlib.Path) -> None:
        bad_files.write_zip_bomb(folder / "x")

    yield Case("weights", "a zip bomb", CONVERT, arguments, bomb)

    def sparse(folder: pathlib.Path, start: bytes = b"") -> None:
        with (folder / "x").open("wb") as file:
            file.write(start)
            file.truncate(2**40)

    yield Case("weights", "a terabyte of nothing", CONVERT, arguments, sparse)
    start = bad_files.safetensors(bad_files.entry(shape=(2**38,), offsets=(0, 2**40)))
    made = functools.partial(sparse, start=start)
    yield Case("weights", "a tensor of a terabyte", CONVERT, arguments, made)


def run_cases() -> Iterator[Case]:
    """Folders of runs, of other versions or of nobody's, for `evaluate`, `convert` and training."""
    commands = {
        "evaluate": (EVALUATE, ("--workdir=other", "--data_dir=data")),
        "convert": (CONVERT, ("other", "work/out")),
        "main": (MAIN, ("--init_from=other",)),
    }
    for name, (content, refused_by) in bad_files.bad_configs().items():
        for command in sorted(refused_by):
            module, arguments = commands[command]
            made = _both(with_data, _run(content, "other"))
            yield Case("run", f"{command}, config {name}", module, arguments, made)
    genuine = json.dumps(bad_files.run_config()).encode()
    for name, prepare in {
        "no folder": _nothing,
        "an empty folder": _folder("other"),
        "a config that is a folder": _folder("other/config.json"),
        "a config that loops": _both(_folder("other"), _loop("other/config.json")),
        "weights that are a file": _both(_without_weights, _file("other/encoder")),
        "weights that are empty": _both(_without_weights, _folder("other/encoder")),
        "weights of noise": _both(_run(genuine, "other"), _noise),
        "checkpoints of words": _both(
            _run(genuine, "other"), _folder("other/checkpoints/newest/state")
        ),
        "a checkpoint that is empty": _both(
            _without_weights, _folder("other/checkpoints/12/state")
        ),
    }.items():
        for command, (module, arguments) in commands.items():
            if command == "convert" and name == "checkpoints of words":
                continue  # an export takes the weights beside them
            made = _both(with_data, prepare)
            yield Case("run", f"{command}, {name}", module, arguments, made)


def _without_weights(folder: pathlib.Path) -> None:
    _file("other/config.json", json.dumps(bad_files.run_config()).encode())(folder)


def _noise(folder: pathlib.Path) -> None:
    """In every file of the weights."""
    for path in (folder / "other" / "encoder").rglob("*"):
        if path.is_file():
            path.write_bytes(np.random.default_rng(0).bytes(max(path.stat().st_size, 1)))


# --- trying them ------------------------------------------------------------------------------


def arguments_of(case: Case) -> list[str]:
    """Those of a tiny run in the case's folder, and the case's own."""
    if case.module != MAIN:
        return list(case.arguments)
    given = " ".join(case.arguments)
    common = TINY if "--config=" not in given else []
    workdir = [] if "--workdir" in given else ["--workdir=work"]
    return [*common, *workdir, *case.arguments]


def surroundings(folder: pathlib.Path) -> dict[str, str]:
    """A home of its own, and a network on which nothing answers."""
    home, nowhere = str(folder / "home"), "http://127.0.0.1:9"
    return {
        "HOME": home,
        "XDG_CACHE_HOME": f"{home}/.cache",
        "EBJEPA_DSETS": str(folder / "data"),
        "PATH": "/usr/bin-without-npm",
        **{name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")},
    }


def _listing(folder: pathlib.Path) -> set[str]:
    """All that lies in a case's folder, outside of where its command may write."""
    found = set()
    for parent, folders, files in os.walk(folder):
        here = pathlib.Path(parent).relative_to(folder)
        if here == pathlib.Path():
            folders[:] = [name for name in folders if name not in OWN]
        found |= {str(here / name) for name in (*folders, *files) if "__pycache__" not in name}
    return {name for name in found if "__pycache__" not in name}


def _as_process(case: Case, folder: pathlib.Path) -> str | None:
    ended = run_command(
        arguments_of(case), module=case.module, cwd=folder, timeout=300, **surroundings(folder)
    )
    if not ended.is_one_line():
        return f"exit {ended.code}, {ended.err[-600:]!r}"
    if ended.peak_bytes >= MOST_BYTES:
        return f"{ended.peak_bytes / 2**30:.1f} GB: {ended.err}"
    return None


def _main(arguments: list[str]) -> None:
    """What `python -m jepa_jax.main` does, in this process."""
    from jepa_jax.train import train_and_evaluate

    own = {"workdir": "", "init_from": ""}
    rest = []
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in own:
            own[name] = value
        else:
            rest.append(argument)
    given = given_config(rest)
    with errors_as_lines("interrupted"):
        validate(given.config)
        train_and_evaluate(given.config, **own)


def _in_this_process(case: Case, folder: pathlib.Path) -> str | None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    saved = dict(os.environ)
    os.environ.update(surroundings(folder))
    try:
        with contextlib.chdir(folder):
            call = _main if case.module == MAIN else importlib.import_module(case.module).main
            outcome = _refusal(lambda: call(arguments_of(case)))
    finally:
        os.environ.clear()
        os.environ.update(saved)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if outcome is None and grown >= MOST_BYTES:
        return f"{grown / 2**30:.1f} GB more"
    return outcome


def tried(case: Case, folder: pathlib.Path, as_process: bool) -> str | None:
    """None if the case ended as it should, else what happened; `folder` is made and removed."""
    for name in ("", "home", "data"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with _PREPARING:
        case.prepare(folder)
    before, began = _listing(folder), time.process_time()
    outcome = (_as_process if as_process else _in_this_process)(case, folder)
    seconds = time.process_time() - began
    if outcome is None and (new := sorted(_listing(folder) - before)):
        outcome = f"it wrote {', '.join(new[:5])}"
    if outcome is None and seconds > 60:
        outcome = f"it took {seconds:.0f} s"
    shutil.rmtree(folder)
    return outcome and f"{case.group}, {case.name}: {outcome}"


def all_cases() -> dict[str, list[Case]]:
    """By group."""
    groups: dict[str, list[Case]] = {}
    for make in (
        config_cases,
        flag_cases,
        path_cases,
        archive_cases,
        dataset_cases,
        weights_cases,
        run_cases,
    ):
        for case in make():
            groups.setdefault(case.group, []).append(case)
    return groups


def sample(groups: dict[str, list[Case]], count: int) -> list[Case]:
    """So many cases of all groups, in turn, by a fixed seed."""
    rng = random.Random(SEED)
    shuffled = [rng.sample(cases, len(cases)) for cases in groups.values()]
    turns = [case for n in range(count) for cases in shuffled for case in cases[n : n + 1]]
    return turns[:count]


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Tries all of it.

    Args:
      is_long: whether to start a process for each of `NUM_PROCESSES` cases, rather than for a few.
      folder: an empty one, to work in.
    """
    yield row_of(
        PROMISE, "a config's value of another type, out of range, or no number", config_outcomes()
    )
    groups = all_cases()
    chosen = sample(groups, NUM_PROCESSES if is_long else 7)

    def start(numbered: tuple[int, Case]) -> str | None:
        number, case = numbered
        return tried(case, folder / f"process{number}", True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one a core
        processes = list(pool.map(start, enumerate(chosen)))
    yield row_of(PROMISE, "bad input to a command, as a process", processes)
    for group, cases in groups.items():
        if group == "config key":
            cases = [case for case in cases if case.prepare is with_data]
        cases = [case for case in cases if not case.needs_process]
        cases = cases if is_long else random.Random(SEED).sample(cases, min(4, len(cases)))
        outcomes = [tried(case, folder / f"{group}{n}", False) for n, case in enumerate(cases)]
        yield row_of(PROMISE, f"bad {group}, in one process", outcomes)
