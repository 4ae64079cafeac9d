"""Structural tags: free text with parts that follow a grammar, as a grammar in llguidance's Lark.

Source: xgrammar's documentation, "Structural Tag Usage" (https://xgrammar.mlc.ai/docs/), whose JSON SGLang and vLLM
take: ``{"type": "structural_tag", "format": {...}}``, or in the older shape ``{"structures": [{"begin", "schema",
"end"}], "triggers": [...]}``. What has a token in the tokenizer is spelled as that token; a trigger or an end of free
text may also be spelled by ordinary tokens. Once the token comes that a tag begins with, the tag follows, also where
its trigger is longer than that token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from makeready.engine.errors import RequestError
from makeready.engine.fields import shown
from makeready.engine.text.formats.bare import Arguments, in_order
from makeready.engine.text.formats.rules import Tool
from makeready.engine.text.lark import Behind, Lark, Markers, containing, symbol

_SHAPES = 'write {"type": "structural_tag", "format": {...}}, or structures and triggers'


def structural_tag(value: Mapping[str, Any], markers: Markers) -> str:
    """The grammar of a structural tag.

    Raises:
        RequestError: it is none, or has what cannot be expressed; names the format and the field.
    """
    return _Tags(_form_of(value), markers).source


def _form_of(value: Mapping[str, Any]) -> Any:
    """The format of either shape."""
    if value.get("type", "structural_tag") != "structural_tag":
        raise RequestError(f"structural_tag has the type {shown(value['type'])}; {_SHAPES}")
    if "format" in value:
        return value["format"]
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise RequestError(f"structural_tag has no format; {_SHAPES}")
    tags = [
        {
            "type": "tag",
            "begin": _field(item, "begin", str),
            "content": {"type": "json_schema", "json_schema": _schema_of(item)},
            "end": _field(item, "end", str),
        }
        for item in structures
    ]
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _schema_of(item: Any) -> Any:
    """The older shape's schema may be its text."""
    schema = item.get("schema", {})
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise RequestError(f"structural_tag: schema={shown(schema)} is no JSON; correct it") from None


