"""Steps that are launched before the one before them is read, and what is read late."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fake_executable import FakeExecutable, Step, alone, buckets_of

from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, TokenSequence
from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket, Limits

LIMITS = Limits(max_rows=4, max_tokens=16, context_len=48, page_size=4)


class Diary(FakeExecutable):
    """Notes the order of launches and reads; ``fail`` makes a launch raise."""

    def __init__(self, limits: Limits = LIMITS, pages: int = 60, **options: Any) -> None:
        super().__init__(limits, buckets_of(limits), pages, **options)
        self.notes: list[str] = []
        self.fail: BaseException | None = None

    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> Step:
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        made, number = super().launch(bucket, step, cut=cut), len(self.steps)
        self.notes.append(f"launch {number}")
        wait = made.wait
        made.wait = lambda: (self.notes.append(f"read {number}"), wait())[1]  # type: ignore[method-assign]
        return made


def sequence(
    prompt: list[int], count: int, ends: frozenset[int] = frozenset(), **fields: Any
) -> TokenSequence:
    return TokenSequence(prompt, SamplingParams(max_new_tokens=count), 0, ends, **fields)


def run(engine: Engine, *sequences: TokenSequence) -> None:
    for each in sequences:
        engine.submit(each)
    while engine.busy:
        engine.step()


def test_a_step_is_launched_before_the_last_is_read() -> None:
    executable = Diary()
    engine = Engine(executable)
    run(engine, sequence([1, 2, 3], 4))
    # Four tokens take four steps: how long a sequence gets at most is known before any token is read.
    assert executable.notes == [
        *("launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "read 4")
    ]


@pytest.mark.parametrize("why", ["option", "executable"])
def test_without_overlap_each_step_is_read_at_once(why: str) -> None:
    executable = Diary(asynchronous=why != "executable")
    run(Engine(executable, SchedulerOptions(overlap=why != "option")), sequence([1, 2, 3], 3))
    assert executable.notes == ["launch 1", "read 1", "launch 2", "read 2", "launch 3", "read 3"]


def test_a_token_that_ends_a_request_costs_one_row_of_one_step() -> None:
    prompt = [1, 2, 3]
    expected = alone(prompt, 0, 20, frozenset())
    end = next(i for i in range(3, 20) if expected[i] not in expected[:i])
    executable = Diary()
    ended = sequence(prompt, 20, frozenset([expected[end]]))
    run(Engine(executable), ended)
    assert ended.output == expected[: end + 1]
    assert len(executable.steps) == end + 2


def test_a_seat_is_taken_in_the_step_after_the_last_of_a_known_length() -> None:
    """The next sequence does not wait until the last token of the one before it is read."""
    limits = Limits(max_rows=1, max_tokens=16, context_len=48, page_size=4)
    executable = Diary(limits)
    first, second = sequence([1, 2], 3), sequence([3, 4, 5], 2)
    run(Engine(executable), first, second)
    assert [bucket.phase for bucket, *_ in executable.steps] == [EXTEND, DECODE, DECODE, EXTEND, DECODE]
    assert executable.notes[5:7] == ["launch 4", "read 3"]


def test_aborts_while_a_step_is_under_way_drop_its_token() -> None:
    engine = Engine(Diary())
    gone, stays = sequence([1, 2, 3], 30), sequence([4, 5], 9)
    engine.submit(gone)
    engine.submit(stays)
    for _ in range(4):
        engine.step()
    engine.abort(gone)
    output = list(gone.output)
    assert (gone.finish_reason, gone.slot) == (ABORT, -1)
    run(engine, follower := sequence([6, 7, 8, 9], 9))
    assert gone.output == output == alone([1, 2, 3], 0, 3, frozenset())
    assert stays.output == alone([4, 5], 0, 9, frozenset())
    assert follower.output == alone([6, 7, 8, 9], 0, 9, frozenset())


def test_the_last_request_aborted_leaves_nothing_behind() -> None:
    engine = Engine(Diary())
    engine.submit(only := sequence([1, 2, 3, 4, 5], 9))
    engine.step()
    engine.step()
    engine.abort(only)
    assert not engine.busy
    assert engine.pool.held == 0
    run(engine, again := sequence([1, 2, 3, 4, 5], 4))
    assert again.cached_tokens == 4
    assert again.output == alone([1, 2, 3, 4, 5], 0, 4, frozenset())


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_step_ends_who_relied_on_it(overlap: bool) -> None:
    """Ctrl-C in a step that computes at once: its pages hold nothing, and nobody may believe they do."""
    executable = Diary()
    engine = Engine(executable, SchedulerOptions(overlap=overlap))
    running = [sequence([1, 2, 3, 4, 5, 6, 7, 8, 9], 9) for _ in range(4)]
    waits = sequence([1, 2, 3, 4, 5, 6, 7, 8], 3)
    for each in [*running, waits]:
        engine.submit(each)
    for step in range(3):
        if step == 2:
            executable.fail = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        else:
            engine.step()
    assert [each.finish_reason for each in running] == [ABORT] * 4
    assert engine.pool.free == engine.pool.usable
    run(engine)
    assert waits.cached_tokens == 0
    assert waits.output == alone(waits.prompt, 0, 3, frozenset())


def test_records_tell_what_each_step_did() -> None:
    records: list[StepRecord] = []
    engine = Engine(Diary())
    engine.observer = records.append
    run(engine, sequence([1, 2, 3, 4, 5, 6], 3), sequence([1, 2, 3, 4, 9], 3))
    assert [record.bucket.phase for record in records] == [EXTEND, DECODE, DECODE]
    first, _, last = records
    # Six tokens, and one behind the page that both share.
    assert (first.rows, first.tokens, first.prompt_tokens, first.cached_tokens) == (2, 7, 7, 4)
    assert [record.new_tokens for record in records] == [2, 2, 2]
    assert (last.running, last.waiting, last.held) == (0, 0, 0)
    assert last.cached + last.free == engine.pool.usable
    for record, later in pairwise(records):
        assert later.launch_end <= record.wait_start, "the next step was launched before this one was read"


def test_results_say_how_it_went() -> None:
    engine = Engine(Diary())
    told: list[Reply] = []
    done = Reply(sequence([1, 2, 3, 4, 5], 3), on_finish=told.append)
    engine.submit(done.sequence, done)
    run(engine)
    assert told == [done]
    meta = done.result().meta_info
    assert meta["id"] == done.id
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (5, 3, 0)
    assert 0 <= meta["queue_time"] <= meta["time_to_first_token"] <= meta["e2e_latency"]
    assert meta["num_retractions"] == 0
    never = Reply(sequence([1], 3), on_finish=told.append)
    engine.submit(never.sequence, never)
    engine.abort(never.sequence)
    assert told == [done, never]
    meta = never.result().meta_info
    assert meta["time_to_first_token"] is None
    assert 0 <= meta["queue_time"] == meta["e2e_latency"]
