"""Projections of the same input become one wider projection."""

from __future__ import annotations

from makeready.graphs.ir import Call, Program
from makeready.graphs.recipe import Param, can_concatenate, concatenate, kind

LINEARS = ("linear", "linear_fp8", "linear_fp8_block")
INPUTS = ("x", "x_scale")  # what merged linears have in common


def merge_linears(program: Program) -> Program:
    """Merge linears that read one value into one linear and column views of its result.

    q, k and v (and gate and up) are read in one sweep by a matrix product with more rows, which fills a
    GPU better and costs one launch instead of three. Only parameters that this program reads once are
    merged, so no weight is stored twice; and only those stored alike, in dtype and mesh axes. Weights with
    block scales are merged where no block would hold rows of two.
    """
    uses = program.uses()
    groups: dict[tuple, list[Call]] = {}
    for call in program.calls:
        if call.op not in LINEARS:
            continue
        operands = {k: program.params.get(v) for k, v in call.operands.items() if k not in INPUTS}
        if all(p is not None and not p.generated and len(uses[p.name]) == 1 for p in operands.values()):
            stored = tuple((k, kind(p)) for k, p in operands.items() if p)
            inputs = tuple(call.operands.get(k) for k in INPUTS)
            groups.setdefault((call.op, inputs, tuple(call.attrs.items()), stored), []).append(call)
    params: dict[str, Param] = {}
    replaced: dict[str, list[Call]] = {}
    for group in groups.values():
        whole_blocks = all(_ends_with_a_block(program, call) for call in group[:-1])
        if len(group) > 1 and whole_blocks and _concatenable(program, group):
            first, *rest = (call.result for call in group)
            replaced[first] = _merge(program, group, params)
            replaced |= {result: [] for result in rest}
    calls = []
    for call in program.calls:
        calls += replaced.get(call.result, [call]) if call.op in LINEARS else [call]
    return program.with_calls(calls, params)


def _ends_with_a_block(program: Program, call: Call) -> bool:
    """Whether rows of another weight may follow: its blocks are its own."""
    return int(program.spec(call.operands["weight"]).shape[0]) % call.attrs.get("block", 1) == 0


def _concatenable(program: Program, group: list[Call]) -> bool:
    names = group[0].operands.keys() - set(INPUTS)
    return all(can_concatenate([program.params[call.operands[name]] for call in group]) for name in names)


def _merge(program: Program, group: list[Call], params: dict[str, Param]) -> list[Call]:
    """The merged call, then a view for each of the calls that it replaces."""
    shared = group[0]
    operands = {k: v for k, v in shared.operands.items() if k in INPUTS}
    for operand in shared.operands.keys() - operands.keys():
        merged = concatenate([program.params[call.operands[operand]] for call in group])
        params[merged.name] = merged
        operands[operand] = merged.name
    operands = {o.name: operands[o.name] for o in shared.contract.inputs if o.name in operands}
    wide = "+".join(call.result for call in group)
    calls, start = [Call(shared.op, operands, {"y": wide}, shared.attrs)], 0
    for call in group:
        stop = start + int(program.spec(call.result).shape[-1])
        calls.append(Call("columns", {"x": wide}, {"y": call.result}, {"start": start, "stop": stop}))
        start = stop
    return calls
