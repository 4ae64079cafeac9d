"""What a tokenizer is read into, whatever file it came from, and the error this package raises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from makeready.engine.text.response.template import ResponseTemplate

# The named special tokens of a Hugging Face tokenizer, in the order in which missing ones are added.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextError(ValueError):
    """Text, or a file that describes text, cannot be used; one sentence names the cause and the remedy."""


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer as read from a checkpoint.

    Attributes:
        backend: vocabulary, pre-tokenizer, post-processor (bos and eos) and decoder.
        special_tokens: named special tokens that are set, e.g. `{"bos_token": "<s>"}`.
        eos_ids: ids that end a sequence, as far as the tokenizer's own files know.
        chat_template: one jinja template, several by name, or None.
        clean_up: remove spaces before punctuation after decoding (tokenizers that are not BPE only).
        response_template: how answers are written, where the checkpoint says so itself.
        warnings: sentences about what the files leave open and how it was understood.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    chat_template: str | Mapping[str, str] | None = None
    clean_up: bool = False
    response_template: ResponseTemplate | None = None
    warnings: tuple[str, ...] = ()
