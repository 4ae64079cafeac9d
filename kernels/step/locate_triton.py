"""Where a step stands in its sequences, on GPUs: a block a row, and one for tokens of no row.

# L tokens of context, B pages of a row at most, G pages that a row may gain
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

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
def used_tokens(row_slot, query_start, query_len, rows, NULL: tl.constexpr, BLOCK: tl.constexpr):
    """Where the last row's tokens end: those behind it belong to no row."""
    used = 0
    for first in range(0, rows, BLOCK):
        r = first + tl.arange(0, BLOCK)
        slot = tl.load(row_slot + r, mask=r < rows, other=NULL)
        start = tl.load(query_start + r, mask=slot != NULL, other=0)
        used = tl.maximum(used, tl.max(start + tl.load(query_len + r, mask=slot != NULL, other=0), axis=0))
    return used


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
    """See :func:`~.locate.locate`. The block behind those of the rows fills in tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if row == rows:
        used = used_tokens(row_slot, query_start, query_len, rows, NULL, BLOCK)
        for first in range(0, tokens, BLOCK):
            t = first + lane
            spare = (t >= used) & (t < tokens)
            tl.store(ids + t, 0, mask=spare)
            tl.store(positions + t, 0, mask=spare)
            tl.store(token_slot + t, NULL, mask=spare)
    else:
        slot = tl.load(row_slot + row)
        if slot == NULL:
            tl.store(context_len + row, 0)
        else:
            start = tl.load(row_start + row)
            if start < 0:
                start = tl.load(length + slot)
            count = tl.load(query_len + row)
            begin = tl.load(query_start + row)
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
    """See :func:`~.locate.find_pages`. The block behind those of the rows fills in tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if row == rows:
        used = used_tokens(row_slot, query_start, query_len, rows, NULL, BLOCK)
        for first in range(0, tokens, BLOCK):
            t = first + lane
            tl.store(kv_slot + t, 0, mask=(t >= used) & (t < tokens))
    else:
        slot = tl.load(row_slot + row)
        held = (tl.load(context_len + row) + SIZE - 1) // SIZE
        own = pages + slot.to(tl.int64) * B
        if slot != NULL:
            at = tl.load(grow_at + row)
            for g in range(G):
                new = tl.load(grow_page + row * G + g)
                tl.store(own + at + g, new, mask=new != 0)
            tl.debug_barrier()  # all see the new pages
            count = tl.load(query_len + row)
            begin = tl.load(query_start + row)
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
