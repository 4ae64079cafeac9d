"""Which calls of a step start behind which: the edges of its graph.

Launches have one order, in which the CPU runs them. On a GPU a program may have a side lane beside the main one: runs
of launches (:class:`~makeready.graphs.plan.program.Lane`) that fork from the main lane and join it again. A call
starts behind the one before it in its lane; edges between lanes are added where a run forks and where it joins:

    main  ── fork ── a ── b ── c ── join ──
                └──── x ── y ────────┘

Kernels may start early behind the one before them in their lane, but not where lanes fork or join: there they wait
for whole kernels. So what was made ahead of a fork has ended when the side lane starts, and what either lane made has
ended when both have joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from makeready.graphs.plan.program import Chain, Lane, LoweredProgram


@dataclass(frozen=True)
class Turn:
    """When a call starts.

    Attributes:
        behind: numbers of the calls that it starts behind, that of its own lane first.
        early: whether a kernel that waits by itself may start before what it is behind has ended.
        side: whether it is in the side lane.
    """

    behind: tuple[int, ...]
    early: bool
    side: bool


def turns(program: LoweredProgram, calls: Sequence[Chain], *, one_lane: bool = False) -> list[Turn]:
    """When each of ``calls`` starts, which are what some launches of ``program`` run as (``program.calls``).

    Where they are a part of a step, edges to the others are left out: those before them have ended, and those behind
    them start when all have ended. In ``one_lane`` they start one behind the other, which is always possible.
    """
    lanes = () if one_lane else program.lanes
    lane_of = {at: lane for lane in lanes for at in range(lane.first, lane.stop)}
    ends = {lane.stop for lane in lanes}
    forks = {lane.fork: -1 for lane in lanes}  # and which call that launch is in
    made: list[Turn] = []
    main = side = -1  # the last call of each lane; that of the side lane until it has joined
    for number, call in enumerate(calls):
        lane = lane_of.get(call.first)
        if lane is None:
            behind = [main, side if call.first in ends else -1]
            early = behind[1] < 0 and not _joined(program, calls, main, call)
        else:
            behind = [side if side >= 0 else forks[lane.fork]]
            early = side >= 0 and not _joined(program, calls, side, call)
        made.append(Turn(tuple(other for other in behind if other >= 0), early, lane is not None))
        if lane is not None:
            side = number
            continue
        main = number
        if call.first in ends:
            side = -1
        for at in range(call.first, call.stop):
            if at in forks:
                forks[at] = number
    return made


def _joined(program: LoweredProgram, calls: Sequence[Chain], before: int, call: Chain) -> bool:
    """Whether a join lies between a call and the one before it in its lane."""
    return before >= 0 and any(calls[before].first < join <= call.first for join in program.joins)


def in_one_lane(first: int, stop: int, lanes: Sequence[Lane]) -> bool:
    """Whether neighbouring launches are all in the main lane, or all in one run of the side lane."""
    return not any(first < edge < stop for lane in lanes for edge in (lane.first, lane.stop))
