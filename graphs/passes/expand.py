"""Ops that say what is meant, made into those that a kind of step runs."""

from __future__ import annotations

from collections.abc import Sequence

from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.planner.verify import VerificationError
from makeready.kernels.contract import ANY, INVARIANT
from makeready.kernels.signature import ContractError
from makeready.kernels.spec import TensorSpec


def expand(program: Program, *, deterministic: bool = False) -> Program:
    """``program`` with every op that becomes something else in steps of its kind (``expands`` of its contract).

    In a ``deterministic`` plan steps of all kinds run the very same ops.

    Raises:
        VerificationError: what an op becomes does not define what it defined.
    """
    calls: list[Call] = []
    for call in program.calls:
        calls += _expanded(program, call, INVARIANT if deterministic else program.phase)
    return program.with_calls(calls)


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
