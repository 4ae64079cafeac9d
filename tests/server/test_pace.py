"""When a full queue has room, against a simulation step by step."""

from __future__ import annotations

import itertools
import random

import pytest

from makeready.engine.remote.pace import RETRY_SECONDS, Pace
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import ABORT, STOP, TokenSequence


def sequence(most: int, done: int = 0) -> TokenSequence:
    made = TokenSequence([1], SamplingParams(max_new_tokens=most), 0, frozenset())
    made.output.extend([2] * done)
    return made


def simulated(lasts: list[int], whole: int, places: int) -> int:
    """Steps until so many have ended, where each that ends lets one in that lasts ``whole``."""
    ended = 0
    for step in itertools.count(1):
        lasts = [last - 1 for last in lasts]
        ended += lasts.count(0)
        lasts = [last or whole for last in lasts]
        if ended >= places:
            return step
    raise AssertionError


@pytest.mark.parametrize("places", [1, 2, 3, 7, 8, 9, 24])
def test_it_is_as_a_simulation_has_it(places: int) -> None:
    draw = random.Random(places)
    whole = 200
    done = [draw.randrange(whole) for _ in range(8)]
    pace = Pace()
    for _ in range(3):
        pace.step(0.5)
    running = [sequence(whole, each) for each in done]
    steps = simulated([whole - each for each in done], whole, places)
    assert pace.seconds_until(places, running) == min(-(-steps // 2), RETRY_SECONDS[1])


def test_answers_that_end_early_make_room_early() -> None:
    pace = Pace()
    pace.step(0.1)
    running = [sequence(1000)]
    assert pace.seconds_until(1, running) == 100
    aborted = sequence(1000, 3)
    aborted.finish(ABORT)
    pace.ended(aborted)  # says nothing
    assert pace.seconds_until(1, running) == 100
    for _ in range(100):
        ended = sequence(500, 50)
        ended.finish(STOP)
        pace.ended(ended)
    assert pace.seconds_until(1, running) == pytest.approx(10, abs=1)
    assert (
        pace.seconds_until(1, [sequence(1000, 700)]) == RETRY_SECONDS[0]
    )  # longer than others: it may end now


def test_it_stays_within_bounds() -> None:
    pace = Pace()
    assert pace.seconds_until(1, []) == pace.seconds_until(5, [sequence(10)]) == RETRY_SECONDS[0]
    pace.step(60.0)
    assert pace.seconds_until(10**6, [sequence(4096)] * 2) == RETRY_SECONDS[1]
