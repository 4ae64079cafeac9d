"""Logits that are no numbers end their own request with an error, and no other."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import expected, make_model, prompt_of

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine

BAD, VOCABULARY, COUNT = 130, 131, 6
PLAN: dict[str, Any] = {"max_rows": 4, "max_tokens": 24, "page_size": 4, "weight_dtype": "float32"}
GREEDY = SamplingParams(temperature=0, max_new_tokens=COUNT, ignore_eos=True)


def broken(folder: Path, name: str, row: int, value: float) -> None:
    """A model one number of whose ``name`` is ``value``."""
    model = make_model(folder, "llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.get_parameter(name)[row, 3] = value
    model.save_pretrained(folder)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_rows_beside_a_broken_one_are_transformers(
    tmp_path: Path, asynchronous: bool, prefix_cache: bool
) -> None:
    """One token's embedding is NaN: prompts that have it fail, and no others.

    In whatever company, on pages that were just taken from a broken one, and with beginnings in common: the
    pages before the broken token are spoiled by it, and are of the cache.
    """
    model = make_model(tmp_path, "llama", vocab_size=VOCABULARY)
    sound = [prompt_of(n, VOCABULARY, seed=n) for n in (9, 1, 30, 5, 17, 26)]
    sound += [[*sound[2][:21], *sound[3]]] * 2
    wanted = [expected(model, prompt, COUNT).tokens for prompt in sound]
    unused = min(set(range(VOCABULARY)) - {token for ids in sound + wanted for token in ids})
    bad = [[*prompt[:-1], unused, prompt[-1]] for prompt in sound]
    with torch.no_grad():
        model.get_input_embeddings().weight[unused, 3] = math.nan
    model.save_pretrained(tmp_path)
    options = SchedulerOptions(prefix_cache=prefix_cache)
    llm = LLM(tmp_path, **PLAN, kv_memory_gib=2e-5, scheduler=options)
    llm.engine.executable.asynchronous = asynchronous  # type: ignore[misc]
    llm.engine = Engine(llm.engine.executable, options)
    assert llm.engine.pool.usable < 30  # far fewer pages than all prompts take together
    for _ in range(2):  # the second time around beside what the first has left in the cache
        asked = [prompt for pair in zip(bad, sound, strict=True) for prompt in pair]
        outputs = llm.generate(token_ids=asked, sampling=GREEDY)
        for failed in outputs[::2]:
            assert (failed.finish_reason, failed.token_ids) == ("error", ())
            assert "logits of output token 0 are not finite" in (failed.error or "")
        assert [list(output.token_ids) for output in outputs[1::2]] == wanted
        assert llm.engine.pool.held == 0
        if llm.engine.scheduler.cache is not None:
            llm.engine.scheduler.cache.check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5, "top_p": 0.9}], ids=str
)
def test_a_broken_weight_is_an_error_not_a_text(tmp_path: Path, value: float, sampling: Any) -> None:
    broken(tmp_path, "model.layers.1.mlp.down_proj.weight", 7, value)
    llm = LLM(tmp_path, **PLAN)
    asked = SamplingParams(max_new_tokens=COUNT, return_logprob=True, top_logprobs_num=2, **sampling)
    for output in llm.generate(token_ids=[[1, 2, 3], [4]], sampling=asked):
        assert (output.finish_reason, output.token_ids, output.logprobs) == ("error", (), ())
        assert "not finite" in (output.error or "")
    with pytest.raises(RequestError, match="not finite"):
        list(llm.stream([1, 2, 3], asked))


def test_a_text_that_breaks_off_keeps_what_it_has(tmp_path: Path) -> None:
    """The third token's embedding is NaN: two tokens, the one itself, and the error behind it."""
    model = make_model(tmp_path, "llama", vocab_size=VOCABULARY)
    prompt = prompt_of(9, VOCABULARY)
    tokens = expected(model, prompt, COUNT).tokens
    at = next(i for i in range(1, COUNT) if tokens[i] not in prompt + tokens[:i])
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens[at]] = math.nan
    model.save_pretrained(tmp_path)
    (output,) = LLM(tmp_path, **PLAN).generate(token_ids=[prompt], sampling=GREEDY)
    assert list(output.token_ids) == tokens[: at + 1]
    assert f"logits of output token {at + 1} are not finite" in (output.error or "")


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    broken(tmp_path, "model.embed_tokens.weight", BAD, math.nan)
    llm = LLM(tmp_path, **PLAN, max_logprob_tokens=8)
    asked = SamplingParams(max_new_tokens=0, return_logprob=True, logprob_start_len=0)
    sound = [1, 2, 3, 4, 5]
    outputs = llm.generate(token_ids=[[1, 2, BAD, 3, 4, 5, 6, 7, 8, 9], sound, [1, BAD]], sampling=asked)
    assert [output.finish_reason for output in outputs] == ["error", "length", "error"]
    # The first behind it, or one before it, where attention of several tokens multiplies its values by zero.
    assert re.search(r"logits of prompt token [13] are not finite", outputs[0].error or "")
    assert "not finite" in (outputs[2].error or "")
    assert all(math.isfinite(entry.logprob or 0) for entry in outputs[1].input_logprobs or ())
