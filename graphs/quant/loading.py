"""Quantization on load as a program: which kernel calls turn a checkpoint's rows into parameters on a GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from makeready.graphs.codec import canonical
from makeready.graphs.memory import align
from makeready.graphs.plan import LOAD, Buffer, Conversion, Launch, Loading, LoweredProgram, Weight
from makeready.graphs.recipe import Derived
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.registry import REFERENCE
from makeready.kernels.spec import TensorSpec

SLOT_BYTES = 8 * 2**20  # of a chunk: what a pinned buffer holds; see executable/cuda_weights.py
SLOTS = 12  # as many as threads load; see executable/cuda_weights.py
ROWS = 128  # chunks are multiples of it, so that what they write begins aligned


def loading_of(weights: Sequence[Weight]) -> Loading | None:
    """What makes the derived parameters among ``weights``; None where there are none.

    An operand is cut into chunks of :data:`SLOT_BYTES`, so operands of one width share all launches but
    that of a shorter last chunk.
    """
    groups: dict[tuple, dict[str, Weight]] = {}
    for weight in weights:
        made = weight.param.derived
        if made is not None:
            key = (weight.param.pieces, made.op, canonical(dict(made.attrs)), made.operand)
            groups.setdefault(key, {})[made.result] = weight
    if not groups:
        return None
    launches = _Launches()
    conversions = [_conversion(results, launches) for results in groups.values()]
    program = launches.program()
    chunks = [program.buffers[launch.operands["x"]].spec.nbytes({}) for launch in program.launches]
    count = sum(len(conversion.launches) for conversion in conversions)
    return Loading(program, tuple(conversions), align(max(chunks)), min(SLOTS, count))


def _conversion(results: Mapping[str, Weight], launches: _Launches) -> Conversion:
    """One operand's chunks."""
    param = next(iter(results.values())).param
    made = param.derived
    assert made is not None
    rows = made.operand.at({})[0]
    unit = math.lcm(ROWS, made.attrs.get("block", 1))
    most = max(unit, SLOT_BYTES * rows // made.operand.nbytes({}) // unit * unit)
    offsets = {name: weight.offset for name, weight in results.items()}
    chunks = []
    for first in range(0, rows, most):
        specs = _specs(made, min(most, rows - first))
        assert specs.keys() - {"x"} == results.keys(), f"{made.op} has results that no parameter takes"
        chunks.append(launches.add(made, specs, offsets))
        offsets = {name: offset + specs[name].nbytes({}) for name, offset in offsets.items()}
    for name, weight in results.items():
        assert offsets[name] == weight.offset + weight.nbytes, f"chunks of {weight.param.name} leave a gap"
    return Conversion(param.pieces, tuple(chunks), {name: weight.offset for name, weight in results.items()})


def _specs(made: Derived, rows: int) -> dict[str, TensorSpec]:
    """Specs of operand and results for a chunk of ``rows``."""
    operand = TensorSpec((rows, *made.operand.shape[1:]), made.operand.dtype)
    return {"x": operand, **CONTRACTS[made.op].infer({"x": operand}, made.attrs)}


@dataclass
class _Launches:
    """Launches by what they read, with the greatest common divisor of the addresses that each writes to."""

    found: dict[tuple, int] = field(default_factory=dict)
    made: list[tuple[Derived, dict[str, TensorSpec]]] = field(default_factory=list)
    divisors: list[dict[str, int]] = field(default_factory=list)

    def add(self, made: Derived, specs: dict[str, TensorSpec], offsets: Mapping[str, int]) -> int:
        """The number of the launch, and one more user of it."""
        index = self.found.setdefault((made.op, canonical(dict(made.attrs)), specs["x"]), len(self.made))
        if index == len(self.made):
            self.made.append((made, specs))
            self.divisors.append(dict.fromkeys(offsets, 0))
        for name, offset in offsets.items():
            self.divisors[index][name] = math.gcd(self.divisors[index][name], offset)
        return index

    def program(self) -> LoweredProgram:
        """All launches; values are called as in the contract, with the launch's number behind."""
        launches, buffers = [], {}
        for index, (made, specs) in enumerate(self.made):
            names = {name: f"{name}.{index}" for name in specs}
            results = {name: value for name, value in names.items() if name != "x"}
            launches.append(Launch(made.op, REFERENCE, {"x": names["x"]}, results, dict(made.attrs)))
            for name, value in names.items():
                divisor = self.divisors[index].get(name, 0)
                buffers[value] = Buffer(specs[name], divisor, None, index, index)
        return LoweredProgram(LOAD.phase, tuple(launches), buffers)
