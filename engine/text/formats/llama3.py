"""Calls of Llama 3.1 to 3.3: JSON without markers, or behind ``<|python_tag|>``.

{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}
"""

from __future__ import annotations

from collections.abc import Sequence

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_call
from makeready.engine.text.formats.rules import Spell, Tool, call_object, json_rule
from makeready.engine.text.formats.scan import Scan
from makeready.engine.text.formats.source import Step

TAG = "<|python_tag|>"


def _rules(tools: Sequence[Tool], parallel: bool, spell: Spell) -> list[str]:
    return [
        f"calls: object{' (SEMICOLON object)*' if parallel else ''}",
        'SEMICOLON: "; "',
        json_rule("object", call_object(tools, "parameters")),
    ]


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
