"""Calls as Python writes them: Llama 4 and 3.2, LFM2, OLMo 3.

[add(a=1, b=2), name()]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from makeready.engine.text.formats.bare import Arguments, in_order
from makeready.engine.text.formats.base import call_format
from makeready.engine.text.formats.cast import STRING, fit
from makeready.engine.text.formats.rules import Tool, Written
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.formats.values import QUOTES, read_value
from makeready.engine.text.lark import Lark, escaped

MARKERS = {
    "<|python_start|>": "<|python_end|>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<function_calls>": "</function_calls>",
}
LINES = "<function_calls>"  # calls between these are lines, and no list
_NAME = re.compile(r"[\w.]+")


def _rules(tools: Sequence[Tool], parallel: bool, lark: Lark) -> Written:
    calls: list[str] = []
    for tool in tools:
        said = Arguments(tool, lark)
        written = [f"{lark.text(f'{name}=')} {said.python(name)}" for name in said.names]
        arguments = in_order(said.names, written, lark, '", "')
        calls.append(lark.rule(f'{arguments} ")"'))
    names = [escaped(tool.name) for tool in tools]
    heads = [lark.text(f"{tool.name}(") for tool in tools]
    call = lark.rule(" | ".join(f"{head} {rest}" for head, rest in zip(heads, calls, strict=True)))
    more = f'(", " {call})* "]"' if parallel else '"]"'
    listed = lark.rule(f'"[" {call} {more}')
    lines = f'{call} ("\\n" {call})*' if parallel else call
    behind: dict[str | int, str] = {
        opening: lark.rule(f"{lines if opening == LINES else listed} {lark.text(closing)}")
        for opening, closing in MARKERS.items()
    }
    marked = [
        f"{lark.text(opening)} {rest}" for opening, rest in behind.items() if opening in lark.markers.ids
    ]
    heads = [lark.lazy(rf"[ \t\r\n]*\[[ \t\r\n]*{name}[ \t\r\n]*\(") for name in names]
    begun = " | ".join(f"{head} {rest}" for head, rest in zip(heads, calls, strict=True))
    others = (r"[ \t\r\n]*\[[ \t\r\n]*[\w.]+[ \t\r\n]*\((?s:.)*",)
    return Written(f"({' | '.join((listed, *marked))})", behind, f"({begun}) {more}", others)


@call_format(
    "pythonic",
    openings=tuple(MARKERS),
    others=tuple(MARKERS.values()),
    unmarked="[",
    told_by=(("[func_name1(params_name1=",), ("<|tool_list_start|>",), ("<function_calls>",)),
    rules=_rules,
)
def read_pythonic(scan: Scan, opening: str) -> Step[None]:
    """A list of calls; between markers the brackets may be left out, and newlines stand for commas."""
    source = scan.source
    listed = yield from scan.next_is("[")
    if listed:
        source.take()
    found = False
    while name := (yield from _next_name(scan)):
        call = Call(scan, name)
        if not (yield from scan.next_is("(")) or not (yield from _read_call(scan, call)):
            return
        found = True
        if (yield from scan.next_is(",")):
            source.take()
        elif listed:
            break
    if found:
        yield from scan.close(*("]",) if listed else (), *((MARKERS[opening],) if opening else ()))


def _next_name(scan: Scan) -> Step[str]:
    yield from scan.source.blanks()
    return (yield from scan.source.word(_NAME))


def _read_call(scan: Scan, call: Call) -> Step[bool]:
    """From the opening bracket to the closing one."""
    source, name = scan.source, call.name or ""
    source.take()
    while not (yield from scan.next_is(")")):
        if call.begun:
            if (yield from source.peek()) != ",":
                return False
            source.take()
            if (yield from scan.next_is(")")):
                break
        key = yield from _next_name(scan)
        if not key or not (yield from scan.next_is("=")):
            return False
        source.take()
        yield from source.blanks()
        if not (yield from _read_value(scan, call, key, scan.tools.types(name, key))):
            return False
    source.take()
    if call.begun:
        call.write("}")
    call.finish()
    scan.accept()
    return True


def _read_value(scan: Scan, call: Call, key: str, types: frozenset[str]) -> Step[bool]:
    """A string is written as it comes where it may be one; what has to fit a type waits for its end."""
    source = scan.source
    before = f"{', ' if call.begun else '{'}{json.dumps(key, ensure_ascii=False)}: "
    head = yield from source.peek()
    parts: list[str] = []
    streams = not types or (STRING in types and head in QUOTES)

    def write(text: str) -> None:
        nonlocal before
        if text:
            call.write(before + text)
            before = ""

    whole = yield from read_value(source, write if streams else parts.append)
    made = "".join(parts)
    if whole and made:
        write(fit(made, types))
    elif call.begun and not (yield from source.peek()):
        write(made if made else "".join(source.taken))
    return whole
