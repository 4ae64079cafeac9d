"""GGUF's blocks as operands: which rows are stored how, and what 8-bit activations are.

A weight is the bytes of its blocks in one row, ``blocks[Z]``. An attribute ``rows`` says what they are: the type and
the number of rows of every part, ``q5_0*896+q8_0*128``. So parts of several types may follow each other.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor, Future

import numpy as np
import torch

from makeready.kernels.gguf_dequantize import BLOCK_TYPES, dequantize

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
"""Block types that there are products for; the numbers of csrc/gguf.h are their places."""

GROUP = 32  # activations that share a scale; also elements of the shortest block
MOST_8_BITS = 127


def rows_text(parts: list[tuple[str, int]]) -> str:
    """The attribute that says what blocks are: types, each with a number of rows."""
    return "+".join(f"{kind}*{count}" for kind, count in parts)


def rows_of(text: str) -> list[tuple[str, int]]:
    """What :func:`rows_text` made of it.

    Raises:
        ValueError: it names a type that there are no products for, or no rows.
    """
    parts = []
    for part in text.split("+"):
        kind, _, count = part.partition("*")
        if kind not in KINDS or not count.isdecimal() or not 0 < int(count) < 2**31:
            raise ValueError(f"rows {text!r} do not say which blocks there are")
        parts.append((kind, int(count)))
    return parts


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of ``width`` elements.

    Raises:
        ValueError: they are not whole blocks.
    """
    elements, nbytes = BLOCK_TYPES[kind].sizes
    if width % elements:
        raise ValueError(f"rows of {width} elements are no blocks of {elements}")
    return width // elements * nbytes


def nbytes_of(text: str, width: int) -> int:
    """Bytes of all rows."""
    return sum(count * row_bytes(kind, width) for kind, count in rows_of(text))


class _Here(Executor):
    """Runs what it is given at once, in the calling thread."""

    def submit(self, fn, /, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def widened(blocks: torch.Tensor, rows: str, width: int) -> torch.Tensor:
    """fp32 ``[N, width]``: the numbers that blocks stand for."""
    made, at, raw = [], 0, blocks.numpy()
    for kind, count in rows_of(rows):
        stop = at + count * row_bytes(kind, width)
        out = np.empty((count, width), np.float32)
        dequantize(kind, np.ascontiguousarray(raw[at:stop]).reshape(count, -1), out, _Here())
        made.append(torch.from_numpy(out))
        at = stop
    return torch.cat(made)


def to_8_bits(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """``x[T, K]`` with every 32 neighbours rounded to 255 steps of the largest's 127th, as ``wide``.

    Quantized in fp32 whatever x is, ties to even. A group with NaN or an infinite number becomes NaN.
    """
    grouped = x.float().unflatten(-1, (-1, GROUP))
    scale = grouped.abs().amax(-1, keepdim=True) / MOST_8_BITS
    q = (grouped / torch.where(scale > 0, scale, math.inf)).round()
    spoiled = torch.where(scale.isfinite(), scale, math.nan)
    return (q.to(wide) * spoiled.to(wide)).flatten(-2)
