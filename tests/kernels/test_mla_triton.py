"""Kernels of latent attention without a GPU: interpreted against the references, and cross-compiled.

Interpreted functions need a process of their own; see test_attention_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_interpreted import compiled, interpret, interpreted, numpy_2_4, op_call
from case import in_columns, int32
from mla_operands import (
    V2_LITE,
    V3,
    Sizes,
    attrs_of,
    merge_operands,
    of_tokens,
    paged_latents,
    query_operands,
    scaled_latents,
    step_rows,
    up_projection,
    write_operands,
)

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall

registry.discover("cuda")
assert numpy_2_4  # a fixture for all tests here

SMALL: Sequence[Sizes] = ((1, 16, 8, 16, 32), (3, 24, 16, 20, 48), (16, 16, 8, 32, 64))


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def ways(call: OpCall) -> list[Candidate]:
    """Of the Triton kernels."""
    found = [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)]
    return [way for way in found if "triton" in way.launches[0].function]


def hold(
    op: str,
    tensors: Mapping[str, torch.Tensor],
    attrs: Mapping[str, Any],
    *,
    invariant: bool = False,
    among: Callable[[Candidate], bool] = lambda way: True,
    most: int = 9,
) -> None:
    """Hold every different way to the reference in float64, NaN to NaN and infinity to infinity."""
    contract = CONTRACTS[op]
    call = replace(op_call(contract, tensors, attrs, "wgmma"), invariant=invariant)
    wide = {k: v.double() if v.is_floating_point() else v.clone() for k, v in tensors.items()}
    made = contract.reference(*(wide.get(o.name) for o in contract.inputs), **call.attrs)
    made = made if isinstance(made, tuple) else (made,)
    wanted = dict(zip((o.name for o in contract.outputs), made, strict=True))
    wanted |= {name: wide[name] for name in contract.writes}
    # Warps and stages are nothing to the interpreter.
    found = {str([launch.constants for launch in way.launches]): way for way in filter(among, ways(call))}
    assert found
    for way in list(found.values())[:most]:
        got = interpret(way, call, {k: v.clone() if k in contract.writes else v for k, v in tensors.items()})
        for name, want in wanted.items():
            where = f"{op}/{way.name}: {name}"
            have, want = got[name].double(), want.double()
            number = want.isfinite()
            assert torch.equal(have.isfinite(), number), f"{where} has NaN or infinity"
            assert torch.equal(have[want.isinf()], want[want.isinf()]), f"{where} lacks an infinity"
            error = (have - want)[number].norm() / want[number].norm().clamp_min(1e-30)
            allowed = getattr(contract.tolerance, str(got[name].dtype).removeprefix("torch."))
            if name == "log_sum":
                allowed = contract.tolerance.float16
            assert error <= allowed, f"{where} is off by {error:.1e}"


@interpreted
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize(
    ("tokens", "page", "dtype"), [(1, 7, "float16"), (9, 1, "float32"), (33, 64, "float16")]
)
def test_write_and_rotate(sizes: Sizes, tokens: int, page: int, dtype: str) -> None:
    for interleaved in (True, False):
        attrs = attrs_of(sizes, "rank", "rope", eps=1e-6, interleaved=interleaved)
        hold("mla_write", write_operands(sizes, tokens, page, dtype, dtype), attrs)
        attrs = attrs_of(sizes, "heads", "nope", "rope", interleaved=interleaved)
        hold("mla_rope", query_operands(sizes, tokens, dtype), attrs)


@interpreted
@pytest.mark.parametrize(("heads", "value", "tokens", "dtype"), [
    (1, 16, 1, "float16"), (3, 20, 7, "float32"), (16, 128, 5, "float16"),
])  # fmt: skip
def test_merge(heads: int, value: int, tokens: int, dtype: str) -> None:
    hold("merge_attention", merge_operands(heads, value, tokens, dtype), {"heads": heads, "value": value})


@interpreted
@pytest.mark.parametrize("sizes", SMALL, ids=str)
@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float16"), (17, "float32"), (65, "float16")])
def test_products_of_heads(sizes: Sizes, tokens: int, dtype: str) -> None:
    heads, _, _, _, rank = sizes
    kv_b, most = up_projection(sizes, dtype), 1 if heads == 16 else 3  # the interpreter is slow
    attrs = attrs_of(sizes, "heads", "nope", "rope", "value", "rank", interleaved=tokens != 17)
    hold("mla_absorb", query_operands(sizes, tokens, dtype) | {"kv_b": kv_b}, attrs, most=most)
    x = of_tokens([(tokens, tokens)], heads * rank, dtype, before=0)[:tokens]
    attrs = attrs_of(sizes, "heads", "nope", "value", "rank")
    hold("mla_values", {"x": x, "kv_b": kv_b}, attrs, most=most)


PAGED = (  # sizes, page, dtype of the cache, rows of (queries, context), whether items are cut, keys of a tile
    (SMALL[0], 64, "float16", ((1, 1), (17, 17), (3, 90), (0, 0), (1, 64)), False, 64),
    (SMALL[1], 7, "float16", ((5, 40), (1, 203), (20, 20)), False, 32),
    (SMALL[1], 1, "float16", ((2, 130),), False, 32),
    (SMALL[2], 64, "float16", ((3, 129), (1, 300), (0, 0), (1, 1)), True, 64),
    (SMALL[2], 64, "float8_e4m3fn", ((2, 300), (3, 3)), False, 32),
    (SMALL[0], 64, "float16", ((0, 0), (0, 0)), True, 64),
    ((5, 16, 8, 16, 128), 48, "float16", ((1, 1), (1, 1000), (2, 200)), True, 32),
)


def of_kind(split: bool, keys: int) -> Callable[[Candidate], bool]:
    """Ways of which the interpreter, which is slow, runs the first."""
    return lambda way: (way.launches[0].constants["SPLIT"], way.launches[0].constants["K"]) == (split, keys)


@interpreted
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_decode(case: Any) -> None:
    sizes, page, cache, rows, split, keys = case
    heads, _, rope, _, rank = sizes
    lengths = [context for _, context in rows]
    tensors = paged_latents(lengths, page, rank + rope, cache)
    q = of_tokens([(len(rows), 0)], heads * (rank + rope), "float16", before=0)[: len(rows)]
    q[[n == 0 for n in lengths]] = float("nan")
    tensors |= {"q": in_columns(q, 8, 8), "context_len": int32(lengths)}
    attrs = attrs_of(sizes, "heads", "rank", "rope", "scale")
    hold("mla_decode_attention", tensors, attrs, among=of_kind(split, keys), most=1)


@interpreted
@pytest.mark.parametrize(
    ("case", "own"),
    [*((case, False) for case in PAGED), *((case, True) for case in PAGED if not case[4]), (PAGED[3], True)],
    ids=str,
)
def test_extend(case: Any, own: bool) -> None:
    sizes, page, cache, rows, split, keys = case
    heads, _, rope, _, rank = sizes
    tensors = paged_latents([context for _, context in rows], page, rank + rope, cache)
    tensors |= step_rows(rows) | {"q": of_tokens(rows, heads * (rank + rope), "float16")}
    attrs = attrs_of(sizes, "heads", "rank", "rope", "scale", own=own)
    among = of_kind(split, keys)
    hold("mla_extend_attention", tensors, attrs, invariant=not split, among=among, most=1)


@interpreted
@pytest.mark.parametrize("split", [False, True])
def test_rows_of_a_chain(split: bool) -> None:
    """A token a row; rows that have none, and so tokens of no row, between the others."""
    heads, nope, rope, value, rank = SMALL[2]
    lengths = (0, 70, 0, 0, 1, 300, 0)
    count = int32([min(length, 1) for length in lengths])
    at = {"query_start": int32(range(len(lengths))), "query_len": count}
    normal = lambda width: of_tokens([(len(lengths), 0)], width, "float16", before=0)[: len(lengths)]  # noqa: E731
    tensors = {
        **paged_latents(lengths, 64, rank + rope, "float16"),
        **at,
        "context_len": int32(lengths),
        "q": normal(heads * (rank + rope)),
    }
    tensors["q"][count == 0] = float("nan")
    attrs, among = attrs_of(SMALL[2], "heads", "rank", "rope", "scale"), of_kind(split, 64 if split else 32)
    for own in (True, False):
        hold("mla_extend_attention", tensors, attrs | {"own": own}, invariant=not split, among=among, most=1)
    own_tensors = {
        "q": normal(heads * (nope + rope)),
        "kv": normal(heads * (nope + value)),
        "latent": normal(rank + rope),
        **at,
    }
    for name in ("q", "kv", "latent"):
        own_tensors[name][count == 0] = float("nan")
    attrs = attrs_of(SMALL[2], "heads", "nope", "rope", "value", "rank", "scale")
    hold("mla_own_attention", own_tensors, attrs, most=1)


SCALED = (  # sizes, page, rows of (queries, context), whether items are cut
    (SMALL[0], 64, ((1, 1), (17, 17), (3, 90), (0, 0), (1, 64)), False),
    (SMALL[1], 7, ((5, 40), (1, 203), (20, 20)), False),
    (SMALL[2], 64, ((3, 129), (1, 300), (0, 0), (1, 1)), True),
    (SMALL[0], 64, ((0, 0), (0, 0)), True),
)


@interpreted
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_with_scales(case: Any, cache: str) -> None:
    """Decode, what was cached before a step, and of whole items the step's own tokens, too."""
    sizes, page, rows, split = case
    heads, _, rope, _, rank = sizes
    lengths = [context for _, context in rows]
    held = paged_latents(lengths, page, rank + rope, "float16")
    held |= scaled_latents(held["cache"], rank, cache)
    q = of_tokens([(len(rows), 0)], heads * (rank + rope), "float16", before=0)[: len(rows)]
    q[[n == 0 for n in lengths]] = float("nan")
    attrs, among = attrs_of(sizes, "heads", "rank", "rope", "scale"), of_kind(split, 32)
    one = held | {"q": in_columns(q, 8, 8), "context_len": int32(lengths)}
    hold("mla_decode_attention_scaled", one, attrs, among=among, most=1)
    many = held | step_rows(rows) | {"q": of_tokens(rows, heads * (rank + rope), "float16")}
    for own in (False,) if split else (False, True):
        further = attrs | {"own": own}
        hold("mla_extend_attention_scaled", many, further, invariant=not split, among=among, most=1)


