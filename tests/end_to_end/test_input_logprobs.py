"""Log-probabilities of prompts against transformers in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import make_model, prompt_of

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions

PAGE, VOCABULARY, TOP = 4, 131, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("scored")
    return folder, make_model(folder, "qwen3", vocab_size=VOCABULARY)


def load(folder: Path, **scheduler: Any) -> LLM:
    return LLM(
        folder,
        max_rows=3,
        max_tokens=24,
        max_logprob_tokens=7,  # a prompt takes several such steps
        page_size=PAGE,
        weight_dtype="float32",
        scheduler=SchedulerOptions(**scheduler),
    )


def params(first: int = 0, count: int = 3) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_new_tokens=count,
        return_logprob=True,
        logprob_start_len=first,
        top_logprobs_num=TOP,
        ignore_eos=True,
    )


def check(reference: Any, prompt: Sequence[int], output: Output, first: int) -> None:
    """Entries are of the prompt's tokens, and say of each what transformers says."""
    entries = output.input_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == list(prompt[first:])
    with torch.no_grad():
        given = reference(torch.tensor([list(prompt)])).logits[0].log_softmax(-1)
    for at, entry in enumerate(entries, start=first):
        if at == 0:
            assert (entry.logprob, entry.top) == (None, ())
            continue
        row = given[at - 1]
        assert entry.logprob == pytest.approx(row[prompt[at]].item(), abs=2e-3)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(TOP).values.tolist(), abs=2e-3)
        for token, value in entry.top:
            assert value == pytest.approx(row[token].item(), abs=2e-3)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_prompts_are_scored_as_transformers_does(model: tuple[Path, Any], prefix_cache: bool) -> None:
    """Around pages and steps, from several places on, beside rows that ask for nothing."""
    folder, reference = model
    llm = load(folder, prefix_cache=prefix_cache)
    cases = [(1, 0), (2, 0), (2, 1), (PAGE + 1, 0), (7, 0), (8, 0), (9, PAGE), (30, 0), (30, 11), (60, 59)]
    prompts = [prompt_of(length, VOCABULARY) for length, _ in cases]
    plain = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
    alone = llm.generate(token_ids=prompts, sampling=plain)
    given = [p for first in cases for p in (params(first[1]), plain)]
    outputs = llm.generate(token_ids=[p for prompt in prompts for p in (prompt, prompt)], sampling=given)
    for (_, first), prompt, wanted, scored, other in zip(
        cases, prompts, alone, outputs[::2], outputs[1::2], strict=True
    ):
        check(reference, prompt, scored, first)
        assert scored.token_ids == other.token_ids == wanted.token_ids
        assert other.input_logprobs is None
        # What comes before the first token that is asked for may be cached, nothing else.
        assert scored.meta_info["cached_tokens"] <= max(first - 1, 0)


def test_samples_of_one_prompt_have_theirs_each(model: tuple[Path, Any]) -> None:
    folder, reference = model
    prompt = prompt_of(13, VOCABULARY)
    asked = SamplingParams(
        n=2, max_new_tokens=2, return_logprob=True, logprob_start_len=3, top_logprobs_num=TOP, sampling_seed=1
    )
    for output in load(folder).generate(token_ids=[prompt], sampling=asked):
        check(reference, prompt, output, 3)


def test_nothing_need_be_generated(model: tuple[Path, Any]) -> None:
    folder, reference = model
    prompt = prompt_of(9, VOCABULARY)
    (output,) = load(folder).generate(token_ids=[prompt], sampling=params(count=0))
    check(reference, prompt, output, 0)
    assert (output.token_ids, output.logprobs, output.finish_reason) == ((), (), "length")


def test_a_prompt_that_fills_the_context_is_scored(model: tuple[Path, Any]) -> None:
    """Nothing is generated behind it, so nothing more needs to fit: not a token, not a page."""
    folder, reference = model
    llm = LLM(
        folder,
        max_rows=2,
        max_tokens=24,
        max_logprob_tokens=7,
        page_size=PAGE,
        context_len=32,
        weight_dtype="float32",
    )
    full, longer = prompt_of(32, VOCABULARY), prompt_of(33, VOCABULARY)
    outputs = llm.generate(token_ids=[full, longer, full], sampling=[params(count=0)] * 2 + [params(count=1)])
    check(reference, full, outputs[0], 0)
    assert outputs[0].finish_reason == "length"
    assert "33 prompt tokens and max_new_tokens=0 exceed the context of 32" in (outputs[1].error or "")
    assert "32 prompt tokens and max_new_tokens=1 exceed the context of 32" in (outputs[2].error or "")


def test_what_cannot_be_scored_says_why(model: tuple[Path, Any]) -> None:
    folder, _ = model
    prompt = prompt_of(5, VOCABULARY)
    (output,) = load(folder).generate(token_ids=[prompt], sampling=params(5))
    assert "logprob_start_len=5 is beyond the prompt's 5 tokens" in (output.error or "")
    without = LLM(folder, max_rows=2, max_tokens=8, weight_dtype="float32")
    (output,) = without.generate(token_ids=[prompt], sampling=params())
    assert "recompile with plan.max_logprob_tokens=8" in (output.error or "")
