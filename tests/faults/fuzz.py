"""The readers of strangers' files under thousands of broken ones: safetensors, torch, sprites.

Every file is a genuine small one with a few changes, made by hypothesis from fixed seeds, so that
each run tries the same. A reader may read it or refuse it in one line; nothing else.
"""

import contextlib
import gzip
import json
import pathlib
import pickletools
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

from jepa_jax.data import cifar10
from jepa_jax.errors import CheckpointError, DataError
from jepa_jax.interop.torch_file import read_file
from tests.faults import bad_files
from tests.faults.table import Row, row_of
from tests.torch_archive import pickled, tensor, write_archive

PROMISE = 6
MOST_SECONDS, MOST_BYTES = 5.0, 2 * 2**30
NUM_CASES = {False: 100, True: 4000}  # of each reader, in the short and in the long form
TORCH_FILES = [f"torch_{name}.pth" for name in ("dtypes", "views", "torchvision")]

# Where lengths, offsets and counts have their edges.
NUMBERS = st.sampled_from(
    [
        0,
        1,
        4,
        127,
        128,
        255,
        256,
        2**15,
        2**16 - 1,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**63 - 1,
        2**64 - 1,
    ]
)
PLACES = st.floats(0, 1, exclude_max=True)


# --- broken files -----------------------------------------------------------------------------


@st.composite
def damaged(draw: Callable, contents: list[bytes]) -> bytes:
    """One of the contents with up to four changes: bits, cuts, splices, numbers, repetitions."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        # Headers are short and rule all that follows: half of the changes are made there.
        length = len(content) if draw(st.booleans()) else min(len(content), 512)
        place = int(draw(PLACES) * length)
        kind = draw(st.sampled_from(["flip", "cut", "splice", "number", "repeat", "insert"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            end = place + int(draw(PLACES) * 64)
            del content[place : end if draw(st.booleans()) else None]
        elif kind == "splice":
            other = draw(st.sampled_from(contents))
            start = int(draw(PLACES) * len(other))
            content[place : place + 64] = other[start : start + 64]
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            order = draw(st.sampled_from(["little", "big"]))
            number = draw(NUMBERS) % 256**size
            content[place : place + size] = number.to_bytes(size, order)
        elif kind == "repeat":
            content[place:place] = content[place : place + 64] * draw(st.integers(1, 20))
        else:
            content[place:place] = draw(st.binary(max_size=16))
    return bytes(content)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | NUMBERS.map(lambda n: -n)
    | st.floats()
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def lying_safetensors(draw: Callable, genuine: bytes) -> bytes:
    """The genuine file under a header whose fields were replaced."""
    length = int.from_bytes(genuine[:8], "little")
    header = json.loads(genuine[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "number", "entry", "name"]))
        if field == "number" and isinstance(entry, dict):
            which = entry.get(draw(st.sampled_from(["shape", "data_offsets"])))
            if isinstance(which, list) and which:
                which[draw(st.integers(0, len(which) - 1))] = draw(NUMBERS)
        elif field == "dtype" and isinstance(entry, dict):
            kinds = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F4", "F8_E5M2", "C64", ""]
            entry["dtype"] = draw(st.sampled_from(kinds) | JSON)
        elif field == "name":
            header[draw(st.text(max_size=8))] = header.pop(name)
        elif field == "entry" or not isinstance(entry, dict):
            header[name] = draw(JSON)
        else:
            entry[field] = draw(JSON)
    text = json.dumps(header).encode()
    claimed = draw(st.just(len(text)) | NUMBERS)
    return bad_files.safetensors(text, genuine[8 + length :], size=claimed)


def _opcodes() -> st.SearchStrategy[bytes]:
    """Single instructions of a pickle with arguments of the right form, and whole tensors."""
    texts = st.sampled_from(
        ["posix", "system", "torch FloatStorage", "storage", "0", "cpu", "a", "é"]
    )
    names = st.sampled_from(
        [b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n"]
        + [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    )
    plain = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None]
    counted = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is not None]
    values = texts | NUMBERS | st.floats() | st.just(()) | st.just((4,)) | st.booleans() | st.none()
    return (
        st.sampled_from(plain)
        | names
        | values.map(lambda value: pickled(value)[2:-1])
        | st.tuples(st.sampled_from(counted), st.binary(max_size=8)).map(b"".join)
        | st.tuples(st.sampled_from([b"q", b"h"]), st.sampled_from([b"\0", b"\1"])).map(b"".join)
        | st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda n: tensor(n[:1], n[1:2], n[2]))
        | st.just(tensor())
    )


def programs() -> st.SearchStrategy[bytes]:
    """Pickles of any instructions in any order."""
    return st.lists(_opcodes(), max_size=20).map(lambda parts: pickled(*parts))


# --- readers ----------------------------------------------------------------------------------


class Fuzz:
    """Counts what a reader makes of files, each put into an empty folder.

    Args:
      read: the reader; takes a path.
      folder: for the files.
    """

    def __init__(self, read: Callable[[pathlib.Path], Any], folder: pathlib.Path):
        self._read, self._folder = read, folder
        self.outcomes: list[str | None] = []
        folder.mkdir()

    def try_file(self, name: str, write: Callable[[pathlib.Path], None]) -> None:
        """Tries one file; `write` makes it."""
        path = self._folder / name
        write(path)
        began, outcome = time.process_time(), None
        try:
            self._read(path)
        except (CheckpointError, DataError) as error:
            if not str(error).isprintable():
                outcome = f"lines: {str(error)!r}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - began
        if outcome is None and seconds > MOST_SECONDS:
            outcome = f"{seconds:.1f} s"
        if outcome is None and [path] != list(self._folder.iterdir()):
            outcome = "it wrote a file"
        self.outcomes.append(outcome and f"case {len(self.outcomes)}: {outcome[:300]}")

    def run(self, count: int, case: st.SearchStrategy, name: str, write: Callable) -> None:
        """Tries `count` cases; `write(path, case)` makes a case's file."""

        @hypothesis.settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case)
        def attempt(value: Any) -> None:
            self.try_file(name, lambda path: write(path, value))

        attempt()


