"""Latent attention of a step's tokens among themselves on the GPU, with keys and values of every head.

A block takes one head and a tile of M neighbouring tokens of one row. Keys are two parts: a head's own features, made
by ``kv_b``, and the rotated ones of the latents, which all heads share; so scores are two products. Keys that every
token of the tile sees run through a loop without masks, those on the diagonal through one with.

# T tokens, R rows, M tokens of a tile, K keys of a step, N own and Q rotated features of a key, V values of a head
# (powers of two)
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

from makeready.kernels.attention.mla import mla_own_attention
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_LN2 = tl.constexpr(0.6931471805599453)
_LAUNCH, _ITEM = 3e-6, 2e-6  # estimated seconds of a launch, and of a tile around its steps
_REACHED = {8: 0.5, 4: 0.45}  # of the matrix rate, estimated, by warps


@triton.jit
def own_attention_tiles(
    q,
    kv,
    latent,
    query_start,
    query_len,
    y,
    log_sum,
    rows,
    tokens,
    q_stride,
    kv_stride,
    latent_stride,
    y_stride,
    log_stride,
    scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block for every tile that rows of the bucket can make; what is too many ends at once.

    Args:
        scale: of scores, times log2(e); positive.
        R: ``rows`` or more, a power of two.
    """
    if PDL:
        gdc_launch_dependents()
    row_R = tl.arange(0, R)
    count_R = tl.load(query_len + row_R, mask=row_R < rows, other=0)
    tiles_R = tl.cdiv(count_R, M)
    end_R = tl.cumsum(tiles_R, 0)
    # The last tiles of a row see most keys: they come first, and the short ones fill the gaps at the end.
    head = tl.program_id(0) % HEADS
    place = tl.max(end_R, 0) - 1 - tl.program_id(0) // HEADS
    if PDL:
        gdc_wait()
    _clear_idle(y, log_sum, query_start, count_R, row_R, rows, tokens, y_stride, log_stride, HEADS, VALUE, V)
    if place >= 0:
        row = tl.sum((end_R <= place).to(tl.int32), 0)
        tile = place - tl.sum(tl.where(row_R < row, tiles_R, 0), 0)
        start, count = tl.load(query_start + row), tl.load(query_len + row)
        m = tile * M + tl.arange(0, M)
        n, j, v = tl.arange(0, N), tl.arange(0, Q), tl.arange(0, V)
        token_M = (start + m).to(tl.int64)
        there = (m < count)[:, None]
        q_rows = q + token_M[:, None] * q_stride + head * (NOPE + ROPE)
        q_MN = tl.load(q_rows + n[None, :], mask=there & (n < NOPE)[None, :], other=0.0)
        q_MQ = tl.load(q_rows + NOPE + j[None, :], mask=there & (j < ROPE)[None, :], other=0.0)
        max_M = tl.full((M,), float("-inf"), tl.float32)
        sum_M = tl.zeros((M,), tl.float32)
        acc_MV = tl.zeros((M, V), tl.float32)
        kv_row = kv + start.to(tl.int64) * kv_stride + head * (NOPE + VALUE)
        turned = latent + start.to(tl.int64) * latent_stride + RANK
        # The first token of the tile sees itself and all before it.
        shut = tile * M // K * K
        max_M, sum_M, acc_MV = _attend(
            q_MN, q_MQ, kv_row, turned, m, scale, max_M, sum_M, acc_MV, 0, shut, count, kv_stride, latent_stride,
            NOPE, ROPE, VALUE, K, N, Q, V, False,
        )  # fmt: skip
        max_M, sum_M, acc_MV = _attend(
            q_MN, q_MQ, kv_row, turned, m, scale, max_M, sum_M, acc_MV, shut, tl.minimum(tile * M + M, count), count,
            kv_stride, latent_stride, NOPE, ROPE, VALUE, K, N, Q, V, True,
        )  # fmt: skip
        out = y + token_M[:, None] * y_stride + head * VALUE + v[None, :]
        tl.store(out, (acc_MV / sum_M[:, None]).to(y.dtype.element_ty), mask=there & (v < VALUE)[None, :])
        tl.store(log_sum + token_M * log_stride + head, (max_M + tl.log2(sum_M)) * _LN2, mask=m < count)


