"""GGUF block types to float32.

Layouts: ggml-common.h and ggml-quants.c of ggml-org/ggml. A block of 32 (or 256, the K types) elements
holds integers of 2 to 8 bits, spread over its bytes, and one or two float16 scales; K types scale their
sub-blocks of 16 or 32 elements once more. A value is `scale * q` or `scale * q - offset`; IQ4 types and MXFP4
look q up in a table. Types of fewer bits than K types have: gguf_iq.py.

Unpacking moves eight bytes at a time: eight elements of a block lie side by side in equal bit positions,
so one shift and one mask on a 64-bit word give eight unpacked bytes. That and working in pieces that stay
in cache make it memory-bound: SmolLM2-135M (Q4_1) takes 0.4 s on two cores, the gguf package 3 s.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from makeready.kernels import gguf_iq

PLAIN_TYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}

PIECE = 2**18  # elements per task: 1 MB of float32 output and its temporaries stay in a core's cache

# (integers, as int8 or uint8 [blocks, elements]; scale and offset, float32 [blocks, sub-blocks])
Unpacked = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]


@dataclass(frozen=True)
class BlockType:
    """A quantized block: `sizes` is (elements, bytes), `unpack` takes `layout` records [blocks]."""

    elements: int
    layout: np.dtype
    unpack: Callable[[np.ndarray], Unpacked]

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements and bytes of a block."""
        return self.elements, self.layout.itemsize


def dequantize(kind: str, rows: np.ndarray, out: np.ndarray, pool: Executor) -> None:
    """Dequantize rows of blocks.

    Args:
        kind: a key of `BLOCK_TYPES`.
        rows: uint8 [rows, bytes per row], contiguous.
        out: float32 [rows, elements per row], contiguous; overwritten.
        pool: where pieces run in parallel; numpy releases the interpreter lock in them.
    """
    block = BLOCK_TYPES[kind]
    blocks = rows.reshape(-1, block.layout.itemsize)
    target = out.reshape(-1, block.elements)
    step = PIECE // block.elements
    pieces = [(blocks[at : at + step], target[at : at + step]) for at in range(0, len(blocks), step)]
    if len(pieces) == 1:
        _piece(block, *pieces[0])
    else:
        list(pool.map(lambda piece: _piece(block, *piece), pieces))


