"""Projections of 8-bit floats on the CPU, over the fp16 panels of linear_cpu.py: fp16 holds every e4m3 number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_cpu import PACKED
from makeready.kernels.gemm.linear_fp8 import linear_fp8
from makeready.kernels.registry import kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear_fp8, Contract)


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return attrs["out_dtype"] == "float32"


@kernel(linear_fp8, "packed_fp16", target="cpu", layouts={"weight": PACKED}, applies=_applies)
def linear_fp8_packed(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Any,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: str,
) -> torch.Tensor:
    """8-bit activations widened to fp32 times packed weights, accumulated in fp32, then the scales."""
    if isinstance(weight, torch.Tensor):
        return linear_fp8.reference(x, x_scale, weight, weight_scale, bias, out_dtype=out_dtype)
    y = torch.ops.quantized.linear_dynamic_fp16(x.float(), weight).mul_(x_scale).mul_(weight_scale)
    return y if bias is None else y.add_(bias)
