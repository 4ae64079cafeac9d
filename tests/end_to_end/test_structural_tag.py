"""Structural tags through their masks: the texts that xgrammar's documentation describes pass, others do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tokenizers
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.protocol.asked import AskError
from makeready.engine.protocol.openai.structured import grammar_of
from makeready.engine.sampling import SamplingParams
from makeready.engine.text.grammar import Grammars, check_grammar
from makeready.engine.text.parts import TokenizerParts
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(request) -> Tokenizer:
    """SmolLM2's; :data:`TOKENS` are texts, or tokens of their own."""
    found = load_tokenizer(open_checkpoint(smollm2()))
    assert found is not None
    if request.param == "tokens":
        found.backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in TOKENS])
        parts = TokenizerParts(found.backend, dict(found.special_tokens), found.eos_ids, None)
        found = Tokenizer(parts, found.eos_ids)
    return found


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)


def accepts(grammars: Grammars, tokenizer: Tokenizer, tag: Any, text: str, *, apart: bool = False) -> bool:
    """Whether a text passes the masks and may end; ``apart``: character by character."""
    asked = SamplingParams(structural_tag=tag).grammar
    assert asked is not None
    grammar, words = grammars.start(asked), np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    pieces = text if apart else [text]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    complete = False
    for token in [*ids, tokenizer.eos_ids[0]]:
        if complete:
            return token == tokenizer.eos_ids[0]
        grammar.allow(words)
        assert grammar.error is None, grammar.error
        if not np.unpackbits(words.view(np.uint8), bitorder="little")[token]:
            return False
        complete = token != tokenizer.eos_ids[0] and grammar.take(token)
    return True


def const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": CITY}
ANY = {"type": "any_text"}