class _Tags:
    """One structural tag as a grammar."""

    def __init__(self, form: Any, markers: Markers) -> None:
        self._markers = markers
        self._lark = Lark(markers, _markers_of(form, self.token), both=True)
        self.source = self._lark.source(self._whole(form, ()))

    def _whole(self, form: Any, ends: Sequence[str | int]) -> str:
        """A format and what ends it: one of these markers, or nothing where the text ends with it."""
        name = _type_of(form)
        closing = self._any(ends)
        if name in _OPEN:
            return _OPEN[name](self, form, ends)
        if name == "sequence":
            *before, last = _field(form, "elements", list) or [{"type": "const_string", "value": ""}]
            return " ".join((*(self._closed(each) for each in before), self._whole(last, ends)))
        if name == "or":
            return self._or([self._whole(each, ends) for each in _field(form, "elements", list)])
        if name == "optional":
            return self._or((self._whole(_field(form, "content", dict), ends), closing))
        return f"{self._closed(form)} {closing}"

    def _closed(self, form: Any) -> str:
        """A format that shows its own end."""
        name = _type_of(form)
        if name in _CLOSED:
            return _CLOSED[name](self, form)
        if form.get("at_least_one") and form.get("stop_after_first"):
            return _OPEN[name](self, form, ())
        raise RequestError(
            f"structural_tag: nothing shows where {name} ends; let it stand last in a tag's content or in the whole"
        )

    def _or(self, choices: Sequence[str]) -> str:
        if not choices:
            raise RequestError("structural_tag: a list of tags or elements is empty; give some")
        return f"({' | '.join(choices)})"

    def _any(self, ends: Sequence[str | int]) -> str:
        return self._or([self._lark.text(end) for end in ends]) if ends else '""'

    def _const(self, form: Any) -> str:
        return self._lark.text(_field(form, "value", str))

    def _json(self, form: Any) -> str:
        schema = form.get("json_schema")
        if not isinstance(schema, Mapping | bool):
            raise RequestError(f"structural_tag: json_schema={shown(schema)} must be a JSON schema")
        style = form.get("style", "qwen_xml" if form["type"] == "qwen_xml_parameter" else "json")
        if form.get("any_order"):
            raise RequestError("structural_tag: any_order would not hold what is required; leave it out")
        if style == "json":
            return self._lark.json(schema)
        if style != "qwen_xml":
            raise RequestError(
                f"structural_tag: the style {shown(style)} is not known; write json or qwen_xml"
            )
        said, blank = (
            Arguments(Tool("json_schema", schema if isinstance(schema, Mapping) else {}), self._lark),
            "\n",
        )
        written = [
            f"{self._lark.text(f'<parameter={name}>{blank}')} {said.text(name, f'{blank}</parameter>{blank}')}"
            for name in said.names
        ]
        return in_order(said.names, written, self._lark)

    def _regex(self, form: Any) -> str:
        from llguidance import LLMatcher

        made = json.loads(LLMatcher.grammar_from_regex(_field(form, "pattern", str)))
        return self._lark.only(made["grammars"][0]["lark_grammar"].removeprefix("start: "))

    def _grammar(self, form: Any) -> str:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return self._lark.side(gbnf_to_lark(_field(form, "grammar", str)))
        except RequestError:
            raise
        except Exception as error:  # it raises no narrower one
            raise RequestError(
                f"structural_tag: grammar cannot be read: {str(error)[:200]}; correct it"
            ) from None

    def _repeated(self, form: Any) -> str:
        content, name = self._closed(_field(form, "content", dict)), form["type"]
        if name != "repeat":
            return f"({content}){_TIMES[name]}"
        least, most = _field(form, "min", int), _field(form, "max", int)
        if least < 0 or (most != -1 and most < least):
            raise RequestError(f"structural_tag: repeat from {least} to {most} is no range; correct it")
        return f"({content}){{{least},{'' if most == -1 else most}}}"

    def _choice(self, form: Any) -> str:
        return self._or([self._closed(each) for each in _field(form, "elements", list)])

    def _sequence(self, form: Any) -> str:
        return " ".join(self._closed(each) for each in _field(form, "elements", list)) or '""'

    def _tag(self, form: Any) -> str:
        return f"{self._lark.text(self._begin(form))} {self._tail(form)}"

    def _tail(self, form: Any) -> str:
        """A tag behind its beginning."""
        end = form.get("end", "")
        if isinstance(end, Mapping):
            ends: list[str | int] = [self.token(_field(end, "token", int | str))]
        else:
            ends = [end] if isinstance(end, str) else end
            if not isinstance(ends, list) or not all(isinstance(each, str) for each in ends):
                raise RequestError(f"structural_tag: end={shown(end)} must be a text, several, or a token")
        content = _field(form, "content", dict)
        if "" in ends or not ends:
            return self._closed(content)
        return self._lark.rule(self._whole(content, ends))

    def _begin(self, form: Any) -> str | int:
        begin = _field(form, "begin", str | dict)
        return begin if isinstance(begin, str) else self.token(_field(begin, "token", int | str))

    def _separated(self, form: Any) -> str:
        tag = self._lark.rule(self._or([self._tag(each) for each in _field(form, "tags", list)]))
        more = (
            ""
            if form.get("stop_after_first")
            else f"({self._lark.text(_field(form, 'separator', str))} {tag})*"
        )
        return f"({tag} {more}){'' if form.get('at_least_one') else '?'}"

    def _token(self, form: Any) -> str:
        return symbol([self.token(_field(form, "token", int | str))])

    def _exclude_token(self, form: Any, ends: Sequence[str | int] = ()) -> str:
        out = {self.token(each) for each in form.get("exclude_tokens", ())} | self._markers.ends
        out |= {end for end in ends if isinstance(end, int)}
        return symbol(sorted(out), without=True) if out else "<[*]>"

    def _any_tokens(self, form: Any, ends: Sequence[str | int]) -> str:
        if any(isinstance(end, str) for end in ends):
            raise RequestError("structural_tag: any_tokens ends with a token; give the tag's end as one")
        most = form.get("max_tokens")
        times = "*" if most is None else f"{{0,{_field(form, 'max_tokens', int)}}}"
        return f"{self._exclude_token(form, ends)}{times} {self._any(ends)}"

    def _any_text(self, form: Any, ends: Sequence[str | int]) -> str:
        if form.get("max_tokens") is not None:
            raise RequestError("structural_tag: max_tokens of any_text cannot be counted; write max_chars")
        barred = _barred(form)
        if form.get("max_chars") is None:
            return self._dispatched({}, form, ends)
        body = f"/(?s:.){{0,{_field(form, 'max_chars', int)}}}/"
        if not ends:
            return self._lark.only(body, barred)
        return self._or([self._lark.up_to(end, body, barred) for end in ends])

    def _triggered(self, form: Any, ends: Sequence[str | int]) -> str:
        tags, once = _field(form, "tags", list), bool(form.get("stop_after_first"))
        if form.get("at_least_one"):
            first = self._lark.rule(self._or([self._tag(each) for each in tags]))
            return f"{first} {self._any(ends) if once else self._dispatched(self._behind(form), form, ends)}"
        return self._dispatched(self._behind(form), form, ends, once=once)

    def _dispatch(self, form: Any, ends: Sequence[str | int]) -> str:
        once, behind = form.get("loop") is False, dict[str | int, str]()
        for rule in _field(form, "rules", list):
            if not isinstance(rule, list) or len(rule) != 2:
                raise RequestError(f"structural_tag: {shown(rule)} of rules must be a pattern and a format")
            behind[self._trigger(rule[0], form)] = (
                self._whole(rule[1], ends) if once else self._closed(rule[1])
            )
        return self._dispatched(behind, form, ends, once=once, ended=once)

    def _dispatched(
        self, behind: Behind, form: Any, ends: Sequence[str | int], *, once: bool = False, ended: bool = False
    ) -> str:
        """Free text with what triggers bring, each time or ``once``; ``ended``: they bring the end as well."""
        barred, last = _barred(form), dict.fromkeys(ends, "")
        if once:
            closing = "" if ended else self._any(ends)
            first = {marker: f"{rest} {closing}" for marker, rest in behind.items()}
            return self._lark.until({**first, **last}, barred=barred, optional=not ends)
        return self._lark.until(last, behind, barred) if ends else self._lark.free(behind, barred)

    def _behind(self, form: Any) -> dict[str | int, str]:
        """Of each trigger, what follows it: what its tags have beyond it."""
        field = "trigger_tokens" if form["type"] == "token_triggered_tags" else "triggers"
        triggers = [self._trigger(each, form) for each in _field(form, field, list)]
        found: dict[str | int, list[str]] = {}
        for tag in _field(form, "tags", list):
            begin = self._begin(tag)
            fits = [each for each in triggers if _begins(begin, each)]
            if len(fits) != 1:
                raise RequestError(
                    f"structural_tag: {len(fits)} triggers are the beginning of {shown(begin)}; it takes exactly one"
                )
            marker, rest = self._cut(begin, fits[0])
            found.setdefault(marker, []).append(f"{self._lark.text(rest)} {self._tail(tag)}")
        return {marker: self._lark.rule(self._or(rests)) for marker, rests in found.items()}

    def _cut(self, begin: str | int, trigger: str | int) -> tuple[str | int, str]:
        """A beginning behind its trigger, which is longer where it would cut a token in two."""
        if isinstance(begin, int) or isinstance(trigger, int):
            return begin, ""
        end = 0
        for part in self._markers.parts(begin):
            size = len(part if isinstance(part, str) else self._markers.texts[part])
            if end + size > len(trigger):
                end = end + size if isinstance(part, int) and end < len(trigger) else max(end, len(trigger))
                break
            end += size
        return begin[:end], begin[end:]

    def _trigger(self, said: Any, form: Any) -> str | int:
        if form["type"].startswith("token"):
            return self.token(said)
        if not isinstance(said, str) or not said:
            raise RequestError(f"structural_tag: a trigger is a text, not {shown(said)}")
        return said

    def token(self, said: Any) -> int:
        """The id of a token that is named by its id or text."""
        found = said if isinstance(said, int) and not isinstance(said, bool) else None
        if isinstance(said, str):
            found = self._markers.id_of(said)
        if found is None:
            raise RequestError(
                f"structural_tag: the tokenizer has no token {shown(said)}; write a text instead"
            )
        return found


