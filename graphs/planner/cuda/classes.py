"""Calls that are alike but for the names of their operands: one class of them, one set of kernel nodes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from makeready.graphs.plan.codec import canonical
from makeready.graphs.plan.memory import ALIGNMENT
from makeready.graphs.plan.program import Launch, LoweredProgram
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Tensor
from makeready.kernels.size import Dim
from makeready.kernels.spec import ROWS, TOKENS, TensorSpec

INTEGERS = ("int32", "int64")


@dataclass(frozen=True)
class _Value:
    """What a kernel may know of an operand or result, its name aside."""

    name: str
    spec: TensorSpec
    row_stride: int | None
    alignment: int
    spare: bool = False


@dataclass(frozen=True)
class CallClass:
    """Calls that one set of nodes serves. ``attrs`` is canonical JSON, so that classes can be compared."""

    op: str
    values: tuple[_Value, ...]
    attrs: str

    @property
    def alike(self) -> tuple[object, ...]:
        """What the class has in common with those of the same calls in other phases, where T may be R.

        Integers may be staged in one phase and made by a launch in another; no tensor map reaches behind them.
        """
        values = tuple(
            replace(v, spec=v.spec.renamed({TOKENS: ROWS}), spare=v.spare and v.spec.dtype not in INTEGERS)
            for v in self.values
        )
        return self.op, values, self.attrs

    @property
    def says_what_runs(self) -> bool:
        """Whether it makes integers of integers alone: such ops are exact, whatever a step is."""
        return all(v.spec.dtype in INTEGERS for v in self.values)

    def call(self, bucket: Bucket, context: int, target: Target, *, most_rows: int = 0) -> OpCall:
        """The call in ``bucket``, as implementations see it.

        Args:
            most_rows: of the plan's buckets, where it is deterministic; 0 where it is not.
        """
        attrs = json.loads(self.attrs)
        specs = {v.name: v.spec.under(bucket.sizes) for v in self.values}
        inputs = {operand.name for operand in CONTRACTS[self.op].inputs}
        dims = CONTRACTS[self.op].dims({k: s for k, s in specs.items() if k in inputs}, attrs)
        tensors = {
            v.name: Tensor(
                specs[v.name].shape,
                v.spec.dtype,
                math.prod(_length(d) for d in specs[v.name].shape[1:])
                if v.row_stride is None
                else v.row_stride,
                v.alignment,
                v.spare,
            )
            for v in self.values
        }
        return OpCall(
            op=self.op,
            tensors=tensors,
            attrs=attrs,
            dims=dims,
            rows=bucket.rows,
            tokens=bucket.tokens,
            context=context,
            multiprocessors=target.multiprocessors,
            bandwidth=target.bandwidth,
            flops=target.flops,
            shared_bytes=target.shared_bytes,
            features=target.features,
            invariant=most_rows > 0,
            most_rows=max(most_rows, bucket.rows),
        )


def _length(dim: Dim) -> int:
    """Behind the first axis nothing depends on pages."""
    assert isinstance(dim, int), dim
    return dim


def classify(
    program: LoweredProgram, specs: Mapping[str, TensorSpec], *, spare: bool
) -> tuple[LoweredProgram, list[CallClass]]:
    """The program with launches and chains that say their class, and the classes.

    Args:
        specs: of every value that is no arena buffer.
        spare: whether memory behind the arena's buffers may be touched; behind a place of a load program lies the
            next thread's.
    """
    found: dict[CallClass, int] = {}
    launches: list[Launch] = []
    for launch in (*program.launches, *(chain.launch for chain in program.chains)):
        values = tuple(
            _value(name, value, program, specs, spare=spare)
            for name, value in (*launch.operands.items(), *launch.results.items())
        )
        one = CallClass(launch.op, values, canonical(dict(launch.attrs)).decode())
        launches.append(replace(launch, op_class=found.setdefault(one, len(found))))
    count = len(program.launches)
    chains = (replace(c, launch=launch) for c, launch in zip(program.chains, launches[count:], strict=True))
    return replace(program, launches=tuple(launches[:count]), chains=tuple(chains)), list(found)


def _value(
    name: str, value: str, program: LoweredProgram, specs: Mapping[str, TensorSpec], *, spare: bool
) -> _Value:
    """Regions and everything in them start at multiples of :data:`ALIGNMENT`, but for column views and what a
    program says otherwise.
    """
    buffer = program.buffers.get(value)
    if buffer is None:
        return _Value(name, specs[value], None, program.alignments.get(value, ALIGNMENT))
    return _Value(name, buffer.spec, buffer.row_stride, math.gcd(buffer.offset, ALIGNMENT), spare)


def signature(one: CallClass) -> str:
    """Operands and results with their specs, for errors."""
    return ", ".join(f"{v.name} {v.spec}" for v in one.values)
