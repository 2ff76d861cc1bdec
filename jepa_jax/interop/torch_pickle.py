"""Reads the pickle inside a file of torch.save without ever running it.

A pickle is a program for a small stack machine (see `pickletools`), and Python's unpickler runs
it: it imports what the program names and calls it. The machine here knows the instructions that
tensors in plain containers need and no others. A name is a piece of text to it, which it compares
with a short list; it has no instruction that imports, calls or sets an attribute of anything.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

# The classes of PyTorch's typed storages, which stand for the type of what they hold.
_STORAGE_DTYPES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_SIZE = "torch Size"
_KNOWN = {*_STORAGE_DTYPES, _ORDERED_DICT, _TENSOR, _PARAMETER, _SIZE}

_KEY_TYPES = (str, int, bool, type(None))
# Some 40 a tensor. Each may make an object of a hundred bytes, so that a program of nothing else
# would take a hundred times its size.
_MOST_INSTRUCTIONS = 1_000_000

ReadStorage = Callable[[str], bytes]


class Refused(Exception):
    """A pickle that names something other than a tensor or a plain container."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a pickle calls a global: here its name alone, 'module attribute'."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The elements that one or more tensors are views of."""

    elements: np.ndarray


def read_pickle(program: bytes, read_storage: ReadStorage) -> Any:
    """What the pickle describes: dicts, lists, tuples, numbers, texts, and arrays for tensors.

    Tensors are read-only views of their storages; an OrderedDict is a dict, a Parameter its tensor.

    Args:
      program: the pickle.
      read_storage: the bytes of a storage by its key; raises KeyError for an unknown one.

    Raises:
      Refused: if it names anything else, or needs another instruction; `str(error)` says which.
      Exception: of any kind, if it is damaged.
    """
    machine = _Machine(read_storage)
    end = 0
    for count, (instruction, argument, position) in enumerate(pickletools.genops(program)):
        if count == _MOST_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {_MOST_INSTRUCTIONS:,} instructions")
        machine.step(instruction.name, argument)
        end = (position or 0) + 1  # None only of a stream that cannot tell
    # The last instruction, STOP, is one byte.
    if end != len(program):
        raise ValueError(f"{len(program) - end} bytes after the end of its pickle")
    return machine.result()


class _Machine:
    """The stack, the marks and the memo of a pickle in progress."""

    def __init__(self, read_storage: ReadStorage):
        self._read_storage = read_storage
        self._storages: dict[str, bytes] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is left when the program has ended."""
        (value,) = self._stack
        return value

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction; `argument` is the one that lies in the program itself."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
            case "MARK":
                self._marks.append(len(stack))
            case "APPEND":
                self._extend(stack[-2], [stack.pop()])
            case "APPENDS":
                items = self._pop_to_mark()
                self._extend(stack[-1], items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                self._update(stack[-1], items)
            case "SETITEMS":
                items = self._pop_to_mark()
                self._update(stack[-1], items)
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module} {attribute}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_build(function, arguments))
            case "BUILD":
                # An OrderedDict's attributes: a state dict's `_metadata`, of no use here.
                stack.pop()
                if type(stack[-1]) is not dict:
                    raise ValueError("state for what has none")
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise Refused(f"the pickle instruction {name}")

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    @staticmethod
    def _extend(target: Any, items: list[Any]) -> None:
        if type(target) is not list:
            raise ValueError("items for what is no list")
        target.extend(items)

    @staticmethod
    def _update(target: Any, items: list[Any]) -> None:
        if type(target) is not dict:
            raise ValueError("items for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Not tuples: the hash of ones nested in each other may take for ever. Not huge
            # numbers: multiples of 2**61 - 1 have one hash, and a dictionary of them is a list.
            if type(key) not in _KEY_TYPES or (type(key) is int and abs(key) >= 2**31):
                raise ValueError(f"a dictionary key of type {type(key).__name__}, or too large")
            target[key] = value

    def _storage(self, persistent_id: Any) -> _Storage:
        """('storage', class, key, device, number of elements) to the storage's elements."""
        if type(persistent_id) is not tuple or len(persistent_id) != 5:
            raise ValueError("a persistent id that is no storage's")
        kind, name, key, _, count = persistent_id
        types = tuple(type(part) for part in (kind, name, key, count))
        if types != (str, _Name, str, int) or kind != "storage" or name.text not in _STORAGE_DTYPES:
            raise ValueError("a persistent id that is no storage's")
        if key not in self._storages:
            self._storages[key] = self._read_storage(key)
        content, dtype = self._storages[key], _STORAGE_DTYPES[name.text]
        if len(content) != count * dtype.itemsize:
            raise ValueError(f"a storage of {len(content)} bytes for {count} {dtype.name}")
        return _Storage(np.frombuffer(content, dtype))


def _known(name: str) -> _Name:
    if name not in _KNOWN:
        raise Refused(name.replace(" ", "."))
    return _Name(name)


def _build(function: Any, arguments: Any) -> Any:
    """What one of the known names makes of its arguments."""
    if type(function) is not _Name or type(arguments) is not tuple:
        raise ValueError("a call of what is no function")
    if function.text == _ORDERED_DICT and arguments == ():
        return {}
    if function.text == _TENSOR and len(arguments) in (6, 7):
        return _tensor(*arguments[:4])
    if function.text == _PARAMETER and len(arguments) == 3:
        if type(arguments[0]) is np.ndarray:
            return arguments[0]
    elif function.text == _SIZE and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    raise ValueError(f"a call of {function.text.replace(' ', '.')} with other arguments than its")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """A read-only view of a storage; offset and strides count elements, as in PyTorch."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor without a storage, a size or strides")
    numbers = (offset, *shape, *strides)
    are_counts = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not are_counts or len(shape) != len(strides) or len(shape) > 32:
        raise ValueError("a tensor of impossible size")
    elements, size = storage.elements, 1
    for length in shape:
        size *= length
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # More elements than the storage has is a view that repeats them: of no use to weights, and
    # a few bytes could ask for any amount of memory.
    if size > len(elements) or (size and last >= len(elements)):
        raise ValueError("a tensor beyond the end of its storage")
    if not size:
        return np.zeros(shape, elements.dtype)
    return np.lib.stride_tricks.as_strided(
        elements[offset:], shape, [n * elements.itemsize for n in strides], writeable=False
    )
