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
from makeready.engine.text.message_grammar import message_grammar, spelling
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
    "llama3": format_of(None, "llama3", "none"),
    "mistral": format_of(None, "mistral", "mistral"),
    "deepseekv3": format_of(None, "deepseekv3", "think"),
    "deepseekv31": format_of(None, "deepseekv31", "think"),
}


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


def drawn(grammars: Grammars, tokenizer: Tokenizer, lark: str, seed: int) -> list[int]:
    """Tokens at random under a grammar's masks up to its end; free text is a few letters, and ends some day."""
    rng, grammar = random.Random(seed), grammars.start("lark", lark)
    letters, ends = tokenizer.encode("a few words\n", add_special_tokens=False), list(tokenizer.eos_ids)
    closings = [tokenizer.encode(text, add_special_tokens=False) for text in ("</think>", "[/THINK]")]
    ids: list[int] = []
    words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    while len(ids) < 300:
        grammar.allow(words)
        assert grammar.error is None
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        if bits[ends].any() and rng.random() < 0.6:
            return ids
        bits[ends] = 0
        chosen = [rng.choice(np.flatnonzero(bits).tolist())]
        if bits.sum() > 2000:  # within reasoning
            closing = closings["[/THINK]" in lark or not bits[closings[0][0]]]
            chosen = (
                closing if rng.random() < 0.2 else [rng.choice([t for t in letters if bits[t]] or chosen)]
            )
        for token in chosen:
            ids.append(token)
            if grammar.take(token):
                assert grammar.error is None
                return ids
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


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_is_read_as_calls(tokenizer: Tokenizer, family: str, opened: bool) -> None:
    form: Format = FAMILIES[family]
    if opened and form.reasoning is None:
        pytest.skip("nothing to open")
    head = form.reasoning.opening if opened and form.reasoning else ""
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    counts = set()
    for parallel, seed in [(False, 0), (False, 1), *((True, seed) for seed in range(40))]:
        lark = message_grammar(form, head, [*map(tool_of, TOOLS)], parallel, spelling(tokenizer))
        ids = drawn(grammars, tokenizer, lark, seed)
        message = message_of(tokenizer, Reading(form, TOOLS, head, parallel), ids)
        assert message.calls, tokenizer.decode(ids, skip_special_tokens=False)
        assert not (message.content or "").strip()
        for call in message.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        counts.add(len(message.tool_calls))
        assert parallel or len(message.tool_calls) == 1
        if seed > 2 and len(counts) > 1:
            break
    assert len(counts) > 1


TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    "{# <tool_call> arguments </tool_call> #}"
)
ASKED = [{"role": "user", "content": "Weather in Rome?"}]


def test_a_model_that_knows_no_tools_calls_them_all_the_same() -> None:
    params = SamplingParams(temperature=0, max_new_tokens=80)
    with LLM(smollm2(), max_rows=2, context_len=256, weight_dtype="float16", chat_template=TEMPLATE) as llm:
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
    with (
        LLM(
            smollm2(),
            max_rows=2,
            context_len=256,
            weight_dtype="float16",
            chat_template=TEMPLATE,
            tool_call_parser="pythonic",
        ) as llm,
        pytest.raises(RequestError, match="calls of the format pythonic cannot be forced"),
    ):
        llm.render(ASKED, tools=TOOLS, tool_choice="required")
