"""Admission by forecast against rows that are followed step by step, with their pages as sets."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
from fake_executable import VOCABULARY, FakeExecutable, buckets_of
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.engine import lengths
from makeready.engine.admission import peak_of
from makeready.engine.lengths import OutputLengths, lot
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import STOP, TokenSequence
from makeready.engine.step_record import StepRecord
from makeready.graphs.plan.spec import Limits

NEVER = frozenset([VOCABULARY])  # may end a sequence, for all that the scheduler knows


def followed(rows: Iterable[tuple[int, int, list[int]]], size: int) -> list[int]:
    """Pages in use in each step to come, by rows of (tokens, steps left, leading pages that are there)."""
    used = []
    rows = list(rows)
    for step in range(1, 1 + max(left for _, left, _ in rows)):
        pages: set[object] = set()
        for row, (tokens, left, there) in enumerate(rows):
            if step <= left:
                count = len(range(0, tokens + step, size))
                pages |= set(there[:count]) | {(row, page) for page in range(len(there), count)}
        used.append(len(pages))
    return used


@settings(max_examples=200)
@given(
    st.integers(1, 9), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=12)
)
def test_the_peak_of_rows_that_share_nothing(size: int, rows: list[tuple[int, int]]) -> None:
    tokens, left = np.array(rows).T
    used = followed([(t, n, []) for t, n in rows], size)
    peak = peak_of(tokens, left, size)
    assert peak.pages == max(used) == used[peak.steps - 1]


class Watched:
    """An engine whose every decision about a waiting sequence is held to what follows from it, step by step."""

    def __init__(self, rng: random.Random, interval: int = 0) -> None:
        self.rng = rng
        rows, size = rng.randint(1, 5), rng.choice([1, 2, 3, 4, 8])
        self.interval = interval
        self.limits = limits = Limits(rows, rng.randint(rows, 60), 48, size)
        pages = 1 + rng.randint(limits.pages_per_row, 3 * limits.pages_per_row)
        options = SchedulerOptions(overlap=False, decode_interval=interval, prefix_cache=rng.random() < 0.8)
        self.engine = Engine(FakeExecutable(limits, buckets_of(limits), pages), options)
        self.retractions = self.refused = self.shared = 0
        self.engine.observer = self.observe
        self.stems = [[rng.randrange(VOCABULARY) for _ in range(40)] for _ in range(2)]
        self._enter = self.engine.scheduler._admission.enter
        self.engine.scheduler._admission.enter = self.enter  # type: ignore[method-assign]

    def observe(self, record: StepRecord) -> None:
        self.retractions += record.retractions

    def enter(self, sequence: TokenSequence) -> bool:
        scheduler, size = self.engine.scheduler, self.limits.page_size
        seats, cache = scheduler.seats, scheduler.cache
        rows = []
        for each in scheduler.running:
            if each.slot >= 0:
                # All but the last token that is known were run, or will be in the step that is being chosen.
                there = seats.pages_SP[0][each.slot, : seats.held_S[each.slot]].tolist()
                left = each.length - int(seats.least_S[each.slot])
                rows.append((each.length - 1, each.left + self.late(left - 1), there))
        found: list[int] = []
        if cache is not None:
            prefix = cache.acquire(sequence.ids()[: sequence.reusable], sequence.salt)
            found = list(prefix.blocks[0])
            cache.abandon(prefix)
        rows.append((sequence.length - 1, sequence.left + self.late(sequence.length), found))
        # It does not matter when they end if pages last for all at their limits.
        seated = [each for each in (*scheduler.running, sequence) if each.slot >= 0 or each is sequence]
        limits = sum(seats.pages_for(each.most_tokens - 1) for each in seated)
        fits = limits <= seats.usable or max(followed(rows, size)) <= seats.usable
        held = {page for _, _, there in rows[:-1] for page in there}
        self.shared += bool(held & set(found))
        entered = self._enter(sequence)
        assert entered == fits
        self.refused += not entered
        return entered

    def late(self, tokens: int) -> int:
        """Steps by which a row may end later where it has ``tokens`` to run before it generates."""
        return (1 + self.interval) * (1 + tokens // self.limits.max_tokens) if tokens else 0

    def submit(self) -> None:
        rng = self.rng
        stem = rng.choice(self.stems)[: rng.choice([0, 9, 25, 40])]
        prompt = [*stem, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5)))]
        params = SamplingParams(max_new_tokens=rng.randint(1, 48 - len(prompt)))
        self.engine.submit(TokenSequence(prompt, params, 0, frozenset(), salt=rng.choice(["", "", "other"])))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            while self.rng.random() < 0.4 and len(self.engine.scheduler.waiting) < 8:
                self.submit()
            waiting = [*self.engine.scheduler.waiting, *self.engine.scheduler.running]
            if waiting and self.rng.random() < 0.05:
                self.engine.abort(self.rng.choice(waiting))
            self.engine.step()
        while self.engine.busy:
            self.engine.step()


@pytest.mark.parametrize("interval", [0, 3])
def test_who_is_admitted_is_who_fits_to_the_end(interval: int) -> None:
    """Prefixes are shared, rows are aborted; and as ends are known, no page ever runs out."""
    refused = shared = 0
    for seed in range(25):
        watched = Watched(random.Random(seed), interval)
        watched.run(80)
        assert watched.retractions == 0
        refused += watched.refused
        shared += watched.shared
    assert refused > 100
    assert shared > 50


def learned(shares: list[float], least: float = 0.0) -> OutputLengths:
    """From sequences of a limit of 1,000."""
    made = OutputLengths(0.5, least)
    for share in shares:
        sequence = TokenSequence([1], SamplingParams(max_new_tokens=1000), 0, NEVER)
        sequence.output = [0] * round(1000 * share)
        made.learn(sequence)
    return made


def test_before_enough_have_ended_a_share_is_assumed() -> None:
    left, most = np.array([100, 40, 1, 0]), np.array([100, 100, 100, 100])
    expected = learned([0.01] * (lengths.ENOUGH - 1)).expected(left, most, np.zeros(4))
    assert expected.tolist() == [50, 20, 1, 0]


def test_rows_are_expected_to_come_to_lengths_that_are_longer_than_theirs() -> None:
    """Over many lots, the mean is that of those that used more than the row by now."""
    rng = random.Random(1)
    shares = [rng.random() ** 3 for _ in range(500)]
    model = learned(shares)
    lots = np.array([lot(ticket) for ticket in range(4000)])
    for made in (0, 100, 600):
        left, most = np.full(4000, 1000 - made), np.full(4000, 1000)
        longer = [round(1000 * share) for share in shares if round(1000 * share) > made] + [1000]
        wanted = sum(longer) / len(longer) - made
        expected = model.expected(left, most, lots)
        assert expected.min() >= 1
        assert expected.max() <= 1000 - made
        assert abs(expected.mean() - wanted) < 2.0
    beyond = model.expected(np.array([3]), np.array([1000]), np.array([0.0]))
    assert beyond.tolist() == [3], "who is longer than all may come to its limit"


def test_estimates_never_fall_while_a_row_goes_on() -> None:
    rng = random.Random(2)
    model = learned([rng.random() for _ in range(100)], least=0.1)
    for ticket in range(20):
        left, most, lots = np.arange(700, 0, -1), np.full(700, 700), np.full(700, lot(ticket))
        total = 700 - left + model.expected(left, most, lots)
        assert (np.diff(total) >= 0).all()


def test_a_share_is_expected_at_least() -> None:
    expected = learned([0.01] * 50, least=0.25).expected(np.array([400]), np.array([400]), np.zeros(1))
    assert expected.tolist() == [100]


def test_the_last_that_ended_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "REMEMBERED", 40)
    expected = learned([0.9] * 100 + [0.2] * 40).expected(np.array([500]), np.array([500]), np.zeros(1))
    assert expected.tolist() == [100]


class Short(TokenSequence):
    """Ends with a sixth of what it may generate, which nobody knows before."""

    def append(self, token: int) -> bool:
        self.output.append(token)
        if 6 * len(self.output) >= self.most:
            self.finish_reason = STOP
        return self.done


@pytest.mark.parametrize(("least", "most_rows"), [(1.0, 3), (0.0, 8)])
def test_more_run_at_once_when_outputs_turn_out_to_be_short(least: float, most_rows: int) -> None:
    """Pages for three rows at their limits, or for eight as long as they are."""
    limits = Limits(max_rows=8, max_tokens=64, context_len=64, page_size=2)
    options = SchedulerOptions(new_token_ratio=1.0, min_new_token_ratio=least)
    engine = Engine(FakeExecutable(limits, buckets_of(limits), 1 + 3 * 32), options)
    records: list[StepRecord] = []
    engine.observer = records.append
    rng = random.Random(3)
    for _ in range(120):
        prompt = [rng.randrange(VOCABULARY) for _ in range(5)]
        engine.submit(Short(prompt, SamplingParams(max_new_tokens=59), 0, NEVER))
    while engine.busy:
        engine.step()
    assert max(record.rows for record in records) == most_rows
    assert max(record.rows for record in records[:20]) == 3
    assert not any(record.retractions for record in records)
