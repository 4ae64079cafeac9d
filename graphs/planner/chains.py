"""Neighbouring launches that a plan may run as one call in some buckets.

Which those are is decided here from the ops that ``chains`` of a contract names; in which buckets it is done is
decided by kernels, which offer to run the call or do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from makeready.graphs.plan.plan import Chain, Launch
from makeready.kernels.contract import CONTRACTS, Contract
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


def _chain(op: Contract, launches: Sequence[Launch], at: int, kept: Collection[str]) -> Chain | None:
    """The launches from ``at`` on as one call of ``op``, if they are one."""
    members = launches[at : at + len(op.chains)]
    if tuple(launch.op for launch in members) != op.chains:
        return None
    passed = [_first_result(launch) for launch in members[:-1]]
    made = {value for launch in members[:-1] for value in launch.results.values()}
    for before, launch in zip(passed, members[1:], strict=True):
        first, *others = _operands(launch)
        if first != before or before in kept or made & set(others):
            return None
    attrs: dict[str, object] = {}
    for launch in members:
        for name, value in {**CONTRACTS[launch.op].attrs, **launch.attrs}.items():
            attrs[name] = value
    given = [v for i, launch in enumerate(members) for v in _operands(launch)[i > 0 :]]
    last, *earlier = reversed(members)
    results = [*_results(last), *(v for launch in reversed(earlier) for v in _results(launch)[1:])]
    operands = {o.name: v for o, v in zip(op.inputs, given, strict=True) if v is not None}
    outputs = {o.name: v for o, v in zip(op.outputs, results, strict=True)}
    return Chain(Launch(op.name, REFERENCE, operands, outputs, attrs), at, at + len(members))


def _operands(launch: Launch) -> list[str | None]:
    """Values in the contract's order; None where an optional operand is absent."""
    return [launch.operands.get(operand.name) for operand in CONTRACTS[launch.op].inputs]


def _results(launch: Launch) -> list[str]:
    return [launch.results[operand.name] for operand in CONTRACTS[launch.op].outputs]


def _first_result(launch: Launch) -> str:
    return _results(launch)[0]


def together(chains: Sequence[Chain], launches: Sequence[Launch]) -> Iterator[tuple[int, int, str]]:
    """First and last launch of a chain and a value that its launches name: all are alive from one to the other.

    One call may write its results before it has read all of its operands.
    """
    for chain in chains:
        for launch in launches[chain.first : chain.stop]:
            for value in (*launch.operands.values(), *launch.results.values()):
                yield chain.first, chain.stop - 1, value
