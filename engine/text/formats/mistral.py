"""Calls of Mistral: a list of JSON objects, or since version 11 of its tokenizer a marker for each.

[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]
[TOOL_CALLS]add[ARGS]{"a": 1}
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_arguments, read_call
from makeready.engine.text.formats.rules import Tool, Written, call_object
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.lark import Lark

CALLS, ARGUMENTS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[^\[\]{}\s]+")


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
    if ARGUMENTS in lark.markers.ids:
        each = (f"{lark.text(tool.name + ARGUMENTS)} {lark.json(tool.arguments)}" for tool in tools)
        body = lark.rule(" | ".join(each))
        call = f"{lark.text(CALLS)} {body}"
        return Written(f"({call})+" if parallel else call, {CALLS: body})
    listed = {"type": "array", "items": call_object(tools), "minItems": 1}
    body = lark.rule(f'" "? {lark.json(listed if parallel else {**listed, "maxItems": 1})}')
    return Written(f"{lark.text(CALLS)} {body}", {CALLS: body})


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
