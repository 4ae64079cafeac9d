"""Number formats as the references use them."""

from __future__ import annotations

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype that references compute in: fp32, or fp64 where the caller gave that."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_dtype(y: torch.Tensor, name: str, like: torch.Tensor) -> torch.Tensor:
    """``y`` as the dtype called ``name``, or as ``like``'s where the name is empty."""
    return y.to(getattr(torch, name) if name else like.dtype)
