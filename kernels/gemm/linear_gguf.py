"""Dense projection and embedding over weights in GGUF's blocks (kernels/gguf.py)."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.gguf import to_8_bits, widened
from makeready.kernels.numeric import to_dtype, widen

# Unsigned integers and their offset are summed apart, which costs a digit where neighbours have one sign.
_TOLERANCE = Tolerance(float32=2e-5)


@contract(
    "x[T,K]:A blocks[Z]:uint8 bias?[outputs]:B -> y[T,outputs]:out_dtype|A",
    tolerance=_TOLERANCE,
    rowwise="T",
    flops="2*T*outputs*K",
    rate="blocks",
    merges="outputs",
    shares=("x",),
    adds=("rows", "outputs"),
)
def linear_gguf(
    x: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    rows: str,
    outputs: int,
    out_dtype: str = "",
) -> torch.Tensor:
    """``to_8_bits(x) @ weight.T + bias``, accumulated in fp32 or wider, as llama.cpp computes on CPUs.

    Args:
        rows: what ``blocks`` are; of ``outputs`` rows in all.
    """
    wide = widen(x).dtype
    y = to_8_bits(x, wide) @ widened(blocks, rows, x.shape[-1]).to(wide).T
    if bias is not None:
        y = y + widen(bias)
    return to_dtype(y, out_dtype, like=x)


@contract(
    "ids[T]:int32 blocks[Z]:uint8 -> x[T,width]:out_dtype|float32",
    rowwise="T",
    traffic={"blocks": "T*width"},
)
def embedding_gguf(
    ids: torch.Tensor, blocks: torch.Tensor, *, rows: str, width: int, out_dtype: str = "float32"
) -> torch.Tensor:
    """The rows that ``ids`` name, as numbers."""
    return widened(blocks, rows, width)[ids.long()].to(getattr(torch, out_dtype))
