"""Decode attention on the GPU: one query token a row, its cached context streamed once.

The work of a step is all (row, KV head) *items*, each cut into tiles of ``BN`` keys. All tiles lie in one
line, item after item, and every block takes an equal share of that line, whatever the rows' lengths: one row
of 32,000 tokens and 256 rows of 100 keep all multiprocessors busy to the end, with a launch that depends on
the bucket alone. A block whose share covers an item entirely writes its result; where a boundary cuts an
item, each block leaves its part (unscaled sums, maxima, denominators) in scratch and the last to arrive adds
the parts in the order of their tiles, so the result does not depend on who was last.

A block knows its share before the kernels ahead of it are done, and all keys and values but the last token's are
there: it asks for its first tile while it waits. More than one tile took longer in whole steps.

# R rows, G KV heads, N query heads a KV head (padded to 16, the tensor core's height), D head size
# (padded to a power of two), B pages of a row, S tokens of a page, L tokens of a tile
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.paged import decode_attention
from makeready.kernels.attention.pages_triton import as_queries, pages_of, slots_of
from makeready.kernels.attention.parts_triton import add_parts, is_last, leave_part, with_sinks
from makeready.kernels.attention.scaled import decode_attention_scaled
from makeready.kernels.attention.scales_triton import (
    load_numbers,
    load_scales,
    scaled_scores,
    scaled_weights,
    unscaled,
)
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.prefetch_triton import prefetch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES

_AT_ONCE = 8192  # sums that the last block of an item reads at once: 64 registers of a thread


@triton.jit
def decode_attention_tiles(
    q,
    k_cache,
    v_cache,
    scales,
    page_table,
    context_len,
    sinks,
    y,
    sums,
    stats,
    arrived,
    rows,
    table_stride,
    q_stride,
    y_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module. Any number of blocks works.

    Args:
        scales: fp16, see :mod:`~.scaled`, and BITS of a number; None and 0 where numbers have none.
        sinks: fp32 logits of heads that join denominators, or None.
        sums: fp32 scratch ``[2 * blocks, GROUP, HEAD_DIM]``.
        stats: fp32 scratch ``[2 * blocks, 2, GROUP]``: maxima of the scaled scores, denominators.
        arrived: int32 zeros ``[rows * KV_HEADS]``, zeros again at the end.
        scale: of scores, times log2(e).
        R: ``rows`` or more, a power of two.
        N, D: ``GROUP``, ``HEAD_DIM`` or more, powers of two; N at least 16.
        AHEAD: bring a block's first tile to L2 while the kernels before still run.
    """
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(0)
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    row_R = tl.arange(0, R)
    # Lengths and pages are there before the kernel starts: they are among what it reads early.
    length_R = tl.load(context_len + row_R, mask=row_R < rows, other=0)
    first_R = length_R * 0
    if WINDOW > 0:
        first_R = tl.maximum(length_R - WINDOW, 0) // L
    tiles_R = tl.cdiv(length_R, L) - first_R
    end_R = tl.cumsum(tiles_R, 0) * KV_HEADS
    total = tl.max(end_R, 0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    mine = block * share
    at = mine
    stop = tl.minimum(mine + share, total)
    row, length, first, tiles, head, begin = _item(at, end_R, row_R, context_len, rows, KV_HEADS, WINDOW, L)
    if PDL:
        if AHEAD and at < stop:
            prefetch_tile(
                k_cache, v_cache, page_table + row.to(tl.int64) * table_stride, head, length, first + at - begin,
                KV_HEADS, HEAD_DIM // 2 if BITS == 4 else HEAD_DIM, PAGE, L,
            )  # fmt: skip
        gdc_wait()

    while at < stop:
        end = begin + tiles
        upto = tl.minimum(end, stop)

        is_q = (n < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        head_ND = (head * GROUP + n)[:, None] * HEAD_DIM + d[None, :]
        q_ND = tl.load(q + row.to(tl.int64) * q_stride + head_ND, mask=is_q, other=0.0)
        pages = page_table + row.to(tl.int64) * table_stride
        max_N, sum_N, acc_ND = attend_tiles(
            as_queries(q_ND, k_cache), k_cache, v_cache, scales, pages, head, length, length - WINDOW, None, 0, None,
            scale, first + at - begin, first + upto - begin, KV_HEADS, HEAD_DIM, BITS, PAGE, WINDOW, N, D, L,
        )  # fmt: skip

        out = y + row.to(tl.int64) * y_stride
        if upto - at == tiles:
            sum_N = with_sinks(sum_N, max_N, sinks, head * GROUP + n, n < GROUP)
            tl.store(out + head_ND, (acc_ND / sum_N[:, None]).to(y.dtype.element_ty), mask=is_q)
        else:
            # The first part of a share has slot 0, a later one (only the last can be a part) slot 1.
            slot = 2 * block + (at > mine).to(tl.int32)
            leave_part(sums, stats, slot, acc_ND, max_N, sum_N, n, d, GROUP, HEAD_DIM)
            oldest = begin // share
            parts = (end - 1) // share - oldest + 1
            if is_last(arrived + row * KV_HEADS + head, parts):
                # Of the oldest block it is the last part of a share, of all others the first.
                part = 2 * oldest + (begin > oldest * share).to(tl.int32)
                h = tl.arange(0, triton.next_power_of_2(GROUP))
                y_HD = add_parts(
                    sums, stats, part, 2 * oldest, 2, parts, h, d, sinks, head * GROUP + h,
                    GROUP, HEAD_DIM, AT_ONCE,
                )  # fmt: skip
                at_HD = (head * GROUP + h)[:, None] * HEAD_DIM + d[None, :]
                is_y = (h < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                tl.store(out + at_HD, y_HD.to(y.dtype.element_ty), mask=is_y)
        at = upto
        row, length, first, tiles, head, begin = _item(
            at, end_R, row_R, context_len, rows, KV_HEADS, WINDOW, L
        )

    idle = block
    while idle < rows:
        if tl.load(context_len + idle) == 0:
            out = y + idle.to(tl.int64) * y_stride
            for head in range(KV_HEADS):
                is_q = (n < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                head_ND = (head * GROUP + n)[:, None] * HEAD_DIM + d[None, :]
                tl.store(out + head_ND, tl.zeros((N, D), y.dtype.element_ty), mask=is_q)
        idle += tl.num_programs(0)


@triton.jit
def _item(at, end_R, row_R, context_len, rows, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, L: tl.constexpr):
    """The item of tile ``at``: row, its length, its first tile that is seen, its tiles from there, head, and where
    they begin in the line of all. Behind the end of the line it is some item.
    """
    row = tl.minimum(tl.sum((end_R <= at).to(tl.int32), 0), rows - 1)
    length = tl.load(context_len + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // L
    tiles = tl.cdiv(length, L) - first
    begin = tl.sum(tl.where(row_R == row, end_R, 0), 0) - tiles * KV_HEADS
    head = (at - begin) // tl.maximum(tiles, 1)
    return row, length, first, tiles, head, begin + head * tiles


@triton.jit
def prefetch_tile(
    k_cache, v_cache, pages, head, length, tile, KV_HEADS: tl.constexpr, ROW: tl.constexpr,
    PAGE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Ask for the keys and values of a tile, ROW elements of a head, to come to L2.

    Past the row's last token for that one again.
    """
    NBYTES: tl.constexpr = ROW * k_cache.dtype.element_ty.primitive_bitwidth // 8
    token_L = tl.minimum(tile * L + tl.arange(0, L), length - 1)
    slot_L = tl.load(pages + token_L // PAGE).to(tl.int64) * PAGE + token_L % PAGE
    at_L = (slot_L * KV_HEADS + head) * ROW
    prefetch(k_cache + at_L, NBYTES)
    prefetch(v_cache + at_L, NBYTES)


@triton.jit
def _either(one, other):
    return one | other


@triton.jit
def attend_tiles(
    q_ND,
    k_cache,
    v_cache,
    scales,
    pages,
    head,
    length,
    oldest,
    position_N,
    root,
    visible_N,
    scale,
    tile,
    last,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
):
    """Maxima, denominators and unscaled sums of the queries over tiles ``tile : last`` of one item.

    Args:
        oldest: first token that one of them sees, where there is a ``WINDOW``.
        position_N: of each query in its row, or None where all see what is before ``length``.
        root, visible_N: where a tree begins, and what each query sees of it, a bit a place; None without a tree.
    """
    l = tl.arange(0, L)  # noqa: E741
    max_N = tl.full((N,), float("-inf"), tl.float32)
    # A thread adds up its own columns; the sum over all of them waits until the end.
    sum_NL = tl.zeros((N, L), tl.float32)
    acc_ND = tl.zeros((N, D), tl.float32)
    if BITS == 4:
        offset_NL = tl.zeros((N, L), tl.float32)
    # Page numbers are read one tile ahead, or each tile would wait for two memory latencies in a row.
    page = pages_of(pages, tile * L, length, PAGE, L)
    if visible_N is not None:
        some = tl.reduce(visible_N, 0, _either)
    for i in range(tile, last):
        start = i * L
        slot_L = slots_of(page, start, PAGE, L)
        seen_L = start + l < length
        if WINDOW > 0:
            seen_L &= start + l >= oldest
        if visible_N is not None:
            bit_L = tl.minimum(tl.maximum(start + l - root, 0), 63)
            seen_L &= (start + l < root) | ((some >> bit_L) & 1 != 0)
        # Slots that hold no token may hold NaN: they are not read.
        head_L = slot_L * KV_HEADS + head
        k_LD = load_numbers(k_cache, head_L, seen_L, HEAD_DIM, D, L, BITS)
        v_LD = load_numbers(v_cache, head_L, seen_L, HEAD_DIM, D, L, BITS)
        if BITS > 0:
            k_scale_L, k_offset_L, v_scale_L, v_offset_L = load_scales(scales, head_L, seen_L, BITS)
        page = pages_of(pages, start + L, length, PAGE, L)
        score_NL = tl.dot(q_ND, k_LD.to(q_ND.dtype).T)
        if BITS > 0:
            score_NL = scaled_scores(score_NL, q_ND, k_scale_L, k_offset_L, BITS)
        if position_N is None:
            score_NL = tl.where(seen_L[None, :], score_NL * scale, float("-inf"))
        else:
            if visible_N is None:
                seen_NL = (start + l)[None, :] <= position_N[:, None]
            else:
                seen_NL = (start + l < root)[None, :] & (position_N >= 0)[:, None]
            if WINDOW > 0:
                seen_NL &= (start + l)[None, :] > position_N[:, None] - WINDOW
            if visible_N is not None:
                own_NL = (visible_N[:, None] >> bit_L[None, :]) & 1 != 0
                seen_NL = (seen_NL | ((start + l >= root)[None, :] & own_NL)) & seen_L[None, :]
            # Finite, as in extend_steps_triton.py: a query may see nothing of a tile.
            score_NL = tl.where(seen_NL, score_NL * scale, -1e30)
        higher_N = tl.maximum(max_N, tl.max(score_NL, 1))
        p_NL = tl.exp2(score_NL - higher_N[:, None])
        shrink_N = tl.exp2(max_N - higher_N)
        sum_NL = sum_NL * shrink_N[:, None] + p_NL
        if BITS == 4:
            offset_NL = offset_NL * shrink_N[:, None] + p_NL * v_offset_L[None, :]
        if BITS > 0:
            p_NL = scaled_weights(p_NL, v_scale_L, BITS)
        acc_ND = tl.dot(p_NL.to(q_ND.dtype), v_LD.to(q_ND.dtype), acc_ND * shrink_N[:, None])
        max_N = higher_N
    if BITS > 0:
        acc_ND = unscaled(acc_ND, BITS)
    if BITS == 4:
        acc_ND += tl.sum(offset_NL, 1)[:, None]
    return max_N, tl.sum(sum_NL, 1), acc_ND


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2


@cuda_kernel(decode_attention_scaled, "tiles", applies=_sixteen_bits)
@cuda_kernel(decode_attention, "tiles", applies=_sixteen_bits)
def decode_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Blocks of different sizes and numbers; all walk over equal shares of tiles."""
    D = triton.next_power_of_2(max(call.attrs["head_dim"], 16))
    tile = min(128, max(16, 8192 // D))
    half = max(16, tile // 2)  # 5 to 30 % slower on an H100 at bf16, but fits where shared memory is small
    element = DTYPE_BYTES[call.tensors["k_cache"].dtype]
    if element == 1:
        ways = ((tile, 4, 4, 2), (tile, 4, 6, 2), (half, 4, 6, 2), (2 * tile, 8, 3, 1))
        if "scales" in call.tensors:  # small heads leave no registers for more
            ways = (*ways, (max(16, tile // 4), 4, 4, 2))
    else:
        ways = ((tile, 4, 3, 2), (tile, 4, 4, 2), (half, 4, 6, 2), (half, 4, 4, 2), (half, 4, 3, 2))
    room = call.shared_bytes - 4096
    return [candidate(call, *way) for way in ways if 2 * way[0] * D * element * (way[2] - 1) * way[3] <= room]


def candidate(call: OpCall, L: int, warps: int, stages: int, a_multiprocessor: int) -> Candidate:
    """The launch with tiles of ``L`` keys and as many blocks ``a_multiprocessor``."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    D, bits = triton.next_power_of_2(max(head_dim, 16)), call.attrs.get("bits", 0)
    page = int(call.tensors["k_cache"].shape[1])
    rows, pages = (int(d) for d in call.tensors["page_table"].shape)
    group = heads // kv_heads
    most = rows * kv_heads * triton.cdiv(pages * page, L)  # more blocks than tiles would have nothing to do
    blocks = min(most, call.multiprocessors * a_multiprocessor)
    counters = triton.cdiv(4 * rows * kv_heads, 256) * 256
    stats = triton.cdiv(2 * blocks * 2 * group * 4, 256) * 256
    head_bytes = int(call.tensors["k_cache"].shape[3]) * DTYPE_BYTES[call.tensors["k_cache"].dtype]
    optional = {name for name in ("scales", "sinks") if name in call.tensors}
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:decode_attention_tiles",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BITS": bits,
            "PAGE": page,
            "WINDOW": call.attrs["window"],
            # Sums over rows wait for all warps of a block, which one row alone is spared.
            "R": max(64, triton.next_power_of_2(rows)) if rows > 1 else 1,
            "N": max(16, triton.next_power_of_2(group)),
            "D": D,
            "L": L,
            "AT_ONCE": max(1, min(16, _AT_ONCE // (triton.next_power_of_2(group) * D))),
            # Bulk prefetch takes multiples of 16 bytes.
            "AHEAD": head_bytes % 16 == 0 and "tma" in call.features,
            "PDL": dependent,
            **dict.fromkeys(sorted({"scales", "sinks"} - optional)),
        },
        arguments={
            "q": Pointer("q"),
            "k_cache": Pointer("k_cache"),
            "v_cache": Pointer("v_cache"),
            "page_table": Pointer("page_table"),
            "context_len": Pointer("context_len"),
            "y": Pointer("y"),
            **{name: Pointer(name) for name in sorted(optional)},
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "rows": Scalar(rows, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(blocks, 1, 1),
        num_warps=warps,
        num_stages=stages,
        dependent=dependent,
        early=("context_len", "page_table"),
        local_bytes=16,  # 8 at 256 rows and half tiles
    )
    scratch = counters + stats + 2 * blocks * group * head_dim * 4
    return Candidate(f"tiles_{L}_w{warps}_s{stages}_b{a_multiprocessor}", (launch,), scratch, counters)
