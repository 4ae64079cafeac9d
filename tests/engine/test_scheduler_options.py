"""What SchedulerOptions refuses, alone and beside a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_executable import FakeExecutable, buckets_of

from makeready.engine.errors import RequestError
from makeready.engine.loop import Engine
from makeready.engine.options import SchedulerOptions
from makeready.graphs.plan.spec import Limits

CONF = Path(__file__).parents[2] / "conf" / "scheduler" / "default.yaml"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"policy": "fifo"}, "there is no scheduler.policy='fifo'; take one of auto, offline, fcfs, lpm"),
        ({"eviction": "mru"}, "scheduler.eviction='mru'; take one of lru"),
        ({"max_wait": -1}, "scheduler.max_wait=-1 is out of range; give a whole number of at least 0"),
        ({"max_wait": True}, "max_wait=True"),
        ({"preemption_threshold": 0}, "preemption_threshold=0"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size=0 is out of range.* or null"),
        ({"decode_interval": 1.5}, "decode_interval=1.5"),
        ({"max_queued_requests": 0}, "max_queued_requests=0"),
        ({"overlap": "yes"}, "overlap='yes' is no switch; give true or false"),
        ({"new_token_ratio": 1.1}, "new_token_ratio=1.1 is out of range; give a number from 0 to 1"),
        ({"new_token_ratio": float("nan")}, "new_token_ratio=nan"),
        ({"new_token_ratio": 0.05}, "min_new_token_ratio=0.1 is above new_token_ratio=0.05; lower it"),
        ({"policy": "lpm", "prefix_cache": False}, "policy=lpm goes by the prefix cache, which is off"),
    ],
)
def test_bad_options_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SchedulerOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"chunked_prefill_size": 9},
            "exceeds the plan's steps of 8 tokens.*recompile with plan.max_tokens=9",
        ),
        ({"max_running_requests": 3}, "exceeds the plan's 2 rows.*recompile with plan.max_rows=3"),
    ],
)
def test_what_a_plan_cannot_take_is_named(fields: dict[str, Any], words: str) -> None:
    limits = Limits(max_rows=2, max_tokens=8, context_len=32, page_size=4)
    with pytest.raises(RequestError, match=words):
        Engine(FakeExecutable(limits, buckets_of(limits), 20), SchedulerOptions(**fields))


def test_conf_states_every_default() -> None:
    assert yaml.safe_load(CONF.read_text()) == dataclasses.asdict(SchedulerOptions())
