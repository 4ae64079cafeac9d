"""The gated delta rule on GPUs, 64 tokens of a row at once (Yang et al. 2024, arXiv:2406.06484 and arXiv:2412.06464).

Within a chunk let G be the running sums of g, and D[i, j] = exp(G[i] - G[j]). The corrections U of its tokens solve

    (I + L) U = beta * (V - exp(G) * K S)        L[i, j] = beta[i] D[i, j] k[i] k[j]    for j < i

and with them

    Y = exp(G) * Q S + P U                       P[i, j] = D[i, j] q[i] k[j]            for j <= i
    S = exp(G[last]) S + (exp(G[last] - G) * K)' U

The first kernel makes the inverse of I + L, and P, of every chunk and value head. The second takes some features of
the values of a head through all chunks of a row, with the state in registers. Queries and keys stay as they are: what
makes them of length 1 are factors of tokens, which the first kernel leaves beside G.

# N tokens of a chunk, K features of a key, V features of a value that a block takes
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.delta.recurrent_triton import log_decay
from makeready.kernels.delta.rule import CHUNK, EPS, chunk_delta_rule
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_BLOCK = 16  # tokens whose corrections are solved for one after the other
_FACTORS = 3  # numbers of a token and value head: G, and what q and k are multiplied by


@triton.jit
def _inverse(l_NN, N: tl.constexpr, B: tl.constexpr):
    """``(I + L)^-1`` of a strictly lower triangle, fp32.

    The blocks on the diagonal are solved for row by row, all at once. With their inverses E and the other blocks M,
    ``I + L = E^-1 (I + E M)``, where E M has no powers beyond N / B - 1.
    """
    C: tl.constexpr = N // B
    i = tl.arange(0, N)
    same = (i[:, None] // B) == (i[None, :] // B)
    at = tl.arange(0, C)
    diagonal = (at[:, None] == at[None, :])[:, None, :, None]
    d_CBB = -tl.sum(tl.where(diagonal, tl.reshape(l_NN, (C, B, C, B)), 0.0), 2)
    row = tl.arange(0, B)
    for j in tl.static_range(1, B):
        # Row j of the inverse: what stands there, and as much of the rows above.
        this = (row == j)[None, :, None]
        own_CB = tl.sum(tl.where(this, d_CBB, 0.0), 1)
        above_CB = tl.sum(own_CB[:, :, None] * tl.where((row < j)[None, :, None], d_CBB, 0.0), 1)
        d_CBB = tl.where(this, (own_CB + above_CB)[:, None, :], d_CBB)
    d_CBB += tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :]
    e_NN = tl.reshape(tl.where(diagonal, d_CBB[:, :, None, :], 0.0), (N, N))
    m_NN = tl.dot(e_NN, tl.where(same, 0.0, l_NN))
    inverse = e_NN
    for _ in tl.static_range(C - 1):  # Horner: E - M (E - M (E - ..))
        inverse = e_NN - tl.dot(m_NN, inverse)
    return inverse


@triton.jit
def _row_of(item, query_len, rows, ROWS: tl.constexpr, N: tl.constexpr):
    """The row that chunk ``item`` of the step is of, and its number there; ``rows`` where there is no such chunk."""
    r = tl.arange(0, ROWS)
    chunks = tl.cdiv(tl.load(query_len + r, mask=r < rows, other=0), N)
    ends = tl.cumsum(chunks, 0)
    before = ends <= item
    return tl.sum(before.to(tl.int32), 0), item - tl.sum(tl.where(before, chunks, 0), 0)


@triton.jit
def within_chunks(
    qkv,
    ba,
    a_log,
    dt_bias,
    query_start,
    query_len,
    inverse,
    rest,
    product,
    factors,
    rows,
    EPS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    QKV_STRIDE: tl.constexpr,
    BA_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is chunks x value heads; ``inverse`` and ``product`` are ``[chunk, head, N, N]`` in the dtype of
    ``qkv``, and so is ``rest``, what is rounded off the former; ``factors`` is ``[chunk, head, 3, N]`` fp32. ROWS is
    rows or more, a power of two.
    """
    item, h = tl.program_id(0), tl.program_id(1)
    rate, bias = tl.load(a_log + h), tl.load(dt_bias + h)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    r, number = _row_of(item, query_len, rows, ROWS, N)
    if r < rows:
        i, k = tl.arange(0, N), tl.arange(0, K)
        first = number * N
        there = first + i < tl.load(query_len + r)
        token = (tl.load(query_start + r) + first + i).to(tl.int64)
        inside = there[:, None] & (k < KEY_DIM)[None, :]
        x = qkv + token[:, None] * QKV_STRIDE + (h * KEY_HEADS // VALUE_HEADS) * KEY_DIM + k[None, :]
        q_NK = tl.load(x, mask=inside, other=0.0)
        k_NK = tl.load(x + KEY_HEADS * KEY_DIM, mask=inside, other=0.0)
        wide = q_NK.to(tl.float32)
        of_q_N = SCALE * tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
        wide = k_NK.to(tl.float32)
        of_k_N = tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
        gate = ba + token * BA_STRIDE + h
        beta_N = tl.sigmoid(tl.load(gate, mask=there, other=0.0))
        a_N = tl.load(gate + VALUE_HEADS, mask=there, other=0.0) + bias
        g_N = tl.cumsum(tl.where(there, log_decay(a_N, rate), 0.0), 0)

        lower = i[:, None] >= i[None, :]
        # What is above the diagonal would grow without bound.
        d_NN = tl.exp(tl.where(lower, g_N[:, None] - g_N[None, :], 0.0)) * of_k_N[None, :]
        l_NN = tl.dot(k_NK, k_NK.T) * d_NN * (beta_N * of_k_N)[:, None]
        l_NN = tl.where(i[:, None] > i[None, :], l_NN, 0.0)
        p_NN = tl.where(lower, tl.dot(q_NK, k_NK.T) * d_NN * of_q_N[:, None], 0.0)
        place = (item * VALUE_HEADS + h).to(tl.int64)
        at = place * (N * N) + i[:, None] * N + i[None, :]
        tl.store(product + at, p_NN.to(product.dtype.element_ty))
        inverse_NN = _inverse(l_NN, N, B)
        high_NN = inverse_NN.to(inverse.dtype.element_ty)
        tl.store(inverse + at, high_NN)
        tl.store(rest + at, (inverse_NN - high_NN.to(tl.float32)).to(rest.dtype.element_ty))
        at = place * (3 * N) + i
        tl.store(factors + at, g_N)
        tl.store(factors + at + N, of_q_N)
        tl.store(factors + at + 2 * N, of_k_N)


@triton.jit
def along_rows(
    qkv,
    ba,
    state,
    state_in,
    state_out,
    query_start,
    query_len,
    y,
    inverse,
    rest,
    product,
    factors,
    rows,
    KEY_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    QKV_STRIDE: tl.constexpr,
    BA_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PDL: tl.constexpr,
):
    """The grid is tiles of values x value heads x rows."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    h, r = tl.program_id(1), tl.program_id(2)
    count, start = tl.load(query_len + r), tl.load(query_start + r)
    if count > 0:
        i, k = tl.arange(0, N), tl.arange(0, K)
        v = tl.program_id(0) * V + tl.arange(0, V)
        in_k, in_v = k < KEY_DIM, v < VALUE_DIM
        held = h * (KEY_DIM * VALUE_DIM) + k[:, None] * VALUE_DIM + v[None, :]
        inside = in_k[:, None] & in_v[None, :]
        SIZE: tl.constexpr = VALUE_HEADS * KEY_DIM * VALUE_DIM
        s_KV = tl.load(state + tl.load(state_in + r).to(tl.int64) * SIZE + held, mask=inside, other=0.0)
        s_KV = s_KV.to(tl.float32)
        every = tl.arange(0, ROWS)
        before = tl.load(query_len + every, mask=every < tl.minimum(r, rows), other=0)
        item = tl.sum(tl.cdiv(before, N), 0)
        queries = qkv + (h * KEY_HEADS // VALUE_HEADS) * KEY_DIM + k[None, :]
        values = qkv + 2 * KEY_HEADS * KEY_DIM + h * VALUE_DIM + v[None, :]
        out = y + h * VALUE_DIM + v[None, :]
        for first in range(0, count, N):
            there = first + i < count
            token = (start + first + i).to(tl.int64)
            of_keys = there[:, None] & in_k[None, :]
            of_values = there[:, None] & in_v[None, :]
            x = queries + token[:, None] * QKV_STRIDE
            q_NK = tl.load(x, mask=of_keys, other=0.0)
            k_NK = tl.load(x + KEY_HEADS * KEY_DIM, mask=of_keys, other=0.0)
            v_NV = tl.load(values + token[:, None] * QKV_STRIDE, mask=of_values, other=0.0).to(tl.float32)
            beta_N = tl.sigmoid(tl.load(ba + token * BA_STRIDE + h, mask=there, other=0.0))
            place = ((item + first // N) * VALUE_HEADS + h).to(tl.int64)
            at = place * (N * N) + i[:, None] * N + i[None, :]
            inverse_NN, rest_NN, p_NN = tl.load(inverse + at), tl.load(rest + at), tl.load(product + at)
            at = place * (3 * N) + i
            g_N, of_q_N, of_k_N = (
                tl.load(factors + at),
                tl.load(factors + at + N),
                tl.load(factors + at + 2 * N),
            )
            decay_N = tl.exp(g_N)
            all_of_it = tl.sum(tl.where(i == N - 1, g_N, 0.0), 0)

            # The state as two numbers of 16 bits, whose sum has nearly all of its digits. So are the inverse and the
            # corrections: where keys are nearly equal, neighbours cancel in all products with them.
            high_KV = s_KV.to(q_NK.dtype)
            low_KV = (s_KV - high_KV.to(tl.float32)).to(q_NK.dtype)
            known_NV = tl.dot(k_NK, high_KV, tl.dot(k_NK, low_KV)) * (of_k_N * decay_N)[:, None]
            read_NV = tl.dot(q_NK, high_KV, tl.dot(q_NK, low_KV)) * (of_q_N * decay_N)[:, None]
            wanted_NV = (v_NV - known_NV) * tl.where(there, beta_N, 0.0)[:, None]
            wanted_NV = wanted_NV.to(q_NK.dtype)
            u_NV = tl.dot(inverse_NN, wanted_NV, tl.dot(rest_NN, wanted_NV))
            high_NV = u_NV.to(q_NK.dtype)
            low_NV = (u_NV - high_NV.to(tl.float32)).to(q_NK.dtype)
            made_NV = tl.dot(p_NN, high_NV, tl.dot(p_NN, low_NV, read_NV))
            tl.store(out + token[:, None] * Y_STRIDE, made_NV.to(y.dtype.element_ty), mask=of_values)
            left_NV = u_NV * (of_k_N * tl.exp(all_of_it - g_N))[:, None]
            high_NV = left_NV.to(q_NK.dtype)
            low_NV = (left_NV - high_NV.to(tl.float32)).to(q_NK.dtype)
            s_KV = tl.dot(k_NK.T, high_NV, tl.dot(k_NK.T, low_NV, s_KV * tl.exp(all_of_it)))
        to = state + tl.load(state_out + r).to(tl.int64) * SIZE + held
        tl.store(to, s_KV.to(state.dtype.element_ty), mask=inside)


@cuda_kernel(chunk_delta_rule, "chunks")
def chunk_delta_rule_launches(call: OpCall) -> Sequence[Candidate]:
    """See the module's docstring."""
    heads, keys, values = (call.attrs[name] for name in ("value_heads", "key_dim", "value_dim"))
    chunks = min(call.tokens, -(-call.tokens // CHUNK) + call.rows)
    item = DTYPE_BYTES[call.tensors["qkv"].dtype]
    matrices, pdl = chunks * heads * CHUNK * CHUNK * item, "pdl" in call.features
    dtype = call.tensors["qkv"].dtype
    scratch = {
        "inverse": Scratch(0, dtype),
        "rest": Scratch(matrices, dtype),
        "product": Scratch(2 * matrices, dtype),
        "factors": Scratch(3 * matrices, "float32"),
    }
    shared = {
        "KEY_HEADS": call.attrs["key_heads"],
        "KEY_DIM": keys,
        "VALUE_HEADS": heads,
        "QKV_STRIDE": call.tensors["qkv"].row_stride,
        "BA_STRIDE": call.tensors["ba"].row_stride,
        "ROWS": power_of_two(max(call.rows, call.most_rows)),
        "N": CHUNK,
        "K": max(16, power_of_two(keys)),
        "PDL": pdl,
    }
    rows = Scalar(call.rows, "int32", False)
    first = DeviceLaunch(
        function="makeready.kernels.delta.chunk_triton:within_chunks",
        constants={**shared, "EPS": EPS, "B": _BLOCK, "SCALE": keys**-0.5},
        arguments={
            **{n: Pointer(n) for n in ("qkv", "ba", "a_log", "dt_bias", "query_start", "query_len")},
            **scratch,
            "rows": rows,
        },
        grid=(chunks, heads, 1),
        num_warps=4,
        dependent=pdl,
        early=("a_log", "dt_bias"),
    )
    names = ("qkv", "ba", "state", "state_in", "state_out", "query_start", "query_len", "y")
    made = []
    # Tiles of 64 spill. Not one stage: what the assembler makes of that reads outside of shared memory on an H200.
    width = max(16, min(32, power_of_two(values)))
    grid = (-(-values // width), heads, call.rows)
    total = 3 * matrices + chunks * heads * _FACTORS * CHUNK * 4
    for stages in (2, 3):
        second = DeviceLaunch(
            function="makeready.kernels.delta.chunk_triton:along_rows",
            constants={**shared, "VALUE_DIM": values, "Y_STRIDE": call.tensors["y"].row_stride, "V": width},
            arguments={**{name: Pointer(name) for name in names}, **scratch, "rows": rows},
            grid=grid,
            num_warps=4,
            num_stages=stages,
            dependent=pdl,
        )
        made.append(Candidate(f"{CHUNK}x{width}_s{stages}", (first, second), scratch=total))
    return tuple(made)
