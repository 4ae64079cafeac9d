"""Projections of the same input become one wider projection."""

from __future__ import annotations

from typing import Any

from makeready.graphs.plan.recipe import Param, can_concatenate, concatenate, kind
from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.elementwise import columns
from makeready.kernels.signature import evaluate
from makeready.kernels.size import Size


def merge_linears(program: Program) -> Program:
    """Merge linears that read one value into one linear and column views of its result.

    A linear is any op whose contract ``merges``. q, k and v (and gate and up) are read in one sweep by a matrix
    product with more rows, which fills a GPU better and costs one launch instead of three. Only parameters that
    whoever reads them reads merged are, so that none is stored by itself as well; and only those stored alike, in
    dtype and mesh axes. A program that reads some of them without the others, as keys and values of tokens whose
    queries nobody wants, has them merged once more. Weights with block scales are merged where no block would hold
    rows of two.
    """
    groups: dict[tuple, list[Call]] = {}
    for call in program.calls:
        op = call.contract
        if op.merges is None:
            continue
        operands = {k: program.params.get(v) for k, v in call.operands.items() if k not in op.shares}
        if all(p is not None and not p.generated for p in operands.values()):
            stored = tuple((k, kind(p)) for k, p in operands.items() if p)
            inputs = tuple(call.operands.get(k) for k in op.shares)
            attrs = tuple((k, v) for k, v in call.attrs.items() if k not in op.adds)
            groups.setdefault((call.op, inputs, attrs, stored), []).append(call)
    params: dict[str, Param] = {}
    replaced: dict[str, list[Call]] = {}
    for group in _read_merged(program, [group for group in groups.values() if _mergeable(program, group)]):
        first, *rest = (call.result for call in group)
        replaced[first] = _merge(program, group, params)
        replaced |= {result: [] for result in rest}
    calls = []
    for call in program.calls:
        calls += replaced.get(call.result, [call]) if call.contract.merges is not None else [call]
    return program.with_calls(calls, params)


def _mergeable(program: Program, group: list[Call]) -> bool:
    may_follow = all(_others_may_follow(program, call) for call in group[:-1])
    read = [
        value for call in group for name, value in call.operands.items() if name not in call.contract.shares
    ]
    return len(group) > 1 and len(set(read)) == len(read) and may_follow and _concatenable(program, group)


def _read_merged(program: Program, groups: list[list[Call]]) -> list[list[Call]]:
    """Those of ``groups`` whose parameters no call reads that is in none of them."""
    uses = program.uses()
    while True:
        merged = {call.result for group in groups for call in group}
        kept = [group for group in groups if all(_readers(uses, call) <= merged for call in group)]
        if len(kept) == len(groups):
            return groups
        groups = kept


def _readers(uses: dict[str, list[Call]], call: Call) -> set[str]:
    """Results of the calls that read a parameter of ``call``."""
    params = (value for name, value in call.operands.items() if name not in call.contract.shares)
    return {value for param in params for reader in uses[param] for value in reader.results.values()}


def _others_may_follow(program: Program, call: Call) -> bool:
    """Whether each operand ends where that of another call may begin: with a whole block of outputs."""
    op, merged = call.contract, call.contract.merges or ""
    if op.adds:  # the attributes tell the parts of an operand apart
        return True
    dims = op.dims(program.operand_specs(call), call.attrs)
    rows = {o.axes[0] for o in op.inputs if o.name in call.operands and o.name not in op.shares}
    for axis in rows:
        made = evaluate(axis, {**dims, merged: merged})
        size = made if isinstance(made, Size) else Size(made)
        # So that the operand's rows are those of all calls, one call's behind the other's.
        if not isinstance(size.axis, str) or size.plus or size.times * dims[merged] % size.over:
            return False
    return True


def _concatenable(program: Program, group: list[Call]) -> bool:
    names = group[0].operands.keys() - set(group[0].contract.shares)
    return all(can_concatenate([program.params[call.operands[name]] for call in group]) for name in names)


def _merge(program: Program, group: list[Call], params: dict[str, Param]) -> list[Call]:
    """The merged call, then a view for each of the calls that it replaces."""
    first = group[0]
    operands = {k: v for k, v in first.operands.items() if k in first.contract.shares}
    for operand in first.operands.keys() - operands.keys():
        merged = concatenate([program.params[call.operands[operand]] for call in group])
        params[merged.name] = merged
        operands[operand] = merged.name
    operands = {o.name: operands[o.name] for o in first.contract.inputs if o.name in operands}
    wide = "+".join(call.result for call in group)
    attrs = {
        **first.attrs,
        **{name: _added([call.attrs[name] for call in group]) for name in first.contract.adds},
    }
    calls, start = [Call(first.op, operands, dict.fromkeys(first.results, wide), attrs)], 0
    for call in group:
        stop = start + int(program.spec(call.result).shape[-1])
        calls.append(Call(columns.__name__, {"x": wide}, {"y": call.result}, {"start": start, "stop": stop}))
        start = stop
    return calls


def _added(values: list[Any]) -> Any:
    return "+".join(values) if isinstance(values[0], str) else sum(values)
