"""Projections of the same input become one wider projection."""

from __future__ import annotations

from dataclasses import replace

from makeready.graphs.ir import Call, Program
from makeready.graphs.recipe import Param, Piece
from makeready.kernels.spec import TensorSpec


def merge_linears(program: Program) -> Program:
    """Merge linears that read one value into one linear and column views of its result.

    q, k and v (and gate and up) are read in one sweep by a matrix product with more rows, which fills a
    GPU better and costs one launch instead of three. Only parameters that this program reads once are
    merged, so no weight is stored twice; and only those stored alike, in dtype and shard axis.
    """
    uses = program.uses()
    groups: dict[tuple, list[Call]] = {}
    for call in program.calls:
        if call.op != "linear":
            continue
        operands = {k: program.params.get(v) for k, v in call.operands.items() if k != "x"}
        if all(p is not None and p.pieces and len(uses[p.name]) == 1 for p in operands.values()):
            stored = tuple((k, p.spec.dtype, p.shard, p.quantizable) for k, p in operands.items() if p)
            groups.setdefault((call.operands["x"], call.attrs["out_dtype"], stored), []).append(call)
    params: dict[str, Param] = {}
    replaced: dict[str, list[Call]] = {}
    for group in groups.values():
        if len(group) > 1:
            first, *rest = (call.result for call in group)
            replaced[first] = _merge(program, group, params)
            replaced |= {result: [] for result in rest}
    calls = []
    for call in program.calls:
        calls += replaced.get(call.result, [call]) if call.op == "linear" else [call]
    return program.with_calls(calls, params)


def _merge(program: Program, group: list[Call], params: dict[str, Param]) -> list[Call]:
    """The merged call, then a view for each of the calls that it replaces."""
    operands = {"x": group[0].operands["x"]}
    for operand in ("weight", "bias"):
        if operand in group[0].operands:
            merged = concatenate([program.params[call.operands[operand]] for call in group])
            params[merged.name] = merged
            operands[operand] = merged.name
    wide = "+".join(call.result for call in group)
    calls, start = [Call("linear", operands, {"y": wide}, group[0].attrs)], 0
    for call in group:
        stop = start + int(program.spec(call.result).shape[-1])
        calls.append(Call("columns", {"x": wide}, {"y": call.result}, {"start": start, "stop": stop}))
        start = stop
    return calls


def concatenate(params: list[Param]) -> Param:
    """One parameter with the rows of all, in order: ``a.q.weight``, ``a.k.weight`` → ``a.q+k.weight``."""
    pieces: list[Piece] = []
    rows = 0
    for param in params:
        pieces += [replace(piece, at=piece.at + rows) for piece in param.pieces]
        rows += int(param.spec.shape[0])
    spec = TensorSpec((rows, *params[0].spec.shape[1:]), params[0].spec.dtype)
    return replace(params[0], name=_joined([p.name for p in params]), spec=spec, pieces=tuple(pieces))


def _joined(names: list[str]) -> str:
    paths = [name.split(".") for name in names]
    if len({len(path) for path in paths}) > 1:
        return "+".join(names)
    columns = zip(*paths, strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "+".join(parts) for parts in columns)
