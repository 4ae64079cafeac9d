"""Messages that have to call a tool: what is drawn under their grammar, the scanner reads as valid calls."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from smollm2 import smollm2

from makeready.engine.errors import RequestError
from makeready.engine.llm import LLM, SamplingParams
from makeready.engine.message import Gathered, Message
from makeready.engine.text.detokenize import StreamDetokenizer
from makeready.engine.text.formats.base import Format, format_of
from makeready.engine.text.formats.rules import tool_of
from makeready.engine.text.formats.scan import Reading, Scanner
from makeready.engine.text.formats.source import Token
from makeready.engine.text.grammar import Grammars
from makeready.engine.text.message_grammar import MessageGrammar
from makeready.engine.text.parts import TokenizerParts
from makeready.engine.text.tokenizer import Tokenizer, load_tokenizer
from makeready.graphs.checkpoint.base import open_checkpoint

CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}},
    },
]
SCHEMAS = {"weather": CITY, "now": {"type": "object", "maxProperties": 0}}
FAMILIES = {
    "qwen": format_of(None, "qwen", "think"),
    "qwen_plain": format_of(None, "qwen", "none"),
    "qwen3_coder": format_of(None, "qwen3_coder", "think"),
    "llama3": format_of(None, "llama3", "none"),
    "mistral": format_of(None, "mistral", "mistral"),
    "deepseekv3": format_of(None, "deepseekv3", "think"),
    "deepseekv31": format_of(None, "deepseekv31", "think"),
    "pythonic": format_of(None, "pythonic", "think"),
    "gpt-oss": format_of(None, "gpt-oss"),
}
# What ends a stretch of free text, in one family or another.
EXITS = ("\n</parameter>", "</think>", "[/THINK]", "<|end|>")


@pytest.fixture(scope="module", params=["text", "tokens"])
def tokenizer(request) -> Tokenizer:
    """SmolLM2's; markers are texts, or tokens of their own."""
    found = load_tokenizer(open_checkpoint(smollm2()))
    assert found is not None
    if request.param == "tokens":
        markers = sorted({marker for form in FAMILIES.values() for marker in form.markers})
        found.backend.add_special_tokens([tokenizers.AddedToken(marker, special=True) for marker in markers])
        parts = TokenizerParts(found.backend, dict(found.special_tokens), found.eos_ids, None)
        found = Tokenizer(parts, found.eos_ids)
    return found


def drawn(
    grammars: Grammars, tokenizer: Tokenizer, form: Format, message: MessageGrammar, seed: int, **more: Any
) -> list[int]:
    """Tokens at random under a grammar's masks up to its end; free text is a few letters, and ends some day."""
    rng, grammar = random.Random(seed), grammars.start(more.get("asked"), message)
    letters, ends = tokenizer.encode("a few words\n", add_special_tokens=False), list(tokenizer.eos_ids)
    openings = form.calls.openings if form.calls else ()
    exits = [
        tokenizer.encode(text, add_special_tokens=False)
        for text in (*EXITS, *openings)
        if text in form.markers or text[0] == "\n"
    ]
    ids: list[int] = []
    words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    while len(ids) < 400:
        grammar.allow(words)
        assert grammar.error is None
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if bits[ends].any() and rng.random() < 0.4:
            return ids
        bits[ends] = 0
        chosen = [rng.choice(np.flatnonzero(bits).tolist())]
        if bits.sum() > 2000:  # free text
            able = [each for each in exits if bits[each[0]]]
            some = [t for t in letters if bits[t]]
            chosen = rng.choice(able) if able and rng.random() < 0.4 else [rng.choice(some or chosen)]
        for token in chosen:
            ids.append(token)
            if grammar.take(token):
                assert grammar.error is None, grammar.error
                return ids
            grammar.allow(words)  # a marker goes on as it is spelled, or not at all
            if (
                token != chosen[-1]
                and not np.unpackbits(words.view(np.uint8), bitorder="little")[
                    chosen[chosen.index(token) + 1]
                ]
            ):
                break
    pytest.fail(f"the message comes to no end: {tokenizer.decode(ids, skip_special_tokens=False)!r}")


def message_of(tokenizer: Tokenizer, reading: Reading, ids: list[int]) -> Message:
    gathered, special = Gathered(), tokenizer.special_texts
    scanner = Scanner(reading, special)
    events, texts = [], StreamDetokenizer(tokenizer, False)
    for token in ids:
        text = tokenizer.id_to_token(token) or ""
        events += scanner.feed(Token(text) if text in special else texts.push((token,)))
    events += scanner.feed(texts.flush())
    for event in (*events, *scanner.end()):
        gathered.take(event)
    return gathered.message()


def skip_without_tokens(tokenizer: Tokenizer, form: Format) -> None:
    if form.whole is not None and tokenizer.token_to_id("<|message|>") is None:
        pytest.skip("gpt-oss has these tokens")


