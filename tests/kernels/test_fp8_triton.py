"""Triton kernels of 8-bit floats without a GPU: interpreted against the references, and cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import INTERPRETED, aot, columns_of, op_call, random

from makeready.kernels import (  # noqa: F401
    dequantize_triton,
    norm_quantize_triton,
    quantize_triton,
    registry,
)
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, Descriptor, OpCall, Pointer, Scalar, Scratch, Tensor
from makeready.kernels.gemm import linear_fp8_triton
from makeready.kernels.gemm.linear_fp8_tiling import STREAM, Product, Tiling, seconds, tilings

if INTERPRETED:
    import numpy as np
    from triton.runtime import interpreter

    _BITS = {
        "fp8e4nv": (torch.float8_e4m3fn, np.uint8),
        "fp16": (torch.float16, np.uint16),
        "fp32": (torch.float32, np.uint32),
    }
    _convert = interpreter._convert_float

    def _convert_by_torch(values, source, target, rounding):
        """The interpreter's own conversion to 8 bits lets halves carry into nothing."""
        if "fp8e4nv" not in (source.name, target.name):
            return _convert(values, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(values))
        wide = wide.view(torch.float8_e4m3fn) if source.name == "fp8e4nv" else wide
        made, bits = _BITS[target.name]
        signed = {np.uint8: torch.uint8, np.uint16: torch.int16, np.uint32: torch.int32}[bits]
        return wide.to(made).view(signed).numpy().view(bits).reshape(values.shape)

    interpreter._convert_float = _convert_by_torch

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (1, 2, 7, 16, 24, 33, 64, 96, 128, 200, 256, 384, 512, 1000, 2048, 8192)
FEATURES = frozenset({"tma", "wgmma", "pdl", "fp8"})
PLAIN = frozenset({"fp8"})


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def launch(candidate: Candidate, call: OpCall, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the one launch on CPU tensors; gives the results, poisoned where nothing was written."""
    memory = dict(operands)
    for name in set(call.tensors) - set(operands):
        tensor = call.tensors[name]
        memory[name] = torch.full([int(d) for d in tensor.shape], float("nan")).to(
            getattr(torch, tensor.dtype)
        )
    scratch = torch.full((candidate.scratch + 8,), 0xFF, dtype=torch.uint8)
    scratch[: candidate.zeroed] = 0
    (made,) = candidate.launches
    values: dict[str, object] = {}
    for name, argument in made.arguments.items():
        if isinstance(argument, Pointer):
            values[name] = memory[argument.operand]
        elif isinstance(argument, Scratch):
            values[name] = scratch[argument.offset : candidate.scratch].view(getattr(torch, argument.dtype))
        else:
            assert isinstance(argument, Scalar)
            values[name] = argument.value
    module, _, function = made.function.partition(":")
    getattr(importlib.import_module(module), function)[made.grid](**values, **made.constants)
    assert not scratch[: candidate.zeroed].any(), "counters are not zero again"
    return memory


def fp8(*shape: int, seed: int) -> torch.Tensor:
    return random(*shape, seed=seed).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn)


def products(T: int, N: int, K: int, grouped: bool, bias: bool) -> dict[str, torch.Tensor]:
    """Random operands; scales differ by orders of magnitude, so that a misplaced one shows."""
    made = {"x": fp8(T, K, seed=T), "weight": fp8(N, K, seed=N)}
    shapes = ((T, K // 128), (-(-N // 128), K // 128)) if grouped else ((T, 1), (N,))
    for seed, (name, shape) in enumerate(zip(("x_scale", "weight_scale"), shapes, strict=True)):
        made[name] = (2 * random(*shape, seed=seed)).exp() / 500
    if bias:
        made["bias"] = random(N, dtype=torch.float16, seed=5)
    return made


@interpreted
@pytest.mark.parametrize(
    ("T", "N", "K", "grouped", "bias"),
    [
        (1, 131, 96, False, False),
        (3, 64, 100, False, True),
        (33, 70, 2100, False, True),
        (70, 65, 2048, False, False),
        (1, 300, 512, True, True),
        (19, 131, 2304, True, False),
        (70, 128, 384, True, True),
    ],
)
def test_products(T, N, K, grouped, bias):
    """Every kernel that pointers can feed, blocks so many that tiles are shared by two and more."""
    op = "linear_fp8_block" if grouped else "linear_fp8"
    operands = products(T, N, K, grouped, bias)
    attrs = {"out_dtype": "float32", **({"block": 128} if grouped else {})}
    want = CONTRACTS[op].reference(
        **{k: v.double() for k, v in operands.items()}, **attrs | {"out_dtype": "float64"}
    )
    sharers = set()
    tried: set[tuple[int, ...]] = set()
    for multiprocessors in (7, 40):
        call = op_call(op, operands, attrs, features=PLAIN, multiprocessors=multiprocessors)
        product = linear_fp8_triton.describe(call)
        for way in tilings(product):
            key = (way.t, way.n, way.k, min(way.sharers(product), 3))
            if key in tried:
                continue
            tried.add(key)
            sharers.add(way.sharers(product))
            candidate = linear_fp8_triton.emit(call, way, product)
            got = launch(candidate, call, operands)["y"]
            error = (got.double() - want).norm() / want.norm()
            assert error <= 1e-5, (way.name, error)
    assert max(sharers) > 1 or K <= 1024  # which a block takes at least


def check(op: str, operands: dict[str, torch.Tensor], **attrs) -> None:
    """The reference's bytes where nothing is summed; else what the contract allows."""
    contract = CONTRACTS[op]
    want = contract.reference(**operands, **attrs)
    want = want if isinstance(want, tuple) else (want,)
    for multiprocessors in (1, 132):
        call = op_call(op, operands, attrs, features=PLAIN, multiprocessors=multiprocessors)
        found = [way for kernel in registry.cuda_kernels(op) for way in kernel.candidates(call)]
        assert found
        for candidate in found:
            got = launch(candidate, call, operands)
            for output, value in zip(contract.outputs, want, strict=True):
                assert not got[output.name].float().isnan().any(), output.name
                if not op.startswith("quantize"):
                    kind = str(value.dtype).removeprefix("torch.")
                    off = (got[output.name].double() - value.double()).norm()
                    assert off <= getattr(contract.tolerance, kind) * value.double().norm(), output.name
                else:
                    assert got[output.name].view(torch.uint8).equal(value.view(torch.uint8)), output.name


def hard(rows: int, columns: int) -> torch.Tensor:
    """Values halfway between neighbours of the format, zeros, a row of zeros, tiny and large ones."""
    x = columns_of(random(rows, columns))
    x[0] = 0.0
    x[-1, ::3] *= 1e-6
    if rows > 2:
        x[1] = torch.arange(columns).remainder(43) * 0.5 - 10.5  # a scale of 3 / 64 times 2^n: exact halves
        x[2] *= 3e4
    return x


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 384), (9, 4096)])
def test_quantize(rows, columns):
    x = hard(rows, columns)
    for group in (columns, 128):
        check("quantize_fp8", {"x": x}, group=group)
    for scale in (0.02, 3e-4):
        check("quantize_fp8_static", {"x": x, "scale": torch.tensor([scale])})


