"""Calls of Llama 3.1 to 3.3: JSON without markers, or behind ``<|python_tag|>``.

{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}
"""

from __future__ import annotations

from collections.abc import Sequence

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_call
from makeready.engine.text.formats.rules import Tool, Written, call_object
from makeready.engine.text.formats.scan import Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.lark import Lark

TAG = "<|python_tag|>"


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
    call = lark.json(call_object(tools, "parameters"))
    calls = lark.rule(f'{call} ("; " {call})*' if parallel else call)
    return Written(calls, {TAG: calls}, calls, (r"[ \t\r\n]*\{(?s:.)*",))


@call_format(
    "llama3",
    openings=(TAG,),
    unmarked="{",
    told_by=(('{"name": function name, "parameters":',),),
    rules=_rules,
)
def read_llama3(scan: Scan, opening: str) -> Step[None]:
    """Objects with semicolons or blanks between them; one that is no call is the model's answer."""
    while (yield from scan.next_is("{")):
        if not (yield from read_call(scan, strict=not opening)):
            return
        if (yield from scan.next_is(";")):
            scan.source.take()
            yield from scan.source.blanks()
            if not (yield from scan.source.peek()):
                scan.accept()
