"""Attention of trees of drafts for the GPU without one: interpreted against the reference, and cross-compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from attention_inputs import Heads
from attention_interpreted import (
    F8,
    F16,
    Geometry,
    attrs_of,
    check,
    compiled,
    emit,
    interpreted,
    numpy_2_4,
    op_call,
    run_interpreted,
)
from tree_inputs import nodes_of_rows

from makeready.kernels.attention.tree import tree_attention

assert numpy_2_4  # a fixture for all tests here


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    run_interpreted(__file__)


TREES: list[tuple[Geometry, torch.dtype, int, tuple[tuple[int, int], ...]]] = [
    ((8, 2, 128, 64, 0), F16, 13, ((13, 200),)),
    ((4, 4, 32, 16, 0), F16, 6, ((1, 1), (6, 17), (3, 90), (0, 0), (4, 64), (6, 5))),
    ((8, 1, 80, 1, 0), F16, 9, ((9, 40), (1, 120), (7, 0))),
    ((4, 2, 64, 24, 20), F16, 7, ((7, 100), (3, 9), (2, 300))),
    ((2, 1, 64, 64, 0), F16, 64, ((64, 30), (40, 127))),
    ((2, 2, 64, 7, 66), F16, 33, ((33, 230),)),
    ((8, 1, 80, 16, 0), F8, 5, ((5, 5), (3, 129))),
    ((8, 1, 128, 16, 0), F16, 40, ((40, 90), (17, 3), (0, 0))),  # three launches
]


@interpreted
@pytest.mark.parametrize(("geometry", "dtype", "most", "rows"), TREES, ids=str)
def test_trees(geometry: Geometry, dtype: torch.dtype, most: int, rows: tuple[tuple[int, int], ...]) -> None:
    """Rows that have all of a tree or any nodes of it, before whose place or between whose nodes NaN lies."""
    heads, kv_heads, head_dim, page, window = geometry
    shape, cache = Heads(heads, kv_heads, head_dim, page), str(dtype).removeprefix("torch.")
    for seed in range(2):
        tensors = nodes_of_rows(seed, shape, rows, most, "float16", cache, window)
        tensors["q"][int(tensors["query_len"].sum()) :] = float("nan")
        if heads % 4 == 0:
            tensors["sinks"] = torch.arange(heads) - 2.0
        check(tree_attention, tensors, attrs_of(geometry))


@compiled
@pytest.mark.parametrize("nodes", [1, 4, 16, 26, 33])
@pytest.mark.parametrize("geometry", [(32, 8, 128, 64, 0), (32, 4, 128, 16, 100)], ids=str)
@pytest.mark.slow
def test_trees_fit_into_registers(geometry: Geometry, nodes: int) -> None:
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    heads, kv_heads, head_dim, page, _ = geometry
    half, integer = torch.bfloat16, torch.int32
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "q": ((3 * nodes, heads * head_dim), half),
        "k_cache": ((9, page, kv_heads, head_dim), half),
        "v_cache": ((9, page, kv_heads, head_dim), half),
        "page_table": ((3, 64), integer),
        **dict.fromkeys(("query_start", "query_len", "context_len", "tree_start"), ((3,), integer)),
        "positions": ((3 * nodes,), integer),
        "visible": ((3 * nodes,), torch.int64),
    }
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()
    }
    call = op_call(tree_attention, tensors, attrs_of(geometry), "tma wgmma pdl fp8")
    fitting = 0
    for candidate in emit(tree_attention, call):
        assert len(candidate.launches) == -(-nodes * heads // kv_heads // 128)
        made = aot.compile_launch(candidate.launches[0], call)
        assert made.waits
        fitting += made.spill_bytes <= candidate.launches[0].local_bytes and made.shared <= call.shared_bytes
    assert fitting
