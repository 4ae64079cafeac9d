"""Orders of admission that rank each waiting sequence by itself: one function each.

A policy here is a function of the options that gives a function of a sequence; the lowest goes first, between
equals who came first. Policies that go by the cache are in policy.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from makeready.engine.options import SchedulerOptions
    from makeready.engine.sequence import TokenSequence

Rank: TypeAlias = "Callable[[TokenSequence], float]"
Ranking: TypeAlias = "Callable[[SchedulerOptions], Rank]"

RANKINGS: dict[str, Ranking] = {}


def ranking(name: str) -> Callable[[Ranking], Ranking]:
    """Register the decorated function as the policy ``name``."""

    def register(made: Ranking) -> Ranking:
        RANKINGS[name] = made
        return made

    return register


@ranking("lof")
def longest_output_first(options: SchedulerOptions) -> Rank:
    """Who may generate most."""
    return lambda sequence: -sequence.sampling.max_new_tokens


@ranking("random")
def by_lot(options: SchedulerOptions) -> Rank:
    """In an order that ``random_seed`` decides."""
    source = random.Random(options.random_seed)
    return lambda sequence: source.random()


@ranking("priority")
def by_priority(options: SchedulerOptions) -> Rank:
    """The highest ``priority``."""
    return lambda sequence: -sequence.priority
