"""A batch as the arrays that a program reads."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from makeready.engine.request import Request
from makeready.engine.scheduler import Batch, Chunk
from makeready.engine.seats import Seats
from makeready.graphs.spec import EXTEND, SCORE, Bucket, Field, Limits, step_fields
from makeready.kernels.spec import ROWS, TOKENS

SAMPLED = -1  # instead of a token id: the token that the device sampled for this row last


class Stage:
    """The fields of a step, in arrays of the largest size: those of a bucket are their beginnings.

    An executable has copied them when its launch returns, so that every step is written over the last.
    """

    def __init__(self, limits: Limits, seats: Seats) -> None:
        self._seats = seats
        self._page_size = limits.page_size
        self._fields = {field.name: field for field in step_fields(limits, EXTEND)}
        self._arrays = _defaults(self._fields.values(), limits, EXTEND)
        more = [field for field in step_fields(limits, SCORE) if field.name not in self._fields]
        self._targets = _defaults(more, limits, SCORE)
        self._null_slot = limits.null_slot
        self._of_tokens = {name for name, field in self._fields.items() if field.spec.shape[0] == TOKENS}
        self._live = {TOKENS: 0, ROWS: 0}  # how much of them the last step wrote
        self._width = 0  # and columns of the page table

    def fill(self, batch: Batch, bucket: Bucket) -> dict[str, np.ndarray]:
        """The fields of ``graphs.spec.step_fields``, padded to ``bucket``; good until the next call."""
        at = self._arrays
        rows, tokens = len(batch.decoding), batch.tokens
        self._clear(batch.rows, tokens)
        slots, starts, counts = batch.slots, batch.starts, np.ones(rows, np.int64)
        at["token_ids"][:rows] = SAMPLED
        if batch.chunks:
            slots = np.append(slots, [chunk.request.slot for chunk in batch.chunks])
            starts = np.append(starts, [chunk.start for chunk in batch.chunks])
            counts = np.append(counts, [chunk.count for chunk in batch.chunks])
            np.concatenate([_ids(chunk) for chunk in batch.chunks], out=at["token_ids"][rows:tokens])
        begins = np.cumsum(counts) - counts
        # What is sampled behind a chunk that is not the last is nobody's: it is left to the null slot.
        live = [not chunk.last for chunk in batch.chunks]
        self._per_row(slots, starts, counts, begins)
        at["row_slot"][rows : batch.rows][live] = self._fields["row_slot"].default
        self._per_token(slots, starts, counts, begins)
        filled = {
            name: array[: bucket.tokens if name in self._of_tokens else bucket.rows]
            for name, array in at.items()
        }
        if bucket.phase == SCORE:
            self._target(batch, begins[rows:])
            filled |= {name: array[: bucket.tokens] for name, array in self._targets.items()}
        return filled

    def _per_row(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, begins: np.ndarray) -> None:
        at, rows = self._arrays, len(slots)
        at["query_start"][:rows] = begins
        at["query_len"][:rows] = counts
        at["context_len"][:rows] = starts + counts
        at["row_slot"][:rows] = slots
        width = int(self._seats.held_S[slots].max())
        at["page_table"][:rows, width : self._width] = 0
        at["page_table"][:rows, :width] = self._seats.pages_SP[slots, :width]
        self._width = width

    def _per_token(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, begins: np.ndarray
    ) -> None:
        at, size, tokens = self._arrays, self._page_size, int(counts.sum())
        if tokens > len(slots):
            slots, offsets = np.repeat(slots, counts), np.repeat(starts - begins, counts)
            starts = np.arange(tokens) + offsets
        at["positions"][:tokens] = starts
        at["token_slot"][:tokens] = slots
        at["kv_slot"][:tokens] = self._seats.pages_SP[slots, starts // size] * size + starts % size

    def _target(self, batch: Batch, begins: np.ndarray) -> None:
        """For the tokens of chunks that are scored, the token behind each."""
        ids, slots = self._targets["target_ids"], self._targets["target_slot"]
        slots[:] = self._null_slot
        for chunk, begin in zip(batch.chunks, begins.tolist(), strict=True):
            first, end = chunk.start + 1, begin + chunk.scores
            ids[begin:end] = chunk.request.ids()[first : first + chunk.scores]
            slots[begin:end] = chunk.request.slot

    def _clear(self, rows: int, tokens: int) -> None:
        """Give what the step before wrote beyond this one's rows and tokens its defaults again."""
        for name, array in self._arrays.items():
            live, before = (tokens, TOKENS) if name in self._of_tokens else (rows, ROWS)
            array[live : self._live[before]] = self._fields[name].default
        self._live = {TOKENS: tokens, ROWS: rows}


def slot_values(request: Request, computed: int, limits: Limits) -> dict[str, object]:
    """What the device's slot table is told of a request when it is admitted.

    Args:
        computed: how many of its tokens are in the prefix cache. No step records these in the slot's
            history, which penalties look at.
    """
    sampling = request.sampling
    stop_ids = sorted(request.end_ids)[: limits.max_stop_ids] if sampling.min_new_tokens else []
    values: dict[str, object] = {
        "prompt_len": len(request.prompt),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": request.seed,
        "min_new_tokens": sampling.min_new_tokens,
        "stop_ids": stop_ids,
        "bias_ids": list(sampling.logit_bias),
        "bias_values": list(sampling.logit_bias.values()),
        "top_logprobs": sampling.top_logprobs_num if sampling.return_logprob else -1,
    }
    if computed and (
        sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    ):
        values["history"] = request.ids()[:computed]
    return values


def _defaults(fields: Iterable[Field], limits: Limits, phase: str) -> dict[str, np.ndarray]:
    """Arrays of the largest step of a phase."""
    sizes = {ROWS: limits.max_rows, TOKENS: limits.most_tokens(phase)}
    return {f.name: np.full(f.spec.at(sizes), f.default, f.spec.dtype) for f in fields}


def _ids(chunk: Chunk) -> np.ndarray:
    return chunk.request.ids()[chunk.start : chunk.start + chunk.count]
