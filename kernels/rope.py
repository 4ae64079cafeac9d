"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split layout.

A *row* of the rotary table holds the cosines, then the sines, of one position's angles:
``row[:Q/2] = cos``, ``row[Q/2:] = sin``, already multiplied by YaRN's attention factor where there is one.
Rows are fetched once a step and used by every layer.
"""

from __future__ import annotations

import math

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import widen


def rotate(x_THD: torch.Tensor, rows_TQ: torch.Tensor) -> torch.Tensor:
    """Rotate the first Q of D features of every head, pairing feature i with i + Q/2; keeps the dtype."""
    rotary = rows_TQ.shape[-1]
    cos, sin = rows_TQ.to(widen(x_THD).dtype).unsqueeze(1).chunk(2, dim=-1)
    first, second, rest = widen(x_THD).split((rotary // 2, rotary // 2, x_THD.shape[-1] - rotary), dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x_THD.dtype)


@contract(
    "positions[T]:int32 table[L,Q]:float32 -> rows[T,Q]:float32",
    tolerance=Tolerance(exact=True),
    rowwise="T",
    traffic={"table": "T*Q"},
)
def rope_rows(positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of the rotary table at ``positions``."""
    return table[positions.long()]


@contract(
    "positions[T]:int32 token_slot[T]:int32 prompt_len[S]:int32 -> rows[T,rotary_dim]:float32",
    rowwise="T",
    flops="8*T*rotary_dim",
)
def rope_rows_dynamic(
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    *,
    rotary_dim: int,
    theta: float,
    factor: float,
    original_context: int,
) -> torch.Tensor:
    """Rotary rows under dynamic NTK scaling, whose base grows with the length of the sequence.

    The length is the request's own, ``max(prompt_len, position + 1)``: what a forward over the whole
    prompt, then over one token at a time, sees; chunking and batching do not change it. Up to
    ``original_context`` tokens the base is ``theta``.
    """
    length = torch.maximum(prompt_len[token_slot.long()], positions + 1).clamp_min(original_context).float()
    stretch = factor * length / original_context - (factor - 1)
    base = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    angle = positions.float().unsqueeze(-1) * (1.0 / base.unsqueeze(-1) ** exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@contract(
    "positions[T]:int32 token_slot[T]:int32 prompt_len[S]:int32 -> rows[T,rotary_dim]:float32",
    rowwise="T",
    flops="8*T*rotary_dim",
)
def rope_rows_stepped(
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    prompt_len: torch.Tensor,
    *,
    rotary_dim: int,
    theta: float,
    original_context: int,
) -> torch.Tensor:
    """Rotary rows under Qwen 1's dynamic NTK scaling, whose base is set by the request's prompt alone.

    A prompt of ``n`` times ``original_context`` tokens stretches the base by ``a ** (d / (d - 2))``, where
    ``a = 2 ** ceil(log2(n) + 1) - 1``: 1 up to ``original_context``, 3 up to twice, 7 up to four times as
    many. What is generated behind the prompt keeps the prompt's base.
    """
    times = prompt_len[token_slot.long()].clamp_min(1).double() / original_context
    stretch = 2 ** (torch.log2(times) + 1).ceil().clamp_min(1) - 1
    base = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    angle = positions.float().unsqueeze(-1) * (1.0 / base.float().unsqueeze(-1) ** exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@contract("rows[T,Q]:float32 positions[T]:int32 -> scaled[T,Q]:float32", rowwise="T", flops="3*T*Q")
def rope_rows_logn(rows: torch.Tensor, positions: torch.Tensor, *, original_context: int) -> torch.Tensor:
    """Rotary rows that also scale what they turn, by ``max(1, log(position + 1) / log(original_context))``.

    Queries turned by them attend as sharply over long contexts as over ``original_context`` tokens (Su 2021,
    kexue.fm/archives/8823).
    """
    longer = torch.log(positions.double() + 1) / math.log(original_context)
    return (rows.double() * longer.clamp_min(1).unsqueeze(-1)).to(rows.dtype)


@contract(
    "x[T,heads*head_dim]:A rows[T,Q]:float32 -> y[T,heads*head_dim]:A",
    rowwise="T",
    flops="3*T*heads*Q",
)
def rope(x: torch.Tensor, rows: torch.Tensor, *, heads: int, head_dim: int) -> torch.Tensor:
    """Rotate every head of ``x`` by its token's row."""
    return rotate(x.unflatten(-1, (heads, head_dim)), rows).flatten(-2)
