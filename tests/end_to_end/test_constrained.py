"""Constrained outputs of SmolLM2: valid, the same alone and in any batch, and nobody's business but their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from smollm2 import smollm2

from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.options import SchedulerOptions

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["person", "animal"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PROMPTS = [
    "Describe somebody as JSON:",
    "The number is",
    "Is water wet? Answer:",
    "Once upon a time there was a king who",
]
ASKED: list[dict[str, Any]] = [
    {"json_schema": SCHEMA, "max_new_tokens": 60},
    {"regex": r" [0-9]{3}-[0-9]{4}", "max_new_tokens": 20},
    {"choice": [" yes", " no", " maybe so"], "max_new_tokens": 9},
    {"max_new_tokens": 14},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(smollm2(), max_rows=4, max_tokens=24, context_len=128, page_size=4, weight_dtype="float16")


def sampling(temperature: float) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=temperature, sampling_seed=i, **asked) for i, asked in enumerate(ASKED)
    ]


@pytest.fixture(scope="module", params=[0.0, 0.9])
def alone(request, llm: LLM) -> tuple[float, list[Any]]:
    asked = sampling(request.param)
    return request.param, [llm.generate([p], s)[0] for p, s in zip(PROMPTS, asked, strict=True)]


def test_every_output_is_valid(alone) -> None:
    _, outputs = alone
    made = json.loads(outputs[0].text)
    jsonschema.validate(made, SCHEMA)
    assert outputs[1].text[0] == " "
    assert len(outputs[1].text) == 9
    assert outputs[2].text in ASKED[2]["choice"]
    assert [o.finish_reason for o in outputs] == ["stop", "stop", "stop", "length"]
    assert outputs[0].meta_info["finish_reason"] == {"type": "stop", "matched": None}


def test_batches_chunks_shared_prefixes_and_lack_of_pages_change_nothing(alone, llm: LLM) -> None:
    """Prompts are cut (24 tokens a step), rows of all kinds mix, and a second round finds prefixes cached."""
    temperature, expected = alone
    prompts, asked = PROMPTS * 3, sampling(temperature) * 3
    for _ in range(2):
        outputs = llm.generate(prompts, asked)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected * 3]
        assert [o.finish_reason for o in outputs] == [o.finish_reason for o in expected * 3]


def test_where_pages_run_out_rows_are_computed_again_and_end_the_same(llm: LLM) -> None:
    asked = [
        SamplingParams(regex="([0-9] ){25}", temperature=0.8, sampling_seed=i, max_new_tokens=60)
        for i in range(4)
    ]
    expected = [llm.generate([p], s)[0] for p, s in zip(PROMPTS, asked, strict=True)]
    options = SchedulerOptions(new_token_ratio=0.1, min_new_token_ratio=0.05)
    page = 30 * 2 * 3 * 64 * 4 * 4  # bytes: layers, k and v, heads, features, fp32, tokens
    with LLM(
        smollm2(), max_rows=4, max_tokens=24, context_len=128, page_size=4, weight_dtype="float16", scheduler=options,
        kv_memory_gib=34 * page / 2**30,
    ) as tight:  # fmt: skip
        outputs = tight.generate(PROMPTS, asked)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        assert any(o.meta_info["num_retractions"] for o in outputs)


def test_samples_of_one_request_go_their_own_ways(llm: LLM) -> None:
    params = SamplingParams(regex="[a-z]{12}", temperature=2.0, n=3, sampling_seed=1, max_new_tokens=20)
    texts = [o.text for o in llm.generate(["Word:"], params)]
    assert len(set(texts)) == 3
    assert all(len(text) == 12 for text in texts)


def test_penalties_bias_and_logprobs_keep_their_meaning(llm: LLM) -> None:
    """Log-probabilities are the model's own; a bias decides among what the grammar allows, and nothing else."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    ids = {text: tokenizer.encode(text, add_special_tokens=False)[0] for text in ("a", "b", "c")}
    asked = {"regex": "a|b", "temperature": 0.0, "return_logprob": True, "max_new_tokens": 3}
    (plain,) = llm.generate(["The answer is ("], SamplingParams(temperature=0, max_new_tokens=1, return_logprob=True,
                                                               top_logprobs_num=20))  # fmt: skip
    for wanted, other in (("a", "b"), ("b", "a")):
        bias = {ids[wanted]: 30.0, ids["c"]: 500.0}
        (output,) = llm.generate(["The answer is ("], SamplingParams(logit_bias=bias, **asked))
        assert output.text == wanted != other
        assert output.logprobs is not None
        assert plain.logprobs is not None
        known = dict(plain.logprobs[0].top)
        if ids[wanted] in known:
            assert output.logprobs[0].logprob == pytest.approx(known[ids[wanted]], abs=1e-4)


def test_a_limit_cuts_a_grammar_off_and_min_new_tokens_holds_its_end_back(llm: LLM) -> None:
    (short,) = llm.generate(["x"], SamplingParams(regex="[a-z]{40}", temperature=0, max_new_tokens=2))
    assert (short.finish_reason, short.completion_tokens) == ("length", 2)
    (held,) = llm.generate(["x"], SamplingParams(regex="[a-z]*", temperature=1, sampling_seed=2, min_new_tokens=6,
                                                 max_new_tokens=8))  # fmt: skip
    assert held.completion_tokens >= 6


def test_one_broken_grammar_of_many_requests_ends_alone(llm: LLM) -> None:
    asked = [SamplingParams(regex="((", max_new_tokens=4), SamplingParams(regex="ab", max_new_tokens=4)]
    broken, fine = llm.generate(["a", "b"], asked)
    assert broken.finish_reason == "error"
    assert "regex cannot be enforced: unclosed group" in (broken.error or "")
    assert fine.text == "ab"


def test_without_a_tokenizer_a_grammar_is_refused(tmp_path: Path) -> None:
    from reference import make_model

    make_model(tmp_path, "llama", eos_token_id=3)
    with LLM(tmp_path, max_rows=2, context_len=32) as tiny:
        (output,) = tiny.generate(token_ids=[[1, 2]], sampling=SamplingParams(regex="a"))
        assert "needs a tokenizer" in (output.error or "")
