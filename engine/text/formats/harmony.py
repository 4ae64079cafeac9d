"""Messages of gpt-oss: one for each channel, in the format that its authors call harmony.

    <|channel|>analysis<|message|>The user wants ...<|end|><|start|>assistant<|channel|>commentary
    to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>

Source: https://github.com/openai/harmony, docs/format.md. What is thought is in ``analysis``, what the user reads in
``final`` and, before calls, in ``commentary``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from makeready.engine.errors import RequestError
from makeready.engine.text.formats.base import call_format, reasoning_format
from makeready.engine.text.formats.json_calls import read_arguments
from makeready.engine.text.formats.rules import Tool
from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import Step
from makeready.engine.text.lark import Lark

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
ENDS = (END, CALL, RETURN, START, CHANNEL)
HEADER = (START, CHANNEL, CONSTRAIN, MESSAGE, " to=")
_RECIPIENT, _CHANNEL = re.compile(r"to=([^\s<]+)"), re.compile(r"<\|channel\|>\s*(\w+)")
_BEGUN = re.compile(r"<\|start\|>assistant((?:(?!<\|start\|>).)*)\Z", re.DOTALL)
_PLAIN = re.compile(r"[^<]")
LONGEST_HEADER = 300  # characters; what is longer is none

reasoning_format("gpt-oss", CHANNEL, END, ((CHANNEL, MESSAGE, "analysis"),))


def _message_rules(tools: Sequence[Tool], forced: bool, content: bool, opened: str, lark: Lark) -> str:
    def head(channel: str) -> str:
        return lark.text(f"{CHANNEL}{channel}{MESSAGE}")

    if MESSAGE not in lark.markers.ids:
        raise RequestError(
            "the tokenizer lacks the tokens of the format gpt-oss; name another tool_call_parser"
        )
    before, within, _ = opened.partition(MESSAGE)
    if before and (not within or _RECIPIENT.search(before)):
        raise RequestError(
            "the chat template has begun a message of gpt-oss in a way that no grammar goes on from"
        )
    ends = lark.rule(f"{lark.until({END: ''})} {lark.text(f'{START}assistant')}")
    heads = [f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}" for tool in tools]
    calls = [
        f"{lark.text(head)} {lark.json(tool.arguments)}" for head, tool in zip(heads, tools, strict=True)
    ]
    answers = [f"{head('final')} @content"] if content else []
    thinks = head("analysis")
    if not (forced or content):
        thinks = lark.rule(f"({' | '.join(map(head, ('analysis', 'commentary')))})")
        answers = [f"({thinks} | {head('final')}) {lark.free()}"]
    last = f"({thinks} {ends})* ({' | '.join((*answers, *calls))})"
    if not within:
        return last
    if "analysis" in before:
        return f"{ends} {last}" if forced or content else f"({ends} {last} | {lark.free()})"
    return "@content" if content else lark.free()


def _opened(prompt: str) -> str:
    found = _BEGUN.search(prompt)
    return found[1] if found else ""


@call_format(
    "gpt-oss",
    openings=(START, CHANNEL),
    others=(CONSTRAIN, MESSAGE, END, CALL, RETURN),
    told_by=((CHANNEL, MESSAGE, "analysis"),),
    whole=True,
    message_rules=_message_rules,
    opened=_opened,
)
def read_harmony(scan: Scan, opened: str) -> Step[None]:
    """All messages; ``opened`` is what the prompt has of the first one."""
    source = scan.source
    header, within, _ = opened.partition(MESSAGE)
    while True:
        if not within:
            header = header or (yield from source.match(HEADER))
            if header and header != MESSAGE:
                header = yield from _read_header(scan, header)
            scan.accept()
        ending = yield from _read_body(scan, header)
        if not ending:
            return
        scan.accept()
        header, within = ending if ending in (START, CHANNEL) else "", ""


def _read_header(scan: Scan, header: str) -> Step[str]:
    """A header up to its last marker; one that has none is content, unless the answer ends in it."""
    source = scan.source
    while (yield from source.peek()):
        if len(header) > LONGEST_HEADER:
            scan.write(scan.content)
            return ""
        if part := source.run(_PLAIN):
            header += part
        elif marker := (yield from source.match(HEADER)):
            if marker == MESSAGE:
                return header
            header += marker
        else:
            header += source.take()
    return ""


def _read_body(scan: Scan, header: str) -> Step[str]:
    """What stands behind a header, and the marker that ends it; "" at the end."""
    reading = scan.reading
    recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
    if recipient is not None and reading.format.calls is not None:
        call = Call(scan, recipient[1].removeprefix("functions."))
        if (yield from scan.next_is("{")) and (yield from read_arguments(scan, call)):
            call.finish()
        else:
            yield from call.cut()
        yield from scan.leave()
    thinks = reading.format.reasoning is not None and channel is not None and channel[1] == "analysis"
    region = scan.reasoning if thinks and recipient is None else scan.content
    region.border()
    return (yield from scan.text(region, ENDS))
