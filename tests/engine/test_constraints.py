"""Sequences whose tokens follow a rule: what they come to is what brute force says, whatever runs beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from drafting import DraftingExecutable
from fake_executable import VOCABULARY, FakeExecutable, allowed_of, buckets_of, fold, sample
from test_overlap import Diary

from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ERROR, LENGTH, STOP, TokenSequence
from makeready.graphs.plan.spec import CacheGroup, CacheSpec, Limits

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

    def copy(self) -> Rule:
        made = Rule(self.seed, self.breaks)
        made.output, made.error = list(self.output), self.error
        return made

    def may(self, output: Sequence[int]) -> list[int]:
        return may_follow(output, self.seed)

    def take(self, token: int) -> bool:
        assert token in self.may(self.output), "a token came that was not allowed"
        self.output.append(token)
        if len(self.output) >= self.breaks:
            self.error = "the rule broke"
        return token % 11 == 3 or self.error is not None

    def forced(self) -> list[int]:
        """What comes while only one may."""
        ahead: list[int] = []
        while len(ones := may_follow([*self.output, *ahead], self.seed)) == 1 and len(ahead) < 9:
            ahead += ones
            if ones[0] % 11 == 3:
                break
        return ahead

    @classmethod
    def allow_all(cls, constraints: Sequence[Rule], words: np.ndarray, rows: Sequence[int]) -> None:
        for rule, row in zip(constraints, rows, strict=True):
            rule.allow(words[row])

    def allow(self, words: np.ndarray) -> None:
        bits = np.zeros(32 * len(words), np.uint8)
        bits[self.may(self.output)] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)


class Loose(Rule):
    """Leaves all to chance but two tokens of five, which are sure to come; never complete."""

    def take(self, token: int) -> bool:
        assert token in self.may(self.output)
        self.output.append(token)
        return False

    def copy(self) -> Loose:
        made = Loose(self.seed)
        made.output = list(self.output)
        return made

    def may(self, output: Sequence[int]) -> list[int]:
        return [len(output)] if len(output) % 5 > 2 else list(range(VOCABULARY))

    def forced(self) -> list[int]:
        ahead: list[int] = []
        while len(ones := self.may([*self.output, *ahead])) == 1:
            ahead += ones
        return ahead


class Informed(DraftingExecutable):
    """Knows the rule, so that it can guess right where not all tokens may come."""

    rule: type[Rule] = Rule

    def right(self, slot: int, place: int, sampled: int) -> int:
        values = self._slots[slot]
        if not values["masked"]:
            return sampled
        output = self._history[slot, values["prompt_len"] : place].tolist()
        bits = np.zeros(64, np.uint8)
        bits[self.rule(values["seed"]).may(output)] = 1
        return allowed_of(np.packbits(bits, bitorder="little").view(np.int32), sampled)


def alone(prompt: Sequence[int], seed: int, count: int, *, ruled: bool, kind: type[Rule] = Rule) -> list[int]:
    """Brute force: the tokens of a sequence by itself."""
    output: list[int] = []
    while len(output) < count:
        token = sample(fold([*prompt, *output]), seed)
        if ruled:
            bits = np.zeros(64, np.uint8)
            bits[kind(seed).may(output)] = 1
            token = allowed_of(np.packbits(bits, bitorder="little").view(np.int32), token)
        output.append(token)
        if ruled and kind is Rule and token % 11 == 3:
            break
    return output


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pages", [15, 60])  # few: sequences are sent back to wait
@pytest.mark.parametrize("drafts", [0, 3])
def test_what_comes_is_what_brute_force_says(
    drafts: int, pages: int, seed: int, overlap: bool, forced: bool
) -> None:
    rng = random.Random(seed)
    if drafts:
        limits = replace(LIMITS, max_gain=1 + drafts)
        executable: FakeExecutable = Informed(limits, buckets_of(limits), pages, overlap, seed)
    else:
        executable = FakeExecutable(LIMITS, buckets_of(LIMITS), pages, asynchronous=overlap)
    options = SchedulerOptions(
        new_token_ratio=0.0,
        min_new_token_ratio=0.0,
        forced_tokens=forced,
        decode_interval=seed % 3,
        speculation="always" if drafts else "auto",
    )
    engine = Engine(executable, options)
    shared = [rng.randrange(VOCABULARY) for _ in range(9)]
    sequences: list[tuple[TokenSequence, bool]] = []
    for number in range(24):
        prompt = [
            *shared[: rng.choice([0, 9])],
            *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))),
        ]
        count, ruled = rng.randint(1, 20), rng.random() < 0.6
        constraint = Rule(number) if ruled else None
        sampling = SamplingParams(max_new_tokens=count, return_logprob=rng.random() < 0.2)
        made = TokenSequence(prompt, sampling, number, frozenset(), constraint=constraint)
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
    if isinstance(executable, DraftingExecutable):
        assert any(right for right, _ in executable.accepted)
        assert executable.masked_accepted > 3
    assert pages > 15 or any(one.retractions for one, _ in sequences)


@pytest.mark.parametrize("seed", range(4))
def test_drafts_of_a_step_that_counts_for_nothing_count_for_nothing(seed: int) -> None:
    """It was under way when two tokens became sure; masks of other places let its drafts come true on the device."""
    limits = replace(LIMITS, max_gain=4)
    executable = Informed(limits, buckets_of(limits), 60, True, seed)
    executable.rule = Loose
    engine = Engine(executable, SchedulerOptions(speculation="always"))
    made = [
        TokenSequence([n, n + 1], SamplingParams(max_new_tokens=25), n, frozenset(), constraint=Loose(n))
        for n in range(4)
    ]
    for one in made:
        engine.submit(one)
    for _ in range(400):
        engine.step()
    for one in made:
        assert one.output == alone(one.prompt, one.seed, 25, ruled=True, kind=Loose)
    assert executable.masked_accepted > 10


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

        def forced(self):
            return []

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


class Spelled(Rule):
    """Goes on with given tokens, in turn with one of all; complete at their end."""

    def __init__(self, tokens: Sequence[int | None]) -> None:
        super().__init__(0)
        self.tokens = tokens

    def take(self, token: int) -> bool:
        self.output.append(token)
        return len(self.output) == len(self.tokens)

    def forced(self) -> list[int]:
        rest = self.tokens[len(self.output) :]
        end = next((i for i, token in enumerate(rest) if token is None), len(rest))
        return [token for token in rest[:end] if token is not None]

    def allow(self, words: np.ndarray) -> None:
        words[:] = -1
        if forced := self.forced():
            words[:] = 0
            words.view(np.uint32)[forced[0] // 32] = 1 << forced[0] % 32


WORD = [5, 6, 7, 8, 9]  # sure to come
SPELLED: list[int | None] = [*WORD, None, *WORD, *WORD, None, *WORD]


@pytest.mark.parametrize(
    ("overlap", "forced", "steps"), [(True, True, 6), (False, True, 4), (True, False, 23)]
)
def test_tokens_that_are_sure_to_come_take_one_step(overlap: bool, forced: bool, steps: int) -> None:
    """With overlap, the step behind a choice is under way when it is read: what it samples is dropped."""
    limits = Limits(max_rows=4, max_tokens=16, context_len=64, page_size=16, vocabulary=VOCABULARY)
    executable = FakeExecutable(limits, buckets_of(limits), 60, asynchronous=overlap)
    engine = Engine(executable, SchedulerOptions(forced_tokens=forced))
    sequence = TokenSequence(
        [1, 2], SamplingParams(max_new_tokens=40), 3, frozenset(), constraint=Spelled(SPELLED)
    )
    engine.submit(sequence)
    while engine.busy:
        engine.step()
    expected: list[int] = []
    for token in SPELLED:
        expected.append(sample(fold([1, 2, *expected]), 3) if token is None else token)
    assert sequence.output == expected
    assert sequence.finish_reason == STOP
    assert len(executable.steps) == steps


@pytest.mark.parametrize("most", range(1, 22))
@pytest.mark.parametrize("overlap", [True, False])
def test_limits_and_end_tokens_count_among_them(most: int, overlap: bool) -> None:
    for ends, least in ((frozenset[int](), 0), (frozenset({8}), 0), (frozenset({8}), 12)):
        executable = FakeExecutable(LIMITS, buckets_of(LIMITS), 60, asynchronous=overlap)
        engine = Engine(executable)
        sampling = SamplingParams(max_new_tokens=most, min_new_tokens=min(least, most))
        sequence = TokenSequence([1, 2], sampling, 3, ends, constraint=Spelled(SPELLED))
        other = TokenSequence([4], SamplingParams(max_new_tokens=9), 1, frozenset())
        engine.submit(sequence)
        engine.submit(other)
        while engine.busy:
            engine.step()
        places = [
            i + 1 for i, token in enumerate(SPELLED) if token in ends and i + 1 > sampling.min_new_tokens
        ]
        count = min([most, len(SPELLED), *places[:1]])
        assert len(sequence.output) == count
        stopped = count == len(SPELLED) or (places and count == places[0])
        assert sequence.finish_reason == (STOP if stopped else LENGTH)
        assert other.output == alone([4], 1, 9, ruled=False)


GROUPS = {
    "window": ((CacheGroup("kv", (), 4), CacheGroup("near", (), 4, window=6)), {"kv": 40, "near": 24}),
    "state": ((CacheGroup("kv", (), 4), CacheGroup("state", (), None)), {"kv": 40, "state": 12}),
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_tokens_that_are_sure_to_come_with_windows_and_states(groups: str, overlap: bool) -> None:
    own, blocks = GROUPS[groups]
    executable = FakeExecutable(
        LIMITS, buckets_of(LIMITS), 40, asynchronous=overlap, cache=CacheSpec(4, own), blocks=blocks
    )
    engine, sequences = Engine(executable), []
    for number in range(8):
        prompt = [*range(9), *([number] * (number % 3))]
        made = TokenSequence(
            prompt, SamplingParams(max_new_tokens=30), number, frozenset(), constraint=Spelled(SPELLED)
        )
        sequences.append(made)
        engine.submit(made)
    while engine.busy:
        engine.step()
    for one in sequences:
        expected: list[int] = []
        for token in SPELLED:
            expected.append(sample(fold([*one.prompt, *expected]), one.seed) if token is None else token)
        assert one.output == expected
