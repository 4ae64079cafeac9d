"""Neighbouring launches that a plan may run as one call in some buckets.

Which those are is decided here from the ops that ``chains`` of a contract names; in which buckets it is done is
decided by kernels, which offer to run the call or do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from makeready.graphs.plan.program import Chain, Launch, LoweredProgram
from makeready.kernels.contract import CONTRACTS, Contract, chain_operands, passed_on
from makeready.kernels.registry import REFERENCE


def find_chains(
    launches: Sequence[Launch], bases: Mapping[str, str], results: Collection[str]
) -> tuple[Chain, ...]:
    """Every chain of ``launches`` whose passed-on values nobody else reads, by place, the longest first.

    Args:
        bases: of the values that are views, what they are columns of.
        results: values that the host reads.
    """
    readers: dict[str, int] = {}
    for launch in launches:
        for value in {bases.get(v, v) for v in launch.operands.values()}:
            readers[value] = readers.get(value, 0) + 1
    kept = set(results) | {value for value, count in readers.items() if count > 1}
    ops = sorted((op for op in CONTRACTS.values() if op.chains), key=lambda op: (-len(op.chains), op.name))
    found = (_chain(op, launches, at, kept) for at in range(len(launches)) for op in ops)
    return tuple(chain for chain in found if chain is not None)


def _chain(op: Contract, launches: Sequence[Launch], at: int, kept: set[str]) -> Chain | None:
    """The launches from ``at`` on as one call of ``op``, if they are one."""
    members = launches[at : at + len(op.chains)]
    if tuple(launch.op for launch in members) != op.chains:
        return None
    if not all(_passes(*pair, kept) for pair in pairwise(members)):
        return None
    made = {value for launch in members for value in launch.results.values()}
    operands: dict[str, str] = {}
    for named, (number, operand) in zip(op.inputs, chain_operands(op), strict=True):
        value = members[number].operands.get(operand.name)
        if value in made:
            return None
        if value is not None:
            operands[named.name] = value
    attrs: dict[str, Any] = {}
    for launch in members:
        given = {**CONTRACTS[launch.op].attrs, **launch.attrs}
        written = {name: launch.operands[name] for name in op.writes if name in launch.operands}
        if any(attrs.get(k, v) != v for k, v in given.items()) or not written.items() <= operands.items():
            return None
        attrs |= given
    further = (v for one, other in pairwise(members) for v in _results(one)[passed_on(CONTRACTS[other.op]) :])
    results = [*_results(members[-1]), *further]
    outputs = {o.name: v for o, v in zip(op.outputs, results, strict=True)}
    return Chain(Launch(op.name, REFERENCE, operands, outputs, attrs), at, at + len(members))


def _passes(one: Launch, other: Launch, kept: set[str]) -> bool:
    """Whether ``other`` takes first results of ``one`` as its first operands, and nobody else reads them."""
    count = passed_on(CONTRACTS[other.op])
    passed = _results(one)[:count]
    taken = [other.operands.get(operand.name) for operand in CONTRACTS[other.op].inputs[:count]]
    return taken == passed and not kept & set(passed)


def _results(launch: Launch) -> list[str]:
    return [launch.results[operand.name] for operand in CONTRACTS[launch.op].outputs]


def together(chains: Sequence[Chain], launches: Sequence[Launch]) -> Iterator[tuple[int, int, str]]:
    """First and last launch of a chain and a value that its launches name: all are alive from one to the other.

    One call may write its results before it has read all of its operands.
    """
    for chain in chains:
        for launch in launches[chain.first : chain.stop]:
            for value in (*launch.operands.values(), *launch.results.values()):
                yield chain.first, chain.stop - 1, value


def without_idle(program: LoweredProgram) -> LoweredProgram:
    """``program`` without chains that no bucket has a kernel for, nor their classes."""
    kept = [bool(any(one.candidates.values())) for one in program.classes]
    place = {old: new for new, old in enumerate(i for i, has in enumerate(kept) if has)}
    renamed = (
        replace(chain, launch=replace(chain.launch, op_class=place[chain.launch.op_class]))
        for chain in program.chains
        if chain.launch.op_class in place
    )
    launches = (replace(launch, op_class=place[launch.op_class]) for launch in program.launches)
    classes = tuple(one for one, has in zip(program.classes, kept, strict=True) if has)
    return replace(program, launches=tuple(launches), classes=classes, chains=tuple(renamed))
