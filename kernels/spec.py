"""Shapes and dtypes, shared by contracts, planner and runtime. Imports no tensor library.

A dimension is an ``int``, or one of the symbols that a bucket or the loader fills in:

    T   tokens of the bucket          R   rows (requests) of the bucket
    P   KV pages, known when memory is

>>> TensorSpec(("T", 64), "bfloat16").nbytes({"T": 3})
384
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Dim: TypeAlias = int | str

TOKENS, ROWS, PAGES = "T", "R", "P"
SYMBOLS = (TOKENS, ROWS, PAGES)

DTYPE_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "uint32": 4,
    "int8": 1,
    "uint8": 1,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape (ints and symbols) and dtype name of a tensor."""

    shape: tuple[Dim, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        for dim in self.shape:
            if dim not in SYMBOLS and not (isinstance(dim, int) and dim >= 0):
                raise ValueError(f"dimension {dim!r} is neither a size nor one of {', '.join(SYMBOLS)}")

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of a dense tensor of this spec."""
        return math.prod(self.at(sizes)) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"
