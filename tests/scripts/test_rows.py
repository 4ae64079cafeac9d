"""What a line of a batch file may say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from makeready.engine.entrypoints.batch import rows
from makeready.engine.entrypoints.batch.base import RowError
from makeready.engine.entrypoints.batch.rows import RowFormat
from makeready.engine.output import Output, TokenLogprob
from makeready.engine.protocol.asked import AskError
from makeready.engine.sampling import SamplingParams

BAD_LINES = [
    (b"not json", "the row is not JSON"),
    (b'{"prompt": "a"', "the row is not JSON"),
    (b'["prompt"]', "the row is no object"),
    (b"\xff\xfe{}", "not UTF-8 .byte 1."),
    (b'{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
    (b'{"prompt": "a", "top_p": NaN}', "NaN is no number"),
    (b'{"n": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": "a", "id": 1e400}', "1e400, which is beyond those of 64-bit floats"),
    (b'{"prompt": "a", "id": {"x": [-1e999]}}', "-1e999, which is beyond"),
]
BAD_FIELDS = [
    ({}, "this one has none of them"),
    ({"prompt": "a", "messages": []}, "this one has prompt and messages"),
    ({"prompt": "a", "token_ids": [1]}, "this one has prompt and token_ids"),
    ({"prompt": "a", "temprature": 1}, "there is no field 'temprature'; did you mean temperature"),
    ({"prompt": "a", "max_tokens": 1}, "there is no field 'max_tokens'; did you mean max_new_tokens"),
    ({"prompt": "a", "seed": 1}, "did you mean sampling_seed"),
    ({"prompt": "a", "text": 1}, "the answer has a field 'text' of its own; rename the column"),
    ({"prompt": "a", "error": 1}, "the answer has a field 'error' of its own"),
    (
        {"prompt": "a", "sampling": {"top_k": 1}, "top_k": 1},
        "top_k is given both in the row and under sampling",
    ),
    ({"prompt": 1}, "prompt must be a string, not number"),
    ({"prompt": None}, "this one has none of them"),
    ({"messages": "hi"}, "messages must be a list, not string"),
    ({"token_ids": {}}, "token_ids must be a list, not object"),
    ({"prompt": "a", "sampling": 1}, "sampling must be an object"),
    ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "is for messages"),
    ({"prompt": "a", "priority": 1.5}, "priority=1.5 must be a whole number"),
    ({"prompt": "a", "priority": True}, "priority=True must be a number"),
    ({"prompt": "a", "extra_key": 3}, "extra_key=3 must be a string"),
    ({"messages": [], "chat_template_kwargs": {"messages": 1}}, "cannot set messages"),
    ({"messages": [], "chat_template_kwargs": {"chat_template": "{x}"}}, "cannot set chat_template"),
    ({"messages": [], "chat_template": 1}, "chat_template must be a string, not number"),
    (
        {"messages": [], "chat_template": "/etc/passwd"},
        "neither a template's text nor the path of a .jinja file",
    ),
    (
        {"messages": [], "chat_template": "../x.txt"},
        "neither a template's text nor the path of a .jinja file",
    ),
    ({"prompt": "a", "chat_template": "{{ x }}"}, "chat_template is for messages"),
    ({"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens must be true or false, not string"),
    ({"prompt": "a", "add_special_tokens": 0}, "add_special_tokens must be true or false, not number"),
    ({"token_ids": [1], "add_special_tokens": False}, "add_special_tokens is for texts"),
    ({"messages": [], "chat_template_kwargs": {"tools": 1}}, "tools .* must be a list"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_lines_that_are_no_objects(line, reason):
    with pytest.raises(RowError, match=reason):
        rows.parse(line)


@pytest.mark.parametrize(("fields", "reason"), BAD_FIELDS)
def test_fields_that_make_no_request(fields, reason):
    with pytest.raises(AskError, match=reason):
        RowFormat().read(fields)


def test_a_row_is_read_with_its_sampling_fields_from_both_places():
    fields = rows.parse(b'\xef\xbb\xbf{"id": 7, "prompt": "a", "top_k": 3, "sampling": {"n": 2}}\r\n')
    ask = RowFormat().read(fields)
    assert (ask.kind, ask.prompts, ask.sampling) == ("prompt", ("a",), {"top_k": 3, "n": 2})
    assert ask.routing == {}
    ask = RowFormat().read({"prompt": "a", "priority": -2, "extra_key": "tenant"})
    assert ask.routing == {"priority": -2, "extra_key": "tenant"}


def test_a_null_is_a_field_that_is_not_there():
    """What pandas writes for a cell without a value."""
    nothing = {name: None for name in rows.FIELDS if name != "prompt"}
    ask = RowFormat().read({"prompt": "a"} | nothing)
    assert (ask.kind, ask.prompts, ask.sampling, ask.template, ask.routing) == ("prompt", ("a",), {}, {}, {})
    ask = RowFormat().read({"prompt": "a", "sampling": {"top_k": None, "n": 2}, "top_k": 3})
    assert ask.sampling == {"n": 2, "top_k": 3}


def test_further_columns_are_handed_through_or_refused():
    fields = {"id": 1, "prompt": "a", "label": {"x": [1.5, None]}, "prompt_id": None, "idx": "b", "input": 2}
    RowFormat().read(fields)
    handed = {"id": 1, "label": {"x": [1.5, None]}, "prompt_id": None, "idx": "b", "input": 2}
    made = answer(fields, [output("text")], 0)
    assert {name: value for name, value in made.items() if name in fields} == handed
    assert made["text"] == "text"
    refused = RowFormat().refusal({**fields, "text": "mine", "error": "mine"}, "why", None, 3)
    assert refused == handed | {"error": {"message": "why", "line": 3}}
    with pytest.raises(RowError, match="there is no field 'label'; fields are prompt, messages"):
        RowFormat(carry=False).read(fields)


def test_what_is_written_is_json_whatever_it_holds():
    line = rows.encode({"id": float("inf"), "x": [{"y": float("nan")}, "\ud800", (1.5, float("-inf"))]})
    read = json.loads(line, parse_constant=pytest.fail)
    assert read == {"id": None, "x": [{"y": None}, "\ud800", [1.5, None]]}


def output(text: str, *values: float) -> Output:
    logprobs = tuple(TokenLogprob(i, v, ((i, v),)) for i, v in enumerate(values)) or None
    return Output(text, (5, 6), "stop", 3, logprobs, meta_info={"seed": 11})


def answer(
    fields: dict[str, Any], outputs: list[Output], temperature: float, text: bool = True
) -> dict[str, Any]:
    tokenizer: Any = object() if text else None
    return RowFormat().answer(fields, outputs, SamplingParams(temperature=temperature), tokenizer, 1)


def test_answers_are_json_without_infinities_and_one_line_each():
    outputs = [output("a\u2028b\nc", float("-inf"), -1.5)]
    line = rows.encode(answer({"id": "\ud800", "prompt": "x"}, outputs, 0))
    assert b"\n" not in line
    read = json.loads(line, parse_constant=pytest.fail)
    assert (read["id"], read["text"]) == ("\ud800", "a\u2028b\nc")
    assert [entry["logprob"] for entry in read["logprobs"]] == [None, -1.5]
    assert read["completion_tokens"] == 2
    assert "seed" not in read
    assert "prompt" not in read


def test_several_samples_lie_under_their_own_name():
    made = answer({}, [output("a"), output("b")], 1, text=False)
    assert [sample["token_ids"] for sample in made["samples"]] == [[5, 6], [5, 6]]
    assert made["samples"][0]["seed"] == 11
    assert made["prompt_tokens"] == 3
    assert "text" not in made
