"""Drafts that count as right or wrong by chance: for measuring what a step costs at a stated acceptance.

T tokens, S slots
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract

WRONG = -2  # no token, and not what stands for one that is not finite


@contract(
    "tokens[T]:int32 draft_slot[T]:int32 draft_context[T]:int32 -> draft_ids[T]:int32",
    tolerance=Tolerance(exact=True),
)
def force_drafts(
    tokens: torch.Tensor, draft_slot: torch.Tensor, draft_context: torch.Tensor, *, share: float
) -> torch.Tensor:
    """Ids that make every draft right with the probability ``share``, whatever it is.

    Draft t, at place ``draft_context[t] - 1`` of the sequence in ``draft_slot[t]``, becomes what was sampled in its
    place, ``tokens[t - 1]``, or :data:`WRONG`. Which of the two is a hash of slot and place: 24 bits of a 32-bit
    mixing function (Wellons's ``lowbias32``), less than ``share * 2**24``.
    """
    x = (draft_slot.long() * 0x9E3779B1 + draft_context.long() * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return torch.where((x >> 8) < int(share * 2**24), tokens.roll(1), WRONG)
