"""From launches to kernel nodes: what every call of a program runs on the GPU, in every bucket.

Calls that are alike but for the names of their operands form an op class. For each class and bucket the
registered implementations are asked for candidates; the kernels of all candidates are compiled and checked;
nodes refer to them by key.

Scratch is one region for all calls: first the counters, which stay zero between kernels, then the rest,
which any call may leave in any state. Both are as large as the greediest candidate needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from makeready.graphs.codec import canonical
from makeready.graphs.cuda.aot import Compiled, Kernel, kernel_of
from makeready.graphs.cuda.pool import compile_all
from makeready.graphs.memory import ALIGNMENT, align
from makeready.graphs.plan import (
    Binary,
    Buffer,
    Choice,
    Launch,
    LoweredProgram,
    Node,
    NodeArgument,
    OpClass,
    PlanError,
)
from makeready.graphs.spec import Bucket
from makeready.graphs.targets import Target
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import (
    Argument,
    Candidate,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
    Tensor,
)
from makeready.kernels.spec import TensorSpec

_GRID_LIMIT = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Emitted:
    """Programs with their op classes, and what the classes' nodes refer to.

    Attributes:
        scratch: bytes of the scratch region.
    """

    programs: Mapping[str, LoweredProgram]
    binaries: Mapping[str, Binary]
    cubins: Mapping[str, bytes]
    scratch: int


@dataclass(frozen=True)
class _Value:
    """What a kernel may know of an operand or result, its name aside."""

    name: str
    spec: TensorSpec
    row_stride: int | None
    alignment: int


@dataclass(frozen=True)
class _Class:
    """Calls that one set of nodes serves. ``attrs`` is canonical JSON, so that classes can be compared."""

    op: str
    values: tuple[_Value, ...]
    attrs: str

    def call(self, bucket: Bucket, context: int, target: Target) -> OpCall:
        """The call in ``bucket``, as implementations see it."""
        attrs = json.loads(self.attrs)
        sizes = bucket.sizes
        specs = {
            v.name: replace(v.spec, shape=tuple(sizes.get(d, d) if isinstance(d, str) else d for d in v.spec.shape))
            for v in self.values
        }  # fmt: skip
        inputs = {operand.name for operand in CONTRACTS[self.op].inputs}
        dims = CONTRACTS[self.op].dims({k: s for k, s in specs.items() if k in inputs}, attrs)
        tensors = {
            v.name: Tensor(
                specs[v.name].shape,
                v.spec.dtype,
                math.prod(int(d) for d in v.spec.shape[1:]) if v.row_stride is None else v.row_stride,
                v.alignment,
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
            shared_bytes=target.shared_bytes,
            features=target.features,
        )


@dataclass(frozen=True)
class _Way:
    """A candidate for a call, the kernels of its launches in order."""

    name: str
    call: OpCall
    candidate: Candidate
    kernels: tuple[Kernel, ...]


def emit(
    programs: Mapping[str, LoweredProgram],
    specs: Mapping[str, TensorSpec],
    buckets: Sequence[Bucket],
    target: Target,
    *,
    context: int,
    keep: int,
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Emitted:
    """Op classes of all programs, and the machine code that they launch.

    Args:
        programs: lowered for ``target``, without classes.
        specs: of every value that is no arena buffer.
        context: tokens of context a row that cost models assume.
        keep: at most so many candidates a class and bucket.
        cache: folder of compiled kernels.
        progress: told how many of how many kernels are compiled.

    Raises:
        PlanError: an op has no implementation for the target, or a kernel does not compile, spills, needs
            more shared memory than the target has, or is called dependent and never waits.
    """
    classes: dict[str, list[_Class]] = {}
    classified: dict[str, LoweredProgram] = {}
    for phase, program in programs.items():
        classified[phase], classes[phase] = _classify(program, specs)
    ways: dict[tuple[str, int, Bucket], list[_Way]] = {}
    lacking: dict[str, None] = {}
    for bucket in buckets:
        for index, one in enumerate(classes[bucket.phase]):
            found = _ways(one.call(bucket, context, target), target, keep)
            ways[bucket.phase, index, bucket] = found
            if not found:
                lacking[f"{one.op} in {bucket}: {_signature(one)}"] = None
    if lacking:
        ops = sorted({text.split(" ")[0] for text in lacking})
        raise PlanError(
            f"no {target.name} implementation for {', '.join(ops)}; for instance {next(iter(lacking))}"
        )
    everything = list(itertools.chain(*ways.values()))
    compiled = compile_all((k for way in everything for k in way.kernels), cache, progress)
    for way in everything:
        _check(way, compiled, target)
    keys = {kernel: _key(kernel, made) for kernel, made in compiled.items()}
    counters = align(max((way.candidate.zeroed for way in everything), default=0))
    rest = max((way.candidate.scratch - _rest_start(way.candidate) for way in everything), default=0)
    for phase, program in classified.items():
        made_classes = tuple(
            OpClass(
                one.op,
                {
                    str(bucket): tuple(_choice(w, compiled, keys, counters) for w in ways[phase, i, bucket])
                    for bucket in buckets
                    if bucket.phase == phase
                },
            )
            for i, one in enumerate(classes[phase])
        )
        classified[phase] = replace(program, classes=made_classes)
    return Emitted(
        programs=classified,
        binaries={keys[k]: _binary(made) for k, made in sorted(compiled.items(), key=lambda item: keys[item[0]])},
        cubins={keys[k]: made.cubin for k, made in compiled.items()},
        scratch=align(counters + rest),
    )  # fmt: skip


def _classify(
    program: LoweredProgram, specs: Mapping[str, TensorSpec]
) -> tuple[LoweredProgram, list[_Class]]:
    found: dict[_Class, int] = {}
    launches: list[Launch] = []
    for launch in program.launches:
        values = tuple(
            _value(name, value, program.buffers.get(value), specs)
            for name, value in (*launch.operands.items(), *launch.results.items())
        )
        one = _Class(launch.op, values, canonical(dict(launch.attrs)).decode())
        launches.append(replace(launch, op_class=found.setdefault(one, len(found))))
    return replace(program, launches=tuple(launches)), list(found)


def _value(name: str, value: str, buffer: Buffer | None, specs: Mapping[str, TensorSpec]) -> _Value:
    """Regions and everything in them but column views start at multiples of :data:`ALIGNMENT`."""
    if buffer is None:
        return _Value(name, specs[value], None, ALIGNMENT)
    return _Value(name, buffer.spec, buffer.row_stride, math.gcd(buffer.offset, ALIGNMENT))


def _signature(one: _Class) -> str:
    return ", ".join(f"{v.name} {v.spec}" for v in one.values)


def _ways(call: OpCall, target: Target, keep: int) -> list[_Way]:
    """The best ``keep`` candidates: each implementation's best first, then each one's second."""
    offered = [
        [(f"{kernel.name}/{candidate.name}", candidate) for candidate in kernel.candidates(call)]
        for kernel in registry.cuda_kernels(call.op)
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*offered))
    return [
        _Way(name, call, candidate, tuple(_kernel(launch, call, target) for launch in candidate.launches))
        for name, candidate in itertools.islice(filter(None, turns), keep)
    ]


def _kernel(launch: DeviceLaunch, call: OpCall, target: Target) -> Kernel:
    for blocks, limit in zip(launch.grid, _GRID_LIMIT, strict=True):
        if not 1 <= blocks <= limit:
            raise PlanError(f"{launch.function} for {call.op}: a grid of {launch.grid} blocks cannot be run")
    return kernel_of(launch, call, target.arch)


def _check(way: _Way, compiled: Mapping[Kernel, Compiled], target: Target) -> None:
    for launch, kernel in zip(way.candidate.launches, way.kernels, strict=True):
        made = compiled[kernel]
        where = f"{launch.function} of {way.call.op}/{way.name}"
        if made.spill_bytes > launch.local_bytes:
            raise PlanError(
                f"{where} spills: {made.spill_bytes} bytes of local memory a thread, "
                f"{launch.local_bytes} are allowed; use smaller tiles or more warps"
            )
        if made.shared > target.shared_bytes:
            raise PlanError(
                f"{where} needs {made.shared} bytes of shared memory, {target.name} has {target.shared_bytes} "
                "for a block; use smaller tiles or fewer stages"
            )
        if launch.dependent and not made.waits:
            raise PlanError(
                f"{where} is dependent and never waits for the kernels before it; call gdc_wait before the "
                "first access to what they touch"
            )


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
    )


def _choice(
    way: _Way, compiled: Mapping[Kernel, Compiled], keys: Mapping[Kernel, str], counters: int
) -> Choice:
    nodes = []
    for launch, kernel in zip(way.candidate.launches, way.kernels, strict=True):
        made = compiled[kernel]
        arguments = tuple(
            _argument(name, launch.arguments[name], way, made, counters) for name in made.arguments
        )
        nodes.append(Node(keys[kernel], launch.grid, arguments, launch.dependent))
    return Choice(way.name, tuple(nodes))


def _argument(name: str, argument: Argument, way: _Way, made: Compiled, counters: int) -> NodeArgument:
    if isinstance(argument, Scalar):
        return NodeArgument("scalar", value=argument.value, dtype=argument.dtype)
    if isinstance(argument, Scratch):
        return NodeArgument("scratch", offset=_moved(argument.offset, way, counters), dtype=argument.dtype)
    dtype = way.call.tensors[argument.operand].dtype
    if isinstance(argument, Pointer):
        return NodeArgument("pointer", operand=argument.operand, dtype=dtype)
    layout = made.maps[name]
    return NodeArgument(
        "descriptor",
        operand=argument.operand,
        dtype=dtype,
        shape=argument.shape,
        strides=argument.strides,
        block=layout.block,
        swizzle=layout.swizzle,
        element_type=layout.element_type,
    )


def _moved(offset: int, way: _Way, counters: int) -> int:
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
