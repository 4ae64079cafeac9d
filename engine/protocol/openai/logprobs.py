"""Log-probabilities in the two shapes of OpenAI's API.

A token that is half of a character, or a byte of no character, is written as the API writes it: its bytes as
``\\xf0\\x9f``, in the older shape behind ``bytes:``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from makeready.engine.output import Output, TokenLogprob
from makeready.engine.sequence import STOP
from makeready.engine.text.token_text import prompt_starts, starts, token_bytes
from makeready.engine.text.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # what the API writes for the probability 0, as JSON has no infinities


def chat_logprobs(output: Output, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}``; None where not asked."""
    if output.logprobs is None:
        return None
    return {"content": chat_entries(_of_text(output), tokenizer), "refusal": None}


def chat_entries(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """``{"token", "logprob", "bytes", "top_logprobs"}`` for each of an answer's tokens."""
    return [
        _entry(token.token_id, token.logprob, tokenizer)
        | {"top_logprobs": [_entry(i, value, tokenizer) for i, value in token.top]}
        for token in tokens
    ]


def completion_logprobs(
    output: Output,
    tokenizer: Tokenizer | None,
    *,
    echo: str = "",
    prompt: str | Sequence[int] = "",
    skip_special_tokens: bool = True,
) -> dict[str, Any] | None:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, a list each; None where not asked.

    The prompt's tokens come first where they were asked for; the first of all has null for its probabilities.

    Args:
        echo: what the answer's text begins with.
        prompt: what that was made from.
        skip_special_tokens: as the output was decoded.
    """
    if output.logprobs is None:
        return None
    before, after = output.input_logprobs or (), _of_text(output)
    places = _prompt_places(before, tokenizer, prompt, echo)
    if tokenizer is None:
        places += _without_texts(after, len("".join(token_text(t.token_id, None) for t in before)))
    else:
        answer = [token.token_id for token in after]
        places += [len(echo) + at for at in starts(tokenizer, answer, output.text, skip_special_tokens)]
    return _columns((*before, *after), places, echo + output.text, tokenizer)


class CompletionLogprobs:
    """The same piece by piece: pieces that are joined make the whole.

    A token is told once the place where it begins is in the text that was shown, since a stop may still cut it off.

    Args:
        echo, prompt, skip_special_tokens: as for :func:`completion_logprobs`.
        before: those of the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        echo: str,
        prompt: str | Sequence[int],
        before: Sequence[TokenLogprob],
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer, self._echo, self._skip = tokenizer, echo, skip_special_tokens
        self._before = list(before)
        self._places = _prompt_places(before, tokenizer, prompt, echo)
        self._waiting: list[TokenLogprob] = []
        self._shown = self._base = self._written = 0  # characters of text; of it, those before the window
        self._begins = ""  # of the text: what its first character is
        # Tokens since text and tokens were last at the same place, their text as far as it was shown, those told.
        self._window: list[int] = []
        self._text, self._told = "", 0

    def take(self, tokens: Sequence[TokenLogprob], text: str, final: str | None) -> dict[str, Any] | None:
        """More tokens and text; the columns of those that can be told, None for none.

        Args:
            final: the whole text, where there is no more.
        """
        self._waiting += tokens
        self._begins = self._begins or (self._echo + text)[:1]
        places = self._ready(tokens, text, final)
        told, self._waiting = self._waiting[: len(places)], self._waiting[len(places) :]
        places = self._places + places
        told, self._before, self._places = [*self._before, *told], [], []
        return _columns(told, places, self._begins, self._tokenizer) if told else None

    def _ready(self, tokens: Sequence[TokenLogprob], text: str, final: str | None) -> list[int]:
        """Places of the tokens that can be told."""
        tokenizer, start = self._tokenizer, len(self._echo)
        if tokenizer is None:
            made = _without_texts(tokens, self._written)
            self._written += sum(len(token_text(token.token_id, None)) for token in tokens)
            return made
        self._window += [token.token_id for token in tokens]
        self._text += text
        self._shown += len(text)
        if not self._base and final is None and not self._text.strip(" "):
            return []  # whether the first space is dropped shows with the first word
        skipped = tokenizer.special_ids if self._skip else frozenset()
        data = b"".join(token_bytes(tokenizer, t) or b"" for t in self._window if t not in skipped)
        decoded = data.decode(errors="replace")
        relative = starts(tokenizer, self._window, decoded if self._base else self._text, self._skip)
        places = [self._base + place for place in relative[self._told :]]
        if final is not None:
            return [start + min(place, len(final)) for place in places]
        ready = [place for place in places if place < self._shown]
        self._told += len(ready)
        dropped = not self._base and decoded[:1] == " " and self._text == decoded[1:]
        if self._told == len(self._window) and (dropped or self._text == decoded):
            self._base, self._window, self._text, self._told = self._shown, [], "", 0
        return [start + place for place in ready]


def _prompt_places(
    tokens: Sequence[TokenLogprob], tokenizer: Tokenizer | None, prompt: str | Sequence[int], echo: str
) -> list[int]:
    if tokenizer is None:
        return _without_texts(tokens, 0)
    ids = [token.token_id for token in tokens]
    if isinstance(prompt, str):
        return prompt_starts(tokenizer, ids, prompt) if ids else []
    return starts(tokenizer, ids, echo, skip_special_tokens=False)


def _without_texts(tokens: Sequence[TokenLogprob], place: int) -> list[int]:
    """Places in a text that would be made of the tokens' names."""
    places = []
    for token in tokens:
        places.append(place)
        place += len(token_text(token.token_id, None))
    return places


def _columns(
    tokens: Sequence[TokenLogprob], places: list[int], whole: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The four lists.

    Args:
        whole: the text, or its first character.
    """
    texts = [token_text(token.token_id, tokenizer) for token in tokens]
    if tokenizer is not None:
        # The space before the first word, which is not in the text, is not in the token either.
        texts = [
            text[1:] if place == 0 and text[:1] == " " and whole[:1] != " " else text
            for text, place in zip(texts, places, strict=True)
        ]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else _by_text({token.token_id: text}, token.top, tokenizer)
            for token, text in zip(tokens, texts, strict=True)
        ],
        "text_offset": places,
    }


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    r"""The text of one token inside a text; ``bytes:\xf0\x9f`` for half of a character.

    Without a tokenizer, or outside its vocabulary, ``token_id:7``, as some servers write it on demand.
    """
    text = _escaped(token, tokenizer)
    data = None if tokenizer is None else token_bytes(tokenizer, token)
    return text if data is None or data == text.encode() else f"bytes:{text}"


def _escaped(token: int, tokenizer: Tokenizer | None) -> str:
    """The same as chat answers have it."""
    data = None if tokenizer is None else token_bytes(tokenizer, token)
    return f"token_id:{token}" if data is None else data.decode(errors="backslashreplace")


def _by_text(
    chosen: dict[int, str], top: Iterable[tuple[int, float]], tokenizer: Tokenizer | None
) -> dict[str, float | None]:
    """Alternatives by their texts; of those that write the same text, later ones come by their bytes.

    Args:
        chosen: how the token that was chosen is written.
        top: token ids and log-probabilities, the most probable first.
    """
    made: dict[str, float | None] = {}
    for token, value in top:
        data = None if tokenizer is None else token_bytes(tokenizer, token)
        spelled = "".join(f"\\x{byte:02x}" for byte in data or b"")
        names = (chosen.get(token) or token_text(token, tokenizer), f"bytes:{spelled}")
        name = next((name for name in names if name not in made), f"token_id:{token}")
        made[name] = _finite(value)
    return made


def _entry(token: int, logprob: float | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = None if tokenizer is None else token_bytes(tokenizer, token)
    spelled = None if data is None else list(data)
    return {"token": _escaped(token, tokenizer), "logprob": _finite(logprob), "bytes": spelled}


def _of_text(output: Output) -> Sequence[TokenLogprob]:
    """All but the token that ended the text, which is no part of it."""
    tokens = output.logprobs or ()
    return tokens[:-1] if ends_with_id(output) else tokens


def ends_with_id(output: Output) -> bool:
    """Whether a token ended it, its last."""
    reason = output.meta_info["finish_reason"]
    return reason["type"] == STOP and isinstance(reason.get("matched"), int)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else IMPOSSIBLE
