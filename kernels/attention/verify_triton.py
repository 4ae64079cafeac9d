"""Attention of steps that verify drafts on the GPU: a few query tokens a row, its cached context streamed once.

As decode attention (decode_triton.py), whose line of tiles, shares and parts this has: all query vectors of a row's
tokens and of a KV head's group are one side of its products, each with keys up to its own place.

# T tokens, R rows, G KV heads, N query vectors of an item: tokens of a row times heads a KV head (padded to 16 or a
# power of two), D head size (padded to a power of two), B pages of a row, S tokens of a page, L tokens of a tile
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.decode_triton import attend_tiles, prefetch_tile
from makeready.kernels.attention.extend_tiling import key_bytes
from makeready.kernels.attention.paged import verify_attention
from makeready.kernels.attention.pages_triton import as_queries
from makeready.kernels.attention.parts_triton import add_parts, is_last, leave_part, with_sinks
from makeready.kernels.attention.scaled import verify_attention_scaled
from makeready.kernels.attention.tree import tree_attention
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_AT_ONCE = 8192  # sums that the last block of an item reads at once: 64 registers of a thread
_OPTIONAL = {"scales", "sinks", "positions", "tree_start", "visible"}
_SUMS = 8192  # of an item that 4 warps hold; 8 hold twice as many
# Microseconds to start and end, and the share of the bandwidth or of the matrix rate that is reached: of decode
# attention on one H200 (docs/predict.md). What the last block of an item reads of others' parts, it reads at 64 bytes
# a cycle. Not measured as it is here.
_START_US, _SHARE, _L2 = 7.0, 0.94, 1.1e11


@triton.jit
def verify_attention_tiles(
    q,
    k_cache,
    v_cache,
    scales,
    page_table,
    query_start,
    query_len,
    context_len,
    positions,
    tree_start,
    visible,
    sinks,
    y,
    sums,
    stats,
    arrived,
    rows,
    tokens,
    table_stride,
    q_stride,
    y_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    EACH: tl.constexpr,
    FIRST: tl.constexpr,
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
        positions, tree_start, visible: see :mod:`~.tree`; None where tokens of a row follow each other.
        sinks: fp32 logits of heads that join denominators, or None.
        sums: fp32 scratch ``[2 * blocks, EACH * GROUP, HEAD_DIM]``.
        stats: fp32 scratch ``[2 * blocks, 2, EACH * GROUP]``: maxima of the scaled scores, denominators.
        arrived: int32 zeros ``[rows * KV_HEADS]``, zeros again at the end.
        scale: of scores, times log2(e).
        EACH, FIRST: tokens of a row that it has, at most, from which of them on; not 0 only of trees.
        R: ``rows`` or more, a power of two.
        N, D: ``EACH * GROUP``, ``HEAD_DIM`` or more, powers of two; N at least 16.
        AHEAD: bring a block's first tile to L2 while the kernels before still run.
    """
    if PDL:
        gdc_launch_dependents()
    VECTORS: tl.constexpr = EACH * GROUP
    block = tl.program_id(0)
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    row_R = tl.arange(0, R)
    # Lengths and pages are there before the kernel starts: they are among what it reads early.
    length_R = tl.load(context_len + row_R, mask=row_R < rows, other=0)
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    root_R = length_R - count_R
    if visible is not None:
        count_R = _some_of(count_R, FIRST, EACH)
        root_R = tl.load(tree_start + row_R, mask=row_R < rows, other=0)
    _, tiles_R = _span(length_R, count_R, root_R, WINDOW, L)
    end_R = tl.cumsum(tiles_R, 0) * KV_HEADS
    total = tl.max(end_R, 0)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    mine = block * share
    at = mine
    stop = tl.minimum(mine + share, total)
    row, length, count, root, first, tiles, head, begin = _item(
        at, end_R, row_R, context_len, query_len, tree_start, rows, KV_HEADS, EACH, FIRST, WINDOW, L
    )  # fmt: skip
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
        token = tl.load(query_start + row) + FIRST
        token_N = (token + n // GROUP).to(tl.int64)
        head_ND = (head * GROUP + n % GROUP)[:, None] * HEAD_DIM + d[None, :]
        is_q = (n < count * GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q_ND = tl.load(q + token_N[:, None] * q_stride + head_ND, mask=is_q, other=0.0)
        pages = page_table + row.to(tl.int64) * table_stride
        if visible is None:
            position_N = length - count + tl.minimum(n // GROUP, count - 1)
            visible_N = None
            oldest = root + 1 - WINDOW
        else:
            # Those of padding are above all others: they widen no window.
            position_N = tl.load(positions + token_N, mask=n < count * GROUP, other=root + 64)
            visible_N = tl.load(visible + token_N, mask=n < count * GROUP, other=0)
            oldest = tl.min(position_N, 0) + 1 - WINDOW
        max_N, sum_N, acc_ND = attend_tiles(
            as_queries(q_ND, k_cache), k_cache, v_cache, scales, pages, head, length, oldest,
            position_N, root, visible_N, scale, first + at - begin, first + upto - begin,
            KV_HEADS, HEAD_DIM, BITS, PAGE, WINDOW, N, D, L,
        )  # fmt: skip

        if upto - at == tiles:
            sum_N = with_sinks(sum_N, max_N, sinks, head * GROUP + n % GROUP, n < VECTORS)
            y_ND = (acc_ND / sum_N[:, None]).to(y.dtype.element_ty)
            tl.store(y + token_N[:, None] * y_stride + head_ND, y_ND, mask=is_q)
        else:
            # The first part of a share has slot 0, a later one (only the last can be a part) slot 1.
            slot = 2 * block + (at > mine).to(tl.int32)
            leave_part(sums, stats, slot, acc_ND, max_N, sum_N, n, d, VECTORS, HEAD_DIM)
            oldest = begin // share
            parts = (end - 1) // share - oldest + 1
            if is_last(arrived + row * KV_HEADS + head, parts):
                # Of the oldest block it is the last part of a share, of all others the first.
                part = 2 * oldest + (begin > oldest * share).to(tl.int32)
                v = tl.arange(0, triton.next_power_of_2(VECTORS))
                y_VD = add_parts(
                    sums, stats, part, 2 * oldest, 2, parts, v, d, sinks, head * GROUP + v % GROUP,
                    VECTORS, HEAD_DIM, AT_ONCE,
                )  # fmt: skip
                token_V = (token + v // GROUP).to(tl.int64)
                at_VD = (
                    token_V[:, None] * y_stride + (head * GROUP + v % GROUP)[:, None] * HEAD_DIM + d[None, :]
                )
                is_y = (v < count * GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                tl.store(y + at_VD, y_VD.to(y.dtype.element_ty), mask=is_y)
        at = upto
        row, length, count, root, first, tiles, head, begin = _item(
            at, end_R, row_R, context_len, query_len, tree_start, rows, KV_HEADS, EACH, FIRST, WINDOW, L
        )  # fmt: skip

    if visible is not None:
        count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    if (FIRST == 0) & (tl.sum(count_R, 0) < tokens):
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        idle = block
        while idle < tokens:
            if tl.sum(((start_R <= idle) & (idle < start_R + count_R)).to(tl.int32), 0) == 0:
                g = tl.arange(0, triton.next_power_of_2(GROUP))
                for head in range(KV_HEADS):
                    at_GD = (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
                    is_y = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
                    zero_GD = tl.zeros(at_GD.shape, y.dtype.element_ty)
                    tl.store(y + idle.to(tl.int64) * y_stride + at_GD, zero_GD, mask=is_y)
            idle += tl.num_programs(0)


@triton.jit
def _some_of(count, FIRST: tl.constexpr, EACH: tl.constexpr):
    """Of ``count`` queries of a row, how many are among EACH from FIRST on."""
    return tl.minimum(tl.maximum(count - FIRST, 0), EACH)


@triton.jit
def _span(length, count, root, WINDOW: tl.constexpr, L: tl.constexpr):
    """The first tile that a query of a row sees, and how many tiles from there; none where it has no queries.

    Args:
        root: position of the row's first query, or of one before.
    """
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(root + 1 - WINDOW, 0) // L
    return first, tl.where(count > 0, tl.cdiv(length, L) - first, 0)


@triton.jit
def _item(
    at, end_R, row_R, context_len, query_len, tree_start, rows, KV_HEADS: tl.constexpr, EACH: tl.constexpr,
    FIRST: tl.constexpr, WINDOW: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The item of tile ``at``: row, its length, its queries, the place of the first or of a tree's root, its first
    tile that is seen, its tiles from there, head, and where they begin in the line of all. Behind the end of the line
    it is some item.
    """
    row = tl.minimum(tl.sum((end_R <= at).to(tl.int32), 0), rows - 1)
    length = tl.load(context_len + row)
    count = tl.load(query_len + row)
    root = length - count
    if tree_start is not None:
        count = _some_of(count, FIRST, EACH)
        root = tl.load(tree_start + row)
    first, tiles = _span(length, count, root, WINDOW, L)
    begin = tl.sum(tl.where(row_R == row, end_R, 0), 0) - tiles * KV_HEADS
    head = (at - begin) // tl.maximum(tiles, 1)
    return row, length, count, root, first, tiles, head, begin + head * tiles


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2


@cuda_kernel(tree_attention, "rows", applies=_sixteen_bits)
@cuda_kernel(verify_attention_scaled, "rows", applies=_sixteen_bits)
@cuda_kernel(verify_attention, "rows", applies=_sixteen_bits)
def verify_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Blocks of different sizes and numbers, best first; none where a row's vectors do not fit into registers.

    Of trees as many launches as it takes, one behind the other, which read all keys again.
    """
    _, N, D = _sides(call)
    most = _SUMS if "scales" in call.tensors else 2 * _SUMS  # scales take registers, too
    if most < N * D:
        return []
    tile, element = min(128, max(16, _SUMS // D)), DTYPE_BYTES[call.tensors["k_cache"].dtype]
    half = max(16, tile // 2)
    if N * D > _SUMS:
        ways = ((tile, 8, 3, 1), (half, 8, 4, 1), (half, 8, 3, 1))
    elif element == 1:
        ways = ((tile, 4, 4, 2), (half, 4, 6, 2), (half, 4, 4, 2))
        if "scales" in call.tensors:  # small heads leave no registers for more
            ways = (*ways, (max(16, tile // 4), 4, 4, 2))
    else:
        ways = ((tile, 4, 3, 2), (tile, 4, 4, 2), (half, 4, 4, 2), (half, 4, 3, 2))
        if 2 * N * D <= _SUMS:  # larger tiles leave fewer parts
            ways = (*ways, (2 * tile, 8, 3, 1))
    room = call.shared_bytes - 4096
    made = [candidate(call, *way) for way in ways if 2 * way[0] * D * element * (way[2] - 1) * way[3] <= room]
    # Half a microsecond is nothing that the model knows.
    return sorted(made, key=lambda way: round(2e6 * way.seconds))


def _sides(call: OpCall) -> tuple[int, int, int]:
    """Tokens of a row in a launch at most, query vectors of an item and head size, these as the kernel pads them."""
    each, D = _tokens(call), power_of_two(max(call.attrs["head_dim"], 16))
    group = call.attrs["heads"] // call.attrs["kv_heads"]
    if "visible" in call.tensors:
        each = max(1, min(each, 2 * _SUMS // D // group))
    return each, max(16, power_of_two(each * group)), D


def _tokens(call: OpCall) -> int:
    """Tokens of a row, at most."""
    return -(-int(call.tensors["q"].shape[0]) // int(call.tensors["page_table"].shape[0]))


def candidate(call: OpCall, L: int, warps: int, stages: int, a_multiprocessor: int) -> Candidate:
    """The launch with tiles of ``L`` keys and as many blocks ``a_multiprocessor``."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    (each, N, D), group = _sides(call), heads // kv_heads
    page, bits = int(call.tensors["k_cache"].shape[1]), call.attrs.get("bits", 0)
    rows, pages = (int(d) for d in call.tensors["page_table"].shape)
    most = rows * kv_heads * -(-pages * page // L)  # more blocks than tiles would have nothing to do
    blocks = min(most, call.multiprocessors * a_multiprocessor)
    counters = -(-4 * rows * kv_heads // 256) * 256
    stats = -(-2 * blocks * 2 * each * group * 4 // 256) * 256
    head_bytes = int(call.tensors["k_cache"].shape[3]) * DTYPE_BYTES[call.tensors["k_cache"].dtype]
    optional = {name for name in _OPTIONAL if name in call.tensors}
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:verify_attention_tiles",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "EACH": each,
            "FIRST": 0,
            "HEAD_DIM": head_dim,
            "BITS": bits,
            "PAGE": page,
            "WINDOW": call.attrs["window"],
            # Sums over rows wait for all warps of a block, which one row alone is spared.
            "R": max(64, power_of_two(rows)) if rows > 1 else 1,
            "N": N,
            "D": D,
            "L": L,
            "AT_ONCE": max(1, min(16, _AT_ONCE * warps // 4 // (power_of_two(each * group) * D))),
            # Bulk prefetch takes multiples of 16 bytes.
            "AHEAD": head_bytes % 16 == 0 and "tma" in call.features,
            "PDL": dependent,
            **dict.fromkeys(sorted(_OPTIONAL - optional)),
        },
        arguments={
            **{name: Pointer(name) for name in ("q", "k_cache", "v_cache", "page_table", "y")},
            **{name: Pointer(name) for name in ("query_start", "query_len", "context_len")},
            **{name: Pointer(name) for name in sorted(optional)},
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(int(call.tensors["q"].shape[0]), "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(blocks, 1, 1),
        num_warps=warps,
        num_stages=stages,
        dependent=dependent,
        early=(
            "context_len",
            "query_len",
            "page_table",
            *(("tree_start",) if "tree_start" in optional else ()),
        ),
        local_bytes=16,  # at half tiles
    )
    launches = tuple(
        replace(launch, constants={**launch.constants, "FIRST": first})
        for first in range(0, _tokens(call), each)
    )
    scratch = counters + stats + 2 * blocks * each * group * head_dim * 4
    seconds = 1e-6 * len(launches) * microseconds(call, L, blocks)
    return Candidate(
        f"tiles_{L}_w{warps}_s{stages}_b{a_multiprocessor}", launches, scratch, counters, seconds
    )


def microseconds(call: OpCall, L: int, blocks: int) -> float:
    """What full rows take that have as much context as the plan expects.

    Keys and values are read once; products are of padded vectors and whole tiles. Beyond what decode attention has of
    them, the last block of an item reads the parts of all.
    """
    (each, N, D), rows = _sides(call), int(call.tensors["page_table"].shape[0])
    kv_heads, window = call.attrs["kv_heads"], call.attrs["window"]
    group = call.attrs["heads"] // kv_heads
    keys = min(call.context, window + each) if window else call.context
    items, tiles = rows * kv_heads, -(-keys // L)
    memory = items * keys * key_bytes(call) / call.bandwidth
    products = 4.0 * items * tiles * L * N * D / call.flops[call.tensors["q"].dtype]
    parts = -(-tiles // max(1, -(-items * tiles // blocks)))
    added = parts * (each - 1) * group * call.attrs["head_dim"] * 4 / _L2 if parts > 1 else 0.0
    return _START_US + 1e6 * (max(memory, products) / _SHARE + added)