@interpreted
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(1, 16, 16), (200, 384, 128), (37, 50, 16), (128, 130, 64)]
)
def test_quantize_squares(rows, columns, block):
    check("quantize_fp8_block", {"x": hard(rows, columns)}, block=block)


@interpreted
@pytest.mark.parametrize(("rows", "columns", "block"), [(1, 16, 16), (300, 384, 128), (37, 50, 40)])
def test_dequantize(rows, columns, block):
    q, squares = fp8(rows, columns, seed=1), (-(-rows // block), -(-columns // block))
    for dtype in ("bfloat16", "float16", "float32"):
        check("dequantize_fp8", {"q": q, "scale": random(rows)}, out_dtype=dtype)
        scale = random(*squares, seed=2)
        check("dequantize_fp8_block", {"q": q, "scale": scale}, block=block, out_dtype=dtype)


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 640), (9, 4096)])
def test_fused(rows, columns):
    weight = random(columns, seed=2)
    for group in (columns, 128):
        x, residual = columns_of(random(rows, columns)), random(rows, columns, seed=1)
        check("rms_norm_quantize_fp8", {"x": x, "weight": weight}, eps=1e-6, group=group)
        check("rms_norm_quantize_fp8", {"x": x, "weight": weight}, eps=1e-6, group=group, offset=1.0)
        operands = {"x": x, "residual": residual, "weight": weight}
        check("add_rms_norm_quantize_fp8", operands, eps=1e-6, group=group)
        check("add_rms_norm_quantize_fp8", operands, eps=1e-6, group=group, offset=1.0)
        check("add_rms_norm_and_quantize_fp8", operands, eps=1e-6, group=group)
        half = columns_of(random(rows, 2 * columns, dtype=torch.float16))
        check("silu_mul_quantize_fp8", {"gate_up": half}, group=group)


