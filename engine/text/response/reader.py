"""One answer, read by the response template of its checkpoint while it is written.

Content and reasoning come as they are written, a call when it is complete. What cannot be read as a call is content,
delimiters included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.message import CONTENT, REASONING, Event
from makeready.engine.text.formats.base import Calls, Format, Reasoning
from makeready.engine.text.formats.cast import cast
from makeready.engine.text.formats.rules import Tool
from makeready.engine.text.formats.scan import Call, Reading, Scan
from makeready.engine.text.formats.source import Source, Step, Token
from makeready.engine.text.lark import Lark
from makeready.engine.text.response.contents import UnreadError, read_content, transformed
from makeready.engine.text.response.pattern import Found, Pattern, Search
from makeready.engine.text.response.template import CALLS, ROLE, Field, ResponseTemplate
from makeready.engine.text.response.template import CONTENT as CONTENT_FIELD

NAME = "response_template"
_GAP = r"/\s{0,2}/"


def format_by(template: ResponseTemplate) -> Format:
    """The format of answers under a template."""
    whole = Calls(
        NAME,
        partial(_read, template),
        whole=True,
        message_rules=partial(_rules, template),
        opened=template.opened,
        reads_all_tokens=True,
    )
    thought = template.reasoning()
    return Format(
        None if thought is None else Reasoning(NAME, *thought.literals, ()),
        whole if CALLS in template.fields else None,
        whole,
    )


def _rules(
    template: ResponseTemplate, tools: Sequence[Tool], forced: bool, content: bool, opened: str, lark: Lark
) -> str:
    """A message whose content is ``@content``, maybe behind reasoning."""
    if forced or not content:
        raise RequestError(
            "calls that are forced or strict follow no grammar where a response_template says how they are written; "
            "leave tool_choice and strict out, or name a tool_call_parser"
        )
    thought, answer = template.reasoning(), template.fields.get(CONTENT_FIELD)
    first = "@content" if answer is None or answer is template.rest else None
    if first is None and answer is not None and answer.literals[0]:
        first = f"{lark.text(answer.literals[0])} @content"
    within = _open_field(template, opened)
    if within is not None and within is answer and within is not template.rest:
        return "@content"
    if first is None or not (
        within is template.rest or (within and within is thought and within.literals[1])
    ):
        raise RequestError(
            "the response_template begins answers in a way that no grammar goes on from; name a reasoning_parser"
        )
    if thought is None or not all(thought.literals):
        return first
    ends = f"{lark.until({thought.literals[1]: ''})} {lark.terminal(_GAP)} {first}"
    if within is thought:
        return ends
    return f"({lark.text(thought.literals[0])} {ends} | {first})"


def _open_field(template: ResponseTemplate, opened: str) -> Field | None:
    """The field that a prompt has opened."""
    reader = Reader(template, Scan(Reading(format_by(template)), Source(), lambda number, name: ""))
    reader.put(opened)
    return reader.field


def _read(template: ResponseTemplate, scan: Scan, opened: str) -> Step[None]:
    reader = Reader(template, scan)
    reader.put(opened)
    reader.forget()
    source = scan.source
    while head := (yield from source.peek()):
        text = source.take(len(head) if isinstance(head, Token) else 1 << 20)
        scan.accept()
        reader.put(str(text), hidden=isinstance(head, Token) and source.hides)
    reader.end()


class _Text:
    """Content or reasoning as it goes on, in one part or several."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._blanks = self._glue = ""
        self._begun, self._fresh, self._strip = False, True, True

    def begin(self, strip: bool, join: str) -> None:
        """A part begins here."""
        self._blanks, self._fresh, self._strip, self._glue = "", True, strip, join

    def forget(self) -> None:
        """What there was is no part of it."""
        self._begun = False

    def write(self, text: str) -> None:
        """More of it; white space waits for what it stands before, where it is to be dropped."""
        if self._fresh and self._strip:
            text = text.lstrip()
        if not text:
            return
        kept = text.rstrip() if self._strip else text
        if not kept:
            self._blanks += text
            return
        glue = self._glue if self._fresh and self._begun else ""
        self._tell(f"{glue}{self._blanks}{kept}")
        self._blanks, self._begun, self._fresh = text[len(kept) :], True, False


