"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import contract
from makeready.kernels.numeric import widen


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = widen(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (widen(weight) + offset)).to(x.dtype)


@contract("x[T,C]:A weight[C]:W -> y[T,C]:A", rowwise="T", flops="4*T*C")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * (weight + offset)`` along the last axis; Gemma's ``offset`` is 1."""
    return _normalise(x, weight, eps, offset)


@contract(
    "x[T,C]:A residual[T,C]:A weight[C]:W -> y[T,C]:A residual_out[T,C]:A",
    rowwise="T",
    flops="5*T*C",
)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual_out = x + residual`` and its :func:`rms_norm`."""
    total = (widen(x) + widen(residual)).to(x.dtype)
    return _normalise(total, weight, eps, offset), total


@contract(
    "x[T,heads*head_dim]:A weight[head_dim]:W -> y[T,heads*head_dim]:A",
    rowwise="T",
    flops="4*T*heads*head_dim",
)
def head_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, heads: int, head_dim: int, offset: float = 0.0
) -> torch.Tensor:
    """:func:`rms_norm` of every head by itself, as Qwen3 applies to queries and keys."""
    return _normalise(x.unflatten(-1, (heads, head_dim)), weight, eps, offset).flatten(-2)


@contract(
    "x[T,heads*head_dim]:A gate[T,heads*head_dim]:A weight[head_dim]:W -> y[T,heads*head_dim]:A",
    rowwise="T",
    flops="9*T*heads*head_dim",
)
def gated_head_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float, heads: int, head_dim: int
) -> torch.Tensor:
    """:func:`rms_norm` of every head by itself, times ``silu(gate)``."""
    normed = _normalise(widen(x).unflatten(-1, (heads, head_dim)), weight, eps, 0.0).flatten(-2)
    return (normed * functional.silu(widen(gate))).to(x.dtype)
