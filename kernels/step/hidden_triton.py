"""Hidden states in pages on GPUs: tiles of rows that are moved, a thread a token that is placed.

# C features, V vocabulary, D drafted vocabulary
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import row_tiles
from makeready.kernels.step.hidden import hidden_read, hidden_write, place_before, spread_logits

_TOKENS, _LOGITS = 128, 1024  # of a block


@triton.jit
def move_rows(
    x,
    kv_slot,
    hidden,
    rows,
    WRITE: tl.constexpr,
    C: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """``hidden[kv_slot[r]] = x[r]`` of the places of all pages, or the other way round."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tile = tl.program_id(0)
    row = (tile // COLUMNS) * ROWS + tl.arange(0, ROWS)[:, None]
    c = (tile % COLUMNS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (c < C)
    place = hidden + tl.load(kv_slot + row, mask=row < rows, other=0).to(tl.int64) * C + c
    outside = x + row.to(tl.int64) * X_STRIDE + c
    if WRITE:
        tl.store(place, tl.load(outside, mask=inside), mask=inside)
    else:
        tl.store(outside, tl.load(place, mask=inside), mask=inside)


def _moved(call: OpCall, write: bool) -> Sequence[Candidate]:
    x, pdl = call.tensors["x"], "pdl" in call.features
    rows, width = int(x.shape[0]), int(x.shape[1])
    tiles = row_tiles(rows, width, multiprocessors=call.multiprocessors, invariant=call.invariant)
    launch = DeviceLaunch(
        function="makeready.kernels.step.hidden_triton:move_rows",
        constants={
            "WRITE": write,
            "C": width,
            "X_STRIDE": x.row_stride,
            "ROWS": tiles.rows,
            "WIDTH": tiles.width,
            "COLUMNS": tiles.columns,
            "PDL": pdl,
        },
        arguments={
            "x": Pointer("x"),
            "kv_slot": Pointer("kv_slot"),
            "hidden": Pointer("hidden"),
            "rows": Scalar(rows, "int32"),
        },
        grid=(tiles.blocks, 1, 1),
        num_warps=tiles.num_warps,
        dependent=pdl,
    )
    return (Candidate(f"{tiles.rows}x{tiles.width}", (launch,)),)


@cuda_kernel(hidden_write, "tiles", invariant=True)
def write_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`move_rows`."""
    return _moved(call, write=True)


@cuda_kernel(hidden_read, "tiles", invariant=True)
def read_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`move_rows`."""
    return _moved(call, write=False)


@triton.jit
def place_tokens(
    positions,
    token_slot,
    pages,
    prior,
    kv_slot,
    tokens,
    B: tl.constexpr,
    SIZE: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.hidden.place_before`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    slot = tl.load(token_slot + t, mask=inside, other=NULL)
    before = tl.load(positions + t, mask=inside, other=0) - 1
    live = (slot != NULL) & (before >= 0)
    before = tl.where(live, before, 0)
    page = tl.load(pages + slot.to(tl.int64) * B + before // SIZE, mask=live, other=0)
    tl.store(prior + t, before, mask=inside)
    tl.store(kv_slot + t, tl.where(live, page * SIZE + before % SIZE, 0), mask=inside)


@cuda_kernel(place_before, "tokens", invariant=True)
def place_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`place_tokens`."""
    tokens, pdl = int(call.tensors["positions"].shape[0]), "pdl" in call.features
    slots, width = call.tensors["pages"].shape
    launch = DeviceLaunch(
        function="makeready.kernels.step.hidden_triton:place_tokens",
        constants={
            "B": width,
            "SIZE": call.attrs["page_size"],
            "NULL": int(slots) - 1,
            "BLOCK": _TOKENS,
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in call.tensors},
            "tokens": Scalar(tokens, "int32", specialize=False),
        },
        grid=(-(-tokens // _TOKENS), 1, 1),
        dependent=pdl,
    )
    return (Candidate("tokens", (launch,)),)


@triton.jit
def clear_logits(y, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """-inf everywhere."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0).to(tl.int64) * V + v, float("-inf"), mask=v < V)


@triton.jit
def place_logits(
    logits,
    d2t,
    y,
    V: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.hidden.spread_logits`; over what :func:`clear_logits` has left."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = d + tl.load(d2t + d, mask=d < D, other=0)
    value = tl.load(logits + row * STRIDE + d, mask=d < D, other=0.0)
    tl.store(y + row * V + token, value, mask=(d < D) & (token >= 0) & (token < V))


@cuda_kernel(spread_logits, "blocks", invariant=True)
def spread_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`clear_logits` and :func:`place_logits`."""
    logits, pdl = call.tensors["logits"], "pdl" in call.features
    rows, drafted, vocabulary = int(logits.shape[0]), int(logits.shape[1]), call.attrs["vocabulary"]
    constants = {"V": vocabulary, "BLOCK": _LOGITS, "PDL": pdl}
    cleared = DeviceLaunch(
        function="makeready.kernels.step.hidden_triton:clear_logits",
        constants=constants,
        arguments={"y": Pointer("y")},
        grid=(rows, -(-vocabulary // _LOGITS), 1),
        dependent=pdl,
    )
    placed = DeviceLaunch(
        function="makeready.kernels.step.hidden_triton:place_logits",
        constants=constants | {"D": drafted, "STRIDE": logits.row_stride},
        arguments={name: Pointer(name) for name in ("logits", "d2t", "y")},
        grid=(rows, -(-drafted // _LOGITS), 1),
        dependent=pdl,
    )
    return (Candidate("blocks", (cleared, placed)),)
