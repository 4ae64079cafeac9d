"""Weights in MXFP4 (OCP Microscaling Formats Specification v1.0): how kernels want them, and what makes them so.

Blocks of 32 inputs of an output share a scale of 8 bits, e8m0: ``2 ** (s - 127)``, 255 is NaN. A number of 4 bits,
e2m1, has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

They lie in the words and tiles of kernels/integers.py: a field of a span's words is the numbers of one block, and a
tile holds what 64 outputs have for one block.

N outputs, K inputs, G blocks, W words
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.integers import by_output, fields, pack_words, unpack_words

BLOCK = 32  # inputs that share a scale
BITS = 4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What numbers of 4 bits stand for."""
    return torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=dtype)[q.long()]


def e8m0(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What scales stand for; float32 and wider hold them all."""
    powers = [*(2.0 ** (exponent - 127) for exponent in range(255)), float("nan")]
    return torch.tensor(powers, dtype=torch.float64)[s.long()].to(dtype)


def values(weight: torch.Tensor, scale: torch.Tensor, *, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """What words and tiles of scales stand for: ``[..., N, inputs]`` of ``dtype``."""
    wide = e8m0(by_output(scale, weight.shape[-2]), dtype).repeat_interleave(BLOCK, -1)[..., :inputs]
    return e2m1(unpack_words(weight, BITS, inputs), dtype) * wide


@contract("q[N,cdiv(inputs,2)]:uint8 -> weight[N,cdiv(inputs,128)*32]:int16", tolerance=Tolerance(exact=True))
def repack_bytes(q: torch.Tensor, *, inputs: int) -> torch.Tensor:
    """Words of bytes that hold two neighbouring inputs, the first in the lower bits."""
    return pack_words(fields(q, BITS).flatten(1)[:, :inputs], BITS)
