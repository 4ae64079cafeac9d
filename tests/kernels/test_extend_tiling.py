"""How extend attention is cut: what is left in scratch fits, and the cost model follows what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.kernels.attention.extend_tiling import Tiling, tilings
from makeready.kernels.device import OpCall, Tensor

FEATURES = frozenset({"tma", "wgmma", "pdl", "fp8"})


def call(
    tokens: int, rows: int, *, context: int = 1024, longest: int = 8192, page: int = 64, window: int = 0,
    cache: str = "bfloat16", heads: tuple[int, int, int] = (32, 8, 128),
) -> OpCall:  # fmt: skip
    """A call in a bucket of ``rows`` rows of up to ``longest`` tokens."""
    count, kv_heads, size = heads
    kept = Tensor(("P", page, kv_heads, size), cache, page * kv_heads * size, 256)
    tensors = {
        "q": Tensor((tokens, count * size), "bfloat16", count * size, 256),
        "k_cache": kept,
        "v_cache": kept,
        "page_table": Tensor((rows, -(-longest // page)), "int32", -(-longest // page), 256),
    }
    attrs = {"heads": count, "kv_heads": kv_heads, "head_dim": size, "scale": 0.1, "window": window}
    return OpCall(
        "extend_attention", tensors, attrs, {}, rows, tokens, context=context, features=FEATURES
    )  # fmt: skip


def items_and_slots(tiling: Tiling, of: OpCall, rows: list[tuple[int, int]]) -> tuple[int, int]:
    """Items that rows of (queries, context) make and slots that they take up, counted as the device does."""
    a_tile = tiling.m // (of.attrs["heads"] // of.attrs["kv_heads"])
    window = of.attrs["window"]
    reach = window + a_tile + tiling.keys if window else 1 << 30
    tiles = [-(-queries // a_tile) for queries, _ in rows]
    average = [min(context - queries // 2, reach) for queries, context in rows]
    steps = sum(t * -(-n // tiling.keys) for t, n in zip(tiles, average, strict=True)) * of.attrs["kv_heads"]
    share = max(-(-steps // tiling.shares(of)) * tiling.keys, tiling.least)
    parts = [-(-min(context, reach) // share) for _, context in rows]
    items = [t * n * of.attrs["kv_heads"] for t, n in zip(tiles, parts, strict=True)]
    return sum(items), sum(made for made, n in zip(items, parts, strict=True) if n > 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[OpCall, list[tuple[int, int]]]:
    tokens = draw(st.sampled_from([64, 256, 1024, 8192]))
    longest = draw(st.sampled_from([300, 2048, 40_000]))
    window = draw(st.sampled_from([0, 0, 100, 4096]))
    rows, left = [], tokens
    for _ in range(draw(st.integers(1, 40))):
        context = draw(st.integers(1, longest))
        queries = draw(st.one_of(st.integers(0, 3), st.integers(0, context)))
        queries = min(queries, context, left)
        left -= queries
        rows.append((queries, context if queries else 0))
    heads = draw(st.sampled_from([(32, 8, 128), (4, 4, 64), (8, 1, 256)]))
    return call(tokens, len(rows), longest=longest, window=window, heads=heads), rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batches())
def test_parts_fit_their_slots(batch: tuple[OpCall, list[tuple[int, int]]]) -> None:
    of, rows = batch
    for tiling in tilings(of):
        items, slots = items_and_slots(tiling, of, rows)
        assert slots <= tiling.slots(of)
        assert tiling.rounds or items <= tiling.blocks(of)


@pytest.mark.parametrize(
    ("tokens", "context", "best"),
    [
        (1024, 1024, "tma_128x64_w8_s3"),  # 30 µs against 41 with 4 warps
        (512, 8192, "tma_128x64_w8_s3"),  # 146 µs against 241
        (8192, 8192, "tma_128x64_w4_s2_each"),  # 8,000 tokens in 1,030 µs against 1,123
    ],
)
def test_the_model_chooses_what_was_fastest_on_an_h100(tokens: int, context: int, best: str) -> None:
    assert tilings(call(tokens, 256, context=context))[0].name == best


def test_keys_come_through_tensor_maps_where_pages_allow_it() -> None:
    assert all(tiling.tma for tiling in tilings(call(256, 4)))
    assert all(tiling.tma for tiling in tilings(call(256, 4, cache="float8_e4m3fn")))
    assert not any(tiling.tma for tiling in tilings(call(256, 4, page=16)))
    assert not any(tiling.tma for tiling in tilings(call(256, 4, cache="float16")))
    assert all(tiling.keys == 32 for tiling in tilings(call(256, 4, page=32)))


def test_short_contexts_leave_nothing() -> None:
    assert all(tiling.slots(call(256, 4, longest=256)) == 1 for tiling in tilings(call(256, 4, longest=256)))
