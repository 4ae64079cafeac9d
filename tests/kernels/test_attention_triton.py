"""Attention kernels for the GPU without one: interpreted against the references, and cross-compiled.

Triton decides when a kernel is decorated whether it is interpreted, so that those tests run in a process of
their own. The interpreter has no bf16 and no programmatic launches; fp16 stands in.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_inputs import Heads
from tree_inputs import nodes_of_rows

from makeready.kernels import registry
from makeready.kernels.attention.paged import (
    decode_attention,
    extend_attention,
    kv_write,
    norm_rope_kv_write,
    verify_attention,
)
from makeready.kernels.attention.tree import tree_attention
from makeready.kernels.contract import Contract
from makeready.kernels.device import Candidate, OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.spec import TensorSpec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreted in its own process")
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted functions cannot be compiled")


@pytest.fixture(autouse=True)
def _numpy_2_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 no longer takes arrays of one element for an index, as the interpreter's scalars are."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _emit(contract: Contract, call: OpCall) -> Sequence[Candidate]:
    for module in ("decode", "extend", "qkv", "verify", "write_scaled"):
        importlib.import_module(f"makeready.kernels.attention.{module}_triton")
    return [c for k in registry.cuda_kernels(contract.name) for c in k.candidates(call)]


def own_ways(contract: Contract, call: OpCall) -> list[Candidate]:
    """Those by the op's own kernel, without what stands in for it."""
    own = contract.name.removesuffix("_scaled")
    return [c for c in _emit(contract, call) if own in c.launches[0].function]


