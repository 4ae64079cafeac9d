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
    content = [
        _entry(token.token_id, token.logprob, tokenizer)
        | {"top_logprobs": [_entry(i, value, tokenizer) for i, value in token.top]}
        for token in _of_text(output)
    ]
    return {"content": content, "refusal": None}


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
    tokens = (*before, *after)
    texts = [token_text(token.token_id, tokenizer) for token in tokens]
    places = [0] * len(tokens)
    if tokenizer is None:
        for at, text in enumerate(texts[:-1], 1):
            places[at] = places[at - 1] + len(text)
    else:
        ids = [token.token_id for token in before]
        if isinstance(prompt, str):
            places = prompt_starts(tokenizer, ids, prompt) if ids else []
        else:
            places = starts(tokenizer, ids, echo, skip_special_tokens=False)
        answer = [token.token_id for token in after]
        places += [len(echo) + at for at in starts(tokenizer, answer, output.text, skip_special_tokens)]
        whole = echo + output.text
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
    reason = output.meta_info["finish_reason"]
    return tokens[:-1] if reason["type"] == STOP and isinstance(reason.get("matched"), int) else tokens


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else IMPOSSIBLE
