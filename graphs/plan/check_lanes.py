"""Whether launches that may run at once leave each other alone, proved from the edges of a step's graph.

It goes by the edges that graphs are built of (graphs/plan/lanes.py) and by places in memory alone, not by what the
planner thought when it chose lanes and places: of any two calls without a way along edges from one to the other, none
may write what the other reads or writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from makeready.graphs.plan.lanes import Turn, in_one_lane, turns
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Chain, Launch, LoweredProgram
from makeready.graphs.plan.rules import need
from makeready.kernels.spec import DTYPE_BYTES


def check_lanes(plan: Plan, program: LoweredProgram) -> None:
    """Lanes are runs of launches behind each other, and no two launches that may run at once get in each other's way.

    That is proved of launches one by one. A chain touches no more than its launches, which are all in one lane, and
    starts behind all that they start behind; so what may run beside it may run beside each of them.
    """
    phase, end = program.phase, 0
    for lane in program.lanes:
        need(
            end <= lane.fork < lane.first - 1 and lane.first < lane.stop <= len(program.launches),
            f"{phase}: the side lane has launches {lane.first} to {lane.stop} behind {lane.fork}, which do not fork",
        )
        end = lane.stop
    for chain in program.chains:
        need(
            in_one_lane(chain.first, chain.stop, program.lanes),
            f"{phase}: the chain {chain.launch.op} of launches {chain.first} to {chain.stop} is in two lanes",
        )
    if not program.lanes:
        return
    memory, uses = _Memory(plan, program), dict[int, _Use]()
    order = turns(program, [Chain(launch, at, at + 1) for at, launch in enumerate(program.launches)])
    for pair in unordered(order):
        for at in pair:
            if at not in uses:
                uses[at] = memory.use(program.launches[at], side=order[at].side)
        one, other = pair
        need(
            not uses[one].meets(uses[other]),
            f"{phase}: launches {one} ({program.launches[one].op}) and {other} ({program.launches[other].op}) "
            "may run at once, and one writes what the other has",
        )


def unordered(order: Sequence[Turn]) -> Iterator[tuple[int, int]]:
    """Numbers of two calls, the earlier first, without a way along edges from one to the other."""
    before: list[int] = []  # by call, a bit for each that has ended when it starts
    for at, turn in enumerate(order):
        ended = 0
        for other in turn.behind:
            ended |= before[other] | 1 << other
        before.append(ended)
        beside = ((1 << at) - 1) & ~ended
        while beside:
            lowest = beside & -beside
            beside ^= lowest
            yield lowest.bit_length() - 1, at


@dataclass
class _Use:
    """What a launch touches: bytes of the arena, and by name what lies elsewhere."""

    read: set[tuple[int, int]] = field(default_factory=set)
    written: set[tuple[int, int]] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    def meets(self, other: _Use) -> bool:
        """Whether one of both writes what the other touches."""
        return any(
            one.changed & (two.named | two.changed)
            or any(a < d and c < b for a, b in one.written for c, d in two.read | two.written)
            for one, two in ((self, other), (other, self))
        )


class _Memory:
    """What launches touch in a program's largest bucket, whose places hold those of all."""

    def __init__(self, plan: Plan, program: LoweredProgram) -> None:
        sizes: Mapping[str, int] = plan.steps[program.phase].largest
        self._places = {}
        for name, buffer in program.buffers.items():
            shape, width = buffer.spec.at(sizes), DTYPE_BYTES[buffer.spec.dtype]
            nbytes = buffer.spec.nbytes(sizes)
            if buffer.row_stride is not None:
                nbytes = ((shape[0] - 1) * buffer.row_stride + shape[1]) * width
            self._places[name] = (buffer.offset, buffer.offset + nbytes)
        # What lasts might be written by whoever names it: a plan does not say which operands a kernel writes.
        self._lasting = {f.name for f in plan.slots} | {part.name for part in plan.kv.parts}
        self._scratch = {
            index
            for index, op_class in enumerate(program.classes)
            for ways in op_class.candidates.values()
            if any(a.kind == "scratch" for way in ways for node in way.nodes for a in node.arguments)
        }
        self._side = plan.memory.side_scratch > 0

    def use(self, launch: Launch, *, side: bool) -> _Use:
        """What ``launch`` touches in the ``side`` lane or the main one."""
        use = _Use()
        for names, places, others in (
            (launch.operands, use.read, use.named),
            (launch.results, use.written, use.changed),
        ):
            for value in names.values():
                if value in self._places:
                    places.add(self._places[value])
                else:
                    (use.changed if value in self._lasting else others).add(value)
        if launch.op_class in self._scratch:
            use.changed.add("scratch of the side lane" if side and self._side else "scratch")
        return use