def product_call(
    T: int, N: int, K: int, *, grouped: bool = False, bias: bool = False, features: frozenset[str] = FEATURES
) -> OpCall:
    """A call with bf16 results, operands as a plan has them."""
    groups = K // 128
    tensors = {
        "x": Tensor((T, K), "float8_e4m3fn", K, 256),
        "weight": Tensor((N, K), "float8_e4m3fn", K, 256),
        "x_scale": Tensor((T, groups if grouped else 1), "float32", groups if grouped else 1, 256),
        "weight_scale": Tensor(
            (-(-N // 128), groups) if grouped else (N,), "float32", groups if grouped else 1, 256
        ),
        "y": Tensor((T, N), "bfloat16", N, 256),
    }
    if bias:
        tensors["bias"] = Tensor((N,), "bfloat16", 1, 256)
    op = "linear_fp8_block" if grouped else "linear_fp8"
    attrs = {"out_dtype": "bfloat16", **({"block": 128} if grouped else {})}
    return OpCall(op, tensors, attrs, {"T": T, "N": N, "K": K, "block": 128}, T, T, features=features)


def emitted(call: OpCall) -> list[Candidate]:
    (kernel,) = (kernel for kernel in registry.cuda_kernels(call.op) if kernel.name == "tiled")
    return list(kernel.candidates(call))


@compiled
def test_every_call_has_ways_and_the_choice_is_repeatable():
    for T in ROWS:
        for N, K in (*MATRICES.values(), (131, 256), (7, 128)):
            for grouped in (False, True):
                for features in (FEATURES, PLAIN):
                    call = product_call(T, N, K, grouped=grouped, features=features)
                    assert emitted(call)
                    assert emitted(call) == emitted(call)
    assert emitted(product_call(3, 7, 13))
    assert not emitted(product_call(3, 7, 13, features=frozenset()))


@compiled
@settings(max_examples=300, deadline=None)
@given(
    T=st.integers(1, 600),
    N=st.integers(1, 3000),
    K=st.integers(1, 5000),
    sms=st.sampled_from((1, 7, 108, 132)),
    grouped=st.booleans(),
)
def test_blocks_do_every_step_once_and_sharers_are_counted_right(T, N, K, sms, grouped):
    K = -(-K // 128) * 128 if grouped else K
    product = Product(T, N, K, 2, grouped, True, True, sms, 232448)
    ways = tilings(product)
    assert ways
    assert seconds(product, ways[0]) <= seconds(product, ways[-1])
    for way in ways:
        assert way.shared(product) <= product.shared_bytes
        if way.kind != STREAM:
            continue
        blocks, steps = way.blocks(product), way.steps(product)
        units = way.tiles(product) * steps
        assert (blocks - 1) * way.share < units <= blocks * way.share
        most = max(
            (t * steps + steps - 1) // way.share - t * steps // way.share for t in range(way.tiles(product))
        )
        assert most + 1 <= way.sharers(product)
        assert (most == 0) == (way.sharers(product) == 1)


@compiled
def test_scratch_holds_two_parts_of_a_tile_for_every_block():
    for T, (N, K) in ((t, m) for t in (1, 17, 64, 300) for m in MATRICES.values()):
        call = product_call(T, N, K)
        product = linear_fp8_triton.describe(call)
        for way, candidate in zip(tilings(product), linear_fp8_triton.candidates(call), strict=True):
            (node,) = candidate.launches
            assert node.grid == (way.blocks(product), 1, 1)
            sums = node.arguments.get("partial")
            if not isinstance(sums, Scratch):
                assert candidate.scratch == 0
                continue
            assert 4 * way.tiles(product) <= candidate.zeroed == sums.offset
            assert candidate.scratch - sums.offset == way.blocks(product) * 2 * 4 * way.t * way.n


@compiled
def test_few_rows_cost_what_streaming_the_weights_costs():
    for N, K in MATRICES.values():
        for grouped in (False, True):
            product = linear_fp8_triton.describe(product_call(16, N, K, grouped=grouped))
            best = tilings(product)[0]
            assert best.kind == STREAM
            assert N * K / 3.0e12 < seconds(product, best) < N * K / 3.0e12 + 7e-6


@compiled
def test_operands_that_tma_cannot_address_go_through_pointers():
    for call in (product_call(4, 64, 100), product_call(300, 512, 256, features=PLAIN)):
        for candidate in linear_fp8_triton.candidates(call):
            (node,) = candidate.launches
            assert not any(isinstance(a, Descriptor) for a in node.arguments.values())


@compiled
def test_padded_scales_are_refused():
    call = product_call(4, 64, 256, grouped=True)
    call.tensors["x_scale"] = Tensor((4, 2), "float32", 3, 256)  # type: ignore[index]
    assert not emitted(call)


def distinct(grouped: bool) -> list[tuple[OpCall, Tiling]]:
    """One call of every kernel that real shapes ask for."""
    found: dict[tuple[object, ...], tuple[OpCall, Tiling]] = {}
    for T in ROWS:
        for N, K in MATRICES.values():
            call = product_call(T, N, K, grouped=grouped)
            product = linear_fp8_triton.describe(call)
            for way in tilings(product):
                key = (way.kind, way.t, way.n, way.k, way.warps, way.stages, way.pieces, way.halves)
                found.setdefault((*key, way.sharers(product) > 1), (call, way))
    return list(found.values())


def verify(call: OpCall, way: Tiling) -> None:
    product = linear_fp8_triton.describe(call)
    candidate = linear_fp8_triton.emit(call, way, product)
    (node,) = candidate.launches
    made = aot.compile_launch(node, call)  # type: ignore[union-attr]
    assert made.spill_bytes <= node.local_bytes, way.name
    assert made.shared <= way.shared(product), (way.name, made.shared)
    assert made.waits
    assert "wgmma.mma_async" in made.ptx
    assert "e4m3" in made.ptx
    assert "cp.async.bulk.tensor" in made.ptx
    # As many blocks as the model counts on have room in a multiprocessor.
    assert way.a_sm * (made.shared + 1024) <= 233472, way.name
    assert way.a_sm * 32 * made.warps * -(-made.registers // 8) * 8 <= 65536, (way.name, made.registers)


@compiled
@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
def test_first_choices_cross_compile_without_spilling(grouped):
    """The planner's first choice of a few calls; all ways where FP8_COMPILE_ALL is set."""
    if os.environ.get("FP8_COMPILE_ALL"):
        for call, way in distinct(grouped):
            verify(call, way)
        return
    for T, bias in ((16, True), (256, False), (8192, True)):
        call = product_call(T, *MATRICES["qkv"], grouped=grouped, bias=bias)
        verify(call, tilings(linear_fp8_triton.describe(call))[0])


@compiled
@pytest.mark.slow
def test_wide_accesses():
    """Rows of 4,096 are read and written 8 bytes a thread or wider, and nothing spills."""
    assert aot
    weight = torch.empty(4096, dtype=torch.bfloat16)
    for tokens in (1, 8192):
        x = torch.empty(tokens, 4096, dtype=torch.bfloat16)
        calls = [
            ("quantize_fp8", {"x": x}, {"group": 4096}),
            ("quantize_fp8", {"x": x}, {"group": 128}),
            ("quantize_fp8_static", {"x": x, "scale": torch.ones(1)}, {}),
            ("quantize_fp8_block", {"x": x}, {"block": 128}),
            ("silu_mul_quantize_fp8", {"gate_up": x}, {"group": 128}),
            ("rms_norm_quantize_fp8", {"x": x, "weight": weight}, {"eps": 1e-6, "group": 4096}),
        ]
        for op, operands, attrs in calls:
            call = op_call(op, operands, attrs, features=frozenset({"pdl", "fp8"}))
            for kernel in registry.cuda_kernels(op):
                for candidate in kernel.candidates(call):
                    made = aot.compile_launch(candidate.launches[0], call)
                    assert made.spill_bytes == 0
                    assert made.waits
                    assert "e4m3x2.f32" in made.ptx
                    assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx), op
                    assert re.search(r"st\.global\S*\.v[24]\.b32", made.ptx), op
