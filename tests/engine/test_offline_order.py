"""The order of offline work against its definition, and what it saves."""

from __future__ import annotations

import random
from functools import partial

import pytest
from fake_executable import VOCABULARY, FakeExecutable, alone, buckets_of

from makeready.engine.feed import Feed, Final
from makeready.engine.loop import Engine
from makeready.engine.offline import OfflineOrder
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import Limits


def sequence(prompt: list[int], count: int = 4, ticket: int = -1, salt: str = "") -> TokenSequence:
    made = TokenSequence(prompt, SamplingParams(max_new_tokens=count), 0, frozenset(), salt)
    made.ticket = ticket
    return made


def key(each: TokenSequence) -> tuple[str, bytes, int]:
    return each.salt, each.ids().tobytes(), each.ticket


def test_any_order_is_the_one_that_is_defined() -> None:
    rng = random.Random(4)
    for _ in range(30):
        load, rows = (0, 0), 0
        order = OfflineOrder(lambda: load)  # noqa: B023
        inside: list[TokenSequence] = []
        last: tuple[str, bytes, int] = ("", b"", -1)
        for ticket in range(60):
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 4))]
            made = sequence(prompt, rng.randint(1, 30), ticket, rng.choice(["", "x"]))
            order.add(made)
            inside.append(made)
            load = (rng.randint(0, 8), rng.randint(0, 80))
            count, rows = rng.choice([1, 3, 100]), max(load[0], rows - 1)
            steps = (load[1] + sum(each.left for each in inside)) / rows if rows else float("inf")
            long = sorted((each for each in inside if each.left >= steps), key=lambda s: (-s.left, s.ticket))
            alike = sorted((each for each in inside if each not in long), key=key)
            around = [s for s in alike if key(s) > last] + [s for s in alike if key(s) <= last]
            assert order.order(count) == [*long, *around][:count]
            if inside and rng.random() < 0.6:
                chosen = [*long, *around][0]
                order.admitted(chosen)
                rows = max(rows, load[0])
                last = last if long else key(chosen)
                order.remove(chosen)
                inside.remove(chosen)
            elif rng.random() < 0.3:
                gone = inside.pop(rng.randrange(len(inside)))
                order.remove(gone)


def engine_of(pages: int, records: list[StepRecord], rows: int = 4, **options: str) -> Engine:
    limits = Limits(max_rows=rows, max_tokens=64, context_len=64, page_size=4)
    engine = Engine(FakeExecutable(limits, buckets_of(limits), pages), SchedulerOptions(**options))  # type: ignore[arg-type]
    engine.observer = records.append
    return engine


def fed(engine: Engine, sequences: list[TokenSequence]) -> dict[int, list[int]]:
    """What comes back of each place."""
    found: dict[int, list[int]] = {}
    feed = Feed[int](engine)
    for place, each in enumerate(sequences):
        feed.put(place, partial(lambda one: [Reply(one)], each))
    while feed.busy:
        for handed in feed.step():
            assert isinstance(handed, Final)
            found[handed.key] = handed.reply.sequence.output
    feed.close()
    return found


@pytest.mark.parametrize(("policy", "computed"), [("auto", 6), ("fcfs", 30)])
def test_prefixes_that_are_spread_over_the_input_are_computed_once(policy: str, computed: int) -> None:
    """Pages for two documents of ten pages; six of them, each with eight questions, in any order."""
    rng = random.Random(7)
    documents = [[rng.randrange(VOCABULARY) for _ in range(40)] for _ in range(6)]
    prompts = [[*documents[i % 6], rng.randrange(VOCABULARY)] for i in range(48)]
    rng.shuffle(prompts)
    records: list[StepRecord] = []
    sequences = [sequence(prompt) for prompt in prompts]
    found = fed(engine_of(1 + 26, records, policy=policy), sequences)
    assert found == {i: alone(prompt, 0, 4, frozenset()) for i, prompt in enumerate(prompts)}
    run = sum(record.prompt_tokens for record in records)
    whole = round(run / 40 - 48 / 40)
    assert whole <= computed if policy == "auto" else whole >= computed


def test_nobody_runs_alone_at_the_end() -> None:
    """Short ones and, behind them, one that takes as long as all of them."""
    steps = {}
    for policy in ("auto", "fcfs"):
        records: list[StepRecord] = []
        sequences = [*(sequence([i, 9], 8) for i in range(24)), sequence([40, 9], 48)]
        fed(engine_of(200, records, policy=policy), sequences)
        steps[policy] = len(records)
    # 240 tokens of four rows are 60 steps at least; the long one takes 48 more behind the others' 48.
    assert steps["auto"] <= 72
    assert steps["fcfs"] >= 96


def test_only_a_batch_is_taken_out_of_turn() -> None:
    """``auto`` is first come, first served, for whoever waits for answers one by one."""
    records: list[StepRecord] = []
    engine = engine_of(200, records, rows=1)
    feed = Feed[int](engine)
    feed.close()
    ended: list[TokenSequence] = []
    sequences = [sequence([token], 2) for token in (5, 3, 9, 1)]
    for each in sequences:
        engine.submit(each)
    while engine.busy:
        ended += engine.step()
    assert ended == sequences
    patient = Feed[int](engine)
    order = []
    for each in (sequences := [sequence([token], 2) for token in (5, 3, 9, 1)]):
        engine.submit(each)
    while engine.busy:
        order += engine.step()
    patient.close()
    assert order == [sequences[i] for i in (3, 1, 0, 2)]
