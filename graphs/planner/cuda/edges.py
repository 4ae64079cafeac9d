"""Which kernels may start before the one ahead of them has ended, where that is not theirs alone to say.

A dependent kernel waits, on the device, for the kernel ahead of it, which has waited for the one ahead of that, and
so for all of them. A launch states which operands its kernel reads before this wait (``early``). Parameters are in
memory from the start. For any other early operand the launch behind the one that makes it is a join: it starts when
all kernels before it have ended, and so does every launch behind it, the reader included. In two lanes that holds of
each, and what one lane reads of the other is behind a fork or a join, over which nothing starts early.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from makeready.graphs.plan.program import LoweredProgram
from makeready.kernels.contract import CONTRACTS

if TYPE_CHECKING:
    from makeready.graphs.planner.cuda.offers import Offer


def early_operands(offers: Iterable[Offer]) -> set[str]:
    """Operands that a kernel of one of ``offers`` reads before it waits."""
    return {name for offer in offers for launch in offer.candidate.launches for name in launch.early}


def joins(program: LoweredProgram, early: Mapping[int, Collection[str]]) -> tuple[int, ...]:
    """Positions of launches that start only when all before them have ended.

    Args:
        early: by class the operands that one of its kernels may read before it waits.
    """
    made: dict[str, int] = {}  # by value the last launch that gives or writes it
    found: list[int] = []
    readers: dict[int, list[Mapping[str, str]]] = {}
    for at, launch in enumerate(program.launches):
        named = {
            name: launch.operands[name] for name in early.get(launch.op_class, ()) if name in launch.operands
        }
        readers.setdefault(at, []).append(named)
    for chain in program.chains:
        operands = chain.launch.operands
        named = {name: operands[name] for name in early.get(chain.launch.op_class, ()) if name in operands}
        readers[chain.first].append(named)
    for at, launch in enumerate(program.launches):
        for named in readers[at]:
            last = max((_maker(program, value, made, at) for value in named.values()), default=-1)
            if last >= 0 and not any(last < join <= at for join in found):
                found.append(last + 1)
        written = (launch.operands[name] for name in CONTRACTS[launch.op].writes if name in launch.operands)
        made |= dict.fromkeys((*launch.results.values(), *written), at)
    return tuple(found)


def _maker(program: LoweredProgram, value: str, made: Mapping[str, int], at: int) -> int:
    """The launch that ``value`` comes from, -1 where none made it; the one before for columns of something wider."""
    buffer = program.buffers.get(value)
    return at - 1 if buffer is not None and buffer.row_stride is not None else made.get(value, -1)
