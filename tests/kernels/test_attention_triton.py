"""Attention kernels for the GPU without one: interpreted against the references, and cross-compiled.

Triton decides when a kernel is decorated whether it is interpreted, so that those tests run in a process of
their own. The interpreter has no bf16 and no programmatic launches; fp16 stands in.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
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
    own_ways,
    paged_caches,
    run_interpreted,
    verify_step,
)

from makeready.kernels.attention.paged import (
    decode_attention,
    extend_attention,
    kv_write,
    norm_rope_kv_write,
    verify_attention,
)

assert numpy_2_4  # a fixture for all tests here


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(
    ("geometry", "dtype", "lengths"),
    [
        ((4, 4, 32, 16, 0), F16, (1, 15, 16, 17, 0, 300)),
        ((3, 1, 64, 64, 0), F16, (64, 63, 65)),
        ((8, 1, 80, 1, 0), F16, (5, 129)),
        ((8, 2, 128, 64, 70), F16, (1, 0, 70, 71, 200)),
        ((4, 2, 64, 24, 9), F16, (100,)),
        ((2, 1, 256, 128, 0), F16, (1, 400)),
        ((4, 1, 64, 64, 0), F16, (0, 0)),
        ((4, 2, 64, 64, 0), F16, (777,)),
        ((8, 1, 80, 1, 0), F8, (5, 129)),
        ((4, 2, 64, 64, 60), F8, (1, 0, 200)),
    ],
    ids=str,
)
def test_decode(geometry: Geometry, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    heads, kv_heads, head_dim, page, _ = geometry
    tensors = paged_caches(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    tensors["q"] = torch.randn(len(lengths), heads * head_dim).half()
    tensors["q"][[n == 0 for n in lengths]] = float("nan")
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    check(decode_attention, tensors, attrs_of(geometry))


@interpreted
@pytest.mark.parametrize(
    ("geometry", "dtype", "rows"),
    [
        ((4, 4, 32, 16, 0), F16, ((1, 1), (17, 17), (3, 90), (0, 0), (1, 64))),
        ((3, 1, 64, 64, 0), F16, ((64, 64), (65, 129))),
        ((8, 1, 80, 1, 0), F16, ((5, 40), (1, 33))),
        ((8, 2, 128, 64, 70), F16, ((150, 150), (1, 200), (2, 72))),
        ((4, 2, 64, 24, 9), F16, ((40, 100), (30, 30))),
        ((2, 1, 256, 128, 0), F16, ((70, 140),)),
        ((2, 1, 64, 64, 0), F16, ((2, 800), (1, 300))),
        ((2, 1, 64, 64, 300), F16, ((40, 700), (1, 100))),
        ((4, 2, 32, 16, 0), F8, ((17, 17), (3, 90), (0, 0))),
    ],
    ids=str,
)
def test_extend(geometry: Geometry, dtype: torch.dtype, rows: tuple[tuple[int, int], ...]) -> None:
    """``rows`` are (queries, context); a gap before the first row and padding behind the last."""
    heads, kv_heads, head_dim, page, _ = geometry
    lengths = [context for _, context in rows]
    tensors = paged_caches(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32)
    tokens = 2 + int(count.sum()) + 5
    start = (2 + count.cumsum(0) - count).to(torch.int32)
    q = torch.full((tokens, heads * head_dim), float("nan"), dtype=torch.float16)
    q[2:-5] = torch.randn(tokens - 7, heads * head_dim).half()
    tensors |= {"q": q, "query_start": start, "query_len": count}
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    check(extend_attention, tensors, attrs_of(geometry))


VERIFY: list[tuple[Geometry, torch.dtype, int, tuple[tuple[int, int], ...]]] = [
    ((8, 2, 128, 64, 0), F16, 5, ((5, 200),)),
    ((4, 4, 32, 16, 0), F16, 5, ((1, 1), (5, 17), (3, 90), (0, 0), (4, 64), (5, 5))),
    ((9, 3, 64, 64, 0), F16, 5, ((5, 64), (2, 65), (4, 63))),
    ((8, 1, 80, 1, 0), F16, 9, ((9, 40), (1, 129), (7, 7))),
    ((8, 2, 128, 64, 70), F16, 3, ((3, 71), (0, 0), (2, 70), (3, 200), (1, 1))),
    ((4, 2, 64, 24, 9), F16, 4, ((4, 100), (3, 9))),
    ((2, 1, 256, 128, 0), F16, 5, ((5, 133), (2, 400))),
    ((2, 1, 64, 64, 3), F16, 9, ((9, 134), (8, 133))),
    ((4, 2, 64, 64, 0), F16, 2, ((2, 777),)),
    ((4, 1, 64, 64, 0), F16, 3, ((0, 0), (0, 0))),
    ((8, 1, 80, 1, 0), F8, 5, ((5, 5), (3, 129))),
    ((4, 2, 64, 64, 60), F8, 5, ((1, 1), (5, 200))),
]


@interpreted
@pytest.mark.parametrize(("geometry", "dtype", "each", "rows"), VERIFY, ids=str)
def test_verify(geometry: Geometry, dtype: torch.dtype, each: int, rows: tuple[tuple[int, int], ...]) -> None:
    """Parts of which a query sees nothing, windows that begin in different tiles, rows of no query."""
    heads, kv_heads, head_dim, page, _ = geometry
    lengths = [context for _, context in rows]
    tensors = paged_caches(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    tensors = verify_step(tensors, heads, head_dim, each, rows)
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    check(verify_attention, tensors, attrs_of(geometry))


@interpreted
@pytest.mark.parametrize("geometry", [(8, 2, 128, 64, 0), (3, 1, 64, 24, 9)], ids=str)
def test_rows_of_a_chain(geometry: Geometry) -> None:
    """A token a row; rows that have none, and so tokens of no row, between the others."""
    heads, kv_heads, head_dim, page, _ = geometry
    lengths = (0, 70, 0, 0, 1, 200, 0)
    tensors = paged_caches(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim)
    live = tensors["context_len"] > 0
    q = torch.full((len(lengths), heads * head_dim), float("nan"), dtype=torch.float16)
    q[live] = torch.randn(int(live.sum()), heads * head_dim).half()
    start = torch.arange(len(lengths), dtype=torch.int32)
    tensors |= {"q": q, "query_start": start, "query_len": live.int()}
    check(extend_attention, tensors, attrs_of(geometry))
    check(verify_attention, tensors, attrs_of(geometry))


@compiled
def test_rows_with_too_many_vectors_are_left_to_tiles() -> None:
    tensors = {"q": torch.empty(3 * 17, 16 * 128, dtype=torch.bfloat16, device="meta")}
    shapes = {"k_cache": (9, 64, 1, 128), "v_cache": (9, 64, 1, 128)}
    tensors |= {k: torch.empty(v, dtype=torch.bfloat16, device="meta") for k, v in shapes.items()}
    tensors["page_table"] = torch.empty(3, 8, dtype=torch.int32, device="meta")
    for name in ("query_start", "query_len", "context_len"):
        tensors[name] = torch.empty(3, dtype=torch.int32, device="meta")
    call = op_call(verify_attention, tensors, attrs_of((16, 1, 128, 64, 0)), "tma wgmma pdl fp8")
    assert emit(verify_attention, call)
    assert not own_ways(verify_attention, call)
    fewer = tensors | {"q": tensors["q"][: 3 * 8]}
    assert own_ways(verify_attention, op_call(verify_attention, fewer, call.attrs, "tma wgmma pdl fp8"))


@interpreted
def test_pages_before_a_window_may_be_anything() -> None:
    """Page 0 holds NaN, and is where freed pages were; one is less than a step."""
    geometry, (queries, length) = (4, 2, 64, 16, 20), (3, 135)
    tensors = paged_caches((length,), page=16, kv_heads=2, head_dim=64)
    tensors["page_table"][0, : (length - queries - 20 + 1) // 16] = 0
    count = torch.tensor([queries], dtype=torch.int32)
    q = torch.randn(queries, 4 * 64).half()
    check(decode_attention, tensors | {"q": q[-1:]}, attrs_of(geometry))
    tensors |= {"q": q, "query_start": 0 * count, "query_len": count}
    check(extend_attention, tensors, attrs_of(geometry))
    check(verify_attention, tensors, attrs_of(geometry))


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "tokens", "normed"),
    [
        (32, 8, 128, 128, 3, True),
        (9, 3, 64, 64, 21, False),
        (4, 1, 80, 32, 5, True),
        (4, 4, 32, 24, 1, False),
        (2, 2, 256, 256, 2, True),
    ],
)
def test_norm_rope_kv_write(
    heads: int, kv_heads: int, head_dim: int, rotary: int, tokens: int, normed: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    width = (heads + 2 * kv_heads) * head_dim
    tensors = {
        "qkv": torch.randn(tokens, width + 16, generator=g).half()[:, :width],
        "rows": torch.randn(tokens, rotary, generator=g),
        "kv_slot": torch.randperm(5 * 7, generator=g)[:tokens].to(torch.int32),
        "k_cache": torch.randn(5, 7, kv_heads, head_dim, generator=g).half(),
        "v_cache": torch.randn(5, 7, kv_heads, head_dim, generator=g).half(),
    }
    if normed:
        tensors |= {name: torch.randn(head_dim, generator=g).half() for name in ("q_norm", "k_norm")}
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "eps": 1e-6}
    check(norm_rope_kv_write, tensors, attrs)
    if normed:
        check(norm_rope_kv_write, tensors, attrs | {"offset": 1.0})


@interpreted
def test_kv_write() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 3 * 80, generator=g).half() for name in ("k", "v")}
    tensors["kv_slot"] = torch.randperm(5 * 7, generator=g)[:6].to(torch.int32)
    tensors |= {name: torch.randn(5, 7, 3, 80, generator=g).half() for name in ("k_cache", "v_cache")}
    check(kv_write, tensors, {"kv_heads": 3, "head_dim": 80})


@compiled
@pytest.mark.parametrize(
    ("geometry", "rows", "dtype", "wanted"),
    [
        ((32, 8, 128, 64, 0), 64, torch.bfloat16, "cp.async.bulk.tensor"),
        ((9, 3, 64, 16, 100), 256, torch.bfloat16, "cp.async.cg"),
        ((8, 1, 80, 128, 0), 1, torch.bfloat16, "cp.async.cg"),
        ((32, 8, 128, 64, 0), 64, F8, "cp.async.bulk.tensor"),
    ],
)
@pytest.mark.slow
def test_machine_code(geometry: Geometry, rows: int, dtype: torch.dtype, wanted: str) -> None:
    """No spills, shared memory within a block's, tensor cores and asynchronous copies, the wait for a launch."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    heads, kv_heads, head_dim, page, _ = geometry
    shapes = {
        "q": ((rows, heads * head_dim), torch.bfloat16),
        "k_cache": ((9, page, kv_heads, head_dim), dtype),
        "v_cache": ((9, page, kv_heads, head_dim), dtype),
        "page_table": ((rows, 64), torch.int32),
        "context_len": ((rows,), torch.int32),
    }
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()
    }
    extra = {n: torch.empty(rows, dtype=torch.int32, device="meta") for n in ("query_start", "query_len")}
    five = torch.empty(5 * rows, heads * head_dim, dtype=torch.bfloat16, device="meta")
    products = "wgmma.mma_async" if 5 * heads // kv_heads > 32 else "mma.sync"
    for contract, operands, instruction, copies in (
        (decode_attention, tensors, "mma.sync", "cp.async.cg"),
        (extend_attention, {**tensors, **extra}, "wgmma.mma_async", wanted),
        (verify_attention, {**tensors, **extra, "q": five}, products, "cp.async.cg"),
    ):
        call = op_call(contract, operands, attrs_of(geometry), "tma wgmma pdl fp8")
        (launch,) = own_ways(contract, call)[0].launches
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= launch.local_bytes
        assert made.shared <= call.shared_bytes
        assert launch.dependent
        assert made.waits
        assert instruction in made.ptx
        assert copies in made.ptx


