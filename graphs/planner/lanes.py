"""Independent branches of a program, found by what launches read and write, that two lanes may run beside each other.

A branch ends in a launch whose results one other takes, the join, and holds whatever works for that launch alone: no
op is known by name. What runs beside it is all else between the last launch that it needs, the fork, and the join.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from makeready.graphs.plan.memory import Interval, align
from makeready.graphs.plan.program import Lane, Launch
from makeready.kernels.contract import CONTRACTS

# Launches of a branch. Forking and joining takes two edges over which no kernel starts early, about what two small
# launches take; and a branch that goes beyond a layer is the residual stream.
LEAST, MOST = 3, 24
SHARE, ROOM = 1 / 16, 64 << 20  # what lanes may add to the arena: a part of it, or bytes if that is more


@dataclass(frozen=True)
class _Branch:
    """Launches that may run beside others: all between ``fork`` and ``join`` that are not ``launches``."""

    fork: int
    join: int
    launches: tuple[int, ...]
    beside: tuple[int, ...]

    @property
    def before(self) -> int:
        """The launch behind which order changes."""
        return min(self.fork, self.launches[0] - 1)


def find_lanes(
    launches: Sequence[Launch], bases: Mapping[str, str], lasting: Collection[str]
) -> tuple[list[Launch], tuple[Lane, ...]]:
    """``launches`` in an order in which each branch stands right before its join, and those branches.

    Args:
        bases: of the values that are views, what they are columns of.
        lasting: values that last from step to step and that launches may write, such as caches.
    """
    names = [
        {bases.get(v, v) for v in (*launch.operands.values(), *launch.results.values())}
        for launch in launches
    ]
    needs = _needs(launches, bases, lasting)
    users: list[list[int]] = [[] for _ in launches]
    for at, needed in enumerate(needs):
        for other in needed:
            users[other].append(at)
    found = (_branch(end, join, needs, users) for join, needed in enumerate(needs) for end in needed)
    kept = set(lasting)
    branches = [b for b in found if b is not None and _worthwhile(b, launches) and not _meet(b, names, kept)]
    chosen: list[_Branch] = []
    for branch in sorted(branches, key=_rank):
        if all(branch.join <= other.before or other.join <= branch.before for other in chosen):
            chosen.append(branch)
    return _ordered(launches, sorted(chosen, key=lambda branch: branch.join))


def _needs(launches: Sequence[Launch], bases: Mapping[str, str], lasting: Collection[str]) -> list[set[int]]:
    """By launch, those before it that it cannot change places with."""
    made: dict[str, int] = {}  # by value, who gives or last writes it
    readers: dict[str, list[int]] = {}  # of a lasting value, since it was last written
    needs: list[set[int]] = []
    for at, launch in enumerate(launches):
        read = {bases.get(v, v) for v in launch.operands.values()}
        written = {launch.operands[o] for o in CONTRACTS[launch.op].writes if o in launch.operands}
        needed = {made[value] for value in read if value in made}
        for value in written:
            needed |= set(readers.pop(value, ()))
        for value in read.intersection(lasting) - written:
            readers.setdefault(value, []).append(at)
        made |= dict.fromkeys((*launch.results.values(), *written), at)
        needs.append(needed)
    return needs


def _branch(end: int, join: int, needs: Sequence[set[int]], users: Sequence[list[int]]) -> _Branch | None:
    """What works for the launch ``end`` alone, which nobody needs before ``join``, where that needs others, too."""
    if users[end][0] < join:
        return None
    inside, fork, waiting = {end}, -1, [-other for other in needs[end]]
    waiting.sort()
    while waiting:  # the latest first, so that all who need it are known
        other = -heappop(waiting)
        if other in inside:
            continue
        if not inside.issuperset(users[other]):
            fork = max(fork, other)
            continue
        inside.add(other)
        if len(inside) > MOST:
            return None
        for needed in needs[other]:
            heappush(waiting, -needed)
    beside = tuple(at for at in range(fork + 1, join) if at not in inside)
    if fork < 0 or needs[join].isdisjoint(beside):
        return None
    return _Branch(fork, join, tuple(sorted(inside)), beside)


def _worthwhile(branch: _Branch, launches: Sequence[Launch]) -> bool:
    """Whether both sides have enough to do: some launches, products among them."""
    return all(
        LEAST <= len(side) <= MOST and any(CONTRACTS[launches[at].op].rate is not None for at in side)
        for side in (branch.launches, branch.beside)
    )


def _meet(branch: _Branch, names: Sequence[set[str]], lasting: set[str]) -> bool:
    """Whether both sides name something that lasts. A plan does not say which operands a kernel writes, so what
    both name might be written by one (graphs/plan/check_lanes.py).
    """
    one, other = (set().union(*(names[at] for at in side)) for side in (branch.launches, branch.beside))
    return bool(one & other & lasting)


def _rank(branch: _Branch) -> tuple[int, int, int]:
    """First where most is hidden; of both branches of one join the shorter one is the side lane."""
    return -min(len(branch.launches), len(branch.beside)), len(branch.launches), branch.join


def _ordered(
    launches: Sequence[Launch], branches: Sequence[_Branch]
) -> tuple[list[Launch], tuple[Lane, ...]]:
    moved = {at for branch in branches for at in branch.launches}
    by_join = {branch.join: branch for branch in branches}
    order: list[int] = []
    for at in range(len(launches)):
        if at in by_join:
            order += by_join[at].launches
        if at not in moved:
            order.append(at)
    place = {old: new for new, old in enumerate(order)}
    lanes = tuple(Lane(place[b.fork], place[b.launches[0]], place[b.launches[-1]] + 1) for b in branches)
    return [launches[at] for at in order], lanes


def affordable(
    lanes: Sequence[Lane],
    launches: Sequence[Launch],
    bases: Mapping[str, str],
    held: Mapping[str, Interval],
    nbytes: int,
) -> tuple[Lane, ...]:
    """Those of ``lanes`` that take little more of the arena than launches one after the other.

    Args:
        held: by value of the arena, when it is needed in one lane.
        nbytes: of the arena in one lane.
    """
    live = [0] * len(launches)
    for value in held.values():
        for at in range(value.first, value.last + 1):
            live[at] += align(value.nbytes)
    kept = []
    for lane in lanes:
        meanwhile = range(lane.fork + 1, lane.stop)
        most = {at: live[at] for at in meanwhile}
        members = launches[lane.first : lane.stop]
        names = {v for each in members for v in (*each.operands.values(), *each.results.values())}
        for name in {bases.get(v, v) for v in names} & held.keys():
            value = held[name]
            for at in meanwhile:
                if not value.first <= at <= value.last:
                    most[at] += align(value.nbytes)
        if max(most.values()) <= nbytes + max(SHARE * nbytes, ROOM):
            kept.append(lane)
    return tuple(kept)


def meanwhile(lanes: Sequence[Lane], launches: Sequence[Launch]) -> Iterator[tuple[int, int, str]]:
    """First and last launch beside a run of the side lane, and a value that its launches name: all are alive from one
    to the other, as any launch of one lane may run at the same time as any of the other.
    """
    for lane in lanes:
        for launch in launches[lane.first : lane.stop]:
            for value in (*launch.operands.values(), *launch.results.values()):
                yield lane.fork + 1, lane.stop - 1, value
