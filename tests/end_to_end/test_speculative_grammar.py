"""Drafts of SmolLM2 within grammars: texts are those without drafts, all of them valid, and drafts do come true."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from smollm2 import smollm2

from makeready.engine.constraint import allow_along
from makeready.engine.llm import LLM, Output, SamplingParams, SchedulerOptions
from makeready.engine.loop import Engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann Miller", "Bob Miller", "Ann Smith"]},
        "city": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 3}
KNOWN = '[{"name": "Ann Miller", "city": "Berlin", "age": 31}, {"name": "Bob Miller", "city": "Berlin", "age": 31}]'
DATES = r"( 2024-0[1-9]-[0-3][0-9],){4}"
CODE = "def f(a, b):\n    return a + b\n\ndef g(a, b):\n    return a - b\n\ndef"
ASKED: list[tuple[str, dict[str, Any]]] = [
    (f"{KNOWN}\nOnce more, with others:\n", {"json_schema": PEOPLE, "max_new_tokens": 90}),
    (f"{KNOWN}\nThe same:\n", {"json_schema": PEOPLE, "max_new_tokens": 90, "min_new_tokens": 3}),
    ("Dates: 2024-01-01, 2024-01-02, 2024-01-03,", {"regex": DATES, "max_new_tokens": 60}),
    ("ab ab ab ab ab", {"regex": "( ab| ba){9}", "max_new_tokens": 40, "return_logprob": True}),
    ("yes no yes no yes", {"choice": [" no yes no", " no no no", " yes yes"], "max_new_tokens": 9}),
    (CODE, {"max_new_tokens": 30}),
    ("1 1 1 1 1 1 1", {"max_new_tokens": 20}),
]
PROMPTS = [prompt for prompt, _ in ASKED]
LIMITS: dict[str, Any] = {"max_rows": 4, "max_tokens": 48, "context_len": 256, "page_size": 4}
LIMITS |= {"weight_dtype": "float16"}  # activations are fp32 then: near ties are few
CASES = [  # temperature, overlap, forced tokens
    pytest.param(*case, marks=() if case == (0.8, True, True) else pytest.mark.slow)
    for case in itertools.product((0.0, 0.8), (True, False), (True, False))
]


def sampling(temperature: float) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=temperature, sampling_seed=i, **fields)
        for i, (_, fields) in enumerate(ASKED)
    ]


@cache
def plain(temperature: float) -> list[Output]:
    """What requests get one by one and without drafts."""
    with LLM(smollm2(), **LIMITS) as llm:
        asked = zip(PROMPTS, sampling(temperature), strict=True)
        return [llm.generate([prompt], params)[0] for prompt, params in asked]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(smollm2(), **LIMITS, speculative={"method": "ngram", "num_draft_tokens": 5}) as made:
        yield made


def assert_valid(outputs: list[Output]) -> None:
    for output in outputs[:2]:
        jsonschema.validate(json.loads(output.text), PEOPLE)
    assert re.fullmatch(DATES, outputs[2].text)
    assert re.fullmatch("( ab| ba){9}", outputs[3].text)
    assert outputs[4].text in ASKED[4][1]["choice"]


@pytest.mark.parametrize(("temperature", "overlap", "forced"), CASES)
def test_texts_are_those_without_drafts(llm: LLM, temperature: float, overlap: bool, forced: bool) -> None:
    """Steps count as under way until the next is launched where they overlap, as a GPU's do."""
    executable: Any = llm.engine.executable
    executable.asynchronous = overlap
    llm.engine = Engine(executable, SchedulerOptions(speculation="always", forced_tokens=forced))
    outputs = llm.generate(PROMPTS, sampling(temperature))
    for output, wanted in zip(outputs, plain(temperature), strict=True):
        assert (output.error, output.text, output.finish_reason) == (None, wanted.text, wanted.finish_reason)
        if forced:  # tokens that are sure to come are cut as the tokenizer does, not as the model likes
            assert output.token_ids == wanted.token_ids
    assert_valid(outputs)
    drafted, right = (
        [output.meta_info.get(f"spec_{name}_token_num", 0) for output in outputs[:4]]
        for name in ("draft", "accept")
    )
    assert all(drafted), "some grammar saw no drafts"
    assert sum(right) > 8
    assert forced or all(right)  # else what is sure to come needs no guess
    llm.engine.pools.check()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_drafts_within_grammars(temperature: float) -> None:
    """The model itself, which is right wherever the grammar lets it say what it would."""
    asked = {"method": "draft", "checkpoint": smollm2(), "num_draft_tokens": 3}
    with LLM(smollm2(), **LIMITS, speculative=asked, scheduler=SchedulerOptions(speculation="always")) as llm:
        outputs = llm.generate(PROMPTS, sampling(temperature))
        llm.engine.pools.check()
    assert [(o.error, o.text) for o in outputs] == [(None, o.text) for o in plain(temperature)]
    assert_valid(outputs)
    for output in outputs[:4]:
        assert output.meta_info["spec_accept_token_num"] > 0


