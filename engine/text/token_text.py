"""Single tokens inside a text: the bytes that each writes, and where in the text they begin."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from makeready.engine.text.detokenize import BYTE_TOKEN, StreamDetokenizer, bytes_of
from makeready.engine.text.parts import TextError
from makeready.engine.text.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes | None:
    """UTF-8 that a token writes inside a text, which may be half of a character; None outside the vocabulary."""
    text = tokenizer.id_to_token(token)
    if text is None:
        return None
    byte_level, byte_fallback, replaced = _decoder(tokenizer)
    if byte_level:
        return bytes_of(text)
    if byte_fallback and (byte := BYTE_TOKEN.fullmatch(text)):
        return bytes([int(byte[1], 16)])
    if replaced is None:
        return tokenizer.decode([token], skip_special_tokens=False).encode()
    for old, new in replaced:
        text = text.replace(old, new)
    return text.encode()


def starts(tokenizer: Tokenizer, ids: Sequence[int], text: str, skip_special_tokens: bool) -> list[int]:
    """Where in ``text`` each of its tokens begins, in characters; half of a character begins where that does.

    Args:
        ids: tokens whose text is ``text``; of a stop string that was cut off they may write more.
        skip_special_tokens: as it was decoded.
    """
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    pieces = [b"" if token in skipped else token_bytes(tokenizer, token) or b"" for token in ids]
    written, runs = 0, [False] * len(ids)
    if _decoder(tokenizer)[1]:
        runs = [_is_byte(tokenizer, token) for token in ids]
    places: list[int] = []
    at = 0
    while at < len(ids):
        end = at + 1
        # A run of byte tokens is decoded as a whole, and so is everything between two runs.
        while end < len(ids) and (runs[end] == runs[at] or ids[end] in skipped):
            end += 1
        data = b"".join(pieces[at:end])
        indices, count = _characters(data, singly=runs[at])
        offset = 0
        for piece in pieces[at:end]:
            places.append(written + (indices[offset] if offset < len(indices) else count))
            offset += len(piece)
        written += count
        at = end
    # The first space of a text, perhaps of several, is dropped by some decoders.
    whole = b"".join(pieces)
    spaces, shown = len(whole) - len(whole.lstrip(b" ")), len(text) - len(text.lstrip(" "))
    dropped = int(0 < spaces == shown + 1 and written > 0 and _begins(whole[spaces:], text[shown:]))
    return [min(max(place - dropped, 0), len(text)) for place in places]


def prompt_starts(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """As :func:`starts`, for the text that was tokenized; what was added around it begins at its ends."""
    for add_special_tokens in (True, False):
        try:
            made = tokenizer.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:
            raise TextError("the text has a lone surrogate; pass valid Unicode") from None
        if made.ids == list(ids):
            break
    else:
        return starts(tokenizer, ids, text, skip_special_tokens=False)
    places, reached = [], 0
    for added, (begin, end) in zip(made.special_tokens_mask, made.offsets, strict=True):
        # Some tokenizers do not count the spaces before a word as its own.
        places.append(reached if added and begin == end == 0 else min(begin, reached))
        reached = max(reached, end)
    return places


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a prompt of token ids, special ones too; a character that only the answer completes is left out."""
    stream = StreamDetokenizer(tokenizer, skip_special_tokens=False)
    text = stream.push(ids) + stream.settle()
    return text if stream.streams else stream.flush()


def _begins(written: bytes, text: str) -> bool:
    """Whether a text begins as written, as far as its first character shows."""
    return not text or not written or written.decode(errors="replace")[:1] == text[:1]


def _characters(data: bytes, singly: bool) -> tuple[list[int], int]:
    """For each byte the number of the character that it is of, and how many there are.

    Args:
        singly: one bad byte makes each byte a character.
    """
    if singly:
        try:
            data.decode()
        except UnicodeDecodeError:
            return list(range(len(data))), len(data)
    decoder: Any = codecs.getincrementaldecoder("utf-8")(errors="replace")
    indices: list[int] = []
    count = waiting = 0
    for byte in data:
        made = len(decoder.decode(bytes([byte])))
        left = len(decoder.getstate()[0])
        # Of two characters that come at once, the first is what waited and was broken.
        if made == 2:
            indices += [count] * waiting + [count + 1]
        elif made and left:
            indices += [count] * waiting
        elif made:
            indices += [count] * (waiting + 1)
        count, waiting = count + made, left
    return indices + [count] * waiting, count + (1 if waiting else 0)


def _is_byte(tokenizer: Tokenizer, token: int) -> bool:
    return BYTE_TOKEN.fullmatch(tokenizer.id_to_token(token) or "") is not None


@lru_cache(maxsize=8)
def _decoder(tokenizer: Tokenizer) -> tuple[bool, bool, tuple[tuple[str, str], ...] | None]:
    """Whether characters stand for bytes, whether there are byte tokens, and what is replaced in a token.

    The last is None for a decoder that does more than replace.
    """
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return False, False, None
    spec = json.loads(decoder.__getstate__())
    byte_level = byte_fallback = False
    replaced: list[tuple[str, str]] | None = []
    for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        kind = step["type"]
        byte_level |= kind == "ByteLevel"
        byte_fallback |= kind == "ByteFallback"
        if kind == "Metaspace" and replaced is not None:
            replaced.append((step["replacement"], " "))
        elif kind == "Replace" and replaced is not None and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind not in ("ByteLevel", "ByteFallback", "Fuse", "Strip"):
            replaced = None
    return byte_level, byte_fallback, None if replaced is None else tuple(replaced)
