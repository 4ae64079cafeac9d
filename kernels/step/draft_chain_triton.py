"""Chains of drafts on GPUs: integers of a row, a thread each; a block a row packs them.

# L tokens of context
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.step.draft_chain import count_drafts, next_draft, pack_drafts

_ROWS, _TOKENS = 128, 128  # rows of a block, tokens of a row at a time


@triton.jit
def count_rows(
    token_ids,
    row_slot,
    row_start,
    query_start,
    query_len,
    limit,
    length,
    start,
    drafts,
    rows,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_chain.count_drafts`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(row_slot + row, mask=inside, other=NULL)
    count = tl.load(query_len + row, mask=inside, other=0)
    live = inside & (slot != NULL) & (count > 0)
    first = tl.load(row_start + row, mask=live, other=0)
    first = tl.where(first >= 0, first, tl.load(length + slot, mask=live, other=0))
    last = tl.load(token_ids + tl.load(query_start + row, mask=live, other=0) + count - 1, mask=live, other=0)
    most = tl.minimum(count, tl.load(limit + row, mask=live, other=0) - 1 - first) - 1
    tl.store(start + row, tl.where(live, first, 0), mask=inside)
    tl.store(drafts + row, tl.where(live & (last < 0), tl.maximum(most, 0), 0), mask=inside)


@triton.jit
def place_rows(
    row_slot,
    sample_slot,
    start,
    drafts,
    history,
    ids,
    positions,
    chain_slot,
    query_start,
    query_len,
    context_len,
    draw_slot,
    draw_context,
    rows,
    STEP: tl.constexpr,
    BEHIND: tl.constexpr,
    L: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_chain.next_draft`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    live = inside & (tl.load(drafts + row, mask=inside, other=0) > STEP)
    slot = tl.load(row_slot + row, mask=live, other=NULL)
    place = tl.load(start + row, mask=live, other=0) + STEP
    position = tl.maximum(place - BEHIND, 0)
    token = tl.load(history + slot.to(tl.int64) * L + place, mask=live, other=0)
    tl.store(ids + row, token, mask=inside)
    tl.store(positions + row, tl.where(live, position, 0), mask=inside)
    tl.store(chain_slot + row, slot, mask=inside)
    tl.store(query_start + row, row, mask=inside)
    tl.store(query_len + row, live.to(tl.int32), mask=inside)
    tl.store(context_len + row, tl.where(live, position + 1, 0), mask=inside)
    tl.store(draw_slot + row, tl.load(sample_slot + row, mask=live, other=NULL), mask=inside)
    tl.store(draw_context + row, tl.where(live, place + 1, 0), mask=inside)


@triton.jit
def tokens_of(row, inside, token_ids, row_slot, query_start, query_len, drafts, NULL: tl.constexpr):
    """How many tokens rows run, and whether they are staged."""
    slot = tl.load(row_slot + row, mask=inside, other=NULL)
    count = tl.load(query_len + row, mask=inside, other=0)
    live = inside & (slot != NULL) & (count > 0)
    last = tl.load(token_ids + tl.load(query_start + row, mask=live, other=0) + count - 1, mask=live, other=0)
    guessed = 1 + tl.load(drafts + row, mask=live, other=0)
    return tl.where(live, tl.where(last < 0, guessed, count), 0), last >= 0


@triton.jit
def pack_rows(
    token_ids,
    row_slot,
    query_start,
    query_len,
    sample_slot,
    start,
    drafts,
    history,
    draft_ids,
    draft_start,
    draft_len,
    draft_slot,
    draft_context,
    rows,
    tokens,
    L: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_chain.pack_drafts`. The block behind those of the rows fills in tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    begin = 0
    for first in range(0, row, BLOCK):
        before = first + lane
        counts, _ = tokens_of(before, before < row, token_ids, row_slot, query_start, query_len, drafts, NULL)
        begin += tl.sum(counts, 0)
    if row == rows:
        for first in range(begin, tokens, BLOCK):
            t = first + lane
            tl.store(draft_ids + t, 0, mask=t < tokens)
            tl.store(draft_slot + t, NULL, mask=t < tokens)
            tl.store(draft_context + t, 0, mask=t < tokens)
    else:
        count, staged = tokens_of(row, row < rows, token_ids, row_slot, query_start, query_len, drafts, NULL)
        tl.store(draft_start + row, begin)
        tl.store(draft_len + row, count)
        if count > 0:
            place = tl.load(start + row)
            given = token_ids + tl.load(query_start + row)
            known = history + tl.load(row_slot + row).to(tl.int64) * L + place
            sampled = tl.load(sample_slot + row)
            for first in range(0, count, BLOCK):
                i = first + lane
                inside = i < count
                own = tl.load(given + i, mask=inside & staged, other=-1)
                guess = tl.load(known + i, mask=inside & (i > 0) & (staged == 0), other=-1)
                tl.store(draft_ids + begin + i, tl.where(staged, own, guess), mask=inside)
                tl.store(draft_slot + begin + i, sampled, mask=inside)
                tl.store(draft_context + begin + i, place + 1 + i, mask=inside)


def _launch(
    call: OpCall, function: str, constants: Mapping[str, Any], block: int, blocks: int
) -> Sequence[Candidate]:
    rows, pdl = int(call.tensors["row_slot"].shape[0]), "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in call.tensors}
    arguments["rows"] = Scalar(rows, "int32", specialize=False)
    if function == "pack_rows":
        arguments["tokens"] = Scalar(int(call.tensors["token_ids"].shape[0]), "int32", specialize=False)
    launch = DeviceLaunch(
        function=f"makeready.kernels.step.draft_chain_triton:{function}",
        constants={**constants, "BLOCK": block, "PDL": pdl},
        arguments=arguments,
        grid=(blocks, 1, 1),
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)


def _blocks(call: OpCall) -> int:
    return -(-int(call.tensors["row_slot"].shape[0]) // _ROWS)


@cuda_kernel(count_drafts, "rows", invariant=True)
def count_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`count_rows`."""
    null = int(call.tensors["length"].shape[0]) - 1
    return _launch(call, "count_rows", {"NULL": null}, _ROWS, _blocks(call))


@cuda_kernel(next_draft, "rows", invariant=True)
def next_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`place_rows`."""
    history = call.tensors["history"]
    constants = {
        "STEP": call.attrs["step"],
        "BEHIND": call.attrs["behind"],
        "L": history.row_stride,
        "NULL": int(history.shape[0]) - 1,
    }
    return _launch(call, "place_rows", constants, _ROWS, _blocks(call))


@cuda_kernel(pack_drafts, "rows", invariant=True)
def pack_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pack_rows`."""
    history = call.tensors["history"]
    constants = {"L": history.row_stride, "NULL": int(history.shape[0]) - 1}
    return _launch(call, "pack_rows", constants, _TOKENS, int(call.tensors["row_slot"].shape[0]) + 1)
