"""From the q/k/v projection to attention on the GPU: head norms, rotation, cache write.

A block takes a few tokens and a few neighbouring heads that are all queries, all keys or all values; a row
of its tile is one head of one token. The rotated features come as two halves, since feature i turns with
i + Q/2; what lies behind the first Q features is only normalised.

# T tokens, G KV heads, D head size, Q rotated features, M rows (token, head) of a tile
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.paged import kv_write, norm_rope_kv_write
from makeready.kernels.attention.pages_triton import as_cached
from makeready.kernels.attention.scaled import norm_rope_kv_write_scaled
from makeready.kernels.attention.write_scaled_triton import store_heads
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel


@triton.jit
def norm_rope_kv_write_rows(
    qkv,
    rows,
    q_norm,
    k_norm,
    kv_slot,
    k_cache,
    v_cache,
    scales,
    q,
    tokens,
    qkv_stride,
    q_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    A_BLOCK: tl.constexpr,
    M: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is groups of ``A_BLOCK`` heads × groups of ``M // A_BLOCK`` tokens.

    Args:
        rows: fp32 ``[tokens, ROTARY]``: cosines, then sines.
        scales: fp16, see :mod:`~.scaled`, and BITS of a number; None and 0 where numbers have none.
        q_norm, k_norm: read where ``NORM``, and ``OFFSET`` is added to them.
        qkv_stride, q_stride: elements from one token to the next.
        A_BLOCK: heads of a block, a divisor of ``HEADS`` and ``KV_HEADS``.
        HALF, REST: ``ROTARY / 2`` and ``HEAD_DIM - ROTARY`` or more, powers of two.
    """
    m = tl.arange(0, M)
    token_M = tl.program_id(1) * (M // A_BLOCK) + m // A_BLOCK
    first = tl.program_id(0) * A_BLOCK
    is_q = first < HEADS
    is_v = first >= HEADS + KV_HEADS
    valid_M = (token_M < tokens) & (m < M // A_BLOCK * A_BLOCK)
    token_M = token_M.to(tl.int64)

    i = tl.arange(0, HALF)
    in_half = (i < ROTARY // 2)[None, :]
    whole = valid_M[:, None] & in_half
    j = tl.arange(0, REST)
    rest = valid_M[:, None] & (j < HEAD_DIM - ROTARY)[None, :]
    if NORM:
        if is_q:
            weight_1, weight_2, weight_3 = _parts(q_norm, i, j, HEAD_DIM, ROTARY)
        else:
            weight_1, weight_2, weight_3 = _parts(k_norm, i, j, HEAD_DIM, ROTARY)
        if OFFSET != 0:
            weight_1 += OFFSET
            weight_2 += OFFSET
            weight_3 += OFFSET
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    head_M = first + m % A_BLOCK
    x = qkv + (token_M * qkv_stride + head_M * HEAD_DIM)[:, None]
    x_1 = tl.load(x + i[None, :], mask=whole, other=0.0).to(tl.float32)
    x_2 = tl.load(x + ROTARY // 2 + i[None, :], mask=whole, other=0.0).to(tl.float32)
    x_3 = tl.zeros((M, REST), tl.float32)
    if HEAD_DIM > ROTARY:
        x_3 = tl.load(x + ROTARY + j[None, :], mask=rest, other=0.0).to(tl.float32)
    slot_M = tl.load(kv_slot + token_M, mask=valid_M, other=0).to(tl.int64) * KV_HEADS
    if not is_v:
        turn = rows + token_M[:, None] * ROTARY + i[None, :]
        cos = tl.load(turn, mask=whole, other=0.0)
        sin = tl.load(turn + ROTARY // 2, mask=whole, other=0.0)
        if NORM:
            power_M = tl.sum(x_1 * x_1 + x_2 * x_2, 1)
            if HEAD_DIM > ROTARY:
                power_M += tl.sum(x_3 * x_3, 1)
            scale = tl.rsqrt(power_M / HEAD_DIM + eps)[:, None]
            x_1 *= scale * weight_1[None, :]
            x_2 *= scale * weight_2[None, :]
            x_3 *= scale * weight_3[None, :]
        turned_1 = x_1 * cos - x_2 * sin
        x_2 = x_2 * cos + x_1 * sin
        x_1 = turned_1
    # A name for each: the branches' pointers differ in type where the cache does.
    if is_q:
        out_q = q + (token_M * q_stride + head_M * HEAD_DIM)[:, None]
        _store(out_q, x_1, x_2, x_3, i, j, whole, rest, HEAD_DIM, ROTARY)
    elif is_v:
        at_M = slot_M + head_M - HEADS - KV_HEADS
        if BITS > 0:
            store_heads(
                v_cache, scales, at_M, valid_M, x_1, x_2, x_3, 1, HEAD_DIM, ROTARY, HALF, REST, BITS
            )  # fmt: skip
        else:
            out_v = v_cache + (at_M * HEAD_DIM)[:, None]
            _store(out_v, x_1, x_2, x_3, i, j, whole, rest, HEAD_DIM, ROTARY)
    else:
        at_M = slot_M + head_M - HEADS
        if BITS > 0:
            store_heads(
                k_cache, scales, at_M, valid_M, x_1, x_2, x_3, 0, HEAD_DIM, ROTARY, HALF, REST, BITS
            )  # fmt: skip
        else:
            out_k = k_cache + (at_M * HEAD_DIM)[:, None]
            _store(out_k, x_1, x_2, x_3, i, j, whole, rest, HEAD_DIM, ROTARY)


@triton.jit
def _parts(weight, i, j, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two halves of the rotated features' weights, and the others'."""
    part_1 = tl.load(weight + i, mask=i < ROTARY // 2, other=0.0).to(tl.float32)
    part_2 = tl.load(weight + ROTARY // 2 + i, mask=i < ROTARY // 2, other=0.0).to(tl.float32)
    part_3 = tl.load(weight + ROTARY + j, mask=j < HEAD_DIM - ROTARY, other=0.0).to(tl.float32)
    return part_1, part_2, part_3


@triton.jit
def _store(out, x_1, x_2, x_3, i, j, whole, rest, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    tl.store(out + i[None, :], as_cached(x_1, out), mask=whole)
    tl.store(out + ROTARY // 2 + i[None, :], as_cached(x_2, out), mask=whole)
    if HEAD_DIM > ROTARY:
        tl.store(out + ROTARY + j[None, :], as_cached(x_3, out), mask=rest)


@triton.jit
def kv_write_rows(
    k,
    v,
    kv_slot,
    k_cache,
    v_cache,
    tokens,
    k_stride,
    v_stride,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Copy tokens' keys and values, ``WIDTH`` elements each, to their slots; grid columns × groups of M tokens."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token_M = tl.program_id(1) * M + tl.arange(0, M)
    c = tl.program_id(0) * C + tl.arange(0, C)
    valid = (token_M < tokens)[:, None] & (c < WIDTH)[None, :]
    slot_M = tl.load(kv_slot + token_M, mask=token_M < tokens, other=0).to(tl.int64)
    token_M = token_M.to(tl.int64)
    k_MC = tl.load(k + (token_M * k_stride)[:, None] + c[None, :], mask=valid, other=0.0)
    v_MC = tl.load(v + (token_M * v_stride)[:, None] + c[None, :], mask=valid, other=0.0)
    out = (slot_M * WIDTH)[:, None] + c[None, :]
    tl.store(k_cache + out, as_cached(k_MC, k_cache), mask=valid)
    tl.store(v_cache + out, as_cached(v_MC, v_cache), mask=valid)


def _in_pairs(call: OpCall) -> bool:
    """Whether features whose numbers share a byte lie in the same half."""
    return call.attrs["bits"] == 8 or call.dims["Q"] % 4 == 0


@cuda_kernel(norm_rope_kv_write_scaled, "rows", applies=_in_pairs, invariant=True)
@cuda_kernel(norm_rope_kv_write, "rows", invariant=True)
def norm_rope_kv_write_cuda(call: OpCall) -> Sequence[Candidate]:
    """Small tiles for few tokens, where all that counts is latency; larger ones for many."""
    a_tile = (16, 32) if call.dims["T"] <= 512 and not call.invariant else (32, 16, 64)
    scale = max(1, 128 // triton.next_power_of_2(call.attrs["head_dim"]))
    return [_rows(call, scale * m) for m in a_tile]


def _rows(call: OpCall, M: int) -> Candidate:
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    tokens, rotary = call.dims["T"], call.dims["Q"]
    shared = math.gcd(heads, kv_heads)
    a_block = max(n for n in range(1, M + 1) if shared % n == 0)
    norm, scaled = "q_norm" in call.tensors, "scales" in call.tensors
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:norm_rope_kv_write_rows",
        constants={
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "BITS": call.attrs.get("bits", 0),
            "ROTARY": rotary,
            "NORM": norm,
            "OFFSET": call.attrs["offset"],
            "A_BLOCK": a_block,
            "M": M,
            "HALF": triton.next_power_of_2(rotary // 2),
            "REST": triton.next_power_of_2(max(1, head_dim - rotary)),
            "PDL": dependent,
            **({} if scaled else {"scales": None}),
        },
        arguments={
            **{name: Pointer(name) for name in ("qkv", "rows", "kv_slot", "k_cache", "v_cache", "q")},
            **({"scales": Pointer("scales")} if scaled else {}),
            "q_norm": Pointer("q_norm" if norm else "qkv"),
            "k_norm": Pointer("k_norm" if norm else "qkv"),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "qkv_stride": Scalar(call.tensors["qkv"].row_stride, "int32"),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "eps": Scalar(call.attrs["eps"], "float32"),
        },
        grid=((heads + 2 * kv_heads) // a_block, triton.cdiv(tokens, M // a_block), 1),
        dependent=dependent,
        early=("q_norm", "k_norm") if norm else (),
    )
    return Candidate(f"rows_{M}", (launch,))


@cuda_kernel(kv_write, "copy", invariant=True)
def kv_write_cuda(call: OpCall) -> Sequence[Candidate]:
    """One plain copy; the fused op takes its place in plans that are meant to be fast."""
    width, tokens = call.attrs["kv_heads"] * call.attrs["head_dim"], call.dims["T"]
    M, C = 4, min(512, triton.next_power_of_2(width))
    dependent = "pdl" in call.features
    launch = DeviceLaunch(
        function=f"{__name__}:kv_write_rows",
        constants={"WIDTH": width, "M": M, "C": C, "PDL": dependent},
        arguments={
            **{name: Pointer(name) for name in ("k", "v", "kv_slot", "k_cache", "v_cache")},
            "tokens": Scalar(tokens, "int32", specialize=False),
            "k_stride": Scalar(call.tensors["k"].row_stride, "int32"),
            "v_stride": Scalar(call.tensors["v"].row_stride, "int32"),
        },
        grid=(triton.cdiv(width, C), triton.cdiv(tokens, M), 1),
        dependent=dependent,
    )
    return [Candidate("copy", (launch,))]
