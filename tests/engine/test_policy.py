"""Orders of admission, each against its definition."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_executable import FakeExecutable, alone, buckets_of
from hypothesis import given
from hypothesis import strategies as st

from makeready.engine.kv.pool import PagePool
from makeready.engine.kv.radix import PrefixCache
from makeready.engine.loop import Engine
from makeready.engine.options import FCFS, POLICIES, PRIORITY, SchedulerOptions
from makeready.engine.policy import WINDOW, WaitingQueue
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.graphs.plan.spec import Limits

SIZE = 2


def sequence(prompt: list[int], count: int = 4, **fields: Any) -> TokenSequence:
    return TokenSequence(prompt, SamplingParams(max_new_tokens=count), 0, frozenset(), **fields)


def cached(*prompts: list[int]) -> PrefixCache:
    """A cache that holds some prompts."""
    cache = PrefixCache(PagePool(500), SIZE)
    for prompt in prompts:
        pages = len(prompt) // SIZE
        cache.release(cache.insert(cache.acquire([]), prompt[: pages * SIZE], [cache.pool.take(pages)]))
    return cache


def queue(policy: str, sequences: list[TokenSequence], cache: PrefixCache, **options: Any) -> WaitingQueue:
    made = WaitingQueue(SchedulerOptions(policy=policy, **options), cache, SIZE)
    for each in sequences:
        made.add(each)
    return made


def test_by_output_by_priority_and_by_arrival() -> None:
    sequences = [
        sequence([1], count, priority=priority) for count, priority in ((3, 1), (9, 0), (3, 5), (4, 5))
    ]
    order = {policy: queue(policy, sequences, cached()).order(9) for policy in ("fcfs", "lof", "priority")}
    places = {policy: [sequences.index(each) for each in made] for policy, made in order.items()}
    assert places == {"fcfs": [0, 1, 2, 3], "lof": [1, 3, 0, 2], "priority": [2, 3, 0, 1]}


def test_random_repeats_with_its_seed() -> None:
    orders = []
    for seed in (1, 1, 2):
        sequences = [sequence([1]) for _ in range(20)]
        made = queue("random", sequences, cached(), random_seed=seed).order(20)
        orders.append([sequences.index(each) for each in made])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(20)) != orders[2]


def test_the_longest_cached_prefix_first() -> None:
    cache = cached([1, 2, 3, 4, 5, 6], [1, 2, 7, 8])
    prompts = [[9, 9, 9], [1, 2, 7, 8, 1], [1, 2, 3, 4, 5, 6, 1], [1, 2, 5, 5], [1, 2, 3, 4, 5, 6]]
    sequences = [sequence(prompt) for prompt in prompts]
    made = queue("lpm", sequences, cache).order(9)
    # The last token of a prompt is run whatever is cached: [1..6] can use two pages only.
    assert [sequences.index(each) for each in made] == [2, 1, 4, 3, 0]


def test_depth_first_where_most_wait() -> None:
    cache = cached([1, 1, 2, 2], [1, 1, 3, 3], [4, 4, 5, 5], [4, 4, 6, 6])
    a = [[1, 1, 2, 2, 0], [1, 1, 3, 3, 0]]  # under 1: two
    b = [[4, 4, 5, 5, 0], [4, 4, 0], [4, 4, 6, 6, 0], [4, 4, 6, 6, 1]]  # under 4: four, two of them under 6
    sequences = [sequence(prompt) for prompt in [[7, 7, 7], *a, *b]]
    made = [sequences.index(each) for each in queue("dfs-weight", sequences, cache).order(9)]
    assert made[:4] == [
        5,
        6,
        3,
        4,
    ]  # the heaviest branch first, and in it its heaviest; then those it ends for
    assert set(made[4:6]) == {1, 2}
    assert made[6] == 0


@given(st.integers(0, 2**32))
def test_depth_first_keeps_branches_together(seed: int) -> None:
    """Against a tree that is walked: every node's sequences are next to each other, heavy children first."""
    rng = random.Random(seed)
    stems = [[rng.randrange(2) for _ in range(8)] for _ in range(6)]
    cache = cached(*stems)
    sequences = [sequence([*rng.choice(stems)[: rng.randint(1, 8)], 5]) for _ in range(20)]
    made = queue("dfs-weight", sequences, cache).order(20)
    paths = [tuple(r.prompt[: cache.match(r.prompt[:-1])]) for r in made]

    def walk(node: tuple[int, ...], rows: list[tuple[int, ...]]) -> None:
        ends = [row == node for row in rows]
        assert ends == sorted(ends), "those that end at a node come behind those that go on"
        children = [row[: len(node) + SIZE] for row in rows if row != node]
        runs = [child for i, child in enumerate(children) if i == 0 or child != children[i - 1]]
        assert len(set(runs)) == len(runs), "a branch is left before all of it is done"
        weights = [children.count(child) for child in runs]
        assert weights == sorted(weights, reverse=True)
        for child in runs:
            walk(child, [row for row in rows if row[: len(child)] == child])

    walk((), paths)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != FCFS])