def opened_by(form: Format) -> str:
    if form.whole is not None:
        return "<|channel|>analysis<|message|>"
    return form.reasoning.opening if form.reasoning else ""


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_is_read_as_calls(tokenizer: Tokenizer, family: str, opened: bool) -> None:
    form: Format = FAMILIES[family]
    skip_without_tokens(tokenizer, form)
    head = opened_by(form) if opened else ""
    if opened and not head:
        pytest.skip("nothing to open")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    counts = set()
    for parallel, seed in [(False, 0), (False, 1), *((True, seed) for seed in range(40))]:
        asked = MessageGrammar(form, head, [*map(tool_of, TOOLS)], True, parallel)
        ids = drawn(grammars, tokenizer, form, asked, seed)
        message = message_of(tokenizer, Reading(form, TOOLS, head, parallel), ids)
        assert message.calls, tokenizer.decode(ids, skip_special_tokens=False)
        assert not (message.content or "").strip()
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        counts.add(len(message.tool_calls))
        assert parallel or len(message.tool_calls) == 1
        if seed > 2 and (len(counts) > 1 or form.whole):
            break
    assert len(counts) > 1 or form.whole  # gpt-oss ends its turn behind a call


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_may_come_are_strict_and_text_is_free(tokenizer: Tokenizer, family: str) -> None:
    """Drawn messages have text, or calls, whose arguments are as they should be."""
    form: Format = FAMILIES[family]
    skip_without_tokens(tokenizer, form)
    tools = [tool_of(tool | {"function": tool["function"] | {"strict": True}}) for tool in TOOLS]
    grammars, seen = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids), set()
    for seed in range(60):
        head = opened_by(form) if seed % 2 else ""
        ids = drawn(grammars, tokenizer, form, MessageGrammar(form, head, tools), seed)
        message = message_of(tokenizer, Reading(form, TOOLS, head), ids)
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        seen |= {call.name for call in message.tool_calls} | ({"content"} if message.content else set())
        if seed > 8 and {"weather", "content"} <= seen:
            break
    assert {"weather", "content"} <= seen
    spoken = MessageGrammar(form, "", tools)
    for text in ("Hello, {it} is [1] <5>!\n", "```json\n{}\n```", " [see](http://x.y) that"):
        if form.whole is None:
            assert follows(grammars, tokenizer, spoken, text), text


def follows(grammars: Grammars, tokenizer: Tokenizer, message: MessageGrammar, text: str) -> bool:
    grammar, words = grammars.start(None, message), np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_ids[0]]:
        grammar.allow(words)
        if not np.unpackbits(words.view(np.uint8), bitorder="little")[token]:
            return False
        grammar.take(token)
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_follows_a_schema_comes_behind_reasoning_or_is_a_call(
    tokenizer: Tokenizer, family: str
) -> None:
    form: Format = FAMILIES[family]
    skip_without_tokens(tokenizer, form)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    grammars, seen = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids), set()
    for seed in range(60):
        head, with_tools = opened_by(form) if seed % 2 else "", seed % 3 > 0
        own = form if with_tools else form.without_calls()
        tools = [*map(tool_of, TOOLS)] if with_tools else []
        message = message_of(
            tokenizer,
            Reading(own, TOOLS, head),
            drawn(
                grammars,
                tokenizer,
                form,
                MessageGrammar(own, head, tools),
                seed,
                asked=("json_schema", schema),
            ),
        )
        if message.tool_calls:
            assert with_tools
            assert message.content is None
            for call in message.tool_calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        else:
            jsonschema.validate(json.loads(message.content or ""), schema)
        seen |= {"calls" if message.tool_calls else "content"} | (
            {"reasoning"} if message.reasoning_content else set()
        )
        if seed > 8 and len(seen) == 2 + (form.reasoning is not None):
            break
    assert len(seen) == 2 + (form.reasoning is not None)


TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    "{# <tool_call> arguments </tool_call> #}"
)
ASKED = [{"role": "user", "content": "Weather in Rome?"}]


def test_a_model_that_knows_no_tools_calls_them_all_the_same() -> None:
    params = SamplingParams(temperature=0, max_new_tokens=80)
    with LLM(smollm2(), max_rows=2, context_len=256, chat_template=TEMPLATE) as llm:
        (any_,) = llm.chat(ASKED, params, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        (named,) = llm.chat(
            ASKED, params, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}}
        )
        strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
        (kept,) = llm.chat(ASKED, params, tools=strict, tool_choice="required", parallel_tool_calls=False)
        for output, names in ((any_, SCHEMAS), (named, ["now"]), (kept, ["weather"])):
            assert output.finish_reason == "tool_calls", output.text
            assert output.tool_calls is not None
            (call,) = output.tool_calls
            assert call.name in names
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        wrong = {"type": "function", "function": {"name": "later"}}
        for choice, reason in ((wrong, "tools has no such function"), ("must", '"required" or')):
            with pytest.raises(RequestError, match=reason):
                llm.render(ASKED, tools=TOOLS, tool_choice=choice)
        (both,) = llm.chat(ASKED, {"regex": "a"}, tools=TOOLS, tool_choice="required")
        assert "regex and tool_choice cannot both hold" in (both.error or "")


def test_functions_that_are_not_strict_take_any_arguments_where_others_are(tokenizer: Tokenizer) -> None:
    grammars, form = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids), FAMILIES["qwen"]
    strict = TOOLS[0] | {"function": TOOLS[0]["function"] | {"strict": True}}
    message = MessageGrammar(form, "", [*map(tool_of, (strict, TOOLS[1]))])
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    for name, arguments, right in (
        ("now", '{"zone": [1, {"a": null}]}', True),
        ("now", "{}", True),
        ("weather", '{"city": "Rome", "days": 3}', True),
        ("weather", '{"city": "Rome", "days": 30}', False),
        ("weather", '{"town": "Rome"}', False),
        ("later", "{}", False),
    ):
        thought = f"<think>Hm, {arguments}?</think>"
        for text in (
            call % (name, arguments),
            f"Well.\n{call % (name, arguments)} So",
            thought + call % (name, arguments),
        ):
            assert follows(grammars, tokenizer, message, text) == right, text
    loose = MessageGrammar(form, "", [*map(tool_of, TOOLS)])
    assert not loose.binds