@interpreted
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_write_with_scales(sizes: Sizes) -> None:
    """Integers; how the interpreter rounds to e4m3 is wrong."""
    rank = sizes[-1]
    attrs = attrs_of(sizes, "rank", "rope", eps=1e-6, interleaved=True)
    for tokens, page, dtype in ((1, 7, "float16"), (9, 1, "float32"), (33, 64, "float16")):
        made = write_operands(sizes, tokens, page, dtype, dtype)
        made |= scaled_latents(made["cache"], rank, "int8")
        if tokens > 3:
            made["kv"][0, :rank], made["kv"][1, 3], made["kv"][2, 0] = 0, float("nan"), float("inf")
        hold("mla_write_scaled", made, attrs)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        (SMALL[0], ((0, 0), (129, 300), (1, 7), (64, 64))),
        (SMALL[1], ((5, 5), (70, 300))),
        (SMALL[2], ((3, 3),)),
        (SMALL[0], ((0, 0), (0, 0))),
    ],
    ids=str,
)
def test_own(sizes: Sizes, rows: tuple[tuple[int, int], ...]) -> None:
    heads, nope, rope, value, rank = sizes
    tensors = {
        "q": of_tokens(rows, heads * (nope + rope), "float16"),
        "kv": of_tokens(rows, heads * (nope + value), "float16", 1),
        "latent": in_columns(of_tokens(rows, rank + rope, "float16", 2), 8, 8),
    }
    tensors |= {name: x for name, x in step_rows(rows).items() if name != "context_len"}
    attrs = attrs_of(sizes, "heads", "nope", "rope", "value", "rank", "scale")
    hold("mla_own_attention", tensors, attrs, among=lambda way: way.name in ("128x64_w8_s3", "64x32_w4_s2"))


