"""Two lanes: which branches are found, where their values lie, and what may run while what runs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.graphs.plan.check_lanes import check_lanes, unordered
from makeready.graphs.plan.lanes import Turn, in_one_lane, turns
from makeready.graphs.plan.memory import Interval
from makeready.graphs.plan.program import Buffer, Chain, Lane, Launch, LoweredProgram
from makeready.graphs.plan.spec import DECODE, Bucket
from makeready.graphs.planner import lanes as finding
from makeready.graphs.planner.cuda.edges import joins
from makeready.graphs.planner.ir import KV, TEMP, Program, Value
from makeready.graphs.planner.lanes import ROOM, affordable, find_lanes
from makeready.graphs.planner.lower import _place
from makeready.kernels import registry
from makeready.kernels.spec import TensorSpec

registry.discover()
CACHE, ONE = "cache", Bucket(DECODE, 1, 1)
PRODUCT, SMALL, WRITER = "linear", "silu_mul", "mla_write"  # the last one writes its operand ``cache``


def launch(at: int, reads: Sequence[str], *, op: str = PRODUCT, op_class: int = -1) -> Launch:
    """A launch that gives ``v<at>``."""
    operands = {("cache" if v == CACHE else f"o{i}"): v for i, v in enumerate(reads)}
    return Launch(op, "reference", operands, {"y": f"v{at}"}, {}, op_class)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Launch], dict[str, int]]:
    """Launches that read what a few others gave, and bytes of each value; some write or read a cache."""
    count = draw(st.integers(4, 14))
    launches, unread = [launch(0, [])], ["v0"]
    for at in range(1, count):
        # Most take what nobody has read yet, so that branches come together again.
        some = draw(st.lists(st.sampled_from(unread), min_size=1, max_size=2, unique=True))
        others = draw(st.lists(st.integers(0, at - 1), max_size=1))
        reads = list(dict.fromkeys([*some, *(f"v{i}" for i in others)]))
        op = draw(st.sampled_from([PRODUCT, PRODUCT, PRODUCT, SMALL, WRITER]))
        if op == WRITER or draw(st.integers(0, 9)) == 0:
            reads.append(CACHE)
        if draw(st.booleans()):
            unread = [v for v in unread if v not in some] or unread
        unread.append(f"v{at}")
        launches.append(launch(at, reads, op=op))
    sizes = {f"v{at}": draw(st.sampled_from([1, 200, 256, 300, 512, 1000])) for at in range(count)}
    return launches, sizes


def laid_out(
    launches: Sequence[Launch], sizes: Mapping[str, int], pick: random.Random | None = None
) -> LoweredProgram:
    """The program in two lanes, with values at their places; branches of one launch are long enough here.

    With ``pick`` some neighbours may run as chains.
    """
    values = {n: Value(n, TensorSpec((nbytes,), "uint8"), TEMP) for n, nbytes in sizes.items()}
    values[CACHE] = Value(CACHE, TensorSpec((8,), "uint8"), KV)
    with mock.patch.object(finding, "LEAST", 1):
        order, found = find_lanes(launches, {}, {CACHE})
    program, chains = Program(DECODE, values, {}, (), {}), []
    at = 0
    while pick is not None and at < len(order):
        stop = at + pick.randint(1, 3)
        if stop - at > 1 and stop <= len(order) and in_one_lane(at, stop, found):
            chains.append(Chain(order[at], at, stop))
            at = stop
        else:
            at += 1
    buffers, _ = _place(program, order, chains, found, {}, ONE)
    return LoweredProgram(DECODE, tuple(order), buffers, chains=tuple(chains), lanes=found)


def one_by_one(program: LoweredProgram) -> list[Chain]:
    return [Chain(each, at, at + 1) for at, each in enumerate(program.launches)]


def mix(seed: str, operands: Sequence[bytes], nbytes: int) -> bytes:
    """What the toy machine computes: every byte depends on every byte of every operand."""
    digest = hashlib.blake2b(seed.encode())
    for operand in operands:
        digest.update(len(operand).to_bytes(8, "little") + operand)
    return (digest.digest() * (nbytes // 64 + 1))[:nbytes]


class Private:
    """Each value has memory of its own; launches run one after the other."""

    def __init__(self, launches: Sequence[Launch], sizes: Mapping[str, int]) -> None:
        self.values: dict[str, bytes] = {CACHE: bytes(8)}
        for each in launches:
            (made,) = each.results.values()
            given = [self.values[v] for v in each.operands.values()]
            self.values[made] = mix(made, given, sizes[made])
            if each.op == WRITER:
                self.values[CACHE] = mix(f"{made} cache", given, 8)


class Arena:
    """Values lie in one arena. A call takes time: it leaves garbage in its results when it begins, and its operands
    have to be what they were until it ends.
    """

    def __init__(
        self, program: LoweredProgram, sizes: Mapping[str, int], calls: Sequence[Chain], pick: random.Random
    ) -> None:
        self._program, self._sizes = program, sizes
        ends = (b.offset + sizes[name] for name, b in program.buffers.items())
        self._bytes = bytearray(pick.randbytes(max(ends)))
        self.values: dict[str, bytes] = {CACHE: bytes(8)}
        seen: dict[int, dict[str, bytes]] = {}
        ended: set[int] = set()
        order = turns(program, calls)
        while len(ended) < len(order):
            ready = [i for i, t in enumerate(order) if i not in seen and ended.issuperset(t.behind)]
            at = pick.choice([*ready, *(set(seen) - ended)])
            members = program.launches[calls[at].first : calls[at].stop]
            made = [v for each in members for v in each.results.values()]
            named = {v for each in members for v in each.operands.values()} - set(made)
            now = {v: self.values[CACHE] if v == CACHE else self._read(v) for v in named}
            if at not in seen:
                seen[at] = now
                for value in made:
                    self._write(value, pick.randbytes(sizes[value]))
                continue
            assert now == seen[at], f"what makes {made} lost an operand while it ran"
            for each in members:
                (value,) = each.results.values()
                given = [now[v] for v in each.operands.values()]
                self.values[value] = now[value] = mix(value, given, sizes[value])
                self._write(value, now[value])
                if each.op == WRITER:
                    self.values[CACHE] = now[CACHE] = mix(f"{value} cache", given, 8)
            ended.add(at)

    def _read(self, name: str) -> bytes:
        start = self._program.buffers[name].offset
        return bytes(self._bytes[start : start + self._sizes[name]])

    def _write(self, name: str, content: bytes) -> None:
        start = self._program.buffers[name].offset
        self._bytes[start : start + len(content)] = content


def as_calls(program: LoweredProgram) -> list[Chain]:
    """All chains of the program, and every other launch."""
    starts = {chain.first: chain for chain in program.chains}
    made, at = [], 0
    while at < len(program.launches):
        made.append(starts.get(at, Chain(program.launches[at], at, at + 1)))
        at = made[-1].stop
    return made


def as_plan(cache: str = CACHE) -> Any:
    """As much of a plan as the check reads."""
    return SimpleNamespace(
        steps={DECODE: SimpleNamespace(largest=ONE.sizes)},
        slots=(),
        kv=SimpleNamespace(parts=[SimpleNamespace(name=cache)]),
        memory=SimpleNamespace(side_scratch=0, scratch=0),
    )


def test_any_order_of_two_lanes_gives_what_private_memory_does() -> None:
    found, concurrent, chained = [], [], []

    @settings(max_examples=150)
    @given(programs(), st.integers(0, 2**32))
    def run(made: tuple[list[Launch], dict[str, int]], seed: int) -> None:
        launches, sizes = made
        program = laid_out(launches, sizes, random.Random(seed))
        assert sorted(program.launches, key=str) == sorted(launches, key=str)
        check_lanes(as_plan(), program)
        found.append(len(program.lanes))
        concurrent.append(len(list(unordered(turns(program, one_by_one(program))))))
        wanted = Private(launches, sizes).values
        for shift, calls in enumerate((one_by_one(program), as_calls(program), as_calls(program))):
            assert Arena(program, sizes, calls, random.Random(seed + shift)).values == wanted
        chained.append(sum(chain.stop > lane.fork for lane in program.lanes for chain in program.chains))

    run()
    assert sum(number > 0 for number in found) > 40, "many programs have a lane"
    assert sum(number > 1 for number in concurrent) > 40
    assert sum(number > 0 for number in chained) > 40


def test_what_is_read_early_has_ended_in_either_lane() -> None:
    """Joins are places in the one order; by edges, whoever reads before it waits starts behind the maker's end."""
    crossed: list[bool] = []

    @settings(max_examples=100)
    @given(programs(), st.randoms(use_true_random=False))
    def run(made: tuple[list[Launch], dict[str, int]], pick: random.Random) -> None:
        program = laid_out(*made)
        numbered = tuple(
            Launch(each.op, each.kernel, each.operands, each.results, {}, at)
            for at, each in enumerate(program.launches)
        )
        early = {at: set(pick.sample([*each.operands], k=pick.randint(0, len(each.operands))))
                 for at, each in enumerate(numbered)}  # fmt: skip
        program = LoweredProgram(DECODE, numbered, {}, lanes=program.lanes)
        program = LoweredProgram(DECODE, numbered, {}, lanes=program.lanes, joins=joins(program, early))
        whole: list[set[int]] = []  # by launch, what has ended when it ends
        ended: list[set[int]] = []  # when it starts
        for turn in turns(program, one_by_one(program)):
            before = [ended[b] if turn.early else whole[b] for b in turn.behind]
            ended.append(set().union(*before))
            whole.append({len(ended) - 1}.union(*(whole[b] for b in turn.behind)))
        last: dict[str, int] = {}
        for at, each in enumerate(numbered):
            for operand in early[at]:
                maker = last.get(each.operands[operand])
                if maker is not None:
                    assert maker in ended[at]
                    crossed.append(any(maker <= lane.fork < lane.first <= at for lane in program.lanes))
            written = [CACHE] if each.op == WRITER else []
            last |= dict.fromkeys([*each.results.values(), *written], at)

    run()
    assert sum(crossed) > 50


