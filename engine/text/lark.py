"""Grammars in the making, in llguidance's Lark, for a tokenizer whose markers may be tokens.

Source of the syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. A token that is spelled as
text is masked there, so whatever the tokenizer has a token for is spelled as that token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.text.tokenizer import Tokenizer

# Between two tokens of JSON: a space, or a line break and an indentation. Without a bound, models that may write
# nothing else write blanks until their limit.
BLANKS = r" |\n {0,40}"
ANY = "/(?s:.)*/"
MOST_OPTIONAL = (
    2_000  # properties of an object that may be missing: time grows with their square, 5 s for 5,000
)
Behind = Mapping["str | int", str]  # of a marker, or the id of a token, the expression of what follows it


class Markers:
    """The tokens of a tokenizer that stand for a text of their own: special and added ones.

    Args:
        tokenizer: None where there is none yet: nothing is a token then.
        ends: ids that end an answer; no grammar speaks of them.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, ends: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset(ends if tokenizer is None else (*ends, *tokenizer.eos_ids))
        added = {} if tokenizer is None else tokenizer.backend.get_added_tokens_decoder()
        self.ids = {token.content: i for i, token in added.items() if token.content and i not in self.ends}
        longest = sorted(self.ids, key=len, reverse=True)
        self.texts = {i: text for text, i in self.ids.items()}
        self._any = re.compile("|".join(map(re.escape, longest))) if longest else None

    def parts(self, text: str) -> list[str | int]:
        """A text as the tokenizer cuts it: texts, and ids of tokens."""
        if self._any is None:
            return [text] if text else []
        made: list[str | int] = []
        at = 0
        for found in self._any.finditer(text):
            made += [text[at : found.start()]] if found.start() > at else []
            made.append(self.ids[found[0]])
            at = found.end()
        return made + ([text[at:]] if at < len(text) else [])

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry; 0 for any where there is no tokenizer yet."""
        return 0 if self._tokenizer is None else self._tokenizer.token_to_id(token)


class Lark:
    """Rules, one after the other; what returns a text returns an expression that other rules may have.

    Args:
        markers: of the tokenizer.
        apart: markers that mean something: free text may hold all other tokens, and not these.
        both: ordinary tokens that spell a marker are that marker, too.
    """

    def __init__(self, markers: Markers, apart: Iterable[str | int] = (), *, both: bool = False) -> None:
        self.markers, self._both = markers, both
        self._rules: list[str] = []
        self._sides: list[dict[str, Any]] = []
        self._terminals: dict[str, str] = {}
        meant = {part for each in apart for part in self._parts(each)}  # markers' texts are in it, too
        others = sorted(set(markers.ids.values()) - meant)
        self._other = [symbol(others)] if others else []

    def source(self, start: str) -> str:
        """The grammar, which begins with an expression."""
        lark = "\n".join((f"start: {start}", *self._rules))
        if not self._sides:
            return lark
        return json.dumps({"grammars": [{"name": "whole", "lark_grammar": lark}, *self._sides]})

    def rule(self, body: str, attributes: str = "") -> str:
        """A rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """A terminal; returns its name."""
        if body not in self._terminals:
            self._terminals[body] = name = f"T{len(self._rules)}"
            self._rules.append(f"{name}: {body}")
        return self._terminals[body]

    def json(self, schema: Any) -> str:
        """JSON of a schema."""
        schema = schema if isinstance(schema, Mapping) else {} if schema else {"enum": []}
        check_optional(schema)
        return self.rule(f"%json {json.dumps(with_blanks(schema))}")

    def side(self, lark: str) -> str:
        """A grammar with names of its own."""
        name = f"side{len(self._sides)}"
        self._sides.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def text(self, text: str | int) -> str:
        """This text, with tokens where the tokenizer has them; or the token of this id."""
        return " ".join(map(_spelled, self._parts(text))) or '""'

    def free(
        self, behind: Behind | None = None, barred: Sequence[str] = (), first: Sequence[str] = ()
    ) -> str:
        """Free text.

        Args:
            behind: of markers in it, what has to follow.
            barred: patterns of texts that may not stand between two markers.
            first: the same for the text before the first marker.
        """
        pieces, text = self._pieces(behind or {}, barred), f"{self._plain(barred)}?"
        whole = f"({' | '.join(pieces)})* {text}" if pieces else text
        if not first:
            return whole
        begun, none = self._pieces(behind or {}, (*barred, *first)), f"{self._plain((*barred, *first))}?"
        return f"(({' | '.join(begun)}) {whole} | {none})" if begun else none

    def until(
        self,
        ends: Behind,
        behind: Behind | None = None,
        barred: Sequence[str] = (),
        *,
        optional: bool = False,
    ) -> str:
        """Free text up to the first of some markers, that marker and what follows it; see :meth:`free`.

        Args:
            optional: or without any.
        """
        pieces, last = self._pieces(behind or {}, barred), self._cases(ends, barred)
        last += [f"{self._plain(barred)}?"] if optional else []
        before = f"({' | '.join(pieces)})* " if pieces else ""
        return f"{before}({' | '.join(last)})"

    def _pieces(self, behind: Behind, barred: Sequence[str]) -> list[str]:
        """Pieces of free text: text is never next to text, so that what is barred cannot be cut in two."""
        return [*(f"{self._plain(barred)}? {each}" for each in self._other), *self._cases(behind, barred)]

    def _plain(self, barred: Sequence[str]) -> str:
        return self.terminal(_without("/(?s:.)+/", barred))

    def lazy(self, pattern: str) -> str:
        """Text of a pattern, which ends as soon as it may."""
        return self.rule(f"/{pattern}/", "[lazy]")

    def only(self, body: str, barred: Sequence[str] = ()) -> str:
        """Text of a pattern, without any token."""
        return self.terminal(_without(body, barred))

    def up_to(self, end: str | int, body: str = ANY, barred: Sequence[str] = ()) -> str:
        """Text of a pattern without any token, and what ends it the first time that it stands there."""
        return f"({' | '.join(self._cases({end: ''}, barred, body))})"

    def _cases(self, behind: Behind, barred: Sequence[str], body: str = ANY) -> list[str]:
        """Text up to a marker, the marker, and what follows it; for each."""
        cases: list[str] = []
        for marker, what in behind.items():
            before, parts = self.terminal(_without(body, barred)), self._parts(marker)
            at = next((i for i, part in enumerate(parts) if isinstance(part, int)), 0)
            tail = " ".join((*map(_spelled, parts[at + 1 :]), what))
            if isinstance(parts[at], int):  # a token, maybe behind text that has to be there
                text = self.terminal(f"{before} {_spelled(parts[0])}") if at else before
                cases.append(f"{text} {_spelled(parts[at])} {tail}")
            text = "".join(
                part if isinstance(part, str) else self.markers.texts.get(part, "")
                for part in parts[: at + 1]
            )
            if isinstance(parts[at], str) or (self._both and text):
                # Lazy: it ends the first time that the marker stands there.
                cases.append(f"{self.rule(f'{before} {_spelled(text)}', '[lazy]')} {tail}")
        return cases

    def _parts(self, marker: str | int) -> list[str | int]:
        return [marker] if isinstance(marker, int) else self.markers.parts(marker)


