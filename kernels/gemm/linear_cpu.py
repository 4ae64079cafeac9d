"""Dense projection on the CPU, over fp16 weights that FBGEMM keeps in panels.

A 2-core AVX2 machine streams 17-23 GB/s of such weights at 1-4 rows and reaches 80-150 GFLOP/s at 8 and
more; PyTorch's own bf16 product stays at 17 GFLOP/s there for any number of rows, and fp32 weights are
twice the bytes.

Which bits a row gets depends on the panel of rows that the library puts it into. The kernels of deterministic
plans hand it whole panels only, and check when they are bound that every place of a panel gives the same.
"""

from __future__ import annotations

import math
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


class ProductError(ValueError):
    """Weights that no product here takes, or a machine whose products a deterministic plan cannot use."""


class Packed:
    """``weight[N, K]`` in FBGEMM's panels, as one or several ranges of rows.

    Args:
        parts: what FBGEMM packed, with the first row of each and the one behind it.
        scale: fp32 ``[N]``, powers of two that results are multiplied with; None: all are 1.
    """

    def __init__(self, parts: Sequence[tuple[int, int, Any]], scale: torch.Tensor | None = None) -> None:
        self.parts = tuple(parts)
        self.scale = scale

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``x[T, K] @ weight[N, K].T`` in memory of its own, fp32 ``[T, N]``."""
        if len(self.parts) == 1:
            y = _MULTIPLY(x, self.parts[0][2])
            return y if self.scale is None else y.mul_(self.scale)
        y = torch.empty(len(x), self.parts[-1][1])
        self.multiply_into(x, y)
        return y

    def multiply_into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The same into ``y[T, N]``, which may be columns of a wider buffer."""
        for start, stop, part in self.parts:
            y[:, start:stop].copy_(_MULTIPLY(x, part))
        if self.scale is not None:
            y.mul_(self.scale)


_MULTIPLY = torch.ops.quantized.linear_dynamic_fp16.default


def packs() -> bool:
    """Whether PyTorch was built with FBGEMM, so that :func:`pack` has something to pack with."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def part_rows(inputs: int) -> int:
    """Rows that are packed at once, of ``inputs`` features.

    FBGEMM walks along a column while it packs: 150,000 rows take twice as long a number as 16,000, whose cache
    lines stay close. What is converted on the way takes at most 64 MiB then, and large weights become several
    pieces of work for the threads that load.
    """
    return min(2**14, max(2**10, 2**24 // max(inputs, 1) // 16 * 16))


def pack(weight: torch.Tensor) -> Any:
    """``weight[N, K]`` as :class:`Packed`; as it is where PyTorch was built without FBGEMM.

    fp16 holds bf16's 8 bits of mantissa exactly down to 6e-5; smaller weights keep an absolute error of
    at most 3e-8. A row with weights beyond fp16's range is divided by a power of two that brings its largest
    into it, and its results are multiplied by that: they keep an absolute error of 2^-40 of the row's largest,
    far below what a sum in fp32 keeps.

    Raises:
        ProductError: a weight is NaN or infinite.
    """
    if not packs():
        return weight
    step = part_rows(weight.shape[1])
    return join([pack_rows(weight[at : at + step]) for at in range(0, max(len(weight), 1), step)])


def pack_rows(weight: torch.Tensor) -> Packed:
    """:func:`pack` of rows that are packed at once."""
    wide, scale = weight.float(), None
    low, high = (x.item() for x in torch.aminmax(wide)) if wide.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ProductError("it holds NaN or an infinite number")
    if max(-low, high) > _FP16_MAX:
        # frexp: |w| < 2^e, so that 2^(e - 15) leaves less than 2^15.
        exponent = torch.frexp(wide.abs().amax(1)).exponent.sub_(15).clamp_(min=0)
        wide = torch.ldexp(wide, -exponent[:, None])
        scale = torch.ldexp(torch.ones(len(wide)), exponent)
    return Packed([(0, len(wide), torch.ops.quantized.linear_prepack_fp16(wide, None))], scale)


def join(parts: Sequence[Packed]) -> Packed:
    """Packed rows, one after the other."""
    placed, scales, at = [], [], 0
    for packed in parts:
        placed += [(at + start, at + stop, part) for start, stop, part in packed.parts]
        rows = placed[-1][1] - at
        scales.append(torch.ones(rows) if packed.scale is None else packed.scale)
        at += rows
    scaled = any(packed.scale is not None for packed in parts)
    return Packed(placed, torch.cat(scales) if scaled else None)


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
    multiply, (y,) = weight.multiply, results
    if bias is None:
        return lambda: weight.multiply_into(x, y)

    def call_with_bias() -> None:
        torch.add(multiply(x), bias, out=y)

    return call_with_bias


@kernel(linear, "packed_fp16", target="cpu", layouts={"weight": PACKED}, applies=_applies, bind=_bind)
def linear_packed(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, *, out_dtype: str = ""
) -> torch.Tensor:
    """fp32 activations times packed fp16 weights, accumulated in fp32."""
    if isinstance(weight, torch.Tensor):
        return linear.reference(x, weight, bias, out_dtype=out_dtype)
    y = weight.multiply(x)
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
        ProductError: it does not on this machine.
    """
    row = torch.randn(1, inputs, generator=torch.Generator().manual_seed(inputs))
    many, one = multiply(row.expand(rows, inputs).contiguous()), multiply(row)
    if not torch.equal(many, one.expand_as(many)):
        raise ProductError(
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
    return lambda x: in_panels(weight.multiply, x)


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
