"""A folder of image files as a dataset: which files, which splits, which classes."""

import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jepa_jax.data.dataset import Dataset
from jepa_jax.data.readers import FolderReader, Names
from jepa_jax.data.records import Records
from jepa_jax.errors import DataError
from jepa_jax.paths import home_expanded
from jepa_jax.progress import say

FOLDER_PREFIX = "folder:"
TEST_SPLITS = ("test", "validation", "val", "valid")
# Names of folders that nobody gives to a class.
_SPLIT_LIKE = {*TEST_SPLITS, "train", "training", "testing", "unlabelled", "unlabeled"}
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class _Files(NamedTuple):
    """Paths relative to a folder, sorted, and how many other files lie there."""

    names: list[str]
    num_others: int


def load_folder(name: str, splits: dict[str, str], **options: Any) -> Dataset:
    """The images of a folder, none of them decoded.

    A folder that has one named as the training split, beside one to test on or beside nothing at
    all, has splits; every other folder is all for training. Where each image of a split lies in one
    of two or more folders, these are its classes.

    Args:
      name: `folder:/path/to/images`.
      splits: folders by 'train', 'unlabelled' and 'test', see `load_dataset`.
      options: of `Records`.

    Raises:
      DataError: there is no such folder, it cannot be read, or it has no images.
    """
    root = _root(name)
    folders = _folders(root, splits)
    files = {split: _scan(root, folder) for split, folder in folders.items()}
    if twice := _first_repeated(os.path.join(folders[s], n) for s in files for n in files[s].names):
        raise DataError(
            f"{twice} in {root} is in two splits: config.data.*_split name the same one"
        )
    if others := sum(some.num_others for some in files.values()):
        say(f"{'data':<10}{others} files in {root} are no PNG, JPEG or WebP by their name: ignored")
    classes = _classes(files["train"].names, root)
    images, labels = {}, {"train": None, "test": None}
    for split, parts in (("train", ("train", "unlabelled")), ("test", ("test",))):
        parts = [part for part in parts if part in files]
        if not parts:
            continue
        if classes:
            of_parts = [_labels(part, files[part].names, classes, root) for part in parts]
            labels[split] = None if of_parts[0] is None else np.concatenate(of_parts)
        names = [os.path.join(folders[part], file) for part in parts for file in files[part].names]
        records = Records(FolderReader(root, Names(names)), **options)
        images[split] = records.with_labels(labels[split])
    return Dataset(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images.get("test"),
        test_labels=labels["test"],
        label_names=tuple(classes),
        fingerprint=_fingerprint(folders, files),
    )


def _first_repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def _fingerprint(folders: dict[str, str], files: dict[str, _Files]) -> str:
    """Of the names of all files and the splits that they are in: a label is a part of a name."""
    value = 0
    for split in sorted(files):
        text = "\0".join([split, folders[split], *files[split].names])
        value = zlib.crc32(os.fsencode(text), value)
    return f"{value:08x}"


def _root(name: str) -> str:
    given = name.removeprefix(FOLDER_PREFIX)
    if not given:
        raise DataError(f"{name} names no folder: write {FOLDER_PREFIX}/path/to/images")
    root = home_expanded(given).absolute()
    try:
        if not root.exists():
            raise DataError(f"there is no folder {root}")
        if not root.is_dir():
            raise DataError(f"{root} is not a folder")
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}") from error
    return str(root)


def _folders(root: str, splits: dict[str, str]) -> dict[str, str]:
    """The folder in `root` of each split that there is; '' for root itself."""
    train, unlabelled, test = (splits[split] for split in ("train", "unlabelled", "test"))
    entries = [entry for entry in _entries(root) if not entry.name.startswith(".")]
    found = {entry.name for entry in entries if _is_folder(entry)}
    has_images = any(entry.name.lower().endswith(_ENDINGS) for entry in entries)
    tests = (test,) if test else tuple(name for name in TEST_SPLITS if name in found)
    asked_for = {"unlabelled": unlabelled, "test": test, "train": train if train != "train" else ""}
    has_splits = train in found and (bool(tests) or (len(found) == 1 and not has_images))
    if not has_splits and not any(asked_for.values()):
        return {"train": ""}
    # The training folder last: who asks for another one is told of that one first.
    folders = {"unlabelled": unlabelled, "test": tests[0] if tests else "", "train": train}
    folders = {split: folder for split, folder in folders.items() if folder}
    for split, folder in folders.items():
        if folder not in found:
            there = ", ".join(sorted(found)[:10]) or "none"
            without = " (--config.data.unlabelled_split= is for none)" * (split == "unlabelled")
            raise DataError(
                f"config.data.{split}_split={folder} is not a folder in {root}; there are: "
                f"{there}{without}"
            )
    return folders


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


def _scan(root: str, folder: str) -> _Files:
    """The image files in a folder in `root` and all folders in it; none of them is opened."""
    names, others, path = [], 0, os.path.join(root, folder)
    for directory, entry in _walk(path, "", ()):
        if entry.name.lower().endswith(_ENDINGS):
            names.append(f"{directory}{entry.name}")
        else:
            others += 1
    if not names:
        raise DataError(f"there are no images (PNG, JPEG, WebP) in {path}")
    return _Files(sorted(names), others)


def _walk(
    root: str, directory: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, os.DirEntry]]:
    """(directory in `root` with a slash at its end, file) of what is not hidden."""
    path = os.path.join(root, directory)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if (stat.st_dev, stat.st_ino) in above:  # a link to a folder that it lies in
        return
    above += ((stat.st_dev, stat.st_ino),)
    for entry in _entries(path):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(root, f"{directory}{entry.name}/", above)
        # A link to nothing is a broken image, which is named, and no class less.
        elif entry.is_symlink() or entry.is_file():
            yield directory, entry


def _classes(names: list[str], root: str) -> list[str]:
    """Class names, sorted; none if there are fewer than two or images lie beside the folders.

    Raises:
      DataError: they are names of splits.
    """
    first = {name.partition("/")[0] for name in names if "/" in name}
    loose = sum("/" not in name for name in names)
    if len(first) < 2:
        return []
    if loose:
        say(
            f"{'data':<10}{loose} images lie beside {len(first)} folders, which are therefore not "
            "classes: training goes on without labels"
        )
        return []
    if splits := sorted(name for name in first if name.lower() in _SPLIT_LIKE):
        raise DataError(
            f"{splits[0]} in {root} looks like a split and not like a class: say which folder is "
            "which by config.data.train_split, test_split and unlabelled_split"
        )
    return sorted(first)


def _labels(split: str, names: list[str], classes: list[str], root: str) -> np.ndarray | None:
    """int32 [N]; -1 in an unlabelled split; None for test images that lie in no class folders."""
    if split == "unlabelled":
        return np.full(len(names), -1, np.int32)
    number = {name: label for label, name in enumerate(classes)}
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    # All of them in one folder: that of nobody's class.
    if "" in first or (len(set(first)) == 1 and first[0] not in number):
        return None
    if unknown := sorted(set(first) - set(number)):
        raise DataError(
            f"the test images in {root} have the class {unknown[0]!r}, which no training image has"
        )
    return np.array([number[name] for name in first], np.int32)
