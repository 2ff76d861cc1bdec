"""A dataset by name, decoded into arrays or as records; of tfds with a cache beside its files."""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tqdm

from jepa_jax.data import cifar10, prepared, readers
from jepa_jax.data.dataset import Dataset
from jepa_jax.data.folder import FOLDER_PREFIX, load_folder
from jepa_jax.data.records import Records
from jepa_jax.errors import DataError
from jepa_jax.progress import say

_CACHE = "jepa_jax_cache"
_INDEX = "index.json"
_TEST_SPLITS = ("test", "validation")


def load_dataset(
    name: str,
    *,
    data_dir: str = "",
    lazy: bool = False,
    num_workers: int = 2,
    image_size: int = 0,
    train_split: str = "train",
    unlabelled_split: str = "",
    test_split: str = "",
    max_broken: float = 0.01,
) -> Dataset:
    """A dataset of tfds, prepared as ArrayRecord, or a folder of images.

    cifar10 is prepared on first use; any other dataset of tfds has to be prepared already. A folder
    holds PNG, JPEG and WebP files, in folders of any depth; see `folder.load_folder`.

    Args:
      name: `name`, `name/config`, either with `:version`; or `folder:/path/to/images`.
      data_dir: the data folder of tfds; see `prepared.data_dir` for the default.
      lazy: decode images when they are indexed (`Records`) instead of reading all of them now.
      num_workers: threads, and processes, that decode images.
      image_size: the side that images are resized and cut to, see `decode_image`; 0: they stay as
        they are and share one size.
      train_split: of the training images.
      unlabelled_split: of more training images, whose labels are not used: -1.
      test_split: of the test images; '' for 'test', or 'validation' where 'test' is absent or has
        no labels (in a folder also 'val'), or none.
      max_broken: the share of the images, of the training and of the test ones, that may be broken;
        for these others stand in, see `Records`.

    Raises:
      DataError: the dataset is unknown, not prepared, damaged, or has no images of one size.
    """
    splits = {"train": train_split, "unlabelled": unlabelled_split, "test": test_split}
    options = {"size": image_size, "num_workers": num_workers, "max_broken": max_broken}
    if name.startswith(FOLDER_PREFIX):
        dataset = load_folder(name, splits, **options)
        return dataset if lazy else _in_memory(dataset)
    return _load_tfds(name, prepared.data_dir(data_dir), lazy, splits, options)


def _in_memory(dataset: Dataset) -> Dataset:
    """The dataset with its images decoded."""
    images: dict[str, Any] = {"train": dataset.train_images, "test": dataset.test_images}
    decoded = {
        split: _read_all(split, records, with_images=True)[f"{split}_images"]
        for split, records in images.items()
        if records is not None
    }
    return dataclasses.replace(
        dataset, train_images=decoded["train"], test_images=decoded.get("test")
    )


def _load_tfds(
    name: str, root: pathlib.Path, lazy: bool, splits: dict[str, str], options: dict[str, Any]
) -> Dataset:
    folder = cifar10.prepare(root) if name == "cifar10" else prepared.find(root, name)
    if folder is None:
        raise DataError(_how_to_prepare(root, name))
    # Pixels are kept as they are; of another size they are decoded again.
    with_images, request = not lazy and not options["size"], _request(splits)
    arrays = _read_cache(folder, with_images=with_images, request=request)
    records: dict[str, Records] = {}
    if not with_images or arrays is None:
        label_names, records = _open(folder, splits, options)
    if arrays is None:
        arrays = {"label_names": np.array(label_names, np.str_)}
        for split, some in records.items():
            arrays |= _read_all(split, some, with_images=with_images)
        if "train_labels" in arrays:
            arrays["train_labels"][_num_labelled(folder, splits) :] = -1
        # Also for labels alone: scanning large records for them takes long.
        _write_cache(folder, arrays, request)
    _check_labels(arrays, folder)
    _check_broken(arrays, folder, options["max_broken"])
    labels = {split: arrays.get(f"{split}_labels") for split in ("train", "test")}
    images: dict[str, Any] = {s: arrays.get(f"{s}_images") for s in labels}
    if not with_images:
        images = {split: some.with_labels(labels[split]) for split, some in records.items()}
    dataset = Dataset(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images.get("test"),
        test_labels=labels["test"],
        label_names=tuple(arrays["label_names"].tolist()),
    )
    return dataset if lazy or with_images else _in_memory(dataset)


def _request(splits: dict[str, str]) -> str:
    """What tells the caches of other splits apart; '' for the usual ones."""
    chosen = [splits["train"], splits["unlabelled"], splits["test"]]
    return "" if chosen == ["train", "", ""] else re.sub(r"[^\w-]", "_", "-".join(chosen))


