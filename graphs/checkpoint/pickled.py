"""What a pickle of ``torch.save`` says of tensors, without doing what a pickle asks.

Unpickling calls whatever the file names. Here the instructions that a state dict is made of are interpreted, and the
names that it needs stand for themselves: nothing is imported, and nothing is called. All else is refused by its name.

Formats: Python's ``pickletools`` for the instructions; ``torch/_utils.py`` and ``torch/serialization.py`` of PyTorch
for what a tensor is rebuilt of. A storage is ``("storage", its class, key, device, elements)``, of which the device
is not heeded, and a tensor is a storage, an offset, a shape and strides in elements, and further fields that have no
part in its numbers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from makeready.graphs.checkpoint.base import NUMPY_DTYPES, CheckpointError

MOST = 2**63  # of a number: what PyTorch counts elements with

_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch.storage UntypedStorage": "",  # bytes, whose dtype the tensor says
}
_DTYPES = {f"torch {name}": name for name in NUMPY_DTYPES}  # PyTorch has the same names
_DICT = "collections OrderedDict"
_TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER = (
    f"torch._utils _rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter")
)
_KNOWN = {_DICT, _TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER, *_STORAGES, *_DTYPES}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a view of a storage; offset and strides in elements.

    Attributes:
        storage: name of the bytes that it is a view of.
        stored: elements of the storage, or bytes of an untyped one.
        dtype: a key of ``NUMPY_DTYPES``.
    """

    storage: str
    stored: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


class _MalformedError(Exception):
    """The instructions make no sense."""


_MARK = object()


def pickled_tensors(data: bytes, path: Path) -> dict[str, PickledTensor]:
    """The tensors of a pickled state dict, by name; numbers and texts beside them are left out.

    Args:
        data: the pickle.
        path: its file, for messages.

    Raises:
        CheckpointError: it asks for more than a state dict needs, is malformed, or is no dict of tensors.
    """
    try:
        made = _run(data, path)
    # What pickletools and struct raise for bytes that are no pickle.
    except (_MalformedError, ValueError, IndexError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a malformed pickle; download it again") from None
    if not isinstance(made, dict):
        raise CheckpointError(f"{path} holds no dict of tensors; save what state_dict() gives")
    found = {name: value for name, value in made.items() if isinstance(value, PickledTensor)}
    if not found:
        inner = (
            name
            for name, value in made.items()
            if isinstance(value, dict) and any(isinstance(one, PickledTensor) for one in value.values())
        )
        name = next(inner, None)
        within = "has no tensors" if name is None else f"has its tensors within {name!r:.80}"
        raise CheckpointError(f"{path} {within}; save a dict of tensors by name, as state_dict() gives it")
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path} has tensors that are not called by names; save what state_dict() gives"
        )
    return found


@dataclass
class _Machine:
    """The stack of a pickle, and what it remembers."""

    path: Path
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise _MalformedError
        return value

    def marked(self) -> list[Any]:
        """All above the last mark."""
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def remember(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise _MalformedError
        self.memo[key] = self.stack[-1]

    def put(self, items: list[Any]) -> None:
        """Keys and values in turn into the dict on top."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _MalformedError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise _MalformedError
            if key in target:  # a tensor must have one meaning
                raise CheckpointError(f"{self.path} has {key!r:.80} twice; download it again")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _MalformedError
        self.stack[-1] += items

    def named(self, name: Any) -> None:
        if name not in _KNOWN:
            raise CheckpointError(
                f"{self.path} asks for {str(name).replace(' ', '.')!r:.120}, which no plain tensor needs and which "
                "is not run; use the model's safetensors files, or save a dict of plain tensors"
            )
        self.stack.append(_Name(name))

    def stored(self) -> None:
        """A persistent id, which stands for a storage."""
        mark, kind, key, _, count = _tuple(self.pop(), 5)
        if mark != "storage" or type(kind) is not _Name or kind.name not in _STORAGES or type(key) is not str:
            raise _MalformedError
        self.stack.append(_Storage(key, _STORAGES[kind.name], _size(count)))

    def called(self) -> None:
        given, function = self.pop(), self.pop()
        if type(function) is not _Name or type(given) is not tuple:
            raise _MalformedError
        if function.name == _DICT:
            _tuple(given, 0)
            self.stack.append({})
        elif function.name == _PARAMETER:
            tensor, _, _ = _tuple(given, 3)
            if type(tensor) is not PickledTensor:
                raise _MalformedError
            self.stack.append(tensor)
        elif function.name == _TENSOR:
            storage, offset, shape, strides = given[:4]
            self.stack.append(_tensor(storage, offset, shape, strides, ""))
        elif function.name == _TENSOR_WITH_DTYPE:
            storage, offset, shape, strides, _, _, dtype = given[:7]
            if type(dtype) is not _Name:
                raise _MalformedError
            self.stack.append(_tensor(storage, offset, shape, strides, _DTYPES[dtype.name]))
        else:
            raise _MalformedError

    def built(self) -> None:
        """Attributes of an object: those of a state dict are versions of modules."""
        self.pop()
        if type(self.stack[-1]) is not dict:
            raise _MalformedError


def _run(data: bytes, path: Path) -> Any:
    machine = _Machine(path)
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            break
        if opcode.name in _CONSTANTS:
            machine.stack.append(_CONSTANTS[opcode.name])
        elif opcode.name in _VALUES:
            machine.stack.append(_number(argument) if type(argument) is int else argument)
        elif opcode.name in _DONE:
            _DONE[opcode.name](machine, argument)
        elif opcode.name not in _NOTHING:
            raise CheckpointError(
                f"{path} has the pickle instruction {opcode.name}, which no plain tensor needs; "
                "use the model's safetensors files, or save a dict of plain tensors"
            )
    return machine.pop()


_NOTHING = {"PROTO", "FRAME"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_DONE: dict[str, Callable[[_Machine, Any], None]] = {
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.stack.append((m.pop(),)),
    "TUPLE2": lambda m, _: m.stack.append((m.pop(), m.pop())[::-1]),
    "TUPLE3": lambda m, _: m.stack.append((m.pop(), m.pop(), m.pop())[::-1]),
    "SETITEM": lambda m, _: m.put([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.put(m.marked()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "BINPUT": lambda m, key: m.remember(key),
    "LONG_BINPUT": lambda m, key: m.remember(key),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "LONG_BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "GLOBAL": lambda m, name: m.named(name),
    "STACK_GLOBAL": lambda m, _: m.named(" ".join((m.pop(), m.pop())[::-1])),
    "BINPERSID": lambda m, _: m.stored(),
    "REDUCE": lambda m, _: m.called(),
    "BUILD": lambda m, _: m.built(),
}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str) -> PickledTensor:
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise _MalformedError
    if len(shape) != len(strides) or bool(dtype) == bool(storage.dtype):
        raise _MalformedError
    sizes, steps = tuple(map(_size, shape)), tuple(map(_size, strides))
    return PickledTensor(storage.key, storage.count, dtype or storage.dtype, _size(offset), sizes, steps)


def _tuple(value: Any, length: int) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) != length:
        raise _MalformedError
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _MalformedError
    return value


def _number(value: int) -> int:
    if not -MOST <= value < MOST:
        raise _MalformedError
    return value
