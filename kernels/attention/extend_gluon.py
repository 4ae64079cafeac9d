"""Extend attention on Hopper with products under way while exponentials are computed, in Gluon.

Items are those of extend_triton.py, with tiles of 128 query vectors and steps of 128 keys. A block has three
*partitions* of warps: two take half of a tile each, the third feeds them with queries, keys and values
through rings in shared memory (as in FlashAttention-3, Shah et al. 2024, arXiv:2407.08608). A half issues the
product of step i + 1's keys and that of step i's values together, and computes the exponentials of step i + 1
while the latter runs; and while one half computes them, the tensor cores serve the other.

Steps run from the last keys to the first: those with masks come first, the rest is one loop without.

A step's keys come as two runs of 64, each in one page, so that no slot without a token is read (it may hold
NaN): see :func:`~.extend_items_triton.run_at`.

# T tokens, R rows, M query vectors of half a tile, L keys of a step, D head size
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.extend_gluon_steps import RUN, L, M, weighted_values
from makeready.kernels.attention.extend_items_triton import clear_idle, item_at, run_at, span, tokens_of
from makeready.kernels.attention.extend_tiling import Way
from makeready.kernels.attention.parts_triton import is_last, leave_part
from makeready.kernels.device import Candidate, Descriptor, DeviceLaunch, OpCall, Pointer, Scalar, Scratch

COLUMNS = gl.constexpr(64)  # of a copy: 128 bytes, what the swizzle of shared memory spans


@gluon.jit
def extend_attention_pipelined(
    q_tiles,
    k_tiles,
    v_tiles,
    page_table,
    query_start,
    query_len,
    context_len,
    y,
    sums,
    stats,
    arrived,
    rows,
    tokens,
    table_stride,
    y_stride,
    scale,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    R: gl.constexpr,
    STAGES: gl.constexpr,
    SHARES: gl.constexpr,
    LEAST: gl.constexpr,
    PDL: gl.constexpr,
):
    """See the module. Any number of blocks works.

    Args:
        q_tiles: queries ``[T, heads, HEAD_DIM]`` as a tensor map with blocks ``[M / GROUP, GROUP, COLUMNS]``.
        k_tiles, v_tiles: the caches as tensor maps with blocks ``[1, RUN, 1, COLUMNS]``.
        sums: fp32 scratch ``[slots, 2, M, HEAD_DIM]``, see :meth:`~.extend_tiling.Way.slots`.
        stats: fp32 scratch ``[slots, 2, 2, M]``.
        arrived: int32 zeros ``[slots, 2]``, zeros again at the end.
        scale: of scores, times log2(e); positive.
        R: ``rows`` or more, a power of two.
        STAGES: steps whose keys and values are on their way or in use.
        SHARES, LEAST: see :func:`~.extend_triton.extend_attention_tiles`.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    clear_idle(
        y, query_start, query_len, rows, tokens, y_stride, gl.arange(0, R, gl.SliceLayout(0, wide)),
        gl.arange(0, M, gl.SliceLayout(1, wide)), gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide)),
        KV_HEADS, GROUP, HEAD_DIM, M,
    )  # fmt: skip
    tile: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_ring = gl.allocate_shared_memory(q_tiles.dtype, [2, M, HEAD_DIM], tile)
    k_ring = gl.allocate_shared_memory(k_tiles.dtype, [STAGES, L, HEAD_DIM], tile)
    v_ring = gl.allocate_shared_memory(v_tiles.dtype, [STAGES, L, HEAD_DIM], tile)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_free.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    metadata = (query_start, query_len, context_len, rows)
    out = (y, sums, stats, arrived, y_stride, scale)
    maps = (q_tiles, k_tiles, v_tiles)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    # Registers of a thread; the first partition has 232, too: 504 are all that three warpgroups can have.
    gl.warp_specialize(
        [
            (_attend, (rings, barriers, metadata, KV_HEADS, GROUP, HEAD_DIM, R, STAGES, SHARES, LEAST,
                       out, upper)),
            (_attend, (rings, barriers, metadata, KV_HEADS, GROUP, HEAD_DIM, R, STAGES, SHARES, LEAST,
                       out, lower)),
            (_feed, (rings, barriers, metadata, KV_HEADS, GROUP, HEAD_DIM, R, STAGES, SHARES, LEAST,
                     maps, page_table, table_stride, PAGE)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def _item(
    turn, metadata, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, R: gl.constexpr, SHARES: gl.constexpr,
    LEAST: gl.constexpr,
):  # fmt: skip
    """The block's item of this turn: see :func:`~.extend_items_triton.item_at`."""
    _, query_len, context_len, rows = metadata
    # Every warp has all rows, so that sums over them need no other warp.
    row_R = gl.arange(0, R, gl.BlockedLayout([R // 32], [32], [gl.num_warps()], [0]))
    block, blocks = gl.program_id(0), gl.num_programs(0)
    at = turn * blocks + gl.where(turn % 2 == 0, block, blocks - 1 - block)
    return item_at(
        at, query_len, context_len, rows, row_R, KV_HEADS, 0, 2 * M // GROUP, L, SHARES, LEAST
    )  # fmt: skip


@gluon.jit
def _feed(
    rings, barriers, metadata, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, SHARES: gl.constexpr, LEAST: gl.constexpr, maps, page_table,
    table_stride, PAGE: gl.constexpr,
):  # fmt: skip
    """The third partition: copies of all that the two halves take, as soon as there is room."""
    q_tiles, k_tiles, v_tiles = maps
    TOKENS: gl.constexpr = 2 * M // GROUP
    q_ring, k_ring, v_ring = rings
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    query_start, query_len, context_len, _ = metadata
    CUTS: gl.constexpr = HEAD_DIM // COLUMNS
    layout_3: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    layout_4: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # Shared memory holds the columns of a tile in groups of 64, all rows of the first before the second.
    q_runs = q_ring._reinterpret(q_tiles.dtype, [2 * CUTS, M // GROUP, GROUP, COLUMNS], layout_3)
    k_runs = k_ring._reinterpret(k_tiles.dtype, [STAGES * CUTS * 2, 1, RUN, 1, COLUMNS], layout_4)
    v_runs = v_ring._reinterpret(v_tiles.dtype, [STAGES * CUTS * 2, 1, RUN, 1, COLUMNS], layout_4)
    step = 0
    items = 0
    turn = 0
    more, head, row, tile, part, share, _slot = _item(turn, metadata, KV_HEADS, GROUP, R, SHARES, LEAST)
    while more:
        count, length = gl.load(query_len + row), gl.load(context_len + row)
        start = gl.load(query_start + row) + tile * TOKENS
        parts, low, _open, _shut, high = span(
            length - count + tile * TOKENS, length, part, share, TOKENS, 0, L, False
        )
        if part < parts:
            pages = page_table + row.to(gl.int64) * table_stride
            steps = gl.cdiv(high - low, L)
            for i in range(steps):
                key = low + (steps - 1 - i) * L
                page, slot_1 = run_at(pages, key, length, PAGE, RUN)
                page_2, slot_2 = run_at(pages, key + RUN, length, PAGE, RUN)
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(k_free.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), L * HEAD_DIM * 2)
                for cut in gl.static_range(CUTS):
                    at = (stage * CUTS + cut) * 2
                    tma.async_copy_global_to_shared(
                        k_tiles, [page, slot_1, head, cut * COLUMNS], k_full.index(stage), k_runs.index(at)
                    )
                    tma.async_copy_global_to_shared(
                        k_tiles,
                        [page_2, slot_2, head, cut * COLUMNS],
                        k_full.index(stage),
                        k_runs.index(at + 1),
                    )
                if i == 0:
                    for half in gl.static_range(2):
                        mbarrier.wait(q_free.index(half), (items & 1) ^ 1)
                        mbarrier.expect(q_full.index(half), M * HEAD_DIM * 2)
                        for cut in gl.static_range(CUTS):
                            tma.async_copy_global_to_shared(
                                q_tiles,
                                [start + half * (M // GROUP), head * GROUP, cut * COLUMNS],
                                q_full.index(half),
                                q_runs.index(half * CUTS + cut),
                            )
                mbarrier.wait(v_free.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), L * HEAD_DIM * 2)
                for cut in gl.static_range(CUTS):
                    at = (stage * CUTS + cut) * 2
                    tma.async_copy_global_to_shared(
                        v_tiles, [page, slot_1, head, cut * COLUMNS], v_full.index(stage), v_runs.index(at)
                    )
                    tma.async_copy_global_to_shared(
                        v_tiles,
                        [page_2, slot_2, head, cut * COLUMNS],
                        v_full.index(stage),
                        v_runs.index(at + 1),
                    )
                step += 1
            items += 1
        turn += 1
        more, head, row, tile, part, share, _slot = _item(turn, metadata, KV_HEADS, GROUP, R, SHARES, LEAST)


@gluon.jit
def _attend(
    rings, barriers, metadata, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr, SHARES: gl.constexpr, LEAST: gl.constexpr, out, HALF: gl.constexpr,
):  # fmt: skip
    """The first two partitions: half of every tile's query vectors."""
    TOKENS: gl.constexpr = 2 * M // GROUP
    query_start, query_len, context_len, _ = metadata
    step = 0
    items = 0
    turn = 0
    more, head, row, tile, part, share, slot = _item(turn, metadata, KV_HEADS, GROUP, R, SHARES, LEAST)
    while more:
        count, length = gl.load(query_len + row), gl.load(context_len + row)
        start = gl.load(query_start + row)
        position = length - count + tile * TOKENS
        parts, low, _open, shut, high = span(position, length, part, share, TOKENS, 0, L, False)
        if part < parts:
            max_M, sum_M, acc_MD = weighted_values(
                rings, barriers, out[5], step, items, position + HALF * (M // GROUP), length, low, shut, high,
                HALF, GROUP, HEAD_DIM, STAGES,
            )  # fmt: skip
            step += gl.cdiv(high - low, L)
            items += 1
            _finish(
                out, max_M, sum_M, acc_MD, start, count, tile * 2 + HALF, head, part, parts, slot,
                HALF, KV_HEADS, GROUP, HEAD_DIM,
            )  # fmt: skip
        turn += 1
        more, head, row, tile, part, share, slot = _item(turn, metadata, KV_HEADS, GROUP, R, SHARES, LEAST)


@gluon.jit
def _finish(
    out, max_M, sum_M, acc_MD, start, count, tile, head, part, parts, slot, HALF: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Write the results of half a tile, or leave them as a part and add all parts if they are the last."""
    y, sums, stats, arrived, y_stride, _ = out
    values: gl.constexpr = acc_MD.type.layout
    m = gl.arange(0, M, gl.SliceLayout(1, values))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, values))
    if parts == 1:
        token_M, own_M = tokens_of(tile, count, m, M, GROUP)
        out_M = y + (start + token_M).to(gl.int64) * y_stride + (head * GROUP + m % GROUP) * HEAD_DIM
        y_MD = acc_MD * (1.0 / sum_M)[:, None]
        gl.store(out_M[:, None] + d[None, :], y_MD.to(y.dtype.element_ty), mask=own_M[:, None])
    else:
        # A half is a tile of its own here: slots and counters are twice as many.
        first = 2 * slot + HALF
        leave_part(sums, stats, first + 2 * part * KV_HEADS, acc_MD, max_M, sum_M, m, d, M, HEAD_DIM)
        if is_last(arrived + first, parts):
            some: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
            n = gl.arange(0, M, gl.SliceLayout(1, some))
            c = gl.arange(0, 16, gl.SliceLayout(0, some))
            token_M, own_M = tokens_of(tile, count, n, M, GROUP)
            out_M = y + (start + token_M).to(gl.int64) * y_stride + (head * GROUP + n % GROUP) * HEAD_DIM
            for column in range(0, HEAD_DIM, 16):
                y_MC = _added(sums, stats, first, 2 * KV_HEADS, parts, n, column + c, HEAD_DIM)
                gl.store(
                    out_M[:, None] + (column + c)[None, :], y_MC.to(y.dtype.element_ty), mask=own_M[:, None]
                )


@gluon.jit
def _added(sums, stats, first, step, parts, n, d, HEAD_DIM: gl.constexpr):
    """As :func:`~.parts_triton.add_parts`, whose vectors have no layout: columns ``d`` of rows ``n``."""
    stats += n
    sums += n[:, None] * HEAD_DIM + d[None, :]
    higher_N = gl.load(stats + first.to(gl.int64) * (2 * M), cache_modifier=".cg")
    for i in range(1, parts):
        slot = (first + i * step).to(gl.int64)
        higher_N = gl.maximum(higher_N, gl.load(stats + slot * (2 * M), cache_modifier=".cg"))
    sum_N = gl.zeros_like(higher_N)
    acc_ND = gl.full_like(sums, 0.0, dtype=gl.float32)
    for i in range(parts):
        slot = (first + i * step).to(gl.int64)
        weight_N = gl.exp2(gl.load(stats + slot * (2 * M), cache_modifier=".cg") - higher_N)
        sum_N += weight_N * gl.load(stats + slot * (2 * M) + M, cache_modifier=".cg")
        acc_ND += weight_N[:, None] * gl.load(sums + slot * (M * HEAD_DIM), cache_modifier=".cg")
    return acc_ND / sum_N[:, None]


def candidate(call: OpCall, way: Way) -> Candidate:
    """The launch of ``way``, its parts in scratch behind two counters a slot."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    page = int(call.tensors["k_cache"].shape[1])
    rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
    slots, group = way.slots(call), heads // kv_heads
    counters = triton.cdiv(4 * 2 * slots, 256) * 256
    stats = triton.cdiv(slots * 2 * way.m * 4, 256) * 256
    dependent = "pdl" in call.features
    columns = COLUMNS.value

    def cache(name: str) -> Descriptor:
        strides = (page * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        return Descriptor(name, ("P", page, kv_heads, head_dim), strides, (1, RUN.value, 1, columns))

    queries = (call.tensors["q"].row_stride, head_dim, 1)
    launch = DeviceLaunch(
        function=f"{__name__}:extend_attention_pipelined",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "R": max(64, triton.next_power_of_2(rows)),
            "STAGES": way.stages,
            "SHARES": way.shares(call),
            "LEAST": way.least,
            "PDL": dependent,
        },
        arguments={
            **{
                name: Pointer(name) for name in ("page_table", "query_start", "query_len", "context_len", "y")
            },
            "q_tiles": Descriptor(
                "q", (tokens, heads, head_dim), queries, (M.value // group, group, columns)
            ),
            "k_tiles": cache("k_cache"),
            "v_tiles": cache("v_cache"),
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(way.blocks(call), 1, 1),
        num_warps=4,
        num_stages=1,
        dependent=dependent,
        local_bytes=224,  # up to 216 are used, in the search for an item; five words are read in a step
    )
    scratch = counters + stats + slots * way.m * head_dim * 4
    return Candidate(way.name, (launch,), scratch, counters, 1e-6 * way.microseconds(call))