BRANCHES = [  # what launches read, and their op: a norm, routed experts, a shared one, their sum
    ([], SMALL), (["v0"], PRODUCT), (["v1"], SMALL), (["v2", "v0"], PRODUCT), (["v3"], SMALL),
    (["v0"], PRODUCT), (["v5"], SMALL), (["v6"], PRODUCT), (["v4", "v7"], SMALL), (["v8"], PRODUCT),
]  # fmt: skip


def layer(**changed: tuple[list[str], str]) -> list[Launch]:
    """:data:`BRANCHES` but for what is changed, by value."""
    given = [changed.get(f"v{at}", each) for at, each in enumerate(BRANCHES)]
    return [launch(at, reads, op=op) for at, (reads, op) in enumerate(given)]


def found(launches: Sequence[Launch]) -> list[tuple[str, list[str]]]:
    """What each side lane forks from and what it makes."""
    order, lanes = find_lanes(launches, {}, {CACHE})
    assert {each.results["y"] for each in order} == {each.results["y"] for each in launches}
    name = [each.results["y"] for each in order]
    return [(name[lane.fork], name[lane.first : lane.stop]) for lane in lanes]


def test_the_shorter_branch_is_the_side_lane() -> None:
    assert found(layer()) == [("v0", ["v5", "v6", "v7"])]
    order, lanes = find_lanes(layer(), {}, ())
    assert (order, lanes) == (layer(), (Lane(0, 5, 8),)), "nothing moves where both are neighbours already"


