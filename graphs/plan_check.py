"""Whether a plan's parts fit together: what is checked of a plan that comes from elsewhere, before anything uses it.

A digest says that a plan is whole, not that it is sane: whoever makes a plan signs it as well. So every place,
size and name that the runtime goes by is held against the others here. What kernels do with the memory they are
given cannot be checked: a plan for a GPU holds machine code (docs/plans.md).

Imports neither torch nor triton. The CPU executable, which has the op contracts, checks launches by them, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from makeready.graphs import memory
from makeready.graphs.buckets import prove_coverage
from makeready.graphs.checkpoint.base import CheckpointError
from makeready.graphs.checkpoint.config import normalise_config
from makeready.graphs.constants import GENERATORS
from makeready.graphs.plan import LOAD, Buffer, LoweredProgram, NodeArgument, Plan, PlanError, Weight
from makeready.graphs.recipe import Param
from makeready.graphs.spec import Field, result_fields, slot_fields, step_fields
from makeready.graphs.targets import TARGETS
from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, TensorSpec

MOST = 2**31 - 1  # of anything that a kernel counts in int32
MOST_BUCKETS = 10_000  # a plan has some dozens
MOST_ROTARY = 2**16  # columns of a generated table, far above any head
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")  # of a binary, which is a file's name
SCALARS = {"int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63), "float32": (-math.inf, math.inf)}


class _WrongError(Exception):
    """What is wrong, as a clause that begins with the place."""


def check_plan(plan: Plan) -> Plan:
    """Return ``plan`` if its parts fit together.

    Raises:
        PlanError: naming the first part that does not.
    """
    try:
        for check in (_limits, _cache, _buckets, _memory, _weights, _programs, _loading, _config):
            check(plan)
    except (_WrongError, PlanError) as error:
        raise PlanError(
            f"the plan for target {plan.target} contradicts itself: {error}; compile it again"
        ) from None
    return plan


def _need(holds: bool, complaint: str) -> None:
    if not holds:
        raise _WrongError(complaint)


def _limits(plan: Plan) -> None:
    limits = plan.limits
    _need(plan.target in TARGETS, f"target {plan.target!r} is none")
    for name in ("max_rows", "max_tokens", "context_len", "page_size"):
        value = getattr(limits, name)
        _need(1 <= value <= MOST, f"limits.{name} is {value}")
    for name in ("max_stop_ids", "max_logit_bias", "max_top_logprobs", "max_logprob_tokens"):
        value = getattr(limits, name)
        _need(0 <= value <= MOST, f"limits.{name} is {value}")
    _need(limits.slots * limits.context_len <= 2**62, f"limits.context_len is {limits.context_len}")


def _cache(plan: Plan) -> None:
    kv = plan.kv
    _need(
        kv.page_size == plan.limits.page_size,
        f"kv.page_size is {kv.page_size}, limits.page_size {plan.limits.page_size}",
    )
    _need(bool(kv.parts), "kv.parts has none")
    for part in kv.parts:
        _need(part.dtype in DTYPE_BYTES, f"KV part {part.name} has the dtype {part.dtype!r}")
        _need(
            len(part.page_shape) > 1 and all(1 <= n <= MOST for n in part.page_shape),
            f"a page of KV part {part.name} has the shape {list(part.page_shape)}",
        )
        _need(
            part.page_shape[0] == kv.page_size,
            f"a page of KV part {part.name} holds {part.page_shape[0]} tokens, kv.page_size is {kv.page_size}",
        )
    fields = [f.name for fields in _all_fields(plan).values() for f in fields]
    names = [*dict.fromkeys(fields), *(part.name for part in kv.parts), *(w.param.name for w in plan.weights)]
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    _need(twice is None, f"{twice} names two values")


def _buckets(plan: Plan) -> None:
    _need(len(plan.buckets) <= MOST_BUCKETS, f"there are {len(plan.buckets)} buckets")
    for bucket in plan.buckets:
        _need(bucket.phase in plan.limits.phases, f"bucket {bucket} is of no phase of the plan")
        _need(bucket.rows >= 1 and bucket.tokens >= 1, f"bucket {bucket} is empty")
    prove_coverage(plan.buckets, plan.limits)


def _memory(plan: Plan) -> None:
    """The host's regions have the bytes that their fields take; the others are held against what lies in them."""
    sizes = {phase: _largest(plan, phase) for phase in plan.limits.phases}
    said = {
        name: getattr(plan.memory, name) for name in ("weights", "arena", "step", "slot", "result", "scratch")
    }
    for name, nbytes in said.items():
        _need(0 <= nbytes < 2**62, f"memory.{name} is {nbytes}")
    needed = {
        name: max(
            memory.layout(fields, sizes[phase])[1]
            for (of, phase), fields in _all_fields(plan).items()
            if of == name
        )
        for name in ("step", "slot", "result")
    }
    for name, nbytes in needed.items():
        _need(said[name] == nbytes, f"memory.{name} is {said[name]}, its fields take {nbytes}")


