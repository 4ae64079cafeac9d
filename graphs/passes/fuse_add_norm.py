"""The residual addition and the norm that reads it become one op."""

from __future__ import annotations

from makeready.graphs.planner.ir import Call, Program


def fuse_add_norm(program: Program) -> Program:
    """``rms_norm(add(x, residual))`` → ``add_rms_norm(x, residual)``, which also gives the sum.

    Saves one sweep over the residual stream for every norm. The sum keeps its name, so its other
    readers (the next addition) stay as they are.
    """
    producers = program.producers()
    fused: dict[str, Call] = {}  # result of the add → what takes its place
    gone: set[str] = set()
    for call in program.calls:
        if call.op != "rms_norm":
            continue
        added = producers.get(call.operands["x"])
        if added is None or added.op != "add" or added.result in fused:
            continue
        fused[added.result] = Call(
            "add_rms_norm",
            {"x": added.operands["x"], "residual": added.operands["y"], "weight": call.operands["weight"]},
            {"y": call.result, "residual_out": added.result},
            call.attrs,
        )
        gone.add(call.result)
    calls = []
    for call in program.calls:
        if call.op == "add":
            calls.append(fused.get(call.result, call))
        elif not (call.op == "rms_norm" and call.result in gone):
            calls.append(call)
    return program.with_calls(calls)
