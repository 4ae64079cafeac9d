"""Moves of cache entries on GPUs: a block holds some numbers of all entries of a row before it stores them.

# D moves of a row, padded to a power of two; C numbers of an entry at a time
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.step.move_entries import move_entries, move_states, place_moves

_LANES, _NUMBERS = 128, 2048  # moves of a block; numbers that it has in registers, of a cache


@triton.jit
def place_nodes(
    row_slot,
    start,
    line,
    pages,
    source,
    target,
    moves,
    B: tl.constexpr,
    SIZE: tl.constexpr,
    BEHIND: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.move_entries.place_moves`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < moves
    row, d = j // DEEP, j % DEEP
    node = tl.load(line + j, mask=inside, other=0)
    moved = (node != 0) & (node != d + 1)
    own = pages + tl.load(row_slot + row, mask=moved, other=0).to(tl.int64) * B
    root = tl.load(start + row, mask=moved, other=0) - BEHIND
    came, goes = root + node, root + d + 1
    from_page = tl.load(own + came // SIZE, mask=moved, other=0)
    to_page = tl.load(own + goes // SIZE, mask=moved, other=0)
    tl.store(source + j, tl.where(moved, from_page * SIZE + came % SIZE, 0), mask=inside)
    tl.store(target + j, tl.where(moved, to_page * SIZE + goes % SIZE, 0), mask=inside)


@triton.jit
def move_rows(source, target, first, second, WIDE: tl.constexpr, DEEP: tl.constexpr, D: tl.constexpr,
              C: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """See :func:`~.move_entries.move_entries`; ``second`` is None for one cache."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    d = tl.arange(0, D)
    at = tl.program_id(0) * DEEP + d
    came = tl.load(source + at, mask=d < DEEP, other=0)
    goes = tl.load(target + at, mask=d < DEEP, other=0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    moved_DC = (came != goes)[:, None] & (c < WIDE)[None, :]
    from_DC = came.to(tl.int64)[:, None] * WIDE + c[None, :]
    to_DC = goes.to(tl.int64)[:, None] * WIDE + c[None, :]
    x_DC = tl.load(first + from_DC, mask=moved_DC)
    y_DC = x_DC
    if second is not None:
        y_DC = tl.load(second + from_DC, mask=moved_DC)
    tl.debug_barrier()  # a place that one entry comes to may be that of another
    tl.store(first + to_DC, x_DC, mask=moved_DC)
    if second is not None:
        tl.store(second + to_DC, y_DC, mask=moved_DC)


@cuda_kernel(place_moves, "rows", invariant=True)
def place_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`place_nodes`."""
    moves, pdl = int(call.tensors["source"].shape[0]), "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in call.tensors}
    constants = {
        "B": int(call.tensors["pages"].shape[1]),
        "SIZE": call.attrs["page_size"],
        "BEHIND": call.attrs["behind"],
        "DEEP": call.attrs["deep"],
        "BLOCK": _LANES,
        "PDL": pdl,
    }
    launch = DeviceLaunch(
        function=f"{__name__}:place_nodes",
        constants=constants,
        arguments=arguments | {"moves": Scalar(moves, "int32", specialize=False)},
        grid=(-(-moves // _LANES), 1, 1),
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)


@cuda_kernel(move_states, "rows", invariant=True)
@cuda_kernel(move_entries, "rows", invariant=True)
def move_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`move_rows`."""
    first, *others = (name for name in call.tensors if name not in ("source", "target"))
    second = others[0] if others else None
    deep, pdl = call.attrs["deep"], "pdl" in call.features
    wide = math.prod(int(d) for d in call.tensors[first].shape[2:])
    D = power_of_two(deep)
    C = min(power_of_two(wide), max(16, _NUMBERS // D))
    arguments: dict[str, Argument] = {name: Pointer(name) for name in ("source", "target")}
    arguments |= {"first": Pointer(first)} | ({"second": Pointer(second)} if second else {})
    launch = DeviceLaunch(
        function=f"{__name__}:move_rows",
        constants={
            "WIDE": wide,
            "DEEP": deep,
            "D": D,
            "C": C,
            "PDL": pdl,
            **({} if second else {"second": None}),
        },
        arguments=arguments,
        grid=(int(call.tensors["source"].shape[0]) // deep, -(-wide // C), 1),
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)
