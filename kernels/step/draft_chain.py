"""Drafts one after the other: where each token of a chain stands, and all packed for the step that checks them.

What a chain draws is left in the history behind the sequence, where the model's own tokens come later.

    T tokens, R rows, S slots (the last is the null slot of padding rows), L tokens of context
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract

_EXACT = Tolerance(exact=True)


@contract(
    "token_ids[T]:int32 row_slot[R]:int32 row_start[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "limit[R]:int32 length[S]:int32 -> start[R]:int32 drafts[R]:int32",
    tolerance=_EXACT,
    traffic={"token_ids": "R", "length": "R"},
)
def count_drafts(
    token_ids: torch.Tensor,
    row_slot: torch.Tensor,
    row_start: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    limit: torch.Tensor,
    length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row starts, and how many drafts it may have.

    Rows are staged as for :func:`~.draft.draft_ngram`: a row whose last token is staged has none; nor are there any
    that would bring the sequence beyond ``limit[r] - 1`` tokens. Rows of the null slot, or without tokens, have 0 of
    both.
    """
    start, drafts = torch.zeros_like(row_slot), torch.zeros_like(row_slot)
    for r, slot in enumerate(row_slot.tolist()):
        count = int(query_len[r])
        if slot == len(length) - 1 or count == 0:
            continue
        start[r] = row_start[r] if row_start[r] >= 0 else length[slot]
        if token_ids[int(query_start[r]) + count - 1] < 0:
            drafts[r] = max(0, min(count, int(limit[r] - 1 - start[r])) - 1)
    return start, drafts


@contract(
    "row_slot[R]:int32 sample_slot[R]:int32 start[R]:int32 drafts[R]:int32 history[S,L]:int32 -> "
    "ids[R]:int32 positions[R]:int32 chain_slot[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "context_len[R]:int32 draw_slot[R]:int32 draw_context[R]:int32",
    tolerance=_EXACT,
    traffic={"history": "R"},
)
def next_draft(
    row_slot: torch.Tensor,
    sample_slot: torch.Tensor,
    start: torch.Tensor,
    drafts: torch.Tensor,
    history: torch.Tensor,
    *,
    step: int,
    behind: int,
) -> tuple[torch.Tensor, ...]:
    """The token that each row runs in step ``step`` of a chain, behind which its draft of that number is drawn.

    It is the one at place ``start[r] + step`` of the history: the sequence's own last token, then the draft before.
    A drafter has it at ``positions[r]``, ``behind`` places before that, as the last of ``context_len[r]``. Its
    successor is drawn for slot ``draw_slot[r]`` and comes at place ``draw_context[r]``. Rows that have no such draft
    are padding: the null slot, and 0 of all else but ``query_start``, which counts rows.
    """
    null = len(history) - 1
    live = step < drafts
    place = torch.where(live, start + step, 0)
    chain_slot = torch.where(live, row_slot, null)
    ids = torch.where(live, history[chain_slot.long(), place.long()], 0)
    positions = torch.where(live, (place - behind).clamp_min(0), 0)
    context = torch.where(live, positions + 1, 0)
    draw_slot = torch.where(live, sample_slot, null)
    draw_context = torch.where(live, place + 1, 0)
    rows = torch.arange(len(row_slot), dtype=torch.int32)
    return ids, positions, chain_slot, rows, live.int(), context, draw_slot, draw_context


@contract(
    "token_ids[T]:int32 row_slot[R]:int32 query_start[R]:int32 query_len[R]:int32 sample_slot[R]:int32 "
    "start[R]:int32 drafts[R]:int32 history[S,L]:int32 "
    "-> draft_ids[T]:int32 draft_start[R]:int32 draft_len[R]:int32 draft_slot[T]:int32 draft_context[T]:int32",
    tolerance=_EXACT,
    traffic={"history": "T"},
)
def pack_drafts(
    token_ids: torch.Tensor,
    row_slot: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    sample_slot: torch.Tensor,
    start: torch.Tensor,
    drafts: torch.Tensor,
    history: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row's tokens with its drafts, packed as :func:`~.draft.draft_ngram` packs them.

    A row whose last token is staged runs those that are staged; any other its own, -1, and the ``drafts[r]`` behind
    place ``start[r]`` of its history.
    """
    tokens, null = len(token_ids), len(history) - 1
    ids, slots, context = (torch.zeros(tokens, dtype=torch.int32) for _ in range(3))
    slots.fill_(null)
    starts, counts = torch.zeros_like(query_start), torch.zeros_like(query_len)
    end = 0
    for r, slot in enumerate(row_slot.tolist()):
        starts[r] = end
        if slot == null or query_len[r] == 0:
            continue
        first = int(start[r])
        row = token_ids[int(query_start[r]) :][: int(query_len[r])].tolist()
        if row[-1] < 0:
            row = [-1, *history[slot, first + 1 : first + 1 + int(drafts[r])].tolist()]
        counts[r] = count = len(row)
        ids[end : end + count] = torch.tensor(row, dtype=torch.int32)
        slots[end : end + count] = sample_slot[r]
        context[end : end + count] = torch.arange(first + 1, first + 1 + count, dtype=torch.int32)
        end += count
    return ids, starts, counts, slots, context
