"""Log-probabilities on GPUs in two launches: chunks of the rows that ask, then rows.

The most probable tokens of a row are among those of its chunks; both are taken one by one, largest first.
Chunks and the order of sums do not depend on the batch.

# R rows, V vocabulary, K alternatives at most
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.sample.logprobs import token_logprobs
from makeready.kernels.sample.numeric_triton import exp_gap, from_key, pack, packed_id, packed_key

_CHUNK = 4096
_BLOCKS_A_CORE = 4
_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def rank_chunks(
    logits,
    row_slot,
    top_logprobs,
    peaks,
    sums,
    tops,
    splits,
    V: tl.constexpr,
    K: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of every ``splits``-th chunk of a row: largest logit, sum of exponentials relative to it, top tokens.

    The sums are fp64, kept as int64.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    asked = tl.load(top_logprobs + tl.load(row_slot + row))
    if asked < 0:
        return
    count = tl.minimum(tl.minimum(asked, K), V)
    for chunk in range(split, CHUNKS, splits):
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        at = logits + row.to(tl.int64) * LOGITS_STRIDE + ids
        z = tl.load(at, mask=ids < V, other=float("-inf"))
        peak = tl.max(z, 0)
        power = tl.where(ids < V, exp_gap(tl.where(z == peak, 0.0, z - peak)), 0.0)
        place = row * CHUNKS + chunk
        tl.store(peaks + place, peak)
        tl.store(sums + place, tl.sum(power.to(tl.float64), 0).to(tl.int64, bitcast=True))
        packed = tl.where(ids < V, pack(z, ids), _NOTHING)
        for i in range(count):
            largest = tl.max(packed, 0)
            tl.store(tops + place * K + i, largest)
            packed = tl.where(packed == largest, _NOTHING, packed)


@triton.jit
def rank_rows(
    logits,
    tokens,
    row_slot,
    top_logprobs,
    logprob,
    top_ids,
    top_values,
    peaks,
    sums,
    tops,
    V: tl.constexpr,
    K: tl.constexpr,
    K_WIDTH: tl.constexpr,
    LOGITS_STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row's results from what :func:`rank_chunks` left."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    asked = tl.load(top_logprobs + tl.load(row_slot + row))
    i = tl.arange(0, K_WIDTH)
    ids, values = tl.full((K_WIDTH,), -1, tl.int32), tl.zeros((K_WIDTH,), tl.float32)
    own = tl.full((), 0.0, tl.float32)
    if asked >= 0:
        c = tl.arange(0, CHUNKS_WIDTH)
        peak = tl.load(peaks + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        largest = tl.max(peak, 0)
        share = tl.exp(tl.where(peak == largest, 0.0, peak - largest).to(tl.float64))
        held = tl.load(sums + row * CHUNKS + c, mask=c < CHUNKS, other=0)
        norm = tl.log(tl.sum(share * held.to(tl.float64, bitcast=True), 0))
        token = tl.load(tokens + row)
        z = tl.load(logits + row.to(tl.int64) * LOGITS_STRIDE + tl.maximum(token, 0))
        own = ((z - largest).to(tl.float64) - norm).to(tl.float32)
        own = tl.where(token < 0, float("nan"), own)
        count = tl.minimum(tl.minimum(asked, K), V)
        if count > 0:
            place = (row * CHUNKS + c)[:, None] * K + i[None, :]
            packed = tl.load(tops + place, mask=(c < CHUNKS)[:, None] & (i < count)[None, :], other=_NOTHING)
            for n in range(count):
                best = tl.max(packed)
                packed = tl.where(packed == best, _NOTHING, packed)
                gap = from_key(packed_key(best)) - largest
                ids = tl.where(i == n, packed_id(best), ids)
                values = tl.where(i == n, (gap.to(tl.float64) - norm).to(tl.float32), values)
    tl.store(logprob + row, own)
    tl.store(top_ids + row * K + i, ids, mask=i < K)
    tl.store(top_values + row * K + i, values, mask=i < K)


@cuda_kernel(token_logprobs, "chunks", invariant=True)
def token_logprobs_launches(call: OpCall) -> Sequence[Candidate]:
    """See the module's docstring."""
    rows, vocabulary = call.tensors["logits"].shape
    assert isinstance(rows, int)
    assert isinstance(vocabulary, int)
    most = call.attrs["max_top"]
    chunks = -(-vocabulary // _CHUNK)
    splits = min(max(-(-_BLOCKS_A_CORE * call.multiprocessors // rows), 1), chunks)
    pdl = "pdl" in call.features
    sums = 8 * rows * chunks
    left: dict[str, Argument] = {
        "sums": Scratch(0, "int64"),
        "tops": Scratch(sums, "int64"),
        "peaks": Scratch(sums * (1 + most), "float32"),
    }
    common = {
        "V": vocabulary,
        "K": most,
        "LOGITS_STRIDE": call.tensors["logits"].row_stride,
        "CHUNKS": chunks,
        "PDL": pdl,
    }
    operands: dict[str, Argument] = {name: Pointer(name) for name in ("logits", "row_slot", "top_logprobs")}
    first = DeviceLaunch(
        function="makeready.kernels.sample.logprobs_triton:rank_chunks",
        constants={**common, "CHUNK": _CHUNK},
        arguments={**operands, **left, "splits": Scalar(splits, "int32")},
        grid=(rows * splits, 1, 1),
        num_warps=8,
        dependent=pdl,
    )
    results = ("tokens", "logprob", "top_ids", "top_values")
    second = DeviceLaunch(
        function="makeready.kernels.sample.logprobs_triton:rank_rows",
        constants={**common, "K_WIDTH": power_of_two(most), "CHUNKS_WIDTH": power_of_two(chunks)},
        arguments={**operands, **left, **{name: Pointer(name) for name in results}},
        grid=(rows, 1, 1),
        num_warps=4,
        dependent=pdl,
    )
    return (Candidate("chunks", (first, second), scratch=sums * (1 + most) + sums // 2),)
