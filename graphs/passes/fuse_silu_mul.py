"""The gate of a gated MLP becomes one op over the merged projection."""

from __future__ import annotations

from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.contract import CONTRACTS


def fuse_silu_mul(program: Program) -> Program:
    """``multiply(silu(gate), up)`` → ``silu_mul(gate_up)``; so for every op whose contract ``gates``.

    Applies where gate and up are the two halves of one value, as ``merge_linears`` leaves them.
    """
    known = {op.gates: op.name for op in CONTRACTS.values() if op.gates is not None}
    producers = program.producers()
    uses = program.uses()
    calls = []
    for call in program.calls:
        activated = producers.get(call.operands["x"]) if call.op == "multiply" else None
        op = known.get(activated.op) if activated is not None else None
        gate_up = _halves(program, call, activated, producers) if activated is not None and op else None
        if op and gate_up is not None and len(uses[call.operands["x"]]) == 1:
            half = int(program.spec(call.result).shape[-1])
            if program.spec(gate_up).shape[-1] == 2 * half:
                call = Call(op, {"gate_up": gate_up}, {"y": call.result})
        calls.append(call)
    return program.with_calls(calls)


def _halves(program: Program, call: Call, activated: Call, producers: dict[str, Call]) -> str | None:
    """The value whose left columns the call's gate are and whose right ones its up, if there is one."""
    halves = (activated.operands["x"], call.operands["y"])
    gate, up = (program.columns(producers.get(half)) for half in halves)
    if gate is None or up is None or gate.base != up.base:
        return None
    return gate.base if gate.start == 0 and gate.stop == up.start else None
