"""Triton kernels of 8-bit integers without a GPU: interpreted against the references, and cross-compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from interpreted import aot, columns_of, op_call, random
from moe_inputs import grouped_linear_fp8
from test_fp8_triton import check, compiled, interpreted, launch

from makeready.kernels import norm_quantize_triton, registry  # noqa: F401
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Tensor
from makeready.kernels.gemm import linear_fp8_triton
from makeready.kernels.gemm.linear_fp8_tiling import tilings
from makeready.kernels.moe import combine_triton, experts_triton, grouped_cuda  # noqa: F401

HOPPER = frozenset({"tma", "wgmma", "pdl", "fp8"})
AMPERE: frozenset[str] = frozenset()


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def int8(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@interpreted
@pytest.mark.parametrize(
    ("T", "N", "K", "bias"),
    [
        (1, 131, 96, False),
        (7, 65, 64, True),
        (33, 70, 2100, True),
        (65, 63, 2048, False),
        (300, 33, 100, True),
    ],
)
def test_products(T, N, K, bias):
    """Every way that pointers can feed gives the same bits, those of exact sums; NaN behind the last scale."""
    operands = {"x": int8(T, K, seed=T), "weight": int8(N, K, seed=N)}
    scales = torch.full((T + 64, 1), float("nan"))
    scales[:T] = random(T, 1).exp() / 500
    operands |= {"x_scale": scales[:T], "weight_scale": random(N, seed=2).exp() / 500}
    operands |= {"bias": random(N, dtype=torch.float16, seed=5)} if bias else {}
    sums = (operands["x"].long() @ operands["weight"].long().T).float()
    want = sums * operands["x_scale"] * operands["weight_scale"]
    want = want + operands["bias"].float() if bias else want
    sharers: set[int] = set()
    for multiprocessors in (7, 40):
        call = op_call(
            "linear_int8",
            operands,
            {"out_dtype": "float32"},
            features=AMPERE,
            multiprocessors=multiprocessors,
        )
        product = linear_fp8_triton.describe(call)
        distinct = {(w.t, w.n, w.k, min(w.sharers(product), 3)): w for w in tilings(product)}
        for way in distinct.values():
            sharers.add(way.sharers(product))
            got = launch(linear_fp8_triton.emit(call, way, product), call, operands)["y"]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=way.name)
    assert max(sharers) > 1 or K <= 1024


def hard(rows: int, columns: int) -> torch.Tensor:
    """Halves between integers, a row of zeros, tiny and large numbers."""
    x = columns_of(random(rows, columns))
    x[0] = 0.0
    x[-1, ::3] *= 1e-6
    if rows > 2:
        x[1] = (
            torch.arange(columns).remainder(254) * 0.5 - 63.5
        )  # a scale of one half: every odd one is a tie
        x[2] *= 3e4
    return x


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 384), (9, 4096), (3, 100)])
def test_quantize(rows, columns):
    x = hard(rows, columns)
    check("quantize_int8", {"x": x}, group=columns)
    for scale in (0.02, 3e-4):
        check("quantize_int8_static", {"x": x, "scale": torch.tensor([scale])})
    check("dequantize_int8", {"q": int8(rows, columns, seed=1), "scale": random(rows)}, out_dtype="bfloat16")


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", ["quantize_int8", "quantize_int8_static", "rms_norm_quantize_int8"])
def test_rows_that_are_not_finite_have_no_finite_scale(op, bad):
    x = random(4, 96)
    x[2, 5] = bad
    operands, attrs = {"x": x}, {"group": 96}
    if op == "quantize_int8_static":
        operands, attrs = operands | {"scale": torch.tensor([0.02])}, {}
    if op == "rms_norm_quantize_int8":
        operands, attrs = operands | {"weight": random(96, seed=1)}, attrs | {"eps": 1e-6, "offset": 0.0}
    call = op_call(op, operands, attrs, features=AMPERE)
    (kernel,) = registry.cuda_kernels(op)
    for candidate in kernel.candidates(call):
        made = launch(candidate, call, operands)
        scale = made[CONTRACTS[op].outputs[1].name][:, 0]
        assert scale.isfinite().tolist() == [True, True, False, True]


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (5, 640)])
def test_fused(rows, columns):
    x, residual, weight = columns_of(random(rows, columns)), random(rows, columns, seed=1), random(columns)
    attrs = {"eps": 1e-6, "group": columns}
    check("rms_norm_quantize_int8", {"x": x, "weight": weight}, **attrs, offset=1.0)
    operands = {"x": x, "residual": residual, "weight": weight}
    check("add_rms_norm_quantize_int8", operands, **attrs)
    check("add_rms_norm_and_quantize_int8", operands, **attrs)
    half = columns_of(random(rows, 2 * columns, dtype=torch.float16))
    check("silu_mul_quantize_int8", {"gate_up": half}, group=columns)
    place = torch.stack([torch.arange(rows), torch.arange(rows).flip(0)], 1).int().contiguous()
    more = {"place": place, "share": random(rows, 2, seed=4), "residual": residual, "weight": weight}
    check("combine_add_rms_norm_quantize_int8", {"x": x} | more, **attrs)


@interpreted
@pytest.mark.parametrize("op", ["grouped_linear_int8", "grouped_silu_mul_int8"])
def test_experts(op):
    made = (case for case in grouped_linear_fp8(op) if case.attrs["out_dtype"] == "float32")
    fitting = (case for case in made if "grouped_linear" in op or case.operands["weight"].shape[1] % 2 == 0)
    dense = (case for case in fitting if case.operands["x_scale"].is_contiguous())  # as plans have them
    small = [case for case in dense if len(case.operands["order"]) <= 40]
    for by_token in (True, False):
        for case in [case for case in small if (case.attrs["top_k"] > 0) == by_token][-2:]:
            check(op, dict(case.operands), **case.attrs)


def product_call(T: int, N: int, K: int, features: frozenset[str] = HOPPER) -> OpCall:
    """A call with bf16 results, operands as a plan has them."""
    tensors = {
        "x": Tensor((T, K), "int8", K, 256, spare=True),
        "weight": Tensor((N, K), "int8", K, 256),
        "x_scale": Tensor((T, 1), "float32", 1, 256),
        "weight_scale": Tensor((N,), "float32", 1, 256),
        "y": Tensor((T, N), "bfloat16", N, 256),
    }
    attrs = {"out_dtype": "bfloat16"}
    return OpCall("linear_int8", tensors, attrs, {"T": T, "N": N, "K": K}, T, T, features=features)


@compiled
@pytest.mark.parametrize("T", [1, 256, 8192])
def test_hoppers_matrix_unit_multiplies_integers(T):
    """The planner's first choice, without spills, for as many blocks of a multiprocessor as the model counts on."""
    assert aot
    call = product_call(T, 6144, 4096)
    product = linear_fp8_triton.describe(call)
    way = tilings(product)[0]
    (node,) = linear_fp8_triton.emit(call, way, product).launches
    made = aot.compile_launch(node, call)
    assert re.search(r"wgmma\.mma_async\S+\.s32\.s8\.s8", made.ptx)
    assert made.spill_bytes == 0
    assert made.shared <= way.shared(product)
    assert way.a_sm * (made.shared + 1024) <= 233472
    assert way.a_sm * 32 * made.warps * -(-made.registers // 8) * 8 <= 65536


def triton_kernel() -> registry.CudaKernel:
    """What all targets have."""
    (kernel,) = (kernel for kernel in registry.cuda_kernels("linear_int8") if kernel.name != "few")
    return kernel


@compiled
def test_ampere_multiplies_integers_too():
    """Which has no 8-bit floats."""
    assert aot
    call = product_call(16, 6144, 4096, AMPERE)
    kernel = triton_kernel()
    (node,) = kernel.candidates(call)[0].launches
    made = aot.compile_launch(node, call, 80)
    assert re.search(r"mma\.sync\S+\.s32\.s8\.s8\.s32", made.ptx)
    assert made.spill_bytes == 0


@compiled
def test_sums_that_32_bits_may_not_hold_are_refused():
    kernel = triton_kernel()
    assert kernel.candidates(product_call(1, 64, 1 << 17))
    assert not kernel.candidates(product_call(1, 64, (1 << 17) + 128))


def small_calls() -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, object]]]:
    x, weight = torch.empty(64, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    yield "quantize_int8_static", {"x": x, "scale": torch.ones(1)}, {}
    yield (
        "add_rms_norm_quantize_int8",
        {"x": x, "residual": x, "weight": weight},
        {"eps": 1e-6, "group": 4096},
    )
    yield "silu_mul_quantize_int8", {"gate_up": x}, {"group": 2048}


@compiled
def test_integers_are_written_wide():
    assert aot
    for op, operands, attrs in small_calls():
        call = op_call(op, operands, attrs, features=HOPPER)
        (kernel,) = registry.cuda_kernels(op)
        (node,) = kernel.candidates(call)[0].launches
        made = aot.compile_launch(node, call)
        assert made.spill_bytes == 0
        assert re.search(r"ld\.global\S*\.v4\.b32", made.ptx), op
        assert re.search(r"st\.global\S*\.v[24]\.b32", made.ptx), op


@compiled
def test_experts_have_the_matrix_unit():
    assert aot
    x, weight = int8(64, 2048, seed=0), torch.empty(8, 1536, 2048, dtype=torch.int8)
    operands = {"x": x, "x_scale": torch.ones(64, 1), "weight": weight, "weight_scale": torch.ones(8, 1536)}
    operands |= {"order": torch.zeros(512, dtype=torch.int32), "start": torch.zeros(9, dtype=torch.int32)}
    attrs = {"top_k": 8, "out_dtype": "bfloat16"}
    call = op_call("grouped_silu_mul_int8", operands, attrs, features=HOPPER)
    kernels = registry.cuda_kernels("grouped_silu_mul_int8")
    assert {kernel.name for kernel in kernels} == {"wgmma", "tiles"}
    for kernel in kernels:
        (node,) = kernel.candidates(call)[0].launches
        made = aot.compile_launch(node, call)
        assert made.spill_bytes == 0
        assert re.search(r"wgmma\.mma_async\S+\.s32\.s8\.s8", made.ptx), kernel.name
