"""The gated delta rule on the CPU: compiled, token by token with the state in the first cache.

Chunks would save no operations there, and traffic only where the state is in memory: so there is one way for all
kinds of step, in which cutting a prompt changes no bit; but that states of 16 bits are rounded behind every token in
one of the ops, and where a row's tokens of a step end in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.delta.rule import EPS, chunk_delta_rule, recurrent_delta_rule
from makeready.kernels.registry import Operands, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(chunk_delta_rule, Contract)
assert isinstance(recurrent_delta_rule, Contract)
MAX_KEY = 256  # MAX_KEY in delta.c


def _float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return (
        specs["qkv"].dtype == "float32"
        and specs["state"].dtype in ("float32", "bfloat16")
        and attrs["key_dim"] <= MAX_KEY
    )


def _bind_of(op: Contract) -> Callable[..., Callable[[], None] | None]:
    def bind(
        operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
    ) -> Callable[[], None] | None:
        (qkv, ba, a_log, dt_bias, state, *rows), (y,) = operands, results
        return native.prepare(
            "delta_rule", qkv, qkv.stride(0), ba, ba.stride(0), a_log, dt_bias, state, *rows, y, y.stride(0),
            len(qkv), len(rows[0]), attrs["key_heads"], attrs["key_dim"], attrs["value_heads"], attrs["value_dim"],
            native.DTYPES[state.dtype], int(op is recurrent_delta_rule), EPS,
            long=len(qkv) > native.MANY_TOKENS,
        )  # fmt: skip

    return bind


# By itself the reference is as little dependent on what else is in the step: it takes token after token.
for _op in (recurrent_delta_rule, chunk_delta_rule):
    kernel(_op, "tokens", target="cpu", invariant=True, applies=_float32, bind=_bind_of(_op))(_op.reference)