def test_nobody_is_passed_over_for_ever(policy: str) -> None:
    """An endless stream of sequences that the policy likes better; the disliked one comes at its bound."""
    limits = Limits(max_rows=2, max_tokens=16, context_len=40, page_size=SIZE)
    options = SchedulerOptions(policy=policy, max_wait=10, preemption_threshold=1)
    engine = Engine(FakeExecutable(limits, buckets_of(limits), 60), options)
    likes = [9] * 20
    engine.submit(sequence(likes, 4, priority=5))
    engine.step()
    disliked = sequence([1, 2, 3], 2, priority=0)
    engine.submit(disliked)
    admitted = 0
    while not disliked.done:
        while len(engine.scheduler.waiting) < 6:
            engine.submit(sequence([*likes, 3], 8, priority=5))
            admitted += 1
        engine.step()
        assert admitted < 40, "it starves"
    assert disliked.output == alone([1, 2, 3], 0, 2, frozenset())
    assert disliked.passed_over <= 10


def test_windows_bound_the_looks_into_the_cache() -> None:
    cache = cached([1, 2, 3, 4])
    sequences = [sequence([9, 9, 9]) for _ in range(WINDOW)] + [sequence([1, 2, 3, 4, 5])]
    assert sequences[-1] not in queue("lpm", sequences, cache).order(WINDOW + 1)


def test_priority_takes_the_place_of_who_is_lower_by_the_threshold() -> None:
    limits = Limits(max_rows=1, max_tokens=16, context_len=40, page_size=SIZE)
    for threshold, makes_way in ((3, True), (4, False)):
        options = SchedulerOptions(policy=PRIORITY, preemption_threshold=threshold)
        engine = Engine(FakeExecutable(limits, buckets_of(limits), 60), options)
        low, high = sequence([1, 2, 3], 12, priority=1), sequence([4, 5], 3, priority=4)
        engine.submit(low)
        for _ in range(5):
            engine.step()
        engine.submit(high)
        ended = []
        while engine.busy:
            ended += engine.step()
        assert (ended == [high, low]) == makes_way
        assert low.retractions == (1 if makes_way else 0)
        for each, count in ((low, 12), (high, 3)):
            assert each.output == alone(each.prompt, 0, count, frozenset())


def test_the_queue_keeps_its_orders_while_requests_come_and_go() -> None:
    rng = random.Random(5)
    for policy in ("fcfs", "lof", "random", "priority"):
        made = WaitingQueue(SchedulerOptions(policy=policy), None, SIZE)
        inside: list[TokenSequence] = []
        for _ in range(400):
            if inside and rng.random() < 0.45:
                gone = inside.pop(rng.randrange(len(inside)))
                assert gone in made
                made.remove(gone)
                assert gone not in made
                if rng.random() < 0.3:  # sent back to wait
                    made.add(gone)
                    inside.append(gone)
            else:
                inside.append(sequence([1], rng.randint(1, 9), priority=rng.randint(0, 3)))
                made.add(inside[-1])
            inside.sort(key=lambda each: each.ticket)
            assert list(made) == inside
            assert set(made.order(10**6)) == set(inside)
            key = {"lof": lambda r: -r.sampling.max_new_tokens, "priority": lambda r: -r.priority}.get(policy)
            if key is not None:
                assert made.order(10**6) == sorted(inside, key=lambda r: (key(r), r.ticket))
