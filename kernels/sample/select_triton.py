"""The threshold of top-k, and of top-p after it, for one row, found by one block without sorting.

Filters keep what lies above a threshold, so thresholds are found by weighing: the weight of the tokens from
a pivot up (their number, or their integer mass) either reaches what is needed or does not. The largest
pivot that reaches it is the threshold, whatever path led there: results do not depend on the path.

Weighing all of a vocabulary takes a block 20 to 60 µs, so most of it is never looked at again. The first
launch left the *peak*, the largest logit, of every group of tokens; a group whose peak is below the pivot
weighs nothing. Sweeps go over a *list* of the groups that matter, and once few enough tokens are left
between the bounds, these are copied together and held in registers.

Pivots are order keys (numeric_triton.py) in int64, since one past the largest must exist.

# V vocabulary
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from makeready.kernels.sample.numeric_triton import LOWEST, from_key, gaps, masses, order_key


@triton.jit
def peak_keys(peaks, all_groups, at, WIDTH: tl.constexpr):
    """Order keys of the ``WIDTH`` peaks from ``at`` on, LOWEST beyond the last group."""
    g = at + tl.arange(0, WIDTH)
    key = order_key(tl.load(peaks + g, mask=g < all_groups, other=0.0))
    return tl.where(g < all_groups, key, LOWEST)


@triton.jit
def group_pivot(peaks, all_groups, wanted, WIDTH: tl.constexpr):
    """A pivot that at least ``wanted`` groups reach, and at most twice as many unless many are equal."""
    keys = peak_keys(peaks, all_groups, 0, WIDTH)
    low = tl.full((), LOWEST, tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1
    reached = 2 * wanted + 1
    while (high - low > 1) & (reached > 2 * wanted):
        pivot = (low + high) >> 1
        count = tl.sum((keys >= pivot.to(tl.int32)).to(tl.int32), 0)
        if count >= wanted:
            low = pivot
            reached = count
        else:
            high = pivot
    return low


@triton.jit
def list_groups(peaks, all_groups, pivot, groups, WIDTH: tl.constexpr):
    """Write the numbers of the groups that reach ``pivot`` to ``groups``; gives how many they are."""
    listed = 0
    tl.debug_barrier()  # nobody reads the former list any more
    for at in range(0, all_groups, WIDTH):
        g = at + tl.arange(0, WIDTH)
        chosen = (peak_keys(peaks, all_groups, at, WIDTH) >= pivot.to(tl.int32)) & (g < all_groups)
        place = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(groups + listed + place - 1, g, mask=chosen)
        listed += tl.max(place, 0)
    tl.debug_barrier()
    return listed


@triton.jit
def listed_logits(z_row, groups, listed, at, V, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Logits and ids of the tokens of ``TILE`` groups of the list from its place ``at`` on; V and more: no token.

    Sweeps load one tile ahead, or each would wait for two memory latencies in a row.
    """
    place = at + tl.arange(0, TILE)
    group = tl.load(groups + place, mask=place < listed, other=V)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.load(z_row + ids, mask=ids < V, other=float("-inf")), ids


@triton.jit
def weigh(
    z_row, groups, listed, pivot, by_count, largest, heat, V, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Number of the listed tokens from ``pivot`` up, and their weight."""
    count = tl.zeros((TILE, GROUP), tl.int32)
    weight = tl.zeros((TILE, GROUP), tl.int64)
    next_z, next_ids = listed_logits(z_row, groups, listed, 0, V, GROUP, TILE)
    for at in range(0, listed, TILE):
        z, ids = next_z, next_ids
        next_z, next_ids = listed_logits(z_row, groups, listed, at + TILE, V, GROUP, TILE)
        above = (ids < V) & (order_key(z) >= pivot.to(tl.int32))
        count += above.to(tl.int32)
        each = tl.where(by_count, 1, masses(gaps(z, largest, heat)))
        weight += tl.where(above, each, 0)
    return tl.sum(count), tl.sum(weight)


@triton.jit
def threshold(
    z_row, groups, listed, kept, low, count_low, high, count_high, weight_high, needed, by_count,
    largest, heat, V, GROUP: tl.constexpr, TILE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The largest pivot whose weight is ``needed`` or more.

    Args:
        kept: scratch for KEPT order keys.
        low, count_low: a pivot that reaches what is needed, and the number of tokens from it up.
        high, count_high, weight_high: one that does not, or one past the largest logit, and what it weighs.
        needed: float64.
        by_count: whether a token weighs 1, else its mass.
    """
    while (count_low - count_high > KEPT) & (high - low > 1):
        pivot = (low + high) >> 1
        count, weight = weigh(z_row, groups, listed, pivot, by_count, largest, heat, V, GROUP, TILE)
        if weight.to(tl.float64) >= needed:
            low = pivot
            count_low = count
        else:
            high = pivot
            count_high = count
            weight_high = weight
    if high - low > 1:
        tl.debug_barrier()
        filled = 0
        for at in range(0, listed, TILE):
            z, ids = listed_logits(z_row, groups, listed, at, V, GROUP, TILE)
            key = tl.reshape(order_key(z), (TILE * GROUP,))
            inside = tl.reshape(ids < V, (TILE * GROUP,))
            inside = inside & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
            place = filled + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(kept + place, key, mask=inside)
            filled += tl.sum(inside.to(tl.int32), 0)
        tl.debug_barrier()
        n = tl.arange(0, KEPT)
        key = tl.load(kept + n, mask=n < filled, other=LOWEST)
        each = tl.where(by_count, 1, masses(gaps(from_key(key), largest, heat)))
        each = tl.where(n < filled, each, 0)
        while high - low > 1:
            pivot = (low + high) >> 1
            weight = weight_high + tl.sum(tl.where(key >= pivot.to(tl.int32), each, 0), 0)
            if weight.to(tl.float64) >= needed:
                low = pivot
            else:
                high = pivot
    return low
