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
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from makeready.engine.text.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ENOUGH = 4  # bytes of a character; and where a text has begun, its first space is gone


class _Step(Protocol):
    """One step of a decoder.

    ``feed`` takes a token's text, ``end`` gives what is kept back when the last one was taken. ``settle`` gives
    what only a broken text would still change, and keeps the rest.
    """

    def feed(self, text: str) -> list[str]: ...

    def end(self) -> list[str]: ...

    def settle(self) -> list[str]: ...


class StreamDetokenizer:
    """Text of a growing sequence of token ids, piece by piece.

    A piece is final: it never holds half of a UTF-8 sequence, nor text that a later token changes. What
    is kept back: an unfinished UTF-8 sequence (byte-level vocabularies, at most 3 bytes), or a run of byte
    tokens until it ends (byte-fallback vocabularies: one bad byte turns the run into replacement
    characters). Where the decoder looks at a whole text (WordPiece and its clean-up), everything is kept
    until `flush`.

    Behind a prompt it gives the text of the whole sequence without the prompt's: a vocabulary that writes
    words with their leading space keeps the one between prompt and answer.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        skip_special_tokens: leave special tokens out, as `decode` does.
        prompt: ids that the sequence begins with, whose text is not given.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_texts if skip_special_tokens else frozenset()
        self._skip_special_tokens = skip_special_tokens
        self._steps = _steps(tokenizer)
        self._kept_ids: list[int] = []
        self._prompt: list[int] = list(prompt) if self._steps is None else self._end_of(prompt)
        self._after_byte = False  # the prompt ends in a byte token
        if self._steps is not None and self._prompt:
            self.push(self._prompt)
            self._after_byte = any(isinstance(step, _ByteFallback) and step.kept for step in self._steps)
            self.settle()

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
            return self._behind_prompt(ids)
        pieces = []
        for place, step in enumerate(self._steps):
            pieces += self._through(place + 1, step.end())
        return "".join(pieces)

    def settle(self) -> str:
        """Text that is kept back only because a broken character may follow; no half of a character."""
        pieces = []
        for place, step in enumerate(self._steps or ()):
            pieces += self._through(place + 1, step.settle())
        return "".join(pieces)

    @property
    def streams(self) -> bool:
        """Whether any text comes before `flush`."""
        return self._steps is not None

    @property
    def kept(self) -> bytes:
        """The half of a character that waits for its other half."""
        steps = self._steps or ()
        return b"".join(step.kept for step in steps if isinstance(step, (_ByteLevel, _ByteFallback)))

    def whole(self, ids: Sequence[int]) -> str:
        """What `push` and `flush` would give for all ids of an answer, faster."""
        if self._after_byte or self.kept:
            return self.push(ids) + self.flush()
        return self._behind_prompt(ids)

    def _behind_prompt(self, ids: Sequence[int]) -> str:
        skip = self._skip_special_tokens
        before = self._tokenizer.decode(self._prompt, skip_special_tokens=skip) if self._prompt else ""
        return self._tokenizer.decode([*self._prompt, *ids], skip_special_tokens=skip)[len(before) :]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """As much of a prompt's end as decides how its answer begins: a character, or a run of byte tokens."""
        size, first = 0, len(prompt)
        while first and size < _ENOUGH:
            first -= 1
            text = self._tokenizer.id_to_token(prompt[first])
            if text is not None and text not in self._skipped and not BYTE_TOKEN.fullmatch(text):
                size += len(text)
        return list(prompt[first:])

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
        out = self._decoder.decode(bytes_of(text))
        return [out] if out else []

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]

    def settle(self) -> list[str]:
        return []

    @property
    def kept(self) -> bytes:
        return self._decoder.getstate()[0]


class _ByteFallback:
    """`<0xE4>` stands for a byte. Keeps a run of such tokens until another token ends it."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, text: str) -> list[str]:
        byte = BYTE_TOKEN.fullmatch(text)
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

    def settle(self) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(bytes(self._run))
        except UnicodeDecodeError:
            return self.end()
        self._run = bytearray(decoder.getstate()[0])
        return [text] if text else []

    @property
    def kept(self) -> bytes:
        return bytes(self._run)


class _Replace:
    """Replaces a text within a token. Keeps nothing."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def feed(self, text: str) -> list[str]:
        return [text.replace(self._old, self._new)]

    def end(self) -> list[str]:
        return []

    def settle(self) -> list[str]:
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

    def settle(self) -> list[str]:
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

    def settle(self) -> list[str]:
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
def bytes_of(text: str) -> bytes:
    """Bytes of a byte-level token; a token with any other character (an added one) is its own UTF-8."""
    try:
        return bytes([_BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()
