"""The general program, where every row has any number of tokens, made into that of one kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from makeready.graphs.ir import TEMP, Call, Program
from makeready.graphs.spec import DECODE, SCORE, TARGET_RESULTS
from makeready.graphs.verify import VerificationError
from makeready.kernels.contract import ANY, ContractError
from makeready.kernels.spec import ROWS, TOKENS, TensorSpec


def expand(program: Program, kind: str, *, deterministic: bool = False) -> Program:
    """The program of a ``kind`` of step: what the kind does not report is gone, and every op that becomes
    something else in steps of that kind (``expands`` of its contract) has become it.

    ``score`` is the general kind, ``extend`` reports nothing of its input, and ``decode`` has one token in every
    row besides: the axis T becomes R, and the one token of a row that an op would select is the row itself. In a
    ``deterministic`` plan ops become in all kinds what they are in the general one, so that steps of all kinds run
    the very same ops.

    Raises:
        VerificationError: what an op becomes does not define what it defined.
    """
    dropped = () if kind == SCORE else TARGET_RESULTS
    wanted = {k: v for k, v in program.results.items() if k not in dropped}
    program = replace(program, phase=kind, results=wanted).with_calls(list(program.calls))
    if kind == DECODE:
        program = _one_token_rows(program)
    calls: list[Call] = []
    for call in program.calls:
        calls += _expanded(program, call, ANY if deterministic else kind)
    return program.with_calls(calls)


def _one_token_rows(program: Program) -> Program:
    renamed: dict[str, str] = {}
    calls: list[Call] = []
    for call in program.calls:
        call = call.renamed(renamed)
        selected = call.contract.selects_rows
        if selected is not None:
            renamed[call.result] = call.operands[selected]
        else:
            calls.append(call)
    fields = {n: v for n, v in program.values.items() if v.kind != TEMP}
    values = {n: replace(v, spec=v.spec.renamed({TOKENS: ROWS})) for n, v in fields.items()}
    results = {k: renamed.get(v, v) for k, v in program.results.items()}
    return replace(program, values=values, calls=(), results=results).with_calls(calls)


def _expanded(program: Program, call: Call, kind: str, within: tuple[str, ...] = ()) -> Sequence[Call]:
    """What ``call`` becomes, and what becomes of that; ``within`` are the ops that it comes from."""
    expands = call.contract.expands
    if not expands:
        return [call]
    function = expands.get(kind, expands.get(ANY))
    if function is None:
        raise VerificationError(f"after expand, {call.op} says nothing of steps of kind {kind}")
    if call.op in within:
        raise VerificationError(f"after expand, {call.op} becomes itself in steps of kind {kind}")
    calls = function(program, call)
    _check(program, call, calls, kind)
    return [made for one in calls for made in _expanded(program, one, kind, (*within, call.op))]


def _check(program: Program, call: Call, calls: Sequence[Call], kind: str) -> None:
    """Check that ``calls`` define what ``call`` does."""
    where = f"after expand, {call.op} in steps of kind {kind}"
    made: dict[str, TensorSpec] = {}
    for one in calls:
        try:
            operands = {k: made[v] if v in made else program.spec(v) for k, v in one.operands.items()}
            specs = one.contract.infer(operands, one.attrs)
            made |= {one.results[k]: spec for k, spec in specs.items()}
        except (ContractError, KeyError) as error:
            raise VerificationError(f"{where} becomes {one.op}: {error}") from None
    for result, value in call.results.items():
        if made.get(value) != program.spec(value):
            raise VerificationError(
                f"{where}: {result} becomes {made.get(value, 'nothing')}, it was {program.spec(value)}"
            )
