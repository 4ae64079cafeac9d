"""The general program, where every row has any number of tokens, made into one phase's."""

from __future__ import annotations

from dataclasses import replace

from makeready.graphs.ir import TEMP, Call, Program, Value
from makeready.graphs.spec import DECODE, EXTEND, SCORE, TARGET_RESULTS
from makeready.kernels.spec import ROWS, TOKENS, TensorSpec


def specialize(program: Program, phase: str, *, deterministic: bool = False) -> Program:
    """The program of ``phase``: ``score`` is the general one, ``extend`` reports nothing of its input, and
    ``decode`` has one token in every row besides.

    For decode the axis T becomes R, attention loses its row offsets, and the last token of a row is the
    row itself. Where the plan is ``deterministic`` attention keeps them: decode steps then run the very ops of
    the others.
    """
    if phase == SCORE:
        return program
    wanted = {k: v for k, v in program.results.items() if k not in TARGET_RESULTS}
    program = replace(program, phase=phase, results=wanted).with_calls(list(program.calls))
    if phase == EXTEND:
        return program
    assert phase == DECODE, phase
    renamed: dict[str, str] = {}
    calls: list[Call] = []
    for call in program.calls:
        call = call.renamed(renamed)
        if call.op == "gather_last":
            renamed[call.result] = call.operands["x"]
            continue
        if call.op == "extend_attention" and not deterministic:
            kept = {k: v for k, v in call.operands.items() if k not in ("query_start", "query_len")}
            call = replace(call, op="decode_attention", operands=kept)
        calls.append(call)
    values = {name: _one_token_rows(v) for name, v in program.values.items() if v.kind != TEMP}
    results = {k: renamed.get(v, v) for k, v in program.results.items()}
    return Program(DECODE, values, program.params, (), results).with_calls(calls)


def _one_token_rows(value: Value) -> Value:
    shape = tuple(ROWS if dim == TOKENS else dim for dim in value.spec.shape)
    return replace(value, spec=TensorSpec(shape, value.spec.dtype))
