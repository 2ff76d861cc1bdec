"""Files of torch.save put together by hand: archives of any pickle, and pickles of any opcodes."""

import json
import pathlib
import pickle
import zipfile

import numpy as np


def write_archive(
    path: pathlib.Path,
    program: bytes,
    storages: dict[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    **members: bytes,
) -> pathlib.Path:
    """A zip archive as torch.save lays it out; `members` are further ones, by name."""
    contents = {"data.pkl": program, "byteorder": b"little", "version": b"3\n"}
    contents |= {f"data/{key}": content for key, content in (storages or {}).items()}
    contents |= {name.replace("__", "."): content for name, content in members.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(f"archive/{name}", content)
    return path


def pickled(*parts: object) -> bytes:
    """A pickle of protocol 2: opcodes where a part is bytes, else that which pushes the value."""
    program = b"\x80\x02"
    for part in parts:
        program += part if isinstance(part, bytes) else pickle.dumps(part, 2)[2:-1]
    return program + b"."


def storage(count: object = 4, key: object = "0", kind: str = "FloatStorage") -> bytes:
    """Opcodes that push a storage."""
    return b"".join(
        (
            b"(",
            pickled("storage")[2:-1],
            f"ctorch\n{kind}\n".encode(),
            pickled(key, "cpu", count)[2:-1],
            b"tQ",
        )
    )


def tensor(shape: object = (4,), strides: object = (1,), offset: object = 0, **of: object) -> bytes:
    """Opcodes that push a tensor."""
    return b"".join(
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            storage(**of),
            pickled(offset, shape, strides, False)[2:-1],
            b"ccollections\nOrderedDict\n)RtR",
        )
    )


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """By the format's description, without the package that reads it."""
    names = {
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "int64": "I64",
        "uint16": "U16",
    }
    header, content = {}, b""
    for name, array in tensors.items():
        start = len(content)
        content += np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, len(content)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path