def test_a_branch_among_others_is_put_before_its_join() -> None:
    mixed = [layer()[at] for at in (0, 5, 1, 2, 6, 3, 7, 4, 8, 9)]
    order, lanes = find_lanes(mixed, {}, ())
    assert [each.results["y"] for each in order] == [f"v{at}" for at in range(10)]
    assert lanes == (Lane(0, 5, 8),)


@pytest.mark.parametrize(
    ("why", "changed"),
    [
        ("two launches are too few", {"v7": (["v5"], PRODUCT), "v6": (["v4"], SMALL)}),
        ("it has no products", {"v5": (["v0"], SMALL), "v7": (["v6"], SMALL)}),
        ("both name a cache", {"v2": (["v1", CACHE], WRITER), "v6": (["v5", CACHE], SMALL)}),
        ("the other one works for it alone", {"v5": (["v4"], PRODUCT), "v8": (["v7"], SMALL)}),
    ],
)
def test_what_is_no_branch(why: str, changed: dict[str, tuple[list[str], str]]) -> None:
    assert not found(layer(**changed)), why


def test_one_lane_may_have_the_cache() -> None:
    assert found(layer(v2=(["v1", CACHE], WRITER))) == [("v0", ["v5", "v6", "v7"])]
    # What is written before the fork and read behind the join is nobody's business.
    assert found(layer(v0=([CACHE], WRITER), v9=(["v8", CACHE], PRODUCT)))


