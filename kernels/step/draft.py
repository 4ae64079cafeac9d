"""Drafts: tokens that are guessed to come next, run before they are sampled, and kept where they were right.

What a position samples depends on the tokens before it and on the sequence's own noise, never on the batch. So a
draft is right exactly if it equals what its position samples: verification is equality, and whoever drafts well or
badly, the output stays the same.

    T tokens, R rows, S slots (the last is the null slot of padding rows), L tokens of context
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract


@contract(
    "token_ids[T]:int32 row_slot[R]:int32 row_start[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "sample_slot[R]:int32 limit[R]:int32 length[S]:int32 history[S,L]:int32 "
    "-> draft_ids[T]:int32 draft_start[R]:int32 draft_len[R]:int32 draft_slot[T]:int32 draft_context[T]:int32",
    tolerance=Tolerance(exact=True),
    traffic={"history": "R*context", "length": "R"},
)
def draft_ngram(
    token_ids: torch.Tensor,
    row_slot: torch.Tensor,
    row_start: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    sample_slot: torch.Tensor,
    limit: torch.Tensor,
    length: torch.Tensor,
    history: torch.Tensor,
    *,
    ngram_min: int,
    ngram_max: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Guess what follows each row's last token from where its last tokens came before (Saxena 2023, prompt lookup).

    Row r runs at most ``query_len[r]`` tokens of slot ``row_slot[r]``, staged from ``query_start[r]`` on, behind the
    first ``row_start[r]`` of the sequence, or where that is negative behind its ``length``. If the last of them is
    staged (not negative), so is the row, and it is run as it is. Else its first is what was sampled last, and drafts
    follow it: of the earlier places in the sequence behind which the most of its last tokens stand, up to
    ``ngram_max``, the last one; what followed there follows again, over and over where that reaches the end. Without
    a place behind ``ngram_min`` of them there are no drafts. Nor are there any that would bring the sequence beyond
    ``limit[r] - 1`` tokens: the last one that it may have is sampled, and never run.

    Rows are packed: row r runs ``draft_ids[draft_start[r] :][: draft_len[r]]``, its first negative where the device
    has it (see :func:`~.locate.locate`). What is sampled behind token t is for the slot ``draft_slot[t]``,
    ``sample_slot`` of its row, and comes at place ``draft_context[t]`` of the sequence. Tokens of no row have id 0,
    the null slot and place 0; rows of the null slot have no tokens.
    """
    tokens, null = len(token_ids), len(length) - 1
    ids, slots, context = (torch.zeros(tokens, dtype=torch.int32) for _ in range(3))
    slots.fill_(null)
    starts, counts = torch.zeros_like(query_start), torch.zeros_like(query_len)
    end = 0
    for r, slot in enumerate(row_slot.tolist()):
        starts[r] = end
        count = int(query_len[r])
        if slot == null or count == 0:
            continue
        staged = token_ids[int(query_start[r]) :][:count].tolist()
        start = int(row_start[r]) if row_start[r] >= 0 else int(length[slot])
        if staged[-1] < 0:
            most = min(count, int(limit[r]) - 1 - start) - 1
            known = history[slot, : start + 1].tolist()
            staged = [-1, *_followers(known, max(0, most), ngram_min, ngram_max)]
        counts[r] = count = len(staged)
        ids[end : end + count] = torch.tensor(staged, dtype=torch.int32)
        slots[end : end + count] = sample_slot[r]
        context[end : end + count] = torch.arange(start + 1, start + 1 + count, dtype=torch.int32)
        end += count
    return ids, starts, counts, slots, context


def _followers(known: list[int], most: int, ngram_min: int, ngram_max: int) -> list[int]:
    """The ``most`` tokens that followed the longest, last repetition of the end of ``known``; none without one."""
    for size in range(min(ngram_max, len(known) - 1), ngram_min - 1, -1):
        for end in range(len(known) - 1, size - 1, -1):
            if known[end - size : end] == known[len(known) - size :]:
                period = len(known) - end
                return [known[end + i % period] for i in range(most)]
    return []


@contract(
    "token_ids[T]:int32 tokens[T]:int32 row_slot[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "context_len[R]:int32 length![S]:int32 -> drafted[R]:int32 accepted[R]:int32",
    tolerance=Tolerance(exact=True),
    traffic={"length": "R"},
)
def accept_drafts(
    token_ids: torch.Tensor,
    tokens: torch.Tensor,
    row_slot: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    context_len: torch.Tensor,
    length: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's drafts were right; the sequence ends behind them.

    Row r ran ``query_len[r]`` tokens from ``query_start[r]`` on: one that is the sequence's own, and ``drafted[r]``
    drafts. Behind each ``tokens`` were sampled. A draft is right if it equals what was sampled in its place and all
    drafts before it are right; ``accepted[r]`` counts these. With all drafts the row has ``context_len[r]`` tokens:
    the slot's ``length`` becomes that less the wrong ones. The token that was sampled behind the last right one comes
    next, and lies in the history already. Padding rows have 0 of both.
    """
    null = len(length) - 1
    drafted, accepted = torch.zeros_like(query_len), torch.zeros_like(query_len)
    for r, slot in enumerate(row_slot.tolist()):
        count, first = int(query_len[r]), int(query_start[r])
        if slot == null or count == 0:
            continue
        right = token_ids[first + 1 : first + count] == tokens[first : first + count - 1]
        drafted[r] = count - 1
        accepted[r] = int(right.int().cumprod(0).sum())
        length[slot] = context_len[r] - (drafted[r] - accepted[r])
    return drafted, accepted