class Reader:
    """Goes from field to field.

    Args:
        scan: what it tells.

    Attributes:
        field: that is open; None for what is in none.
    """

    def __init__(self, template: ResponseTemplate, scan: Scan) -> None:
        self._template, self._scan = template, scan
        self._thought = template.reasoning() if scan.reading.format.reasoning else None
        self._content = _Text(lambda text: scan.tell(Event(CONTENT, text)))
        self._reasoning = _Text(lambda text: scan.tell(Event(REASONING, text)))
        self._text, self._base = "", 0  # what is not accounted for, and where in the answer it begins
        self._hidden: list[tuple[int, int]] = []  # what is not shown
        self._at = self._seen = 0  # up to where the answer is accounted for, and looked at
        self._empty = -1  # where a delimiter without text was taken
        self._outside = list[str]()  # what is in no field
        self._told = False  # anything of the answer
        self._goes_on = False  # content, since what stood in it was no call
        self._enter(template.rest, 0, None)

    def put(self, text: str, *, hidden: bool = False) -> None:
        """More of the answer; what is ``hidden`` is no part of a text that is shown."""
        if hidden:
            end = self._base + len(self._text)
            self._hidden.append((end, end + len(text)))
        self._text += text
        self._go_on(ended=False)

    def forget(self) -> None:
        """What there is so far was the prompt's: only the field that is open stays."""
        self._scan.events.clear()
        self._scan.calls, self._scan.open = 0, False
        self._outside.clear()
        self._told = False
        self._content.forget()
        self._reasoning.forget()

    def end(self) -> None:
        """The answer ends here."""
        self._go_on(ended=True)
        self._leave()
        outside = "".join(self._outside).strip()
        if outside and not self._told:
            self._content.write(outside)

    # The field that is open.

    def _enter(self, field: Field | None, at: int, found: Found | None) -> None:
        """Open a field, or go to what is in none, from a place on."""
        self.field, self._groups = field, {} if found is None else self._named(found)
        self._raw = "" if found is None else self._shown(found.start, found.end)  # as it is written
        self._body = list[str]()
        text = None if field is None else self._direct(field)
        if field is not None and text is not None and not (self._goes_on and text is self._content):
            text.begin(field.strip, field.join)
        self._goes_on = False
        self._at = self._seen = at
        self._searches = [(each, opens, Search(pattern, at)) for each, opens, pattern in self._watched()]
        self._drop()

    def _watched(self) -> list[tuple[Field, bool, Pattern]]:
        rest, field = self._template.rest, self.field
        if field is not None and field is not rest:
            return [] if field.closing is None else [(field, False, field.closing)]
        watched = [
            (each, True, each.opening) for each in self._template.fields.values() if each.opening is not None
        ]
        if rest is not None and rest.closing is not None:
            watched.append((rest, False, rest.closing))
        return watched

    def _direct(self, field: Field) -> _Text | None:
        """Where a field's text goes as it comes; None for one that is read at its end."""
        if field is self._thought:
            return self._reasoning
        return self._content if field.name == CONTENT_FIELD else None

    def _write(self, end: int) -> None:
        """What stands up to here is of the field that is open."""
        if end <= self._at:
            return
        field, shown = self.field, self._shown(self._at, end)
        text = None if field is None else self._direct(field)
        if field is None:
            self._outside.append(shown)
        elif text is not None:
            if shown:
                self._told = True
            text.write(shown)
        else:
            self._body.append(self._text[self._at - self._base : end - self._base])
            self._raw += shown
        self._at = end
        self._drop()

    def _leave(self, found: Found | None = None) -> None:
        """The field that is open ends here, with the delimiter that was found."""
        field = self.field
        if field is None or self._direct(field) is not None or field.name == ROLE:
            return
        body = "".join(self._body)
        if not self._raw and not body:
            return
        self._told = True
        if field.name == CALLS and self._scan.reading.format.calls is not None:
            groups = self._groups | ({} if found is None else self._named(found))
            try:
                calls = [_call(each) for each in _listed(_value(field, body, groups))]
            except UnreadError:
                calls = []
            if calls:
                for name, arguments in calls:
                    call = Call(self._scan, name)
                    call.write(self._arguments(name, arguments))
                    call.finish()
                self._content.begin(strip=True, join="\n")
                return
        self._content.write(self._raw + ("" if found is None else self._shown(found.start, found.end)))
        self._goes_on = True

    def _arguments(self, name: str, arguments: Any) -> str:
        """The JSON of a call's arguments; texts become what the tool's schema has them be."""
        if isinstance(arguments, str):
            return arguments

        def written(key: str, value: Any) -> str:
            if isinstance(value, list):
                return f"[{', '.join(written(key, each) for each in value)}]"
            types = self._scan.tools.types(name, key)
            if isinstance(value, str) and types:
                return cast(value, types)
            return json.dumps(value, ensure_ascii=False)

        parts = [
            f"{json.dumps(key, ensure_ascii=False)}: {written(key, value)}"
            for key, value in arguments.items()
        ]
        return f"{{{', '.join(parts)}}}"

    # The text.

    def _go_on(self, *, ended: bool) -> None:
        while True:
            found = self._found() or self._look(ended=ended)
            if found is None:
                break
            field, opens, match = found
            if match.start == match.end and self._empty == match.start:
                # The same again: whatever comes next is text.
                if match.end >= self._base + len(self._text):
                    break
                self._write(match.end + 1)
                self._empty = -1
                self._restart(self._at)
                continue
            self._empty = match.start if match.start == match.end else -1
            self._write(match.start)
            self._leave(None if opens else match)
            self._enter(field if opens else self._template.rest, match.end, match if opens else None)
        end = self._base + len(self._text)
        self._write(end if ended else min([end, *(search.undecided for _, _, search in self._searches)]))

    def _restart(self, at: int) -> None:
        self._seen = at
        self._searches = [(each, opens, Search(pattern, at)) for each, opens, pattern in self._watched()]

    def _look(self, *, ended: bool) -> tuple[Field, bool, Found] | None:
        """Look at further text until a delimiter is sure."""
        end = self._base + len(self._text)
        while self._seen < end:
            if all(search.idle for _, _, search in self._searches):
                text, at = self._text, self._seen - self._base
                self._seen = self._base + min(
                    (search.pattern.next(text, at) for _, _, search in self._searches), default=len(text)
                )
                for _, _, search in self._searches:
                    search.skip(self._seen)
                if self._seen == end:
                    break
            char = self._text[self._seen - self._base]
            for _, _, search in self._searches:
                if not search.final:
                    search.take(char)
            self._seen += 1
            if (found := self._found()) is not None:
                return found
        if ended:
            for _, _, search in self._searches:
                if not search.final:
                    search.end()
            return self._found()
        return None

    def _found(self) -> tuple[Field, bool, Found] | None:
        """The delimiter that comes first, the longest of several, once nothing can come before it."""
        best = min(
            (
                (found.start, -(found.end - found.start), not opens, field.name, field, found)
                for field, opens, search in self._searches
                if search.final and (found := search.found) is not None
            ),
            key=lambda each: each[:4],
            default=None,
        )
        if best is None:
            return None
        if any(not search.final and search.undecided <= best[0] for _, _, search in self._searches):
            return None
        return best[4], not best[2], best[5]

    def _shown(self, begin: int, end: int) -> str:
        """The text between two places without what is hidden."""
        parts, at = list[str](), begin
        for first, last in self._hidden:
            if first < end and last > begin:
                parts.append(self._text[at - self._base : max(first, begin) - self._base])
                at = min(last, end)
        return "".join((*parts, self._text[at - self._base : end - self._base]))

    def _named(self, found: Found) -> dict[str, str]:
        base = self._base
        return {name: self._text[first - base : last - base] for name, (first, last) in found.groups.items()}

    def _drop(self) -> None:
        """Forget the text that is accounted for."""
        self._text, self._base = self._text[self._at - self._base :], self._at
        self._hidden = [each for each in self._hidden if each[1] > self._at]


def _value(field: Field, body: str, groups: Mapping[str, str]) -> Any:
    value = read_content(body, field.content, field.arguments)
    if field.transform is None:
        return value
    if not field.each:
        return transformed(field.transform, {**groups, "content": value})
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise UnreadError("it is no list of objects")
    return [transformed(field.transform, {**groups, **each}) for each in value]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _call(value: Any) -> tuple[str, Any]:
    """Name and arguments of a call, as messages have it; arguments are an object, or its JSON."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise UnreadError("it has no name")
    arguments = function.get("arguments")
    if arguments is None:
        return name, {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, Mapping):
            return name, arguments
    if not isinstance(arguments, Mapping):
        raise UnreadError("its arguments are no object")
    return name, arguments
