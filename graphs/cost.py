"""What a call costs: bytes, floating-point operations, and the roofline bound on a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.ir import Call, Program
from makeready.graphs.spec import Bucket
from makeready.graphs.targets import Target
from makeready.kernels.contract import Contract, evaluate
from makeready.kernels.spec import DTYPE_BYTES, PAGES, TensorSpec


@dataclass(frozen=True)
class Cost:
    """Of one call or of many.

    Attributes:
        nbytes: moved between memory and the cores, each operand once.
        flops: floating-point operations.
        seconds: the larger of the two over the target's rates, plus what a launch costs.
    """

    nbytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops, self.seconds + other.seconds)


def op_cost(
    contract: Contract,
    operands: Mapping[str, TensorSpec],
    results: Iterable[TensorSpec],
    attrs: Mapping[str, Any],
    bucket: Bucket,
    context: int,
    target: Target,
) -> Cost:
    """Cost of one op in ``bucket`` where rows have ``context`` tokens of context."""
    sizes = {**bucket.sizes, PAGES: 0}
    dims = contract.dims(operands, attrs)
    # The contract's axis T may stand for the bucket's R: what the call binds it to decides.
    names = {"context": context} | {k: sizes[v] if isinstance(v, str) else v for k, v in dims.items()}
    nbytes = float(sum(spec.nbytes(sizes) for spec in results))
    for name, spec in operands.items():
        if name in contract.traffic:
            nbytes += evaluate(contract.traffic[name], names) * DTYPE_BYTES[spec.dtype]
        else:
            nbytes += spec.nbytes(sizes)
    flops = float(evaluate(contract.flops, names))
    # Products run at the rate of what they multiply, weights or queries; all else on the ordinary cores.
    factor = operands.get("weight", operands.get("q"))
    rate = target.flops.get(factor.dtype if factor else "float32", target.flops["float32"])
    bound = max(nbytes / target.bandwidth, flops / rate)
    return Cost(nbytes, flops, bound + target.launch_seconds)


def call_cost(program: Program, call: Call, bucket: Bucket, context: int, target: Target) -> Cost:
    """:func:`op_cost` of a call of ``program``."""
    results = [program.spec(value) for value in call.results.values()]
    return op_cost(call.contract, program.operand_specs(call), results, call.attrs, bucket, context, target)


def program_cost(program: Program, bucket: Bucket, context: int, target: Target) -> Cost:
    """Cost of one step in ``bucket``; column views cost nothing."""
    calls = [c for c in program.calls if c.op != "columns"]
    return sum((call_cost(program, c, bucket, context, target) for c in calls), Cost())


@dataclass(frozen=True)
class StepTime:
    """Step time of a phase's program as a function of the bucket, cheap enough to search with.

    A program repeats the same few calls in every layer, so calls are grouped by what they cost.
    """

    program: Program
    target: Target
    context: int

    def __call__(self, bucket: Bucket) -> float:
        seen: dict[tuple, float] = {}
        total = 0.0
        for call in self.program.calls:
            if call.op == "columns":
                continue
            key = (
                call.op,
                *(self.program.spec(v) for v in (*call.operands.values(), *call.results.values())),
            )
            if key not in seen:
                seen[key] = call_cost(self.program, call, bucket, self.context, self.target).seconds
            total += seen[key]
        return total
