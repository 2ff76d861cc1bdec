"""Where prepared tfds datasets lie on the disk, and whether they are whole."""

import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterator

from jepa_jax.errors import DataError

# Beside a copy in another format, the ArrayRecord copy lies in this folder of the data folder.
ARRAY_RECORD_HOME = "array_record"
_INFO = "dataset_info.json"
_NAME = re.compile(r"(?P<base>\w+(/[\w.+-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_dir(configured: str = "") -> pathlib.Path:
    """The data folder: `configured`, else EBJEPA_DSETS, else TFDS_DATA_DIR, else tfds's default.

    Raises:
      DataError: it is below the home of a user whom this machine does not know.
    """
    chosen = configured or os.environ.get("EBJEPA_DSETS") or os.environ.get("TFDS_DATA_DIR")
    folder = pathlib.Path(chosen or "~/tensorflow_datasets")
    try:
        return folder.expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise DataError(f"the data folder {folder} cannot be found: {error}") from error


def copies(root: pathlib.Path, name: str) -> dict[pathlib.Path, str]:
    """Folder and file format of every prepared copy of a dataset under the data folder.

    Args:
      root: the data folder.
      name: `name`, `name/config`, either with `:version`.

    Raises:
      DataError: the name has another form, or a copy's dataset_info.json cannot be read.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        of_images = f", and a folder of images as folder:{name}" if os.path.isdir(name) else ""
        raise DataError(
            f"{name!r} is not a dataset name: write it as name, name/config or name:1.0.0"
            f"{of_images}"
        )
    found = {}
    for home in (root, root / ARRAY_RECORD_HOME):
        folder = home / match["base"]
        for info in sorted([*folder.glob(f"*/{_INFO}"), *folder.glob(f"*/*/{_INFO}")]):
            version = info.parent.name
            if _VERSION.fullmatch(version) and match["version"] in (None, version):
                found[info.parent] = str(_read_info(info.parent).get("fileFormat", "tfrecord"))
    return found


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder of the newest ArrayRecord copy, or None.

    Raises:
      DataError: as `copies`, or several configs are prepared and `name` says none.
    """
    folders = [f for f, file_format in copies(root, name).items() if file_format == "array_record"]
    configs = sorted({folder.parent.name for folder in folders})
    if len(configs) > 1:
        base = name.split(":")[0]
        raise DataError(
            f"{name} is prepared as {', '.join(f'{base}/{c}' for c in configs)}: name one"
        )
    return max(folders, key=lambda f: [int(n) for n in f.name.split(".")], default=None)


def free_home(root: pathlib.Path, name: str) -> pathlib.Path:
    """Where to prepare `name` so that no folder which exists is touched."""
    return root / ARRAY_RECORD_HOME if (root / name).exists() else root


def _read_info(folder: pathlib.Path) -> dict:
    try:
        return dict(json.loads((folder / _INFO).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{_INFO} cannot be read ({error})") from error


def damaged(folder: pathlib.Path, what: object) -> DataError:
    """The error for a prepared dataset that is not whole, in one line with the way out."""
    what = " ".join(str(what).split())[:300]
    return DataError(f"the data in {folder} is damaged ({what}): delete that folder and run again")


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silences tfds's own bars and prints, which go to stdout and cannot be turned off."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield
