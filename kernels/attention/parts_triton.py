"""Attention of some queries over parts of their keys, computed by different blocks and added by the last one.

A part is left in scratch as unscaled sums, maxima and denominators. The last block to arrive adds the parts
in the order of their keys, so the result does not depend on who was last.

# N rows of a part, D its columns
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def leave_part(
    sums, stats, slot, acc_ND, max_N, sum_N, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write a part to ``slot``: ``sums[slot, ROWS, COLUMNS]`` and ``stats[slot, 2, ROWS]``, fp32."""
    slot = slot.to(tl.int64)
    in_N = n < ROWS
    part_ND = n[:, None] * COLUMNS + d[None, :]
    kept = in_N[:, None] & (d < COLUMNS)[None, :]
    tl.store(sums + slot * (ROWS * COLUMNS) + part_ND, acc_ND, mask=kept, cache_modifier=".cg")
    stat = stats + slot * (2 * ROWS) + n
    tl.store(stat, max_N, mask=in_N, cache_modifier=".cg")
    tl.store(stat + ROWS, sum_N, mask=in_N, cache_modifier=".cg")


@triton.jit
def with_sinks(sum_N, max_N, sinks, head_N, inside):
    """Denominators with the sinks of heads ``head_N``, in fp32; ``sinks`` None leaves them as they are.

    Args:
        max_N: of scores times log2(e), as the sums are taken from them.
    """
    if sinks is not None:
        sink_N = tl.load(sinks + head_N, mask=inside, other=float("-inf")) * LOG2_E
        sum_N += tl.exp2(sink_N - max_N)
    return sum_N


@triton.jit
def is_last(arrived, parts):
    """Whether all ``parts`` of an item, the caller's included, have been left; its counter is then 0 again."""
    # All stores of this block come before its arrival; one thread's release covers them after a barrier.
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == parts - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def add_parts(
    sums, stats, first, rest, step, parts, n, d, sinks, head_N, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Normalised attention ``[N, D]`` of the rows ``n`` and columns ``d``, fp32; see :func:`gather_parts`.

    Args:
        sinks, head_N: see :func:`with_sinks`.
    """
    max_N, sum_N, acc_ND = gather_parts(
        sums, stats, first, rest, step, parts, n, d, ROWS, COLUMNS, AT_ONCE
    )  # fmt: skip
    return acc_ND / with_sinks(sum_N, max_N, sinks, head_N, n < ROWS)[:, None]


@triton.jit
def gather_parts(
    sums, stats, first, rest, step, parts, n, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Maxima, denominators and unscaled sums ``[N, D]`` over all parts, of the rows ``n`` and columns ``d``.

    Args:
        first: slot of part 0; part i > 0 has slot ``rest + i * step``.
        AT_ONCE: parts whose loads are on their way together. No reduction crosses threads.
    """
    max_N = tl.full(n.shape, float("-inf"), tl.float32)
    sum_N = tl.zeros(n.shape, tl.float32)
    in_N = n < ROWS
    kept = in_N[:, None] & (d < COLUMNS)[None, :]
    part_ND = n[:, None] * COLUMNS + d[None, :]
    acc_ND = tl.zeros(part_ND.shape, tl.float32)
    for done in range(0, parts, AT_ONCE):
        maxima, denominators, accs = (), (), ()
        higher_N = max_N
        for i in tl.static_range(AT_ONCE):
            slot = tl.where(done + i == 0, first, rest + (done + i) * step).to(tl.int64)
            there = done + i < parts
            stat = stats + slot * (2 * ROWS) + n
            part_max_N = tl.load(stat, mask=in_N & there, other=float("-inf"), cache_modifier=".cg")
            part_sum_N = tl.load(stat + ROWS, mask=in_N & there, other=0.0, cache_modifier=".cg")
            part = sums + slot * (ROWS * COLUMNS) + part_ND
            own_ND = tl.load(part, mask=kept & there, other=0.0, cache_modifier=".cg")
            # Triton has no (*maxima, part_max_N).
            maxima = maxima + (part_max_N,)  # noqa: RUF005
            denominators = denominators + (part_sum_N,)  # noqa: RUF005
            accs = accs + (own_ND,)  # noqa: RUF005
            higher_N = tl.maximum(higher_N, part_max_N)
        base_N = tl.where(in_N, higher_N, 0.0)  # rows that are padding have no maximum
        shrink_N = tl.exp2(max_N - base_N)
        sum_N *= shrink_N
        acc_ND *= shrink_N[:, None]
        for i in tl.static_range(AT_ONCE):
            weight_N = tl.exp2(maxima[i] - base_N)
            sum_N += weight_N * denominators[i]
            acc_ND += weight_N[:, None] * accs[i]
        max_N = higher_N
    return max_N, sum_N, acc_ND
