"""Products with experts' weights on the CPU, over fp16 panels as in kernels/gemm/linear_cpu.py.

One product for every expert that has an entry; the others' weights are not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_cpu import invariant_product, pack, packs, prove_invariant
from makeready.kernels.gemm.linear_int8_cpu import integer_sums
from makeready.kernels.moe.experts import (
    add_bias,
    grouped_linear,
    grouped_linear_fp8,
    grouped_linear_fp8_block,
    grouped_linear_int8,
)
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

for op in (grouped_linear, grouped_linear_fp8, grouped_linear_fp8_block, grouped_linear_int8):
    assert isinstance(op, Contract)

PACKED_EXPERTS = "fbgemm_fp16_experts"

Product = Callable[[torch.Tensor], torch.Tensor]
Products = Callable[[Any], Callable[[int], Product]]


def pack_experts(weight: torch.Tensor) -> Any:
    """``weight[E, N, K]`` as a list of E packed matrices; as it is where PyTorch was built without FBGEMM.

    Raises:
        ProductError: a weight is NaN or infinite.
    """
    return [pack(one) for one in weight] if packs() else weight


def _runs(start: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Experts that have entries, with the first and the one behind the last."""
    for expert, (first, stop) in enumerate(itertools.pairwise(start.tolist())):
        if stop > first:
            yield expert, first, stop


def by_expert(
    x: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    top_k: int,
    outputs: int,
    product: Callable[[int], Product],
) -> torch.Tensor:
    """fp32 ``[M, outputs]``: entries times what ``product`` gives for their expert, zeros behind the last."""
    used = int(start[-1])
    rows = x[order[:used].long() // top_k] if top_k else x[:used]
    y = torch.zeros(len(order), outputs)
    for expert, first, stop in _runs(start):
        y[first:stop] = product(expert)(rows[first:stop])
    return y


def _outputs(weight: Any) -> int:
    if isinstance(weight, torch.Tensor):
        return weight.shape[1]
    return weight[0].parts[-1][1]


def _plain(weight: Any) -> Callable[[int], Product]:
    """The products of packed experts, or of experts as they are."""
    if isinstance(weight, torch.Tensor):
        return lambda expert: lambda x: x @ weight[expert].float().T
    return lambda expert: weight[expert].multiply


def _integers(weight: torch.Tensor) -> Callable[[int], Product]:
    return lambda expert: lambda x: integer_sums(x, weight[expert])


def _invariant(weight: Any) -> Callable[[int], Product]:
    return lambda expert: invariant_product(weight[expert])


def _wide(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return specs["x"].dtype == "float32" and attrs["out_dtype"] in ("", "float32")


def _packable(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return _wide(specs, attrs) and specs["weight"].dtype in ("bfloat16", "float16")


def _quantized(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return attrs["out_dtype"] == "float32"


def _proving(weight_at: int) -> Callable[[Operands, Sequence[torch.Tensor], Mapping[str, Any]], None]:
    """Binds nothing, but checks that this machine's product of the first expert is invariant."""

    def bind(operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]) -> None:
        x, weight = operands[0], operands[weight_at]
        prove_invariant(invariant_product(weight[0]), len(results[0]), x.shape[1])

    return bind


def _linear(products: Products) -> Callable[..., torch.Tensor]:
    """:func:`grouped_linear` of fp32 activations, accumulated in fp32."""

    def run(
        x: torch.Tensor,
        weight: Any,
        order: torch.Tensor,
        start: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        top_k: int,
        out_dtype: str = "",
    ) -> torch.Tensor:
        return add_bias(by_expert(x, order, start, top_k, _outputs(weight), products(weight)), bias, start)

    return run


def _by_channel(products: Products, *, whole: bool = False) -> Callable[..., torch.Tensor]:
    """:func:`grouped_linear_fp8`: products of 8-bit values in fp32, or of integers where ``whole``; then the scales
    of tokens and of outputs.
    """

    def run(
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: Any,
        weight_scale: torch.Tensor,
        order: torch.Tensor,
        start: torch.Tensor,
        *,
        top_k: int,
        out_dtype: str,
    ) -> torch.Tensor:
        x = x if whole else x.float()
        y = by_expert(x, order, start, top_k, _outputs(weight), products(weight))
        used = int(start[-1])
        y[:used] *= x_scale[order[:used].long() // top_k] if top_k else x_scale[:used]
        for expert, first, stop in _runs(start):
            y[first:stop] *= weight_scale[expert]
        return y

    return run


def _by_block(products: Products) -> Callable[..., torch.Tensor]:
    """:func:`grouped_linear_fp8_block` in fp32, widening the weights of experts in use alone."""

    def run(
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        order: torch.Tensor,
        start: torch.Tensor,
        *,
        top_k: int,
        out_dtype: str,
        block: int,
    ) -> torch.Tensor:
        outputs = weight.shape[1]

        def product(expert: int) -> Product:
            scale = weight_scale[expert].repeat_interleave(block, 0)[:outputs].repeat_interleave(block, 1)
            return products((weight[expert].float() * scale).unsqueeze(0))(0)

        wide = x.float() * x_scale.repeat_interleave(block, 1)
        return by_expert(wide, order, start, top_k, outputs, product)

    return run


# Each twice: for ordinary plans, and giving an entry the same whatever the others are.
_PACKED = {"weight": PACKED_EXPERTS}
for op, make, stored, applies, ordinary, invariant in (
    (grouped_linear, _linear, _PACKED, _packable, "packed_fp16", "panels_fp16"),
    (grouped_linear, _linear, {}, _wide, "experts", "blocks"),
    (grouped_linear_fp8, _by_channel, _PACKED, _quantized, "packed_fp16", "panels_fp16"),
    (grouped_linear_fp8_block, _by_block, {}, _quantized, "experts", "blocks"),
):
    kernel(op, ordinary, target="cpu", layouts=stored, applies=applies)(make(_plain))
    kernel(
        op,
        invariant,
        target="cpu",
        layouts=stored,
        invariant=True,
        ordinary=False,
        applies=applies,
        bind=_proving(1 if op is grouped_linear else 2),
    )(make(_invariant))

# Sums of integers are exact, in whatever order.
kernel(grouped_linear_int8, "integers", target="cpu", applies=_quantized, invariant=True)(
    _by_channel(_integers, whole=True)
)
