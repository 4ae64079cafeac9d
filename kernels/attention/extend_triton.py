"""Extend attention on the GPU: rows of any length, causal over their cached context (prefill, chunks, mixed).

A block takes one KV head and a *tile* of neighbouring tokens of one row: its M query vectors are those
tokens' N heads of the group, so keys and values are read once for the group. Which row and tokens a block
has follows from ``query_len`` on the device; the grid holds the most tiles that the bucket's tokens can
make, and what is too many ends at once. Blocks start with the last tiles, which see most keys, so the short
ones fill the gaps at the end.

Keys that every token of the tile sees run through a loop without masks, fed by tensor maps where pages allow
it; the diagonal, and the edge of a sliding window, through a loop with masks. As in FlashAttention (Dao 2023,
arXiv:2307.08691) scores never leave the block.

# T tokens, R rows, M query vectors of a tile, N query heads a KV head, L keys of a step, D head size (padded
# to a power of two), B pages of a row
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.paged import extend_attention
from makeready.kernels.device import Argument, Candidate, Descriptor, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.spec import DTYPE_BYTES


@triton.jit
def extend_attention_tiles(
    q,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    page_table,
    query_start,
    query_len,
    context_len,
    y,
    rows,
    tokens,
    table_stride,
    q_stride,
    y_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    EDGE: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module. The grid is ``KV_HEADS`` × tiles.

    Args:
        k_tiles, v_tiles: the caches as tensor maps with blocks ``[1, L, 1, D]`` where ``TMA``.
        scale: of scores, times log2(e); positive.
        R: ``rows`` or more, a power of two.
        D: ``HEAD_DIM`` or more, a power of two.
        EDGE: keys of a step where there are masks; a divisor of L.
        PAIR: two steps of keys share one update of the running maximum; needs ``PAGE % L == 0``.
    """
    TOKENS: tl.constexpr = M // GROUP
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    tile = tl.program_id(1)
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    head_MD = (head * GROUP + m % GROUP)[:, None] * HEAD_DIM + d[None, :]
    row_R = tl.arange(0, R)
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    tiles_R = tl.cdiv(count_R, TOKENS)
    end_R = tl.cumsum(tiles_R, 0)

    if tl.sum(count_R, 0) < tokens:
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        token_M = tile * TOKENS + m // GROUP
        of_row_MR = (start_R[None, :] <= token_M[:, None]) & (token_M[:, None] < (start_R + count_R)[None, :])
        idle_M = (tl.sum(of_row_MR.to(tl.int32), 1) == 0) & (token_M < tokens) & (m < TOKENS * GROUP)
        at_MD = token_M.to(tl.int64)[:, None] * y_stride + head_MD
        zero_MD = tl.zeros((M, D), y.dtype.element_ty)
        tl.store(y + at_MD, zero_MD, mask=idle_M[:, None] & (d < HEAD_DIM)[None, :])

    work = tl.max(end_R, 0) - 1 - tile
    if work >= 0:
        row = tl.sum((end_R <= work).to(tl.int32), 0)
        before = tl.sum(tl.where(row_R < row, tiles_R, 0), 0)
        count = tl.load(query_len + row)
        length = tl.load(context_len + row)
        start = tl.load(query_start + row)
        pages = page_table + row.to(tl.int64) * table_stride
        first = (work - before) * TOKENS
        token_M = first + m // GROUP
        own_MD = ((token_M < count) & (m < TOKENS * GROUP))[:, None] & (d < HEAD_DIM)[None, :]
        token_MD = (start + token_M).to(tl.int64)[:, None]
        q_MD = tl.load(q + token_MD * q_stride + head_MD, mask=own_MD, other=0.0)

        # Keys low : high are those that some token of the tile sees, open : shut those that all of them see.
        position_M = length - count + token_M
        low = 0
        open = 0
        high = tl.minimum(length - count + first + TOKENS, length)
        if WINDOW > 0:
            low = tl.maximum(length - count + first - WINDOW + 1, 0) // L * L
            open = tl.maximum(high - WINDOW + L - 1, 0) // L * L
            open = tl.minimum(tl.maximum(open, low), tl.cdiv(high, L) * L)
        STEP: tl.constexpr = L * (1 + PAIR)
        shut = open + tl.maximum(length - count + first + 1 - open, 0) // STEP * STEP

        max_M = tl.full((M,), float("-inf"), tl.float32)
        sum_M = tl.zeros((M,), tl.float32)
        acc_MD = tl.zeros((M, D), tl.float32)
        if WINDOW > 0:
            max_M, sum_M, acc_MD = _attend_some(
                q_MD, k_cache, v_cache, pages, head, position_M, scale, max_M, sum_M, acc_MD,
                low, open, high, KV_HEADS, HEAD_DIM, PAGE, WINDOW, D, EDGE,
            )  # fmt: skip
        max_M, sum_M, acc_MD = _attend_all(
            q_MD, k_cache, v_cache, k_tiles, v_tiles, pages, head, scale, max_M, sum_M, acc_MD,
            open, shut, high, KV_HEADS, HEAD_DIM, PAGE, D, L, PAIR, TMA,
        )  # fmt: skip
        max_M, sum_M, acc_MD = _attend_some(
            q_MD, k_cache, v_cache, pages, head, position_M, scale, max_M, sum_M, acc_MD,
            shut, high, high, KV_HEADS, HEAD_DIM, PAGE, WINDOW, D, EDGE,
        )  # fmt: skip
        # The addresses of q again. Adding a zero that the compiler cannot see through keeps it from holding
        # them in 40 registers of a thread through the loops.
        m += tl.load(query_len + row, volatile=True) - count
        token_M = first + m // GROUP
        own_MD = ((token_M < count) & (m < TOKENS * GROUP))[:, None] & (d < HEAD_DIM)[None, :]
        token_MD = (start + token_M).to(tl.int64)[:, None]
        head_MD = (head * GROUP + m % GROUP)[:, None] * HEAD_DIM + d[None, :]
        y_MD = acc_MD * (1.0 / sum_M)[:, None]
        tl.store(y + token_MD * y_stride + head_MD, y_MD.to(y.dtype.element_ty), mask=own_MD)


