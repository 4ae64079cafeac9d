"""Calls of Mistral: a list of JSON objects, or since version 11 of its tokenizer a marker for each.

[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]
[TOOL_CALLS]add[ARGS]{"a": 1}
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_arguments, read_call
from makeready.engine.text.formats.rules import Spell, Tool, call_object, json_rule
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step

CALLS, ARGUMENTS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[^\[\]{}\s]+")


def _rules(tools: Sequence[Tool], parallel: bool, spell: Spell) -> list[str]:
    listed = {"type": "array", "items": call_object(tools), "minItems": 1}
    return [
        f'calls: {spell(CALLS)} " "? list',
        json_rule("list", listed if parallel else {**listed, "maxItems": 1}),
    ]


@call_format(
    "mistral",
    openings=(CALLS,),
    others=(ARGUMENTS, ID),
    told_by=((CALLS,),),
    short_ids=True,
    rules=_rules,
)
def read_mistral(scan: Scan, opening: str) -> Step[None]:
    """One call or a list of them."""
    source = scan.source
    listed = yield from scan.next_is("[")
    if listed:
        source.take()
    found = False
    while (yield from scan.next_is("{")):
        if not (yield from read_call(scan)):
            return
        found = True
        if not listed or not (yield from scan.next_is(",")):
            break
        source.take()
    if listed and found:
        yield from scan.close("]")
    if listed or found:
        return
    name = yield from source.word(_NAME)
    if (yield from source.match((ID,))):
        yield from source.word(_NAME)
    if not name or not (yield from source.match((ARGUMENTS,))):
        return
    call = Call(scan, name)
    if (yield from scan.next_is("{")) and (yield from read_arguments(scan, call)):
        call.finish()
    else:
        yield from call.cut()
