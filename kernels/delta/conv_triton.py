"""The convolution of delta nets on GPUs.

Where rows have a token or two, a block takes some channels of a row through all of its tokens and leaves the tail
behind. Else blocks take tiles of tokens and channels, and a second kernel leaves the tails once all have been read.

# C channels, J taps
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.delta.conv import causal_conv_silu
from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two

_FEW = 2  # tokens a row, on average, that a row's blocks take one after the other


@triton.jit
def _input(x, tail, at, c, inside, X_STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr):
    """The input ``at`` tokens behind a row's first, which is at ``x``; those before it are in its tail."""
    new = tl.load(x + at.to(tl.int64) * X_STRIDE + c, mask=inside & (at >= 0), other=0.0).to(tl.float32)
    old = tl.load(tail + (at + (J - 1)) * C + c, mask=inside & (at < 0), other=0.0).to(tl.float32)
    return tl.where(at >= 0, new, old)


@triton.jit
def convolve_rows(
    x,
    weight,
    tail,
    state_in,
    state_out,
    query_start,
    query_len,
    y,
    C: tl.constexpr,
    J: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is rows x tiles of ``WIDTH`` channels."""
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = c < C
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0)
    count, start = tl.load(query_len + r), tl.load(query_start + r).to(tl.int64)
    before = tail + tl.load(state_in + r).to(tl.int64) * ((J - 1) * C)
    after = tail + tl.load(state_out + r).to(tl.int64) * ((J - 1) * C)
    for t in range(count):
        total = tl.zeros((WIDTH,), tl.float32)
        for j in tl.static_range(J):
            w = tl.load(weight + j * C + c, mask=inside, other=0.0).to(tl.float32)
            at = tl.full((WIDTH,), 0, tl.int32) + (t - (J - 1) + j)
            total += w * _input(x + start * X_STRIDE, before, at, c, inside, X_STRIDE, C, J)
        out = (total * tl.sigmoid(total)).to(y.dtype.element_ty)
        tl.store(y + (start + t) * Y_STRIDE + c, out, mask=inside)
    _leave(x + start * X_STRIDE, before, after, count, c, inside, X_STRIDE, C, J)


@triton.jit
def _leave(x, before, after, count, c, inside, X_STRIDE: tl.constexpr, C: tl.constexpr, J: tl.constexpr):
    """A row's last inputs go to its block, oldest first: what moves up there is read before it is written over."""
    if count > 0:
        for j in tl.static_range(J - 1):
            at = tl.zeros_like(c) + (count - (J - 1) + j)
            kept = _input(x, before, at, c, inside, X_STRIDE, C, J)
            tl.store(after + j * C + c, kept.to(after.dtype.element_ty), mask=inside)


@triton.jit
def convolve_tiles(
    x,
    weight,
    tail,
    state_in,
    query_start,
    query_len,
    y,
    rows,
    tokens,
    C: tl.constexpr,
    J: tl.constexpr,
    X_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is tiles of ``TOKENS`` x tiles of ``WIDTH`` channels; ``ROWS`` is rows or more, a power of two."""
    c = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.arange(0, ROWS)[None, :]
    count = tl.load(query_len + r, mask=r < rows, other=0)
    start = tl.load(query_start + r, mask=r < rows, other=0)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    mine = (token >= start) & (token < start + count)
    owned = (tl.sum(mine.to(tl.int32), 1, keep_dims=True) > 0) & (token < tokens)
    row = tl.sum(tl.where(mine, r, 0), 1, keep_dims=True)
    first = tl.sum(tl.where(mine, start, 0), 1, keep_dims=True)
    block = tl.load(state_in + row, mask=owned, other=0).to(tl.int64)
    inside = owned & (c < C)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for j in tl.static_range(J):
        w = tl.load(weight + j * C + c, mask=c < C, other=0.0).to(tl.float32)
        at = token - first - (J - 1) + j
        total += w * _input(
            x + first.to(tl.int64) * X_STRIDE, tail + block * ((J - 1) * C), at, c, inside, X_STRIDE, C, J
        )
    out = (total * tl.sigmoid(total)).to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * Y_STRIDE + c, out, mask=inside)


@triton.jit
def leave_tails(
    x,
    tail,
    state_in,
    state_out,
    query_start,
    query_len,
    C: tl.constexpr,
    J: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is that of :func:`convolve_rows`."""
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(0)
    before = tail + tl.load(state_in + r).to(tl.int64) * ((J - 1) * C)
    after = tail + tl.load(state_out + r).to(tl.int64) * ((J - 1) * C)
    start = tl.load(query_start + r).to(tl.int64)
    _leave(x + start * X_STRIDE, before, after, tl.load(query_len + r), c, c < C, X_STRIDE, C, J)


@cuda_kernel(causal_conv_silu, "tiles", invariant=True)
def causal_conv_silu_launches(call: OpCall) -> Sequence[Candidate]:
    """See the module's docstring. A deterministic plan takes tiles of tokens for all kinds of step."""
    tensors = call.tensors
    taps, channels = (int(n) for n in tensors["weight"].shape)
    pdl = "pdl" in call.features
    shared = {"C": channels, "J": taps, "X_STRIDE": tensors["x"].row_stride, "PDL": pdl}
    named = {
        name: Pointer(name) for name in ("x", "tail", "state_in", "state_out", "query_start", "query_len")
    }

    def rows(function: str, width: int, arguments: dict[str, Argument], **constants: int) -> DeviceLaunch:
        return DeviceLaunch(
            function=f"makeready.kernels.delta.conv_triton:{function}",
            constants={**shared, **constants, "WIDTH": width},
            arguments=arguments,
            grid=(call.rows, -(-channels // width), 1),
            num_warps=max(1, width // 128),
            dependent=pdl,
        )

    y_stride = tensors["y"].row_stride
    made = []
    if call.tokens <= _FEW * call.rows and not call.invariant:
        width = min(power_of_two(channels), 256)
        arguments: dict[str, Argument] = {**named, "weight": Pointer("weight"), "y": Pointer("y")}
        made.append(Candidate(f"rows_{width}", (rows("convolve_rows", width, arguments, Y_STRIDE=y_stride),)))
    width, tokens = min(power_of_two(channels), 128), 16
    arguments = {name: named[name] for name in ("x", "tail", "state_in", "query_start", "query_len")}
    arguments |= {"weight": Pointer("weight"), "y": Pointer("y")}
    arguments |= {"rows": Scalar(call.rows, "int32", False), "tokens": Scalar(call.tokens, "int32", False)}
    constants = {
        "Y_STRIDE": y_stride,
        "ROWS": power_of_two(max(call.rows, call.most_rows)),
        "TOKENS": tokens,
        "WIDTH": width,
    }
    tiles = DeviceLaunch(
        function="makeready.kernels.delta.conv_triton:convolve_tiles",
        constants={**shared, **constants},
        arguments=arguments,
        grid=(-(-call.tokens // tokens), -(-channels // width), 1),
        num_warps=4,
        dependent=pdl,
    )
    tails = rows("leave_tails", min(power_of_two(channels), 256), {**named})
    made.append(Candidate(f"{tokens}x{width}", (tiles, tails)))
    return tuple(made)
