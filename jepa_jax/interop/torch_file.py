"""The files of torch.save and of safetensors, read without PyTorch and without trusting them.

torch.save (1.6 and newer) writes an uncompressed zip archive: `<name>/data.pkl`, a pickle of
everything but the tensors' elements, and a member `<name>/data/<key>` for each storage. The
pickle is read by `torch_pickle`, which runs nothing.
"""

import hashlib
import os
import pathlib
import re
import zipfile
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors

from jepa_jax.errors import CheckpointError
from jepa_jax.interop.torch_pickle import Refused, read_pickle

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# A ResNet-34 with its optimiser's state and a momentum encoder has 0.4 GB; a sparse file of a few
# bytes on the disk may say that it has terabytes.
_MOST_BYTES = 8 * 2**30
# Of safetensors' JSON, some 100 bytes a tensor: a ResNet has a few hundred.
_MOST_HEADER_BYTES = 8 * 2**20
# A pickle of the number that files of torch.save before 1.6 begin with, after its protocol.
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"


def shown(text: str, length: int = 120) -> str:
    """A file's own text as part of one line: cut, and without what a terminal would act on."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def read_file(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The content of a file of torch.save or safetensors, and the SHA-256 of its bytes.

    Returns:
      (content, digest): dicts, lists, tuples, numbers, texts and numpy arrays, in the types they
      are stored in; some are read-only views of each other.

    Raises:
      CheckpointError: if it is neither, is damaged, or holds anything but tensors and plain
        containers. Nothing of it was run.
    """
    path = pathlib.Path(path)
    try:
        path = path.expanduser()
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            content = _read(path, file)
            file.seek(0)
            return content, hashlib.file_digest(file, "sha256").hexdigest()
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Refused as error:
        raise CheckpointError(
            f"{path} holds {shown(str(error))}, which is neither a tensor nor a plain container: "
            "nothing was run; where PyTorch is installed and the file is trusted, load it and save "
            f"its weights alone: {_SAVE_WEIGHTS}"
        ) from error
    except Exception as error:  # zipfile, pickletools, safetensors and numpy raise their own kinds
        reason = shown(" ".join(str(error).split())) or "no message"
        if reason.startswith("Bad CRC-32"):
            reason += "; torch.serialization.set_crc32_options(False) leaves out what is checked"
        raise CheckpointError(
            f"{path} cannot be read: it is cut off or damaged ({type(error).__name__}: {reason})"
        ) from error


def _read(path: pathlib.Path, file: BinaryIO) -> Any:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(64)
    file.seek(0)
    if not size:
        raise CheckpointError(f"{path} is empty")
    if size > _MOST_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than any ResNet")
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, file, size)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path, file)
    if start[2:].startswith(_LEGACY_MAGIC):
        raise CheckpointError(
            f"{path} has the format of PyTorch before 1.6, which is not read: "
            "torch.save(torch.load(FILE), 'new.pth') writes the one that is"
        )
    if start.startswith(b"\x80"):
        raise CheckpointError(f"{path} is a bare pickle, not a file of torch.save: nothing was run")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS: `git lfs pull` fetches the file")
    raise CheckpointError(f"{path} is neither a file of torch.save nor of safetensors")


def _read_safetensors(path: pathlib.Path, file: BinaryIO) -> dict[str, np.ndarray]:
    """safetensors.deserialize rather than safetensors.numpy, whose releases differ in bfloat16."""
    arrays, header_bytes = {}, int.from_bytes(file.read(8), "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes, far more than tensors need")
    file.seek(0)
    # It gives them in another order each time.
    for name, tensor in sorted(safetensors.deserialize(file.read()), key=lambda item: item[0]):
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{path} holds {shown(name)} of type {shown(tensor['dtype'])}, which is not read"
            )
        elements = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = elements.reshape(tensor["shape"])
    return arrays


def _read_zip(path: pathlib.Path, file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if any(re.match(r"[^/]+/(code/|constants\.pkl$)", name) for name in members):
            raise CheckpointError(
                f"{path} is a TorchScript program, not weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth') keeps its weights"
            )
        if len(members) != len(archive.infolist()):
            raise ValueError("two members of one name")
        # Stored as they are, as torch.save does, members cannot be larger than the file.
        for name, member in members.items():
            is_stored = member.compress_type == zipfile.ZIP_STORED
            if not is_stored or member.file_size != member.compress_size:
                raise ValueError(f"{name} is compressed")
        if sum(member.file_size for member in members.values()) > size:
            raise ValueError("members larger than the file")
        pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in members and (found := archive.read(order)) != b"little":
            raise CheckpointError(
                f"{path} was written in byte order {shown(repr(found))}: only little is read"
            )

        def read_storage(key: str) -> bytes:
            if not re.fullmatch(r"[0-9A-Za-z_]+", key):
                raise ValueError("a storage of an impossible name")
            return archive.read(f"{folder}data/{key}")

        return read_pickle(archive.read(pickles[0]), read_storage)
