"""The beginning of a JSON object as an object."""

from __future__ import annotations

import json
from typing import Any

_CLOSERS = {"{": "}", "[": "]"}


def beginning_of(text: str) -> dict[str, Any]:
    """What of an object is there as a whole, where its text may end anywhere; {} for what is none.

    A string or a name that is cut is left out, and so is a number that may go on.
    """
    value = _parsed(text)
    if value is None:
        value = _parsed(_closed(text))
    return value if isinstance(value, dict) else {}


def _closed(text: str) -> str:
    """The text up to its last value that is whole, and what closes it."""
    closers: list[str] = []  # as at ``whole``, which moves wherever they change
    whole, at, end = 0, 0, ""  # end: the last character that is no blank
    wants_name = quoted = False
    while at < len(text):
        head = text[at]
        if quoted:
            at += head == "\\"
            quoted = head != '"'
            if not (quoted or wants_name):
                whole = at + 1
        elif head == '"':
            quoted = True
        elif head in _CLOSERS:
            closers.append(_CLOSERS[head])
            whole, wants_name = at + 1, head == "{"
        elif head in "}]" and closers:
            closers.pop()
            whole, wants_name = at + 1, False
        elif head == ",":  # before which a number or a word is whole
            whole = at if end not in _CLOSERS else whole
            wants_name = closers[-1:] == ["}"]
        elif head == ":":
            wants_name = False
        end = head if head.strip() else end
        at += 1
    return text[:whole] + "".join(reversed(closers))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