def _piece(block: BlockType, blocks: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(
        all="ignore"
    ):  # a corrupt scale may be inf or nan: it shows in the values, not as a warning
        q, scale, offset = block.unpack(blocks.view(block.layout)[:, 0])
        out[...] = q
        groups = out.reshape(*scale.shape, -1)
        groups *= scale[..., None]
        if offset is not None:
            groups -= offset[..., None]


def _spread(source: np.ndarray, target: np.ndarray, bits: int, shift: int, lift: int = 0) -> None:
    """Move `bits` bits of every byte from bit `shift` to bit `lift`; merges into the target if lift > 0.

    Both are uint64 [blocks, words]. Bits that cross into a neighbouring byte are masked away.
    """
    mask = np.uint64(0x0101010101010101 * (((1 << bits) - 1) << lift))
    for word in range(source.shape[1]):
        moved = source[:, word] >> (shift - lift) if shift >= lift else source[:, word] << (lift - shift)
        if lift:
            target[:, word] |= moved & mask
        else:
            np.bitwise_and(moved, mask, out=target[:, word])


def _f32(column: np.ndarray) -> np.ndarray:
    return column.astype(np.float32)[:, None]


def _words(count: int, elements: int) -> np.ndarray:
    return np.empty((count, elements // 8), np.uint64)


def _nibbles(records: np.ndarray) -> np.ndarray:
    """16 bytes: elements 0-15 in the low nibbles, 16-31 in the high ones."""
    q = _words(len(records), 32)
    _spread(records["qs"], q[:, :2], 4, 0)
    _spread(records["qs"], q[:, 2:], 4, 4)
    return q.view(np.uint8)


def _fifth_bits(records: np.ndarray) -> np.ndarray:
    """4 bytes: bit i of the 32 is bit 4 of element i."""
    bits = np.unpackbits(np.ascontiguousarray(records["qh"]), axis=1, bitorder="little")
    return bits << np.uint8(4)


def _q4_0(records: np.ndarray) -> Unpacked:
    return _nibbles(records).view(np.int8) - np.int8(8), _f32(records["d"]), None


def _q4_1(records: np.ndarray) -> Unpacked:
    return _nibbles(records), _f32(records["d"]), -_f32(records["m"])


def _q5_0(records: np.ndarray) -> Unpacked:
    q = _nibbles(records) | _fifth_bits(records)
    return q.view(np.int8) - np.int8(16), _f32(records["d"]), None


def _q5_1(records: np.ndarray) -> Unpacked:
    return _nibbles(records) | _fifth_bits(records), _f32(records["d"]), -_f32(records["m"])


def _q8_0(records: np.ndarray) -> Unpacked:
    return records["qs"], _f32(records["d"]), None


def _crumbs(records: np.ndarray) -> np.ndarray:
    """64 bytes: per half of 128 elements, 32 bytes hold elements 0-31 in bits 0-1, 32-63 in bits 2-3, ..."""
    q = _words(len(records), 256)
    for half in range(2):
        for quarter in range(4):
            at = 16 * half + 4 * quarter
            _spread(records["qs"][:, 4 * half : 4 * half + 4], q[:, at : at + 4], 2, 2 * quarter)
    return q


def _q2_k(records: np.ndarray) -> Unpacked:
    scales = records["scales"]
    scale = _f32(records["d"]) * (scales & 15).astype(np.float32)
    offset = _f32(records["dmin"]) * (scales >> 4).astype(np.float32)
    return _crumbs(records).view(np.uint8), scale, offset


def _q3_k(records: np.ndarray) -> Unpacked:
    # 16 scales of 6 bits: low nibbles in bytes 0-7 (first 8 low, last 8 high), bits 4-5 in bytes 8-11.
    packed = records["scales"]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | (high << 4)).view(np.int8) - np.int8(32)
    q = _crumbs(records)
    for part in range(8):  # bit `part` of the 32 mask bytes: set means no 4 is taken off
        _spread(records["hmask"], q[:, 4 * part : 4 * part + 4], 1, part, 2)
    return q.view(np.int8) - np.int8(4), _f32(records["d"]) * scales.astype(np.float32), None


def _k_scales(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes: 8 scales and 8 minima of 6 bits. Returns them times d and dmin, float32 [blocks, 8]."""
    first, second, third = records["scales"][:, :4], records["scales"][:, 4:8], records["scales"][:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _f32(records["d"]) * scales.astype(np.float32), _f32(records["dmin"]) * minima.astype(np.float32)


def _k_nibbles(records: np.ndarray) -> np.ndarray:
    """128 bytes: each 32 hold 32 elements in the low nibbles, then 32 in the high ones."""
    q = _words(len(records), 256)
    for quarter in range(4):
        source = records["qs"][:, 4 * quarter : 4 * quarter + 4]
        _spread(source, q[:, 8 * quarter : 8 * quarter + 4], 4, 0)
        _spread(source, q[:, 8 * quarter + 4 : 8 * quarter + 8], 4, 4)
    return q


def _q4_k(records: np.ndarray) -> Unpacked:
    return _k_nibbles(records).view(np.uint8), *_k_scales(records)


def _q5_k(records: np.ndarray) -> Unpacked:
    q = _k_nibbles(records)
    for part in range(8):  # bit `part` of the 32 bytes: bit 4 of elements 32*part ...
        _spread(records["qh"], q[:, 4 * part : 4 * part + 4], 1, part, 4)
    return q.view(np.uint8), *_k_scales(records)


def _q6_k(records: np.ndarray) -> Unpacked:
    # Per half of 128 elements: 64 bytes of nibbles (0-63 in the low ones, 64-127 in the high ones), then
    # 32 bytes of bit pairs.
    q = _words(len(records), 256)
    for half in range(2):
        low = records["ql"][:, 8 * half : 8 * half + 8]
        high = records["qh"][:, 4 * half : 4 * half + 4]
        target = q[:, 16 * half : 16 * half + 16]
        _spread(low, target[:, :8], 4, 0)
        _spread(low, target[:, 8:], 4, 4)
        for quarter in range(4):
            _spread(high, target[:, 4 * quarter : 4 * quarter + 4], 2, 2 * quarter, 4)
    scale = _f32(records["d"]) * records["scales"].astype(np.float32)
    return q.view(np.int8) - np.int8(32), scale, None


# The 16 values of IQ4 types (ggml-common.h, kvalues_iq4nl) and of MXFP4 (twice the OCP FP4 E2M1 numbers; the
# scale is halved for it).
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _iq4_nl(records: np.ndarray) -> Unpacked:
    return IQ4_VALUES[_nibbles(records)], _f32(records["d"]), None


def _iq4_xs(records: np.ndarray) -> Unpacked:
    # 8 groups of 32, each like an IQ4_NL block. Scales of 6 bits, less 32: nibbles in `scales_l` (even groups
    # low), bits 4-5 as pairs of `scales_h`, from the lowest on.
    group = np.arange(8)
    low = (records["scales_l"][:, group // 2] >> (group % 2 * 4).astype(np.uint8)) & 15
    high = (records["scales_h"][:, None] >> (2 * group).astype(np.uint16)) & 3
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    q = _words(len(records), 256)
    for part in range(8):
        source, target = records["qs"][:, 2 * part : 2 * part + 2], q[:, 4 * part : 4 * part + 4]
        _spread(source, target[:, :2], 4, 0)
        _spread(source, target[:, 2:], 4, 4)
    return IQ4_VALUES[q.view(np.uint8)], _f32(records["d"]) * scales.astype(np.float32), None


def _mxfp4(records: np.ndarray) -> Unpacked:
    # The scale is a power of two alone: 2^(e - 128), where 0 and 1 give fp32's subnormals 2^-128 and 2^-127.
    e = records["e"].astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << e, (e - np.uint32(1)) << np.uint32(23))
    return _FP4_VALUES[_nibbles(records)], bits.astype(np.uint32).view(np.float32)[:, None], None


_D, _M, _DMIN, _QH = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2"), ("qh", "u1", 4)
_QS16, _QS64, _QS128 = ("qs", "<u8", 2), ("qs", "<u8", 8), ("qs", "<u8", 16)
_SCALES8, _SCALES12, _SCALES16 = (("scales", "u1", count) for count in (8, 12, 16))
_BYTES32, _BYTES64, _SIGNS32 = ("qs", "u1", 32), ("qs", "u1", 64), ("signs", "u1", 32)

# Fields in file order; bytes that `_spread` reads are declared as 64-bit words.
BLOCK_TYPES = {
    "q4_0": BlockType(32, np.dtype([_D, _QS16]), _q4_0),
    "q4_1": BlockType(32, np.dtype([_D, _M, _QS16]), _q4_1),
    "q5_0": BlockType(32, np.dtype([_D, _QH, _QS16]), _q5_0),
    "q5_1": BlockType(32, np.dtype([_D, _M, _QH, _QS16]), _q5_1),
    "q8_0": BlockType(32, np.dtype([_D, ("qs", "i1", 32)]), _q8_0),
    "q2_k": BlockType(256, np.dtype([_SCALES16, _QS64, _D, _DMIN]), _q2_k),
    "q3_k": BlockType(256, np.dtype([("hmask", "<u8", 4), _QS64, _SCALES12, _D]), _q3_k),
    "q4_k": BlockType(256, np.dtype([_D, _DMIN, _SCALES12, _QS128]), _q4_k),
    "q5_k": BlockType(256, np.dtype([_D, _DMIN, _SCALES12, ("qh", "<u8", 4), _QS128]), _q5_k),
    "q6_k": BlockType(256, np.dtype([("ql", "<u8", 16), ("qh", "<u8", 8), ("scales", "i1", 16), _D]), _q6_k),
    "iq4_nl": BlockType(32, np.dtype([_D, _QS16]), _iq4_nl),
    "iq4_xs": BlockType(256, np.dtype([_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), _QS128]), _iq4_xs),
    "mxfp4": BlockType(32, np.dtype([("e", "u1"), _QS16]), _mxfp4),
    "iq1_s": BlockType(256, np.dtype([_D, _BYTES32, ("qh", "<u2", 8)]), gguf_iq.iq1_s),
    "iq1_m": BlockType(256, np.dtype([_BYTES32, ("qh", "u1", 16), ("scales", "<u2", 4)]), gguf_iq.iq1_m),
    "iq2_xxs": BlockType(256, np.dtype([_D, ("qs", "<u4", 16)]), gguf_iq.iq2_xxs),
    "iq2_xs": BlockType(256, np.dtype([_D, ("qs", "<u2", 32), _SCALES8]), gguf_iq.iq2_xs),
    "iq2_s": BlockType(256, np.dtype([_D, _BYTES32, _SIGNS32, ("qh", "u1", 8), _SCALES8]), gguf_iq.iq2_s),
    "iq3_xxs": BlockType(256, np.dtype([_D, _BYTES64, ("scales", "<u4", 8)]), gguf_iq.iq3_xxs),
    "iq3_s": BlockType(
        256, np.dtype([_D, _BYTES64, ("qh", "u1", 8), _SIGNS32, ("scales", "u1", 4)]), gguf_iq.iq3_s
    ),
    "tq1_0": BlockType(256, np.dtype([("qs", "u1", 52), _D]), gguf_iq.tq1_0),
    "tq2_0": BlockType(256, np.dtype([_BYTES64, _D]), gguf_iq.tq2_0),
}