OPS = ("mla_write", "mla_rope", "mla_absorb", "mla_values", "mla_decode_attention", "mla_extend_attention")
OPS = (*OPS, "mla_own_attention", "merge_attention")
SCALED_OPS = ("mla_write_scaled", "mla_decode_attention_scaled", "mla_extend_attention_scaled")


def real_call(
    op: str, sizes: Sizes, tokens: int, *, invariant: bool = False, cache: str = "bfloat16"
) -> OpCall:
    """A call of ``op`` as in a plan with pages of 64, without memory."""
    heads, nope, rope, value, rank = sizes
    contract = CONTRACTS[op]
    attrs = attrs_of(sizes, "heads", "nope", "rope", "value", "rank", "scale")
    attrs |= {"eps": 1e-6, "interleaved": True, "own": invariant}
    of_kv = rank + rope if op.startswith("mla_write") else heads * (nope + value)
    of_q = rank + rope if "cache" in (o.name for o in contract.inputs) else nope + rope
    of_x = value if op == "merge_attention" else rank
    shapes = {
        "q": heads * of_q, "kv": of_kv, "rows": rope, "x": heads * of_x, "y": heads * value, "latent": rank + rope,
        "x_log_sum": heads, "y_log_sum": heads, "page_table": 64,
    }  # fmt: skip
    kinds = {"F": torch.float32, "A": torch.bfloat16, "int32": torch.int32, "float32": torch.float32}
    made = {}
    for operand in contract.inputs:
        kind = kinds.get(operand.dtype, torch.bfloat16)
        shape: tuple[int, ...] = (tokens, shapes[operand.name]) if operand.name in shapes else (tokens,)
        shape = {
            "weight": (rank,),
            "kv_b": (heads * (nope + value), rank),
            "cache": (9, 64, rank if op.endswith("_scaled") else rank + rope),
            "rope_cache": (9, 64, rope),
            "scales": (9, 64, 1),
        }.get(operand.name, shape)
        kind = getattr(torch, cache) if operand.name == "cache" else kind
        made[operand.name] = torch.empty(shape, dtype=kind, device="meta")
    call = op_call(contract, made, {name: attrs[name] for name in contract.attrs}, "tma wgmma pdl fp8")
    return replace(call, invariant=invariant, most_rows=tokens)


