"""Projections of 8-bit integers on the CPU: their sums are exact, so that a row is the same in every batch.

PyTorch's product of integers is oneDNN's. Without instructions that add products up in 32 bits (VNNI) it may add two
in 16 and saturate there; where it does, fp32 products of parts take its place, which are exact as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_int8 import linear_int8
from makeready.kernels.registry import kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear_int8, Contract)

_INT_MM = torch.ops.aten._int_mm.default
_PART = 1024  # inputs whose products, of 2^14 at most, add up to no more than 2^24: fp32 holds every sum on the way


def integer_sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int32 ``x[T, K] @ weight[N, K].T`` of int8, exactly."""
    return _INT_MM(x, weight.T) if _product_is_exact() else sums_of_parts(x, weight)


def sums_of_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """:func:`integer_sums` by fp32 products of so few inputs that nothing is rounded."""
    y = torch.zeros(len(x), len(weight), dtype=torch.int32)
    for at in range(0, x.shape[1], _PART):
        y += (x[:, at : at + _PART].float() @ weight[:, at : at + _PART].float().T).int()
    return y


@lru_cache
def _product_is_exact() -> bool:
    """Whether PyTorch's product adds up the largest numbers without loss here."""
    x = torch.full((9, 131), 127, dtype=torch.int8)
    weight = torch.full((35, 131), -128, dtype=torch.int8)
    weight[::2] = 127
    return all(torch.equal(_INT_MM(a, weight.T), sums_of_parts(a, weight)) for a in (x, -x, x[:1]))


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return attrs["out_dtype"] == "float32"


@kernel(linear_int8, "integers", target="cpu", invariant=True, applies=_applies)
def linear_int8_cpu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """Exact sums, then the scales in fp32."""
    y = integer_sums(x, weight).float().mul_(x_scale).mul_(weight_scale)
    return y if bias is None else y.add_(bias)
