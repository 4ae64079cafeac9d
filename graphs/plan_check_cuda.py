"""Whether what a plan says of kernels on a GPU fits the rest of it: binaries, nodes, tensor maps, loading.

What the machine code itself does cannot be checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from makeready.graphs.plan import LOAD, LoweredProgram, NodeArgument, Plan, Weight
from makeready.graphs.plan_rules import MOST, inside, need
from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, TensorSpec

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")  # of a binary, which is a file's name
SCALARS = {"int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63), "float32": (-math.inf, math.inf)}


def check_nodes(plan: Plan, program: LoweredProgram, buckets: Sequence[str], phase: str) -> None:
    """Every kernel node names a binary, a grid that there can be, and arguments that its launches have."""
    operands: dict[int, set[str]] = {}
    for launch in program.launches:
        need(
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
            need(bucket in buckets, f"{phase}: {op_class.op} has kernels for {bucket}, which is no bucket")
            for choice in choices:
                for node in choice.nodes:
                    where = f"{phase}: {choice.name} of {op_class.op}"
                    need(
                        node.binary in plan.binaries,
                        f"{where} names the binary {node.binary!r}, which is none",
                    )
                    need(all(1 <= n <= MOST for n in node.grid), f"{where} has the grid {list(node.grid)}")
                    for argument in node.arguments:
                        _argument(where, argument, operands.get(index, set()), plan.memory.scratch)
                        if argument.kind == "descriptor":
                            _map(where, argument, specs.get((index, argument.operand)))


def _extent(plan: Plan, program: LoweredProgram, value: str) -> tuple[TensorSpec, int] | None:
    """A value's spec and the bytes from its first to its last element, for values whose size is fixed."""
    buffer = program.buffers.get(value)
    if buffer is not None:
        return None
    spec = plan.spec(program.phase, value)
    return (spec, spec.nbytes({PAGES: 1})) if not {ROWS, TOKENS} & set(spec.shape) else None


def _argument(where: str, argument: NodeArgument, operands: set[str], scratch: int) -> None:
    kind = argument.kind
    if kind in ("pointer", "descriptor"):
        need(argument.operand in operands, f"{where} has no operand {argument.operand!r}")
    elif kind == "scratch":
        need(0 <= argument.offset < scratch, f"{where} takes byte {argument.offset} of {scratch} of scratch")
    elif kind == "scalar":
        low, high = SCALARS.get(argument.dtype, (0, 0))
        need(low <= argument.value < high, f"{where} has {argument.value!r} as {argument.dtype!r}")
    else:
        need(False, f"{where} has an argument of the kind {kind!r}")


def _map(where: str, argument: NodeArgument, operand: tuple[TensorSpec, int] | None) -> None:
    """A tensor map stays in what it is over; maps over activations have a size by bucket, which kernels mask."""
    rank = len(argument.shape)
    sizes = [1 if n == PAGES else n for n in argument.shape]
    need(
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
        need(
            ends * DTYPE_BYTES[argument.dtype] <= nbytes,
            f"{where} has a tensor map that goes beyond {argument.operand}, {spec}",
        )


def check_kernels(plan: Plan) -> None:
    """Binaries are files of the plan, and what quantizes weights while they are loaded stays in its places."""
    for key, binary in plan.binaries.items():
        need(KEY.fullmatch(key) is not None, f"binary {key!r} is no name of a file in kernels/")
        need(
            1 <= binary.warps <= 32 and 0 <= binary.shared < 2**20,
            f"binary {key} has {binary.warps} warps and {binary.shared} bytes of shared memory",
        )
    loading = plan.loading
    if loading is None:
        return
    program = loading.program
    need(
        1 <= loading.slots <= MOST and inside(0, loading.slots * loading.slot_bytes, plan.memory.arena),
        f"{loading.slots} slots of {loading.slot_bytes} bytes do not fit an arena of {plan.memory.arena}",
    )
    for name, buffer in program.buffers.items():
        need(all(type(n) is int for n in buffer.spec.shape), f"load: buffer {name} is {buffer.spec}")
    for launch in program.launches:
        need(set(launch.operands) == {"x"}, f"load: {launch.op} has other operands than x")
        for name in (*launch.operands.values(), *launch.results.values()):
            need(name in program.buffers, f"load: {launch.op} names {name!r}, which is nothing")
        need(
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
        need(0 <= number < len(program.launches), f"load: a conversion has launch {number}, which is none")
        made = program.launches[number].results
        need(
            set(made) == set(results), f"load: a conversion gives {', '.join(made)}, not {', '.join(results)}"
        )
        for name in ends:
            ends[name] += program.buffers[made[name]].spec.nbytes({})
    for name, offset in results.items():
        weight = offsets.get(offset)
        need(
            weight is not None and ends[name] == offset + weight.nbytes,
            f"load: a conversion writes bytes {offset} to {ends[name]}, which are no parameter",
        )


def _nodes_of_loading(plan: Plan, program: LoweredProgram) -> None:
    if program.classes:
        check_nodes(plan, program, [str(LOAD)], LOAD.phase)
        for op_class in program.classes:
            need(bool(op_class.candidates.get(str(LOAD))), f"load: {op_class.op} has no kernel")
