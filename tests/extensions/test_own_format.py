"""A family's way of writing calls and reasoning from outside the packages, by registration alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from llguidance import LLMatcher

from makeready.engine.message import Event, Gathered
from makeready.engine.text.formats import base
from makeready.engine.text.formats.base import call_format, format_of, reasoning_format
from makeready.engine.text.formats.rules import Tool, Written
from makeready.engine.text.formats.scan import Call, Reading, Scan, Scanner
from makeready.engine.text.formats.source import Step
from makeready.engine.text.formats.values import read_value
from makeready.engine.text.lark import Lark, Markers
from makeready.engine.text.message_grammar import MessageGrammar


def test_calls_behind_an_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in ("_CALLS", "_REASONING"):  # what is registered goes with the test
        base.call_formats()
        monkeypatch.setattr(base, registry, dict(getattr(base, registry)))

    def rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
        body = lark.json(tools[0].arguments)
        return Written(f"{lark.text('=>')} {body}", {"=>": body})

    @call_format("toy", openings=("=>",), told_by=(("toy =>",),), rules=rules)
    def read_toy(scan: Scan, opening: str) -> Step[None]:
        call = Call(scan, "toy")
        if (yield from scan.next_is("{")) and (yield from read_value(scan.source, call.write)):
            call.finish()

    reasoning_format("toy", "(", ")", (("toy (",),))
    with pytest.raises(ValueError, match="there is a call format toy already"):
        call_format("toy")(read_toy)
    form = format_of("{# toy => and toy ( #}")
    assert form.calls is not None
    assert form.calls.name == "toy"
    assert "toy" in base.call_formats()
    scanner, gathered = Scanner(Reading(form)), Gathered()
    events: list[Event] = []
    for character in '(hm) So => not, but =>{"a": [1]} then':
        events += scanner.feed(character)
    for event in (*events, *scanner.end()):
        gathered.take(event)
    message = gathered.message()
    assert (message.content, message.reasoning_content) == (" So => not, but\n then", "hm")
    assert [(call.name, call.arguments, call.complete) for call in message.tool_calls] == [
        ("toy", '{"a": [1]}', True)
    ]
    grammar = MessageGrammar(form, "", [Tool("toy", {"const": {"a": 1}})], forced=True)
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar.lark(Markers())))
    base._told.cache_clear()
