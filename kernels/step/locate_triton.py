"""Where a step stands in its sequences, on GPUs: a block a row, which also fills in the tokens of no row behind it.

Rows are packed in most steps, but not in chains of drafts, where rows that have no draft lie between others
(:func:`~.draft_chain.next_draft`). One more block has what is before all rows.

# L tokens of context, B pages of a row at most, G pages that a row may gain
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
from makeready.kernels.step.locate import find_pages, locate

# Tokens or pages at a time: rows of one token are done in one go, long ones in few. Deterministic plans run
# one kernel in all buckets.
_FEW, _EITHER, _MANY = 128, 256, 1024


@triton.jit
def own_tokens(row, row_slot, query_start, query_len, rows, tokens, NULL: tl.constexpr, BLOCK: tl.constexpr):
    """A row's slot, its first token and how many it has, and from where to where the tokens behind are of no row.

    Behind rows without tokens are none. ``row == rows`` stands before all of them, in the null slot.
    """
    inside = row < rows
    slot = tl.load(row_slot + row, mask=inside, other=NULL)
    begin = tl.load(query_start + row, mask=inside, other=0)
    count = tl.load(query_len + row, mask=inside, other=0)
    count = tl.where(slot == NULL, 0, count)
    end = tl.where(inside, tl.where(count > 0, begin + count, tokens), 0)
    until = tokens
    for first in range(0, rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        other = tl.load(row_slot + r, mask=r < rows, other=NULL)
        start = tl.load(query_start + r, mask=r < rows, other=0)
        length = tl.load(query_len + r, mask=r < rows, other=0)
        behind = (other != NULL) & (length > 0) & (start >= end)
        until = tl.minimum(until, tl.min(tl.where(behind, start, tokens), 0))
    return slot, begin, count, end, until


@triton.jit
def locate_rows(
    token_ids,
    row_slot,
    row_start,
    query_start,
    query_len,
    length,
    history,
    ids,
    positions,
    token_slot,
    context_len,
    rows,
    tokens,
    L: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.locate.locate`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    slot, begin, count, end, until = own_tokens(
        row, row_slot, query_start, query_len, rows, tokens, NULL, BLOCK
    )  # fmt: skip
    for first in range(end, until, BLOCK):
        t = first + lane
        tl.store(ids + t, 0, mask=t < until)
        tl.store(positions + t, 0, mask=t < until)
        tl.store(token_slot + t, NULL, mask=t < until)
    if slot == NULL:
        tl.store(context_len + row, 0, mask=row < rows)
    else:
        start = tl.load(row_start + row)
        if start < 0:
            start = tl.load(length + slot)
        tl.store(context_len + row, start + count)
        past = history + slot.to(tl.int64) * L + start
        for first in range(0, count, BLOCK):
            i = first + lane
            inside = i < count
            staged = tl.load(token_ids + begin + i, mask=inside, other=0)
            sampled = tl.load(past + i, mask=inside & (staged < 0), other=0)
            token = tl.where(staged < 0, sampled, staged)
            tl.store(past + i, token, mask=inside & (staged >= 0))
            tl.store(ids + begin + i, token, mask=inside)
            tl.store(positions + begin + i, start + i, mask=inside)
            tl.store(token_slot + begin + i, slot, mask=inside)
        tl.debug_barrier()  # all have read the length before it changes
        tl.store(length + slot, start + count)


@cuda_kernel(locate, "rows", invariant=True)
def locate_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`locate_rows`."""
    history = call.tensors["history"]
    return _launch(call, "locate_rows", {"L": history.row_stride}, slots=history.shape[0])


@triton.jit
def find_page_rows(
    positions,
    row_slot,
    query_start,
    query_len,
    context_len,
    grow_at,
    grow_page,
    pages,
    kv_slot,
    page_table,
    rows,
    tokens,
    G: tl.constexpr,
    B: tl.constexpr,
    SIZE: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.locate.find_pages`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    slot, begin, count, end, until = own_tokens(
        row, row_slot, query_start, query_len, rows, tokens, NULL, BLOCK
    )  # fmt: skip
    for first in range(end, until, BLOCK):
        t = first + lane
        tl.store(kv_slot + t, 0, mask=t < until)
    if row < rows:
        held = (tl.load(context_len + row) + SIZE - 1) // SIZE
        own = pages + slot.to(tl.int64) * B
        if slot != NULL:
            at = tl.load(grow_at + row)
            for g in range(G):
                new = tl.load(grow_page + row * G + g)
                tl.store(own + at + g, new, mask=new != 0)
            tl.debug_barrier()  # all see the new pages
            for first in range(0, count, BLOCK):
                i = first + lane
                inside = i < count
                position = tl.load(positions + begin + i, mask=inside, other=0)
                page = tl.load(own + position // SIZE, mask=inside, other=0)
                tl.store(kv_slot + begin + i, page * SIZE + position % SIZE, mask=inside)
        for first in range(0, B, BLOCK):
            b = first + lane
            page = tl.load(own + b, mask=b < held, other=0)
            tl.store(page_table + row.to(tl.int64) * B + b, page, mask=b < B)


@cuda_kernel(find_pages, "rows", invariant=True)
def find_pages_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`find_page_rows`."""
    slots, width = call.tensors["pages"].shape
    constants: dict[str, Any] = {
        "G": call.tensors["grow_page"].shape[1],
        "B": width,
        "SIZE": call.attrs["page_size"],
    }
    return _launch(call, "find_page_rows", constants, slots=slots)


def _launch(
    call: OpCall, function: str, constants: Mapping[str, Any], *, slots: int | str
) -> Sequence[Candidate]:
    rows, pdl = call.tensors["row_slot"].shape[0], "pdl" in call.features
    tokens = call.tensors["positions"].shape[0]
    block = _FEW if call.tokens == call.rows else _MANY
    constants = {
        **constants,
        "NULL": int(slots) - 1,
        "BLOCK": _EITHER if call.invariant else block,
        "PDL": pdl,
    }
    arguments: dict[str, Argument] = {name: Pointer(name) for name in call.tensors}
    arguments |= {
        "rows": Scalar(int(rows), "int32", specialize=False),
        "tokens": Scalar(int(tokens), "int32", specialize=False),
    }
    launch = DeviceLaunch(
        function=f"makeready.kernels.step.locate_triton:{function}",
        constants=constants,
        arguments=arguments,
        grid=(int(rows) + 1, 1, 1),
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)
