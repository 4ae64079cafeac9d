"""From launches to kernel nodes: what every call of a program runs on the GPU, in every bucket.

Calls that are alike but for the names of their operands form an op class. For each class and bucket the
registered implementations are asked for candidates, the best of which are compiled (ways.py); nodes refer to
their kernels by key.

Scratch is one region for all calls: first the counters, which stay zero between kernels, then the rest,
which any call may leave in any state. Both are as large as the greediest candidate needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from makeready.graphs.plan.codec import canonical
from makeready.graphs.plan.memory import ALIGNMENT, align
from makeready.graphs.plan.plan import (
    APART,
    Binary,
    Choice,
    Launch,
    LoweredProgram,
    Node,
    NodeArgument,
    OpClass,
    PlanError,
)
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.chains import without_idle
from makeready.graphs.planner.cuda.aot import Compiled, Kernel, MapLayout
from makeready.graphs.planner.cuda.edges import early_operands, joins
from makeready.graphs.planner.cuda.ways import Way, select
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
    Tensor,
)
from makeready.kernels.size import Dim
from makeready.kernels.spec import DTYPE_BYTES, ROWS, TOKENS, TensorSpec

_Key: TypeAlias = tuple[str, int, Bucket]  # phase, class, bucket

# What CUDA C++ states of a map, as numbers of CUtensorMapSwizzle (by bytes) and CUtensorMapDataType (by dtype).
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {128: 2, 256: 3}
_ELEMENTS = {"float8_e4m3fn": 0, "uint8": 0, "int32": 3, "float16": 6, "float32": 7, "bfloat16": 9}


@dataclass(frozen=True)
class Emitted:
    """Programs with their op classes, and what the classes' nodes refer to.

    Attributes:
        scratch: bytes of the scratch region.
        arena: bytes that the arena must have at least.
        dropped: a line for each way to run a call that the target's resources ruled out.
    """

    programs: Mapping[str, LoweredProgram]
    binaries: Mapping[str, Binary]
    cubins: Mapping[str, bytes]
    scratch: int
    arena: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Value:
    """What a kernel may know of an operand or result, its name aside."""

    name: str
    spec: TensorSpec
    row_stride: int | None
    alignment: int
    spare: bool = False


@dataclass(frozen=True)
class _Class:
    """Calls that one set of nodes serves. ``attrs`` is canonical JSON, so that classes can be compared."""

    op: str
    values: tuple[_Value, ...]
    attrs: str

    @property
    def alike(self) -> tuple[object, ...]:
        """What the class has in common with those of the same calls in other phases, where T may be R."""
        values = tuple(replace(v, spec=v.spec.renamed({TOKENS: ROWS})) for v in self.values)
        return self.op, values, self.attrs

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


def emit(
    programs: Mapping[str, LoweredProgram],
    specs: Mapping[str, Mapping[str, TensorSpec]],
    buckets: Sequence[Bucket],
    target: Target,
    *,
    context: int,
    keep: int,
    cache: Path,
    deterministic: bool = False,
    reports: Collection[str] = (),
    loads: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Emitted:
    """Op classes of all programs, and the machine code that they launch.

    Args:
        programs: lowered for ``target``, without classes.
        specs: of every value that is no arena buffer, by program.
        context: tokens of context a row that cost models assume.
        keep: at most so many candidates a class and bucket.
        cache: folder of compiled kernels.
        deterministic: every call runs the same kernels in all buckets and phases, of those that compute a row
            from that row alone.
        reports: results that only some kinds of step have; what makes them need not run in all.
        loads: which of ``programs`` make parameters: each has a place of the arena to itself, and none computes
            tokens.
        progress: told how many of how many kernels are compiled.

    Raises:
        PlanError: an op has no implementation for the target, or none that it has the resources for, or a kernel
            is called dependent and never waits; or there is none that serves all buckets.
    """
    classes: dict[str, list[_Class]] = {}
    classified: dict[str, LoweredProgram] = {}
    for phase, program in programs.items():
        classified[phase], classes[phase] = _classify(program, specs[phase], spare=phase not in loads)
    if deterministic:
        steps = {phase: program for phase, program in classified.items() if phase not in loads}
        _check_alike(steps, classes, reports)
    same = set(programs) - set(loads) if deterministic else set()
    calls, alike = _calls(classes, buckets, context, target, alike=same)
    chained = {
        (phase, chain.launch.op_class) for phase, program in classified.items() for chain in program.chains
    }
    ways, compiled, dropped = select(
        calls,
        target,
        keep=keep,
        cache=cache,
        progress=progress,
        alike=alike,
        optional={key for key in calls if key[:2] in chained},
    )
    lacking = {
        calls[key].op: key for key, found in reversed(ways.items()) if not found and key[:2] not in chained
    }
    if lacking:
        phase, index, bucket = lacking[min(lacking)]
        raise PlanError(
            f"no {'deterministic ' if deterministic else ''}{target.name} implementation for "
            f"{', '.join(sorted(lacking))}; for instance {min(lacking)} in "
            f"{bucket}: {_signature(classes[phase][index])}"
        )
    everything = list(itertools.chain(*ways.values()))
    names = {kernel: _key(kernel, made) for kernel, made in compiled.items()}
    counters = align(max((way.candidate.zeroed for way in everything), default=0))
    rest = max((way.candidate.scratch - _rest_start(way.candidate) for way in everything), default=0)
    for phase, program in classified.items():
        made_classes = tuple(
            OpClass(
                one.op,
                {
                    str(bucket): _choices(
                        ways[phase, i, bucket],
                        compiled,
                        names,
                        counters,
                        apart=keep > 1 and (phase, i) in chained,
                    )
                    for bucket in buckets
                    if bucket.phase == phase
                },
            )
            for i, one in enumerate(classes[phase])
        )
        early = {
            i: early_operands(way for key, found in ways.items() if key[:2] == (phase, i) for way in found)
            for i in range(len(made_classes))
        }
        made = replace(program, classes=made_classes, joins=joins(program, early))
        classified[phase] = without_idle(made)
    return Emitted(
        programs=classified,
        binaries={names[k]: _binary(made) for k, made in sorted(compiled.items(), key=lambda item: names[item[0]])},
        cubins={names[k]: made.cubin for k, made in compiled.items()},
        scratch=align(counters + rest),
        arena=max((_reach(program) for phase, program in classified.items() if phase not in loads), default=0),
        dropped=dropped,
    )  # fmt: skip


def _calls(
    classes: Mapping[str, Sequence[_Class]],
    buckets: Sequence[Bucket],
    context: int,
    target: Target,
    *,
    alike: Collection[str],
) -> tuple[dict[_Key, OpCall], dict[_Key, tuple[object, ...]]]:
    """The call of every class in every bucket; and of those in phases that must run ``alike``, which those are."""
    keys = [(b.phase, index, b) for b in buckets for index in range(len(classes[b.phase]))]
    same = {key: classes[key[0]][key[1]].alike for key in keys if key[0] in alike}
    most = max(bucket.rows for bucket in buckets)
    calls = {
        key: classes[key[0]][key[1]].call(key[2], context, target, most_rows=most if key in same else 0)
        for key in keys
    }
    return calls, same


def _check_alike(
    programs: Mapping[str, LoweredProgram], classes: Mapping[str, Sequence[_Class]], reports: Collection[str]
) -> None:
    """Check that a token's results come from the same classes of calls in all phases, in the same order.

    Raises:
        PlanError: the buffers of one phase are laid out so that its kernels may be others.
    """
    made = {
        phase: [
            (classes[phase][launch.op_class].alike, launch)
            for launch in program.launches
            if CONTRACTS[launch.op].selects_rows is None and not set(reports) & set(launch.results.values())
        ]
        for phase, program in programs.items()
    }
    first, *others = made
    for phase in others:
        for (one, launch), (other, _) in zip(made[first], made[phase], strict=True):
            if one != other:
                raise PlanError(
                    f"{launch.op} is laid out differently in {first} and {phase} steps, "
                    "so their kernels may differ; compile without plan.deterministic"
                )


def _reach(program: LoweredProgram) -> int:
    """Bytes of the arena that tensor maps reach to: they may go beyond the last row of an operand."""
    ends = [0]
    for launch in (*program.launches, *(chain.launch for chain in program.chains)):
        names = {**launch.operands, **launch.results}
        for choices in program.classes[launch.op_class].candidates.values():
            for argument in (a for choice in choices for node in choice.nodes for a in node.arguments):
                buffer = program.buffers.get(names.get(argument.operand, ""))
                if argument.kind in ("descriptor", "map") and buffer is not None:
                    last = sum(
                        (int(n) - 1) * s for n, s in zip(argument.shape, argument.strides, strict=True)
                    )
                    ends.append(buffer.offset + (last + 1) * DTYPE_BYTES[argument.dtype])
    return align(max(ends))


def _classify(
    program: LoweredProgram, specs: Mapping[str, TensorSpec], *, spare: bool
) -> tuple[LoweredProgram, list[_Class]]:
    found: dict[_Class, int] = {}
    launches: list[Launch] = []
    for launch in (*program.launches, *(chain.launch for chain in program.chains)):
        values = tuple(
            _value(name, value, program, specs, spare=spare)
            for name, value in (*launch.operands.items(), *launch.results.items())
        )
        one = _Class(launch.op, values, canonical(dict(launch.attrs)).decode())
        launches.append(replace(launch, op_class=found.setdefault(one, len(found))))
    count = len(program.launches)
    chains = (replace(c, launch=launch) for c, launch in zip(program.chains, launches[count:], strict=True))
    return replace(program, launches=tuple(launches[:count]), chains=tuple(chains)), list(found)


def _value(
    name: str, value: str, program: LoweredProgram, specs: Mapping[str, TensorSpec], *, spare: bool
) -> _Value:
    """Regions and everything in them start at multiples of :data:`ALIGNMENT`, but for column views and what a
    program says otherwise.

    Args:
        spare: whether memory behind the arena's buffers may be touched; behind a place of a load program lies the
            next thread's.
    """
    buffer = program.buffers.get(value)
    if buffer is None:
        return _Value(name, specs[value], None, program.alignments.get(value, ALIGNMENT))
    return _Value(name, buffer.spec, buffer.row_stride, math.gcd(buffer.offset, ALIGNMENT), spare)


def _signature(one: _Class) -> str:
    return ", ".join(f"{v.name} {v.spec}" for v in one.values)


def _key(kernel: Kernel, made: Compiled) -> str:
    """Name of a binary: the function's, and a digest of the machine code and of how it is launched."""
    total = hashlib.sha256(made.cubin)
    total.update(f"{made.function} {made.warps} {made.shared}".encode())
    return f"{kernel.name}-{total.hexdigest()[:16]}"


