"""Attention over caches with scales, and what writes them, for the GPU: interpreted, and compiled without one.

As test_attention_triton.py does; interpreted functions need a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_interpreted import (
    Geometry,
    attrs_of,
    check,
    compiled,
    emit,
    interpret,
    interpreted,
    numpy_2_4,
    op_call,
    own_ways,
    paged_caches,
    verify_step,
)
from case import Case, Random, in_columns, int32
from scaled_inputs import FORMATS, empty_caches, random_caches
from test_invariant_triton import places_of_a_product_are_alike

from makeready.kernels.attention.formats import CacheFormat
from makeready.kernels.attention.scaled import (
    decode_attention_scaled,
    extend_attention_scaled,
    kv_write_scaled,
    norm_rope_kv_write_scaled,
    verify_attention_scaled,
    widen_heads,
)
from makeready.kernels.contract import Contract

assert isinstance(decode_attention_scaled, Contract)
assert isinstance(extend_attention_scaled, Contract)
assert isinstance(kv_write_scaled, Contract)
assert isinstance(norm_rope_kv_write_scaled, Contract)
assert isinstance(verify_attention_scaled, Contract)
assert numpy_2_4  # fixtures for all tests here
assert places_of_a_product_are_alike

formats = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.dtype)


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def paged(lengths: tuple[int, ...], geometry: Geometry, kind: CacheFormat) -> dict[str, torch.Tensor]:
    """Caches whose slots without a token are NaN, shuffled pages, and their table."""
    _, kv_heads, head_dim, page, _ = geometry
    made = paged_caches(lengths, page=page, kv_heads=kv_heads, head_dim=head_dim)
    return made | random_caches(Random(0), made["k_cache"], kind)


DECODE = [
    ((4, 4, 32, 16, 0), (1, 15, 16, 17, 0, 300)),
    ((3, 1, 64, 64, 0), (64, 63, 65)),
    ((8, 1, 80, 1, 0), (5, 129)),
    ((8, 2, 128, 64, 70), (1, 0, 70, 71, 200)),
    ((4, 2, 64, 24, 9), (100,)),
    ((2, 1, 256, 128, 0), (1, 400)),
    ((4, 1, 64, 64, 0), (0, 0)),
    ((4, 2, 64, 64, 0), (777,)),
]


@interpreted
@formats
@pytest.mark.parametrize(("geometry", "lengths"), DECODE, ids=str)
def test_decode(geometry: Geometry, lengths: tuple[int, ...], kind: CacheFormat) -> None:
    heads, _, head_dim, _, _ = geometry
    tensors = paged(lengths, geometry, kind)
    tensors["q"] = torch.randn(len(lengths), heads * head_dim).half()
    tensors["q"][[n == 0 for n in lengths]] = float("nan")
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    check(decode_attention_scaled, tensors, attrs_of(geometry) | {"bits": kind.bits})


EXTEND = [
    ((4, 4, 32, 16, 0), ((1, 1), (17, 17), (3, 90), (0, 0), (1, 64))),
    ((3, 1, 64, 64, 0), ((64, 64), (65, 129))),
    ((8, 1, 80, 1, 0), ((5, 40), (1, 33))),
    ((8, 2, 128, 64, 70), ((150, 150), (1, 200), (2, 72))),
    ((4, 2, 64, 24, 9), ((40, 100), (30, 30))),
    ((2, 1, 256, 128, 0), ((70, 140),)),
    ((2, 1, 64, 64, 0), ((2, 800), (1, 300))),
    ((2, 1, 64, 64, 300), ((40, 700), (1, 100))),
]


def extend_step(
    geometry: Geometry, rows: tuple[tuple[int, int], ...], kind: CacheFormat
) -> dict[str, torch.Tensor]:
    """``rows`` are (queries, context); a gap before the first row and padding behind the last."""
    heads, _, head_dim, _, _ = geometry
    count = int32([queries for queries, _ in rows])
    tokens = 2 + int(count.sum()) + 5
    q = torch.full((tokens, heads * head_dim), float("nan"), dtype=torch.float16)
    q[2:-5] = torch.randn(tokens - 7, heads * head_dim).half()
    start = (2 + count.cumsum(0) - count).to(torch.int32)
    made = paged(tuple(context for _, context in rows), geometry, kind)
    return made | {"q": q, "query_start": start, "query_len": count}


@interpreted
@formats
@pytest.mark.parametrize(("geometry", "rows"), EXTEND, ids=str)
def test_extend(geometry: Geometry, rows: tuple[tuple[int, int], ...], kind: CacheFormat) -> None:
    tensors = extend_step(geometry, rows, kind)
    if geometry[0] % 4 == 0:
        tensors["sinks"] = torch.arange(geometry[0]) - 2.0
    check(extend_attention_scaled, tensors, attrs_of(geometry) | {"bits": kind.bits})


VERIFY = [
    ((4, 4, 32, 16, 0), 5, ((1, 1), (5, 17), (3, 90), (0, 0), (5, 5))),
    ((9, 3, 64, 64, 0), 5, ((5, 64), (2, 65))),
    ((8, 2, 128, 64, 70), 3, ((3, 71), (0, 0), (2, 70), (3, 200))),
    ((2, 1, 64, 64, 3), 9, ((9, 134),)),
]


@interpreted
@formats
@pytest.mark.parametrize(("geometry", "each", "rows"), VERIFY, ids=str)
def test_verify(geometry: Geometry, each: int, rows: tuple[tuple[int, int], ...], kind: CacheFormat) -> None:
    heads, _, head_dim, _, _ = geometry
    tensors = paged(tuple(context for _, context in rows), geometry, kind)
    tensors = verify_step(tensors, heads, head_dim, each, rows)
    if heads % 4 == 0:
        tensors["sinks"] = torch.arange(heads) - 2.0
    check(verify_attention_scaled, tensors, attrs_of(geometry) | {"bits": kind.bits})


@interpreted
@formats
@pytest.mark.parametrize("page", [5, 16])
def test_pages_before_a_window_may_be_anything(page: int, kind: CacheFormat) -> None:
    """Those of less than a step, too."""
    geometry = (4, 2, 64, page, 20)
    rows = ((3, 135), (1, 90))
    tensors = extend_step(geometry, rows, kind)
    for row, (queries, length) in enumerate(rows):
        tensors["page_table"][row, : (length - queries - geometry[4] + 1) // page] = 0
    attrs = attrs_of(geometry) | {"bits": kind.bits}
    check(extend_attention_scaled, tensors, attrs)
    decode = {k: v for k, v in tensors.items() if not k.startswith("query")}
    decode["q"] = torch.randn(2, 4 * 64).half()
    check(decode_attention_scaled, decode, attrs)


CHUNKS = ((0, 110), (0, 1), (0, 40), (33, 34), (63, 66), (70, 109), (109, 110))


@interpreted
@formats
@pytest.mark.parametrize("window", [0, 37])
def test_a_token_gets_the_same_bits_in_every_step(window: int, kind: CacheFormat) -> None:
    """By the ways of deterministic plans."""
    geometry = (4, 2, 32, 16, window)
    one = paged((110,), geometry, kind)
    q = torch.randn(110, 4 * 32).half()

    def attend(chunks: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
        counts = [end - begin for begin, end in chunks]
        tensors = one | {
            "q": torch.cat([q[begin:end] for begin, end in chunks]),
            "page_table": one["page_table"].repeat(len(chunks), 1),
            "query_start": int32([sum(counts[:r]) for r in range(len(counts))]),
            "query_len": int32(counts),
            "context_len": int32([end for _, end in chunks]),
        }
        call = op_call(extend_attention_scaled, tensors, attrs_of(geometry) | {"bits": kind.bits}, "")
        call = replace(call, invariant=True, most_rows=4)
        way = emit(extend_attention_scaled, call)[1]
        return list(interpret(way, call, tensors)["y"].split(counts))

    (whole,) = attend(CHUNKS[:1])
    for chunks in (CHUNKS[1:4], CHUNKS[4:]):
        for (begin, end), y in zip(chunks, attend(chunks), strict=True):
            assert torch.equal(y, whole[begin:end]), f"tokens {begin} to {end}"


def written(contract: Contract, tensors: dict[str, torch.Tensor], attrs: dict[str, Any]) -> None:
    """Every way stores what the reference does, but for roundings: a few numbers are a step away.

    What is not finite stays so, and slots of nobody stay untouched.
    """
    call = op_call(contract, tensors, attrs, "")
    given = {o.name: tensors[o.name] for o in contract.inputs if o.name in tensors}
    want = Case(contract.name, "", given, {**contract.attrs, **attrs}).run()
    half = want["scales"].shape[-1] // 2
    ways = {str(way.launches[0].constants): way for way in emit(contract, call)}
    assert ways
    for way in ways.values():
        copies = {k: v.clone() if k in contract.writes else v for k, v in tensors.items()}
        got = interpret(way, call, copies)
        if "q" in want:
            torch.testing.assert_close(got["q"], want["q"], rtol=5e-3, atol=5e-3, equal_nan=True)
        # The reference rounds keys to fp16 behind norm and rotation.
        torch.testing.assert_close(got["scales"], want["scales"], rtol=5e-3, atol=5e-3, equal_nan=True)
        for at, name in enumerate(("k_cache", "v_cache")):
            mine = slice(at * half, (at + 1) * half)
            x, y = (widen_heads(o[name], o["scales"][..., mine], torch.float32) for o in (got, want))
            assert torch.equal(x.isnan(), y.isnan()), name
            step = want["scales"][..., mine][..., :1].float()
            far = (x - y).abs() / step
            if got[name].dtype == torch.float8_e4m3fn:
                continue  # the interpreter rounds them wrongly, see test_machine_code
            assert float(far.nan_to_num(0.0).max()) <= 1.1, name
            assert float((far.nan_to_num(0.0) > 0.1).float().mean()) < 0.1, name


@interpreted
@formats
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
    heads: int, kv_heads: int, head_dim: int, rotary: int, tokens: int, normed: bool, kind: CacheFormat
) -> None:
    random = Random(0)
    tensors = {
        "qkv": in_columns(random.normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype="float16")),
        "rows": random.rotary(tokens, rotary),
        "kv_slot": random.permutation(5 * 7)[:tokens].int(),
        **empty_caches(torch.zeros(5, 7, kv_heads, head_dim), kind),
    }
    if normed:
        tensors |= {name: random.normal(head_dim, dtype="float16") for name in ("q_norm", "k_norm")}
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "bits": kind.bits, "eps": 1e-6}
    written(norm_rope_kv_write_scaled, tensors, sizes)
    if normed:
        written(norm_rope_kv_write_scaled, tensors, sizes | {"offset": 1.0})


@interpreted
@formats
@pytest.mark.parametrize("head_dim", [80, 64, 2, 30])
def test_kv_write(head_dim: int, kind: CacheFormat) -> None:
    """Among them heads of zeros, of one number, and with what is not finite."""
    random = Random(0)
    tensors = {name: random.normal(7, 3 * head_dim, dtype="float16") for name in ("k", "v")}
    tensors["k"][1] = 0.0
    tensors["v"][2] = 3.0
    tensors["k"][3, 0], tensors["v"][4, -1] = float("nan"), float("inf")
    tensors["v"][5] *= 1e-4
    tensors["k"][6] *= 1e3
    tensors["kv_slot"] = random.permutation(5 * 7)[:7].int()
    tensors |= empty_caches(torch.zeros(5, 7, 3, head_dim), kind)
    written(kv_write_scaled, tensors, {"kv_heads": 3, "head_dim": head_dim, "bits": kind.bits})


@compiled
@pytest.mark.slow
@formats
@pytest.mark.parametrize(
    ("geometry", "rows"), [((32, 8, 128, 64, 0), 64), ((9, 3, 64, 16, 100), 256), ((8, 1, 256, 64, 0), 8)]
)
def test_machine_code(geometry: Geometry, rows: int, kind: CacheFormat) -> None:
    """No spills, shared memory within a block's, tensor cores, copies that run ahead, conversions of the device."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    heads, kv_heads, head_dim, page, _ = geometry

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = torch.bfloat16
    like = torch.zeros(9, page, kv_heads, head_dim)
    caches = {k: x.to("meta") for k, x in empty_caches(like, kind).items()}
    step = {"page_table": empty(rows, 64), "context_len": empty(rows)}
    queries = {"query_start": empty(rows), "query_len": empty(rows)}
    q = {"q": empty(rows, heads * head_dim, dtype=wide)}
    five = {"q": empty(5 * rows, heads * head_dim, dtype=wide)}
    keys = {name: empty(rows, kv_heads * head_dim, dtype=wide) for name in "kv"} | {"kv_slot": empty(rows)}
    made = {
        "qkv": empty(rows, (heads + 2 * kv_heads) * head_dim, dtype=wide),
        "rows": empty(rows, head_dim, dtype=torch.float32),
        "kv_slot": empty(rows),
    }
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "bits": kind.bits}
    attend = attrs_of(geometry) | {"bits": kind.bits}
    for contract, operands, attrs, found in (
        (decode_attention_scaled, q | caches | step, attend, ("mma.sync", "cp.async.c")),
        (extend_attention_scaled, q | caches | step | queries, attend, ("wgmma.mma_async", "cp.async.")),
        (verify_attention_scaled, five | caches | step | queries, attend, ("mma", "cp.async.")),
        (kv_write_scaled, keys | caches, sizes, ()),
        (norm_rope_kv_write_scaled, made | caches, sizes | {"heads": heads, "eps": 1e-6}, ()),
    ):
        call = op_call(contract, operands, attrs, "tma wgmma pdl fp8")
        (launch,) = (own_ways(contract, call) or emit(contract, call))[0].launches
        code = aot.compile_launch(launch, call)
        assert code.spill_bytes <= launch.local_bytes
        assert code.shared <= call.shared_bytes
        assert launch.dependent
        assert code.waits
        for instruction in found:
            assert instruction in code.ptx, f"{contract.name}: {instruction}"
        if not found and kind.dtype == "float8_e4m3fn":
            assert "cvt.rn.satfinite.e4m3x2.f32" in code.ptx
