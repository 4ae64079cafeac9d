"""The gate of a gated MLP becomes one op over the merged projection."""

from __future__ import annotations

from makeready.graphs.ir import Call, Program


def fuse_silu_mul(program: Program) -> Program:
    """``multiply(silu(gate), up)`` → ``silu_mul(gate_up)``.

    Applies where gate and up are the two halves of one value, as ``merge_linears`` leaves them.
    """
    producers = program.producers()
    uses = program.uses()
    calls = []
    for call in program.calls:
        gate_up = _halves(program, call, producers) if call.op == "multiply" else None
        if gate_up is not None and len(uses[call.operands["x"]]) == 1:
            half = int(program.spec(call.result).shape[-1])
            if program.spec(gate_up).shape[-1] == 2 * half:
                call = Call("silu_mul", {"gate_up": gate_up}, {"y": call.result})
        calls.append(call)
    return program.with_calls(calls)


def _halves(program: Program, call: Call, producers: dict[str, Call]) -> str | None:
    """The value whose left columns the call's gate are and whose right ones its up, if there is one."""
    activated = producers.get(call.operands["x"])
    if activated is None or activated.op != "silu":
        return None
    halves = (activated.operands["x"], call.operands["y"])
    gate, up = (program.columns(producers.get(half)) for half in halves)
    if gate is None or up is None or gate.base != up.base:
        return None
    return gate.base if gate.start == 0 and gate.stop == up.start else None
