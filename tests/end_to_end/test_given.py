"""What callers give, one bad of several: each is answered or refused by itself, and none waits for another's text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.text.tokenizer import LONG, Tokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=3)
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(smollm2(), max_rows=4, max_tokens=64, context_len=256)


def outcomes(outputs: Any) -> list[str]:
    return [output.error or "ok" for output in outputs]


def test_one_broken_conversation_costs_no_other(llm: LLM) -> None:
    broken = [{"role": "user", "content": None}]
    made = outcomes(llm.chat([USER, broken, USER, None, []], GREEDY))
    assert [outcome == "ok" for outcome in made] == [True, False, True, False, False]
    assert "message 0 needs content" in made[1]
    (alone,) = llm.chat(broken, GREEDY)
    assert alone.error == made[1]
    assert llm.chat([]) == []
    once = llm.chat(iter(USER), GREEDY)
    assert outcomes(llm.chat((USER, iter(USER)), GREEDY)) == [
        "ok",
        outcomes(llm.chat([iter(USER)], GREEDY))[0],
    ]
    assert once[0].text == llm.chat(USER, GREEDY)[0].text
    for bad in ("hi", USER[0], 3):
        with pytest.raises(RequestError, match=r"messages=.* must be a list of messages"):
            llm.chat(bad)  # type: ignore[arg-type]


IDS = [[5, 6, 7], [8, 9]]
SHAPES: list[Callable[[], Any]] = [
    lambda: [np.array(ids) for ids in IDS],
    lambda: [np.array(ids, np.uint16) for ids in IDS],
    lambda: [torch.tensor(ids) for ids in IDS],
    lambda: [[np.int64(i) for i in ids] for ids in IDS],
    lambda: [[float(i) for i in ids] for ids in IDS],  # as tables hold them
    lambda: tuple(map(tuple, IDS)),
    lambda: (ids for ids in IDS),
    lambda: [range(5, 8), iter(IDS[1])],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_in_any_shape(llm: LLM, shape: Callable[[], Any]) -> None:
    expected = [output.token_ids for output in llm.generate(token_ids=IDS, sampling=GREEDY)]
    assert [output.token_ids for output in llm.generate(token_ids=shape(), sampling=GREEDY)] == expected
    assert [output.token_ids for output in llm.generate(shape(), GREEDY)] == expected


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_table_of_ids_and_a_single_prompt(llm: LLM, make: Callable[[Any], Any]) -> None:
    (single,) = llm.generate(token_ids=[[5, 6, 7]], sampling=GREEDY)
    for given in ([[5, 6, 7], [5, 6, 7]], [5, 6, 7]):
        outputs = llm.generate(token_ids=make(given), sampling=GREEDY)
        assert [output.token_ids for output in outputs] == [single.token_ids] * (2 if given[0] != 5 else 1)


def test_bad_prompts_are_refused_one_by_one_in_true_sentences(llm: LLM) -> None:
    bad: dict[str, Any] = {
        "not None": None,
        "not 3": 3,
        "not b'ab'": b"ab",
        "not {'prompt': 'a'}": {"prompt": "a"},
        "token id True of": [True],
        "token id 'a' of": ["a"],
        "token id 1.5 of": [1.5],
        "token id -1 of": [-1],
        "token id nan of": [float("nan")],
        "token id [1, 2] of": np.array([[1, 2]]),
        "the prompt is empty": "",
        "is empty; give": np.array([], np.int64),
        "lone surrogate": "\ud800",
    }
    outputs = llm.generate(["hi", *bad.values(), "hi"], GREEDY)
    assert (outputs[0].error, outputs[-1].error) == (None, None)
    for words, output in zip(bad, outputs[1:-1], strict=True):
        assert words in (output.error or "")


def test_what_is_no_list_of_prompts_is_refused(llm: LLM) -> None:
    for given in (3, b"ab", {"a": 1}, {"a"}, True):
        with pytest.raises(RequestError, match=r"prompts=.* must be a text or a list of texts"):
            llm.generate(given)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token_ids='ab' must be a list of lists"):
        llm.generate(token_ids="ab")
    with pytest.raises(RequestError, match="give either"):
        llm.generate()
    assert llm.generate([]) == llm.generate(token_ids=np.zeros((0, 3), int)) == []


def test_sampling_is_parameters_or_their_fields(llm: LLM) -> None:
    fields = {"temperature": 0, "max_new_tokens": 3}
    (expected,) = llm.generate("hi", GREEDY)
    (made,) = llm.generate("hi", fields)
    assert made.token_ids == expected.token_ids
    assert list(llm.stream("hi", fields)) == list(llm.stream("hi", GREEDY))
    for bad, words in (
        (3, "must be SamplingParams, or a dict"),
        ({"max_tokens": 2}, "did you mean max_new_tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate(["a", "b"], bad)  # type: ignore[arg-type]
    each: list[Any] = [
        fields,
        {**fields, "n": 2, "top_p": "x"},
        GREEDY,
        7,
        {**fields, "max_new_tokens": None},
    ]
    made = outcomes(llm.generate(["hi"] * 5, each))
    assert [outcome == "ok" for outcome in made] == [True, False, False, True, False, True]
    assert made[1] == made[2] == "top_p='x' must be a number"
    with pytest.raises(RequestError, match="1 values of sampling were given for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_routing_is_checked_for_each(llm: LLM) -> None:
    """A key that cannot be hashed would otherwise be found inside a step."""
    keys: Any = ["a", ["b"], None]
    made = outcomes(llm.generate(["hi"] * 3, GREEDY, extra_key=keys))
    assert (made[0], made[1]) == ("ok", "extra_key=['b'] must be a string")
    made = outcomes(llm.generate(["hi"] * 3, GREEDY, priority=[True, 1.5, np.int64(3)]))  # type: ignore[list-item]
    assert made[2] == "ok"
    assert "priority=True must be a number" in made[0]
    assert "priority=1.5 must be a whole number" in made[1]


def test_a_prompt_that_is_far_too_long_is_refused_by_its_length(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("it was tokenized")

    text = "word " * 2_000_000
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", never)
        (output,) = llm.generate(text, GREEDY)
        (chat,) = llm.chat([{"role": "user", "content": text}], GREEDY)
    assert llm.tokenizer is not None
    longest = max(len(token) for token in llm.tokenizer.backend.get_vocab())
    words = f"has at least {-(-len(text) // longest):,} tokens, which exceed the context of 256 tokens"
    assert words in (output.error or "")
    assert "tokens, which exceed the context of 256 tokens" in (chat.error or "")


def test_no_prompt_waits_while_a_long_one_is_tokenized(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = " " * (LONG + 1), "hi"
    answered, encode = threading.Event(), Tokenizer.encode

    def slow(tokenizer: Tokenizer, text: str, **named: Any) -> list[int]:
        if len(text) > LONG:
            assert answered.wait(600), "the other prompt was not answered meanwhile"
            text = "long"
        return encode(tokenizer, text, **named)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    assert llm.tokenizer is not None
    monkeypatch.setattr(llm.tokenizer.length_bound, "longest", None)
    places: list[int] = []

    def on_finish(place: int, output: Any) -> None:
        places.append(place)
        answered.set()

    outputs = llm.generate([long, short], [{"n": 2, "max_new_tokens": 2}, GREEDY], on_finish=on_finish)
    assert outcomes(outputs) == ["ok"] * 3
    assert places[0] == 2
    assert len(outputs[2].token_ids) == 3
    answered.clear()
    (outcome,) = outcomes(llm.generate([[{"a": 1}]], GREEDY))
    assert "token id {'a': 1}" in outcome
