"""A tfds dataset by name, as arrays with a cache beside the records, or as records."""

import contextlib
import difflib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tqdm

from jepa_jax.data import cifar10, prepared
from jepa_jax.data.dataset import Dataset, Records
from jepa_jax.errors import DataError

_CACHE = "jepa_jax_cache"
_INDEX = "index.json"
_CHUNK = 1024


def load_dataset(
    name: str, *, data_dir: str = "", lazy: bool = False, num_workers: int = 2
) -> Dataset:
    """An image classification dataset of tfds, prepared as ArrayRecord.

    cifar10 is prepared on first use; any other dataset has to be prepared already. The test
    images are the split 'test', or 'validation' where 'test' is absent or has no labels.

    Args:
      name: `name`, `name/config`, either with `:version`.
      data_dir: the data folder; see `prepared.data_dir` for the default.
      lazy: decode images when they are indexed (`Records`) instead of reading all of them now.
      num_workers: threads that decode images.

    Raises:
      DataError: the dataset is unknown, not prepared, damaged, or has no images of one size with
        class labels.
    """
    root = prepared.data_dir(data_dir)
    folder = cifar10.prepare(root) if name == "cifar10" else prepared.find(root, name)
    if folder is None:
        raise DataError(_how_to_prepare(root, name))
    arrays = _read_cache(folder, with_images=not lazy)
    splits: dict[str, Records] = {}
    if lazy or arrays is None:
        label_names, splits = _open(folder, num_workers)
    if arrays is None:
        arrays = {"label_names": np.array(label_names)}
        for split, records in splits.items():
            arrays |= _read_all(split, records, with_images=not lazy)
        # Also for labels alone: scanning large records for them takes long.
        _write_cache(folder, arrays)
    _check_labels(arrays, folder)
    images = splits if lazy else {s: arrays.get(f"{s}_images") for s in ("train", "test")}
    return Dataset(
        name=name,
        train_images=images["train"],
        train_labels=arrays["train_labels"],
        test_images=images.get("test"),
        test_labels=arrays.get("test_labels"),
        label_names=tuple(arrays["label_names"].tolist()),
    )


