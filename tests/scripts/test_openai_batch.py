"""OpenAI's batch format: what each field comes to, what is refused by name, and the shapes of answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from scripts_in_process import TINY, script
from tokenizers import decoders, models, normalizers, pre_tokenizers

from makeready.engine.entrypoints.batch.base import RowError
from makeready.engine.entrypoints.batch.openai import OpenAIFormat
from makeready.engine.message import Message, ToolCall
from makeready.engine.output import Output, TokenLogprob
from makeready.engine.protocol.asked import AskError
from makeready.engine.protocol.openai.body import CHAT, COMPLETIONS
from makeready.engine.protocol.openai.logprobs import chat_logprobs, completion_logprobs
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.parts import TokenizerParts
from makeready.engine.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def row(url: str, **body: Any) -> dict[str, Any]:
    given = {"model": "m"} | ({"messages": MESSAGES} if url == CHAT else {"prompt": "hi"}) | body
    return {"custom_id": "a", "method": "POST", "url": url, "body": given}


def output(ids: tuple[int, ...], reason: str = "length", **finish: Any) -> Output:
    logprobs = tuple(TokenLogprob(i, -i / 8, ((i, -i / 8), (0, float("-inf")))) for i in ids)
    meta = {"finish_reason": {"type": reason, **finish}, "cached_tokens": 2, "seed": 5}
    return Output("é b", ids, reason, 7, logprobs, meta_info=meta)


def tokens() -> Tokenizer:
    """Tokens a, b, c, ..., each a word; as with SentencePiece the first of a text loses its space. 26 is a byte."""
    vocabulary = {f"▁{chr(97 + i)}": i for i in range(26)} | {"<0xF0>": 26}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(TokenizerParts(backend))


def test_every_field_reaches_the_sampling_parameter_of_its_meaning():
    shared = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["x"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -1},
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [4],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "stop_regex": "y",
    }
    renamed = {
        "seed": ("sampling_seed", 3),
        "min_tokens": ("min_new_tokens", 1),
        "max_tokens": ("max_new_tokens", 9),
    }
    expected = shared | dict(renamed.values())
    body = shared | {theirs: value for theirs, (_, value) in renamed.items()}
    for url in (CHAT, COMPLETIONS):
        ask = OpenAIFormat().read(row(url, **body))
        assert ask.sampling == expected
        SamplingParams.from_mapping(ask.sampling)  # all of them exist
        ask = OpenAIFormat().read(row(url, priority=3, extra_key="a"))
        assert (ask.sampling, ask.routing) == ({}, {"priority": 3, "extra_key": "a"})
    ask = OpenAIFormat().read(row(CHAT, max_completion_tokens=4, logprobs=True, top_logprobs=2))
    assert ask.sampling == {"max_new_tokens": 4, "return_logprob": True, "top_logprobs_num": 2}
    ask = OpenAIFormat().read(row(COMPLETIONS, logprobs=3))
    assert ask.sampling == {"return_logprob": True, "top_logprobs_num": 3}
    said = {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}
    ask = OpenAIFormat().read(row(CHAT, **said))
    assert (ask.tools, ask.sampling) == (said, {})
    ask = OpenAIFormat().read(row(CHAT, chat_template_kwargs={"enable_thinking": False}))
    assert (ask.kind, ask.prompts, ask.template) == ("messages", (MESSAGES,), {"enable_thinking": False})


@pytest.mark.parametrize(
    ("prompt", "kind", "prompts"),
    [
        ("a", "prompt", ("a",)),
        (["a", "b"], "prompt", ("a", "b")),
        ([1, 2], "token_ids", ([1, 2],)),
        ([[1], [2, 3]], "token_ids", ([1], [2, 3])),
    ],
)
def test_a_completion_takes_prompts_in_every_shape(prompt, kind, prompts):
    ask = OpenAIFormat().read(row(COMPLETIONS, prompt=prompt))
    assert (ask.kind, ask.prompts) == (kind, prompts)


def test_fields_that_ask_for_nothing_are_taken():
    idle = {"stream": False, "store": False, "tools": [], "response_format": {"type": "text"}, "user": None}
    assert OpenAIFormat().read(row(CHAT, **idle)).sampling == {}
    tools = {"tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"]}
    kept = {
        "store": True,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "flex",
        "safety_identifier": "x",
    }
    assert OpenAIFormat().read(row(CHAT, prompt_cache_key="k", **tools, **kept)).sampling == {}
    assert OpenAIFormat().read(row(COMPLETIONS, echo=False, best_of=1, suffix=None)).sampling == {}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CONSTRAINED = [
    ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            }
        },
        {"json_schema": SCHEMA},
    ),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"ebnf": 'root ::= "a"'}),
    ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a"]}, {"choice": ["a"]}),
    ({"guided_grammar": 'start: "a"'}, {"lark": 'start: "a"'}),
    ({"json_schema": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
    ({"ebnf": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("given", "sampling"), CONSTRAINED, ids=str)
def test_what_an_output_has_to_follow_is_read_in_every_spelling(given, sampling):
    for url, fields in ((CHAT, {}), (COMPLETIONS, {"prompt": "x"})):
        read = OpenAIFormat().read(row(url, **fields, **given)).sampling
        assert read == sampling
        SamplingParams.from_mapping(read)


REFUSED = [
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"response_format": {"type": "json"}}, "response_format"),
    (CHAT, {"response_format": "json_object"}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    (CHAT, {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"xml": "a"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": "json"}, "structured_outputs"),
    (CHAT, {"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    (CHAT, {"tools": [TOOL | {"type": "custom"}]}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools"),
    (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "tool_choice"),
    (CHAT, {"tools": [TOOL], "chat_template_kwargs": {"tools": []}}, "tools"),
    (CHAT, {"chat_template_kwargs": {"tool_choice": "auto"}}, "chat_template_kwargs"),
    (COMPLETIONS, {"tools": [TOOL]}, "tools"),
    (CHAT, {"stream": True}, "stream"),
    (CHAT, {"user": 3}, "user"),
    (CHAT, {"metadata": "x"}, "metadata"),
    (CHAT, {"store": 1}, "store"),
    (CHAT, {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (CHAT, {"stream": 0}, "stream"),
    (COMPLETIONS, {"best_of": True}, "best_of"),
    (CHAT, {"modalities": ["audio"]}, "modalities"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": True}, "max_completion_tokens"),
    (CHAT, {"prompt": "x"}, "prompt"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"model": None}, "model"),
    (CHAT, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    (CHAT, {"priority": "high"}, "priority"),
    (COMPLETIONS, {"extra_key": ["a"]}, "extra_key"),
    (COMPLETIONS, {"echo": 1}, "echo"),
    (CHAT, {"echo": True}, "echo"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"messages": MESSAGES}, "messages"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
]


@pytest.mark.parametrize(("url", "body", "field"), REFUSED)
def test_what_is_not_served_is_refused_by_its_name(url, body, field):
    with pytest.raises(AskError, match=field) as refused:
        OpenAIFormat().read(row(url, **body))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/embeddings"}, "url"),
        ({"body": []}, "body"),
        ({"custom_id": 7}, "custom_id"),
        ({"extra": 1}, "extra"),
    ],
)
def test_what_is_around_a_body_is_checked(change, field):
    with pytest.raises(RowError) as refused:
        OpenAIFormat().read(row(CHAT) | change)
    assert refused.value.field == field
    with pytest.raises(RowError, match="custom_id is missing"):
        OpenAIFormat().read({"prompt": "a"})


def test_a_chat_comes_to_a_completion_object():
    outputs = [output((1, 2)), output((3,))]
    made = OpenAIFormat().answer(row(CHAT), outputs, SamplingParams(n=2), tokens(), 3)
    assert (made["custom_id"], made["error"], made["response"]["status_code"]) == ("a", None, 200)
    body = made["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "é b", "refusal": None}
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    again = OpenAIFormat().answer(row(CHAT), outputs, SamplingParams(n=2), tokens(), 3)
    other = OpenAIFormat().answer(row(CHAT), outputs, SamplingParams(n=2), tokens(), 4)
    assert made["id"] == again["id"] != other["id"]


def test_a_message_has_its_reasoning_and_its_calls():
    message = Message(None, "Hm.", (ToolCall("call_1", "f", "{}", True),))
    said = dataclasses.replace(output((1, 2), "stop", matched=2), finish_reason="tool_calls", message=message)
    made = OpenAIFormat().answer(row(CHAT), [said], SamplingParams(return_logprob=True), tokens(), 3)
    (choice,) = made["response"]["body"]["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Hm.",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert choice["finish_reason"] == "tool_calls"
    assert len(choice["logprobs"]["content"]) == 1  # the end token is none of the message


def test_several_prompts_count_each_once_in_the_usage():
    outputs = [output((1, 2)), output((3,)), output((1,)), output((2,))]
    made = OpenAIFormat().answer(row(COMPLETIONS), outputs, SamplingParams(n=2), tokens(), 1)
    body = made["response"]["body"]
    assert body["object"] == "text_completion"
    assert [choice["text"] for choice in body["choices"]] == ["é b"] * 4
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (14, 5)


def test_logprobs_have_openais_shapes():
    made = chat_logprobs(output((1, 26)), tokens())
    assert made is not None
    json.dumps(made, allow_nan=False)
    first, second = made["content"]
    assert first["token"] == " b"
    assert first["bytes"] == list(b" b")
    assert first["top_logprobs"][1] == {"token": " a", "logprob": -9999.0, "bytes": list(b" a")}
    assert (second["token"], second["bytes"]) == ("\\xf0", [0xF0])

    ended = dataclasses.replace(output((1, 2, 3), "stop", matched=3), text=" b c")
    assert completion_logprobs(ended, tokens()) == {  # an end token is no part of the text
        "tokens": [" b", " c"],
        "token_logprobs": [-0.125, -0.25],
        "top_logprobs": [{" b": -0.125, " a": -9999.0}, {" c": -0.25, " a": -9999.0}],
        "text_offset": [0, 2],
    }
    assert len((chat_logprobs(output((1, 2), "stop", matched="x"), tokens()) or {})["content"]) == 2


def test_an_echo_begins_with_the_prompt_and_its_logprobs():
    asks = {"echo": True, "logprobs": 1}
    asked = OpenAIFormat().read(row(COMPLETIONS, prompt="x", **asks)).sampling
    assert asked == {"return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 0}
    assert OpenAIFormat().read(row(COMPLETIONS, prompt="x", echo=True)).sampling == {}

    scored = (TokenLogprob(0, None), TokenLogprob(1, -0.5, ((3, -0.25),)))
    outputs = [dataclasses.replace(output((2,)), text=" c", input_logprobs=scored) for _ in range(2)]

    def choices(prompt: Any, tokenizer: Any) -> list[dict[str, Any]]:
        fields = row(COMPLETIONS, prompt=prompt, **asks)
        made = OpenAIFormat().answer(fields, outputs, SamplingParams(), tokenizer, 1)
        return made["response"]["body"]["choices"]

    logprobs = {
        "tokens": ["a", " b", " c"],
        "token_logprobs": [None, -0.5, -0.25],
        "top_logprobs": [None, {" d": -0.25}, {" c": -0.25, " a": -9999.0}],
        "text_offset": [0, 1, 3],
    }
    for prompt in ("a b", [0, 1]):
        made = choices([prompt, prompt], tokens())
        assert [choice["text"] for choice in made] == ["a b c"] * 2
        assert [choice["logprobs"] for choice in made] == [logprobs] * 2
    assert [choice["token_ids"] for choice in choices([[0, 1], [5]], None)] == [[0, 1, 2], [5, 2]]


def test_an_answer_without_a_limit_has_openais():
    """16 tokens as a completion; as a chat, all that the context holds."""
    rows = [row(COMPLETIONS, prompt=[[5, 6], [7]]), row(COMPLETIONS, prompt=[5], max_tokens=3)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def counts(*more: str) -> list[int]:
        job = (*TINY, "prompts=in.jsonl", "output=out.jsonl", "sampling=greedy", "sampling.ignore_eos=true")
        assert script("generate")(*job, "overwrite=true", *more) == 0
        made = map(json.loads, Path("out.jsonl").read_text().splitlines())
        return [answer["response"]["body"]["usage"]["completion_tokens"] for answer in made]

    assert counts() == [32, 3]
    assert counts("sampling.max_new_tokens=5") == [10, 3]
    assert counts("sampling.max_new_tokens=40") == [80, 3]


def test_a_file_of_openais_format_is_known_by_its_rows(capsys):
    rows = [
        row(COMPLETIONS, prompt=[5, 6], max_tokens=3, logprobs=1),
        row(COMPLETIONS, prompt=[5, 6], max_tokens=99),
        row(COMPLETIONS, prompt=[5, 6], seed=-1),
        row(COMPLETIONS, prompt=[5], tools=[1]),
        {"token_ids": [5]},
    ]
    Path("in.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    job = (*TINY, "prompts=in.jsonl", "output=out.jsonl", "sampling=greedy", "sampling.ignore_eos=true")
    assert script("generate")(*job) == 0
    unread, served, *refused = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert (unread["custom_id"], unread["error"]["line"]) == (None, 1)
    body = served["response"]["body"]
    assert body["usage"]["completion_tokens"] == len(body["choices"][0]["token_ids"]) == 3
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 3
    messages = [answer["response"]["body"]["error"]["message"] for answer in refused]
    assert [answer["response"]["status_code"] for answer in refused] == [400] * 4
    assert "max_tokens=99 exceed the context of 64" in messages[0]
    assert messages[1].startswith("seed=-1 is out of range; it must be at least 0")
    assert [answer["response"]["body"]["error"]["param"] for answer in refused[1:]] == [
        "seed",
        "tools",
        "custom_id",
    ]
    assert [answer["error"]["message"] for answer in refused] == messages

    assert script("generate")(*job, "format=rows", "overwrite=true") == 1  # no row could be served
    assert all(
        "this one has none of them" in line for line in Path("out.jsonl").read_text().splitlines()[1:-1]
    )
