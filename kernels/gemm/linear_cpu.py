"""Dense projection on the CPU, over fp16 weights that FBGEMM keeps in panels.

A 2-core AVX2 machine streams 17-23 GB/s of such weights at 1-4 rows and reaches 80-150 GFLOP/s at 8 and
more; PyTorch's own bf16 product stays at 17 GFLOP/s there for any number of rows, and fp32 weights are
twice the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear import linear
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear, Contract)

PACKED = "fbgemm_fp16"
_FP16_MAX = 65504.0


def pack(weight: torch.Tensor) -> Any:
    """``weight[N, K]`` in FBGEMM's panels; as it is where PyTorch was built without FBGEMM.

    fp16 holds bf16's 8 bits of mantissa exactly down to 6e-5; smaller weights keep an absolute error of
    at most 3e-8.

    Raises:
        ValueError: a weight is beyond fp16's range.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return weight
    wide = weight.float()
    largest = wide.abs().max().item()
    if not largest <= _FP16_MAX:
        raise ValueError(
            f"a weight of magnitude {largest:g} does not fit fp16 ({_FP16_MAX:g}); "
            "compile with plan.weight_dtype=float32"
        )
    return torch.ops.quantized.linear_prepack_fp16(wide, None)


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    wide = specs["x"].dtype == "float32" and attrs["out_dtype"] in ("", "float32")
    return wide and specs["weight"].dtype in ("bfloat16", "float16")


def _bind(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    """FBGEMM has no form that writes where it is told; only the lookups are saved."""
    x, weight, bias = operands
    if isinstance(weight, torch.Tensor):
        return None
    multiply, (y,) = torch.ops.quantized.linear_dynamic_fp16.default, results

    def call() -> None:
        y.copy_(multiply(x, weight))

    def call_with_bias() -> None:
        torch.add(multiply(x, weight), bias, out=y)

    return call if bias is None else call_with_bias


@kernel(linear, "packed_fp16", target="cpu", layouts={"weight": PACKED}, applies=_applies, bind=_bind)
def linear_packed(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, *, out_dtype: str = ""
) -> torch.Tensor:
    """fp32 activations times packed fp16 weights, accumulated in fp32."""
    if isinstance(weight, torch.Tensor):
        return linear.reference(x, weight, bias, out_dtype=out_dtype)
    y = torch.ops.quantized.linear_dynamic_fp16(x, weight)
    return y if bias is None else y.add_(bias)
