"""Texts to token ids for a plan: refused early where they cannot fit, and told of where a token would come twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from makeready.engine.errors import RequestError
from makeready.engine.text.tokenizer import Tokenizer


class PromptTokenizer:
    """Tokenizes the texts of prompts.

    Args:
        tokenizer: of the checkpoint at ``path``; None where it has none.
        context_len: tokens that a request may have.
        warn: told once that prompts bring along what the tokenizer adds.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, path: Path, context_len: int, warn: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._path, self._context_len, self._warn = tokenizer, path, context_len, warn
        self._bos_told = False

    def tokenizer_for(self, purpose: str) -> Tokenizer:
        """The tokenizer, which ``purpose`` needs.

        Raises:
            RequestError: there is none.
        """
        if self._tokenizer is None:
            raise RequestError(
                f"{purpose} needs a tokenizer, and {self._path} has none; give prompts as token_ids"
            )
        return self._tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, which is refused by its length alone where that is enough."""
        tokenizer, most = self.tokenizer_for("text"), self._context_len
        if len(text) > most:
            fewest = tokenizer.length_bound.fewest(text)
            if fewest > most:
                raise RequestError(
                    f"a prompt of {len(text):,} characters has at least {fewest:,} tokens, which exceed the context "
                    f"of {most} tokens; shorten it, or recompile with a larger plan.context_len"
                )
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        bos = tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos] and not self._bos_told:
            self._bos_told = True
            self._warn(
                f"a prompt begins with {tokenizer.bos_token} and the tokenizer adds another; "
                "add_special_tokens=false leaves that out"
            )
        return ids
