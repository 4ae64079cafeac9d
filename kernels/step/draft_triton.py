"""Drafts on GPUs: a block a row looks for n-grams, then one packs them; a warp a row counts which were right.

# L tokens of context
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.step.draft import accept_drafts, draft_ngram

_PLACES = 1024  # of a sequence that a block compares at a time
_TOKENS, _DRAFTS = 128, 32  # of a row, or rows before it, at a time: of any row, of one that only has drafts


@triton.jit
def find_ngrams(
    token_ids,
    row_slot,
    row_start,
    query_start,
    query_len,
    limit,
    length,
    history,
    found,
    counts,
    L: tl.constexpr,
    NULL: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many tokens a row runs, and where what its drafts repeat begins in it: 0 for none, -1 if it is staged."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slot + row)
    count = tl.load(query_len + row)
    end = -1
    if slot == NULL:
        count = 0
    last = tl.load(token_ids + tl.load(query_start + row) + tl.maximum(count, 1) - 1)
    if (count > 0) & (last < 0):
        start = tl.load(row_start + row)
        if start < 0:
            start = tl.load(length + slot)
        end = 0
        count = tl.minimum(count, tl.load(limit + row) - 1 - start)
        if count > 1:
            known = history + slot.to(tl.int64) * L
            best = tl.zeros((BLOCK,), tl.int64)
            for first in range(1, start + 1, BLOCK):
                place = first + tl.arange(0, BLOCK)
                same = tl.zeros((BLOCK,), tl.int32)
                going = place <= start
                for back in tl.static_range(LONGEST):
                    going = going & (place > back)
                    token = tl.load(known + place - 1 - back, mask=going, other=-1)
                    going = going & (token == tl.load(known + tl.maximum(start - back, 0)))
                    same += going.to(tl.int32)
                # The longest first, of these the last.
                key = (same.to(tl.int64) << 32) | place.to(tl.int64)
                best = tl.maximum(best, tl.where(same >= SHORTEST, key, 0))
            end = (tl.max(best, 0) & 0xFFFFFFFF).to(tl.int32)
        count = tl.where(end > 0, count, 1)
    tl.store(found + row, end)
    tl.store(counts + row, count)


@triton.jit
def pack_drafts(
    token_ids,
    row_slot,
    row_start,
    query_start,
    sample_slot,
    length,
    history,
    draft_ids,
    draft_start,
    draft_len,
    draft_slot,
    draft_context,
    found,
    counts,
    rows,
    tokens,
    L: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft.draft_ngram`. The block behind those of the rows fills in tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    begin = 0
    for first in range(0, row, BLOCK):
        begin += tl.sum(tl.load(counts + first + lane, mask=first + lane < row, other=0), 0)
    if row == rows:
        for first in range(begin, tokens, BLOCK):
            t = first + lane
            tl.store(draft_ids + t, 0, mask=t < tokens)
            tl.store(draft_slot + t, NULL, mask=t < tokens)
            tl.store(draft_context + t, 0, mask=t < tokens)
    else:
        count = tl.load(counts + row)
        tl.store(draft_start + row, begin)
        tl.store(draft_len + row, count)
        if count > 0:
            slot = tl.load(row_slot + row)
            start = tl.load(row_start + row)
            if start < 0:
                start = tl.load(length + slot)
            end = tl.load(found + row)
            staged = token_ids + tl.load(query_start + row)
            known = history + slot.to(tl.int64) * L
            period = tl.maximum(start + 1 - end, 1)
            sampled = tl.load(sample_slot + row)
            for first in range(0, count, BLOCK):
                i = first + lane
                inside = i < count
                given = tl.load(staged + i, mask=inside & (end < 0), other=-1)
                guess = tl.load(known + end + (i - 1) % period, mask=inside & (end >= 0) & (i > 0), other=-1)
                tl.store(draft_ids + begin + i, tl.where(end < 0, given, guess), mask=inside)
                tl.store(draft_slot + begin + i, sampled, mask=inside)
                tl.store(draft_context + begin + i, start + 1 + i, mask=inside)


@cuda_kernel(draft_ngram, "rows", invariant=True)
def draft_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`find_ngrams` and :func:`pack_drafts`."""
    rows, tokens = (int(call.tensors[name].shape[0]) for name in ("row_slot", "token_ids"))
    pdl, null = "pdl" in call.features, int(call.tensors["length"].shape[0]) - 1
    stride = call.tensors["history"].row_stride
    scratch: dict[str, Argument] = {"found": Scratch(0, "int32"), "counts": Scratch(4 * rows, "int32")}
    read = ("token_ids", "row_slot", "row_start", "query_start", "length", "history")
    known: dict[str, Argument] = {name: Pointer(name) for name in read}
    first = DeviceLaunch(
        function="makeready.kernels.step.draft_triton:find_ngrams",
        constants={
            "L": stride,
            "NULL": null,
            "SHORTEST": call.attrs["ngram_min"],
            "LONGEST": call.attrs["ngram_max"],
            "BLOCK": _PLACES,
            "PDL": pdl,
        },
        arguments=known | scratch | {"query_len": Pointer("query_len"), "limit": Pointer("limit")},
        grid=(rows, 1, 1),
        num_warps=8,
        dependent=pdl,
    )
    made = ("sample_slot", "draft_ids", "draft_start", "draft_len", "draft_slot", "draft_context")
    second = DeviceLaunch(
        function="makeready.kernels.step.draft_triton:pack_drafts",
        constants={"L": stride, "NULL": null, "BLOCK": _TOKENS, "PDL": pdl},
        arguments={
            **known,
            **scratch,
            **{name: Pointer(name) for name in made},
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(tokens, "int32", specialize=False),
        },
        grid=(rows + 1, 1, 1),
        dependent=pdl,
    )
    return (Candidate("rows", (first, second), scratch=8 * rows),)


@triton.jit
def count_accepted(
    token_ids,
    sampled,
    row_slot,
    query_start,
    query_len,
    context_len,
    length,
    drafted,
    accepted,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft.accept_drafts`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    slot = tl.load(row_slot + row)
    count = tl.load(query_len + row)
    drafts, right = 0, 0
    if (slot != NULL) & (count > 0):
        drafts = count - 1
        begin = tl.load(query_start + row)
        right = drafts
        for first in range(0, drafts, BLOCK):
            i = first + tl.arange(0, BLOCK)
            guess = tl.load(token_ids + begin + 1 + i, mask=i < drafts, other=0)
            truth = tl.load(sampled + begin + i, mask=i < drafts, other=0)
            right = tl.minimum(right, tl.min(tl.where(guess == truth, drafts, i), 0))
        tl.store(length + slot, tl.load(context_len + row) - (drafts - right))
    tl.store(drafted + row, drafts)
    tl.store(accepted + row, right)


@cuda_kernel(accept_drafts, "rows", invariant=True)
def accept_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`count_accepted`."""
    rows, pdl = int(call.tensors["row_slot"].shape[0]), "pdl" in call.features
    null = int(call.tensors["length"].shape[0]) - 1
    arguments: dict[str, Argument] = {n: Pointer(n) for n in call.tensors if n != "tokens"}
    launch = DeviceLaunch(
        function="makeready.kernels.step.draft_triton:count_accepted",
        constants={"NULL": null, "BLOCK": _DRAFTS, "PDL": pdl},
        arguments=arguments | {"sampled": Pointer("tokens")},
        grid=(rows, 1, 1),
        num_warps=1,
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)
