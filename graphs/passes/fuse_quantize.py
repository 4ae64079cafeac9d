"""Quantizing what a norm or an activation function just made becomes part of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from makeready.graphs.planner.ir import Call, Program
from makeready.kernels.contract import CONTRACTS


def fuse_quantize(program: Program) -> Program:
    """``quantize(f(x))`` → ``f_quantize(x)`` for every op whose contract ``fuses`` the two.

    The wide value never leaves the chip. Applies where nobody else reads it. Of three ops in a row the first two
    become one.
    """
    known = {op.fuses: op for op in CONTRACTS.values() if op.fuses is not None}
    producers, uses = program.producers(), program.uses()
    fused: dict[int, Call] = {}  # identity of the producer → what takes its place
    gone: set[int] = set()
    for call in program.calls:
        for y in call.operands.values():
            made = producers.get(y)
            op = known.get((made.op, call.op)) if made is not None else None
            if made is None or op is None or len(uses[y]) > 1 or y in program.results.values():
                continue
            first = made.contract.outputs[0].name
            others = {k: v for k, v in call.operands.items() if v != y}
            taken = id(made) in fused or id(made) in gone
            if made.results[first] != y or taken or not _before(program, made, others):
                continue
            kept = {k: v for k, v in made.results.items() if k != first}
            fused[id(made)] = Call(
                op.name,
                {**made.operands, **others},
                {**call.results, **kept},
                {**made.attrs, **call.attrs},
            )
            gone.add(id(call))
            break
    return program.with_calls([fused.get(id(c), c) for c in program.calls if id(c) not in gone])


def _before(program: Program, at: Call, operands: Mapping[str, str]) -> bool:
    """Whether the values are there when ``at`` runs."""
    if not operands:
        return True
    later = itertools.dropwhile(lambda call: call is not at, program.calls)
    return not {v for call in later for v in call.results.values()} & set(operands.values())
