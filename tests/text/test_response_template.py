"""A checkpoint's own description of its answers, read as transformers reads it, however a text is cut."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from response_templates import CHATML, PARTS, PROMPTS, TEMPLATES, TOOLS, WRITTEN
from tokenizers_fixture import Folder, byte_level_json
from transformers.utils.chat_parsing import parse_response

from makeready.engine.conversation import Parsers
from makeready.engine.errors import RequestError
from makeready.engine.message import Gathered, Message
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.answer import AnswerText
from makeready.engine.text.formats.base import format_of
from makeready.engine.text.formats.scan import Reading, Scanner
from makeready.engine.text.formats.source import Token
from makeready.engine.text.lark import Markers
from makeready.engine.text.message_grammar import MessageGrammar
from makeready.engine.text.parts import TextError
from makeready.engine.text.response.pattern import Pattern
from makeready.engine.text.response.reader import format_by
from makeready.engine.text.response.template import read_response_template
from makeready.engine.text.tokenizer import load_tokenizer

FORMATS = {name: format_by(read_response_template(template)) for name, template in TEMPLATES.items()}


def scan(
    name: str,
    pieces: Any,
    prompt: str | None = None,
    tools: Any = TOOLS,
    tokens: frozenset[str] = frozenset(),
) -> Message:
    form = format_of(None, own=FORMATS[name])
    opened = form.opened(PROMPTS[name] if prompt is None else prompt)
    scanner, gathered = Scanner(Reading(form, tools, opened), tokens), Gathered()
    for event in [event for piece in pieces for event in scanner.feed(piece)] + scanner.end():
        gathered.take(event)
    return gathered.message()


def read(name: str, text: str, **more: Any) -> Message:
    """The message of a text, which every way to cut it gives."""
    whole, pick = scan(name, [text], **more), random.Random(text)
    ways = [*([cut] for cut in range(1, len(text))), list(range(1, len(text)))]
    ways += [sorted(pick.choices(range(len(text) + 1), k=4)) for _ in range(10)]
    for cuts in ways:
        pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
        assert scan(name, pieces, **more) == whole, cuts
    return whole


def as_transformers(message: Message, name: str) -> dict[str, Any]:
    """A message as parse_response writes it."""
    thought = next(
        (each for each in ("thinking", "reasoning_content") if each in TEMPLATES[name]["fields"]), ""
    )
    made: dict[str, Any] = dict(TEMPLATES[name].get("defaults", {}))
    if message.content:
        made["content"] = message.content
    if message.reasoning_content:
        made[thought] = message.reasoning_content
    if message.tool_calls:
        made["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    return made


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in WRITTEN.items() for text in texts]
)
def test_as_transformers_reads_it(name: str, text: str) -> None:
    wanted = parse_response(text, TEMPLATES[name], prefix=PROMPTS[name], tools=TOOLS)
    read_here = as_transformers(read(name, text), name)
    if text in PARTS:  # transformers keeps the last one alone
        assert wanted.get("content", "") == PARTS[text][-1]
        assert read_here["content"] == "\n".join(filter(None, PARTS[text]))
        wanted["content"] = read_here["content"]
    assert read_here == wanted


def test_what_the_prompt_has_opened() -> None:
    text = " so \n</think>\n\nYes."
    prompt = PROMPTS["tags"] + "<think>\n"
    assert parse_response(text, TEMPLATES["tags"], prefix=prompt) == {
        "reasoning_content": "so",
        "content": "Yes.",
    }
    message = read("tags", text, prompt=prompt)
    assert (message.reasoning_content, message.content) == ("so", "Yes.")
    # What it has closed is none of the answer.
    message = read("tags", "Yes.", prompt=PROMPTS["tags"] + "<think>\n\n</think>\n\n")
    assert (message.reasoning_content, message.content) == (None, "Yes.")
    # An anchor within the conversation is not where the answer begins, one that is nowhere opens nothing.
    assert (
        read("tags", "Yes.", prompt="<|im_start|>assistant\n<think>a<|im_start|>assistant\n").content
        == "Yes."
    )
    assert read("tags", "Yes.", prompt="<think> elsewhere").content == "Yes."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "tags",
            'Well <tool_call>{"name": "add", "arguments"</tool_call> then <tool_call>{"a": 1}</tool_call>!',
        ),
        ("tags", 'Well <tool_call>{"name": "add", "arguments": {"a": 1'),
        ("tags", "<tool_call>not JSON"),
        ("optional tail", "x <cab>a: 1.5</c> y"),
        ("gemma", "<|tool_call>call:add{a:<tool_call|>"),
    ],
)
def test_what_is_no_call_is_content_as_it_was_written(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_response(text, TEMPLATES[name], prefix=PROMPTS[name])
    message = read(name, text)
    assert not message.tool_calls
    assert message.content == text


def test_what_is_in_no_field_is_content_where_there_is_nothing_else() -> None:
    assert read("channels", "just text").content == "just text"
    assert read("channels", "noise<|channel|>final<|message|>answer<|return|>noise").content == "answer"


def test_calls_stay_text_where_none_may_be_made() -> None:
    form = format_of(
        None, "auto", "none", format_by(read_response_template(TEMPLATES["tags"]))
    ).without_calls()
    text = '<think>x</think> <tool_call>{"name": "add", "arguments": {}}</tool_call> y'
    scanner, gathered = Scanner(Reading(form)), Gathered()
    for event in [*scanner.feed(text), *scanner.end()]:
        gathered.take(event)
    assert gathered.message() == Message(text)


def test_one_call_where_no_more_are_wanted() -> None:
    form = format_by(read_response_template(TEMPLATES["tags"]))
    scanner, gathered = Scanner(Reading(form, TOOLS, parallel=False)), Gathered()
    for event in scanner.feed('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> more'):
        gathered.take(event)
    assert scanner.full
    assert [call.arguments for call in gathered.message().tool_calls] == ['{"a": 1}']


def test_special_tokens_delimit_and_are_not_shown() -> None:
    tokens = frozenset(("<think>", "</think>", "<|im_end|>", "<other>"))
    pieces = [
        Token("<think>"),
        "a",
        Token("<other>"),
        "b",
        Token("</think>"),
        "c",
        Token("<other>"),
        Token("<|im_end|>"),
    ]
    message = scan("tags", pieces, tokens=tokens)
    assert (message.reasoning_content, message.content) == ("ab", "c")
    # In strings of a call they are what its parser goes by.
    pieces = ["<|tool_call>call:add{s:", Token('<|"|>'), "x", Token('<|"|>'), "}<tool_call|>"]
    (call,) = scan("gemma", pieces, tokens=frozenset({'<|"|>'})).tool_calls
    assert json.loads(call.arguments) == {"s": "x"}


def test_content_comes_as_it_is_written() -> None:
    form = format_by(read_response_template(TEMPLATES["coder"]))
    scanner, told = Scanner(Reading(form)), ""
    text = "<think>" + "thought " * 50 + "</think>" + "answer " * 50
    late = 0
    for at, character in enumerate(text):
        told += "".join(event.text for event in scanner.feed(character))
        if 20 < at < 350 or at > 500:
            late = max(late, (at if at < 350 else at - 15) - 6 - len(told.rstrip()))
    assert late <= 3


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40)
@given(st.data())
def test_no_text_is_read_otherwise_in_pieces(name: str, data: st.DataObject) -> None:
    words = re.findall(r"<[^<>]*>|[{}\[\]:,]|\w+|\s+", "".join(WRITTEN[name]))
    parts = data.draw(st.lists(st.sampled_from(sorted(set(words)))))
    parts = [f"w{at}w" if part.isalpha() else part for at, part in enumerate(parts)]
    whole = scan(name, ["".join(parts)])
    assert scan(name, parts) == whole
    assert scan(name, "".join(parts)) == whole
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
    if read_response_template(TEMPLATES[name]).rest is not None and not whole.tool_calls:
        told = f"{whole.content}{whole.reasoning_content}"
        assert not [part for part in parts if re.fullmatch(r"w\d+w", part) and part not in told]


@given(
    pattern=st.recursive(
        st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", "ab", "(?:a|ab)", "(?:b|)"]),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}"])).map(
                lambda each: f"(?:{each[0]}){each[1]}"
            ),
            st.tuples(inner, inner).map(lambda each: f"(?:{each[0]}|{each[1]})"),
            inner.map(lambda each: f"({each})"),
        ),
        max_leaves=5,
    ),
    behind=st.sampled_from(["", "$", "(?=b)", "(?=a|$)"]),
    text=st.text("abc\n", max_size=8),
)
def test_patterns_match_as_in_re(pattern: str, behind: str, text: str) -> None:
    if behind == "$" and text.endswith("\n"):
        text += "c"  # in re it matches before a last newline as well
    found = re.compile(pattern + behind, re.DOTALL).search(text)
    here = Pattern(pattern + behind)._from(text, 0)
    assert (here and (here.start, here.end)) == (found and found.span())


def test_the_last_match_of_an_anchor() -> None:
    found = Pattern("<a>|<b>\n?").last("x<a>y<b>\nz<c")
    assert found is not None
    assert (found.start, found.end) == (5, 9)
    assert Pattern("<a>").last("<b>" * 10) is None


def test_a_pattern_takes_time_by_the_length_of_the_text_alone() -> None:
    template = {
        **TEMPLATES["tags"],
        "fields": {"content": {}, "thinking": {"open_pattern": "(a*)*b", "close": "c"}},
    }
    form = format_by(read_response_template(template))
    scanner = Scanner(Reading(form))
    events = scanner.feed("a" * 2000) + scanner.end()
    assert "".join(event.text for event in events) == "a" * 2000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version"),
        ({"fieldz": {}}, "fieldz"),
        ({"fields": {}}, "fields"),
        ({"start_anchor": []}, "start_anchor"),
        ({"start_anchor": None}, "start_anchor"),
        ({"fields": {"content": {"colour": 1}}}, "colour"),
        ({"fields": {"content": {}, "thinking": {}}}, "both"),
        ({"fields": {"thinking": {"open_pattern": "(?<!x)a", "close": "b"}}}, "look"),
        ({"fields": {"thinking": {"open_pattern": "(a", "close": "b"}}}, "regular expression"),
        ({"fields": {"thinking": {"open_pattern": "a*", "close": "b"}}}, "empty"),
        ({"fields": {"thinking": {"open_pattern": r"(a)\1", "close": "b"}}}, "reference"),
        ({"fields": {"thinking": {"open_pattern": "(?:a{1000}){1000}", "close": "b"}}}, "large"),
        ({"fields": {"tool_calls": {"open": "a", "content": "yaml"}}}, "yaml"),
        ({"fields": {"tool_calls": {"open": "a", "content": "xml-inline"}}}, "tag_pattern"),
        ({"fields": {"tool_calls": {"open": "a", "transform": "{x} and {y}"}}}, "mixes"),
        ({"fields": {"content": {"content": "json"}}}, "no text"),
    ],
)
def test_what_cannot_be_followed_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(TextError, match=named):
        read_response_template({**TEMPLATES["tags"], **change})


def test_a_grammar_of_the_content_stands_behind_reasoning() -> None:
    form = format_by(read_response_template(TEMPLATES["tags"]))
    closed = MessageGrammar(form, form.opened(PROMPTS["tags"]))
    assert "<think>" in closed.lark(Markers(), content=True)
    opened = MessageGrammar(form, form.opened(PROMPTS["tags"] + "<think>\n"))
    lark = opened.lark(Markers(), content=True)
    assert "<think>" not in lark
    assert "</think>" in lark
    with pytest.raises(RequestError, match="response_template"):
        MessageGrammar(form, forced=True).lark(Markers())


def test_a_family_that_is_named_or_told_comes_first() -> None:
    own = format_by(read_response_template(TEMPLATES["tags"]))
    assert format_of(None, own=own).whole is own.whole
    assert format_of("<tool_call> arguments", own=own).whole is None
    assert format_of(None, "mistral", own=own).calls is not own.calls
    assert format_of(None, "none", own=own).calls is None


def folder(tmp_path: Path, template: Any) -> Folder:
    config = {"chat_template": CHATML, "eos_token": "<|end|>", "response_template": template}
    return Folder(
        tmp_path, {"tokenizer.json": json.loads(byte_level_json()), "tokenizer_config.json": config}
    )


def test_a_checkpoint_whose_tokenizer_has_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, TEMPLATES["tags"]))
    assert tokenizer is not None
    assert not tokenizer.warnings
    text, reading = Parsers().prompt(tokenizer, [{"role": "user", "content": "hi"}], tools=TOOLS)
    assert text == PROMPTS["tags"]
    assert reading is not None
    answer = AnswerText(tokenizer, tokenizer.encode(text), SamplingParams(), reading=reading)
    for token in tokenizer.encode(WRITTEN["tags"][2], add_special_tokens=False):
        answer.take(token, ends=False)
    answer.end()
    assert answer.message is not None
    (call,) = answer.message.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1, "s": "x"})


def test_a_checkpoint_whose_template_cannot_be_followed_says_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, {**TEMPLATES["tags"], "version": 9}))
    assert tokenizer is not None
    assert tokenizer.response_template is None
    assert "version is 9" in tokenizer.warnings[0]