def _call(
    contract: Contract, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any], features: str
) -> OpCall:
    """The call on these operands, for two small multiprocessors when interpreted, so that blocks share items."""
    attrs = {**contract.attrs, **attrs}
    specs = {k: TensorSpec(tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}
    dims = dict(contract.dims(specs, attrs))
    made = {
        k: Tensor(v.shape, v.dtype, math.prod(int(d) for d in v.shape[1:]), 256)
        for k, v in contract.infer(specs, attrs).items()
    }
    for name, tensor in tensors.items():
        paged = name.endswith("cache") or name == "scales"
        shape = ("P", *tensor.shape[1:]) if paged else tuple(tensor.shape)
        made[name] = Tensor(shape, specs[name].dtype, tensor.stride(0), math.gcd(tensor.data_ptr(), 256))
    rows = int(dims["R" if "R" in dims else "T"])
    return OpCall(
        contract.name, made, attrs, dims, rows, int(dims.get("T", rows)),
        multiprocessors=3 if INTERPRETED else 132, features=frozenset(features.split()),
    )  # fmt: skip


def _interpret(
    candidate: Candidate, call: OpCall, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run ``candidate``; results start as NaN, scratch as garbage behind its counters."""
    full = dict(tensors)
    for name, tensor in call.tensors.items():
        if name not in full:
            full[name] = torch.full(tensor.shape, float("nan"), dtype=getattr(torch, tensor.dtype))  # type: ignore[arg-type]
    scratch = torch.full((max(1, candidate.scratch),), 0xFF, dtype=torch.uint8)
    scratch[: candidate.zeroed] = 0
    for launch in candidate.launches:
        module, name = launch.function.split(":")
        values: dict[str, Any] = dict(launch.constants)
        for key, argument in launch.arguments.items():
            if isinstance(argument, Pointer):
                values[key] = full[argument.operand]
            elif isinstance(argument, Scratch):
                values[key] = scratch[argument.offset :].view(getattr(torch, argument.dtype))
            else:
                assert isinstance(argument, Scalar), "the interpreter runs no tensor maps"
                values[key] = argument.value
        getattr(importlib.import_module(module), name)[launch.grid](**values)
    assert not scratch[: candidate.zeroed].any()
    return full


def _check(contract: Contract, tensors: Mapping[str, torch.Tensor], attrs: Mapping[str, Any]) -> None:
    call = _call(contract, tensors, attrs, "")
    wide = {k: v.double() if v.is_floating_point() else v.clone() for k, v in tensors.items()}
    expected = contract.reference(*(wide.get(o.name) for o in contract.inputs), **call.attrs)
    wanted = {o.name: expected for o in contract.outputs} | {name: wide[name] for name in contract.writes}
    # Warps and stages are nothing to the interpreter.
    candidates = {str(c.launches[0].constants): c for c in _emit(contract, call)}
    assert candidates
    for candidate in candidates.values():
        written = {k: v.clone() if k in contract.writes else v for k, v in tensors.items()}
        got = _interpret(candidate, call, written)
        for name, want in wanted.items():
            keep = ~want.isnan()
            error = (got[name].double() - want)[keep].norm() / want[keep].norm().clamp_min(1e-30)
            assert torch.equal(got[name].isnan(), want.isnan()), f"{candidate.name}: {name} has NaN"
            assert error <= contract.tolerance.float16, f"{candidate.name}: {name} is off by {error:.1e}"


def _paged(
    lengths: Sequence[int], *, page: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Caches with NaN in every slot that holds no token, shuffled pages, and their table."""
    g = torch.Generator().manual_seed(0)
    a_row = [-(-length // page) for length in lengths]
    total = 1 + sum(a_row)
    order = (1 + torch.randperm(total - 1, generator=g)).tolist()
    table = torch.zeros(len(lengths), max(a_row) + 1, dtype=torch.int32)
    caches = [torch.full((total, page, kv_heads, head_dim), float("nan")).to(dtype) for _ in "kv"]
    for r, (length, count) in enumerate(zip(lengths, a_row, strict=True)):
        mine, order = order[:count], order[count:]
        table[r, :count] = torch.tensor(mine, dtype=torch.int32)
        for cache in caches:
            for i, p in enumerate(mine):
                used = min(page, length - i * page)
                cache[p, :used] = torch.randn(used, kv_heads, head_dim, generator=g).to(dtype)
    return {
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "context_len": torch.tensor(lengths, dtype=torch.int32),
    }


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


Geometry = tuple[int, int, int, int, int]  # heads, KV heads, head size, page, window
F16, F8 = torch.float16, torch.float8_e4m3fn


def _attrs(geometry: Geometry) -> dict[str, float]:
    heads, kv_heads, head_dim, _, window = geometry
    scale = head_dim**-0.5
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": scale, "window": window}


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
    tensors = _paged(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    tensors["q"] = torch.randn(len(lengths), heads * head_dim).half()
    tensors["q"][[n == 0 for n in lengths]] = float("nan")
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    _check(decode_attention, tensors, _attrs(geometry))


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
    tensors = _paged(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32)
    tokens = 2 + int(count.sum()) + 5
    start = (2 + count.cumsum(0) - count).to(torch.int32)
    q = torch.full((tokens, heads * head_dim), float("nan"), dtype=torch.float16)
    q[2:-5] = torch.randn(tokens - 7, heads * head_dim).half()
    tensors |= {"q": q, "query_start": start, "query_len": count}
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    _check(extend_attention, tensors, _attrs(geometry))


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


def verify_step(
    tensors: dict[str, torch.Tensor], heads: int, head_dim: int, each: int, rows: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Rows of (queries, context), packed; tokens of no row, whose queries are NaN, behind them."""
    count = torch.tensor([queries for queries, _ in rows], dtype=torch.int32)
    q = torch.full((each * len(rows), heads * head_dim), float("nan"), dtype=torch.float16)
    q[: int(count.sum())] = torch.randn(int(count.sum()), heads * head_dim).half()
    return tensors | {"q": q, "query_start": (count.cumsum(0) - count).to(torch.int32), "query_len": count}


@interpreted
@pytest.mark.parametrize(("geometry", "dtype", "each", "rows"), VERIFY, ids=str)
def test_verify(geometry: Geometry, dtype: torch.dtype, each: int, rows: tuple[tuple[int, int], ...]) -> None:
    """Parts of which a query sees nothing, windows that begin in different tiles, rows of no query."""
    heads, kv_heads, head_dim, page, _ = geometry
    lengths = [context for _, context in rows]
    tensors = _paged(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    tensors = verify_step(tensors, heads, head_dim, each, rows)
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    _check(verify_attention, tensors, _attrs(geometry))


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
        _check(tree_attention, tensors, _attrs(geometry))


@interpreted
@pytest.mark.parametrize("geometry", [(8, 2, 128, 64, 0), (3, 1, 64, 24, 9)], ids=str)
def test_rows_of_a_chain(geometry: Geometry) -> None:
    """A token a row; rows that have none, and so tokens of no row, between the others."""
    heads, kv_heads, head_dim, page, _ = geometry
    lengths = (0, 70, 0, 0, 1, 200, 0)
    tensors = _paged(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim)
    live = tensors["context_len"] > 0
    q = torch.full((len(lengths), heads * head_dim), float("nan"), dtype=torch.float16)
    q[live] = torch.randn(int(live.sum()), heads * head_dim).half()
    start = torch.arange(len(lengths), dtype=torch.int32)
    tensors |= {"q": q, "query_start": start, "query_len": live.int()}
    _check(extend_attention, tensors, _attrs(geometry))
    _check(verify_attention, tensors, _attrs(geometry))


@compiled
def test_rows_with_too_many_vectors_are_left_to_tiles() -> None:
    tensors = {"q": torch.empty(3 * 17, 16 * 128, dtype=torch.bfloat16, device="meta")}
    shapes = {"k_cache": (9, 64, 1, 128), "v_cache": (9, 64, 1, 128)}
    tensors |= {k: torch.empty(v, dtype=torch.bfloat16, device="meta") for k, v in shapes.items()}
    tensors["page_table"] = torch.empty(3, 8, dtype=torch.int32, device="meta")
    for name in ("query_start", "query_len", "context_len"):
        tensors[name] = torch.empty(3, dtype=torch.int32, device="meta")
    call = _call(verify_attention, tensors, _attrs((16, 1, 128, 64, 0)), "tma wgmma pdl fp8")
    assert _emit(verify_attention, call)
    assert not own_ways(verify_attention, call)
    fewer = tensors | {"q": tensors["q"][: 3 * 8]}
    assert own_ways(verify_attention, _call(verify_attention, fewer, call.attrs, "tma wgmma pdl fp8"))


@interpreted
def test_pages_before_a_window_may_be_anything() -> None:
    """Page 0 holds NaN, and is where freed pages were; one is less than a step."""
    geometry, (queries, length) = (4, 2, 64, 16, 20), (3, 135)
    tensors = _paged((length,), page=16, kv_heads=2, head_dim=64)
    tensors["page_table"][0, : (length - queries - 20 + 1) // 16] = 0
    count = torch.tensor([queries], dtype=torch.int32)
    q = torch.randn(queries, 4 * 64).half()
    _check(decode_attention, tensors | {"q": q[-1:]}, _attrs(geometry))
    tensors |= {"q": q, "query_start": 0 * count, "query_len": count}
    _check(extend_attention, tensors, _attrs(geometry))
    _check(verify_attention, tensors, _attrs(geometry))


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
    _check(norm_rope_kv_write, tensors, attrs)
    if normed:
        _check(norm_rope_kv_write, tensors, attrs | {"offset": 1.0})


@interpreted
def test_kv_write() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 3 * 80, generator=g).half() for name in ("k", "v")}
    tensors["kv_slot"] = torch.randperm(5 * 7, generator=g)[:6].to(torch.int32)
    tensors |= {name: torch.randn(5, 7, 3, 80, generator=g).half() for name in ("k_cache", "v_cache")}
    _check(kv_write, tensors, {"kv_heads": 3, "head_dim": 80})


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
        call = _call(contract, operands, _attrs(geometry), "tma wgmma pdl fp8")
        (launch,) = own_ways(contract, call)[0].launches
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= launch.local_bytes
        assert made.shared <= call.shared_bytes
        assert launch.dependent
        assert made.waits
        assert instruction in made.ptx
        assert copies in made.ptx


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
    call = _call(tree_attention, tensors, _attrs(geometry), "tma wgmma pdl fp8")
    fitting = 0
    for candidate in _emit(tree_attention, call):
        assert len(candidate.launches) == -(-nodes * heads // kv_heads // 128)
        made = aot.compile_launch(candidate.launches[0], call)
        assert made.waits
        fitting += made.spill_bytes <= candidate.launches[0].local_bytes and made.shared <= call.shared_bytes
    assert fitting


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
        call = _call(contract, {**tensors, **operands}, attrs, "pdl fp8")
        (launch,) = _emit(contract, call)[0].launches
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
    call = _call(extend_attention, {"q": q, **caches, "page_table": table, **ints}, attrs, "")
    for candidate in _emit(extend_attention, call):
        (launch,) = candidate.launches
        a_tile = int(launch.constants["M"] or 0) // 4
        worst = max(sum(-(-n // a_tile) for n in rows) for rows in ((196, 1, 1, 1, 1), (33, 33, 33, 33, 68)))
        if not launch.constants["ROUNDS"]:
            assert launch.grid[0] >= 2 * worst
    call = _call(
        decode_attention,
        {"q": q[:5], **caches, "page_table": table, "context_len": ints["context_len"]},
        attrs,
        "",
    )
    for candidate in _emit(decode_attention, call):
        (launch,) = candidate.launches
        counters, parts = 5 * 2 * 4, 2 * launch.grid[0] * 4 * (64 + 2) * 4
        assert candidate.zeroed >= counters
        assert candidate.scratch >= candidate.zeroed + parts