def tag(begin: Any, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(triggers: list[str], tags: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags, **more}


A, B = tag("<function=a>", JSON, "</function>"), tag("<function=b>", const("x"), "</function>")
CALL_A, CALL_B = '<function=a>{"city": "Rome"}</function>', "<function=b>x</function>"
TOOL = tag('<tool_call>\n{"name": "a", "arguments": ', JSON, "}\n</tool_call>")
TOOL_CALL = '<tool_call>\n{"name": "a", "arguments": {"city": "Rome"}}\n</tool_call>'
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "const": (const("Hi <b>"), ["Hi <b>"], ["Hi", "Hi <b>!", ""]),
    "json": (JSON, ['{"city":"Rome"}', '{"city": "<tool"}'], ['{"city":1}', "{}", 'x{"city":"Rome"}']),
    "regex": (
        {"type": "regex", "pattern": "[A-Z]{3}/[0-9]{4}"},
        ["ABC/1234"],
        ["ABC1234", "abc/1234", "ABC/12345"],
    ),
    "grammar": (
        {
            "type": "sequence",
            "elements": [{"type": "grammar", "grammar": 'root ::= ("yes" | "no")'}, const("!")],
        },
        ["yes!", "no!"],
        ["yes", "maybe!", "yesno!"],
    ),
    "any text": (ANY, ["", "anything\n{"], []),
    "without": (ANY | {"excludes": ["BAD", "worse"]}, ["good BA D", ""], ["a BAD", "BADLY", "it is worse"]),
    "characters": (ANY | {"max_chars": 4}, ["", "abcd", "aé😀d"], ["abcde"]),
    "sequence": (
        {"type": "sequence", "elements": [const("a"), JSON, const("b")]},
        ['a{"city":"x"}b'],
        ["ab", 'a{"city":"x"}'],
    ),
    "or": (
        {"type": "or", "elements": [const("yes"), const("no"), JSON]},
        ["yes", "no", '{"city":""}'],
        ["yesno", "", "maybe"],
    ),
    "optional": (
        {"type": "sequence", "elements": [{"type": "optional", "content": const("a")}, const("b")]},
        ["ab", "b"],
        ["aab", "a"],
    ),
    "plus": ({"type": "plus", "content": const("ab")}, ["ab", "ababab"], ["", "aba"]),
    "star": ({"type": "star", "content": const("ab")}, ["", "abab"], ["a"]),
    "repeat": (
        {"type": "repeat", "min": 2, "max": 3, "content": const("ab")},
        ["abab", "ababab"],
        ["ab", "abababab"],
    ),
    "repeat on": ({"type": "repeat", "min": 1, "max": -1, "content": const("ab")}, ["ab", "abababab"], [""]),
    "tag": (tag("<r>", ANY, "</r>"), ["<r>a < b\n</r>", "<r></r>"], ["<r>a", "<r>a</r> b", "a</r>"]),
    "tag with ends": (
        tag("<r>", JSON, ["</r>", "</s>"]),
        ['<r>{"city":"a"}</r>', '<r>{"city":"a"}</s>'],
        ['<r>{"city":"a"}', "<r></r>"],
    ),
    "tag with text and ends": (
        tag("<r>", ANY, ["</r>", "</s>"]),
        ["<r>a</r>", "<r>a</s>"],
        ["<r>a</r></s>", "<r>a"],
    ),
    "thought": (
        {
            "type": "sequence",
            "elements": [tag("<think>", ANY | {"excludes": ["</think>"]}, "</think>"), JSON],
        },
        ['<think>hm </ {"city": 1}</think>{"city":"Rome"}'],
        ['<think>hm</think></think>{"city":"Rome"}', '{"city":"Rome"}', "<think>hm</think>Rome"],
    ),
    "triggered": (
        triggered(["<function="], [A, B]),
        ["", "text", CALL_A, f"a{CALL_A}b{CALL_B}{CALL_A}c", "a < b <function"],
        [
            "<function=c>",
            "a<function=",
            CALL_A[:-2],
            "<function=a>{}</function>",
            f"{CALL_B}<function=b>y</function>",
        ],
    ),
    "triggered and required": (
        triggered(["<function="], [A, B], at_least_one=True),
        [CALL_A, f"{CALL_A} and {CALL_B} so"],
        ["", "text", f"text {CALL_A}"],
    ),
    "triggered once": (
        triggered(["<function="], [A, B], stop_after_first=True),
        ["", "text", f"text {CALL_A}", CALL_B],
        [f"{CALL_A} more", f"{CALL_A}{CALL_B}", "a<function="],
    ),
    "triggered once and required": (
        triggered(["<function="], [A, B], stop_after_first=True, at_least_one=True),
        [CALL_A, CALL_B],
        ["", "a", f"{CALL_A}{CALL_B}", f"a{CALL_A}"],
    ),
    "triggered by several": (
        triggered(["<function=a", "<function=b"], [A, B]),
        [f"{CALL_A}{CALL_B}", "<function=c> is free"],
        ["<function=b>y</function>", "<function=a "],
    ),
    "triggered within a tag": (
        tag("<r>", triggered(["<function="], [A], excludes=["!"]), "</r>"),
        [f"<r>{CALL_A} b {CALL_A}</r>", "<r></r>"],
        [f"<r>{CALL_A}", "<r>a!</r>", "<r>a</r>b", "<r><function=b></r>"],
    ),
    "tokens or texts": (
        triggered(["<tool_call>"], [TOOL]),
        ["a", TOOL_CALL, f"a {TOOL_CALL} b", f"{TOOL_CALL}\n{TOOL_CALL}"],
        [
            "<tool_call>",
            "a<tool_call>b",
            TOOL_CALL.replace("city", "town"),
            TOOL_CALL.removesuffix("</tool_call>"),
        ],
    ),
    "a trigger that cuts a marker": (
        triggered(["<tool"], [TOOL]),
        ["a", f"a {TOOL_CALL} b"],
        ["a<tool_call>b", TOOL_CALL[:-12]],
    ),
    "a trigger that goes beyond a marker": (
        triggered(['<tool_call>\n{"name": "a"'], [TOOL]),
        ["a", f"a {TOOL_CALL} b"],
        [TOOL_CALL[:-12]],
    ),
    "ends behind text": (
        tag("<r>", ANY, "\n</tool_call>"),
        ["<r>a\nb\n</tool_call>"],
        ["<r>a", "<r>a\n", "<r>a\n</tool_call>b"],
    ),
    "separated": (
        {"type": "tags_with_separator", "tags": [A, B], "separator": ", "},
        ["", CALL_A, f"{CALL_A}, {CALL_B}"],
        [f"{CALL_A},{CALL_B}", f"{CALL_A}, ", f"a{CALL_A}"],
    ),
    "separated and required": (
        {
            "type": "tags_with_separator",
            "tags": [A, B],
            "separator": "",
            "at_least_one": True,
            "stop_after_first": True,
        },
        [CALL_A],
        ["", f"{CALL_A}{CALL_B}"],
    ),
    "dispatch": (
        {"type": "dispatch", "rules": [["<f>", JSON], ["<g>", const("x")]]},
        ["a", '<f>{"city":"a"} b <g>x', ""],
        ["<f>", "<g>y", "<f>{}"],
    ),
    "dispatch once": (
        {"type": "dispatch", "rules": [["<f>", JSON], ["<g>", const("x")]], "loop": False},
        ["a", "a<g>x"],
        ["<g>x b", "<g>x<g>x", "<f>"],
    ),
    "qwen's parameters": (
        {
            "type": "json_schema",
            "style": "qwen_xml",
            "json_schema": {
                "type": "object",
                "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
                "required": ["n"],
            },
        },
        [
            "<parameter=n>\n12\n</parameter>\n",
            "<parameter=n>\n1\n</parameter>\n<parameter=s>\na <b>\nc\n</parameter>\n",
        ],
        ["<parameter=n>\nx\n</parameter>\n", "<parameter=s>\nx\n</parameter>\n", ""],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_tag_describes_passes_and_nothing_else(
    grammars: Grammars, tokenizer: Tokenizer, case: str
) -> None:
    form, yes, no = CASES[case]
    whole = {"type": "structural_tag", "format": form}
    for text in yes:
        assert accepts(grammars, tokenizer, whole, text), text
    for text in no:
        assert not accepts(grammars, tokenizer, whole, text), text


def test_triggers_that_ordinary_tokens_spell_count_too(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = {"format": triggered(["<tool_call>"], [TOOL])}
    for text, right in (("a <tool", True), ("a <tool_call>b", False)):
        assert accepts(grammars, tokenizer, form, text, apart=True) == right, text


def test_the_older_shape_is_the_same(grammars: Grammars, tokenizer: Tokenizer) -> None:
    older = {
        "type": "structural_tag",
        "structures": [
            {"begin": "<function=a>", "schema": CITY, "end": "</function>"},
            {"begin": "<function=b>", "schema": '{"const": 1}', "end": "</function>"},
        ],
        "triggers": ["<function="],
    }
    for text in (f"a{CALL_A}b", "<function=b>1</function>"):
        assert accepts(grammars, tokenizer, older, text)
        assert grammar_of({"response_format": older}) == {"structural_tag": older}
    assert not accepts(grammars, tokenizer, older, "<function=b>2</function>")


def test_formats_of_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    if tokenizer.token_to_id("<think>") is None:
        with pytest.raises(RequestError, match="the tokenizer has no token '<think>'"):
            accepts(grammars, tokenizer, {"format": {"type": "token", "token": "<think>"}}, "")
        return
    think, other = ({"type": "token", "token": text} for text in ("<think>", "</think>"))
    call = tag(
        {"type": "token", "token": "<tool_call>"},
        JSON,
        {"type": "token", "token": tokenizer.token_to_id("</tool_call>")},
    )
    excluded = {
        "type": "exclude_token",
        "exclude_tokens": ["<think>", tokenizer.encode("a", add_special_tokens=False)[0]],
    }
    for form, yes, no in (
        (think, ["<think>"], ["</think>", "a", ""]),
        (excluded, ["b", "</think>"], ["a", "<think>", "", "bb bb"]),
        (
            {"type": "sequence", "elements": [tag(think, {"type": "any_tokens"}, other), const("!")]},
            ["<think>a <tool_call></think>!", "<think></think>!"],
            ["<think>a", "<think></think></think>!"],
        ),
        (
            tag(think, {"type": "any_tokens", "max_tokens": 1}, other),
            ["<think> the</think>"],
            ["<think>a b c</think>"],
        ),
        (
            {
                "type": "token_triggered_tags",
                "trigger_tokens": ["<tool_call>"],
                "tags": [call],
                "exclude_tokens": ["<think>"],
            },
            ["a", 'a<tool_call>{"city":"x"}</tool_call>b', "</think>"],
            ["<think>", "<tool_call>a", "a<tool_call>"],
        ),
        (
            {"type": "token_dispatch", "rules": [["<think>", const("x")]]},
            ["a", "a<think>xb"],
            ["<think>y"],
        ),
    ):
        for text in yes:
            assert accepts(grammars, tokenizer, {"format": form}, text), (form, text)
        for text in no:
            assert not accepts(grammars, tokenizer, {"format": form}, text), (form, text)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"type": "wav"}, "there is no format .*wav"),
        ({"type": "sequence", "elements": [ANY, const("a")]}, "nothing shows where any_text ends"),
        ({"type": "star", "content": ANY}, "nothing shows where any_text ends"),
        (ANY | {"max_tokens": 4}, "max_tokens of any_text cannot be counted"),
        (JSON | {"any_order": True}, "any_order would not hold"),
        (JSON | {"style": "glm_xml"}, "the style 'glm_xml' is not known"),
        ({"type": "json_schema"}, "json_schema=None must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"not": {}}}, "structural_tag cannot be enforced: .*not"),
        ({"type": "or", "elements": []}, "is empty"),
        (triggered(["<g"], [A]), "0 triggers are the beginning"),
        (triggered(["<f", "<fu"], [A]), "2 triggers are the beginning of '<function=a>'"),
        (triggered([""], [A]), "a trigger is a text"),
        (ANY | {"excludes": "x"}, "excludes='x' must be a list"),
        ({"type": "repeat", "min": 3, "max": 1, "content": const("a")}, "no range"),
        ({"type": "grammar", "grammar": "nothing"}, "grammar cannot be read"),
        ({"type": "regex", "pattern": "(a"}, "structural_tag cannot be enforced: unclosed group"),
        (tag("a", const("b"), 1), "end=1 must be a text"),
        ({"type": "const_string"}, "value=None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_expressed_is_refused_by_its_name(form: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_grammar("structural_tag", {"format": form})


def test_where_it_may_stand() -> None:
    value = {"type": "structural_tag", "format": const("a")}
    for body in (
        {"response_format": value},
        {"structured_outputs": {"structural_tag": value}},
        {"structural_tag": value},
    ):
        assert grammar_of(body) == {"structural_tag": value}
    assert SamplingParams(structural_tag='{"format": {"type": "any_text"}}').structural_tag == {"format": ANY}
    with pytest.raises(AskError, match="json_schema and structural_tag cannot both hold"):
        grammar_of({"json_schema": {}, "structural_tag": value})
    for wrong, reason in (
        ({"type": "x"}, "has the type 'x'"),
        ({}, "has no format"),
        ({"structures": []}, "has no format"),
    ):
        with pytest.raises(RequestError, match=reason):
            check_grammar("structural_tag", wrong)
    with pytest.raises(RequestError, match=r"structural_tag=.* must be an object, or its text"):
        SamplingParams(structural_tag=[1])  # type: ignore[arg-type]
