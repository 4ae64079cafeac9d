"""Dense projection on the CPU, over fp16 weights that FBGEMM keeps in panels.

A 2-core AVX2 machine streams 17-23 GB/s of such weights at 1-4 rows and reaches 80-150 GFLOP/s at 8 and
more; PyTorch's own bf16 product stays at 17 GFLOP/s there for any number of rows, and fp32 weights are
twice the bytes.

Which bits a row gets depends on the panel of rows that the library puts it into. The kernels of deterministic
plans hand it whole panels only, and check when they are bound that every place of a panel gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear import linear
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(linear, Contract)

PACKED = "fbgemm_fp16"
_FP16_MAX = 65504.0
_PANEL = 6  # rows that FBGEMM multiplies at once; a remainder of 1 or 2 rows takes another way through K
_BLOCK = 16  # rows of every product with weights as they are


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


def _wide(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["x"].dtype == "float32" and attrs["out_dtype"] in ("", "float32")


def _applies(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return _wide(specs, attrs) and specs["weight"].dtype in ("bfloat16", "float16")


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


def in_panels(multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``multiply`` of ``x[T, K]`` with FBGEMM's packed weights, in whole panels of rows."""
    rows = len(x)
    return multiply(functional.pad(x, (0, 0, 0, -rows % _PANEL)))[:rows]


def in_blocks(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x[T, K] @ weight[N, K].T`` in fp32, always of a block of as many rows at an aligned address.

    Rows are the columns of MKL's right matrix: as rows of its left one they get other bits by their place
    where N is below 8.
    """
    rows = len(x)
    padded = functional.pad(x, (0, 0, 0, -rows % _BLOCK))
    return torch.cat([(weight @ block.T.contiguous()).T for block in padded.split(_BLOCK)])[:rows]


def prove_invariant(multiply: Callable[[torch.Tensor], torch.Tensor], rows: int, inputs: int) -> None:
    """Check that ``multiply`` gives equal rows equal bits, wherever they stand among ``rows`` and with a single one.

    Rows of random numbers differ in some output as soon as their sums have another order.

    Raises:
        ValueError: it does not on this machine.
    """
    row = torch.randn(1, inputs, generator=torch.Generator().manual_seed(inputs))
    many, one = multiply(row.expand(rows, inputs).contiguous()), multiply(row)
    if not torch.equal(many, one.expand_as(many)):
        raise ValueError(
            "this machine's matrix product gives equal rows different bits, so the plan cannot be deterministic; "
            "compile it without plan.deterministic"
        )


def _bind_invariant(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None]:
    (x, weight, bias), (y,) = operands, results
    multiply = invariant_product(weight)
    prove_invariant(multiply, *x.shape)

    def call() -> None:
        y.copy_(multiply(x))

    def call_with_bias() -> None:
        torch.add(multiply(x), bias, out=y)

    return call if bias is None else call_with_bias


def invariant_product(weight: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x[T, K] @ weight[N, K].T`` in fp32, for weights of FBGEMM or as they are."""
    if isinstance(weight, torch.Tensor):
        wide = weight.float()
        return lambda x: in_blocks(wide, x)
    packed = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: in_panels(lambda panels: packed(panels, weight), x)


@kernel(
    linear,
    "panels_fp16",
    target="cpu",
    layouts={"weight": PACKED},
    invariant=True,
    ordinary=False,
    applies=_applies,
    bind=_bind_invariant,
)
def linear_panels(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, *, out_dtype: str = ""
) -> torch.Tensor:
    """:func:`linear_packed`, the same for a row whatever the others are."""
    y = invariant_product(weight)(x)
    return y if bias is None else y + bias


@kernel(linear, "blocks", target="cpu", invariant=True, ordinary=False, applies=_wide, bind=_bind_invariant)
def linear_blocks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: str = ""
) -> torch.Tensor:
    """fp32 weights as they are, the same for a row whatever the others are."""
    y = invariant_product(weight)(x)
    return y if bias is None else y + bias