@compiled
def test_values_are_converted_to_8_bits_by_the_device() -> None:
    """The interpreter rounds them wrongly, so what writes them is held to the reference on a GPU alone."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    tensors = {n: torch.empty(5, 64, 8, 128, dtype=F8, device="meta") for n in ("k_cache", "v_cache")}
    tensors["kv_slot"] = torch.empty(6, dtype=torch.int32, device="meta")
    copied = {name: torch.empty(6, 1024, dtype=torch.bfloat16, device="meta") for name in "kv"}
    made = {"qkv": torch.empty(6, 48 * 128, dtype=torch.bfloat16, device="meta")}
    made["rows"] = torch.empty(6, 128, device="meta")
    sizes = {"kv_heads": 8, "head_dim": 128}
    for contract, operands, attrs in (
        (kv_write, copied, sizes),
        (norm_rope_kv_write, made, {**sizes, "heads": 32, "eps": 1e-6}),
    ):
        call = op_call(contract, {**tensors, **operands}, attrs, "pdl fp8")
        (launch,) = emit(contract, call)[0].launches
        assert "cvt.rn.satfinite.e4m3x2.f32" in aot.compile_launch(launch, call).ptx


@compiled
def test_scratch_and_grids_follow_the_bucket() -> None:
    """Scratch of decode holds its parts; extend's grid holds the most tiles that any rows can make."""
    table = torch.empty(5, 16, dtype=torch.int32, device="meta")
    caches = {
        n: torch.empty(9, 64, 2, 64, dtype=torch.float16, device="meta") for n in ("k_cache", "v_cache")
    }
    ints = {
        n: torch.empty(5, dtype=torch.int32, device="meta")
        for n in ("query_start", "query_len", "context_len")
    }
    q = torch.empty(200, 8 * 64, dtype=torch.float16, device="meta")
    attrs = {"heads": 8, "kv_heads": 2, "head_dim": 64, "scale": 0.1}
    call = op_call(extend_attention, {"q": q, **caches, "page_table": table, **ints}, attrs, "")
    for candidate in emit(extend_attention, call):
        (launch,) = candidate.launches
        a_tile = int(launch.constants["M"] or 0) // 4
        worst = max(sum(-(-n // a_tile) for n in rows) for rows in ((196, 1, 1, 1, 1), (33, 33, 33, 33, 68)))
        if not launch.constants["ROUNDS"]:
            assert launch.grid[0] >= 2 * worst
    call = op_call(
        decode_attention,
        {"q": q[:5], **caches, "page_table": table, "context_len": ints["context_len"]},
        attrs,
        "",
    )
    for candidate in emit(decode_attention, call):
        (launch,) = candidate.launches
        counters, parts = 5 * 2 * 4, 2 * launch.grid[0] * 4 * (64 + 2) * 4
        assert candidate.zeroed >= counters
        assert candidate.scratch >= candidate.zeroed + parts
