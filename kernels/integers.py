"""Weights of 4 or 8 bits with scales by groups: how kernels want them, and ops that make them so while loading.

``w[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`` with ``g = k // group`` and unsigned q. Without zeros q is
symmetric: zero is ``2 ** (bits - 1)``. In the place of zeros there may be offsets of fp16, which are added:
``(q[n, k] - 2 ** (bits - 1)) * scale[n, g] + offset[n, g]``.

**Words.** A span of 128 inputs of one output is ``8 * bits`` words of 16 bits. Field f of word j, ``bits`` wide and
counted from the lowest bit, is input ``j + f * (8 * bits)`` of the span: each field of a span's words is a run of
neighbouring inputs, so that a matrix unit's operand is made with a shift and a mask, two weights in a register at
once, and no weight changes its thread. Inputs are filled up to whole spans with anything.

**Tiles.** Scales, zeros and offsets are ``[ceil(N / 64), groups, 64]``: what 64 outputs have for one group lies
together. Outputs are filled up with zeros.

N outputs, K inputs, G groups, W words
"""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import to_dtype

SPAN = 128  # inputs whose words lie together
TILE = 64  # outputs whose scales do
BITS = (4, 8)
# A symmetric scale takes the largest magnitude to 7.5 of -8 ... 7, as GPTQ and compressed-tensors do: the half step
# that a positive one loses is less than what a wider step would cost all others.
LEAST_SCALE = 2.0**-24  # fp16's smallest number: zeros stay zeros, and nothing is divided by zero
_EXACT = Tolerance(exact=True)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs a field of AWQ's words is of


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned fields of integers along a new last axis, the lowest first: int32 ``[..., n]``."""
    width = 8 * words.element_size()
    shifts = torch.arange(0, width, bits, dtype=torch.int32, device=words.device)
    return (words.int().unsqueeze(-1) >> shifts) & (2**bits - 1)


def pack_words(q: torch.Tensor, bits: int) -> torch.Tensor:
    """``q[N, K]``, integers below ``2 ** bits``, as words."""
    rows, count = len(q), 8 * bits
    q = functional.pad(q.int(), (0, -q.shape[1] % SPAN)).reshape(rows, -1, 16 // bits, count)
    words = sum(q[:, :, field] << (bits * field) for field in range(16 // bits))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int16).reshape(rows, -1)


def unpack_words(words: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """The integers of words ``[..., W]``, int32 ``[..., inputs]``."""
    spans = fields(words, bits).unflatten(-2, (-1, 8 * bits)).transpose(-1, -2)
    return spans.flatten(-3)[..., :inputs]


def tiles(x: torch.Tensor) -> torch.Tensor:
    """``x[N, G]`` as tiles."""
    return functional.pad(x, (0, 0, 0, -len(x) % TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def by_output(x: torch.Tensor, outputs: int) -> torch.Tensor:
    """Tiles ``[..., G, 64]`` as ``[..., outputs, G]``."""
    return x.transpose(-1, -2).flatten(-3, -2)[..., :outputs, :]


def values(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    inputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What words, scales and zeros or offsets stand for: ``[..., N, inputs]`` of ``dtype``."""
    q, rows = unpack_words(weight, bits, inputs), weight.shape[-2]

    def spread(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return by_output(x, rows).to(dtype).repeat_interleave(group, -1)[..., :inputs]

    offsets = zero is not None and zero.dtype != torch.uint8
    if zero is None or offsets:
        q -= 2 ** (bits - 1)
    else:
        q -= spread(zero, torch.int32)
    wide = q.to(dtype).mul_(spread(scale, dtype))
    return wide.add_(spread(zero, dtype)) if zero is not None and offsets else wide


@contract(
    "q[N,cdiv(inputs*bits,32)]:int32 order?[inputs]:int32 -> weight[N,cdiv(inputs,128)*8*bits]:int16",
    tolerance=_EXACT,
)
def repack_rows(
    q: torch.Tensor, order: torch.Tensor | None = None, *, bits: int, inputs: int
) -> torch.Tensor:
    """Words of 32-bit numbers with neighbouring inputs of an output, the first in the lowest bits: GPTQ's form
    (transposed) and compressed-tensors'.

    Args:
        order: input ``order[i]`` goes to place i.
    """
    found = fields(q, bits).flatten(1)[:, :inputs]
    return pack_words(found if order is None else found[:, order.long()], bits)


@contract("q[J,K]:int32 -> weight[J*8,cdiv(K,128)*32]:int16", tolerance=_EXACT)
def repack_awq(q: torch.Tensor) -> torch.Tensor:
    """Words of AWQ's form, transposed: 8 outputs of an input in 32 bits, in the order 0 2 4 6 1 3 5 7."""
    return pack_words(_awq_outputs(q), 4)


@contract("q[J,K]:uint8 -> weight[J*2,cdiv(K,128)*32]:int16", tolerance=_EXACT)
def repack_pairs(q: torch.Tensor) -> torch.Tensor:
    """Words of modelopt's form: 2 outputs of an input in 8 bits, the first in the lower ones, as signed numbers."""
    return pack_words(fields(q, 4).transpose(1, 2).flatten(0, 1) ^ 8, 4)


def _awq_outputs(q: torch.Tensor) -> torch.Tensor:
    """``q[J, K]`` in AWQ's form as int32 ``[J * 8, K]``."""
    found = torch.empty(len(q), 8, q.shape[1], dtype=torch.int32)
    found[:, list(_AWQ_ORDER)] = fields(q, 4).transpose(1, 2)
    return found.flatten(0, 1)


@contract("q[J,G]:int32 -> zero[cdiv(J*(32//bits),64),G,64]:uint8", tolerance=_EXACT)
def unpack_zeros(q: torch.Tensor, *, bits: int, plus: int = 0, awq: bool = False) -> torch.Tensor:
    """Zeros of ``32 / bits`` outputs in 32 bits, as tiles.

    Args:
        plus: added, modulo ``2 ** bits``: GPTQ's first format stores them less one.
        awq: outputs are in AWQ's order.
    """
    found = _awq_outputs(q) if awq else fields(q, bits).transpose(1, 2).flatten(0, 1)
    return tiles(((found + plus) & (2**bits - 1)).to(torch.uint8))


@contract("scale[N,G]:S -> tiled[cdiv(N,64),G,64]:S", tolerance=_EXACT)
def tile_scales(scale: torch.Tensor) -> torch.Tensor:
    """Scales as tiles, those of MXFP4 too."""
    return tiles(scale)


@contract("group[K]:int32 -> order[K]:int32", tolerance=_EXACT)
def order_of_groups(group: torch.Tensor) -> torch.Tensor:
    """Inputs in the order of their groups, those of one group in their own order."""
    return group.argsort(stable=True).int()


@contract(
    "x[N,K]:W -> weight[N,cdiv(K,128)*8*bits]:int16 scale[cdiv(N,64),cdiv(K,group),64]:float16",
    flops="3*N*K",
    tolerance=_EXACT,
)
def quantize_int(x: torch.Tensor, *, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each weight to the nearest of ``2 ** bits`` steps, ties to even, symmetric, a scale for each output and group.

    ``scale = max(|x|) / (2 ** (bits - 1) - 0.5)``, rounded to fp16 before weights are divided by it.
    """
    inputs = x.shape[1]
    grouped = functional.pad(x.float(), (0, -inputs % group)).unflatten(1, (-1, group))
    middle = 2 ** (bits - 1)
    scale = (grouped.abs().amax(-1) / (middle - 0.5)).clamp(LEAST_SCALE, 65504.0).half()
    q = (grouped / scale.float().unsqueeze(-1)).round().clamp(-middle, middle - 1) + middle
    return pack_words(q.flatten(1)[:, :inputs], bits), tiles(scale)


@contract(
    "weight[N,cdiv(inputs,128)*8*bits]:int16 scale[cdiv(N,64),cdiv(inputs,group),64]:float16 "
    "zero?[cdiv(N,64),cdiv(inputs,group),64]:uint8 order?[inputs]:int32 -> x[N,inputs]:out_dtype|float32",
    flops="2*N*inputs",
)
def dequantize_int(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    *,
    bits: int,
    group: int,
    inputs: int,
    out_dtype: str,
) -> torch.Tensor:
    """What they stand for, computed in fp32; place i is input ``order[i]``."""
    dtype = torch.promote_types(scale.dtype, torch.float32)
    x = values(weight, scale, zero, bits=bits, group=group, inputs=inputs, dtype=dtype)
    if order is not None:
        x = torch.empty_like(x).index_copy_(1, order.long(), x)
    return to_dtype(x, out_dtype, like=x)


@contract("x[T,K]:A order[K]:int32 -> y[T,K]:A", rowwise="T", tolerance=_EXACT)
def gather_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y[t, i] = x[t, order[i]]``: inputs in the order of the groups that their weights are scaled by."""
    return x[:, order.long()]
