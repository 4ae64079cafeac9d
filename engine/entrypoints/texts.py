r"""Texts and lists of texts on a command line, as people type them behind the shell's own quotes.

    sampling.stop=</s>                 one text, as it stands: commas, brackets in its middle and all
    sampling.stop=\n\n                 what consists of \n, \r and \t alone is those characters
    'sampling.stop=["\n", "###"]'      a list, as JSON has it; in '...' escapes mean the same
    sampling.stop=[</s>,###]           a list without quotes, between commas

Patterns (``sampling.stop_regex``) keep their backslashes: a pattern knows ``\n`` by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from makeready.engine.entrypoints.options import UsageError

_ESCAPED = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([nrtbf"\'\\/]))')
_ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^,]*?))\s*(?:,|$)""", re.DOTALL)


def texts(name: str, value: str, *, escapes: bool = True) -> list[str]:
    """The texts that an option's value stands for.

    Args:
        escapes: whether ``\\n`` and its like are one character; not in patterns.

    Raises:
        UsageError: a list that does not end, or a quote that does not.
    """
    inside = value.strip()
    if inside in ("null", "[]"):
        return []
    if len(inside) > 1 and inside[0] == inside[-1] and inside[0] in "\"'":
        return _quoted(inside[0], inside[1:-1], escapes)
    if not inside.startswith("["):
        return [_bare(value, escapes)]
    if not inside.endswith("]"):
        raise UsageError(
            f"{name}={value} begins a list that does not end; add ], or quote a text: '{name}=\"[\"'"
        )
    if escapes:
        try:
            made = json.loads(inside)
        except ValueError:
            pass
        else:
            if all(isinstance(item, str) for item in made):
                return made
    return list(_items(name, inside[1:-1], escapes))


def _items(name: str, inside: str, escapes: bool) -> Iterator[str]:
    at = 0
    while at < len(inside):
        item = _ITEM.match(inside, at)
        if item is None:
            raise UsageError(f'{name}=[{inside}] has a quote that does not end; write \'{name}=["a", "b"]\'')
        double, single, bare = item.groups()
        if bare is not None:
            if bare[:1] in ('"', "'"):
                raise UsageError(
                    f'{name}=[{inside}] has a quote that does not end; write \'{name}=["a", "b"]\''
                )
            yield _bare(bare, escapes)
        else:
            yield from _quoted("'" if double is None else '"', double or single or "", escapes)
        at = item.end()


def _quoted(quote: str, text: str, escapes: bool) -> list[str]:
    return [_unescaped(text) if escapes else text.replace("\\" + quote, quote)]


def _bare(text: str, escapes: bool) -> str:
    """A text without quotes: a backslash is one, but where nothing else is there."""
    return _unescaped(text) if escapes and re.fullmatch(r"(?:\\[nrt])+", text) else text


def _unescaped(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        return (
            chr(int(found[1], 16)) if found[1] else json.loads(f'"\\{found[2]}"') if found[2] != "'" else "'"
        )

    made = _ESCAPED.sub(plain, text)
    # Two escapes of JSON may stand for one character beyond 16 bits.
    return made.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
