"""Root-mean-square norms on the CPU: compiled for few tokens, else the references in fewer sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.norm import add_rms_norm, rms_norm
from makeready.kernels.registry import Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(rms_norm, Contract)
assert isinstance(add_rms_norm, Contract)


def _all_float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return all(spec.dtype == "float32" for spec in specs.values())


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The reference's norm of fp32 ``x`` in three sweeps instead of six."""
    power = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
    return (x * power.add_(eps).rsqrt_()).mul_(weight + offset if offset else weight)


def _native_rms_norm(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x, weight), (y,) = operands, results
    return native.prepare(
        "rms_norm", x, x.stride(0), weight, y, y.stride(0), *x.shape,
        float(attrs["eps"]), float(attrs.get("offset", 0)), long=len(x) > native.MANY_TOKENS,
    )  # fmt: skip


def _native_add_rms_norm(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x, residual, weight), (y, total) = operands, results
    return native.prepare(
        "add_rms_norm", x, x.stride(0), residual, residual.stride(0), weight, y, y.stride(0),
        total, total.stride(0), *x.shape, float(attrs["eps"]), float(attrs.get("offset", 0)),
        long=len(x) > native.MANY_TOKENS,
    )  # fmt: skip


@kernel(rms_norm, "fused", target="cpu", applies=_all_float32, bind=_native_rms_norm)
def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """See :func:`normalise`."""
    return normalise(x, weight, eps, offset)


@kernel(add_rms_norm, "fused", target="cpu", applies=_all_float32, bind=_native_add_rms_norm)
def add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`normalise`."""
    total = x + residual
    return normalise(total, weight, eps, offset), total


_NORM_BY_ROWS, _ADD_BY_ROWS = by_rows(rms_norm, rms_norm_cpu), by_rows(add_rms_norm, add_rms_norm_cpu)


@kernel(
    rms_norm,
    "rows",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_all_float32,
    bind=_native_rms_norm,
)
def rms_norm_rows(x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """:func:`rms_norm_cpu` of every row by itself, compiled for any number of them."""
    return _NORM_BY_ROWS(x, weight, eps=eps, offset=offset)


@kernel(
    add_rms_norm,
    "rows",
    target="cpu",
    invariant=True,
    ordinary=False,
    applies=_all_float32,
    bind=_native_add_rms_norm,
)
def add_rms_norm_rows(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`add_rms_norm_cpu` of every row by itself, compiled for any number of them."""
    return _ADD_BY_ROWS(x, residual, weight, eps=eps, offset=offset)
