"""Embeddings of token ids."""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract


@contract("ids[T]:int32 weight[V,C]:W -> x[T,C]:out_dtype|W", rowwise="T", traffic={"weight": "T*C"})
def embedding(ids: torch.Tensor, weight: torch.Tensor, *, out_dtype: str = "") -> torch.Tensor:
    """Rows of ``weight``, converted to the activations' dtype."""
    rows = weight[ids.long()]
    return rows.to(getattr(torch, out_dtype)) if out_dtype else rows
