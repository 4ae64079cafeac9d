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

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from makeready.graphs.plan.program import Chain, Lane, LoweredProgram


class Turn(NamedTuple):
    """When a call starts; one is made for every call of every bucket, so it is cheap.

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
    lanes, joins = () if one_lane else program.lanes, sorted(program.joins)
    lane_of = {at: lane for lane in lanes for at in range(lane.first, lane.stop)}
    ends = {lane.stop for lane in lanes}
    forks = {lane.fork: -1 for lane in lanes}  # and which call that launch is in
    made: list[Turn] = []
    main = side = -1  # the last call of each lane; that of the side lane until it has joined
    for number, call in enumerate(calls):
        lane = lane_of.get(call.first)
        before = main if lane is None else side
        early = before >= 0 and not (joins and _between(joins, calls[before].first, call.first))
        if lane is not None:
            behind = (side if side >= 0 else forks[lane.fork],)
            side = number
        else:
            behind = (main,)
            if side >= 0 and call.first in ends:
                behind, early, side = (main, side), False, -1
            main = number
            if forks:
                forks |= {at: number for at in range(call.first, call.stop) if at in forks}
        made.append(Turn(behind if behind[0] >= 0 else behind[1:], early, lane is not None))
    return made


def _between(joins: Sequence[int], before: int, at: int) -> bool:
    """Whether one of ``joins``, in order, lies behind launch ``before`` and not behind launch ``at``."""
    place = bisect_right(joins, before)
    return place < len(joins) and joins[place] <= at


def in_one_lane(first: int, stop: int, lanes: Sequence[Lane]) -> bool:
    """Whether neighbouring launches are all in the main lane, or all in one run of the side lane."""
    return not any(first < edge < stop for lane in lanes for edge in (lane.first, lane.stop))
