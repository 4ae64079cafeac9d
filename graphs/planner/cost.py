"""What a call costs: bytes, floating-point operations, and the roofline bound on a target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.contract import Contract
from makeready.kernels.signature import evaluate
from makeready.kernels.size import Size, value
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


def op_work(
    contract: Contract,
    operands: Mapping[str, TensorSpec],
    results: Iterable[TensorSpec],
    attrs: Mapping[str, Any],
    sizes: Mapping[str, Any],
    context: int,
) -> tuple[Any, Any]:
    """Bytes that one op moves, each operand once, and its floating-point operations.

    Args:
        sizes: length of every axis of the step, numbers or arrays of them.
        context: tokens of context a row.
    """
    sizes = {**sizes, PAGES: 0}
    dims = contract.dims(operands, attrs)
    # The contract's axis T may stand for the bucket's R: what the call binds it to decides.
    names = {"context": context} | {
        k: value(v, sizes) if isinstance(v, str | Size) else v for k, v in dims.items()
    }
    nbytes = sum(spec.nbytes(sizes) for spec in results)
    for name, spec in operands.items():
        if name in contract.traffic:
            nbytes = nbytes + evaluate(contract.traffic[name], names) * DTYPE_BYTES[spec.dtype]
        else:
            nbytes = nbytes + spec.nbytes(sizes)
    return nbytes, evaluate(contract.flops, names)


def op_rate(contract: Contract, operands: Mapping[str, TensorSpec], target: Target) -> float:
    """Operations a second of one op: of products the rate of the dtype that the contract names, of all else
    that of the ordinary cores, which is fp32's.

    Raises:
        PlanError: the target's rate is not known.
    """
    return target.rate(operands[contract.rate].dtype if contract.rate is not None else "float32")


def op_cost(
    contract: Contract,
    operands: Mapping[str, TensorSpec],
    results: Iterable[TensorSpec],
    attrs: Mapping[str, Any],
    bucket: Bucket,
    context: int,
    target: Target,
) -> Cost:
    """Cost of one op in ``bucket`` where rows have ``context`` tokens of context.

    Raises:
        PlanError: the op multiplies a dtype whose rate on the target is not known.
    """
    nbytes, flops = map(float, op_work(contract, operands, results, attrs, bucket.sizes, context))
    bound = max(nbytes / target.bandwidth, flops / op_rate(contract, operands, target))
    return Cost(nbytes, flops, bound + target.launch_seconds)


def call_cost(program: Program, call: Call, bucket: Bucket, context: int, target: Target) -> Cost:
    """:func:`op_cost` of a call of ``program``."""
    results = [program.spec(value) for value in call.results.values()]
    return op_cost(call.contract, program.operand_specs(call), results, call.attrs, bucket, context, target)


def program_cost(program: Program, bucket: Bucket, context: int, target: Target) -> Cost:
    """Cost of one step in ``bucket``; views cost nothing."""
    calls = [c for c in program.calls if c.contract.view is None]
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
        kinds, order = self._kinds
        seconds = [call_cost(self.program, c, bucket, self.context, self.target).seconds for c in kinds]
        return sum(seconds[kind] for kind in order)

    @cached_property
    def _kinds(self) -> tuple[list[Call], list[int]]:
        """Calls that differ in what they cost, and which of them each call of the program is like."""
        kinds: dict[tuple[Any, ...], int] = {}
        examples: list[Call] = []
        order: list[int] = []
        for call in self.program.calls:
            if call.contract.view is not None:
                continue
            specs = (self.program.spec(v) for v in (*call.operands.values(), *call.results.values()))
            key = (call.op, *call.operands, *specs, repr(sorted(call.attrs.items())))
            if key not in kinds:
                kinds[key] = len(examples)
                examples.append(call)
            order.append(kinds[key])
        return examples, order
