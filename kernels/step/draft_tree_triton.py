"""Trees of drafts on GPUs: a block a row, a lane a node.

# M nodes of a tree, W nodes of a level, K children of a node, L tokens of context, DEEP levels behind the root
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.step.draft_chain_triton import tokens_of
from makeready.kernels.step.draft_tree import (
    exclude,
    grow_tree,
    pack_tree,
    place_level,
    plant_tree,
    take_parents,
)

_LANES, _WIDE = 128, 1024  # rows and tokens at a time; logits and features of a block


@triton.jit
def plant_rows(row_slot, start, history, tree, M: tl.constexpr, L: tl.constexpr, NULL: tl.constexpr,
               NODES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """See :func:`~.draft_tree.plant_tree`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    n = tl.arange(0, NODES)
    slot = tl.load(row_slot + row)
    root = tl.load(history + slot.to(tl.int64) * L + tl.load(start + row), mask=slot != NULL, other=0)
    tl.store(tree + row * M + n, tl.where(n == 0, root, 0), mask=n < M)


@triton.jit
def _token(node, drawn, given, staged, live):
    """Tokens of nodes of a row: those that are ``given`` where it is ``staged``, else those that were ``drawn``."""
    own = tl.load(given + node, mask=live & staged, other=0)
    return tl.where(staged, own, tl.load(drawn + node, mask=live & (staged == 0), other=0))


@triton.jit
def _lead(path, t, node, far, drawn, given, staged, parent, live, inside, DEEP: tl.constexpr):
    """Store the tokens of the nodes from the root on that lead to ``node``, ``far`` of them; see :func:`_token`."""
    for i in tl.static_range(DEEP + 1):
        d = DEEP - i
        on = live & (d <= far)
        token = _token(node, drawn, given, staged, on)
        tl.store(path + t * (DEEP + 1) + d, token, mask=inside)
        node = tl.where(on, tl.load(parent + node, mask=on, other=0), node)


