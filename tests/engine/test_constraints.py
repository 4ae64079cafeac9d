"""Sequences whose tokens follow a rule: what they come to is what brute force says, whatever runs beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from fake_executable import VOCABULARY, FakeExecutable, allowed_of, buckets_of, fold, sample
from test_overlap import Diary

from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ERROR, LENGTH, STOP, TokenSequence
from makeready.graphs.plan.spec import Limits

LIMITS = Limits(max_rows=4, max_tokens=16, context_len=64, page_size=4, vocabulary=VOCABULARY)


def may_follow(output: Sequence[int], seed: int) -> list[int]:
    """A rule of all tokens so far: few may come, others each time."""
    start = fold([*output, seed]) % VOCABULARY
    return [(start + 7 * i) % VOCABULARY for i in range(1 + start % 4)]


class Rule:
    """See :func:`may_follow`; complete when a token falls on 3 mod 11, broken after ``breaks`` tokens."""

    def __init__(self, seed: int, breaks: int = 1000) -> None:
        self.output: list[int] = []
        self.seed, self.breaks = seed, breaks
        self.error: str | None = None

    def take(self, token: int) -> bool:
        assert token in may_follow(self.output, self.seed), "a token came that was not allowed"
        self.output.append(token)
        if len(self.output) >= self.breaks:
            self.error = "the rule broke"
        return token % 11 == 3 or self.error is not None

    def allow(self, words: np.ndarray) -> None:
        bits = np.zeros(32 * len(words), np.uint8)
        bits[may_follow(self.output, self.seed)] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)


def alone(prompt: Sequence[int], seed: int, count: int, *, ruled: bool) -> list[int]:
    """Brute force: the tokens of a sequence by itself."""
    output: list[int] = []
    while len(output) < count:
        token = sample(fold([*prompt, *output]), seed)
        if ruled:
            bits = np.zeros(64, np.uint8)
            bits[may_follow(output, seed)] = 1
            token = allowed_of(np.packbits(bits, bitorder="little").view(np.int32), token)
        output.append(token)
        if ruled and token % 11 == 3:
            break
    return output


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pages", [20, 60])  # few: sequences are sent back to wait
def test_what_comes_is_what_brute_force_says(pages: int, seed: int, overlap: bool) -> None:
    rng = random.Random(seed)
    executable = FakeExecutable(LIMITS, buckets_of(LIMITS), pages, asynchronous=overlap)
    engine = Engine(executable, SchedulerOptions(new_token_ratio=0.3, min_new_token_ratio=0.1))
    shared = [rng.randrange(VOCABULARY) for _ in range(9)]
    sequences: list[tuple[TokenSequence, bool]] = []
    for number in range(24):
        prompt = [
            *shared[: rng.choice([0, 9])],
            *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))),
        ]
        count, ruled = rng.randint(1, 20), rng.random() < 0.6
        constraint = Rule(number) if ruled else None
        made = TokenSequence(
            prompt, SamplingParams(max_new_tokens=count), number, frozenset(), constraint=constraint
        )
        sequences.append((made, ruled))
    waiting = list(sequences)
    while waiting or engine.busy:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop()[0])
        engine.step()
    for one, ruled in sequences:
        assert one.output == alone(one.prompt, one.seed, one.sampling.max_new_tokens, ruled=ruled)
        complete = ruled and one.output[-1] % 11 == 3
        assert one.finish_reason == (STOP if complete else LENGTH)
    assert pages > 24 or any(one.retractions for one, _ in sequences)


def test_the_step_before_is_read_while_the_first_part_runs() -> None:
    class Cuts(Diary):
        def resume(self, late):
            self.notes.append(f"resume with {len(late)}")
            super().resume(late)

    executable = Cuts(LIMITS)
    engine = Engine(executable)
    engine.submit(TokenSequence([1, 2], SamplingParams(max_new_tokens=3), 5, frozenset(), constraint=Rule(5)))
    while engine.busy:
        engine.step()
    count = len(alone([1, 2], 5, 3, ruled=True))
    expected = [["launch 1", "resume with 1"], ["launch 2", "read 1", "resume with 1"]]
    assert count == 3
    expected += [["launch 3", "read 2", "resume with 1"], ["read 3"]]
    assert executable.notes == [note for notes in expected for note in notes]


def test_masks_that_did_not_change_are_not_sent_and_steps_without_any_are_not_cut() -> None:
    class Same(Rule):
        def allow(self, words):
            words[:] = -1

        def take(self, token):
            return False

    sent: list[int] = []

    class Counts(FakeExecutable):
        def resume(self, late):
            sent.append(len(late))
            super().resume(late)

    engine = Engine(Counts(LIMITS, buckets_of(LIMITS), 60))
    engine.submit(TokenSequence([1], SamplingParams(max_new_tokens=4), 0, frozenset(), constraint=Same(0)))
    engine.submit(TokenSequence([2], SamplingParams(max_new_tokens=9), 0, frozenset()))
    while engine.busy:
        engine.step()
    assert sent == [1, 0, 0, 0]


def test_a_rule_that_breaks_ends_its_own_sequence_with_its_reason() -> None:
    engine = Engine(FakeExecutable(LIMITS, buckets_of(LIMITS), 60))
    seed = next(s for s in range(50) if len(alone([4], s, 9, ruled=True)) == 9)
    broken = TokenSequence(
        [4], SamplingParams(max_new_tokens=9), seed, frozenset(), constraint=Rule(seed, breaks=3)
    )
    other = TokenSequence([5], SamplingParams(max_new_tokens=9), 1, frozenset())
    replies = [Reply(broken), Reply(other)]
    for reply in replies:
        engine.submit(reply.sequence, reply)
    while engine.busy:
        engine.step()
    assert (broken.finish_reason, replies[0].error) == (ERROR, "the rule broke")
    assert other.output == alone([5], 1, 9, ruled=False)


def test_what_is_interrupted_while_it_stands_at_its_cut_goes_on() -> None:
    class Interrupts(FakeExecutable):
        def launch(self, bucket, step, *, cut=False):
            made = super().launch(bucket, step, cut=cut)
            if len(self.steps) == 2:
                made.wait = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
            return made

    engine = Engine(Interrupts(LIMITS, buckets_of(LIMITS), 60))
    first = TokenSequence([1], SamplingParams(max_new_tokens=9), 2, frozenset(), constraint=Rule(2))
    engine.submit(first)
    engine.step()
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert first.done