@triton.jit
def _attend(
    q_MN,
    q_MQ,
    kv_row,
    turned,
    m,
    scale,
    max_M,
    sum_M,
    acc_MV,
    begin,
    end,
    count,
    kv_stride,
    latent_stride,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys ``begin : end`` of the row, each seen by the tokens ``m`` at its place and after where ``MASKED``."""
    k = tl.arange(0, K)
    n, j, v = tl.arange(0, N), tl.arange(0, Q), tl.arange(0, V)
    for key in range(begin, end, K):
        of_K = (key + k).to(tl.int64)[:, None]
        is_n, is_j, is_v = (n < NOPE)[None, :], (j < ROPE)[None, :], (v < VALUE)[None, :]
        if MASKED:
            # What lies past the row's tokens may be NaN: it is not read.
            is_k = (key + k < count)[:, None]
            is_n, is_j, is_v = is_n & is_k, is_j & is_k, is_v & is_k
        k_KN = tl.load(kv_row + of_K * kv_stride + n[None, :], mask=is_n, other=0.0)
        k_KQ = tl.load(turned + of_K * latent_stride + j[None, :], mask=is_j, other=0.0)
        v_KV = tl.load(kv_row + of_K * kv_stride + NOPE + v[None, :], mask=is_v, other=0.0)
        score_MK = tl.dot(q_MN, k_KN.T)
        score_MK = tl.dot(q_MQ, k_KQ.T, score_MK)
        if MASKED:
            score_MK = tl.where((key + k)[None, :] <= m[:, None], score_MK, float("-inf"))
        # The row's first key, which all tokens see, is in the first step: no maximum is -inf.
        higher_M = tl.maximum(max_M, tl.max(score_MK, 1) * scale)
        p_MK = tl.exp2(score_MK * scale - higher_M[:, None])
        shrink_M = tl.exp2(max_M - higher_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MK, 1)
        acc_MV = tl.dot(p_MK.to(q_MN.dtype), v_KV, acc_MV * shrink_M[:, None])
        max_M = higher_M
    return max_M, sum_M, acc_MV


@triton.jit
def _clear_idle(
    y, log_sum, query_start, count_R, row_R, rows, tokens, y_stride, log_stride, HEADS: tl.constexpr,
    VALUE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Zeros, and logarithms of -inf, for tokens of no row."""
    if tl.sum(count_R, 0) < tokens:
        start_R = tl.load(query_start + row_R, mask=row_R < rows, other=0)
        head, v = tl.program_id(0) % HEADS, tl.arange(0, V)
        token = tl.program_id(0) // HEADS
        while token < tokens:
            if tl.sum(((start_R <= token) & (token < start_R + count_R)).to(tl.int32), 0) == 0:
                out = y + token.to(tl.int64) * y_stride + head * VALUE + v
                tl.store(out, tl.zeros((V,), y.dtype.element_ty), mask=v < VALUE)
                tl.store(log_sum + token.to(tl.int64) * log_stride + head, float("-inf"))
            token += tl.num_programs(0) // HEADS


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile and compile options."""

    m: int
    keys: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as ``128x64_w8_s3``."""
        return f"{self.m}x{self.keys}_w{self.warps}_s{self.stages}"

    def tiles(self, call: OpCall) -> int:
        """The most tiles of a head that rows of the bucket can make."""
        rows, tokens = call.dims["R"], call.dims["T"]
        # A row wastes at most m - 1 places of its last tile, and every tile has a token.
        return min(tokens, (tokens + rows * (self.m - 1)) // self.m)

    def seconds(self, call: OpCall, width: int) -> float:
        """What one prompt takes that fills the bucket."""
        tiles, heads = -(-call.dims["T"] // self.m), call.attrs["heads"]
        steps = sum(-(-(tile + 1) * self.m // self.keys) for tile in range(tiles))
        rate = _REACHED[self.warps] * call.flops["bfloat16"] / call.multiprocessors
        a_step = 2 * self.m * self.keys * width / rate
        longest = -(-tiles * self.m // self.keys) * a_step
        busy = heads * (steps * a_step + tiles * _ITEM) / call.multiprocessors
        return _LAUNCH + max(longest + _ITEM, busy)


@cuda_kernel(
    mla_own_attention,
    "tiles",
    applies=lambda call: DTYPE_BYTES[call.tensors["q"].dtype] == 2 and call.attrs["scale"] > 0,
)
def mla_own_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Tiles of different sides, best first by an estimate."""
    nope, rope, value = (power_of_two(max(16, call.attrs[name])) for name in ("nope", "rope", "value"))
    width = nope + rope + value
    sides = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2))
    made = [
        tiling
        for tiling in (Tiling(*side) for side in sides)
        if 2 * (tiling.m * (nope + rope) + tiling.stages * tiling.keys * width) <= call.shared_bytes - 1024
        # Sums and scores of a thread; where they are in the way of each other the kernel spills.
        and tiling.m * (value + tiling.keys) <= 144 * 32 * tiling.warps
    ]
    return [
        _candidate(call, tiling, (nope, rope, value))
        for tiling in sorted(made, key=lambda w: w.seconds(call, width))
    ]


def _candidate(call: OpCall, tiling: Tiling, padded: tuple[int, int, int]) -> Candidate:
    dependent = "pdl" in call.features
    names = ("q", "kv", "latent", "query_start", "query_len", "y", "log_sum")
    strides = {f"{n}_stride": call.tensors[n].row_stride for n in ("q", "kv", "latent", "y")}
    launch = DeviceLaunch(
        function=f"{__name__}:own_attention_tiles",
        constants={
            **{name.upper(): call.attrs[name] for name in ("heads", "nope", "rope", "value", "rank")},
            **dict(zip("NQV", padded, strict=True)),
            "R": max(64, power_of_two(call.dims["R"])),
            "M": tiling.m,
            "K": tiling.keys,
            "PDL": dependent,
        },
        arguments={
            **{name: Pointer(name) for name in names},
            **{name: Scalar(stride, "int32") for name, stride in strides.items()},
            "log_stride": Scalar(call.tensors["log_sum"].row_stride, "int32", specialize=False),
            "rows": Scalar(call.dims["R"], "int32", specialize=False),
            "tokens": Scalar(call.dims["T"], "int32", specialize=False),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(call.attrs["heads"] * tiling.tiles(call), 1, 1),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        dependent=dependent,
        early=("query_len",),
    )
    return Candidate(tiling.name, (launch,), seconds=tiling.seconds(call, sum(padded)))
