r"""Stop patterns in linear time and bounded memory, by RE2.

RE2 runs no pattern longer than its size times the text's, and compiles none beyond ``max_mem``. In exchange it
knows neither lookaround nor references to groups. Where it writes or means something else than Python's ``re``,
the pattern is translated, so that it means what it does there:

    \w \d \s \W \D \S    letters, digits and white space of all scripts, not of ASCII alone
    \Z                   \z
    \uXXXX \UXXXXXXXX    \x{...}
    {,n}                 {0,n}

``\b`` stays RE2's, which knows ASCII letters only.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from makeready.engine.text.parts import TextError

if TYPE_CHECKING:
    import re2

# Of a pattern, and of all patterns of a request: bytes of programs and of what RE2 keeps of texts that it has seen.
# It takes a quarter for the program; a letter of any script is 21 KiB of that.
PATTERN_BYTES, REQUEST_BYTES = 2**20, 2**21
MOST_REPEATS = 1000  # RE2's own limit; above it takes the braces for a text

_WORD = r"\p{L}\p{N}_"
_NO_WORD = (
    r"\p{M}\p{Pd}\p{Ps}\p{Pe}\p{Pi}\p{Pf}\p{Po}\p{S}\p{Z}\p{C}"
    r"\x{203F}\x{2040}\x{2054}\x{FE33}\x{FE34}\x{FE4D}-\x{FE4F}\x{FF3F}"  # what joins words, but for _
)
_SPACE = r"\t-\r\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_NO_SPACE = (
    r"\x00-\x08\x0e-\x1b\x21-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}"
    r"\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff}"
)
_CLASSES = {"w": _WORD, "W": _NO_WORD, "d": r"\p{Nd}", "D": r"\P{Nd}", "s": _SPACE, "S": _NO_SPACE}

_LOOKS = re.compile(r"\(\?(?:[=!>(]|<[=!]|P=)")
_TOKEN = re.compile(
    r"\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})|\\(?P<class>[wWdDsS])|\\Z(?P<end>)|\\(?P<back>[1-9])"
    r"|\\.|(?P<look>" + _LOOKS.pattern + r")|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\}|\[\^?\]?|\]|.",
    re.DOTALL,
)


@lru_cache(maxsize=64)
def compile_pattern(text: str, share: int = 1) -> re2._Regexp:
    """A stop pattern.

    Args:
        text: in the syntax of Python's ``re``, without lookaround and references to groups.
        share: how many patterns the memory of a request is for.

    Raises:
        TextError: it is broken, too large, of what RE2 has not, or matches the empty text.
    """
    import re2  # 20 ms, for which only those wait who have patterns

    options = re2.Options()
    options.max_mem, options.log_errors = min(PATTERN_BYTES, REQUEST_BYTES // share), False
    try:
        pattern = re2.compile(translated(text), options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0] if isinstance(error, re2.error) else "it has a lone surrogate"
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        if "too large" in reason:
            raise TextError(
                f"stop pattern {text!r} is too large; shorten it, or lower what its repetitions count"
            ) from None
        raise TextError(f"stop pattern {text!r} is no regular expression ({reason}); correct it") from None
    if pattern.search(b"") is not None:
        raise TextError(f"stop pattern {text!r} matches the empty text; make it match at least one character")
    return pattern


def translated(text: str) -> str:
    """A pattern of Python's as RE2 writes it.

    Raises:
        TextError: it looks around, refers to a group, or repeats too often.
    """
    made: list[str] = []
    inside = False  # of a character class
    for token in _TOKEN.finditer(text):
        found, kind = token[0], token.lastgroup
        if kind in ("u", "U"):
            found = rf"\x{{{token[kind]}}}"
        elif kind == "class":
            name = token[kind]
            negated = "^" * (name.isupper() and not inside)
            found = _CLASSES[name] if inside else f"[{negated}{_CLASSES[name.lower()]}]"
        elif kind == "end" and not inside:
            found = r"\z"
        elif kind in ("back", "look") and not inside:
            raise TextError(
                f"stop pattern {text!r} has {found}, but patterns are searched in linear time, which knows neither "
                "lookaround, atomic groups nor references to groups; write it without them"
            )
        elif token["low"] is not None and not inside and (token["low"] or token["high"]):
            if any(count and int(count) > MOST_REPEATS for count in (token["low"], token["high"])):
                raise TextError(
                    f"stop pattern {text!r} is too large: it repeats more than {MOST_REPEATS} times; lower that"
                )
            found = f"{{{token['low'] or 0}{token['comma']}{token['high']}}}"
        elif found[0] == "[" and not inside:
            inside = True
        elif found[0] == "[" and inside:
            made.append(r"\[")  # never the beginning of a class of POSIX's
            found = found[1:]
            if found.endswith("]"):
                inside = False
        elif found == "]":
            inside = False
        made.append(found)
    if not text.isascii() and re.search(r"(?<!\\)(?:\\\\)*\\[bB]", text):
        raise TextError(
            f"stop pattern {text!r} has \\b beside letters that are not ASCII, which it does not know; leave it out"
        )
    return "".join(made)
