"""Answers of ``/generate``, whole and as streams, each event of which has all of the text so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from makeready.engine.output import Output, TokenLogprob
from makeready.engine.pieces import Piece
from makeready.engine.protocol.openai.logprobs import token_text
from makeready.engine.reply import Reply
from makeready.engine.text.tokenizer import Tokenizer


class Answers:
    """What samples come to.

    Args:
        rids: what the client calls each prompt.
        replies: of all prompts, ``samples[i]`` of the i-th.
        texts: write tokens of log-probabilities as text too.
        tokenizer: None where there is none.
    """

    def __init__(
        self,
        rids: Sequence[str],
        replies: Sequence[Sequence[Reply]],
        texts: bool,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._rids, self._replies = rids, replies
        self._tokenizer = tokenizer if texts else None
        self._said: dict[tuple[int, int], list[str]] = {}

    def whole(self, prompt: int, outputs: Sequence[Output]) -> list[dict[str, Any]]:
        """The answers to a prompt, one a sample."""
        return [self._answer(prompt, output) for output in outputs]

    def take(self, prompt: int, pieces: Sequence[Piece]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The events that pieces become, with the number of the sample."""
        for piece in pieces:
            said = self._said.setdefault((prompt, piece.index), [])
            said.append(piece.text)
            if piece.output is not None:
                yield piece.index, self._answer(prompt, piece.output)
                continue
            reply = self._replies[prompt][piece.index]
            said[:] = ["".join(said)]
            sequence = reply.sequence
            meta: dict[str, Any] = {
                "id": self._rids[prompt],
                "finish_reason": None,
                "prompt_tokens": len(sequence.prompt),
                "completion_tokens": len(sequence.output),
            }
            if sequence.sampling.return_logprob:
                scored = sequence.sampling.logprob_start_len >= 0
                meta |= self._logprobs(reply.logprobs, reply.input_logprobs if scored else ())
            yield piece.index, {"text": said[0], "output_ids": list(sequence.output), "meta_info": meta}

    def _answer(self, prompt: int, output: Output) -> dict[str, Any]:
        meta: dict[str, Any] = {**output.meta_info, "id": self._rids[prompt]}
        if output.logprobs is not None:
            meta |= self._logprobs(output.logprobs, output.input_logprobs or ())
        return {"text": output.text, "output_ids": list(output.token_ids), "meta_info": meta}

    def _logprobs(self, output: Sequence[TokenLogprob], given: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "input_token_logprobs": [self._entry(each.logprob, each.token_id) for each in given],
            "output_token_logprobs": [self._entry(each.logprob, each.token_id) for each in output],
            "input_top_logprobs": [self._top(each) for each in given],
            "output_top_logprobs": [self._top(each) for each in output],
        }

    def _top(self, logprob: TokenLogprob) -> list[Any] | None:
        return [self._entry(value, token) for token, value in logprob.top] or None

    def _entry(self, value: float | None, token: int) -> list[Any]:
        return [value, token, None if self._tokenizer is None else token_text(token, self._tokenizer)]
