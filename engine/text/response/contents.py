"""What stands between the delimiters of a response template, as a value: its content parsers and transforms."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from makeready.engine.text.formats.cast import json_of
from makeready.engine.text.parts import TextError
from makeready.engine.text.patterns import translated

if TYPE_CHECKING:
    import re2

TEXTS = ("text", "int", "float", "bool")  # whose value is what was written
_PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
_KEY = re.compile(r"([{,]\s*)(\w+)(\s*:)")
_ARGUMENTS = {
    **{name: {"strip"} for name in TEXTS},
    "json": {"strip", "unquoted_keys", "string_delims", "allow_non_json"},
    "xml-inline": {"tag_pattern", "value_parser", "merge_duplicates"},
    "kv-lines": {"strip", "line_sep", "kv_sep", "value_parser"},
}
MOST_BYTES = 2**20  # of the program of a pattern of tags


class UnreadError(ValueError):
    """A text is nothing that its field may hold."""


def check_content(name: Any, arguments: Any, where: str) -> None:
    """Whether there is such a parser, with such arguments.

    Raises:
        TextError: naming what there is not.
    """
    if not isinstance(name, str) or name not in _ARGUMENTS:
        raise TextError(f"{where}: there is no content parser {name!r}; it is one of {', '.join(_ARGUMENTS)}")
    if not isinstance(arguments, Mapping):
        raise TextError(f"{where}: content_args must be an object, not {arguments!r:.80}")
    if unknown := arguments.keys() - _ARGUMENTS[name]:
        raise TextError(f"{where}: {name} takes no {min(unknown)!r:.80}; leave it out")
    if name == "xml-inline":
        if not isinstance(arguments.get("tag_pattern"), str):
            raise TextError(f"{where}: xml-inline needs a tag_pattern with the groups key and value")
        _tags(arguments["tag_pattern"])
    inner = arguments.get("value_parser")
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise TextError(f"{where}: value_parser must be an object with name and args")
        check_content(inner.get("name", "text"), inner.get("args", {}), where)


def read_content(text: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """A text as a value.

    Raises:
        UnreadError: it is none.
    """
    return _PARSERS[name](text, arguments)


def check_transform(transform: Any, where: str) -> None:
    """Raise :class:`TextError` where a text is neither a placeholder nor without any."""
    for each in _strings(transform):
        if _PLACEHOLDER.search(each) and not _PLACEHOLDER.fullmatch(each):
            raise TextError(f"{where}: {each!r:.80} mixes a placeholder with text; write one of both")


def transformed(transform: Any, scope: Mapping[str, Any]) -> Any:
    """A value made from others: each text that is a placeholder is the value of its name.

    Raises:
        UnreadError: there is no such value.
    """
    if isinstance(transform, Mapping):
        return {key: transformed(value, scope) for key, value in transform.items()}
    if isinstance(transform, list):
        return [transformed(value, scope) for value in transform]
    place = _PLACEHOLDER.fullmatch(transform) if isinstance(transform, str) else None
    if place is None:
        return transform
    value: Any = scope
    for key in place[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UnreadError(f"there is no {place[1]}")
        value = value[key]
    return value


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return [text for each in inner for text in _strings(each)]
    return [value] if isinstance(value, str) else []


def _text(text: str, arguments: Mapping[str, Any]) -> str:
    return text.strip() if arguments.get("strip", True) else text


def _number(kind: Callable[[str], Any]) -> Callable[[str, Mapping[str, Any]], Any]:
    def read(text: str, arguments: Mapping[str, Any]) -> Any:
        try:
            return kind(text.strip())
        except ValueError as error:
            raise UnreadError(str(error)) from None

    return read


def _json(text: str, arguments: Mapping[str, Any]) -> Any:
    written = _as_json(text, arguments.get("string_delims", ()), bool(arguments.get("unquoted_keys")))
    made = json_of(written.strip())
    if made is None:
        if arguments.get("allow_non_json"):
            return _text(text, arguments)
        raise UnreadError("it is no JSON")
    try:
        return json.loads(made)
    except (ValueError, RecursionError) as error:
        raise UnreadError(str(error)) from None


def _as_json(text: str, delimiters: Any, unquoted: bool) -> str:
    """A text whose strings have delimiters of their own, and whose keys no quotes, as JSON."""
    if not delimiters and not unquoted:
        return text
    strings = [re.escape(begin) + "(.*?)" + re.escape(end) for begin, end in delimiters]
    parts, at = list[str](), 0
    plain: Callable[[str], str] = (lambda part: _KEY.sub(r'\1"\2"\3', part)) if unquoted else str
    for found in re.finditer("|".join((*strings, r'"(?:[^"\\]|\\.)*"')), text, re.DOTALL):
        inner = next((group for group in found.groups() if group is not None), None)
        # A key may stand right before a string, so the text between two is looked through as a whole.
        parts += [plain(text[at : found.start()]), found[0] if inner is None else json.dumps(inner)]
        at = found.end()
    return "".join((*parts, plain(text[at:])))


def _tagged(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    pattern, raw = _tags(arguments["tag_pattern"]), text.encode()
    for found in pattern.finditer(raw):
        key = _group(found, "key")
        value = _inner(_group(found, "value") if "value" in pattern.groupindex else "", arguments)
        if key in made and arguments.get("merge_duplicates"):
            several = made[key] if isinstance(made[key], list) else [made[key]]
            made[key] = [*several, value]
        else:
            made[key] = value
    return made


def _group(found: Any, name: str) -> str:
    return (found.group(name) or b"").decode()


def _lines(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for line in text.split(arguments.get("line_sep", "\n")):
        key, separator, value = _text(line, arguments).partition(arguments.get("kv_sep", ":"))
        if separator:
            made[_text(key, arguments)] = _inner(_text(value, arguments), arguments)
    return made


def _inner(text: str, arguments: Mapping[str, Any]) -> Any:
    parser = arguments.get("value_parser")
    return text if parser is None else read_content(text, parser.get("name", "text"), parser.get("args", {}))


@lru_cache(maxsize=64)
def _tags(source: str) -> re2._Regexp:
    """A pattern of tags, by RE2: what is between delimiters may be long, and whoever waits is a server.

    Raises:
        TextError: it is broken, or has what RE2 has not.
    """
    import re2

    options = re2.Options()
    options.max_mem, options.log_errors = MOST_BYTES, False
    try:
        pattern = re2.compile(f"(?s){translated(source)}", options)
    except (re2.error, TextError) as error:
        raise TextError(f"tag_pattern {source!r} is no regular expression ({error}); correct it") from None
    if "key" not in pattern.groupindex or pattern.search(b"") is not None:
        raise TextError(f"tag_pattern {source!r} must have a group key, and match something; correct it")
    return pattern


_PARSERS: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "text": _text,
    "int": _number(int),
    "float": _number(float),
    "bool": lambda text, arguments: text.strip().lower() in ("true", "1"),
    "json": _json,
    "xml-inline": _tagged,
    "kv-lines": _lines,
}
