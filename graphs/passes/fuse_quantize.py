"""An op over what another one just made becomes part of it: quantizing behind a norm, a gate behind a product."""

from __future__ import annotations

from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.contract import CONTRACTS, Contract


def fuse_quantize(program: Program) -> Program:
    """``g(f(x))`` → ``f_g(x)`` for every op whose contract ``fuses`` the two, and so on behind that.

    What is between never leaves the chip. Applies where nobody else reads it, or where the op gives it, too.
    """
    known = {(*op.fuses, _keeps(op)): op for op in CONTRACTS.values() if op.fuses is not None}
    uses = program.uses()
    calls: list[Call] = []
    place: dict[str, int] = {}  # of the call that makes a value

    def joined(call: Call) -> tuple[int, Call] | None:
        """Where the first op of a pair stands whose second ``call`` is, and what takes its place."""
        for y in call.operands.values():
            made = calls[place[y]] if y in place else None
            if made is None:
                continue
            needed = len(uses[y]) > 1 or y in program.results.values()
            op = known.get((made.op, call.op, needed))
            if op is None:
                continue
            others = {k: v for k, v in call.operands.items() if v != y}
            taken = {o.name for o in op.inputs}
            if (
                not taken >= made.operands.keys() | others.keys()
            ):  # an optional one that it lacks, such as a bias
                continue
            if any(place.get(v, -1) >= place[y] for v in others.values()):  # not there yet
                continue
            kept = {k: v for k, v in made.results.items() if v != y or needed}
            operands = {**made.operands, **others}
            return place[y], Call(op.name, operands, {**call.results, **kept}, {**made.attrs, **call.attrs})
        return None

    for call in program.calls:
        at, now = joined(call) or (len(calls), call)
        calls[at : at + 1] = [now]
        place |= dict.fromkeys(now.results.values(), at)
    return program.with_calls(calls)


def _keeps(op: Contract) -> bool:
    """Whether ``op`` gives all that both give, rather than without what the second reads of the first."""
    return op.fuses is not None and len(op.outputs) == sum(len(CONTRACTS[name].outputs) for name in op.fuses)
