"""Entries of the cache that come to other places: those of the nodes of a tree of drafts that were right.

R rows, S slots, B pages of a row at most, P pages, N tokens of a page, G heads, E numbers of a head, C features
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract

_EXACT = Tolerance(exact=True)


@contract(
    "row_slot[R]:int32 start[R]:int32 line[R,deep]:int32 pages[S,B]:int32 -> source[R*deep]:int32 "
    "target[R*deep]:int32",
    tolerance=_EXACT,
    traffic={"pages": "2*R*deep"},
)
def place_moves(
    row_slot: torch.Tensor,
    start: torch.Tensor,
    line: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
    behind: int,
    deep: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the entries of a row's right nodes lie in the cache, and where they come to lie.

    Node ``line[r, d]``, of :func:`~.draft_tree.accept_tree`, has its entry ``behind`` places before
    ``start[r] + line[r, d]`` and its token at place ``start[r] + d + 1`` of the sequence, to whose entry it belongs.
    What moves nothing has 0 of both.
    """
    source, target = (torch.zeros(line.numel(), dtype=torch.int32) for _ in range(2))
    for at, node in enumerate(line.flatten().tolist()):
        r, d = divmod(at, deep)
        if node == 0 or node == d + 1:
            continue
        own, root = pages[row_slot[r]], int(start[r]) - behind
        for made, place in ((source, root + node), (target, root + d + 1)):
            made[at] = own[place // page_size] * page_size + place % page_size
    return source, target


@contract(
    "source[J]:int32 target[J]:int32 k_cache![P,N,G,E]:C v_cache![P,N,G,E]:C -> ",
    traffic={"k_cache": "2*J*G*E", "v_cache": "2*J*G*E"},
    tolerance=_EXACT,
)
def move_entries(
    source: torch.Tensor, target: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, deep: int
) -> None:
    """Keys and values at ``source[j]`` (page * N + place in the page) come to ``target[j]``, as they were before.

    Nothing moves where the two are equal. Each ``deep`` moves are of one row, and no row has places of another.
    """
    for cache in (k_cache, v_cache):
        _move(cache, source, target)


@contract(
    "source[J]:int32 target[J]:int32 hidden![P,N,C]:A -> ",
    traffic={"hidden": "2*J*C"},
    tolerance=_EXACT,
)
def move_states(source: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, *, deep: int) -> None:
    """:func:`move_entries` of hidden states."""
    _move(hidden, source, target)


def _move(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    moved, flat = source != target, cache.flatten(0, 1)
    flat[target[moved].long()] = flat[source[moved].long()]
