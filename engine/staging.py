"""A batch as the arrays that a program reads."""

from __future__ import annotations

import numpy as np

from makeready.engine.request import Request
from makeready.engine.scheduler import Batch
from makeready.graphs.spec import Bucket, Limits, step_fields

SAMPLED = -1  # instead of a token id: the token that the device sampled for this row last


def stage(batch: Batch, bucket: Bucket, limits: Limits) -> dict[str, np.ndarray]:
    """The step's fields, padded to ``bucket`` with what padding tokens and rows hold."""
    step = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in step_fields(limits)}
    start = 0
    for row, (request, count) in enumerate(batch.rows):
        tokens = slice(start, start + count)
        positions = np.arange(request.computed, request.computed + count)
        pages = np.asarray(request.pages, np.int32)
        step["token_ids"][tokens] = _ids(request, count)
        step["positions"][tokens] = positions
        step["token_slot"][tokens] = request.slot
        step["kv_slot"][tokens] = (
            pages[positions // limits.page_size] * limits.page_size + positions % limits.page_size
        )
        step["query_start"][row] = start
        step["query_len"][row] = count
        step["context_len"][row] = request.computed + count
        if (
            count == request.pending
        ):  # else what is sampled after this chunk is nobody's: leave it to the null slot
            step["row_slot"][row] = request.slot
        step["page_table"][row, : len(pages)] = pages
        start += count
    return step


def slot_values(request: Request, limits: Limits) -> dict[str, object]:
    """What the device's slot table is told of a request when it is admitted."""
    sampling = request.sampling
    stop_ids = sorted(request.end_ids)[: limits.max_stop_ids] if sampling.min_new_tokens else []
    return {
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


def _ids(request: Request, count: int) -> list[int] | int:
    done = request.computed
    if request.output and done >= len(request.prompt):
        return SAMPLED
    return (request.prompt + request.output)[done : done + count]
