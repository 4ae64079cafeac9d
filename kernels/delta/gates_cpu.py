"""What stands behind recurrence and attention on the CPU, a gated norm and a gate: compiled, or the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from makeready.kernels import native
from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import sigmoid_mul
from makeready.kernels.norm import gated_head_rms_norm
from makeready.kernels.registry import Operands, by_rows, kernel
from makeready.kernels.spec import TensorSpec

assert isinstance(gated_head_rms_norm, Contract)
assert isinstance(sigmoid_mul, Contract)


def _all_float32(specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> bool:
    return all(spec.dtype == "float32" for spec in specs.values())


def _bind_norm(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x, gate, weight), (y,) = operands, results
    return native.prepare(
        "gated_head_rms_norm", x, x.stride(0), gate, gate.stride(0), weight, y, y.stride(0), len(x),
        attrs["heads"], attrs["head_dim"], float(attrs["eps"]), long=len(x) > native.MANY_TOKENS,
    )  # fmt: skip


def _bind_gate(
    operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> Callable[[], None] | None:
    (x, gate), (y,) = operands, results
    return native.prepare(
        "sigmoid_mul", x, x.stride(0), gate, gate.stride(0), y, y.stride(0), *y.shape,
        long=len(x) > native.MANY_TOKENS,
    )  # fmt: skip


for _op, _bind in ((gated_head_rms_norm, _bind_norm), (sigmoid_mul, _bind_gate)):
    _given: dict[str, Any] = {"target": "cpu", "applies": _all_float32, "bind": _bind}
    kernel(_op, "fused", **_given)(_op.reference)
    kernel(_op, "rows", invariant=True, ordinary=False, **_given)(by_rows(_op, _op.reference))
