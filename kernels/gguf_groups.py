"""GGUF's blocks as integers with scales by groups (kernels/integers.py), made while weights are loaded for a GPU.

A weight of every type here is ``(q - middle) * scale + offset`` with ``middle = 2 ** (bits - 1)``, for groups of 32
inputs, of 16 for Q6_K. Types of 5 and 6 bits are held in 8, lifted so that their own middle is 128: what is added
behind the scale stays small, and 16-bit arithmetic loses little. The 16 numbers of IQ4 types are held as what they
are, in 8 bits.

Scales are fp16. Those of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL are the file's; those of K types and IQ4_XS are a
block's times a sub-block's, to the nearest fp16. Offsets, of the types that have a minimum, are the middle's number,
``scale * middle - minimum``, to the nearest fp16: computed in fp32 from the scale before it is rounded.

N outputs, K inputs, Z bytes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.gguf_dequantize import BLOCK_TYPES
from makeready.kernels.integers import pack_words, tiles

_EXACT = Tolerance(exact=True)


@dataclass(frozen=True)
class Groups:
    """What a block type becomes.

    Attributes:
        bits: of a word's field.
        own: bits of a number in the file; of what it stands for, where it is a place in a table.
        group: inputs that share a scale.
        offsets: whether groups have an offset; else numbers are symmetric.
    """

    bits: int
    own: int
    group: int = 32
    offsets: bool = False

    @property
    def lift(self) -> int:
        """What is added to a number of the file, counted from its least, to have its middle in the field's."""
        return 2 ** (self.bits - 1) - 2 ** (self.own - 1)


GROUPS = {
    "q4_0": Groups(4, 4),
    "q4_1": Groups(4, 4, offsets=True),
    "q5_0": Groups(8, 5),
    "q5_1": Groups(8, 5, offsets=True),
    "q8_0": Groups(8, 8),
    "q4_k": Groups(4, 4, offsets=True),
    "q5_k": Groups(8, 5, offsets=True),
    "q6_k": Groups(8, 6, group=16),
    "iq4_nl": Groups(8, 8),
    "iq4_xs": Groups(8, 8),
}


def _unpacked(
    blocks: torch.Tensor, kind: str, row: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Numbers ``[N, K]``, counted from the file's zero, fp32 scales and minima ``[N, K / group]``."""
    records = np.ascontiguousarray(blocks.numpy()).view(BLOCK_TYPES[kind].layout)
    rows = len(blocks) // row
    with np.errstate(all="ignore"):
        q, scale, minimum = BLOCK_TYPES[kind].unpack(records)
    numbers = torch.from_numpy(q.astype(np.int32)).reshape(rows, -1)
    scales = torch.from_numpy(np.ascontiguousarray(scale)).reshape(rows, -1)
    return numbers, scales, None if minimum is None else torch.from_numpy(minimum).reshape(rows, -1)


@contract("blocks[Z]:uint8 -> weight[Z//row,cdiv(inputs,128)*8*bits]:int16", tolerance=_EXACT)
def repack_gguf(blocks: torch.Tensor, *, kind: str, row: int, inputs: int, bits: int) -> torch.Tensor:
    """Words of blocks.

    Args:
        kind: of blocks, a key of :data:`GROUPS`.
        row: bytes of an output.
        bits: of a field of words, as :data:`GROUPS` has it.
    """
    numbers, _, minimum = _unpacked(blocks, kind, row)
    form = GROUPS[kind]
    least = 0 if minimum is not None else -(2 ** (form.own - 1))
    return pack_words(numbers - least + form.lift, bits)


@contract(
    "blocks[Z]:uint8 -> scale[cdiv(Z//row,64),cdiv(inputs,group),64]:float16",
    tolerance=_EXACT,
)
def scales_gguf(blocks: torch.Tensor, *, kind: str, row: int, inputs: int, group: int) -> torch.Tensor:
    """Tiles of scales; see :func:`repack_gguf`."""
    return tiles(_unpacked(blocks, kind, row)[1].half())


@contract(
    "blocks[Z]:uint8 -> offset[cdiv(Z//row,64),cdiv(inputs,group),64]:float16",
    tolerance=_EXACT,
)
def offsets_gguf(blocks: torch.Tensor, *, kind: str, row: int, inputs: int, group: int) -> torch.Tensor:
    """Tiles of offsets, of a type that has them; see :func:`repack_gguf`."""
    _, scale, minimum = _unpacked(blocks, kind, row)
    assert minimum is not None
    return tiles((scale * 2 ** (GROUPS[kind].own - 1) - minimum).half())