def _all_fields(plan: Plan) -> dict[tuple[str, str], tuple[Field, ...]]:
    made: dict[tuple[str, str], tuple[Field, ...]] = {}
    for phase in plan.limits.phases:
        made["step", phase] = step_fields(plan.limits, phase)
        made["result", phase] = result_fields(plan.limits, phase)
        made["slot", phase] = slot_fields(plan.limits)
    return made


def _largest(plan: Plan, phase: str) -> dict[str, int]:
    return {ROWS: plan.limits.max_rows, TOKENS: plan.limits.most_tokens(phase)}


def _weights(plan: Plan) -> None:
    for weight in plan.weights:
        name, spec = weight.param.name, weight.param.spec
        _need(all(type(n) is int for n in spec.shape), f"weight {name} has the shape {spec}")
        _need(
            weight.nbytes == spec.nbytes({}) and _inside(weight.offset, weight.nbytes, plan.memory.weights),
            f"weight {name}, {spec}, takes bytes {weight.offset} to {weight.offset + weight.nbytes} "
            f"of {plan.memory.weights}",
        )
        _need(weight.offset % memory.ALIGNMENT == 0, f"weight {name} begins at byte {weight.offset}")
        _recipe(weight)


def _recipe(weight: Weight) -> None:
    param = weight.param
    _need(bool(param.pieces) != (param.generated is not None), f"weight {param.name} has no recipe, or two")
    if param.generated is not None:
        _generated(param)
        return
    shape = param.assembled.shape
    _need(
        bool(shape) and all(type(n) is int for n in shape),
        f"weight {param.name} is assembled as {param.assembled}",
    )
    if param.largest:
        _need(param.derived is None, f"weight {param.name} is a largest number and derived")
        return
    ends = 0
    for piece in sorted(param.pieces, key=lambda piece: piece.at):
        _need(
            0 <= piece.start < piece.stop and piece.at == ends,
            f"rows {piece.start} to {piece.stop} of {piece.source} go to row {piece.at} of weight {param.name}",
        )
        ends += piece.stop - piece.start
    _need(ends == shape[0], f"the pieces of weight {param.name} have {ends} rows, not {shape[0]}")


def _generated(param: Param) -> None:
    """Tables are made of a size that the recipe's arguments say; a first row shows whether it can be made."""
    assert param.generated is not None
    made, said = GENERATORS.get(param.generated.function), dict(param.generated.arguments)
    _need(
        made is not None, f"weight {param.name} is made by {param.generated.function!r}, which is no function"
    )
    assert made is not None
    shape, dtype = param.spec.shape, param.spec.dtype
    _need(
        [said.get("context_len"), said.get("rotary_dim")] == list(shape)
        and 0 < int(shape[-1]) <= MOST_ROTARY,
        f"weight {param.name}, {param.spec}, is made as {said.get('context_len')} x {said.get('rotary_dim')}",
    )
    try:
        row = made(**(said | {"context_len": 1}))
    except Exception as error:  # whatever arguments of any type lead to
        raise _WrongError(f"weight {param.name} cannot be made ({type(error).__name__}: {error})") from None
    _need(row.shape == (1, shape[1]) and dtype == "float32", f"weight {param.name} is made as {row.shape}")