def _bytes(path: pathlib.Path, content: bytes) -> None:
    path.write_bytes(content)


def _as_archive(path: pathlib.Path, program: bytes) -> None:
    write_archive(path, program, {"0": bytes(16)})


def fuzz_safetensors(count: int, folder: pathlib.Path) -> list[str | None]:
    fuzz = Fuzz(read_file, folder)
    genuine = (bad_files.FIXTURES / "torch_cifar.safetensors").read_bytes()
    small = bad_files.safetensors(bad_files.entry(), bytes(16))
    fuzz.run(count // 2, lying_safetensors(genuine), "x.safetensors", _bytes)
    fuzz.run(count - count // 2, damaged([genuine, small]), "x.safetensors", _bytes)
    return fuzz.outcomes


def fuzz_torch(count: int, folder: pathlib.Path) -> list[str | None]:
    fuzz = Fuzz(read_file, folder)
    files = [bad_files.FIXTURES / name for name in TORCH_FILES]
    fuzz.run(count // 4, damaged([file.read_bytes() for file in files]), "x.pth", _bytes)
    pickles = [pickled(b"}", "a", tensor(), b"s")]
    for file in files:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            pickles.append(archive.read(name))
    # In a sound archive, so that the damage is read.
    fuzz.run(count // 4, damaged(pickles), "x.pth", _as_archive)
    fuzz.run(count - 2 * (count // 4), programs(), "x.pth", _as_archive)
    return fuzz.outcomes


def fuzz_sprites(count: int, folder: pathlib.Path) -> list[str | None]:
    fuzz = Fuzz(cifar10._read_archive, folder)
    members = bad_files.npm_members()
    sprite, labels = members["package/data_batch_2.png"], members["package/train_lables.json"]
    name = cifar10.NPM_ARCHIVE

    def with_member(**changes: bytes) -> bytes:
        return gzip.compress(bad_files.tar_bytes(bad_files.npm_members(**changes)), 0)

    def write_sprite(path: pathlib.Path, content: bytes) -> None:
        path.write_bytes(with_member(data_batch_1=content))

    def write_labels(path: pathlib.Path, content: bytes) -> None:
        path.write_bytes(with_member(train=content))

    def write_tar(path: pathlib.Path, content: bytes) -> None:
        path.write_bytes(gzip.compress(content, 0))

    share = count // 4
    fuzz.run(share, damaged([sprite, bad_files.png_bomb()]), name, write_sprite)
    as_json = JSON.map(lambda value: json.dumps(value).encode())
    fuzz.run(share, damaged([labels, b"[[1], {}]"]) | as_json, name, write_labels)
    fuzz.run(share, damaged([bad_files.tar_bytes(members)]), name, write_tar)
    whole = gzip.compress(bad_files.tar_bytes(members))
    fuzz.run(count - 3 * share, damaged([whole]), name, _bytes)
    return fuzz.outcomes


READERS = {"safetensors": fuzz_safetensors, "torch.save": fuzz_torch, "npm archive": fuzz_sprites}


def rows(is_long: bool, folder: pathlib.Path) -> Iterator[Row]:
    """Fuzzes each reader.

    Args:
      is_long: whether with 12,000 files rather than 300.
      folder: an empty one, to work in.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = NUM_CASES[is_long]
    for name, fuzz in READERS.items():
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            outcomes = fuzz(count, folder / name)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown >= MOST_BYTES:
            outcomes[-1] = f"the memory grew by {grown / 2**30:.1f} GB"
        yield row_of(PROMISE, f"a broken file for the {name} reader", outcomes)
