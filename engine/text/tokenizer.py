"""Text to token ids and back, the same as transformers' fast tokenizers, without transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from makeready.engine.text.file_types import library_errors
from makeready.engine.text.gguf_tokenizer import read_gguf_tokenizer
from makeready.engine.text.hf_tokenizer import read_hf_tokenizer
from makeready.engine.text.length import LengthBound
from makeready.engine.text.parts import TextError, TokenizerParts

# Characters of a text that takes so long (10 ms and more) that whoever runs meanwhile should not wait for it.
LONG = 2**15

# What transformers replaces after decoding when `clean_up_tokenization_spaces` holds, in this order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class TokenizerSource(Protocol):
    """The side of a checkpoint that a tokenizer is read from; GGUF ones also have `metadata`."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def tokenizer_files(self) -> dict[str, Path]:
        """Files that describe the tokenizer, by file name (`gguf` for a GGUF file); {} if none."""
        ...


class Tokenizer:
    """A fast tokenizer with its special tokens.

    Args:
        parts: what `read_hf_tokenizer` or `read_gguf_tokenizer` returns.
        eos_ids: ids that end a sequence, in order of preference; None takes those of `parts`.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath.
        special_tokens: named special tokens that are set, for chat templates.
        eos_ids: ids that end a sequence.
        chat_template: one jinja template, several by name, or None.
        response_template: how answers are written, where the checkpoint says so itself.
        clean_up: spaces before punctuation are removed after decoding.
        warnings: what its files leave open and how it was understood, for whoever loads it to say.
    """

    def __init__(self, parts: TokenizerParts, eos_ids: Iterable[int] | None = None) -> None:
        self.backend: tokenizers.Tokenizer = parts.backend
        self.special_tokens: dict[str, str] = dict(parts.special_tokens)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(parts.eos_ids if eos_ids is None else eos_ids))
        self.chat_template: str | Mapping[str, str] | None = parts.chat_template
        self.response_template = parts.response_template
        self.clean_up = parts.clean_up
        self.warnings = parts.warnings
        # A length limit or padding left in tokenizer.json is for training; transformers clears both too.
        self.backend.no_truncation()
        self.backend.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize text.

        Args:
            text: any valid Unicode; special tokens written in it become their ids.
            add_special_tokens: add bos and eos where the tokenizer does; False for rendered chats.

        Raises:
            TextError: not a string, or a lone surrogate in it.
        """
        if not isinstance(text, str):
            raise TextError(
                f"a prompt must be a text, not {type(text).__name__}; pass token ids as token_ids"
            )
        try:
            with library_errors("the tokenizer cannot take this text ({error}); check tokenizer.json"):
                if len(text) > LONG:  # as a batch, during which other threads run
                    return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[
                        0
                    ].ids
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TextError:
            if not any("\ud800" <= char <= "\udfff" for char in text):
                raise
            place = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), 0)
            raise TextError(
                f"the text has a lone surrogate at character {place}; pass valid Unicode"
            ) from None

    @cached_property
    def length_bound(self) -> LengthBound:
        """Tells by a text's length how many tokens it has at least."""
        return LengthBound(self.backend)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary give no text.

        Raises:
            TextError: a negative id, or one of 2**32 or more.
        """
        if not all(0 <= token < 2**32 for token in ids):
            raise TextError(f"token ids must be from 0 to 2**32 - 1; got {min(ids)} to {max(ids)}")
        with library_errors("the tokenizer cannot write these tokens ({error}); check tokenizer.json"):
            text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if self.clean_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included (the model's logits may be padded beyond it)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a sequence, as text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a sequence, as text."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_id(self) -> int | None:
        """Id of `bos_token`."""
        return None if self.bos_token is None else self.token_to_id(self.bos_token)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """Texts of the tokens that `skip_special_tokens` skips."""
        return frozenset(
            token.content for token in self.backend.get_added_tokens_decoder().values() if token.special
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `skip_special_tokens` skips."""
        ids = (self.token_to_id(text) for text in self.special_texts)
        return frozenset(token for token in ids if token is not None)

    def id_to_token(self, token: int) -> str | None:
        """Vocabulary entry of an id (bytes as the vocabulary writes them), None outside the vocabulary.

        Raises:
            TextError: a negative id, or one of 2**32 or more.
        """
        try:
            return self.backend.id_to_token(token)
        except OverflowError:
            raise TextError(f"token ids must be from 0 to 2**32 - 1; got {token}") from None

    def token_to_id(self, token: str) -> int | None:
        """Id of a vocabulary entry, None if there is none."""
        return self.backend.token_to_id(token)


def load_tokenizer(checkpoint: TokenizerSource) -> Tokenizer | None:
    """Read a checkpoint's tokenizer; None where it has none (the model then takes token ids only).

    End tokens are those of generation_config, then the tokenizer's, then the model config's.

    Raises:
        TextError: the files are broken or of a kind that is not supported; the message has the remedy.
    """
    files = checkpoint.tokenizer_files()
    if "gguf" in files:
        parts = read_gguf_tokenizer(checkpoint.metadata)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        parts = read_hf_tokenizer(files, checkpoint.path, checkpoint.config.get("model_type"))
    if parts is None:
        return None
    generation = _ids(checkpoint.generation_config.get("eos_token_id"), "generation_config.eos_token_id")
    config = _ids(checkpoint.config.get("eos_token_id"), "config.eos_token_id")
    return Tokenizer(parts, (*generation, *parts.eos_ids, *config))


def _ids(value: Any, field: str) -> tuple[int, ...]:
    """One id, a list of ids or null, as configs write end tokens."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise TextError(
            f"{field} must be an id or a list of ids, not {value!r}; correct it in the checkpoint"
        )
    return tuple(values)
