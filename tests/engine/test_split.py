"""How memory is split between pages and states, and that rows never wait for a state that only the cache has."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_executable import FakeExecutable, alone

from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, CacheGroup, CacheSpec, KVPart, Limits, Split

PAGE, TOKEN, STATE = 16, 20, 5000  # tokens of a page, bytes of a token and of a state
CONTEXT = 4096


def cache(context: int, snapshots: int | None = None, state: int = STATE) -> CacheSpec:
    pages = CacheGroup("kv", (KVPart("kv", (PAGE, TOKEN), "int8"),), PAGE)
    states = CacheGroup("state", (KVPart("state", (state,), "int8"),), None)
    return CacheSpec(PAGE, (pages, states), context, snapshots)


def limits(rows: int, context_len: int = CONTEXT) -> Limits:
    return Limits(max_rows=rows, max_tokens=256, context_len=context_len, page_size=PAGE)


def bought(nbytes: int, rows: int, context: int, snapshots: int | None) -> tuple[int, int, int]:
    """Pages (the null page too), rows and snapshots that memory buys, page after page.

    Sequences get the pages of their context one after the other: the rows first, then what is cached, which begins
    where a row of full context has its pages. The first row's states are there from the start, those of another
    sequence come with its last page.
    """
    kept = snapshots or 0
    left = nbytes - PAGE * TOKEN - STATE * (1 + 2 + kept)
    pages, served, sequence, its = 1, 1, 1, 0
    while left >= 0:
        its += sequence <= rows or (pages - 1) * PAGE >= CONTEXT
        whole = its > 0 and its * PAGE >= context
        states = 0
        if whole and 1 < sequence <= rows:
            states = 2
        elif whole and sequence > rows and snapshots is None:
            states = 1
        left -= PAGE * TOKEN + STATE * states
        if left < 0:
            break
        pages += 1
        served += states == 2
        kept += states == 1
        if whole:
            sequence, its = sequence + 1, 0
    return pages if pages > 1 else 0, served, kept


@pytest.mark.parametrize("snapshots", [None, 0, 3])
@pytest.mark.parametrize("context", [1, 16, 100, 1024])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_memory_is_split_by_rows_and_context(rows: int, context: int, snapshots: int | None) -> None:
    kv, most = cache(context, snapshots), limits(rows)
    rng = random.Random(rows * context)
    for nbytes in [*range(0, 60_000, 997), *(rng.randrange(2_000_000) for _ in range(40))]:
        pages, served, kept = bought(nbytes, rows, context, snapshots)
        assert kv.pages_in(nbytes, most) == pages
        if not pages:
            continue
        assert kv.split(pages, most) == Split(served, kept)
        blocks = kv.blocks(pages, most)
        assert blocks == {"kv": pages, "state": 1 + 2 * served + kept}
        assert kv.nbytes(pages, most) == pages * PAGE * TOKEN + blocks["state"] * STATE <= nbytes
        assert kv.pages_in(kv.nbytes(pages, most), most) == pages


def test_a_context_beyond_the_plans_is_the_plans() -> None:
    assert cache(9999).split(1000, limits(2, 64)) == cache(64).split(1000, limits(2, 64))


def test_the_fewest_pages_with_states_of_so_many_rows() -> None:
    kv, most = cache(100), limits(9)
    for rows in range(1, 10):
        pages = kv.pages_of_rows(rows, most)
        assert kv.split(pages, most).rows == rows
        assert rows == 1 or kv.split(pages - 1, most).rows == rows - 1


def engine_of(rows: int, snapshots: int) -> Engine:
    few = limits(rows, 64)
    kv = CacheSpec(PAGE, (CacheGroup("kv", (), PAGE), CacheGroup("state", (), None)), 64, snapshots)
    blocks = kv.blocks(400, few)  # pages never run out
    assert blocks["state"] == 1 + 2 * rows + snapshots
    buckets = [Bucket(DECODE, rows, rows), Bucket(EXTEND, rows, 256)]
    return Engine(
        FakeExecutable(few, buckets, 400, cache=kv, blocks=blocks), SchedulerOptions(overlap=bool(snapshots))
    )


@pytest.mark.parametrize("snapshots", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_snapshots_go_before_a_row_waits(rows: int, snapshots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps hold all prompts of all rows, so who waits behind a step finds every row taken; the cache is full of
    states most of the time, and each row takes a second one at its page border."""
    engine, rng = engine_of(rows, snapshots), random.Random(10 * rows + snapshots)
    states: Any = engine.pools.states[0].pool
    stems = [[rng.randrange(50) for _ in range(40)] for _ in range(3)]
    sequences, full = [], 0
    scheduler, choose = engine.scheduler, engine.scheduler.next

    def checked() -> Any:
        batch = choose()
        assert not (scheduler.waiting and scheduler.seats.free), "a row waits while there is a seat"
        return batch

    monkeypatch.setattr(scheduler, "next", checked)
    for _ in range(60):
        for _ in range(rng.choice([0, 0, 1, 3, 9])):
            prompt = [*rng.choice(stems)[: rng.choice([0, 15, 16, 32, 40])], rng.randrange(50)]
            made = TokenSequence(prompt, SamplingParams(max_new_tokens=rng.randint(1, 20)), 0, frozenset())
            sequences.append(made)
            engine.submit(made)
        for _ in range(rng.randint(1, 4)):
            if not engine.busy:
                break
            engine.step()
            engine.pools.check()
            full += not states.free
    while engine.busy:
        engine.step()
    assert full > 20, "the pool of states was never under pressure"
    for made in sequences:
        assert made.output == alone(made.prompt, made.seed, made.sampling.max_new_tokens, frozenset())


def test_a_full_house_enters_at_once_whatever_is_cached() -> None:
    for snapshots in (0, 1, 5):
        engine = engine_of(4, snapshots)
        for first in range(12):  # every state is somebody's prefix
            engine.submit(TokenSequence([first] * 20, SamplingParams(max_new_tokens=1), 0, frozenset()))
            while engine.busy:
                engine.step()
        states = engine.pools.states[0].pool
        assert (states.free, states.cached) == (1, 7 + snapshots)  # one was the last row's own
        for first in range(20, 24):
            engine.submit(TokenSequence([first] * 20, SamplingParams(max_new_tokens=9), 0, frozenset()))
        engine.step()
        assert isinstance(engine.executable, FakeExecutable)
        assert engine.executable.steps[-1][1] == 4
        while engine.busy:
            engine.step()