@compiled
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("sizes", "tokens"), [(V2_LITE, 64), (V3, 8)], ids=["v2_lite", "v3"])
@pytest.mark.slow
def test_machine_code(op: str, sizes: Sizes, tokens: int) -> None:
    """The best way: no spills but those announced, shared memory of a block, matrix instructions, the wait."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    call = real_call(op, sizes, tokens)
    for launch in ways(call)[0].launches:
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= launch.local_bytes
        assert made.shared <= call.shared_bytes
        assert launch.dependent
        assert made.waits
        products = op not in ("mla_write", "mla_rope", "merge_attention") and "add" not in launch.function
        assert ("wgmma.mma_async" in made.ptx or "mma.sync" in made.ptx) == products


@compiled
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("op", SCALED_OPS)
@pytest.mark.parametrize(("sizes", "tokens"), [(V2_LITE, 64), (V3, 8)], ids=["v2_lite", "v3"])
@pytest.mark.slow
def test_machine_code_with_scales(op: str, sizes: Sizes, tokens: int, cache: str) -> None:
    """The best way: no spills but those announced, shared memory of a block, matrix instructions, the wait."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    call = real_call(op, sizes, tokens, cache=cache)
    for launch in ways(call)[0].launches:
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= launch.local_bytes
        assert made.shared <= call.shared_bytes
        assert made.waits
        products = "write" not in op and "add" not in launch.function
        assert ("wgmma.mma_async" in made.ptx or "mma.sync" in made.ptx) == products


@compiled
def test_latents_are_loaded_once() -> None:
    """Scores and outputs take the same tile: two are on their way, and there is no room for a third."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    call = real_call("mla_decode_attention", V2_LITE, 64)
    (way,) = (way for way in ways(call) if way.name == "split_16x64_w4_s2")
    made = aot.compile_launch(way.launches[0], call)
    tile, queries = 64 * 576 * 2, 16 * 576 * 2
    assert 2 * tile + queries <= made.shared < 2 * tile + queries + 4096
    assert "wgmma.mma_async" in made.ptx
    assert "mma.sync" not in made.ptx


@compiled
def test_8_bit_latents() -> None:
    """Rounded by the device, which the interpreter does wrongly; read without spills."""
    aot = pytest.importorskip("makeready.graphs.planner.cuda.aot")
    for op, wanted in (
        ("mla_write", "cvt.rn.satfinite.e4m3x2.f32"),
        ("mla_decode_attention", "cvt.rn.f16x2.e4m3x2"),
    ):
        call = real_call(op, V2_LITE, 64, cache="float8_e4m3fn")
        launch = ways(call)[0].launches[0]
        made = aot.compile_launch(launch, call)
        assert made.spill_bytes <= launch.local_bytes
        assert wanted in made.ptx


@compiled
def test_deterministic_plans_have_one_way_for_all_steps() -> None:
    """The same constants and options in every bucket; only grids differ."""
    for op in (
        *("mla_write", "mla_absorb", "mla_extend_attention", "mla_values"),
        *("mla_write_scaled", "mla_extend_attention_scaled"),
    ):
        found = []
        for tokens in (1, 64, 2048):
            call = replace(real_call(op, V2_LITE, tokens, invariant=True), most_rows=64)
            assert all(len(way.launches) == 1 for way in ways(call))
            found.append({
                (str(way.launches[0].constants), way.launches[0].num_warps, way.launches[0].num_stages)
                for way in ways(call)
            })  # fmt: skip
        assert found[0] == found[1] == found[2]
