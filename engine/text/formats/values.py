"""JSON and Python's literals, read as they come and written as JSON.

JSON is written as it is read, byte by byte. Of Python there are its strings, ``True``, ``False``, ``None``, tuples,
trailing commas and numbers such as ``1_000``; models write them in JSON, too. A newline in a string becomes an
escape, and a backslash that begins no escape becomes two, so that what is written is always JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from makeready.engine.text.formats.source import BLANK, Source, Step, Token

Write = Callable[[str], None]

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
QUOTES = ("'", '"')
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_LETTERS, _DIGITS = re.compile(r"[A-Za-z_]+"), re.compile(r"[-+.\w]+", re.ASCII)
_PLAIN = re.compile(r"""[^"'\\\x00-\x1f]+""")
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_OF_JSON = {"{": "{", "[": "[", "(": "[", "}": "}", "]": "]", ")": "]"}
_HEX, _HEX_DIGITS = re.compile("[0-9a-fA-F]"), {"u": 4, "x": 2, "U": 8}
_ESCAPES = {"'": "'", "\n": "", "a": "\\u0007", "v": "\\u000b", "0": "\\u0000"}


def escaped(text: str) -> str:
    """A text as a JSON string has it, without quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def read_value(source: Source, write: Write) -> Step[bool]:
    """Read a value, from its first character to its last.

    Args:
        write: told the JSON of it, piece by piece: at any time the beginning of something valid.

    Returns:
        Whether it was whole. Else the text ended, or goes on as no value does; that stays in the source.
    """
    closers: list[str] = []
    pending = ""  # brackets, commas and blanks, which wait for what they stand before
    wants, may_close = "value", False
    while True:
        blanks = yield from source.blanks()
        pending += blanks if closers else ""
        head = yield from source.peek()
        if not head:
            write(pending)
            return False
        if closers and head == closers[-1] and (may_close or wants == "comma"):
            source.take()
            if pending.rstrip(BLANK).endswith(","):
                pending = pending.replace(",", "")
            write(pending + _OF_JSON[closers.pop()])
            pending = ""
        elif wants == "comma":
            if head != ",":
                return False
            pending += source.take()
            wants, may_close = "key" if closers[-1] == "}" else "value", True
            continue
        elif wants == "key":
            if head not in QUOTES:
                return False
            write(pending)
            if not (yield from read_string(source, write)):
                return False
            pending = yield from source.blanks()
            if (yield from source.peek()) != ":":
                return False
            pending += source.take()
            wants, may_close = "value", False
            continue
        elif head in _CLOSERS:
            pending += _OF_JSON[source.take()]
            closers.append(_CLOSERS[head])
            wants, may_close = "key" if head == "{" else "value", True
            continue
        elif head in QUOTES:
            write(pending)
            pending = ""
            if not (yield from read_string(source, write)):
                return False
        else:
            made = yield from _scalar(source)
            if made is None:
                return False
            write(pending + made)
            pending = ""
        if not closers:
            return True
        wants = "comma"


def read_string(source: Source, write: Write) -> Step[bool]:
    """The same for a string; Python's may have three quotes, and newlines."""
    head = yield from source.peek()
    closing = yield from source.match((head * 3, head))
    write('"')
    while True:
        head = yield from source.peek()
        if not head or isinstance(head, Token):
            return False
        if run := source.run(_PLAIN):
            write(run)
        elif head == "\\":
            if not (yield from _escape(source, write)):
                return False
        elif head == closing[0] and (yield from source.match((closing,))):
            write('"')
            return True
        else:
            write(escaped(source.take()))


def value_of(source: Source) -> Step[Any]:
    """A value itself, in a list of one; [] where it is not whole, or nested too deeply."""
    parts: list[str] = []
    if not (yield from read_value(source, parts.append)):
        return []
    try:
        return [json.loads("".join(parts))]
    except (ValueError, RecursionError):
        return []


def _escape(source: Source, write: Write) -> Step[bool]:
    source.take()
    head = yield from source.peek()
    if not head or isinstance(head, Token):
        return False
    source.take()
    if head in '"\\/bfnrt':
        write(f"\\{head}")
    elif head in _ESCAPES:
        write(_ESCAPES[head])
    elif head in _HEX_DIGITS:
        digits = ""
        while len(digits) < _HEX_DIGITS[head]:
            following = yield from source.peek()
            if not following:
                return False
            if isinstance(following, Token) or not _HEX.fullmatch(following):
                break
            digits += source.take()
        code = int(digits or "0", 16)
        if len(digits) < _HEX_DIGITS[head] or code > 0x10FFFF:
            write(f"\\\\{head}{digits}")
        else:
            write(f"\\u{digits}" if head == "u" else escaped(chr(code)))
    else:
        write(escaped(f"\\{head}"))
    return True


def _scalar(source: Source) -> Step[str | None]:
    """The JSON of a word or a number."""
    if word := (yield from source.word(_LETTERS)):
        return _WORDS.get(word)
    return number((yield from source.word(_DIGITS)))


def number(text: str) -> str | None:
    """The JSON of a number, as JSON or Python write it; None if it is none, or not finite."""
    if NUMBER.fullmatch(text):
        return text
    try:
        return str(int(text, 0))
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return None
    return json.dumps(value) if math.isfinite(value) else None
