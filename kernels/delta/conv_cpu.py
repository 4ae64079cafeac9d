"""The convolution on the CPU: compiled, or all tokens of a row at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.delta.conv import causal_conv_silu
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(causal_conv_silu, Contract)
MAX_TAPS = 8  # TAPS in delta.c


def _float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return all(specs[name].dtype == "float32" for name in ("x", "weight", "tail"))


def _bind(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x, weight, tail, state_in, state_out, query_start, query_len), (y,) = operands, results
    if len(weight) > MAX_TAPS:
        return None
    return native.prepare(
        "causal_conv_silu", x, x.stride(0), weight, tail, state_in, state_out, query_start, query_len,
        y, y.stride(0), len(x), len(query_len), x.shape[1], len(weight), long=len(x) > native.MANY_TOKENS,
    )  # fmt: skip


@kernel(causal_conv_silu, "rows", target="cpu", invariant=True, applies=_float32, bind=_bind)
def causal_conv_silu_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    tail: torch.Tensor,
    state_in: torch.Tensor,
    state_out: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
) -> torch.Tensor:
    """The reference, tap by tap: every element is summed in the order of its taps, in any row."""
    y = torch.zeros_like(x)
    kept = len(weight) - 1
    for start, count, before, after in zip(
        *(v.tolist() for v in (query_start, query_len, state_in, state_out)), strict=True
    ):
        if count == 0:
            continue
        window = torch.cat((tail[before], x[start : start + count]))
        made = torch.zeros(count, x.shape[1])
        for j, taps in enumerate(weight):
            made += taps * window[j : j + count]
        for t in range(count):  # a token by itself: what a vector or a thread holds must not matter
            y[start + t] = functional.silu(made[t])
        tail[after] = window[len(window) - kept :]
    return y
