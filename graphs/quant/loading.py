"""How parameters are derived on a GPU: which programs run over which units of the checkpoint's boxes.

A derivation is cut into runs of so many units that their operands fill a pinned buffer. What a run computes
is a program like a step's: lowered and placed by the same code, with the arena place of a thread that loads
in the place of the arena.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from makeready.graphs.plan.codec import canonical, to_json
from makeready.graphs.plan.memory import ALIGNMENT
from makeready.graphs.plan.plan import Weight
from makeready.graphs.plan.program import Conversion, Loading, LoadProgram, LoadResult
from makeready.graphs.plan.recipe import CHUNK_BYTES, LOADERS, Derivation
from makeready.graphs.plan.spec import Bucket
from makeready.graphs.plan.targets import Target
from makeready.graphs.planner.derivation import derived_groups, infer
from makeready.graphs.planner.ir import LOADED, Call, Program, Value
from makeready.graphs.planner.lower import lower
from makeready.kernels.spec import TensorSpec

ROWS = 128  # runs take multiples of as many rows, so that what they write begins aligned,
MOST_CHUNKS = (
    4  # unless as many rows are more than this many times CHUNK_BYTES, which is also a place's fair share
)


def loading_of(weights: Sequence[Weight], target: Target) -> Loading | None:
    """What makes the derived parameters among ``weights``; None where there are none."""
    groups = derived_groups([weight.param for weight in weights])
    if not groups:
        return None
    programs = _Programs(target)
    conversions = [_conversion(by, results, weights, programs) for by, results in groups]
    count = sum(len(conversion.runs) for conversion in conversions)
    # What cannot be cut may need much of the arena at once: rather let threads wait than make all places so large.
    most = max(1, LOADERS * MOST_CHUNKS * CHUNK_BYTES // programs.nbytes)
    return Loading(programs.all(), tuple(conversions), programs.nbytes, min(LOADERS, count, most))


def _conversion(
    by: Derivation, results: Mapping[str, int], weights: Sequence[Weight], programs: _Programs
) -> Conversion:
    """The runs of one derivation."""
    offsets = {result: weights[index].offset for result, index in results.items()}
    runs = []
    for first, stop in _cut(by):
        specs = infer(by, first, stop)
        runs.append((stop, programs.add(by, (first, stop), specs, offsets)))
        offsets = {result: offset + specs[result].nbytes({}) for result, offset in offsets.items()}
    for result, index in results.items():
        assert offsets[result] == weights[index].offset + weights[index].nbytes, "parts leave a gap"
    return Conversion(tuple(runs), dict(results))


def _cut(by: Derivation) -> Iterator[tuple[int, int]]:
    """First and last unit of every run."""
    cut = [o for o in by.operands.values() if o.unit]
    if not cut:
        yield 0, 1
        return
    nbytes = sum(o.unit * o.spec.nbytes({}) // int(o.spec.shape[0]) for o in cut)
    tallest = max(o.unit for o in cut)
    aligned = math.lcm(ROWS, tallest) // tallest
    fit = max(1, CHUNK_BYTES // nbytes)
    most = max(aligned, fit // aligned * aligned) if aligned * nbytes <= MOST_CHUNKS * CHUNK_BYTES else fit
    for first in range(0, by.units, most):
        yield first, min(first + most, by.units)


@dataclass
class _Programs:
    """Programs by what they compute, with the greatest common divisor of the addresses that each writes to.

    Attributes:
        nbytes: of the arena that one run needs.
    """

    target: Target
    found: dict[Any, int] = field(default_factory=dict)
    made: list[LoadProgram] = field(default_factory=list)
    alignments: list[dict[str, int]] = field(default_factory=list)
    nbytes: int = 0

    def add(
        self,
        by: Derivation,
        run: tuple[int, int],
        specs: Mapping[str, TensorSpec],
        offsets: Mapping[str, int],
    ) -> int:
        """The number of the program that runs some units, and one more user of it.

        Args:
            specs: of all values in this run.
            offsets: where results go in the weights region.
        """
        key = canonical(to_json([by.calls, {name: specs[name] for name in by.operands}, sorted(offsets)]))
        index = self.found.setdefault(key, len(self.made))
        if index == len(self.made):
            self.made.append(self._lower(by, run, specs, sorted(offsets), f"load.{index}"))
            self.alignments.append({made.name: ALIGNMENT for made in self.made[index].results.values()})
        for result, offset in offsets.items():
            name = self.made[index].results[result].name
            self.alignments[index][name] = math.gcd(self.alignments[index][name], offset)
        return index

    def all(self) -> tuple[LoadProgram, ...]:
        """The programs in the order in which they were added."""
        return tuple(
            replace(made, program=replace(made.program, alignments=alignments))
            for made, alignments in zip(self.made, self.alignments, strict=True)
        )

    def _lower(
        self,
        by: Derivation,
        run: tuple[int, int],
        specs: Mapping[str, TensorSpec],
        results: Sequence[str],
        phase: str,
    ) -> LoadProgram:
        values = {name: Value(name, specs[name], LOADED) for name in by.operands}
        calls = []
        for call in by.calls:
            contract = Call(call.op, {}, {}).contract
            operands, attrs = contract.bind((), {**call.operands, **call.attrs})
            calls.append(Call(call.op, operands, call.results, attrs))
        made = {result: LoadResult(f"{phase}/{result}", specs[result]) for result in results}
        returned = {one.name: result for result, one in made.items()}
        program = Program(phase, values, {}, (), returned).with_calls(calls)
        bucket = Bucket(phase, 1, run[1] - run[0])
        lowered, nbytes = lower(program, self.target, bucket, {})
        self.nbytes = max(self.nbytes, nbytes)
        return LoadProgram(lowered, bucket, tuple(by.operands), made)
