"""Weights of 4-bit floats with scales by blocks: how kernels want them, and what makes MXFP4 of wide ones.

A number of 4 bits, e2m1, has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives.

**MXFP4** (OCP Microscaling Formats Specification v1.0): blocks of 32 inputs of an output share a scale of 8 bits,
e8m0: ``2 ** (s - 127)``, 255 is NaN. What is wide becomes MXFP4 as section 6.3 of the specification has it: a scale
is the power of two of the largest magnitude less 2, numbers go to the nearest, ties to the even code, and beyond 6
they saturate. A block of zeros has the smallest scale; one that holds a number that is not finite becomes NaN.

**NVFP4**: blocks of 16 inputs share a scale of e4m3 without a sign, and all of them, of an output, a global scale of
fp32; a weight is the product of the three. kernels/nvfp4.py makes it.

They lie in the words and tiles of kernels/integers.py: a field of a span's words is 32 inputs, and a tile holds the
scales that 64 outputs have for one field: bytes of e8m0, or pairs of e4m3 in 16 bits, the first block's below.

N outputs, K inputs, G fields, W words
"""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.integers import by_output, fields, pack_words, tiles, unpack_words
from makeready.kernels.numeric import to_dtype

BLOCK = 32  # inputs of a field, which share a scale of e8m0, or have a pair of e4m3
BITS = 4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXACT = Tolerance(exact=True)


def e2m1(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What numbers of 4 bits stand for."""
    return torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=dtype)[q.long()]


def e8m0(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What scales stand for; float32 and wider hold them all."""
    powers = [*(2.0 ** (exponent - 127) for exponent in range(255)), float("nan")]
    return torch.tensor(powers, dtype=torch.float64)[s.long()].to(dtype)


def nearest_e2m1(size: torch.Tensor) -> torch.Tensor:
    """Numbers of 4 bits nearest to magnitudes, ties to the even code, those beyond 6 that of 6: int32."""
    q = torch.zeros_like(size, dtype=torch.int32)
    for bound in (0.25, 1.25, 2.5, 5.0):
        q += size > bound
    for bound in (0.75, 1.75, 3.5):
        q += size >= bound
    return q


def scales_of(scale: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """What tiles of scales stand for: ``[..., outputs, K / 32]`` of e8m0, ``[..., outputs, K / 16]`` of e4m3."""
    own = by_output(scale, outputs)
    if scale.dtype == torch.uint8:
        return e8m0(own, dtype)
    pairs = torch.stack((own & 0xFF, own >> 8 & 0xFF), -1).flatten(-2)
    return pairs.to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def values(
    weight: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    *,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What words and tiles of scales stand for: ``[..., N, inputs]`` of ``dtype``.

    Args:
        scale: uint8 of MXFP4 or int16 of NVFP4.
        global_scale: fp32 ``[..., N]`` of NVFP4.
    """
    own = scales_of(scale, weight.shape[-2], dtype)
    if global_scale is not None:
        own = own * global_scale.to(dtype).unsqueeze(-1)
    block = BLOCK if scale.dtype == torch.uint8 else BLOCK // 2
    return e2m1(unpack_words(weight, BITS, inputs), dtype) * own.repeat_interleave(block, -1)[..., :inputs]


@contract("q[N,cdiv(inputs,2)]:uint8 -> weight[N,cdiv(inputs,128)*32]:int16", tolerance=_EXACT)
def repack_bytes(q: torch.Tensor, *, inputs: int) -> torch.Tensor:
    """Words of bytes that hold two neighbouring inputs, the first in the lower bits."""
    return pack_words(fields(q, BITS).flatten(1)[:, :inputs], BITS)


@contract(
    "x[N,K]:W -> weight[N,cdiv(K,128)*32]:int16 scale[cdiv(N,64),cdiv(K,32),64]:uint8",
    flops="3*N*K",
    tolerance=_EXACT,
)
def quantize_mx(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales of wide weights; the last block of a row may be shorter."""
    inputs = x.shape[1]
    blocks = functional.pad(x.double(), (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
    most = blocks.abs().amax(-1)
    finite = most.isfinite()
    exponent = most.nan_to_num().float().frexp().exponent - 1  # of the leading bit
    scale = torch.where(most > 0, (exponent - 2 + 127).clamp(0, 254), 0)
    size = blocks.abs().ldexp(127 - scale.unsqueeze(-1))
    q = torch.where(finite.unsqueeze(-1), nearest_e2m1(size) + 8 * blocks.signbit(), 0)
    return pack_words(q.flatten(1)[:, :inputs], BITS), tiles(torch.where(finite, scale, 255).to(torch.uint8))


@contract(
    "weight[N,cdiv(inputs,128)*32]:int16 scale[cdiv(N,64),cdiv(inputs,32),64]:S global_scale?[N]:float32 "
    "-> x[N,inputs]:out_dtype|float32",
    flops="2*N*inputs",
)
def dequantize_mx(
    weight: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    *,
    inputs: int,
    out_dtype: str,
) -> torch.Tensor:
    """What words and scales stand for, computed in fp32: scales are multiplied first."""
    x = values(weight, scale, global_scale, inputs=inputs, dtype=torch.float32)
    return to_dtype(x, out_dtype, like=x)