@triton.jit
def _attend_all(
    q_MD,
    k_cache,
    v_cache,
    k_tiles,
    v_tiles,
    pages,
    head,
    scale,
    max_M,
    sum_M,
    acc_MD,
    begin,
    end,
    high,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys ``begin : end``, a multiple of a step, which every query sees."""
    # Page numbers are read one step ahead, or each step would wait for two memory latencies in a row.
    page = _pages(pages, begin, high, PAGE, L)
    if PAIR:
        page_2 = _pages(pages, begin + L, high, PAGE, L)
    for key in range(begin, end, L * (1 + PAIR)):
        k_LD = _tile(k_cache, k_tiles, page, key, head, KV_HEADS, HEAD_DIM, PAGE, D, L, TMA)
        score_ML = tl.dot(q_MD, k_LD.to(q_MD.dtype).T)
        if PAIR:
            k_2_LD = _tile(k_cache, k_tiles, page_2, key + L, head, KV_HEADS, HEAD_DIM, PAGE, D, L, TMA)
            score_2_ML = tl.dot(q_MD, k_2_LD.to(q_MD.dtype).T)
            highest_M = tl.maximum(tl.max(score_ML, 1), tl.max(score_2_ML, 1))
        else:
            highest_M = tl.max(score_ML, 1)
        higher_M = tl.maximum(max_M, highest_M * scale)
        p_ML = tl.exp2(score_ML * scale - higher_M[:, None])
        shrink_M = tl.exp2(max_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(p_ML, 1)
        acc_MD = acc_MD * shrink_M[:, None]
        v_LD = _tile(v_cache, v_tiles, page, key, head, KV_HEADS, HEAD_DIM, PAGE, D, L, TMA)
        page = _pages(pages, key + L * (1 + PAIR), high, PAGE, L)
        acc_MD = tl.dot(p_ML.to(q_MD.dtype), v_LD.to(q_MD.dtype), acc_MD)
        if PAIR:
            p_2_ML = tl.exp2(score_2_ML * scale - higher_M[:, None])
            sum_M += tl.sum(p_2_ML, 1)
            v_2_LD = _tile(v_cache, v_tiles, page_2, key + L, head, KV_HEADS, HEAD_DIM, PAGE, D, L, TMA)
            page_2 = _pages(pages, key + 3 * L, high, PAGE, L)
            acc_MD = tl.dot(p_2_ML.to(q_MD.dtype), v_2_LD.to(q_MD.dtype), acc_MD)
        max_M = higher_M
    return max_M, sum_M, acc_MD


@triton.jit
def _attend_some(
    q_MD,
    k_cache,
    v_cache,
    pages,
    head,
    position_M,
    scale,
    max_M,
    sum_M,
    acc_MD,
    begin,
    end,
    high,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
):
    """Keys ``begin : end``, each seen by the queries at its position and after, inside their windows."""
    l = tl.arange(0, L)  # noqa: E741
    d = tl.arange(0, D)
    for key in range(begin, end, L):
        slot_L = _slots(_pages(pages, key, high, PAGE, L), key, PAGE, L)
        at_LD = (slot_L * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + d[None, :]
        # Slots past the row's tokens may hold NaN: they are not read.
        read = (key + l < high)[:, None] & (d < HEAD_DIM)[None, :]
        k_LD = tl.load(k_cache + at_LD, mask=read, other=0.0)
        v_LD = tl.load(v_cache + at_LD, mask=read, other=0.0)
        seen_ML = (key + l)[None, :] <= position_M[:, None]
        if WINDOW > 0:
            seen_ML &= (key + l)[None, :] > position_M[:, None] - WINDOW
        # A finite score for what is hidden: a query that sees nothing yet stays free of NaN, and what it
        # gathers is wiped out by the first key that it does see.
        score_ML = tl.where(seen_ML, tl.dot(q_MD, k_LD.to(q_MD.dtype).T) * scale, -1e30)
        higher_M = tl.maximum(max_M, tl.max(score_ML, 1))
        p_ML = tl.exp2(score_ML - higher_M[:, None])
        shrink_M = tl.exp2(max_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(p_ML, 1)
        acc_MD = tl.dot(p_ML.to(q_MD.dtype), v_LD.to(q_MD.dtype), acc_MD * shrink_M[:, None])
        max_M = higher_M
    return max_M, sum_M, acc_MD


@triton.jit
def _tile(
    cache,
    tiles,
    page,
    key,
    head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys or values ``[L, D]`` of the tokens from ``key`` on, all of which exist."""
    if TMA:
        x_LD = tiles.load([page, key % PAGE, head, 0]).reshape(L, D)
    else:
        d = tl.arange(0, D)
        at_LD = (_slots(page, key, PAGE, L) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM)[:, None] + d[None, :]
        if D == HEAD_DIM:
            x_LD = tl.load(cache + at_LD)
        else:
            x_LD = tl.load(cache + at_LD, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return x_LD


@triton.jit
def _slots(page, key, PAGE: tl.constexpr, L: tl.constexpr):
    """Slots (page * PAGE + place in it) of the tokens from ``key`` on, in pages as :func:`_pages` gives them."""
    l = tl.arange(0, L)  # noqa: E741
    if PAGE % L == 0:
        slot_L = page.to(tl.int64) * PAGE + (key % PAGE) + l
    else:
        slot_L = page.to(tl.int64) * PAGE + (key + l) % PAGE
    return slot_L


@triton.jit
def _pages(pages, key, high, PAGE: tl.constexpr, L: tl.constexpr):
    """Pages of the tokens from ``key`` on: one where a step lies in one, else one a token; none past ``high``."""
    if PAGE % L == 0:
        page = tl.load(pages + tl.minimum(key, high - 1) // PAGE)
    else:
        page = tl.load(pages + tl.minimum(key + tl.arange(0, L), high - 1) // PAGE)
    return page


@dataclass(frozen=True)
class _Way:
    """Sides of a tile and compile options."""

    m: int
    keys: int
    pair: bool
    tma: bool
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as ``tma_128x64x2_w8_s3``."""
        kind, pair = "tma" if self.tma else "gather", "x2" if self.pair else ""
        return f"{kind}_{self.m}x{self.keys}{pair}_w{self.warps}_s{self.stages}"


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2 and call.attrs["scale"] > 0


@cuda_kernel(extend_attention, "tiles", applies=_sixteen_bits)
def extend_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Tiles of different sides, through tensor maps where a step's keys lie in one page.

    Two blocks of 4 warps on a multiprocessor come first: one computes maxima and exponentials while the
    other multiplies. With 8 warps a block has a multiprocessor to itself.
    """
    D = triton.next_power_of_2(max(call.attrs["head_dim"], 16))
    page = int(call.tensors["k_cache"].shape[1])
    group = call.attrs["heads"] // call.attrs["kv_heads"]
    tma = _addressable(call, D) and page % 32 == 0
    keys = min(64, 8192 // D)
    if tma:
        keys = max(n for n in (32, 64) if n <= keys and page % n == 0)
    m = max(128 if D <= 128 else 64, triton.next_power_of_2(group))
    ways = [
        _Way(m, keys, False, tma, 4, 2),
        _Way(m, 32, False, tma, 4, 3),
        _Way(m, keys, tma, tma, 8, 2),
        _Way(m, keys, False, tma, 8, 3),
        _Way(64, keys, False, tma, 4, 2),
    ]
    plain = tma and call.attrs["window"] == 0  # leaves registers for 192 sums and scores, else 144
    element = DTYPE_BYTES[call.tensors["q"].dtype]
    return [
        _candidate(call, D, way)
        for way in dict.fromkeys(ways)
        if way.m >= max(16 * way.warps, group)
        and way.m * (D + way.keys) <= (192 if plain else 144) * 32 * way.warps
        and _shared(way, D, element) <= call.shared_bytes
    ]


def _addressable(call: OpCall, D: int) -> bool:
    """Whether tensor maps can describe the caches and feed the tensor cores with what they hold."""
    caches = [call.tensors[name] for name in ("k_cache", "v_cache")]
    return (
        "tma" in call.features
        and call.attrs["head_dim"] == D
        and all(c.alignment % 16 == 0 and c.dtype == call.tensors["q"].dtype for c in caches)
    )


def _shared(way: _Way, D: int, element: int) -> int:
    """Bytes of shared memory: queries, and the keys and values that are on their way."""
    return (way.m + 2 * way.stages * (1 + way.pair) * way.keys) * D * element + 1024


def _candidate(call: OpCall, D: int, way: _Way) -> Candidate:
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    page = int(call.tensors["k_cache"].shape[1])
    rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
    group = heads // kv_heads
    a_tile = way.m // group
    # A row wastes at most a_tile - 1 places of its last tile, and every tile has a token.
    tiles = min(tokens, (tokens + rows * (a_tile - 1)) // a_tile)
    dependent = "pdl" in call.features

    def cache(name: str) -> Argument:
        strides = (page * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        shape = ("P", page, kv_heads, head_dim)
        return Descriptor(name, shape, strides, (1, way.keys, 1, D)) if way.tma else Pointer(name)

    launch = DeviceLaunch(
        function=f"{__name__}:extend_attention_tiles",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "WINDOW": call.attrs["window"],
            "R": max(64, triton.next_power_of_2(rows)),
            "M": way.m,
            "D": D,
            "L": way.keys,
            "EDGE": min(way.keys, 32),
            "PAIR": way.pair,
            "TMA": way.tma,
            "PDL": dependent,
        },
        arguments={
            **{name: Pointer(name) for name in ("q", "k_cache", "v_cache", "page_table", "y")},
            **{name: Pointer(name) for name in ("query_start", "query_len", "context_len")},
            "k_tiles": cache("k_cache"),
            "v_tiles": cache("v_cache"),
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(kv_heads, tiles, 1),
        num_warps=way.warps,
        num_stages=way.stages,
        dependent=dependent,
        local_bytes=64,  # 48 are used at 4 warps of 128 x 64, none of them inside a loop
    )
    return Candidate(way.name, (launch,))
