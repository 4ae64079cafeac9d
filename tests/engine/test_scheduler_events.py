"""The engine under random events: no invariant broken, nobody starved, tokens as of each request alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from drafting import DraftingExecutable
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Simulation

from makeready.engine import lengths
from makeready.engine.options import FCFS, POLICIES, PRIORITY


@pytest.fixture(autouse=True, scope="module")
def quick_learning() -> Iterator[None]:
    """Believe the first few that end, so that pages run out where others are longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "ENOUGH", 3)
        yield


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_random_events(seed: int) -> None:
    Simulation(random.Random(seed)).run(60)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_lengths_that_only_the_device_knows(seed: int) -> None:
    Simulation(random.Random(seed), bursts=True).run(60)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 8]), st.booleans())
def test_drafts_that_are_right_or_wrong(seed: int, drafts: int, groups: bool) -> None:
    Simulation(random.Random(seed), {"speculation": "always"}, drafts=drafts, groups=groups).run(60)


@pytest.mark.parametrize("overlap", [False, True])
def test_every_number_of_drafts_is_right_at_times(overlap: bool) -> None:
    """With pages that run out, too: nobody's tokens are others for it, which the simulation sees to."""
    accepted, retractions = Counter[int](), 0
    for seed in range(12):
        options = {
            "speculation": "always",
            "overlap": overlap,
            "new_token_ratio": 0.0,
            "min_new_token_ratio": 0.0,
        }
        simulation = Simulation(random.Random(seed), options, drafts=3)
        simulation.run(60)
        assert isinstance(simulation.executable, DraftingExecutable)
        accepted += Counter(
            {right: n for (right, guessed), n in simulation.executable.accepted.items() if guessed == 3}
        )
        retractions += simulation.retractions
    assert set(accepted) == {0, 1, 2, 3}
    assert retractions


@settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_windows_that_free_pages_and_states(seed: int) -> None:
    Simulation(random.Random(seed), groups=True).run(60)


@pytest.mark.parametrize(
    "policy",
    [p if p in (FCFS, PRIORITY) else pytest.param(p, marks=pytest.mark.slow) for p in POLICIES],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_every_policy_with_pages_that_run_out(
    policy: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small pools really make requests share, and go back to wait, if nothing is expected of any."""
    monkeypatch.setattr(lengths, "ENOUGH", 10**9)
    retractions = cached = 0
    for seed in range(6, 16):
        options = {"policy": policy, "overlap": overlap, "new_token_ratio": 0.0, "min_new_token_ratio": 0.0}
        simulation = Simulation(random.Random(seed), {**options, "prefix_cache": True})
        simulation.run(80)
        retractions += simulation.retractions
        cached += simulation.cached
    assert retractions > 2
    assert cached > 100


@pytest.mark.soak
def test_a_million_random_events() -> None:
    events, seed = 0, 10**6
    while events < 1_100_000:
        simulation = Simulation(random.Random(seed))
        simulation.run(400)
        events += simulation.events
        seed += 1
