"""Everything between the q/k/v projection and attention becomes one op."""

from __future__ import annotations

from dataclasses import dataclass

from makeready.graphs.planner.ir import Call, Columns, Program
from makeready.kernels.elementwise import columns

FUSED = {"kv_write": "norm_rope_kv_write", "kv_write_scaled": "norm_rope_kv_write_scaled"}


@dataclass(frozen=True)
class _Head:
    """How one of q, k, v comes out of the projection: its columns and what is done to them."""

    columns: Columns
    norm: Call | None
    rope: Call | None


def fuse_qkv(program: Program) -> Program:
    """Head norms, rotation and cache write of one layer → ``norm_rope_kv_write``, or its like with scales.

    Applies where q, k and v are the first columns of one value (see ``merge_linears``), side by side, q and k are
    rotated by the same rows, and either both or neither are normalised. One launch instead of up to five,
    and k and v go straight to their pages. What else the projection gives (a gate) stays beside it.
    """
    producers = program.producers()
    rotated = {c.operands["rows"]: [] for c in program.calls if c.op == "rope"}
    for call in program.calls:
        if call.op == "rope":
            rotated[call.operands["rows"]].append(call)
    fused: dict[int, list[Call]] = {}  # position of the cache write → what takes its place
    gone: set[str] = set()
    for at, call in enumerate(program.calls):
        if call.op in FUSED:
            found = _match(program, call, producers, rotated)
            if found:
                fused[at] = found
                gone.add(found[-1].result)
    calls: list[Call] = []
    for at, call in enumerate(program.calls):
        if not (call.op == "rope" and call.result in gone):
            calls += fused.get(at, [call])
    return program.with_calls(calls)


def _match(
    program: Program, write: Call, producers: dict[str, Call], rotated: dict[str, list[Call]]
) -> list[Call]:
    k, v = (_head(program, write.operands[name], producers) for name in ("k", "v"))
    if k is None or v is None or k.rope is None or v.rope or v.norm:
        return []
    qkv, rows = k.columns.base, k.rope.operands["rows"]
    for rope in rotated[rows]:
        q = _head(program, rope.result, producers)
        if q is None or q.columns.base != qkv or q.columns.start != 0:
            continue
        stops = [h.columns.stop for h in (q, k, v)]
        starts = [h.columns.start for h in (k, v)]
        if starts == stops[:2]:
            before = []
            if stops[2] != program.spec(qkv).shape[-1]:
                attrs = {"start": 0, "stop": stops[2]}
                before = [Call(columns.__name__, {"x": qkv}, {"y": f"{qkv}.qkv"}, attrs)]
                qkv = f"{qkv}.qkv"
            made = _fused(write, q, k, qkv, rope)
            return [*before, made] if made is not None else []
    return []


def _head(program: Program, value: str, producers: dict[str, Call]) -> _Head | None:
    rope = norm = None
    call = producers.get(value)
    if call is not None and call.op == "rope":
        rope, call = call, producers.get(call.operands["x"])
    if call is not None and call.op == "head_rms_norm":
        norm, call = call, producers.get(call.operands["x"])
    columns = program.columns(call)
    return _Head(columns, norm, rope) if columns is not None else None


def _fused(write: Call, q: _Head, k: _Head, qkv: str, rope: Call) -> Call | None:
    operands = {"qkv": qkv, "rows": rope.operands["rows"]}
    eps = offset = 0.0
    if q.norm is not None and k.norm is not None:
        (eps, offset), of_keys = ((c.attrs["eps"], c.attrs.get("offset", 0.0)) for c in (q.norm, k.norm))
        if (eps, offset) != of_keys:
            return None
        operands |= {"q_norm": q.norm.operands["weight"], "k_norm": k.norm.operands["weight"]}
    elif q.norm is not None or k.norm is not None:
        return None
    operands |= {name: value for name, value in write.operands.items() if name not in ("k", "v")}
    attrs = {**write.attrs, "heads": rope.attrs["heads"], "eps": eps, "offset": offset}
    return Call(FUSED[write.op], operands, {"q": rope.result}, attrs)
