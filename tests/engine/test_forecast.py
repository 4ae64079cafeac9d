"""The virtual clock against loads that are worked out step by step."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from makeready.engine.errors import RequestError
from makeready.engine.forecast import Arrival, Forecast, sequence
from makeready.engine.options import SchedulerOptions
from makeready.graphs.checkpoint.base import open_checkpoint
from makeready.graphs.inspect.step_time import Row
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE, Bucket
from makeready.graphs.planner.compile import Request, compile_plan

CHUNK, CONTEXT = 8, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
    "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "float32",
}  # fmt: skip


@cache
def plan(rows: int) -> Plan:
    return compile_plan(
        open_checkpoint("dummy", config=CONFIG), Request(max_rows=rows, max_tokens=CHUNK, page_size=4)
    )


class Times:
    """A step takes a second, and a tenth of one for every cached token that its rows see at its end."""

    def __init__(self) -> None:
        self.steps: list[tuple[Bucket, list[Row]]] = []

    def seconds(self, bucket: Bucket, rows: list[Row]) -> float:
        self.steps.append((bucket, rows))
        return 1 + 0.1 * sum(row.context for row in rows)


def forecast(rows: int, times: Times, *, on_gpu: bool = False) -> Forecast:
    made = replace(plan(rows), target="sm_90a") if on_gpu else plan(rows)
    kept, pages = SchedulerOptions(prefix_cache=False), 200 * made.kv.page_bytes
    return Forecast(made, kept, pages, times=times)  # type: ignore[arg-type]


def steps_of(prompt: int, output: int) -> list[int]:
    """Tokens that are cached behind each step of a sequence that runs alone."""
    chunks = [min(prompt, end) for end in range(CHUNK, prompt + CHUNK, CHUNK)]
    return chunks + [prompt + more for more in range(1, output)]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_one_row_serves_one_request_after_the_other(on_gpu):
    generator, load = random.Random(0), []
    for arrival in (0.0, 0.5, 3.0, 200.0, 201.0, 1000.0):
        load.append((arrival, generator.randint(1, 30), generator.randint(1, 9)))
    clock, first, steps = 0.0, [], 0
    for arrival, prompt, output in load:
        clock = max(clock, arrival)
        for number, cached in enumerate(steps_of(prompt, output)):
            clock += 1 + 0.1 * cached
            if cached == prompt and number == len(steps_of(prompt, 1)) - 1:
                first.append(clock - arrival)
        steps += len(steps_of(prompt, output))
    arrivals = [Arrival(at, sequence([5] * prompt, output)) for at, prompt, output in load]
    found = forecast(1, Times(), on_gpu=on_gpu).run(arrivals)
    assert found.seconds == pytest.approx(clock)
    assert found.first == pytest.approx(first)
    assert (found.steps, found.requests, found.refused) == (steps, 6, 0)
    assert found.prompt_tokens == sum(prompt for _, prompt, _ in load)
    assert found.output_tokens == sum(output for _, _, output in load)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_together_see_what_each_has(on_gpu):
    """Whatever the scheduler packs together: every sequence's tokens run once, in order, at their own contexts."""
    generator, times = random.Random(1), Times()
    sizes = [(generator.randint(1, 40), generator.randint(1, 20)) for _ in range(12)]
    load = [Arrival(0.0, sequence([i] * prompt, output)) for i, (prompt, output) in enumerate(sizes)]
    found = forecast(4, times, on_gpu=on_gpu).run(load)
    assert found.seconds == pytest.approx(
        sum(1 + 0.1 * sum(r.context for r in rows) for _, rows in times.steps)
    )
    ran = [row for _, rows in times.steps for row in rows]
    assert sum(row.tokens for row in ran) == sum(prompt + output - 1 for prompt, output in sizes)
    # Each token of each sequence is the last one that some step leaves in the cache, or within its chunk.
    reached = sorted(c for row in ran for c in range(row.context - row.tokens + 1, row.context + 1))
    assert reached == sorted(c for prompt, output in sizes for c in range(1, prompt + output))
    assert all(bucket.rows >= len(rows) for bucket, rows in times.steps)
    assert max(len(rows) for _, rows in times.steps) == 4


def test_shared_prompts_are_found_in_the_cache():
    prompt = list(range(20))
    load = [Arrival(100.0 * i, sequence(prompt, 2)) for i in range(3)]
    found = Forecast(plan(2), times=Times()).run(load)  # type: ignore[arg-type]
    assert found.cached_tokens == 2 * 16  # whole pages of 4 before the last token


def test_alone_and_what_does_not_fit():
    times = Times()
    made = forecast(4, times)
    assert made.first_token_seconds(20) == pytest.approx(3 + 0.1 * (8 + 16 + 20))
    with pytest.raises(RequestError, match="65"):
        made.first_token_seconds(65)
    real = Forecast(plan(4))
    assert real.token_seconds(3, 10) < real.token_seconds(4, CONTEXT)
    with pytest.raises(RequestError, match="5 rows of 10 tokens are more than the plan's 4 of 64"):
        real.token_seconds(5, 10)
    refused = made.run([Arrival(0.0, sequence([1] * 70, 4)), Arrival(0.0, sequence([1], 1))])
    assert (refused.refused, refused.requests) == (1, 1)
    assert made.run([]).record()["ttft_milliseconds"] == {"p50": 0.0, "p99": 0.0}
    assert {bucket.phase for bucket, _ in times.steps} >= {"extend", DECODE} - {DECODE}


def test_memory_is_the_plans():
    made = Forecast(plan(4), kv_bytes=10 * plan(4).kv.page_bytes)
    memory, regions = made.memory(), plan(4).memory
    assert (memory["weights"], memory["arena"]) == (regions.weights, regions.arena)
    assert memory["kv"] == 10 * 4 * 2 * 8 * 4 * 1 + 0  # pages x tokens x (k, v) x head x float32 x KV heads
    assert memory["kv_tokens"] == 9 * 4
    assert memory["total"] == regions.fixed + memory["kv"]
