"""What latent attention does token by token on the GPU: norm and cache write of latents, rotation, merging parts.

Rotated features come in as pairs side by side or as two halves and go out as two halves, so that they are loaded
and stored as two tiles.

# T tokens, L rank, Q rotated features, N others of a query head
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.attention.mla import merge_attention, mla_rope, mla_write
from makeready.kernels.attention.mla_scaled import mla_write_scaled
from makeready.kernels.attention.pages_triton import as_cached
from makeready.kernels.attention.write_scaled_triton import finite, whole
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two, row_tiles


@triton.jit
def turned_halves(x, rows, i, inside, Q: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotated halves, fp32, of features at ``x``; ``i`` are the pairs' numbers, ``rows`` their cosines and sines."""
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    SECOND: tl.constexpr = 1 if INTERLEAVED else Q // 2
    cos = tl.load(rows + i, mask=inside, other=0.0)
    sin = tl.load(rows + Q // 2 + i, mask=inside, other=0.0)
    first = tl.load(x + i * STEP, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + i * STEP + SECOND, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def write_latents(
    kv,
    rows,
    weight,
    kv_slot,
    cache,
    rope_cache,
    scales,
    latent,
    tokens,
    kv_stride,
    rows_stride,
    latent_stride,
    eps,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """``ROWS`` tokens a block; WIDTH and HALF are RANK and ROPE / 2 in powers of two.

    Args:
        rope_cache, scales: of a cache with scales, else None.
    """
    c = tl.arange(0, WIDTH)[None, :]
    i = tl.arange(0, HALF)[None, :]
    w = tl.load(weight + c, mask=c < RANK, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = token < tokens
    slot = tl.load(kv_slot + token, mask=inside, other=0).to(tl.int64)
    token = token.to(tl.int64)
    from_, to = kv + token * kv_stride, latent + token * latent_stride

    plain = inside & (c < RANK)
    x = tl.load(from_ + c, mask=plain, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / RANK + eps)
    # The cache rounds what is given on, which is rounded already.
    y = (x * scale * w).to(latent.dtype.element_ty)
    tl.store(to + c, y, mask=plain)
    if scales is None:
        held = cache + slot * (RANK + ROPE)
        tl.store(held + c, as_cached(y, cache), mask=plain)
        turned_to = held + RANK
        kept = cache
    else:
        _store_scaled(cache + slot * RANK + c, scales + slot, y.to(tl.float32), inside, plain)
        turned_to = rope_cache + slot * ROPE
        kept = rope_cache

    turned = inside & (i < ROPE // 2)
    first, second = turned_halves(from_ + RANK, rows + token * rows_stride, i, turned, ROPE, INTERLEAVED)
    first, second = first.to(latent.dtype.element_ty), second.to(latent.dtype.element_ty)
    tl.store(to + RANK + i, first, mask=turned)
    tl.store(to + RANK + ROPE // 2 + i, second, mask=turned)
    tl.store(turned_to + i, as_cached(first, kept), mask=turned)
    tl.store(turned_to + ROPE // 2 + i, as_cached(second, kept), mask=turned)


@triton.jit
def _store_scaled(to, scales, x, inside, plain):
    """Store rows ``x`` of fp32 as 8-bit numbers with a scale each; see :func:`~.mla_scaled.quantize_latents`.

    ``inside`` are rows that there are, ``plain`` their numbers.
    """
    kind = to.dtype.element_ty
    largest = 448.0 if kind.is_fp8() else 127.0
    # A maximum passes over NaN; a sum of zeros times what is not finite does not.
    none = tl.sum(x * 0.0, 1, keep_dims=True)
    scale = tl.div_rn(tl.max(tl.abs(x), 1, keep_dims=True), largest) + none
    good = finite(scale)
    tl.store(scales, tl.where(good, scale, float("nan")), mask=inside)
    good &= scale > 0
    steps = tl.where(good, tl.div_rn(x, tl.where(good, scale, 1.0)), 0.0)
    if kind.is_fp8():
        numbers = tl.clamp(steps, -448.0, 448.0).to(kind)
    else:
        numbers = tl.clamp(whole(steps), -127.0, 127.0).to(tl.int8)
    tl.store(to, numbers, mask=plain)


@triton.jit
def rotate_queries(
    q,
    rows,
    y,
    count,
    q_stride,
    rows_stride,
    y_stride,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """``ROWS`` of ``count`` heads a block; WIDTH and HALF are NOPE and ROPE / 2 in powers of two."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, column = (row // HEADS).to(tl.int64), (row % HEADS) * (NOPE + ROPE)
    from_, to = q + token * q_stride + column, y + token * y_stride + column
    c = tl.arange(0, WIDTH)[None, :]
    i = tl.arange(0, HALF)[None, :]
    plain = (row < count) & (c < NOPE)
    turned = (row < count) & (i < ROPE // 2)
    tl.store(to + c, tl.load(from_ + c, mask=plain), mask=plain)
    first, second = turned_halves(from_ + NOPE, rows + token * rows_stride, i, turned, ROPE, INTERLEAVED)
    tl.store(to + NOPE + i, first.to(y.dtype.element_ty), mask=turned)
    tl.store(to + NOPE + ROPE // 2 + i, second.to(y.dtype.element_ty), mask=turned)


@triton.jit
def merge_parts(
    x,
    x_log_sum,
    y,
    y_log_sum,
    z,
    count,
    x_stride,
    x_sum_stride,
    y_stride,
    y_sum_stride,
    z_stride,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """``ROWS`` of ``count`` heads a block. A part whose logarithm is -inf is not read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    x_sum = tl.load(x_log_sum + token * x_sum_stride + head, mask=row < count, other=float("-inf"))
    y_sum = tl.load(y_log_sum + token * y_sum_stride + head, mask=row < count, other=float("-inf"))
    c = tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (c < VALUE)
    at = head * VALUE + c
    x_wide = tl.load(x + token * x_stride + at, mask=inside & (x_sum > float("-inf")), other=0.0).to(
        tl.float32
    )
    y_wide = tl.load(y + token * y_stride + at, mask=inside & (y_sum > float("-inf")), other=0.0).to(
        tl.float32
    )
    most = tl.maximum(x_sum, y_sum)
    most = tl.where(most > float("-inf"), most, 0.0)
    of_x, of_y = tl.exp(x_sum - most), tl.exp(y_sum - most)
    # Where neither saw a key both weights are 0; else the larger one is 1.
    z_wide = (x_wide * of_x + y_wide * of_y) / tl.maximum(of_x + of_y, 1.0)
    tl.store(z + token * z_stride + at, z_wide.to(z.dtype.element_ty), mask=inside)


@cuda_kernel(mla_write, "tokens", invariant=True)
@cuda_kernel(mla_write_scaled, "tokens", invariant=True)
def mla_write_cuda(call: OpCall) -> Sequence[Candidate]:
    """See :func:`write_latents`."""
    rank, rope, further = call.attrs["rank"], call.attrs["rope"], ("rope_cache", "scales")
    scaled = "scales" in call.tensors
    names = ("kv", "rows", "weight", "kv_slot", "cache", *(further if scaled else ()), "latent")
    constants: dict[str, Any] = {"RANK": rank, "ROPE": rope, "INTERLEAVED": call.attrs["interleaved"]}
    constants |= {} if scaled else dict.fromkeys(further)
    arguments = {
        **_strides(call, kv_stride="kv", rows_stride="rows", latent_stride="latent"),
        "eps": Scalar(call.attrs["eps"], "float32"),
    }
    return _by_rows(
        call, "write_latents", names, constants, arguments, "tokens", call.dims["T"], rank, ("weight",)
    )


@cuda_kernel(mla_rope, "heads", invariant=True)
def mla_rope_cuda(call: OpCall) -> Sequence[Candidate]:
    """See :func:`rotate_queries`."""
    heads, nope, rope = (call.attrs[name] for name in ("heads", "nope", "rope"))
    constants = {"HEADS": heads, "NOPE": nope, "ROPE": rope, "INTERLEAVED": call.attrs["interleaved"]}
    strides = _strides(call, q_stride="q", rows_stride="rows", y_stride="y")
    count = call.dims["T"] * heads
    return _by_rows(call, "rotate_queries", ("q", "rows", "y"), constants, strides, "count", count, nope)


@cuda_kernel(merge_attention, "heads", invariant=True)
def merge_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """See :func:`merge_parts`."""
    heads, value = call.attrs["heads"], call.attrs["value"]
    names = ("x", "x_log_sum", "y", "y_log_sum", "z")
    strides = _strides(
        call, x_stride="x", x_sum_stride="x_log_sum", y_stride="y", y_sum_stride="y_log_sum", z_stride="z"
    )
    constants = {"HEADS": heads, "VALUE": value}
    return _by_rows(call, "merge_parts", names, constants, strides, "count", call.dims["T"] * heads, value)


def _strides(call: OpCall, **operands: str) -> dict[str, Scalar]:
    return {name: Scalar(call.tensors[operand].row_stride, "int32") for name, operand in operands.items()}


def _by_rows(
    call: OpCall,
    function: str,
    names: Sequence[str],
    constants: dict[str, Any],
    arguments: dict[str, Scalar],
    counted: str,
    count: int,
    width: int,
    early: tuple[str, ...] = (),
) -> Sequence[Candidate]:
    """A launch over ``count`` rows, each with all of its ``width`` elements and the rotated ones beside them."""
    tiles = row_tiles(
        count, width, multiprocessors=call.multiprocessors, whole_rows=True, invariant=call.invariant
    )
    pdl = "pdl" in call.features
    half = {"HALF": power_of_two(call.attrs["rope"] // 2)} if "rope" in call.attrs else {}
    launch = DeviceLaunch(
        function=f"{__name__}:{function}",
        constants={**constants, **half, "ROWS": tiles.rows, "WIDTH": tiles.width, "PDL": pdl},
        arguments={
            **{name: Pointer(name) for name in names},
            **arguments,
            counted: Scalar(count, "int32", specialize=False),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
        early=early,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)
