"""Down the trees of drafts on GPUs: a block a row, a lane a node.

# L tokens of context, DEEP levels behind the root, Q rivals that are reported
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.step.draft_tree import accept_tree, order_results
from makeready.kernels.step.draft_tree_triton import lanes_of, row_launch, size_of

_LANES = 128  # rows and tokens at a time


@triton.jit
def walk_rows(
    ids,
    tokens,
    row_slot,
    start,
    query_start,
    query_len,
    parent,
    length,
    history,
    drafted,
    accepted,
    line,
    order,
    rows,
    all_tokens,
    L: tl.constexpr,
    NODES: tl.constexpr,
    DEEP: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_tree.accept_tree`; the block behind the last row's has the tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if row == rows:
        end = 0
        for first in range(0, rows, BLOCK):
            end += tl.sum(tl.load(query_len + first + lane, mask=first + lane < rows, other=0), 0)
        for first in range(end, all_tokens, BLOCK):
            tl.store(order + first + lane, first + lane, mask=first + lane < all_tokens)
    else:
        slot = tl.load(row_slot + row)
        count = tl.load(query_len + row)
        alive = (slot != NULL) & (count > 0)
        begin = tl.load(query_start + row)
        root = tl.load(start + row)
        known = history + slot.to(tl.int64) * L
        n = tl.arange(0, NODES)
        inside = n < count
        id_N = tl.load(ids + begin + n, mask=inside, other=-1)
        token_N = tl.load(tokens + begin + n, mask=inside, other=-1)
        parent_N = tl.load(parent + n, mask=inside, other=-1)
        order_N = n
        node = 0
        right = 0
        tl.store(known + root, tl.load(ids + begin, mask=alive, other=0), mask=alive)
        for d in tl.static_range(DEEP):
            token = tl.sum(tl.where(n == node, token_N, 0), 0)
            tl.store(known + root + 1 + d, tl.maximum(token, 0), mask=alive & (root + 1 + d < L))
            found = inside & (n > 0) & (parent_N == node) & (id_N == token)
            child = tl.min(tl.where(found, n, NODES), 0)
            alive = alive & (child < NODES)
            order_N = tl.where((n == d + 1) & alive, child, order_N)
            tl.store(line + row * DEEP + d, tl.where(alive, child, 0))
            node = tl.where(alive, child, node)
            right += alive.to(tl.int32)
        token = tl.sum(tl.where(n == node, token_N, 0), 0)
        tl.store(known + root + 1 + DEEP, tl.maximum(token, 0), mask=alive & (root + 1 + DEEP < L))
        tl.store(order + begin + n, begin + order_N, mask=inside)
        tl.store(drafted + row, tl.maximum(count - 1, 0))
        tl.store(accepted + row, right)
        if (slot != NULL) & (count > 0):
            tl.store(length + slot, root + 1 + right)


@triton.jit
def order_tokens(
    order,
    tokens,
    logprob,
    top_ids,
    top_values,
    gained,
    gained_logprob,
    gained_ids,
    gained_values,
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_tree.order_results`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    q = tl.arange(0, WIDE)
    at = tl.load(order + t)
    tl.store(gained + t, tl.load(tokens + at))
    tl.store(gained_logprob + t, tl.load(logprob + at))
    tl.store(gained_ids + t * Q + q, tl.load(top_ids + at * Q + q, mask=q < Q), mask=q < Q)
    tl.store(gained_values + t * Q + q, tl.load(top_values + at * Q + q, mask=q < Q), mask=q < Q)


@cuda_kernel(accept_tree, "rows", invariant=True)
def accept_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`walk_rows`."""
    rows, history = size_of(call, "row_slot"), call.tensors["history"]
    constants = {"L": history.row_stride, "NODES": lanes_of(call), "DEEP": call.attrs["deep"]}
    constants |= {"NULL": int(history.shape[0]) - 1, "BLOCK": _LANES}
    return row_launch(
        call,
        __name__,
        "walk_rows",
        (rows + 1,),
        constants,
        {"rows": rows, "all_tokens": size_of(call, "ids")},
    )


@cuda_kernel(order_results, "rows", invariant=True)
def order_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`order_tokens`."""
    wide = size_of(call, "top_ids", 1)
    return row_launch(
        call, __name__, "order_tokens", (size_of(call, "order"),), {"Q": wide, "WIDE": power_of_two(wide)}
    )