def test_parts_of_a_program_start_behind_what_they_hold() -> None:
    program = LoweredProgram(DECODE, tuple(layer()), {}, lanes=(Lane(0, 5, 8),), joins=(3, 7))
    whole = turns(program, one_by_one(program))
    assert [turn.behind for turn in whole] == [
        (), (0,), (1,), (2,), (3,), (0,), (5,), (6,), (4, 7), (8,),
    ]  # fmt: skip
    assert [turn.early for turn in whole][1:] == [True, True, False, True, False, True, False, False, True]
    assert [at for at, turn in enumerate(whole) if turn.side] == [5, 6, 7]
    tail = turns(program, one_by_one(program)[6:])
    assert [turn.behind for turn in tail] == [(), (0,), (1,), (2,)]
    assert tail[2] == Turn((1,), False, False), "the main lane's part is not here"
    both = turns(program, one_by_one(program)[4:])
    assert [turn.behind for turn in both] == [(), (), (1,), (2,), (0, 3), (4,)]


def test_what_joins_may_fork_again() -> None:
    launches = tuple(launch(at, []) for at in range(6))
    program = LoweredProgram(DECODE, launches, {}, lanes=(Lane(0, 2, 3), Lane(3, 5, 6)))
    whole = turns(program, one_by_one(program))
    assert [turn.behind for turn in whole] == [(), (0,), (0,), (1, 2), (3,), (3,)]
    assert [turn.behind for turn in turns(program, one_by_one(program), one_lane=True)] == [
        (), (0,), (1,), (2,), (3,), (4,),
    ]  # fmt: skip


def test_a_chain_with_the_fork_is_what_the_side_lane_starts_behind() -> None:
    program = LoweredProgram(DECODE, tuple(layer()), {}, lanes=(Lane(0, 5, 8),))
    single = one_by_one(program)
    calls = [Chain(single[0].launch, 0, 3), *single[3:5], Chain(single[5].launch, 5, 7), single[7],
             Chain(single[8].launch, 8, 10)]  # fmt: skip
    assert [turn.behind for turn in turns(program, calls)] == [(), (0,), (1,), (0,), (3,), (2, 4)]


def test_places_are_kept_apart_only_where_lanes_are() -> None:
    launches, sizes = layer(), {f"v{at}": 256 for at in range(10)}
    program = laid_out(launches, sizes)

    def span(name: str) -> tuple[int, int]:
        buffer: Buffer = program.buffers[name]
        return buffer.first, buffer.last

    assert [span(f"v{at}") for at in (5, 6, 7)] == [(1, 7), (1, 7), (1, 8)]
    assert [span(f"v{at}") for at in (0, 1, 2, 8)] == [(0, 7), (1, 2), (2, 3), (8, 9)]


def test_lanes_that_take_much_of_the_arena_are_left_out() -> None:
    """By launch, what is held in one lane, and what a lane's own values add meanwhile."""
    launches, lane = layer(), Lane(0, 5, 8)
    size = 16 * ROOM

    def kept(side: int, elsewhere: int) -> bool:
        """Where the side lane's values take ``side`` each, and something at the end of the step ``elsewhere``."""
        spans = {f"v{at}": (size if at < 5 else side, at, at + 1) for at in range(10)}
        spans |= {"v0": (size, 0, 5), "v9": (elsewhere, 9, 9)}
        held = {n: Interval(n, nbytes, first, last) for n, (nbytes, first, last) in spans.items()}
        alive = max(
            sum(i.nbytes for i in held.values() if i.first <= at <= i.last) for at in range(len(launches))
        )
        return affordable((lane,), launches, {}, held, alive) == (lane,)

    # Beside the routed branch, which holds three values of ``size``, the side lane adds three of its own.
    assert kept(ROOM, 0)
    assert kept(size // 16 - 256, 0)
    assert not kept(size // 16 + 256, 0)
    assert not kept(size, 4 * size)
    assert kept(size, 5 * size), "launch 9 holds as much anyway"
