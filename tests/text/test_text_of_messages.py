"""A reply's message from its tokens: the same for who reads along and who does not, wherever it is cut off."""

from __future__ import annotations

import json
from functools import cache

import pytest
import tokenizers
from test_formats import FORMATS, TOOLS, written
from tokenizers import AddedToken
from tokenizers_fixture import byte_level_json, wrap

from makeready.engine.message import CONTENT, REASONING, Event, Gathered, call_deltas, text_of
from makeready.engine.output import Output
from makeready.engine.reply import Reply
from makeready.engine.sampling import SamplingParams
from makeready.engine.sequence import TokenSequence
from makeready.engine.text.formats.scan import Reading
from makeready.engine.text.tokenizer import Tokenizer

END = 2  # <|end|> of the vocabulary


@cache
def vocabulary(family: str, special: bool) -> Tokenizer:
    """A vocabulary in which the family's markers are tokens, or are special ones."""
    backend = tokenizers.Tokenizer.from_str(byte_level_json())
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    markers = sorted(FORMATS[family].markers - known)
    backend.add_tokens([AddedToken(marker, special=special, normalized=False) for marker in markers])
    return wrap(backend.to_str())


def answered(
    tokenizer: Tokenizer, reading: Reading | None, output: list[int], most: int, follow: bool, **sampling
) -> tuple[Output, list[Event], list[str]]:
    params = SamplingParams(max_new_tokens=most, temperature=0, **sampling)
    events: list[Event] = []
    pieces: list[str] = []
    sequence = TokenSequence(tokenizer.encode("x"), params, 0, frozenset({END}))
    reply = Reply(sequence, tokenizer, reading)
    if follow:
        reply.on_text, reply.on_event = pieces.append, events.append
    for token in output:
        if sequence.done:
            break
        sequence.append(token)
        if reply.follows:
            reply.read()
    reply.finish()
    return reply.result(), events, pieces


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("family", FORMATS)
def test_who_reads_along_gets_the_plain_answer(family, special):
    tokenizer, form = vocabulary(family, special), FORMATS[family]
    calls = written(family, ("add", '{"a": 1, "text": "Grüße 🙂 </b>"}'), ("now", "{}"))
    thought = form.reasoning and family != "gpt-oss"
    text = (f"{form.reasoning.opening}\nHm 🙂.\n{form.reasoning.closing}\n\nSo:\n" if thought else "") + calls
    ids = [*tokenizer.encode(text, add_special_tokens=False), END]
    reading = Reading(form, TOOLS)
    for most in range(1, len(ids) + 1):
        for more in ({}, {"skip_special_tokens": False}, {"stop": ["no such text"]}):
            plain, _, _ = answered(tokenizer, reading, ids, most, False, **more)
            streamed, events, pieces = answered(tokenizer, reading, ids, most, True, **more)
            assert (plain.text, plain.message) == (streamed.text, streamed.message)
            assert (
                plain.finish_reason
                == streamed.finish_reason
                == ("length" if most < len(ids) else "tool_calls")
            )
            assert (
                plain.text == "".join(pieces) == answered(tokenizer, None, ids, most, False, **more)[0].text
            )
            gathered = Gathered()
            for event in events:
                gathered.take(event)
            assert gathered.message() == plain.message
            assert text_of(events, CONTENT) == (plain.content or "")
            assert text_of(events, REASONING) == (plain.reasoning_content or "")
            for at, call in enumerate(plain.tool_calls):
                deltas = [delta for delta in call_deltas(events) if delta.index == at]
                assert (deltas[0].id, deltas[0].name) == (call.id, call.name)
                assert "".join(delta.arguments for delta in deltas) == call.arguments
    assert [json.loads(call.arguments) for call in plain.tool_calls] == [
        {"a": 1, "text": "Grüße 🙂 </b>"},
        {},
    ]
    assert (plain.content, plain.reasoning_content) == (("So:", "Hm 🙂.") if thought else (None, None))
    assert plain.meta_info["finish_reason"] == {"type": "stop", "matched": END}
    ids_of_calls = [call.id for call in plain.tool_calls]
    assert len(set(ids_of_calls)) == 2
    assert all(len(name) == (9 if family == "mistral" else 29) for name in ids_of_calls)


def test_a_stop_string_inside_a_call_leaves_it_as_it_stands():
    tokenizer, reading = vocabulary("qwen", False), Reading(FORMATS["qwen"], TOOLS)
    ids = [*tokenizer.encode(written("qwen", ("add", '{"text": "one two"}')), add_special_tokens=False), END]
    for follow in (False, True):
        output, _, _ = answered(tokenizer, reading, ids, 999, follow, stop=["two"])
        (call,) = output.tool_calls
        assert (call.arguments, call.complete, output.finish_reason) == ('{"text": "one ', False, "stop")
        output, _, _ = answered(tokenizer, reading, ids, 999, follow, stop=["</tool_call>"])
        assert (output.finish_reason, output.tool_calls[0].complete) == ("tool_calls", True)


def test_one_call_ends_the_answer():
    tokenizer, reading = vocabulary("qwen", False), Reading(FORMATS["qwen"], TOOLS, parallel=False)
    first = written("qwen", ("add", '{"a": 1}'))
    ids = tokenizer.encode(f"{first}\n{first} and on", add_special_tokens=False)
    outputs = [answered(tokenizer, reading, ids, len(ids), follow)[0] for follow in (False, True)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert len(outputs[0].token_ids) <= len(tokenizer.encode(first, add_special_tokens=False))
    for output in outputs:
        assert (output.finish_reason, len(output.tool_calls)) == ("tool_calls", 1)
        assert output.meta_info["finish_reason"] == {"type": "stop", "matched": "tool_calls"}


def test_half_a_character_at_a_marker():
    """The rest of a broken character is told before the marker, and none of it is lost."""
    tokenizer, reading = vocabulary("qwen", False), Reading(FORMATS["qwen"])
    # The first byte of four, as byte-level vocabularies write it.
    texts = ("<think>", "\u00f0", "</think>", "\u00f0")
    ids = [token for text in texts if (token := tokenizer.token_to_id(text)) is not None] + [END]
    assert len(ids) == 5
    for follow in (False, True):
        output, _, _ = answered(tokenizer, reading, ids, 99, follow)
        assert (output.reasoning_content, output.content) == ("\ufffd", "\ufffd")
