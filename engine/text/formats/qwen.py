"""Calls of Qwen2.5, Qwen3 and Hermes: JSON between tags.

<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_call
from makeready.engine.text.formats.rules import Tool, Written, call_object
from makeready.engine.text.formats.scan import Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.lark import Lark

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
    body = lark.rule(f'"\\n" {lark.json(call_object(tools))} {lark.text(chr(10) + CLOSING)}')
    call = lark.rule(f"{lark.text(OPENING)} {body}")
    return Written(f'{call} ("\\n" {call})*' if parallel else call, {OPENING: body})


@call_format(
    "qwen",
    openings=(OPENING,),
    others=(CLOSING,),
    told_by=((OPENING, "arguments", "!<arg_key>", "!<function="),),
    rules=_rules,
)
def read_qwen(scan: Scan, opening: str) -> Step[None]:
    """Calls up to the closing tag."""
    found = False
    while (yield from scan.next_is("{")):
        if not (yield from read_call(scan)):
            return
        found = True
    if found:
        yield from scan.close(CLOSING)