@triton.jit
def place_nodes(
    row_slot,
    sample_slot,
    start,
    drafts,
    tree,
    parent,
    depth,
    ancestors,
    level,
    ids,
    positions,
    places,
    token_slot,
    visible,
    draw_slot,
    draw_context,
    path,
    path_len,
    query_start,
    query_len,
    context_len,
    tree_start,
    M: tl.constexpr,
    W: tl.constexpr,
    NODES: tl.constexpr,
    BEHIND: tl.constexpr,
    DEEP: tl.constexpr,
    NULL: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_tree.place_level`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    w = tl.arange(0, NODES)
    inside = w < W
    most = tl.load(drafts + row)
    root = tl.load(start + row)
    node = tl.load(level + w, mask=inside, other=0)
    live = inside & (most > 0) & (node <= most)
    far = tl.load(depth + node, mask=live, other=0)
    t = row * W + w
    place = root - BEHIND + node
    tl.store(ids + t, tl.load(tree + row * M + node, mask=live, other=0), mask=inside)
    tl.store(positions + t, tl.where(live, root - BEHIND + far, 0), mask=inside)
    tl.store(places + t, tl.where(live, place, 0), mask=inside)
    tl.store(token_slot + t, tl.where(live, tl.load(row_slot + row), NULL), mask=inside)
    tl.store(visible + t, tl.load(ancestors + node, mask=live, other=0), mask=inside)
    tl.store(draw_slot + t, tl.where(live, tl.load(sample_slot + row), NULL), mask=inside)
    tl.store(draw_context + t, tl.where(live, root + far + 1, 0), mask=inside)
    tl.store(path_len + t, tl.where(live, far + 1, 0), mask=inside)
    _lead(path, t, node, far, tree + row * M, tree, False, parent, live, inside, DEEP)
    count = tl.sum(live.to(tl.int32), 0)
    tl.store(query_start + row, row * W)
    tl.store(query_len + row, count)
    tl.store(context_len + row, tl.max(tl.where(live, place + 1, 0), 0))
    tl.store(tree_start + row, tl.where(count > 0, root - BEHIND, 0))


@triton.jit
def grow_rows(tree, drawn, level, children, grown, M: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
              RANK: tl.constexpr, NODES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """See :func:`~.draft_tree.grow_tree`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    n = tl.arange(0, NODES)
    tl.store(grown + row * M + n, tl.load(tree + row * M + n, mask=n < M, other=0), mask=n < M)
    tl.debug_barrier()  # new nodes are stored over these
    node = tl.load(level + n, mask=n < W, other=0)
    child = tl.load(children + node * K + RANK, mask=n < W, other=-1)
    token = tl.load(drawn + row * W + n, mask=child >= 0, other=0)
    tl.store(grown + row * M + child, tl.maximum(token, 0), mask=child >= 0)


@triton.jit
def exclude_tokens(logits, tokens, others, stride, X, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """See :func:`~.draft_tree.exclude`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + x, mask=x < X, other=0.0)
    tl.store(others + row * X + x, tl.where(x == tl.load(tokens + row), float("-inf"), z), mask=x < X)


@triton.jit
def copy_parents(x, level, below, parent, y, stride, C, W: tl.constexpr, V: tl.constexpr, NODES: tl.constexpr,
                 BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """See :func:`~.draft_tree.take_parents`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    w = tl.arange(0, NODES)
    up = tl.load(parent + tl.load(below + t % V))
    at = tl.sum(tl.where((w < W) & (tl.load(level + w, mask=w < W, other=-1) == up), w, 0), 0)
    source = (t // V * W + at).to(tl.int64) * stride
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + t.to(tl.int64) * C + c, tl.load(x + source + c, mask=c < C), mask=c < C)


@triton.jit
def pack_nodes(
    token_ids,
    row_slot,
    query_start,
    query_len,
    sample_slot,
    start,
    drafts,
    tree,
    parent,
    depth,
    ancestors,
    ids,
    positions,
    places,
    after,
    token_slot,
    visible,
    draw_slot,
    draw_context,
    path,
    path_len,
    draft_start,
    draft_len,
    context_len,
    rows,
    tokens,
    M: tl.constexpr,
    NODES: tl.constexpr,
    DEEP: tl.constexpr,
    NULL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_tree.pack_tree`; the block behind the last row's has the tokens of no row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    begin = 0
    for first in range(0, row, BLOCK):
        before = first + tl.arange(0, BLOCK)
        counts, _ = tokens_of(before, before < row, token_ids, row_slot, query_start, query_len, drafts, NULL)
        begin += tl.sum(counts, 0)
    own = row < rows
    count, staged = tokens_of(row, own, token_ids, row_slot, query_start, query_len, drafts, NULL)
    end = tl.where(own, begin + count, tokens)
    root = tl.load(start + row, mask=own, other=0)
    slot = tl.load(row_slot + row, mask=own, other=NULL)
    sampled = tl.load(sample_slot + row, mask=own, other=NULL)
    given = token_ids + tl.load(query_start + row, mask=own, other=0)
    drawn = tree + row * M
    for first in range(begin, end, NODES):
        t = first + tl.arange(0, NODES)
        inside = t < end
        live = inside & own
        node = tl.where(live, t - begin, 0)
        far = tl.load(depth + node, mask=live, other=0)
        up = tl.load(parent + node, mask=live, other=0)
        tl.store(ids + t, _token(node, drawn, given, staged, live), mask=inside)
        tl.store(positions + t, tl.where(live, root + far, 0), mask=inside)
        tl.store(places + t, tl.where(live, root + node, 0), mask=inside)
        tl.store(after + t, tl.where(live, root + up + (node > 0).to(tl.int32), 0), mask=inside)
        tl.store(token_slot + t, tl.where(live, slot, NULL), mask=inside)
        tl.store(visible + t, tl.load(ancestors + node, mask=live, other=0), mask=inside)
        tl.store(draw_slot + t, tl.where(live, sampled, NULL), mask=inside)
        tl.store(draw_context + t, tl.where(live, root + far + 1, 0), mask=inside)
        tl.store(path_len + t, tl.where(live, far + 1, 0), mask=inside)
        _lead(path, t, node, far, drawn, given, staged, parent, live, inside, DEEP)
    if own:
        tl.store(draft_start + row, begin)
        tl.store(draft_len + row, count)
        tl.store(context_len + row, tl.where(count > 0, root + count, 0))


def row_launch(
    call: OpCall,
    module: str,
    function: str,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    scalars: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
) -> Sequence[Candidate]:
    """The one launch of an op on trees, whose operands have the names of the function's; not those ``without``."""
    pdl = "pdl" in call.features
    arguments: dict[str, Argument] = {name: Pointer(name) for name in call.tensors if name not in without}
    arguments |= {name: Scalar(value, "int32", specialize=False) for name, value in (scalars or {}).items()}
    launch = DeviceLaunch(
        function=f"{module}:{function}",
        constants={**constants, "PDL": pdl},
        arguments=arguments,
        grid=(*grid, 1, 1)[:3],
        num_warps=1 if len(grid) == 1 else 4,
        dependent=pdl,
    )
    return (Candidate("rows", (launch,)),)


def size_of(call: OpCall, name: str, axis: int = 0) -> int:
    """Of an axis of an operand or result."""
    return int(call.tensors[name].shape[axis])


def lanes_of(call: OpCall, name: str = "parent") -> int:
    """Lanes for the nodes of a tree, or of a level."""
    return max(16, power_of_two(size_of(call, name)))


@cuda_kernel(plant_tree, "rows", invariant=True)
def plant_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`plant_rows`."""
    history = call.tensors["history"]
    constants = {"M": size_of(call, "parent"), "NODES": lanes_of(call)}
    constants |= {"L": history.row_stride, "NULL": int(history.shape[0]) - 1}
    return row_launch(
        call, __name__, "plant_rows", (size_of(call, "row_slot"),), constants, without=("parent",)
    )


@cuda_kernel(place_level, "rows", invariant=True)
def level_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`place_nodes`."""
    constants = {"M": size_of(call, "parent"), "W": size_of(call, "level"), "NODES": lanes_of(call, "level")}
    constants |= {
        "BEHIND": call.attrs["behind"],
        "DEEP": call.attrs["deep"],
        "NULL": size_of(call, "length") - 1,
    }
    return row_launch(
        call, __name__, "place_nodes", (size_of(call, "row_slot"),), constants, without=("length",)
    )


@cuda_kernel(grow_tree, "rows", invariant=True)
def grow_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`grow_rows`."""
    rows, nodes = (int(d) for d in call.tensors["tree"].shape)
    constants = {"M": nodes, "W": size_of(call, "level"), "K": size_of(call, "children", 1)}
    constants |= {"RANK": call.attrs["rank"], "NODES": max(16, power_of_two(nodes))}
    return row_launch(call, __name__, "grow_rows", (rows,), constants)


@cuda_kernel(exclude, "rows", invariant=True)
def exclude_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`exclude_tokens`."""
    rows, wide = (int(d) for d in call.tensors["logits"].shape)
    sizes = {"stride": call.tensors["logits"].row_stride, "X": wide}
    return row_launch(call, __name__, "exclude_tokens", (rows, -(-wide // _WIDE)), {"BLOCK": _WIDE}, sizes)


@cuda_kernel(take_parents, "rows", invariant=True)
def parent_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`copy_parents`."""
    rows, wide = size_of(call, "y"), size_of(call, "y", 1)
    constants = {
        "W": size_of(call, "level"),
        "V": size_of(call, "below"),
        "NODES": lanes_of(call, "level"),
        "BLOCK": _WIDE,
    }
    sizes = {"stride": call.tensors["x"].row_stride, "C": wide}
    return row_launch(
        call, __name__, "copy_parents", (rows, -(-wide // _WIDE)), constants, sizes, without=("tree",)
    )


@cuda_kernel(pack_tree, "rows", invariant=True)
def pack_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`pack_nodes`."""
    rows = size_of(call, "row_slot")
    constants = {"M": size_of(call, "parent"), "NODES": lanes_of(call), "DEEP": call.attrs["deep"]}
    constants |= {"NULL": size_of(call, "length") - 1, "BLOCK": _LANES}
    sizes = {"rows": rows, "tokens": size_of(call, "token_ids")}
    return row_launch(call, __name__, "pack_nodes", (rows + 1,), constants, sizes, without=("length",))
