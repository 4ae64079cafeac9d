"""Embeddings of token ids whose table is integers with scales by groups (kernels/integers.py)."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Quantizes, contract
from makeready.kernels.integers import by_output, tiles, values
from makeready.kernels.numeric import to_dtype


@contract(
    "ids[T]:int32 weight[V,cdiv(width,128)*8*bits]:int16 weight_scale[cdiv(V,64),cdiv(width,group),64]:float16 "
    "weight_zero?[cdiv(V,64),cdiv(width,group),64]:float16 -> x[T,width]:out_dtype|float32",
    rowwise="T",
    traffic={
        "weight": "T*cdiv(width,128)*8*bits",
        "weight_scale": "T*cdiv(width,group)",
        "weight_zero": "T*cdiv(width,group)",
    },
    quantizes=Quantizes("embedding", ("gguf",)),
)
def embedding_int(
    ids: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None = None,
    *,
    bits: int,
    group: int,
    width: int,
    out_dtype: str = "float32",
) -> torch.Tensor:
    """Rows ``ids``, computed in fp32.

    Args:
        weight_zero: offsets.
    """
    rows = len(weight)
    scale, zero = (
        None if one is None else tiles(by_output(one, rows)[ids.long()])
        for one in (weight_scale, weight_zero)
    )
    assert scale is not None
    form = {"bits": bits, "group": group, "inputs": width}
    x = values(weight[ids.long()], scale, zero, **form, dtype=torch.float32)
    return to_dtype(x, out_dtype, like=x)