def _binary(made: Compiled) -> Binary:
    return Binary(
        function=made.function,
        sha256=hashlib.sha256(made.cubin).hexdigest(),
        warps=made.warps,
        shared=made.shared,
        registers=made.registers,
        spill_bytes=made.spill_bytes,
        dependent=made.waits,
        nbytes=len(made.cubin),
        null_pointers=made.null_pointers,
        cluster=made.cluster,
    )


def _choices(
    ways: Sequence[Way],
    compiled: Mapping[Kernel, Compiled],
    keys: Mapping[Kernel, str],
    counters: int,
    *,
    apart: bool,
) -> tuple[Choice, ...]:
    """The choices that a plan has of ``ways``; of a chain, if there are any, its launches ``apart`` come behind those
    that were timed.
    """
    made = [_choice(way, compiled, keys, counters) for way in ways]
    if made and apart:
        made.insert(sum(not way.untimed for way in ways), Choice(APART, ()))
    return tuple(made)


def _choice(
    way: Way, compiled: Mapping[Kernel, Compiled], keys: Mapping[Kernel, str], counters: int
) -> Choice:
    nodes = []
    for launch, kernel in zip(way.candidate.launches, way.kernels, strict=True):
        made = compiled[kernel]
        arguments = tuple(
            _argument(name, launch.arguments[name], way, made, counters) for name in made.arguments
        )
        nodes.append(Node(keys[kernel], launch.grid, arguments, launch.dependent))
    return Choice(way.name, tuple(nodes))