def _programs(plan: Plan) -> None:
    _need(
        set(plan.programs) == set(plan.limits.phases),
        f"programs are for {', '.join(plan.programs)}, the limits want {', '.join(plan.limits.phases)}",
    )
    for phase, program in plan.programs.items():
        _need(program.phase == phase, f"program {phase} says that it is for {program.phase!r}")
        sizes = _largest(plan, phase)
        names = _values(plan, phase)
        for name, buffer in program.buffers.items():
            where = f"{phase}: buffer {name}"
            _need(name not in names, f"{where} has the name of another value")
            _buffer(where, buffer, sizes, plan.memory.arena)
        results = {f.name for f in _all_fields(plan)["result", phase]} | program.buffers.keys()
        for launch in program.launches:
            for name in launch.operands.values():
                _need(
                    name in names or name in program.buffers,
                    f"{phase}: {launch.op} reads {name!r}, which is nothing",
                )
            for name in launch.results.values():
                _need(name in results, f"{phase}: {launch.op} gives {name!r}, which no launch may write")
        if TARGETS[plan.target].is_cuda:
            _nodes(plan, program, [str(b) for b in plan.buckets if b.phase == phase], phase)


def _values(plan: Plan, phase: str) -> set[str]:
    fields = _all_fields(plan)
    made = {f.name for of in ("step", "result", "slot") for f in fields[of, phase]}
    return made | {part.name for part in plan.kv.parts} | {weight.param.name for weight in plan.weights}


def _buffer(where: str, buffer: Buffer, sizes: Mapping[str, int], arena: int) -> None:
    spec = buffer.spec
    _need(PAGES not in spec.shape, f"{where} has a size that only the cache has")
    shape, width = spec.at(sizes), DTYPE_BYTES[spec.dtype]
    if buffer.row_stride is None:
        nbytes = spec.nbytes(sizes)
    else:
        _need(
            len(shape) == 2 and 0 < int(shape[1]) <= buffer.row_stride,
            f"{where}, {spec}, has rows {buffer.row_stride} elements apart",
        )
        nbytes = ((shape[0] - 1) * buffer.row_stride + shape[1]) * width
    _need(
        _inside(buffer.offset, nbytes, arena) and buffer.offset % width == 0,
        f"{where}, {spec}, takes bytes {buffer.offset} to {buffer.offset + nbytes} of {arena}",
    )


def _nodes(plan: Plan, program: LoweredProgram, buckets: Sequence[str], phase: str) -> None:
    """Every kernel node names a binary, a grid that there can be, and arguments that its launches have."""
    operands: dict[int, set[str]] = {}
    for launch in program.launches:
        _need(
            0 <= launch.op_class < len(program.classes),
            f"{phase}: {launch.op} has no class {launch.op_class}",
        )
        given = {*launch.operands, *launch.results}
        operands[launch.op_class] = operands.get(launch.op_class, given) & given
    specs = {}
    for launch in program.launches:
        for name, value in (*launch.operands.items(), *launch.results.items()):
            specs.setdefault((launch.op_class, name), _extent(plan, program, value))
    for index, op_class in enumerate(program.classes):
        for bucket, choices in op_class.candidates.items():
            _need(bucket in buckets, f"{phase}: {op_class.op} has kernels for {bucket}, which is no bucket")
            for choice in choices:
                for node in choice.nodes:
                    where = f"{phase}: {choice.name} of {op_class.op}"
                    _need(
                        node.binary in plan.binaries,
                        f"{where} names the binary {node.binary!r}, which is none",
                    )
                    _need(all(1 <= n <= MOST for n in node.grid), f"{where} has the grid {list(node.grid)}")
                    for argument in node.arguments:
                        _argument(where, argument, operands.get(index, set()), plan.memory.scratch)
                        if argument.kind == "descriptor":
                            _map(where, argument, specs.get((index, argument.operand)))


def _extent(plan: Plan, program: LoweredProgram, value: str) -> tuple[TensorSpec, int] | None:
    """A value's spec and the bytes from its first to its last element, for values whose size is fixed."""
    buffer = program.buffers.get(value)
    if buffer is not None:
        return None
    spec = plan.specs[value]
    return (spec, spec.nbytes({PAGES: 1})) if not {ROWS, TOKENS} & set(spec.shape) else None


def _argument(where: str, argument: NodeArgument, operands: set[str], scratch: int) -> None:
    kind = argument.kind
    if kind in ("pointer", "descriptor"):
        _need(argument.operand in operands, f"{where} has no operand {argument.operand!r}")
    elif kind == "scratch":
        _need(0 <= argument.offset < scratch, f"{where} takes byte {argument.offset} of {scratch} of scratch")
    elif kind == "scalar":
        low, high = SCALARS.get(argument.dtype, (0, 0))
        _need(low <= argument.value < high, f"{where} has {argument.value!r} as {argument.dtype!r}")
    else:
        _need(False, f"{where} has an argument of the kind {kind!r}")


