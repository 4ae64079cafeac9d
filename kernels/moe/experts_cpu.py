"""Products with experts' weights on the CPU, over fp16 panels as in kernels/gemm/linear_cpu.py.

One product for every expert that has an entry; the others' weights are not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels.contract import Contract
from makeready.kernels.gemm.linear_cpu import in_blocks, invariant_product, pack, packs, prove_invariant
from makeready.kernels.moe.experts import grouped_linear, grouped_linear_fp8, grouped_linear_fp8_block
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

for op in (grouped_linear, grouped_linear_fp8, grouped_linear_fp8_block):
    assert isinstance(op, Contract)

PACKED_EXPERTS = "fbgemm_fp16_experts"

Product = Callable[[torch.Tensor], torch.Tensor]


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


def _grouped(
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
        y[first:stop] = product(expert)(rows[first:stop].float())
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


@kernel(grouped_linear, "packed_fp16", target="cpu", layouts={"weight": PACKED_EXPERTS}, applies=_packable)
def grouped_packed(
    x: torch.Tensor, weight: Any, order: torch.Tensor, start: torch.Tensor, *, top_k: int, out_dtype: str = ""
) -> torch.Tensor:
    """fp32 activations times packed fp16 weights, accumulated in fp32."""
    return _grouped(x, order, start, top_k, _outputs(weight), _plain(weight))


@kernel(grouped_linear, "experts", target="cpu", applies=_wide)
def grouped_wide(
    x: torch.Tensor, weight: Any, order: torch.Tensor, start: torch.Tensor, *, top_k: int, out_dtype: str = ""
) -> torch.Tensor:
    """fp32 activations times weights as they are, of which only those in use are widened."""
    return _grouped(x, order, start, top_k, _outputs(weight), _plain(weight))


@kernel(
    grouped_linear,
    "panels_fp16",
    target="cpu",
    layouts={"weight": PACKED_EXPERTS},
    invariant=True,
    ordinary=False,
    applies=_packable,
    bind=_proving(1),
)
def grouped_panels(
    x: torch.Tensor, weight: Any, order: torch.Tensor, start: torch.Tensor, *, top_k: int, out_dtype: str = ""
) -> torch.Tensor:
    """:func:`grouped_packed`, the same for an entry whatever the others are."""
    return _grouped(x, order, start, top_k, _outputs(weight), _invariant(weight))


@kernel(
    grouped_linear, "blocks", target="cpu", invariant=True, ordinary=False, applies=_wide, bind=_proving(1)
)
def grouped_blocks(
    x: torch.Tensor, weight: Any, order: torch.Tensor, start: torch.Tensor, *, top_k: int, out_dtype: str = ""
) -> torch.Tensor:
    """:func:`grouped_wide`, the same for an entry whatever the others are."""
    return _grouped(x, order, start, top_k, _outputs(weight), _invariant(weight))


def _scaled(
    products: Callable[[Any], Callable[[int], Product]],
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: Any,
    weight_scale: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Products of 8-bit values in fp32, then the scales of tokens and of outputs."""
    y = _grouped(x.float(), order, start, top_k, _outputs(weight), products(weight))
    used = int(start[-1])
    y[:used] *= x_scale[order[:used].long() // top_k] if top_k else x_scale[:used]
    for expert, first, stop in _runs(start):
        y[first:stop] *= weight_scale[expert]
    return y


@kernel(
    grouped_linear_fp8, "packed_fp16", target="cpu", layouts={"weight": PACKED_EXPERTS}, applies=_quantized
)
def grouped_fp8_packed(
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
    """8-bit activations widened to fp32 times packed weights, accumulated in fp32, then the scales."""
    return _scaled(_plain, x, x_scale, weight, weight_scale, order, start, top_k)


@kernel(
    grouped_linear_fp8,
    "panels_fp16",
    target="cpu",
    layouts={"weight": PACKED_EXPERTS},
    invariant=True,
    ordinary=False,
    applies=_quantized,
    bind=_proving(2),
)
def grouped_fp8_panels(
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
    """:func:`grouped_fp8_packed`, the same for an entry whatever the others are."""
    return _scaled(_invariant, x, x_scale, weight, weight_scale, order, start, top_k)


def _widened(weight: torch.Tensor, weight_scale: torch.Tensor, block: int, expert: int) -> torch.Tensor:
    scale = weight_scale[expert].repeat_interleave(block, 0)[: weight.shape[1]].repeat_interleave(block, 1)
    return weight[expert].float() * scale


@kernel(grouped_linear_fp8_block, "experts", target="cpu", applies=_quantized)
def grouped_fp8_experts(
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
    """fp32, widening the weights of experts in use alone."""
    wide = x.float() * x_scale.repeat_interleave(block, 1)

    def product(expert: int) -> Product:
        return lambda rows: rows @ _widened(weight, weight_scale, block, expert).T

    return _grouped(wide, order, start, top_k, weight.shape[1], product)


@kernel(
    grouped_linear_fp8_block,
    "blocks",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_quantized,
    bind=_proving(2),
)
def grouped_fp8_blocks(
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
    """:func:`grouped_fp8_experts`, the same for an entry whatever the others are."""
    wide = x.float() * x_scale.repeat_interleave(block, 1)

    def product(expert: int) -> Product:
        matrix = _widened(weight, weight_scale, block, expert)
        return lambda rows: in_blocks(matrix, rows)

    return _grouped(wide, order, start, top_k, weight.shape[1], product)
