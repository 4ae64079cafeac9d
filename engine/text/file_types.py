"""The types of what tokenizer files say, checked in one place, and what the tokenizer library cannot take.

Files come from models' folders. A field of another type than its meaning would surface anywhere, as a Python
error of no use; and some contents make the Rust library panic, which is no `Exception` and would end a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from makeready.engine.text.parts import TextError


@contextmanager
def library_errors(sentence: str) -> Iterator[None]:
    """Turn whatever the tokenizer library raises, panics included, into `TextError(sentence)`.

    Args:
        sentence: what failed and the remedy; `{error}` in it is replaced.
    """
    try:
        yield
    except (TextError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TextError(sentence.format(error=str(error)[:300] or type(error).__name__)) from None


def check_tokenizer_config(value: Mapping[str, Any], source: str) -> None:
    """Check the fields of tokenizer_config.json or special_tokens_map.json that are read.

    Raises:
        TextError: naming the file and the field.
    """
    for name, (fits, wanted) in _FIELDS.items():
        if value.get(name) is not None and not fits(value[name]):
            raise _wrong(source, name, wanted, value[name])
    for name, token in value.items():
        if name.endswith("_token") and isinstance(token, str | dict) and not _is_token(token):
            raise _wrong(source, name, "a text or an object with content", token)


def check_added_tokens(value: Mapping[str, Any], source: str) -> None:
    """Check added_tokens.json: ids by text.

    Raises:
        TextError: naming the file and the token.
    """
    for text, token in value.items():
        if not _is_text(text) or not _is_id(token):
            raise _wrong(source, text, "an id of at least 0", token)


def _wrong(source: str, name: str, wanted: str, value: Any) -> TextError:
    return TextError(
        f"{source}: {name!r} must be {wanted}, not {value!r:.80}; correct the file or download it again"
    )


def _is_text(value: Any) -> bool:
    """Text that UTF-8 can write; JSON's escapes can make halves of a character."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_token(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and _is_text(value.get("content")))


def _are_tokens(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [None]
    return all(_is_token(token) for token in values)


def _are_numbered(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    numbered = all(key.isascii() and key.isdigit() and len(key) < 10 for key in value)
    return numbered and all(_is_token(token) for token in value.values())


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and _is_text(one.get("name")) and _is_text(one.get("template"))
            for one in value
        )
    return _is_text(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_TOKENS = (_are_tokens, "a list of tokens: texts, or objects with content")
_FLAG = (_is_flag, "true or false")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer_class": (_is_text, "a text"),
    "added_tokens_decoder": (_are_numbered, "an object of tokens by their ids"),
    "extra_special_tokens": _TOKENS,
    "additional_special_tokens": _TOKENS,
    "chat_template": (_are_templates, "a text, or a list of objects with name and template"),
    "add_bos_token": _FLAG,
    "add_eos_token": _FLAG,
    "add_prefix_space": _FLAG,
    "legacy": _FLAG,
    "split_special_tokens": _FLAG,
    "clean_up_tokenization_spaces": _FLAG,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": _FLAG,
}
