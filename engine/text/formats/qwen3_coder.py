"""Calls of Qwen3-Coder: arguments as bare text between tags, of the types that the tool's schema states.

<tool_call>
<function=write>
<parameter=path>
a.txt
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from makeready.engine.text.formats.bare import Arguments, in_order
from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.cast import TextArgument
from makeready.engine.text.formats.rules import Tool, Written
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step, Token
from makeready.engine.text.lark import Lark

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_NAME, _PLAIN = re.compile(r"[^<>\n]+"), re.compile(r"[^<]+")


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
    each: list[str] = []
    for tool in tools:
        said, end = Arguments(tool, lark), f"\n{END_PARAMETER}\n"
        written = [
            f"{lark.text(f'{PARAMETER}{name}>{chr(10)}')} {said.text(name, end)}" for name in said.names
        ]
        each.append(f"{lark.text(f'{tool.name}>{chr(10)}')} {in_order(said.names, written, lark)}")
    inner = lark.rule(f"({' | '.join(each)}) {lark.text(END_FUNCTION)}")
    body = lark.rule(f"{lark.text(f'{chr(10)}{FUNCTION}')} {inner} {lark.text(f'{chr(10)}{CLOSING}')}")
    call = lark.rule(f"{lark.text(OPENING)} {body}")
    return Written(f'{call} ("\\n" {call})*' if parallel else call, {OPENING: body, FUNCTION: inner})


@call_format(
    "qwen3_coder",
    openings=(OPENING, FUNCTION),
    others=(CLOSING, END_FUNCTION, PARAMETER, END_PARAMETER),
    told_by=((OPENING, FUNCTION, PARAMETER),),
    rules=_rules,
)
def read_qwen3_coder(scan: Scan, opening: str) -> Step[None]:
    """Calls up to the closing tag; a model may leave the outer tags out."""
    source, found, any_read = scan.source, opening == FUNCTION, False
    while True:
        if not found:
            yield from source.blanks()
            if not (yield from source.match((FUNCTION,))):
                break
        if not (yield from _read_call(scan)):
            return
        found, any_read = False, True
    if any_read:
        yield from scan.close(CLOSING)


def _read_call(scan: Scan) -> Step[bool]:
    source = scan.source
    name = yield from _name(scan)
    if not name:
        return False
    call = Call(scan, name)
    yield from source.blanks()
    while (yield from source.match((PARAMETER,))):
        key = yield from _name(scan)
        if not key:
            return False
        call.write(f"{', ' if call.begun else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        if not (yield from _read_value(scan, call, key)):
            return False
        yield from source.blanks()
    if (yield from source.match((END_FUNCTION,), cut=True)) != END_FUNCTION:
        yield from call.cut()
        return False
    if call.begun:
        call.write("}")
    call.finish()
    scan.accept()
    return True


def _name(scan: Scan) -> Step[str]:
    """What stands up to ``>``; "" where it is none."""
    name = yield from scan.source.word(_NAME)
    return name.strip() if (yield from scan.source.match((">",))) else ""


def _read_value(scan: Scan, call: Call, key: str) -> Step[bool]:
    """The text up to a closing tag that the format goes on behind: others are part of it."""
    source, name = scan.source, call.name or ""
    value = TextArgument(scan.tools.types(name, key), call.write)
    while True:
        head = yield from source.peek()
        if not head:
            value.cut()
            return False
        if isinstance(head, Token) and head != END_PARAMETER:
            return False
        if text := source.run(_PLAIN):
            value.add(text)
        elif closing := (yield from source.match((END_PARAMETER,), cut=True)):
            closing += yield from source.blanks()
            ends = not (yield from source.peek())
            if ends or (yield from source.match((PARAMETER, END_FUNCTION), take=False, cut=True)):
                value.close()
                return True
            value.add(closing)
        elif (yield from source.peek()):
            value.add(source.take())
