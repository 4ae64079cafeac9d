"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from makeready.engine.request import STOP, Output, TokenLogprob
from makeready.engine.text.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # what the API writes for the probability 0, as JSON has no infinities


def chat_logprobs(output: Output, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}``; None where not asked."""
    if output.logprobs is None:
        return None
    content = [
        _entry(token.token_id, token.logprob, tokenizer)
        | {"top_logprobs": [_entry(i, value, tokenizer) for i, value in token.top]}
        for token in _of_text(output)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(output: Output, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}``, a list each; None where not asked.

    The prompt's tokens come first where they were asked for; the first of all has null for its probabilities.
    """
    if output.logprobs is None:
        return None
    tokens = (*(output.input_logprobs or ()), *_of_text(output))
    texts = [token_text(token.token_id, tokenizer) for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {token_text(i, tokenizer): _finite(value) for i, value in token.top}
            for token in tokens
        ],
        "text_offset": [0, *itertools.accumulate(map(len, texts))][: len(texts)],
    }


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """The text of one token inside a text; half of a character is a replacement character.

    Without a tokenizer, ``token_id:7``, as some servers write it on demand.
    """
    if tokenizer is None:
        return f"token_id:{token}"
    text = tokenizer.decode([token], skip_special_tokens=False)
    # Some decoders drop the space before the first word of a text; a second token keeps its own.
    twice = tokenizer.decode([token, token], skip_special_tokens=False)
    return twice[len(text) :] if twice.startswith(text) and len(twice) > 2 * len(text) else text


def _entry(token: int, logprob: float | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    text = token_text(token, tokenizer)
    spelled = None if "\ufffd" in text or tokenizer is None else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": spelled}


def _of_text(output: Output) -> Sequence[TokenLogprob]:
    """All but the token that ended the text, which is no part of it."""
    tokens = output.logprobs or ()
    ended = output.finish_reason == STOP and isinstance(output.meta_info["finish_reason"].get("matched"), int)
    return tokens[:-1] if ended else tokens


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else IMPOSSIBLE
