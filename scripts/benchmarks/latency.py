"""What a user waits for: the time between tokens and the time to the first one, through the whole engine.

A token's time is (time of ``tokens + 1`` new tokens - time of 1) / ``tokens`` over a batch whose rows have
``context`` tokens of prompt, so prefill and the fixed cost of a call cancel. The floor beside it is the
plan's own arithmetic: every launch at the bandwidth or matrix rate
of the machine as measured in the same run on a GPU, as written down for the CPU, launches costing nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gpu.clocks import Clocks, words
from benchmarks.gpu.step_times import StepTimes
from benchmarks.gpu.step_times import words as words_of_steps
from benchmarks.record import summary
from makeready.engine.entrypoints.options import UsageError
from makeready.engine.llm import LLM, SamplingParams
from makeready.graphs.inspect.analysis import launch_costs
from makeready.graphs.plan.spec import DECODE, EXTEND
from makeready.graphs.plan.targets import Target, target_of


def latency(
    llm: LLM,
    *,
    rows: Sequence[int],
    context: int,
    tokens: int,
    prompts: Sequence[int],
    repeats: int,
    target: Target | None = None,
    clocks: Clocks | None = None,
    stamps: StepTimes | None = None,
) -> dict[str, Any]:
    """Measure ``llm``, greedy, on random token ids.

    Args:
        rows: batch sizes for the time between tokens.
        context: prompt tokens a row there.
        tokens: decode steps of a measurement.
        prompts: lengths of single prompts for the time to the first token.
        repeats: measurements of each.
        target: whose figures floors are computed from; None takes those that the plan was chosen by.
        clocks: of the GPU, while it is measured.
        stamps: of the graphs that it launches.

    Raises:
        UsageError: the cache has no room for that many rows at once.
    """
    check_room(llm, max(rows), context + tokens + 1)
    generator = np.random.default_rng(0)
    vocabulary = llm.plan.config["vocab_size"]

    def ids(count: int, length: int) -> list[list[int]]:
        return generator.integers(0, vocabulary, (count, length)).tolist()

    generate(llm, ids(max(rows), 2), 2)  # not counted: first calls allocate
    between = []
    for count in rows:
        seconds, begin = [], time.perf_counter()
        for _ in range(repeats):
            # Other prompts each time, which the prefix cache has not seen.
            once, all_ = (generate(llm, ids(count, context), n) for n in (1, tokens + 1))
            seconds.append((all_ - once) / tokens)
        bound = floor(llm, DECODE, count, count, context + tokens // 2, target)
        steps = None if stamps is None else stamps.take(tokens)
        between.append(
            {
                "rows": count,
                **_measured(seconds, bound),
                **_clocks_since(begin, clocks),
                **({} if steps is None else {"steps": steps}),
            }
        )
    first = []
    for length in prompts:
        begin = time.perf_counter()
        seconds = [generate(llm, ids(1, length), 1) for _ in range(repeats)]
        bound = prompt_floor(llm, length, target)
        first.append({"prompt_tokens": length, **_measured(seconds, bound), **_clocks_since(begin, clocks)})
    return {
        "context": context,
        "tokens": tokens,
        "time_between_tokens": between,
        "time_to_first_token": first,
    }


def check_room(llm: LLM, rows: int, tokens: int) -> None:
    """Whether ``rows`` sequences of ``tokens`` tokens run at once, as a time between tokens by batch means.

    Raises:
        UsageError: they do not.
    """
    need, have = rows * -(-tokens // llm.plan.limits.page_size), llm.engine.executable.pages - 1
    if need > have:
        raise UsageError(
            f"{rows} rows of {tokens:,} tokens need {need:,} pages and the cache has {have:,}, so they would not run "
            "at once; raise kv.memory_gib or leave out the largest of rows (models with states: compile the plan "
            "with plan.traffic.context as long as these rows)"
        )


def _measured(seconds: Sequence[float], bound: float) -> dict[str, Any]:
    return {
        "milliseconds": summary([1e3 * s for s in seconds]),
        "floor_milliseconds": 1e3 * bound,
        "ratio_to_floor": summary([s / bound for s in seconds]),
    }


def _clocks_since(begin: float, clocks: Clocks | None) -> dict[str, Any]:
    found = None if clocks is None else clocks.between(begin, time.perf_counter())
    return {} if found is None else {"clocks": found}


def generate(llm: LLM, prompts: list[list[int]], count: int) -> float:
    """Seconds of ``count`` new tokens for each prompt."""
    params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(token_ids=prompts, sampling=params)
    took = time.perf_counter() - began
    assert all(output.completion_tokens == count for output in outputs)
    return took


def floor(llm: LLM, phase: str, rows: int, tokens: int, context: int, target: Target | None = None) -> float:
    """Roofline seconds of a step that has exactly so many rows and tokens, padding left out."""
    bucket = llm.engine.buckets.covering(phase, rows, tokens)
    exact = type(bucket)(phase, rows, tokens)
    target = target or target_of(llm.plan)
    costs = launch_costs(llm.plan, exact, context, target)
    return sum(cost.seconds - target.launch_seconds for cost in costs)


def prompt_floor(llm: LLM, length: int, target: Target | None = None) -> float:
    """Roofline seconds of the steps that a prompt of ``length`` tokens is cut into."""
    most = llm.plan.limits.max_tokens
    chunks = [(done, min(most, length - done)) for done in range(0, length, most)]
    return sum(floor(llm, EXTEND, 1, tokens, done + tokens // 2, target) for done, tokens in chunks)


def table(result: dict[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = []
    for row in result["time_between_tokens"]:
        lines.append(
            f"{row['rows']:4d} rows of {result['context']}: {_figures(row)} a token{words(row.get('clocks'))}"
            f"{words_of_steps(row.get('steps'))}"
        )
    for row in result["time_to_first_token"]:
        lines.append(
            f"prompt of {row['prompt_tokens']} tokens: {_figures(row)} to the first token{words(row.get('clocks'))}"
        )
    return lines


def _figures(row: dict[str, Any]) -> str:
    took = row["milliseconds"]
    return (
        f"{took['median']:.2f} ms ({took['min']:.2f}-{took['max']:.2f}), floor "
        f"{row['floor_milliseconds']:.2f}, ratio {row['ratio_to_floor']['median']:.2f}"
    )
