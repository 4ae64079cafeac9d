"""Calls of DeepSeek V3 and R1, and of V3.1, between markers.

V3, R1  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add
        ```json
        {"a": 1}
        ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
V3.1    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.json_calls import read_arguments
from makeready.engine.text.formats.rules import Tool, Written
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.lark import Lark

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR, FENCE = "<｜tool▁sep｜>", "```"
_NAME = re.compile(r"[^<\n]+")


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark, *, fenced: bool) -> Written:
    heads = [
        f"function{SEPARATOR}{tool.name}\n{FENCE}json\n" if fenced else f"{tool.name}{SEPARATOR}"
        for tool in tools
    ]
    end = lark.text(f"\n{FENCE}{END_CALL}" if fenced else END_CALL)
    each = [f"{lark.text(head)} {lark.json(tool.arguments)}" for head, tool in zip(heads, tools, strict=True)]
    call = lark.rule(f"({' | '.join(each)}) {end}")
    glue = lark.text(f"\n{CALL}" if fenced else CALL)
    body = lark.rule(
        f"{lark.text(CALL)} {call} {f'({glue} {call})*' if parallel else ''} {lark.text(END_CALLS)}"
    )
    return Written(f"{lark.text(CALLS)} {body}", {CALLS: body, CALL: call})


@call_format(
    "deepseekv3",
    openings=(CALLS, CALL),
    others=(END_CALLS, END_CALL, SEPARATOR),
    told_by=((CALLS, SEPARATOR, "```json"),),
    rules=partial(_rules, fenced=True),
)
def read_deepseek_v3(scan: Scan, opening: str) -> Step[None]:
    """Calls whose arguments stand in a block of code."""
    yield from _read(scan, opening, fenced=True)


@call_format(
    "deepseekv31",
    openings=(CALLS, CALL),
    others=(END_CALLS, END_CALL, SEPARATOR),
    told_by=((CALLS, SEPARATOR),),
    rules=partial(_rules, fenced=False),
)
def read_deepseek_v31(scan: Scan, opening: str) -> Step[None]:
    """Calls whose arguments follow their name."""
    yield from _read(scan, opening, fenced=False)


def _read(scan: Scan, opening: str, *, fenced: bool) -> Step[None]:
    source, found, any_read = scan.source, opening == CALL, False
    while found or (yield from source.match((CALL,))):
        call = yield from _named(scan, fenced)
        if call is None:
            return
        if not (yield from scan.next_is("{")) or not (yield from read_arguments(scan, call)):
            yield from call.cut()
            return
        call.finish()
        yield from scan.close(*((FENCE,) if fenced else ()), END_CALL)
        found, any_read = False, True
        yield from source.blanks()
    if any_read:
        yield from scan.close(END_CALLS)


def _named(scan: Scan, fenced: bool) -> Step[Call | None]:
    """A call up to its arguments; None where it is none."""
    source = scan.source
    name = yield from source.word(_NAME)
    if not (yield from source.match((SEPARATOR,))):
        return None
    if fenced:
        name = yield from source.word(_NAME)
        yield from source.blanks()
        if not (yield from source.match((f"{FENCE}json",), cut=True)):
            return None
    return Call(scan, name.strip()) if name.strip() else None