def _how_to_prepare(root: pathlib.Path, name: str) -> str:
    import tensorflow_datasets as tfds

    base = name.split(":")[0].split("/")[0]
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        nearest = difflib.get_close_matches(base, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        return f"tfds has no dataset {base!r}, and none is prepared in {root}{hint}"
    other = {file_format for file_format in prepared.copies(root, name).values()}
    here = f" (only as {', '.join(sorted(other))})" if other else ""
    home = prepared.free_home(root, base)
    return (
        f"{name} is not prepared as array_record in {root}{here}; prepare it with: python -c "
        f"\"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{home}')"
        ".download_and_prepare(file_format='array_record')\" (most datasets need tensorflow for "
        "this one command; another environment will do)"
    )


def _open(folder: pathlib.Path, num_workers: int) -> tuple[list[str], dict[str, Records]]:
    """Label names, and the records of 'train' and, where there is one, 'test'."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        info = builder.info
        image_key, label_key = _find_keys(info, folder)
        # Every image of a record would be decoded, also those that nobody asks for.
        images = [k for k, f in info.features.items() if isinstance(f, tfds.features.Image)]
        decoders = {key: tfds.decode.SkipDecoding() for key in images}
        splits = {}
        for split in ("train", "test", "validation"):
            if split not in info.splits or (split == "validation" and "test" in splits):
                continue
            _check_shards(folder, info.splits[split])
            source = builder.as_data_source(split, decoders=decoders)
            records = Records(source, image_key, label_key, folder, num_workers)
            if split == "train" or records.labels(slice(0, 1))[0] >= 0:
                splits["train" if split == "train" else "test"] = records
    except DataError:
        raise
    # tfds raises many kinds when its metadata or its files are not what it wrote.
    except Exception as error:
        raise prepared.damaged(folder, error) from error
    if "train" not in splits:
        raise DataError(f"the dataset in {folder} has no split 'train'")
    return info.features[label_key].names, splits


def _find_keys(info: Any, folder: pathlib.Path) -> tuple[str, str]:
    """The keys of the uint8 image and of the class label that the dataset is meant for."""
    import tensorflow_datasets as tfds

    images, labels = [], []
    for key, feature in info.features.items():
        if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8:
            images.append(key)
        elif isinstance(feature, tfds.features.ClassLabel):
            labels.append(key)
    chosen = []
    for kind, found in (("image", images), ("label", labels)):
        # The order of features is not kept on the disk, so that "the first" would mean nothing.
        preferred = [key for key in (*(info.supervised_keys or ()), kind) if key in found]
        if not preferred and len(found) != 1:
            raise DataError(
                f"the dataset in {folder} has {len(found)} features that could be its {kind} "
                f"(8-bit image, class label); its features are {', '.join(sorted(info.features))}"
            )
        chosen += (preferred or found)[:1]
    return chosen[0], chosen[1]


def _check_shards(folder: pathlib.Path, split: Any) -> None:
    """DataError unless every shard is there with the number of records that the info says."""
    from array_record.python import array_record_module

    for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        if not path.exists():
            raise prepared.damaged(folder, f"{path.name} is missing")
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
        if found != expected:
            raise prepared.damaged(folder, f"{path.name} has {found} records, not {expected}")


def _check_labels(arrays: dict[str, np.ndarray], folder: pathlib.Path) -> None:
    """DataError unless every label is that of a class, or -1: others would train on silently."""
    num_classes = len(arrays["label_names"])
    for split in ("train", "test"):
        labels = arrays.get(f"{split}_labels", np.empty(0, np.int32))
        if wrong := labels[(labels < -1) | (labels >= num_classes)][:1].tolist():
            raise prepared.damaged(folder, f"label {wrong[0]} of {num_classes} classes")


def _read_all(split: str, records: Records, with_images: bool) -> dict[str, np.ndarray]:
    """All labels int32 [N] of a split and, if asked for, its images [N, H, W, 3]."""
    labels = np.empty(len(records), np.int32)
    images = np.empty(records.shape, np.uint8) if with_images else None
    with tqdm.tqdm(
        desc=f"reading {split}", total=len(records), unit=" images", disable=None
    ) as bar:
        for start in range(0, len(records), _CHUNK):
            chunk = slice(start, min(start + _CHUNK, len(records)))
            if with_images:
                images[chunk], labels[chunk] = records.read(chunk)
            else:
                labels[chunk] = records.labels(chunk)
            bar.update(chunk.stop - start)
    arrays = {f"{split}_labels": labels}
    return arrays | {f"{split}_images": images} if with_images else arrays


def _fingerprint(folder: pathlib.Path) -> list[list]:
    """What ties a cache to its records: name, size and time of every file."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read_cache(folder: pathlib.Path, with_images: bool) -> dict[str, np.ndarray] | None:
    """The cached arrays, mapped from the disk; None if absent, of other records, or damaged.

    The cache is a folder of .npy files and an index: the fingerprint of the records and a CRC-32
    of each array. Mapping and checking CIFAR-10 takes 0.04 s; reading it takes up to 0.3 s.
    """
    try:
        index = json.loads((folder / _CACHE / _INDEX).read_text())
        if index["fingerprint"] != _fingerprint(folder):
            return None
        names = [n for n in index["crc32"] if with_images or not n.endswith("_images")]
        if with_images and "train_images" not in names:
            return None
        arrays = {n: np.load(folder / _CACHE / f"{n}.npy", mmap_mode="r") for n in names}
        intact = all(zlib.crc32(array) == index["crc32"][n] for n, array in arrays.items())
    # Damage can surface as any kind; the records are there to build the cache again.
    except Exception:
        return None
    return {name: np.asarray(array) for name, array in arrays.items()} if intact else None


def _write_cache(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the cache, the index last; a folder that cannot be written does without."""
    cache = folder / _CACHE
    index = {
        "fingerprint": _fingerprint(folder),
        "crc32": {name: zlib.crc32(array) for name, array in arrays.items()},
    }
    with contextlib.suppress(OSError):
        cache.mkdir(exist_ok=True)
        for leftover in cache.glob("*.tmp"):
            leftover.unlink()
        for name, array in arrays.items():
            with _replacing(cache / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
        with _replacing(cache / _INDEX) as file:
            file.write(json.dumps(index).encode())


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)