def _map(where: str, argument: NodeArgument, operand: tuple[TensorSpec, int] | None) -> None:
    """A tensor map stays in what it is over; maps over activations have a size by bucket, which kernels mask."""
    rank = len(argument.shape)
    sizes = [1 if n == PAGES else n for n in argument.shape]
    _need(
        1 <= rank <= 5
        and len(argument.strides) == rank
        and len(argument.block) == rank
        and argument.dtype in DTYPE_BYTES
        and all(isinstance(n, int) and 1 <= n <= MOST for n in sizes)
        and all(0 <= n < 2**40 for n in argument.strides)
        and all(1 <= n <= 256 for n in argument.block),
        f"{where} has a tensor map of the shape {list(argument.shape)}, strides {list(argument.strides)} "
        f"and block {list(argument.block)}",
    )
    if operand is not None:
        ends = sum((int(n) - 1) * stride for n, stride in zip(sizes, argument.strides, strict=True)) + 1
        spec, nbytes = operand
        _need(
            ends * DTYPE_BYTES[argument.dtype] <= nbytes,
            f"{where} has a tensor map that goes beyond {argument.operand}, {spec}",
        )


def _loading(plan: Plan) -> None:
    for key, binary in plan.binaries.items():
        _need(KEY.fullmatch(key) is not None, f"binary {key!r} is no name of a file in kernels/")
        _need(
            1 <= binary.warps <= 32 and 0 <= binary.shared < 2**20,
            f"binary {key} has {binary.warps} warps and {binary.shared} bytes of shared memory",
        )
    loading = plan.loading
    if loading is None:
        return
    program = loading.program
    _need(
        1 <= loading.slots <= MOST and _inside(0, loading.slots * loading.slot_bytes, plan.memory.arena),
        f"{loading.slots} slots of {loading.slot_bytes} bytes do not fit an arena of {plan.memory.arena}",
    )
    for name, buffer in program.buffers.items():
        _need(all(type(n) is int for n in buffer.spec.shape), f"load: buffer {name} is {buffer.spec}")
    for launch in program.launches:
        _need(set(launch.operands) == {"x"}, f"load: {launch.op} has other operands than x")
        for name in (*launch.operands.values(), *launch.results.values()):
            _need(name in program.buffers, f"load: {launch.op} names {name!r}, which is nothing")
        _need(
            program.buffers[launch.operands["x"]].spec.nbytes({}) <= loading.slot_bytes,
            f"load: a chunk of {launch.op} is longer than the {loading.slot_bytes} bytes of a slot",
        )
    offsets = {weight.offset: weight for weight in plan.weights}
    for conversion in loading.conversions:
        _conversion(conversion.launches, conversion.results, program, offsets)
    _nodes_of_loading(plan, program)


def _conversion(
    launches: Sequence[int],
    results: Mapping[str, int],
    program: LoweredProgram,
    offsets: Mapping[int, Weight],
) -> None:
    """Chunk after chunk the results stay in the parameters that they begin."""
    ends = dict(results)
    for number in launches:
        _need(0 <= number < len(program.launches), f"load: a conversion has launch {number}, which is none")
        made = program.launches[number].results
        _need(
            set(made) == set(results), f"load: a conversion gives {', '.join(made)}, not {', '.join(results)}"
        )
        for name in ends:
            ends[name] += program.buffers[made[name]].spec.nbytes({})
    for name, offset in results.items():
        weight = offsets.get(offset)
        _need(
            weight is not None and ends[name] == offset + weight.nbytes,
            f"load: a conversion writes bytes {offset} to {ends[name]}, which are no parameter",
        )


def _nodes_of_loading(plan: Plan, program: LoweredProgram) -> None:
    if program.classes:
        _nodes(plan, program, [str(LOAD)], LOAD.phase)
        for op_class in program.classes:
            _need(bool(op_class.candidates.get(str(LOAD))), f"load: {op_class.op} has no kernel")


def _config(plan: Plan) -> None:
    """The engine reads the vocabulary and end tokens of the config that the plan carries."""
    try:
        normalise_config(dict(plan.config), source="the plan's config.json")
    except CheckpointError as error:
        raise _WrongError(str(error)) from None


def _inside(offset: int, nbytes: int, region: int) -> bool:
    return min(offset, nbytes) >= 0 and offset + nbytes <= region