def _argument(name: str, argument: Argument, way: Way, made: Compiled, counters: int) -> NodeArgument:
    if isinstance(argument, Scalar):
        return NodeArgument("scalar", value=argument.value, dtype=argument.dtype)
    if isinstance(argument, Scratch):
        return NodeArgument("scratch", offset=_moved(argument.offset, way, counters), dtype=argument.dtype)
    dtype = way.call.tensors[argument.operand].dtype
    if isinstance(argument, Pointer):
        return NodeArgument("pointer", operand=argument.operand, dtype=dtype)
    kind, layout = "descriptor", made.maps.get(name)
    if layout is None:
        kind, layout = "map", stated_layout(argument, dtype)
    return NodeArgument(
        kind,
        operand=argument.operand,
        dtype=dtype,
        shape=tuple(d if isinstance(d, int) else str(d) for d in argument.shape),
        strides=argument.strides,
        block=layout.block,
        swizzle=layout.swizzle,
        element_type=layout.element_type,
        promotion=layout.promotion,
    )


def stated_layout(argument: Descriptor, dtype: str) -> MapLayout:
    """The layout of a map of CUDA C++, which its launch states.

    Raises:
        PlanError: the driver takes no such map.
    """
    inner = argument.block[-1] * DTYPE_BYTES[dtype]
    if argument.swizzle not in _SWIZZLES:
        raise PlanError(f"the map over {argument.operand} has no swizzle of {argument.swizzle} bytes")
    if (argument.swizzle and inner > argument.swizzle) or inner % 16 or max(argument.block) > 256:
        raise PlanError(
            f"the map over {argument.operand} cannot have a box of {argument.block} with rows of {inner} bytes: rows "
            "are multiples of 16 bytes, no longer than the swizzle, and no side is more than 256"
        )
    if any(s * DTYPE_BYTES[dtype] % 16 for s in argument.strides[:-1]) or argument.strides[-1] != 1:
        raise PlanError(f"the map over {argument.operand} has strides that are no multiples of 16 bytes")
    if argument.promotion not in _PROMOTIONS:
        raise PlanError(
            f"the map over {argument.operand} cannot bring {argument.promotion} bytes to L2 at once, but 128 or 256"
        )
    promotion = _PROMOTIONS[argument.promotion]
    return MapLayout(argument.block, _SWIZZLES[argument.swizzle], _ELEMENTS[dtype], promotion)


def _moved(offset: int, way: Way, counters: int) -> int:
    """Where the region has what a candidate calls ``offset``: its counters first, the rest behind everybody's.

    The rest moves by a multiple of :data:`ALIGNMENT`, so that alignment is what the candidate thinks it is.
    """
    if offset >= max(way.candidate.scratch, way.candidate.zeroed):
        raise PlanError(
            f"{way.call.op}/{way.name} uses scratch at {offset} beyond its {way.candidate.scratch} bytes"
        )
    if offset < way.candidate.zeroed:
        return offset
    return counters + offset - _rest_start(way.candidate)


def _rest_start(candidate: Candidate) -> int:
    return candidate.zeroed // ALIGNMENT * ALIGNMENT
