"""The gated delta rule token by token on GPUs: every state is read once and written once.

A block takes some features of the values of one head through all tokens of a row, with the state in registers. Keys
are spread over the lanes of few warps, so that sums over them seldom leave a warp.

# K features of a key, V features of a value that a block takes
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.delta.rule import EPS, recurrent_delta_rule
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two

# Features of a value and warps of a block. Narrow ones for few rows, so that they reach all multiprocessors.
_NARROW, _WIDE = (8, 1), (32, 4)


@triton.jit
def log_decay(a, a_log):
    """``-exp(a_log) * log(1 + exp(a))``."""
    return -tl.exp(a_log) * tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))


@triton.jit
def by_tokens(
    qkv,
    ba,
    a_log,
    dt_bias,
    state,
    state_in,
    state_out,
    query_start,
    query_len,
    y,
    EPS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    QKV_STRIDE: tl.constexpr,
    BA_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is tiles of values x value heads x rows; K and V are powers of two."""
    h = tl.program_id(1)
    rate, bias = tl.load(a_log + h), tl.load(dt_bias + h)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    r = tl.program_id(2)
    count, start = tl.load(query_len + r), tl.load(query_start + r).to(tl.int64)
    if count > 0:
        k = tl.arange(0, K)
        v = tl.program_id(0) * V + tl.arange(0, V)
        in_k, in_v = k < KEY_DIM, v < VALUE_DIM
        place = h * (KEY_DIM * VALUE_DIM) + k[:, None] * VALUE_DIM + v[None, :]
        inside = in_k[:, None] & in_v[None, :]
        SIZE: tl.constexpr = VALUE_HEADS * KEY_DIM * VALUE_DIM
        s_KV = tl.load(state + tl.load(state_in + r).to(tl.int64) * SIZE + place, mask=inside, other=0.0)
        s_KV = s_KV.to(tl.float32)
        q = (h * KEY_HEADS // VALUE_HEADS) * KEY_DIM + k
        value = 2 * KEY_HEADS * KEY_DIM + h * VALUE_DIM + v
        for t in range(count):
            x = qkv + (start + t) * QKV_STRIDE
            q_K = tl.load(x + q, mask=in_k, other=0.0).to(tl.float32)
            k_K = tl.load(x + KEY_HEADS * KEY_DIM + q, mask=in_k, other=0.0).to(tl.float32)
            v_V = tl.load(x + value, mask=in_v, other=0.0).to(tl.float32)
            gate = ba + (start + t) * BA_STRIDE + h
            beta = tl.sigmoid(tl.load(gate))
            g = log_decay(tl.load(gate + VALUE_HEADS) + bias, rate)
            q_K *= SCALE * tl.rsqrt(tl.sum(q_K * q_K) + EPS)
            k_K *= tl.rsqrt(tl.sum(k_K * k_K) + EPS)
            s_KV *= tl.exp(g)
            known_V = tl.sum(s_KV * k_K[:, None], 0)
            s_KV += k_K[:, None] * ((v_V - known_V) * beta)[None, :]
            out_V = tl.sum(s_KV * q_K[:, None], 0)
            to = y + (start + t) * Y_STRIDE + h * VALUE_DIM + v
            tl.store(to, out_V.to(y.dtype.element_ty), mask=in_v)
            s_KV = s_KV.to(state.dtype.element_ty).to(
                tl.float32
            )  # as it is stored, wherever the sequence is cut
        to = state + tl.load(state_out + r).to(tl.int64) * SIZE + place
        tl.store(to, s_KV.to(state.dtype.element_ty), mask=inside)


@cuda_kernel(recurrent_delta_rule, "tokens", invariant=True)
def recurrent_delta_rule_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`by_tokens`. A deterministic plan takes one tile for all kinds of step, a narrow one."""
    heads, values = call.attrs["value_heads"], call.attrs["value_dim"]
    pdl = "pdl" in call.features
    constants = {
        "EPS": EPS,
        "KEY_HEADS": call.attrs["key_heads"],
        "KEY_DIM": call.attrs["key_dim"],
        "VALUE_HEADS": heads,
        "VALUE_DIM": values,
        "QKV_STRIDE": call.tensors["qkv"].row_stride,
        "BA_STRIDE": call.tensors["ba"].row_stride,
        "Y_STRIDE": call.tensors["y"].row_stride,
        "K": power_of_two(call.attrs["key_dim"]),
        "SCALE": call.attrs["key_dim"] ** -0.5,
        "PDL": pdl,
    }
    names = (
        "qkv",
        "ba",
        "a_log",
        "dt_bias",
        "state",
        "state_in",
        "state_out",
        "query_start",
        "query_len",
        "y",
    )
    # Enough wide blocks to fill every multiprocessor twice.
    many = call.rows * heads * -(-values // _WIDE[0]) >= 8 * call.multiprocessors
    made = []
    for width, warps in (_WIDE, _NARROW) if many and not call.invariant else (_NARROW, _WIDE):
        width = min(width, power_of_two(values))
        launch = DeviceLaunch(
            function="makeready.kernels.delta.recurrent_triton:by_tokens",
            constants={**constants, "V": width},
            arguments={name: Pointer(name) for name in names},
            grid=(-(-values // width), heads, call.rows),
            num_warps=warps,
            dependent=pdl,
            early=("a_log", "dt_bias"),
        )
        made.append(Candidate(f"{width}_w{warps}", (launch,)))
    return tuple(made)
