"""Shapes and dtypes, shared by contracts, planner and runtime. Imports no tensor library.

A dimension is an ``int``, the name of an axis that a bucket or the loader gives a length, or what is computed
from one (kernels/size.py). Steps declare their axes in the shapes of what is staged for them; ours have

    T   tokens of the bucket          R   rows (requests) of the bucket
    P   KV pages, known when memory is

>>> TensorSpec(("T", 64), "bfloat16").nbytes({"T": 3})
384
>>> str(TensorSpec(("T*8+3", 64), "bfloat16").under({"P": 7}))
'bfloat16[T*8+3, 64]'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from makeready.kernels.size import Dim, Size, axis_of, parse, renamed, value

TOKENS, ROWS, PAGES = "T", "R", "P"

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype name of a tensor; sizes in the shape may be given as text (``"T*8"``).

    Raises:
        ValueError: the dtype is unknown, or a dimension is no size or may be negative.
    """

    shape: tuple[Dim, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if any(type(d) is not int and not (isinstance(d, str) and d.isidentifier()) for d in self.shape):
            object.__setattr__(self, "shape", tuple(map(_dim, self.shape)))
        for dim in self.shape:
            least = 0 if isinstance(dim, str) else dim if isinstance(dim, int) else dim.of(0)
            if least < 0:
                raise ValueError(f"dimension {dim} of {self} is no size: it may be {least}")

    @property
    def axes(self) -> frozenset[str]:
        """The axes that the shape depends on."""
        return frozenset(axis for axis in map(axis_of, self.shape) if axis is not None)

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where axes have the lengths ``sizes``.

        Raises:
            ValueError: one of its axes has none.
        """
        return tuple(d if isinstance(d, int) else value(d, sizes) for d in self.shape)

    def under(self, sizes: Mapping[str, int]) -> TensorSpec:
        """The spec where axes in ``sizes`` have their lengths, and others stay."""
        shape = tuple(value(d, sizes) if axis_of(d) in sizes else d for d in self.shape)
        return TensorSpec(shape, self.dtype)

    def renamed(self, axes: Mapping[str, str]) -> TensorSpec:
        """The spec with other axes."""
        return TensorSpec(tuple(renamed(d, axes) for d in self.shape), self.dtype)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of a dense tensor of this spec. No axis makes them fewer by growing."""
        return math.prod(self.at(sizes)) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def _dim(written: Dim) -> Dim:
    """A dimension as specs keep it: texts read, a size that is no more than its axis as that."""
    made = parse(written) if isinstance(written, str) else written
    if isinstance(made, Size):
        return made.simple
    if isinstance(made, bool) or not isinstance(made, int | str):
        raise ValueError(f"dimension {written!r} is no size")
    return made
