"""Whether what a plan says of kernels on a GPU fits the rest of it: binaries, nodes, tensor maps, loading.

What the machine code itself does cannot be checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Conversion, Loading, LoadProgram, LoweredProgram, NodeArgument
from makeready.graphs.plan.rules import MOST, inside, need
from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, TensorSpec

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")  # of a binary, which is a file's name
SCALARS = {"int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63), "float32": (-math.inf, math.inf)}


def check_chains(plan: Plan, program: LoweredProgram, phase: str) -> None:
    """A chain reads and gives what its launches do, and what it does not write nobody else reads."""
    results = {field.name for field in plan.steps[phase].results}
    need(all(0 <= join < len(program.launches) for join in program.joins), f"{phase}: a join is no launch")
    for chain in program.chains:
        where = f"{phase}: the chain {chain.launch.op} of launches {chain.first} to {chain.stop}"
        need(0 <= chain.first < chain.stop - 1 < len(program.launches), f"{where}, which are none")
        members = program.launches[chain.first : chain.stop]
        read = {value for launch in members for value in launch.operands.values()}
        made = {value for launch in members for value in launch.results.values()}
        given = set(chain.launch.results.values())
        need(set(chain.launch.operands.values()) <= read - made, f"{where} reads what they do not")
        need(given <= made, f"{where} gives what they do not")
        later = {v for launch in program.launches[chain.stop :] for v in launch.operands.values()}
        lost = sorted((made - given) & (later | results))
        need(not lost, f"{where} leaves out {', '.join(lost)}, which others read")


def check_nodes(plan: Plan, program: LoweredProgram, buckets: Sequence[str], phase: str) -> None:
    """Every kernel node names a binary, a grid that there can be, and arguments that its launches have."""
    operands: dict[int, set[str]] = {}
    launches = (*program.launches, *(chain.launch for chain in program.chains))
    for launch in launches:
        need(
            0 <= launch.op_class < len(program.classes),
            f"{phase}: {launch.op} has no class {launch.op_class}",
        )
        given = {*launch.operands, *launch.results}
        operands[launch.op_class] = operands.get(launch.op_class, given) & given
    specs = {}
    for launch in launches:
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
                        _argument(where, argument, operands.get(index, set()), plan.memory.lane_scratch)
                        if argument.kind in ("descriptor", "map"):
                            _map(where, argument, specs.get((index, argument.operand)))


def _extent(plan: Plan, program: LoweredProgram, value: str) -> tuple[TensorSpec, int] | None:
    """A value's spec and the bytes from its first to its last element, for values whose size is fixed."""
    buffer = program.buffers.get(value)
    if buffer is not None:
        return None
    spec = plan.specs(program.phase).get(value)
    if spec is None:  # of a program that loads: its results lie in weights
        return None
    return (spec, spec.nbytes({PAGES: 1})) if not {ROWS, TOKENS} & set(spec.shape) else None


def _argument(where: str, argument: NodeArgument, operands: set[str], scratch: int) -> None:
    kind = argument.kind
    if kind in ("pointer", "descriptor", "map"):
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
        need(
            0 <= binary.null_pointers <= 2 and 1 <= binary.cluster <= 16,
            f"binary {key} has {binary.null_pointers} null pointers and clusters of {binary.cluster} blocks",
        )
    loading = plan.loading
    if loading is None:
        return
    need(
        1 <= loading.places <= MOST and inside(0, loading.places * loading.place_bytes, plan.memory.arena),
        f"{loading.places} places of {loading.place_bytes} bytes do not fit an arena of {plan.memory.arena}",
    )
    for load in loading.programs:
        _load_program(plan, loading, load)
    for conversion in loading.conversions:
        _conversion(plan, loading, conversion)


def _load_program(plan: Plan, loading: Loading, load: LoadProgram) -> None:
    """Its buffers lie in a place, its launches name them or its results."""
    program = load.program
    need(not program.lanes, f"{program.phase}: there are two lanes, and loading has one")
    results = {made.name for made in load.results.values()}
    for name, buffer in program.buffers.items():
        spec = buffer.spec
        need(
            all(type(n) is int and n >= 1 for n in spec.shape)
            and inside(buffer.offset, spec.nbytes({}), loading.place_bytes),
            f"{program.phase}: buffer {name}, {spec}, at byte {buffer.offset} of {loading.place_bytes}",
        )
    need(set(load.operands) <= set(program.buffers), f"{program.phase}: an operand has no buffer")
    for made in load.results.values():
        need(all(type(n) is int and n >= 1 for n in made.spec.shape), f"{program.phase} gives {made.spec}")
    for launch in program.launches:
        for name in (*launch.operands.values(), *launch.results.values()):
            need(
                name in program.buffers or name in results,
                f"{program.phase}: {launch.op} names {name!r}, which is nothing",
            )
    if program.classes:
        bucket = str(load.bucket)
        check_nodes(plan, program, [bucket], program.phase)
        for op_class in program.classes:
            need(bool(op_class.candidates.get(bucket)), f"{program.phase}: {op_class.op} has no kernel")


def _conversion(plan: Plan, loading: Loading, conversion: Conversion) -> None:
    """Run after run the results fill the parameters that they are."""
    need(bool(conversion.results), "load: a conversion gives nothing")
    weights = {}
    for result, index in conversion.results.items():
        need(0 <= index < len(plan.weights), f"load: {result} is weight {index}, which is none")
        weights[result] = plan.weights[index]
        derived = weights[result].param.derived
        need(derived is not None, f"load: weight {weights[result].param.name} is not derived")
    by = next(iter(weights.values())).param.derived.by  # type: ignore[union-attr]
    first, made = 0, dict.fromkeys(weights, 0)
    for stop, number in conversion.runs:
        need(0 <= number < len(loading.programs), f"load: a conversion has program {number}, which is none")
        load = loading.programs[number]
        need(first < stop <= by.units, f"load: a run goes from unit {first} to {stop} of {by.units}")
        need(set(made) <= set(load.results), f"load: program {number} does not give {', '.join(made)}")
        for name, (start, end) in by.rows(first, stop).items():
            spec = by.operands[name].spec
            whole = (end - start, *spec.shape[1:])
            buffer = load.program.buffers.get(name)
            need(
                buffer is not None and buffer.spec.shape == whole and buffer.spec.dtype == spec.dtype,
                f"load: program {number} takes another {name} than {spec.dtype}{list(whole)}",
            )
        for result in made:
            made[result] += load.results[result].spec.nbytes({})
        first = stop
    need(first == by.units, f"load: a conversion ends at unit {first} of {by.units}")
    for result, nbytes in made.items():
        weight = weights[result]
        need(
            nbytes == weight.nbytes,
            f"load: a conversion gives {nbytes} bytes of {weight.param.name}, which has {weight.nbytes}",
        )
