"""GGUF's types of 1 to 3 bits and of three numbers (IQ1, IQ2, IQ3, TQ) as integers with scales.

Layouts: ggml-common.h and ggml-quants.c of ggml-org/ggml. Blocks have 256 elements. An index stands for a row of 4 or
8 numbers of a grid (gguf_grids.py). Those of IQ2 and IQ3 are positive and have signs of their own: bits of a byte, or
seven of them, to which the eighth is such that an even number is set. TQ types hold -1, 0 and 1: four in a byte, or
five as a fraction of 256 with digits in base 3.

A value is ``scale * q``. What IQ1 adds to a row, an eighth up or down, is part of q, and its scale is an eighth.
"""

from __future__ import annotations

import numpy as np

from makeready.kernels.gguf_grids import (
    IQ1_GRID,
    IQ2_S_GRID,
    IQ2_XS_GRID,
    IQ2_XXS_GRID,
    IQ3_S_GRID,
    IQ3_XXS_GRID,
)

# (integers, int8 [blocks, 256]; scale, float32 [blocks, sub-blocks]; no offset)
_Unpacked = tuple[np.ndarray, np.ndarray, None]

_SEVEN = np.arange(128, dtype=np.uint8)
_EVEN = _SEVEN | (np.unpackbits(_SEVEN[:, None], axis=1).sum(1, dtype=np.uint8) & 1) << np.uint8(7)


def _fields(packed: np.ndarray, bits: int, *shifts: int) -> np.ndarray:
    """``bits`` bits of every number at each of ``shifts``, side by side: ``[blocks, numbers * shifts]``."""
    moved = packed[..., None] >> np.array(shifts, packed.dtype)
    return (moved & packed.dtype.type(2**bits - 1)).reshape(len(packed), -1)


def _signed(rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Rows of a grid, one behind the other, with a set bit of ``signs`` for a minus: ``[blocks, 256]``."""
    minus = np.unpackbits(np.ascontiguousarray(signs), axis=1, bitorder="little").astype(bool)
    q = rows.reshape(len(rows), -1)
    return np.where(minus, -q, q)


def _f32(column: np.ndarray) -> np.ndarray:
    return column.astype(np.float32)[:, None]


def _halves(records: np.ndarray) -> np.ndarray:
    """Scales of 16 elements: nibbles and a half, by the block's."""
    return _f32(records["d"]) * (np.float32(0.5) + _fields(records["scales"], 4, 0, 4)) * np.float32(0.25)


def _four_signs(words: np.ndarray) -> np.ndarray:
    """Signs of 32 elements in the lower 28 bits of a word: uint8 ``[blocks, words * 4]``."""
    return _EVEN[_fields(words, 7, 0, 7, 14, 21)]


def iq2_xxs(records: np.ndarray) -> _Unpacked:
    """Of 32 elements: four indices of 8 bits, then signs and a scale of 4 bits."""
    words = records["qs"].reshape(len(records), 8, 2)
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    scale = (
        _f32(records["d"]) * (np.float32(0.5) + (words[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    )
    return _signed(IQ2_XXS_GRID[index], _four_signs(words[..., 1])), scale, None


def iq2_xs(records: np.ndarray) -> _Unpacked:
    """Of 8 elements 16 bits: an index of 9 and signs."""
    index, signs = records["qs"] & np.uint16(511), _EVEN[records["qs"] >> 9]
    return _signed(IQ2_XS_GRID[index], signs), _halves(records), None


def iq2_s(records: np.ndarray) -> _Unpacked:
    """Of 8 elements an index of 10 bits, whose upper two lie apart, and 8 signs."""
    index = records["qs"] | _fields(records["qh"], 2, 0, 2, 4, 6).astype(np.uint16) << 8
    return _signed(IQ2_S_GRID[index], records["signs"]), _halves(records), None


def iq3_xxs(records: np.ndarray) -> _Unpacked:
    """Of 4 elements an index of 8 bits; of 32 signs and a scale of 4 bits, behind all indices."""
    words = records["scales"]
    scale = _f32(records["d"]) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _signed(IQ3_XXS_GRID[records["qs"]], _four_signs(words)), scale, None


def iq3_s(records: np.ndarray) -> _Unpacked:
    """Of 4 elements an index of 9 bits, whose upper one lies apart; 8 signs in a byte."""
    ninth = np.unpackbits(np.ascontiguousarray(records["qh"]), axis=1, bitorder="little").astype(np.uint16)
    scale = _f32(records["d"]) * (1 + 2 * _fields(records["scales"], 4, 0, 4)).astype(np.float32)
    return _signed(IQ3_S_GRID[records["qs"] | ninth << 8], records["signs"]), scale, None


def _shifted(index: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Eighths of IQ1's rows, one more or, where ``down``, one less: int8 ``[blocks, 256]``."""
    eighth = np.where(down, np.int8(-1), np.int8(1))
    return (IQ1_GRID[index] * np.int8(8) + eighth[..., None]).reshape(len(index), -1)


def iq1_s(records: np.ndarray) -> _Unpacked:
    """Of 8 elements an index of 11 bits; the upper three of four of them, a scale of 3 bits and what is added are in
    16 bits.
    """
    high = records["qh"]
    index = records["qs"] | _fields(high, 3, 0, 3, 6, 9) << 8
    scale = _f32(records["d"]) * (2 * (high >> 12 & 7) + 1).astype(np.float32) * np.float32(0.125)
    return _shifted(index, np.repeat(high >> 15, 4, axis=1).astype(bool)), scale, None


def iq1_m(records: np.ndarray) -> _Unpacked:
    """As IQ1_S, but with what is added for every 8 elements and a scale for every 16. The block's scale is the upper
    nibbles of four words of scales.
    """
    words = records["scales"]
    nibbles = (words >> 12) << np.array((0, 4, 8, 12), np.uint16)
    whole = np.bitwise_or.reduce(nibbles, axis=1).view(np.float16)
    index = records["qs"] | _fields(records["qh"], 3, 0, 4).astype(np.uint16) << 8
    scale = _f32(whole) * (2 * _fields(words, 3, 0, 3, 6, 9) + 1).astype(np.float32) * np.float32(0.125)
    return _shifted(index, _fields(records["qh"], 1, 3, 7).astype(bool)), scale, None


def tq1_0(records: np.ndarray) -> _Unpacked:
    """The first digit of 32 or 16 bytes side by side, then the second, ...; of the last four bytes only four."""
    parts = []
    for first, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        power = np.array([3**digit for digit in range(digits)], np.uint8)
        parts.append((records["qs"][:, None, first:stop] * power[:, None]).reshape(len(records), -1))
    q = np.concatenate(parts, axis=1).astype(np.uint16) * np.uint16(3) >> 8
    return q.astype(np.int8) - np.int8(1), _f32(records["d"]), None


def tq2_0(records: np.ndarray) -> _Unpacked:
    """The lowest two bits of 32 bytes side by side, then the next, ..."""
    packed = records["qs"].reshape(len(records), 2, 1, 32)
    q = packed >> np.array((0, 2, 4, 6), np.uint8)[:, None] & np.uint8(3)
    return q.reshape(len(records), -1).view(np.int8) - np.int8(1), _f32(records["d"]), None
