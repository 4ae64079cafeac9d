"""Speculative decoding of SmolLM2: texts, stops and grammars are those without drafts, in fewer steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
from smollm2 import smollm2

from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine

CODE = "".join(f"def {name}(a, b):\n    return a {op} b\n\n" for name, op in zip("fgh", "+-*", strict=True))
CODE += "def"
ROWS = "<row><id>1</id><name>Ann</name></row>\n<row><id>2</id><name>Bob</name></row>\n<row><id>3</id><name>"
SCHEMA = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 12},
        "first_names_of_friends": {
            "type": "array",
            "items": {"enum": ["Ann", "Bob"]},
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["first_name", "first_names_of_friends"],
    "additionalProperties": False,
}
ASKED: list[tuple[str, dict[str, Any]]] = [
    (CODE, {"temperature": 0, "max_new_tokens": 40}),
    (CODE, {"temperature": 0, "max_new_tokens": 40, "stop": ["return a /"]}),
    (CODE, {"temperature": 0, "max_new_tokens": 60, "stop_regex": [r"a [/%] b\n"]}),
    (ROWS, {"temperature": 0.3, "max_new_tokens": 40, "stop": ["</row>"]}),
    (ROWS, {"temperature": 0, "max_new_tokens": 40, "no_stop_trim": True, "stop": ["<id>5"]}),
    ("Somebody as JSON:", {"temperature": 0, "max_new_tokens": 60, "json_schema": SCHEMA}),
    ("Somebody as JSON:", {"temperature": 0.8, "max_new_tokens": 60, "json_schema": SCHEMA}),
    ("1 1 1 1 1 1", {"temperature": 0.8, "max_new_tokens": 20, "frequency_penalty": -0.5}),
    (
        "The three laws of thermodynamics are",
        {"temperature": 0.9, "max_new_tokens": 20, "return_logprob": True},
    ),
]
LIMITS: dict[str, Any] = {"max_rows": 4, "max_tokens": 48, "context_len": 256, "page_size": 4}
LIMITS |= {"weight_dtype": "float16"}  # activations are fp32 then: near ties are few
PROMPTS = [prompt for prompt, _ in ASKED]
SAMPLING = [SamplingParams(sampling_seed=i, **fields) for i, (_, fields) in enumerate(ASKED)]


@pytest.fixture(scope="module")
def plain() -> list[Output]:
    with LLM(smollm2(), **LIMITS) as llm:
        return [llm.generate([p], s)[0] for p, s in zip(PROMPTS, SAMPLING, strict=True)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Its steps count as under way until the next is launched, as a GPU's are."""
    made = LLM(smollm2(), **LIMITS, speculative={"method": "ngram", "num_draft_tokens": 5})
    executable: Any = made.engine.executable
    executable.asynchronous = True
    made.engine = Engine(executable, SchedulerOptions(speculation="always"))
    return made


def test_texts_are_those_without_drafts(plain: list[Output], llm: LLM) -> None:
    steps: list[Any] = []
    llm.engine.observer = steps.append
    made = llm.generate(PROMPTS, SAMPLING)
    for output, wanted in zip(made, plain, strict=True):
        assert (output.error, output.finish_reason) == (None, wanted.finish_reason)
        assert (output.token_ids, output.text) == (wanted.token_ids, wanted.text)
        assert output.meta_info["finish_reason"] == wanted.meta_info["finish_reason"]
    assert {output.finish_reason for output in made} == {"stop", "length"}
    assert any(0 < step.drafts < step.rows for step in steps)
    for output in made[5:7]:
        assert set(json.loads(output.text)) == set(SCHEMA["required"])
        assert output.meta_info["spec_draft_token_num"] > 0


def test_a_row_alone_takes_fewer_steps(plain: list[Output], llm: LLM) -> None:
    steps: list[Any] = []
    llm.engine.observer = steps.append
    (output,) = llm.generate([CODE], SAMPLING[0])
    assert output.token_ids == plain[0].token_ids
    assert 2 * len(steps) < len(output.token_ids)
    assert output.meta_info["spec_accept_length"] > 2


def test_what_is_streamed_adds_up(plain: list[Output], llm: LLM) -> None:
    for at in (1, 4):
        pieces = list(llm.stream(PROMPTS[at], SAMPLING[at]))
        assert len(pieces) > 1
        assert "".join(pieces) == plain[at].text


@pytest.mark.slow
def test_the_model_drafts_for_itself(plain: list[Output]) -> None:
    """Of real text, greedy and drawn: all drafts are right but for near ties, and grammars are followed.

    Drafts know nothing of grammars.
    """
    made = LLM(
        smollm2(),
        **LIMITS,
        scheduler=SchedulerOptions(speculation="always"),
        speculative={"method": "draft", "checkpoint": smollm2(), "num_draft_tokens": 4},
    )
    outputs = made.generate(PROMPTS, SAMPLING)
    assert [(o.token_ids, o.text) for o in outputs] == [(o.token_ids, o.text) for o in plain]
    free = [o.meta_info for o, s in zip(outputs, SAMPLING, strict=True) if not (s.regex or s.json_schema)]
    guessed = sum(meta.get("spec_draft_token_num", 0) for meta in free)
    right = sum(meta.get("spec_accept_token_num", 0) for meta in free)
    # Tokens behind a stop are dropped, and what is guessed behind them counts for none.
    assert guessed > 100
    assert right >= 0.97 * guessed
