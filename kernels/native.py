"""The compiled CPU ops of ``csrc/*.c``, called through ctypes with everything looked up before.

setup.py compiles them when the package is installed. Where there was no compiler, or the library is of
another version of the code, :func:`prepare` gives None and the PyTorch implementations run.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

LAYOUT = 8  # of the argument structs; the same number in cpu_ops.c
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_HEAD, MAX_GROUP, MAX_TILED = 1024, 64, 256
MANY_TOKENS = 64  # of which ops last long enough to let other threads of the interpreter run
# Multiplications of a call that other threads of the interpreter may run beside: some 100 µs.
LONG = 2**24


@functools.cache
def _library() -> ctypes.PyDLL | None:
    # PyDLL: calls last microseconds, less than what releasing the interpreter can cost.
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_ops{suffix}")
        if path.exists():
            try:
                library = ctypes.PyDLL(str(path))
            except OSError:  # of another machine
                return None
            library.layout.restype = ctypes.c_int64
            return library if library.layout() == LAYOUT else None
    return None


@functools.cache
def _releasing(library: ctypes.PyDLL) -> ctypes.CDLL:
    """The same library, whose calls let other threads of the interpreter run."""
    return ctypes.CDLL(library._name)


def available() -> bool:
    """Whether the compiled ops are there."""
    return _library() is not None


def prepare(
    op: str, *fields: torch.Tensor | int | float | None, long: bool = False, threads: int | None = None
) -> Callable[[], None] | None:
    """A call of ``op`` with these fields and ``threads``, in the order of its struct; None without the library.

    Args:
        op: function of csrc/*.c.
        fields: tensors pass their address; the caller keeps them while the call is in use.
        long: whether it lets go of the interpreter.
        threads: that share the work; None is as many as PyTorch may use.
    """
    library = _library()
    if library is None:
        return None
    fields = (*fields, threads or torch.get_num_threads())
    layout, values = "", []
    for field in fields:
        if isinstance(field, float):
            layout, value = layout + "d", field
        elif isinstance(field, int):
            layout, value = layout + "q", field
        else:
            layout, value = layout + "P", 0 if field is None else field.data_ptr()
        values.append(value)
    function = (_releasing(library) if long else library)[op]  # an instance of its own, unlike the attribute
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    return functools.partial(function, ctypes.create_string_buffer(struct.pack(f"@{layout}", *values)))


def keeping(call: Callable[[], None], *kept: torch.Tensor) -> Callable[[], None]:
    """``call``, with tensors of its own that live as long as it does."""
    call.kept = kept  # type: ignore[attr-defined]
    return call