def with_blanks(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with :data:`BLANKS`, unless its own ``x-guidance`` says how its JSON is written."""
    own = schema.get("x-guidance")
    own = dict(own) if isinstance(own, Mapping) else {}
    flexible = own.get("whitespace_flexible") is not False
    return {**schema, "x-guidance": ({"whitespace_pattern": BLANKS} if flexible else {}) | own}


def check_optional(schema: Any) -> None:
    """Refuse schemas that take too long to compile.

    Raises:
        RequestError: an object has too many properties that may be missing.
    """
    if isinstance(schema, list):
        for each in schema:
            check_optional(each)
    if not isinstance(schema, Mapping):
        return
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping):
        optional = len(properties) - (len(required) if isinstance(required, list) else 0)
        if optional > MOST_OPTIONAL:
            raise RequestError(
                f"an object of the schema has {optional:,} properties that may be missing, at most {MOST_OPTIONAL:,} "
                "are read; require some or split it"
            )
    for each in schema.values():
        check_optional(each)


def _without(body: str, barred: Sequence[str]) -> str:
    """A terminal for texts of none of these patterns."""
    return " & ".join((body, *(f"~/{pattern}/" for pattern in barred)))


def containing(texts: Iterable[str]) -> str:
    """The pattern of texts in which one of these stands."""
    return f"(?s:.)*({'|'.join(map(escaped, texts))})(?s:.)*"


def escaped(text: str) -> str:
    """A text as a pattern between slashes has it."""
    return re.sub(r"[^\w ]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def symbol(ids: Sequence[int], *, without: bool = False) -> str:
    """A token of these ids, which are in order; ``without``: of all others."""
    ranges: list[list[int]] = []
    for token in ids:
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    said = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return f"<[{'^' if without else ''}{said}]>"


def _spelled(part: str | int) -> str:
    return f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