def _type_of(form: Any) -> str:
    name = str(form.get("type")) if isinstance(form, Mapping) else ""
    if name not in _OPEN and name not in _CLOSED and name not in ("or", "optional", "sequence"):
        known = sorted({*_OPEN, *_CLOSED})
        raise RequestError(
            f"structural_tag: there is no format {shown(form)[:80]}; types are {', '.join(known)}"
        )
    return name


def _field(form: Any, name: str, kind: Any) -> Any:
    value = form.get(name) if isinstance(form, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(
            f"structural_tag: {name}={shown(value)} of {shown(form)[:80]} is wrong or missing; correct it"
        )
    return value


def _barred(form: Any) -> tuple[str, ...]:
    """Patterns of texts that may not come: those with one of ``excludes``."""
    texts = form.get("excludes") or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(each, str) and each for each in texts):
        raise RequestError(f"structural_tag: excludes={shown(texts)} must be a list of texts")
    return (containing(texts),) if texts else ()


def _begins(begin: str | int, trigger: str | int) -> bool:
    if isinstance(begin, str) and isinstance(trigger, str):
        return begin.startswith(trigger)
    return begin == trigger


def _markers_of(form: Any, token: Callable[[Any], int]) -> Iterator[str | int]:
    """Every marker of a format: free text has none of them as tokens."""
    if isinstance(form, list):
        for each in form:
            yield from _markers_of(each, token)
    if not isinstance(form, Mapping):
        return
    for name in ("begin", "end", "triggers", "excludes"):
        said = form.get(name)
        for each in said if isinstance(said, list) else [said]:
            if isinstance(each, str):
                yield each
    tokens = [form["token"]] if form.get("type") == "token" and "token" in form else []
    for name in ("trigger_tokens", "exclude_tokens"):
        tokens += form[name] if isinstance(form.get(name), list) else []
    yield from map(token, tokens)
    for name in ("format", "content", "elements", "tags", "begin", "end"):
        yield from _markers_of(form.get(name), token)
    for rule in form["rules"] if isinstance(form.get("rules"), list) else ():
        pattern = rule[0] if isinstance(rule, list) and rule else None
        if pattern is not None:
            yield token(pattern) if form.get("type") == "token_dispatch" else str(pattern)
        yield from _markers_of(rule, token)


_OPEN: Mapping[str, Callable[[_Tags, Any, Sequence[str | int]], str]] = {
    "any_text": _Tags._any_text,
    "any_tokens": _Tags._any_tokens,
    "triggered_tags": _Tags._triggered,
    "token_triggered_tags": _Tags._triggered,
    "dispatch": _Tags._dispatch,
    "token_dispatch": _Tags._dispatch,
}
_CLOSED: Mapping[str, Callable[[_Tags, Any], str]] = {
    "const_string": _Tags._const,
    "json_schema": _Tags._json,
    "qwen_xml_parameter": _Tags._json,
    "grammar": _Tags._grammar,
    "regex": _Tags._regex,
    "sequence": _Tags._sequence,
    "or": _Tags._choice,
    "optional": _Tags._repeated,
    "plus": _Tags._repeated,
    "star": _Tags._repeated,
    "repeat": _Tags._repeated,
    "tag": _Tags._tag,
    "tags_with_separator": _Tags._separated,
    "token": _Tags._token,
    "exclude_token": _Tags._exclude_token,
}
_TIMES = {"optional": "?", "plus": "+", "star": "*"}
