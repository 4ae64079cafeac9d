"""Attention of trees of drafts: a token sees its row's context, and of the tree behind it its own ancestors.

T tokens, R rows, H query heads, G KV heads, D head size, B pages of a row at most
"""

from __future__ import annotations

import torch

from makeready.kernels.attention.paged import EXTEND_FLOPS, READ, attend
from makeready.kernels.contract import Tolerance, contract


@contract(
    "q[T,heads*head_dim]:A k_cache[P,S,kv_heads,head_dim]:C v_cache[P,S,kv_heads,head_dim]:C page_table[R,B]:int32 "
    "query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 positions[T]:int32 tree_start[R]:int32 "
    "visible[T]:int64 sinks?[heads]:float32 -> y[T,heads*head_dim]:A",
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops=EXTEND_FLOPS,
    rate="q",
    traffic=READ,
)
def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    positions: torch.Tensor,
    tree_start: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """:func:`~.paged.extend_attention` of rows whose tokens are nodes of a tree.

    Row r has at most ``cdiv(T, R)`` queries, from ``query_start[r]`` on, and ``context_len[r]`` places in the cache.
    Query t sees all places before ``tree_start[r]``, or where there is a ``window`` those of them that are above
    ``positions[t] - window``, which are their positions, too. Of the places ``tree_start[r] + i`` it sees those for
    which bit i of ``visible[t]`` is set, its own among them, be there a window or not. What no token of a row sees
    may be anything, a page of others or NaN. Tokens of no row give zeros.
    """
    y = torch.zeros_like(q)
    bits = torch.arange(64)
    for r, (start, count, length) in enumerate(
        zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), strict=True)
    ):
        if count == 0:
            continue
        rows, root, key = slice(start, start + count), int(tree_start[r]), torch.arange(length)
        seen = (key < root).expand(count, -1).clone()
        if window:
            seen &= key > positions[rows, None] - window
        of_tree = (visible[rows, None] >> bits & 1).bool()
        seen[:, root:] = of_tree[:, : length - root]
        pages = page_table[r, : -(-length // k_cache.shape[1])].long()
        unseen = ~seen.any(0)[:, None, None]
        k_LGD, v_LGD = (c[pages].flatten(0, 1)[:length].masked_fill(unseen, 0) for c in (k_cache, v_cache))
        q_NHD = q[rows].unflatten(-1, (heads, head_dim))
        y[rows] = attend(q_NHD, k_LGD, v_LGD, sinks, seen, scale=scale).flatten(1)
    return y
