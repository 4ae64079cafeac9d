"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split layout.

A *row* of the rotary table holds the cosines, then the sines, of one position's angles:
``row[:Q/2] = cos``, ``row[Q/2:] = sin``, already multiplied by YaRN's attention factor where there is one.
Rows are fetched once a step and used by every layer.
"""

from __future__ import annotations

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
    "x[T,heads*head_dim]:A rows[T,Q]:float32 -> y[T,heads*head_dim]:A",
    rowwise="T",
    flops="3*T*heads*Q",
)
def rope(x: torch.Tensor, rows: torch.Tensor, *, heads: int, head_dim: int) -> torch.Tensor:
    """Rotate every head of ``x`` by its token's row."""
    return rotate(x.unflatten(-1, (heads, head_dim)), rows).flatten(-2)
