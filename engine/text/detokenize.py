"""Token ids to text as they come, without ever taking back a character.

`decode` of all ids is the specification: the pieces that `push` and `flush` give, joined, equal it. A
`tokenizers` decoder is a chain of steps over a list of token texts; here each step of the chain reads one
token at a time and keeps what a later token may still change, so a token costs O(1) and no window of old
tokens is decoded again. Each class below states what it keeps.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Protocol

from makeready.engine.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Step(Protocol):
    def feed(self, text: str) -> list[str]: ...

    def end(self) -> list[str]: ...


class StreamDetokenizer:
    """Text of a growing sequence of token ids, piece by piece.

    A piece is final: it never holds half of a UTF-8 sequence, nor text that a later token changes. What
    is kept back: an unfinished UTF-8 sequence (byte-level vocabularies, at most 3 bytes), or a run of byte
    tokens until it ends (byte-fallback vocabularies: one bad byte turns the run into replacement
    characters). Where the decoder looks at a whole text (WordPiece and its clean-up), everything is kept
    until `flush`.

    To continue a prompt, push its last ids first and drop what that returns: a vocabulary that
    writes words with their leading space then keeps the space between prompt and answer.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        skip_special_tokens: leave special tokens out, as `decode` does.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_texts if skip_special_tokens else frozenset()
        self._skip_special_tokens = skip_special_tokens
        self._steps = _steps(tokenizer)
        self._kept_ids: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; returns the text that became final.

        Raises:
            TextError: a negative id, or one of 2**32 or more.
        """
        if self._steps is None:
            self._kept_ids.extend(ids)
            return ""
        pieces = []
        for token in ids:
            text = self._tokenizer.id_to_token(token)
            if text is not None and text not in self._skipped:
                pieces += self._through(0, [text])
        return "".join(pieces)

    def flush(self) -> str:
        """The rest of the text; call it once, after the last id."""
        if self._steps is None:
            ids, self._kept_ids = self._kept_ids, []
            return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
        pieces = []
        for place, step in enumerate(self._steps):
            pieces += self._through(place + 1, step.end())
        return "".join(pieces)

    def _through(self, place: int, texts: list[str]) -> list[str]:
        """Lead texts through the steps from `place` on."""
        assert self._steps is not None
        for step in self._steps[place:]:
            texts = [out for text in texts for out in step.feed(text)]
        return texts


class _ByteLevel:
    """Characters stand for bytes. Keeps an unfinished UTF-8 sequence."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, text: str) -> list[str]:
        out = self._decoder.decode(_bytes_of(text))
        return [out] if out else []

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _ByteFallback:
    """`<0xE4>` stands for a byte. Keeps a run of such tokens until another token ends it."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, text: str) -> list[str]:
        byte = _BYTE_TOKEN.fullmatch(text)
        if byte is not None:
            self._run.append(int(byte[1], 16))
            return []
        return [*self.end(), text]

    def end(self) -> list[str]:
        if not self._run:
            return []
        run, self._run = self._run, bytearray()
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)  # one for each byte of the run, the good ones too


class _Replace:
    """Replaces a text within a token. Keeps nothing."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def feed(self, text: str) -> list[str]:
        return [text.replace(self._old, self._new)]

    def end(self) -> list[str]:
        return []


class _Metaspace:
    """A mark stands for a space; the first token loses its marks where encoding put one in front."""

    def __init__(self, mark: str, prefixed: bool) -> None:
        self._mark, self._drop = mark, prefixed

    def feed(self, text: str) -> list[str]:
        drop, self._drop = self._drop, False
        return [text.replace(self._mark, "" if drop else " ")]

    def end(self) -> list[str]:
        return []


class _StripStart:
    """Removes up to `count` characters at the start of the whole text. Keeps nothing."""

    def __init__(self, content: str, count: int) -> None:
        self._content, self._count = content, count

    def feed(self, text: str) -> list[str]:
        while self._count and text:
            if text[0] != self._content:
                self._count = 0
            else:
                self._count -= 1
                text = text[1:]
        return [text]

    def end(self) -> list[str]:
        return []


def _steps(tokenizer: Tokenizer) -> list[_Step] | None:
    """The decoder as steps that stream, None if it looks at the whole text."""
    decoder = tokenizer.backend.decoder
    if decoder is None or tokenizer.clean_up:
        return None
    spec = json.loads(decoder.__getstate__())  # its serialized form, without the vocabulary
    specs = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    steps: list[_Step] = []
    fused = False  # the steps before made one text of all tokens, which arrives here in pieces
    for spec in specs:
        if spec["type"] == "Fuse":
            fused = True
            continue
        step = _step(spec, fused)
        if step is None:
            return None
        steps.append(step)
        fused = fused or spec["type"] == "ByteLevel"
    return steps


def _step(spec: Mapping[str, Any], fused: bool) -> _Step | None:
    kind = spec["type"]
    if kind == "Replace":
        old = spec["pattern"].get("String")
        # A single character cannot lie across the border of two pieces.
        return _Replace(old, spec["content"]) if old and (not fused or len(old) == 1) else None
    if kind == "Strip":
        return _StripStart(spec["content"], spec["start"]) if fused and not spec["stop"] else None
    if fused:
        return None
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "Metaspace":
        return _Metaspace(spec["replacement"], spec["prepend_scheme"] != "never")
    return None


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_of_character()


@lru_cache(maxsize=1 << 18)  # a vocabulary or two
def _bytes_of(text: str) -> bytes:
    """Bytes of a byte-level token; a token with any other character (an added one) is its own UTF-8."""
    try:
        return bytes([_BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()
