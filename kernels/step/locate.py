"""A sequence lives in a slot of the device: its length, its tokens, its pages. A step adds tokens to it.

The host says which slots a step runs and how many tokens of each; :func:`locate` and :func:`find_pages` derive
everything else from what the slots hold. So a step whose length the device decided needs nothing of the host.

    T tokens, R rows, S slots (the last is the null slot of padding rows), L tokens of context,
    B pages of a row at most, G pages that a row may gain in a step
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract


@contract(
    "token_ids[T]:int32 row_slot[R]:int32 row_start[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "length![S]:int32 history![S,L]:int32 "
    "-> ids[T]:int32 positions[T]:int32 token_slot[T]:int32 context_len[R]:int32",
    tolerance=Tolerance(exact=True),
    traffic={"history": "2*T", "length": "2*R"},
)
def locate(
    token_ids: torch.Tensor,
    row_slot: torch.Tensor,
    row_start: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    length: torch.Tensor,
    history: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the tokens of every row behind its sequence; where they come to stand.

    Row r runs ``query_len[r]`` tokens of slot ``row_slot[r]``, found from ``query_start[r]`` on. They follow
    the first ``row_start[r]`` tokens of the sequence, or where that is negative the ``length`` that the slot
    has. Afterwards the slot's ``length`` is ``context_len[r]``, their sum.

    A non-negative ``token_ids[t]`` comes from the host and is recorded in ``history[slot, position]``. A
    negative one means "what the previous step sampled", which was left in that place: the next token never
    passes through the host.

    Rows of the null slot are padding: they have no token, and ``context_len`` 0. Tokens of no row get id 0,
    position 0 and the null slot; they and padding rows may lie anywhere, between others too. No two other rows share
    a slot.
    """
    null = len(length) - 1
    tokens, rows = len(token_ids), row_slot.long()
    live = row_slot != null
    count = torch.where(live, query_len, 0).long()
    start = torch.where(row_start >= 0, row_start, length[rows]).long()
    context_len = torch.where(live, start + count, 0).int()
    row = torch.repeat_interleave(torch.arange(len(rows)), count)
    before = torch.arange(len(row)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    at = query_start.long()[row] + before
    positions, token_slot, ids = (torch.zeros(tokens, dtype=torch.int32) for _ in range(3))
    token_slot.fill_(null)
    positions[at] = (start[row] + before).int()
    token_slot[at] = row_slot[row]
    place = (token_slot[at].long(), positions[at].long())
    ids[at] = torch.where(token_ids[at] >= 0, token_ids[at], history[place])
    history[place] = ids[at]
    length[rows[live]] = context_len[live]
    return ids, positions, token_slot, context_len


@contract(
    "positions[T]:int32 row_slot[R]:int32 query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 "
    "grow_at[R]:int32 grow_page[R,G]:int32 pages![S,B]:int32 -> kv_slot[T]:int32 page_table[R,B]:int32",
    tolerance=Tolerance(exact=True),
    traffic={"pages": "R*(context//page_size+1)"},
)
def find_pages(
    positions: torch.Tensor,
    row_slot: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    grow_at: torch.Tensor,
    grow_page: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give rows the pages that the host adds to them; where their tokens lie in the cache.

    ``grow_page[r, g]``, unless it is 0, becomes entry ``grow_at[r] + g`` of the slot's page list. Then token t
    at position p of row r lies at ``kv_slot[t] = page * page_size + p % page_size``, in the page at
    ``p // page_size`` of the list; tokens of no row, wherever they are (see :func:`locate`), at 0, in the page that
    belongs to nobody. ``page_table[r]`` are the pages of the row's ``context_len[r]`` tokens, 0 beyond.
    """
    null, width = len(pages) - 1, pages.shape[1]
    for r, slot in enumerate(row_slot.tolist()):
        for g, page in enumerate(grow_page[r].tolist()):
            if page and slot != null:
                pages[slot, int(grow_at[r]) + g] = page
    kv_slot = torch.zeros(len(positions), dtype=torch.int32)
    rows = pages[row_slot.long()]
    for r, (start, count) in enumerate(zip(query_start.tolist(), query_len.tolist(), strict=True)):
        if count and int(row_slot[r]) != null:
            at = positions[start : start + count]
            kv_slot[start : start + count] = rows[r, (at // page_size).long()] * page_size + at % page_size
    held = -(-context_len // page_size)
    page_table = torch.where(torch.arange(width) < held.unsqueeze(1), rows, 0).int()
    return kv_slot, page_table
