"""Where encoded images come from: the records of a tfds dataset, or the files of a folder.

A reader is given to other processes by pickling it, and is light then.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jepa_jax.data import prepared
from jepa_jax.data.images import decode_image
from jepa_jax.data.shared import SharedMemory
from jepa_jax.errors import DataError

# Above the size of any image that is worth decoding; 16 processes may read at once.
_MOST_BYTES = 2**28

Contents = list[bytes | Exception]


class Reader(Protocol):
    """N encoded images by their positions, 0 to N - 1."""

    folder: str

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int]) -> tuple[Contents, list[int] | None]:
        """Contents, or why there is none, and labels where they lie beside the images.

        Raises:
          DataError: what holds the images is damaged, not a single one of them.
        """
        ...

    def name_of(self, position: int) -> str:
        """What a person finds the image by."""
        ...

    def too_many_broken(self, what: str) -> DataError:
        """The error of a dataset whose images cannot be decoded, with the way out."""
        ...


class BrokenImage(Exception):
    """One image that cannot be decoded; says why in a few words."""


def decoded(content: bytes | Exception, size: int) -> np.ndarray:
    """`decode_image`, for what a reader gives.

    Raises:
      BrokenImage: if that is not possible.
    """
    try:
        if isinstance(content, Exception):
            raise content
        return decode_image(content, size)
    except Exception as error:  # Pillow raises many kinds
        raise BrokenImage(" ".join(str(error).split())[:100] or type(error).__name__) from error


def decode_into(
    images: np.ndarray, slots: np.ndarray, contents: Contents, reader: Reader, size: int
) -> list[tuple[int, str]]:
    """Decodes contents into the slots of images uint8 [B, H, W, 3].

    Returns:
      (slot, reason) of those that are broken.

    Raises:
      DataError: an image has another size.
    """
    broken = []
    for slot, content in zip(slots.tolist(), contents, strict=True):
        try:
            image = decoded(content, size)
        except BrokenImage as error:
            broken.append((slot, str(error)))
            continue
        if image.shape != images.shape[1:]:
            raise _differ_in_size(reader, image.shape, images.shape[1:])
        images[slot] = image
    return broken


def _differ_in_size(reader: Reader, found: tuple[int, ...], shape: tuple[int, ...]) -> DataError:
    return DataError(
        f"the images in {reader.folder} differ in size ({found} and {shape}): "
        f"--config.data.image_size={min(shape[:2])} brings them to one"
    )


class TfdsReader:
    """The images of one or more splits of a dataset that tfds has prepared as ArrayRecord.

    Args:
      folder: of the prepared dataset.
      split: its name, or names joined by +.
      image_key, label_key: features; the label's may be empty.
    """

    def __init__(self, folder: pathlib.Path, split: str, image_key: str, label_key: str):
        self.folder = str(folder)
        self._split, self._image_key, self._label_key = split, image_key, label_key
        self._opened: Any = None

    def __len__(self) -> int:
        return len(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    @property
    def _source(self) -> Any:
        if self._opened is None:
            import tensorflow_datasets as tfds

            builder = tfds.builder_from_directory(self.folder)
            # Every image of a record would be decoded, also those that nobody asks for.
            features = builder.info.features.items()
            images = [key for key, feature in features if isinstance(feature, tfds.features.Image)]
            decoders = {key: tfds.decode.SkipDecoding() for key in images}
            self._opened = builder.as_data_source(self._split, decoders=decoders)
        return self._opened

    def read(self, positions: Sequence[int]) -> tuple[Contents, list[int] | None]:
        records = self._records(positions)
        labels = [int(record[self._label_key]) for record in records] if self._label_key else None
        return [record[self._image_key] for record in records], labels

    def _records(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        try:
            return self._source.__getitems__([int(position) for position in positions])
        # The readers of records and of protocol buffers each raise their own kinds.
        except Exception as error:
            raise prepared.damaged(pathlib.Path(self.folder), error) from error

    def name_of(self, position: int) -> str:
        return f"record {position} of {self._split}"

    def too_many_broken(self, what: str) -> DataError:
        return prepared.damaged(pathlib.Path(self.folder), what)


class Names:
    """Many names in little memory, one for all processes: their bytes, and where each one ends."""

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._count = len(encoded)
        self._memory = SharedMemory(ends.nbytes + int(ends[-1]))
        self._memory.content[: ends.nbytes] = ends.view(np.uint8)
        self._memory.content[ends.nbytes :] = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        ends = self._memory.content[: 8 * (self._count + 1)].view(np.int64)
        start, end = ends.nbytes + ends[index : index + 2]
        return os.fsdecode(self._memory.content[start:end].tobytes())


class FolderReader:
    """The image files of a folder.

    Args:
      folder: where they lie.
      names: their paths in it.
    """

    def __init__(self, folder: str, names: Names):
        self.folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def read(self, positions: Sequence[int]) -> tuple[Contents, None]:
        return [self._content(int(position)) for position in positions], None

    def _content(self, position: int) -> bytes | Exception:
        try:
            with open(os.path.join(self.folder, self._names[position]), "rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            return ValueError(error.strerror or str(error))
        if len(content) > _MOST_BYTES:
            return ValueError(f"a file of more than {_MOST_BYTES} bytes")
        return content

    def name_of(self, position: int) -> str:
        name = self._names[position]
        # What would break the line, or no terminal shows, is written as Python does.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)

    def too_many_broken(self, what: str) -> DataError:
        return DataError(
            f"{what} in {self.folder}: remove them, or allow more by --config.data.max_broken"
        )
