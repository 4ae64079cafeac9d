"""A lower bound of how many tokens a text has, by its length alone: what is far too long is refused at once.

A token stands for at most as many bytes as the longest of the vocabulary has, so a text has at least its bytes
over that many tokens. That holds only where every byte of a text ends up in a token: not where unknown words
become one token, nor where what splits a text drops parts of it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import tokenizers

PIECE = 2**16  # characters
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
_FORMS: tuple[Form, ...] = get_args(Form)
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts")
_SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # all there is


class LengthBound:
    """Fewest tokens that texts can have under a tokenizer.

    Attributes:
        longest: bytes of a text that a token can stand for; None where no such bound holds.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._forms: list[Form] = []
        self._spaces = True  # whether white space always ends up in a token
        self._lost = b""
        self.longest: int | None = None
        if self._normalizer_keeps(backend) and _pre_tokenizer_keeps(backend) and _model_keeps(backend):
            self._spaces &= not any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
            byte_level = _byte_level(backend)
            added = {token.content for token in backend.get_added_tokens_decoder().values()}
            if byte_level:
                self._lost = _lost(backend)
            self.longest = max(
                # Under a byte-level vocabulary every character of a token is a byte; a mark stands for a space.
                len(token) if byte_level and token not in added else len(token.replace("▁", " ").encode())
                for token in backend.get_vocab(with_added_tokens=True)
            )

    def fewest(self, text: str) -> int:
        """Tokens that ``text`` has at least, those that begin and end a text left out."""
        if self.longest is None:
            return 0
        size = 0
        for start in range(0, len(text), PIECE):
            # In pieces, between which other threads run. What a form joins across a border is a letter at most.
            piece = text[start : start + PIECE]
            for form in self._forms:
                if not unicodedata.is_normalized(form, piece):
                    piece = unicodedata.normalize(form, piece)
            data = piece.encode(errors="replace")
            size += len(data.translate(None, self._lost)) - (16 if start and self._forms else 0)
        if not self._spaces:
            size -= sum(len(space.encode()) * text.count(space) for space in _SPACE)
        return max(0, -(-size // self.longest))

    def _normalizer_keeps(self, backend: tokenizers.Tokenizer) -> bool:
        """Whether what is done to a text at first makes it no shorter, but for Unicode's forms and spaces."""
        for part in _parts(backend.normalizer):
            kind = part["type"]
            if kind in _FORMS:
                self._forms.append(kind)
            elif kind == "Strip":
                self._spaces = False
            elif kind == "Replace":
                old = part["pattern"].get("String")
                if old is None or len(part["content"].replace("▁", " ").encode()) < len(old.encode()):
                    return False
            elif kind not in ("Prepend", "ByteLevel"):
                return False
        return True


def _pre_tokenizer_keeps(backend: tokenizers.Tokenizer) -> bool:
    """Whether what splits a text drops no part of it."""
    return all(
        part["type"] in _KEEPING and part.get("behavior", "Isolated") != "Removed"
        for part in _parts(backend.pre_tokenizer)
    )


def _model_keeps(backend: tokenizers.Tokenizer) -> bool:
    """Whether no more than a byte comes to an unknown token."""
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if model.byte_fallback:
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return _byte_level(backend)


def _byte_level(backend: tokenizers.Tokenizer) -> bool:
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    return any(part["type"] == "ByteLevel" for part in parts)


def _lost(backend: tokenizers.Tokenizer) -> bytes:
    """Bytes without a token, under a byte-level vocabulary: they are dropped, or many become one unknown token."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # Those of Latin-1 stand for themselves; the others, in their order, for the bytes that are left.
    own = [ord(letter) for letter in letters if ord(letter) < 256]
    values = [*own, *(byte for byte in range(256) if byte not in own)]
    return bytes(
        b for letter, b in zip(letters, values, strict=True) if backend.model.token_to_id(letter) is None
    )


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as they are stored."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()))


def _flat(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if spec["type"] != "Sequence":
        yield spec
        return
    for part in spec.get("normalizers") or spec.get("pretokenizers") or ():
        yield from _flat(part)
