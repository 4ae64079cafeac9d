"""Hidden states of a model in the pages of its cache, for a drafter that is given one with the token behind it.

A page keeps what every one of its tokens has left, so prefixes, retractions and wrong drafts need nothing of their
own: a state is read where it lies, and written over when its place is run again.

    T tokens, S slots, B pages of a row at most, P pages, N tokens of a page, C features, D drafted vocabulary
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract

_EXACT = Tolerance(exact=True)


@contract("x[T,C]:A kv_slot[T]:int32 hidden![P,N,C]:A -> ", traffic={"hidden": "T*C"}, tolerance=_EXACT)
def hidden_write(x: torch.Tensor, kv_slot: torch.Tensor, hidden: torch.Tensor) -> None:
    """Store token t's features at ``kv_slot[t]`` (page * N + place in the page)."""
    hidden.flatten(0, 1)[kv_slot.long()] = x


@contract(
    "kv_slot[T]:int32 hidden[P,N,C]:A -> x[T,C]:A",
    traffic={"hidden": "T*C"},
    tolerance=_EXACT,
    earlier=("hidden",),
)
def hidden_read(kv_slot: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The features at ``kv_slot[t]``."""
    return hidden.flatten(0, 1)[kv_slot.long()]


@contract(
    "positions[T]:int32 token_slot[T]:int32 pages[S,B]:int32 -> prior[T]:int32 kv_slot[T]:int32",
    traffic={"pages": "T"},
    tolerance=_EXACT,
)
def place_before(
    positions: torch.Tensor, token_slot: torch.Tensor, pages: torch.Tensor, *, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The position before each token's, and where it lies in the cache; 0 and nobody's page for the first of a row,
    and for tokens of the null slot.
    """
    live = (positions > 0) & (token_slot != len(pages) - 1)
    prior = torch.where(live, positions - 1, 0)
    page = pages[token_slot.long(), (prior // page_size).long()]
    return prior, torch.where(live, page * page_size + prior % page_size, 0)


@contract(
    "logits[T,D]:float32 d2t[D]:int64 -> y[T,vocabulary]:float32",
    tolerance=_EXACT,
)
def spread_logits(logits: torch.Tensor, d2t: torch.Tensor, *, vocabulary: int) -> torch.Tensor:
    """Logits of a part of the vocabulary in their places of all of it, -inf elsewhere.

    Token d of the part is token ``d + d2t[d]``, as EAGLE-3's checkpoints say it; what is outside is left out.
    """
    y = torch.full((len(logits), vocabulary), float("-inf"), dtype=logits.dtype)
    token = torch.arange(len(d2t)) + d2t
    inside = (token >= 0) & (token < vocabulary)
    y[:, token[inside]] = logits[:, inside]
    return y