@pytest.mark.slow
def test_rows_that_follow_a_grammar_run_no_trees() -> None:
    """Nodes of a tree have no masks: such rows, and those beside them, generate token by token."""
    asked = {"method": "draft", "checkpoint": smollm2(), "tree": [2, 1]}
    with LLM(smollm2(), **LIMITS, speculative=asked, scheduler=SchedulerOptions(speculation="always")) as llm:
        outputs = llm.generate(PROMPTS, sampling(0.8))
        llm.engine.pools.check()
        (free,) = llm.generate(PROMPTS[-1:], sampling(0.8)[-1])
    assert [(o.error, o.text) for o in outputs] == [(None, o.text) for o in plain(0.8)]
    assert_valid(outputs)
    assert not any(output.meta_info.get("spec_verify_ct") for output in outputs[:5])
    assert free.text == plain(0.8)[-1].text
    assert free.meta_info["spec_accept_token_num"] > 0


@pytest.mark.slow
def test_a_grammar_alone_takes_fewer_steps(llm: LLM) -> None:
    executable: Any = llm.engine.executable
    executable.asynchronous = True
    steps: list[Any] = []
    llm.engine = Engine(executable, SchedulerOptions(speculation="always", forced_tokens=False))
    llm.engine.observer = steps.append
    (output,) = llm.generate([PROMPTS[3]], sampling(0.0)[3])
    assert output.text == plain(0.0)[3].text
    assert 2 * len(steps) < len(output.token_ids)


def test_masks_along_drafts_are_those_of_one_token_after_the_other(llm: LLM) -> None:
    """Beside a grammar that takes them in itself; the first that may not come ends it."""
    assert llm.tokenizer is not None
    words = -(-llm.engine.limits.vocabulary // 32)
    replies = llm.replies(PROMPTS[0], sampling(0.0)[0])
    start = replies[0].sequence.constraint
    assert start is not None
    valid = llm.tokenizer.encode(KNOWN, add_special_tokens=False)
    for taken in (0, 1, 7, 20):
        for wrong in (None, 0, 2, 4):
            grammar, alone = start.copy(), start.copy()
            for token in valid[:taken]:
                for one in (grammar, alone):
                    assert not one.take(token)
            drafts = list(valid[taken : taken + 5])
            if wrong is not None:
                drafts[wrong] = 5  # no JSON begins or goes on with it
            masks = np.zeros((6, words), np.int32)
            count = allow_along(grammar, drafts, masks, forces=False)
            assert count == (6 if wrong is None else wrong + 1)
            for place in range(count):
                expected = np.zeros(words, np.int32)
                alone.allow(expected)
                assert np.array_equal(masks[place], expected)
                if place + 1 < count:
                    alone.take(drafts[place])
            again = np.zeros(words, np.int32)
            grammar.allow(again)
            assert np.array_equal(again, masks[0]), "the grammar went on with its drafts"
