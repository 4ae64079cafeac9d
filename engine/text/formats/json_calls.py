"""Calls that are JSON objects, which several families write between markers of their own."""

from __future__ import annotations

import json
from typing import Any

from makeready.engine.text.formats.scan import Call, Scan
from makeready.engine.text.formats.source import BLANK, Step
from makeready.engine.text.formats.values import QUOTES, read_value, value_of

ARGUMENTS = ("arguments", "parameters")
KEYS = (*ARGUMENTS, "name", "type", "id")


def read_arguments(scan: Scan, call: Call) -> Step[bool]:
    """Read the object of a call's arguments; returns whether it was whole.

    Also a text that holds such an object, or a null. Where the answer ends within, the call stays as it stands.
    """
    source = scan.source
    head = yield from source.peek()
    if head == "{":
        call.whole = yield from read_value(source, call.write)
        if not call.whole and not (yield from source.peek()) and call.begun:
            call.write("".join(source.taken))
        return call.whole
    found = yield from value_of(source)
    if found and isinstance(found[0], str):
        call.whole = isinstance(_parsed(found[0]), dict)
        if call.whole:
            call.write(found[0])
        return call.whole
    return found == [None]


def read_call(scan: Scan, *, strict: bool = False) -> Step[bool]:
    """Read ``{"name": ..., "arguments": {...}}``, whose keys may come in any order; returns whether it is a call.

    Args:
        strict: an object with any key but a call's is none.
    """
    call = Call(scan)
    closed = yield from _read_keys(scan, call, strict)
    if call.name is None:
        return False
    if closed or call.whole:
        call.finish()
        ends = not (yield from scan.source.peek())
        # A bracket that the model forgot costs nothing.
        if closed or ends or not "".join(scan.source.taken).strip(BLANK):
            scan.accept()
            return True
        return False
    yield from call.cut()
    return False


def _read_keys(scan: Scan, call: Call, strict: bool) -> Step[bool]:
    """Read an object into a call; returns whether it was one to its end."""
    source, first = scan.source, True
    source.take()
    while not (yield from scan.next_is("}")):
        if not first:
            if (yield from source.peek()) != ",":
                return False
            source.take()
            if (yield from scan.next_is("}")):
                break
        first = False
        key = (yield from value_of(source)) if (yield from source.peek()) in QUOTES else []
        if not key or (strict and key[0] not in KEYS) or not (yield from scan.next_is(":")):
            return False
        source.take()
        yield from source.blanks()
        if key[0] in ARGUMENTS and not call.whole:
            if not (yield from read_arguments(scan, call)):
                return False
            continue
        value = yield from value_of(source)
        if not value:
            return False
        if key[0] == "name" and call.name is None:
            if not isinstance(value[0], str) or not value[0]:
                return False
            call.name = value[0]
    source.take()
    return True


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
