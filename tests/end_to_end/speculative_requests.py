"""Requests of any kind, run at once under steps that verify drafts, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from small_configs import VOCABULARY

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine
from makeready.graphs.plan.spec import VERIFY

CONTEXT = 96
LIMITS: dict[str, Any] = {"max_rows": 4, "max_tokens": 40, "context_len": CONTEXT, "max_logprob_tokens": 20}
STEMS = [[(7 * i * i + 3 * s) % VOCABULARY for i in range(50)] for s in range(2)]
# Few tokens are likely, so that they come in the same order again.
LIKELY = {"logit_bias": {3: 40.0, 8: 40.0, 21: 40.0}}
ASKED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, **LIKELY},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0, "frequency_penalty": -2.0},
    {"temperature": 0.9, "frequency_penalty": -2.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.8, **LIKELY},
    {"temperature": 1.2, "min_p": 0.1, "presence_penalty": -1.0, "repetition_penalty": 0.8},
    {"temperature": 1.0, "stop_token_ids": [3], "ignore_eos": False, **LIKELY},
    {"temperature": 1.0, "stop_token_ids": [3, 8], "min_new_tokens": 11, "ignore_eos": False, **LIKELY},
    {"temperature": 0, "max_new_tokens": 1},
    {"temperature": 0, "max_new_tokens": 2, **LIKELY},
    {"temperature": 0.5, "max_new_tokens": 3, **LIKELY},
    *({"temperature": 1.0, "max_new_tokens": most, "logit_bias": {3: 90.0}} for most in range(14, 20)),
]


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of any length, some of which fill the context with their output, and some that are asked of twice."""
    made = []
    for i, fields in enumerate(ASKED):
        prompt = [*STEMS[i % 2][: 4 * (i % 7)], *([5, 6, 7] * (i % 3)), i]
        room = CONTEXT - len(prompt)
        params = {"max_new_tokens": room if i % 3 == 0 else 30 + i, "ignore_eos": True, **fields}
        params.setdefault("stop_token_ids", [VOCABULARY - 1])  # so that nobody knows how long outputs will be
        scored = {"return_logprob": i % 2 == 0, "top_logprobs_num": 3 * (i % 4 == 0)}
        made.append((prompt, SamplingParams(sampling_seed=i, **scored, **params)))
    return made


def together(
    llm: LLM, pages: int | None = None, **options: Any
) -> tuple[list[Output], Counter[tuple[int, int]]]:
    """All requests at once, under steps that count as under way until the next is launched where they overlap.

    Also how often so many drafts were right of so many.
    """
    executable: Any = llm.engine.executable
    executable.pages, executable.asynchronous = pages or executable.pages, True
    llm.engine = Engine(executable, SchedulerOptions(**{"speculation": "always", **options}))
    found, launch = Counter[tuple[int, int]](), type(executable).launch

    def watched(bucket: Any, step: Any, **more: Any) -> Any:
        pending = launch(executable, bucket, step, **more)
        if bucket.phase == VERIFY:
            live, results = step["query_len"] > 0, pending.wait()
            found.update(
                zip(results["accepted"][live].tolist(), results["drafted"][live].tolist(), strict=True)
            )
        return pending

    executable.launch = watched
    prompts, sampling = zip(*requests(), strict=True)
    made = llm.generate(token_ids=list(prompts), sampling=list(sampling))
    llm.engine.pools.check()
    assert llm.engine.pool.held == 0
    return made, found


def assert_alike(made: list[Output], expected: list[Output], exact: bool = False) -> None:
    for output, wanted in zip(made, expected, strict=True):
        assert output.error is None
        assert output.token_ids == wanted.token_ids
        assert output.finish_reason == wanted.finish_reason
        assert (output.logprobs is None) == (wanted.logprobs is None)
        if exact:
            assert output.logprobs == wanted.logprobs
        elif output.logprobs is not None and wanted.logprobs is not None:
            for one, other in zip(output.logprobs, wanted.logprobs, strict=True):
                assert one.token_id == other.token_id
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert [i for i, _ in one.top] == [i for i, _ in other.top]