def _num_labelled(folder: pathlib.Path, splits: dict[str, str]) -> int:
    """How many of the training images are not of the unlabelled split."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).info.splits[splits["train"]].num_examples


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


def _open(
    folder: pathlib.Path, splits: dict[str, str], options: dict[str, Any]
) -> tuple[list[str], dict[str, Records]]:
    """Label names, and the records to train on and, where there are some, to test on."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(folder).info
        keys = _find_keys(info, folder)
        train = "+".join(filter(None, (splits["train"], splits["unlabelled"])))
        opened = {"train": _reader(folder, info, train, keys)}
        for split in (splits["test"],) if splits["test"] else _TEST_SPLITS:
            if "test" in opened or not (splits["test"] or split in info.splits):
                continue
            reader = _reader(folder, info, split, keys)
            labels = reader.read([0])[1]
            if splits["test"] or labels is None or labels[0] >= 0:
                opened["test"] = reader
        records = {split: Records(reader, **options) for split, reader in opened.items()}
    except DataError:
        raise
    # tfds raises many kinds when its metadata or its files are not what it wrote.
    except Exception as error:
        raise prepared.damaged(folder, error) from error
    return info.features[keys[1]].names if keys[1] else [], records


def _reader(
    folder: pathlib.Path, info: Any, splits: str, keys: tuple[str, str]
) -> readers.TfdsReader:
    """Of splits joined by +, all of whose shards are there."""
    for split in splits.split("+"):
        if split not in info.splits:
            there = ", ".join(sorted(info.splits))
            raise DataError(f"the dataset in {folder} has no split {split!r}; there are: {there}")
        _check_shards(folder, info.splits[split])
    return readers.TfdsReader(folder, splits, *keys)


def _find_keys(info: Any, folder: pathlib.Path) -> tuple[str, str]:
    """The keys of the uint8 image and of the class label that the dataset is meant for.

    The second is empty for a dataset without class labels.
    """
    import tensorflow_datasets as tfds

    images, labels = [], []
    for key, feature in info.features.items():
        if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8:
            images.append(key)
        elif isinstance(feature, tfds.features.ClassLabel):
            labels.append(key)
    chosen = []
    for kind, found in (("image", images), ("label", labels)):
        if kind == "label" and not found:
            chosen.append("")
            continue
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


def _check_broken(arrays: dict[str, np.ndarray], folder: pathlib.Path, most: float) -> None:
    """DataError if more images were broken, when they were read, than may be."""
    for split in ("train", "test"):
        broken, images = arrays.get(f"{split}_broken"), arrays.get(f"{split}_images")
        if broken is None or images is None:
            continue
        what = f"{len(broken)} of {len(images)} images are broken"
        if len(broken) > most * len(images):
            raise prepared.damaged(folder, f"{what}, such as record {broken[0]} of {split}")
        say(f"{'broken':<10}{what}; others stand in")


def _read_all(split: str, records: Records, with_images: bool) -> dict[str, np.ndarray]:
    """What there is of a split: labels int32 [N], images uint8 [N, H, W, 3], which are broken."""
    with tqdm.tqdm(
        desc=f"reading {split}", total=len(records), unit=" images", disable=None
    ) as bar:
        if not with_images:
            found = {"labels": records.read_labels(bar.update)}
        else:
            images, labels = records.read_all(bar.update)
            found = {"images": images, "labels": labels}
            if len(records.broken):
                found["broken"] = records.broken
    return {f"{split}_{kind}": array for kind, array in found.items() if array is not None}


def _fingerprint(folder: pathlib.Path) -> list[list[Any]]:
    """What ties a cache to its records: name, size and time of every file."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read_cache(
    folder: pathlib.Path, with_images: bool, request: str = ""
) -> dict[str, np.ndarray] | None:
    """The cached arrays, mapped from the disk; None if absent, of other records, or damaged.

    The cache is a folder of .npy files and an index: the fingerprint of the records and a CRC-32
    of each array. Mapping and checking CIFAR-10 takes 0.04 s; reading it takes up to 0.3 s.
    """
    cache = folder / _CACHE / request
    try:
        index = json.loads((cache / _INDEX).read_text())
        if index["fingerprint"] != _fingerprint(folder):
            return None
        names = [n for n in index["crc32"] if with_images or not n.endswith("_images")]
        if with_images and "train_images" not in names:
            return None
        arrays = {n: np.load(cache / f"{n}.npy", mmap_mode="r") for n in names}
        intact = all(zlib.crc32(array) == index["crc32"][n] for n, array in arrays.items())
    # Damage can surface as any kind; the records are there to build the cache again.
    except Exception:
        return None
    return {name: np.asarray(array) for name, array in arrays.items()} if intact else None


def _write_cache(folder: pathlib.Path, arrays: dict[str, np.ndarray], request: str = "") -> None:
    """Writes the cache, the index last; a folder that cannot be written does without."""
    cache = folder / _CACHE / request
    index = {
        "fingerprint": _fingerprint(folder),
        "crc32": {name: zlib.crc32(array.data) for name, array in arrays.items()},
    }
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
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
