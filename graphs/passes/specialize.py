"""Ops that say what is meant, made into those that a kind of step runs."""

from __future__ import annotations

from dataclasses import replace

from makeready.graphs.ir import Call, Program


def specialize(program: Program, *, one_token: bool, deterministic: bool = False) -> Program:
    """Where every row has ``one_token``, attention needs no row offsets.

    Where the plan is ``deterministic`` it keeps them: decode steps then run the very ops of the others.
    """
    if not one_token or deterministic:
        return program
    calls: list[Call] = []
    for call in program.calls:
        if call.op == "extend_attention":
            kept = {k: v for k, v in call.operands.items() if k not in ("query_start", "query_len")}
            call = replace(call, op="decode_attention", operands=kept)
        calls.append(call)
    return program.with_calls(calls)
