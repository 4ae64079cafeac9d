"""Answers as ``GenerateResponse``: chunks of tokens while they come, and in the end one whole a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smg_grpc_proto.generated.sglang_scheduler_pb2 import (
    GenerateComplete,
    GenerateResponse,
    GenerateStreamChunk,
    InputLogProbs,
    InputTokenLogProb,
    OutputLogProbs,
    TopLogProbs,
)

from makeready.engine.output import Output, TokenLogprob
from makeready.engine.pieces import Piece
from makeready.engine.reply import Reply


class Answers:
    """What the samples of a request come to.

    Args:
        rid: what the client calls it.
        interval: tokens of a sample that are told of together, but for its last ones.
    """

    def __init__(self, rid: str, replies: Sequence[Reply], interval: int = 1) -> None:
        self._rid, self._replies, self._interval = rid, replies, interval
        self._waiting: list[list[int]] = [[] for _ in replies]
        self._scores: list[list[TokenLogprob]] = [[] for _ in replies]
        self._told = [0] * len(replies)

    def whole(self, outputs: Sequence[Output]) -> Iterator[GenerateResponse]:
        """The answers, one a sample."""
        for index, output in enumerate(outputs):
            yield self._complete(index, output)

    def take(self, pieces: Sequence[Piece]) -> Iterator[GenerateResponse]:
        """What is told of pieces: chunks that join to the whole answer, which comes behind the last."""
        for piece in pieces:
            waiting, scores = self._waiting[piece.index], self._scores[piece.index]
            waiting += piece.token_ids
            scores += piece.logprobs
            if waiting and (len(waiting) >= self._interval or piece.output is not None):
                yield self._chunk(piece.index)
                waiting.clear()
                scores.clear()
            if piece.output is not None:
                yield self._complete(piece.index, piece.output)

    def _chunk(self, index: int) -> GenerateResponse:
        reply, tokens = self._replies[index], self._waiting[index]
        first, self._told[index] = not self._told[index], self._told[index] + len(tokens)
        scored = first and reply.sequence.sampling.logprob_start_len >= 0
        chunk = GenerateStreamChunk(
            token_ids=tokens,
            prompt_tokens=len(reply.sequence.prompt),
            completion_tokens=self._told[index],
            cached_tokens=reply.sequence.cached_tokens,
            output_logprobs=_of_output(self._scores[index]) if self._scores[index] else None,
            input_logprobs=_of_input(reply.input_logprobs) if scored else None,
            index=index,
        )
        return GenerateResponse(request_id=self._rid, chunk=chunk)

    def _complete(self, index: int, output: Output) -> GenerateResponse:
        complete = GenerateComplete(
            output_ids=output.token_ids,
            finish_reason=output.finish_reason,
            prompt_tokens=output.prompt_tokens,
            completion_tokens=output.completion_tokens,
            cached_tokens=output.meta_info["cached_tokens"],
            output_logprobs=None if output.logprobs is None else _of_output(output.logprobs),
            input_logprobs=None if output.input_logprobs is None else _of_input(output.input_logprobs),
            index=index,
        )
        matched = output.meta_info["finish_reason"].get("matched")
        if isinstance(matched, int):
            complete.matched_token_id = matched
        elif matched is not None:
            complete.matched_stop_str = matched
        return GenerateResponse(request_id=self._rid, complete=complete)


def _of_output(scores: Sequence[TokenLogprob]) -> OutputLogProbs:
    return OutputLogProbs(
        token_logprobs=[0.0 if each.logprob is None else each.logprob for each in scores],
        token_ids=[each.token_id for each in scores],
        top_logprobs=_tops(scores),
    )


def _of_input(scores: Sequence[TokenLogprob]) -> InputLogProbs:
    return InputLogProbs(
        token_logprobs=[InputTokenLogProb(value=each.logprob) for each in scores],
        token_ids=[each.token_id for each in scores],
        top_logprobs=_tops(scores),
    )


def _tops(scores: Sequence[TokenLogprob]) -> list[TopLogProbs]:
    """The most probable tokens in each place; none where none are asked for."""
    if not any(each.top for each in scores):
        return []
    return [
        TopLogProbs(values=[value for _, value in each.top], token_ids=[token for token, _ in each.top])
        for each in scores
    ]
