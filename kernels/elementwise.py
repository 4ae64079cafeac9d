"""Element-by-element ops, and the row selections around them."""

from __future__ import annotations

import torch
from torch.nn import functional

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.numeric import widen


@contract("x[T,C]:A y[T,C]:A -> z[T,C]:A", rowwise="T", flops="T*C")
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + y``."""
    return (widen(x) + widen(y)).to(x.dtype)


@contract("x[T,C]:A y[T,C]:A -> z[T,C]:A", rowwise="T", flops="T*C")
def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x * y``."""
    return (widen(x) * widen(y)).to(x.dtype)


@contract("x[T,C]:A -> y[T,C]:A", rowwise="T", flops="4*T*C")
def silu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(x)``."""
    return functional.silu(widen(x)).to(x.dtype)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """``x / 2 * (1 + tanh(u))`` as ``x * sigmoid(2 u)``, where nothing cancels; u = sqrt(2 / pi)(x + 0.044715 x³)"""
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))


@contract("x[T,C]:A -> y[T,C]:A", rowwise="T", flops="10*T*C")
def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    return _gelu_tanh(widen(x)).to(x.dtype)


@contract("x[T,C]:A -> y[T,C]:A", rowwise="T", flops="T*C")
def scale(x: torch.Tensor, *, by: float) -> torch.Tensor:
    """``x * by``."""
    return (widen(x) * by).to(x.dtype)


@contract("x[T,C]:A scale[C]:float32 -> y[T,C]:A", rowwise="T", flops="T*C")
def scale_columns(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x * scale``: a number for each column."""
    return (widen(x) * widen(scale)).to(x.dtype)


@contract("x[T,C]:A gate[T,1]:float32 -> y[T,C]:A", rowwise="T", flops="T*C")
def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``: a number for each token."""
    return (widen(x) * torch.sigmoid(widen(gate))).to(x.dtype)


@contract("x[T,C]:A gate[T,C]:A -> y[T,C]:A", rowwise="T", flops="5*T*C")
def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``, element by element."""
    return (widen(x) * torch.sigmoid(widen(gate))).to(x.dtype)


@contract("gate_up[T,J]:A -> y[T,J//2]:A", rowwise="T", flops="5*T*J/2", gates="silu")
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` where ``gate_up`` holds the gate's columns, then up's."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


@contract("gate_up[T,J]:A -> y[T,J//2]:A", rowwise="T", flops="11*T*J/2", gates="gelu_tanh")
def gelu_tanh_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh(gate) * up`` where ``gate_up`` holds the gate's columns, then up's."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (_gelu_tanh(gate) * up).to(gate_up.dtype)


@contract("gate_up[T,J]:A -> y[T,J//2]:A", rowwise="T", flops="9*T*J/2")
def clamped_swiglu(gate_up: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)`` where ``gate_up`` holds the gate's columns, then up's.

    The gate is at most ``limit``, up between ``-limit`` and ``limit`` (gpt-oss, arXiv:2508.10925).
    """
    gate, up = widen(gate_up).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(alpha * gate))).to(gate_up.dtype)


@contract("x[T,C]:A -> y[T,stop-start]:A", rowwise="T", view="start", tolerance=Tolerance(exact=True))
def columns(x: torch.Tensor, *, start: int, stop: int) -> torch.Tensor:
    """Columns ``start:stop`` of ``x``: a view, which lowering turns into an offset and a stride."""
    return x[:, start:stop]


@contract("x[T,C]:A -> y[T,width]:A", rowwise="T", tolerance=Tolerance(exact=True))
def pad_columns(x: torch.Tensor, *, width: int) -> torch.Tensor:
    """``x``, then zeros up to ``width`` columns: whole blocks for what is quantized by blocks."""
    return functional.pad(x, (0, width - x.shape[-1]))


@contract("x[T,C]:A y[T,D]:A -> z[T,C+D]:A", rowwise="T", tolerance=Tolerance(exact=True))
def concatenate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Columns of ``x``, then those of ``y``."""
    return torch.cat((x, y), dim=-1)


@contract(
    "x[T,C]:A query_start[R]:int32 query_len[R]:int32 -> y[R,C]:A",
    tolerance=Tolerance(exact=True),
    traffic={"x": "R*C"},
    selects_rows="x",
)
def gather_last(x: torch.Tensor, query_start: torch.Tensor, query_len: torch.Tensor) -> torch.Tensor:
    """Every row's last token: ``y[r] = x[query_start[r] + query_len[r] - 1]``.

    A padding row (``query_len`` 0) gives a copy of token 0, which nobody reads.
    """
    return x[(query_start + query_len - 1).clamp_min(0).long()]
