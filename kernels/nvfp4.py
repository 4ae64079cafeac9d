"""NVFP4 (see kernels/mx.py): the tiles of its scales, and wide weights rounded to it.

A global scale is an output's here, whatever it was in the file: one for a whole matrix there. e4m3 has 448 as its
largest number and 2^-9 as its smallest; scales have no sign, so that what is negative or NaN in a file is damage,
which makes all of the output NaN.

What is wide gets a global scale of ``largest / (6 * 448)`` for each output, so that the largest block's scale is 448.
A block's scale is its largest magnitude over ``6 * global scale``, to the nearest of e4m3, ties to even; numbers are
divided by both and go to the nearest of e2m1, ties to the even code. An output with a number that is not finite
becomes NaN.

N outputs, K inputs, G blocks of 16
"""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.integers import pack_words, tiles
from makeready.kernels.mx import BITS, nearest_e2m1

BLOCK = 16  # inputs that share a scale
LARGEST = 6.0 * 448.0
LEAST = 2.0**-100  # global scale: with less, products with scales would leave the range of normal fp32
_EXACT = Tolerance(exact=True)


def pairs(scale: torch.Tensor) -> torch.Tensor:
    """Bytes of e4m3 ``[N, G]`` as tiles of pairs, int16; what fills the last pair up is zero."""
    filled = functional.pad(scale.view(torch.uint8), (0, len(scale[0]) % 2))
    return tiles(filled.contiguous().view(torch.int16))


@contract("scale[N,G]:float8_e4m3fn -> paired[cdiv(N,64),cdiv(G,2),64]:int16", tolerance=_EXACT)
def pair_scales(scale: torch.Tensor) -> torch.Tensor:
    """See :func:`pairs`."""
    return pairs(scale)


@contract("given[N]:float32 scale[N,G]:float8_e4m3fn -> global_scale[N]:float32", tolerance=_EXACT)
def check_global_scales(given: torch.Tensor, scale: torch.Tensor, *, divides: bool) -> torch.Tensor:
    """Global scales that multiply; NaN for outputs with a scale that is negative or NaN.

    Args:
        divides: weights are divided by what is given.
    """
    damaged = ((scale.view(torch.uint8) & 0x7F) == 0x7F) | (scale.view(torch.uint8) > 0x80)
    return torch.where(damaged.any(1), float("nan"), 1.0 / given if divides else given)


@contract("x[N,K]:W -> global_scale[N]:float32", flops="N*K", tolerance=_EXACT)
def make_global_scales(x: torch.Tensor) -> torch.Tensor:
    """Global scales of wide weights."""
    most = x.float().abs().amax(1)
    return torch.where(most.isfinite(), (most / LARGEST).clamp_min(LEAST), float("nan"))


@contract(
    "x[N,K]:W global_scale[N]:float32 -> weight[N,cdiv(K,128)*32]:int16 scale[cdiv(N,64),cdiv(K,32),64]:int16",
    flops="4*N*K",
    tolerance=_EXACT,
)
def quantize_nvfp4(x: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales of wide weights; the last block of a row may be shorter. All steps are fp32's."""
    inputs = x.shape[1]
    blocks = functional.pad(x.float(), (0, -inputs % BLOCK)).unflatten(1, (-1, BLOCK))
    own = global_scale.unsqueeze(1)
    scale = (blocks.abs().amax(-1) / (own * 6.0)).clamp_max(448.0).to(torch.float8_e4m3fn)
    step = (scale.float() * own).unsqueeze(-1)
    q = nearest_e2m1(torch.where(step > 0, blocks.abs() / step, 0.0)) + 8 * blocks.signbit()
    sound = own.isfinite()
    q = torch.where(sound.unsqueeze(-1), q, 0).flatten(1)[:, :inputs]
    bits = torch.where(sound, scale.view(torch.uint8), 0).to(torch.uint8)
    return pack_words(q, BITS), pairs(bits)
