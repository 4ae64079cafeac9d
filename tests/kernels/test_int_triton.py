"""Triton kernels of weights of 4 and 8 bits without a GPU: interpreted against the references, and cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
from case import Random
from inputs import cases
from int_inputs import int_weights
from interpreted import INTERPRETED, aot, check_interpreted, op_call
from test_fp8_triton import launch

from makeready.kernels import integers_triton, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Descriptor, OpCall, Tensor
from makeready.kernels.gemm import linear_int_triton
from makeready.kernels.gemm.linear_int_tiling import seconds, tilings
from makeready.kernels.moe import experts_int_triton
from makeready.kernels.spec import TensorSpec

assert integers_triton

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

LOADS = (
    "repack_rows",
    "repack_awq",
    "repack_pairs",
    "unpack_zeros",
    "tile_scales",
    "order_of_groups",
    "quantize_int",
    "gather_columns",
)
HOPPER = frozenset({"tma", "wgmma", "pdl"})


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@interpreted
@pytest.mark.parametrize("op", [*LOADS, "dequantize_int"])
def test_weights_are_made(op):
    for case in cases(op):
        if "bfloat16" in case.label:  # the interpreter rounds it otherwise
            continue
        check_interpreted(op, case.operands, **case.attrs)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("op", [*LOADS, "dequantize_int"])
def test_what_makes_weights_cross_compiles(op):
    case = next(iter(cases(op)))
    call = op_call(op, case.operands, case.attrs, features=HOPPER)
    for kernel in registry.cuda_kernels(op):
        for candidate in kernel.candidates(call):
            made = aot.compile_launch(candidate.launches[0], call)
            assert made.spill_bytes == 0
            assert made.waits
            assert not candidate.scratch


MATRICES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}


def products(T, N, K, bits, group, zeros, bias, dtype="float16"):
    random = Random(T * N)
    made = {"x": random.normal(T, K, dtype=dtype)} | int_weights(random, N, K, bits, group, zeros)
    return made | ({"bias": random.normal(N, dtype=dtype)} if bias else {})


@interpreted
@pytest.mark.parametrize(
    ("T", "N", "K", "bits", "group", "zeros", "bias"),
    [
        (1, 131, 96, 4, 32, False, False),
        (3, 64, 100, 4, 100, True, True),
        (17, 70, 1152, 4, 128, False, True),
        (34, 65, 320, 4, 64, True, False),
        (1, 200, 256, 8, 128, True, True),
        (5, 66, 200, 8, 32, False, False),
        (2, 64, 2100, 4, 256, True, False),
    ],
)
def test_products(T, N, K, bits, group, zeros, bias):
    """Every kernel that pointers can feed, blocks so many that tiles are shared by two and more."""
    operands = products(T, N, K, bits, group, zeros, bias)
    attrs = {"bits": bits, "group": group, "out_dtype": "float32"}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
    want = CONTRACTS["linear_int"].reference(**wide, **attrs | {"out_dtype": "float64"})
    sharers, tried = set(), set()
    for multiprocessors in (2, 40):
        call = op_call(
            "linear_int", operands, attrs, features=frozenset({"wgmma"}), multiprocessors=multiprocessors
        )
        product = linear_int_triton.describe(call)
        for way in tilings(product):
            key = (way.t, way.n, min(way.sharers(product), 3))
            if key in tried:
                continue
            tried.add(key)
            sharers.add(way.sharers(product))
            got = launch(linear_int_triton.emit(call, way, product), call, operands)["y"]
            error = (got.double() - want).norm() / want.norm()
            assert error <= 5e-4, (way.name, error)
    assert 1 in sharers
    assert K < 1152 or max(sharers) > 1


def product_call(
    T,
    N,
    K,
    bits=4,
    group=128,
    zeros=None,
    bias=False,
    features=HOPPER,
    dtype="bfloat16",
    out_dtype="",
    **options,
):
    """A call as the planner makes it, without operands; ``zeros`` is their dtype."""
    groups, dtypes = -(-K // group), {"weight": "int16", "weight_scale": "float16", "weight_zero": zeros}
    shapes = {"x": (T, K), "weight": (N, -(-K // 128) * 8 * bits), "weight_scale": (-(-N // 64), groups, 64)}
    shapes |= {"weight_zero": shapes["weight_scale"]} if zeros else {}
    shapes |= {"bias": (N,)} if bias else {}
    specs = {name: TensorSpec(shape, dtypes.get(name, dtype)) for name, shape in shapes.items()}
    attrs = {"bits": bits, "group": group, "out_dtype": out_dtype}
    contract = CONTRACTS["linear_int"]
    specs |= contract.infer(specs, attrs)
    tensors = {
        name: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 256, spare=name in ("x", "weight"))
        for name, s in specs.items()
    }
    dims = contract.dims({k: v for k, v in specs.items() if k != "y"}, attrs)
    return OpCall("linear_int", tensors, attrs, dims, T, T, features=features, **options)


def verify(call, way):
    product = linear_int_triton.describe(call)
    (node,) = linear_int_triton.emit(call, way, product).launches
    made = aot.compile_launch(node, call)
    assert made.spill_bytes <= node.local_bytes, way.name
    assert made.shared <= way.shared(product), (way.name, made.shared)
    assert made.waits
    # A operand from registers: widened weights never go back to shared memory.
    assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, *\{", made.ptx), way.name
    assert "cp.async.bulk.tensor" in made.ptx
    assert way.a_sm * (made.shared + 1024) <= 233472, way.name
    assert way.a_sm * 32 * made.warps * -(-made.registers // 8) * 8 <= 65536, (way.name, made.registers)


FORMS = (
    (4, 128, None), (4, 128, "uint8"), (4, 32, "uint8"), (4, 64, None), (8, 128, None), (8, 32, "uint8"),
)  # fmt: skip


def distinct(bits, group, zeros):
    """One call of every kernel that real shapes ask for."""
    found = {}
    for T in (1, 16, 24, 33, 64, 96, 200, 256, 1000, 8192):
        for N, K in MATRICES.values():
            call = product_call(T, N, K, bits, group, zeros)
            product = linear_int_triton.describe(call)
            for way in tilings(product):
                key = (way.kind, way.t, way.n, way.warps, way.stages, way.sharers(product) > 1)
                found.setdefault(key, (call, way))
    return list(found.values())


@pytest.mark.slow
@compiled
def test_first_choices_cross_compile_without_spilling():
    """The planner's first choice of a few calls; all ways of all forms where INT_COMPILE_ALL is set."""
    if os.environ.get("INT_COMPILE_ALL"):
        for form in FORMS:
            for call, way in distinct(*form):
                verify(call, way)
        return
    for T, form, bias in ((16, FORMS[1], True), (8192, FORMS[0], False)):
        call = product_call(T, *MATRICES["qkv"], *form, bias=bias)
        verify(call, tilings(linear_int_triton.describe(call))[0])


@compiled
def test_ampere_goes_through_pointers():
    call = product_call(
        16, 4096, 4096, zeros="uint8", features=frozenset(), shared_bytes=166912, multiprocessors=108
    )
    candidate = linear_int_triton.candidates(call)[0]
    (node,) = candidate.launches
    assert not any(isinstance(a, Descriptor) for a in node.arguments.values())
    made = aot.compile_launch(node, call, 80)
    assert made.spill_bytes == 0
    assert "mma.sync" in made.ptx
    assert made.shared <= 166912


@compiled
def test_few_rows_cost_little_more_than_streaming_the_weights():
    for N, K in MATRICES.values():
        product = linear_int_triton.describe(product_call(16, N, K))
        floor = product.weight_bytes / 3.0e12
        assert floor < seconds(product, tilings(product)[0]) < 1.6 * floor + 12e-6


@interpreted
@pytest.mark.parametrize("op", ["grouped_linear_int", "grouped_silu_mul_int"])
def test_experts(op):
    """Every height of tiles, and experts of nobody, whose scales are NaN."""
    for case in itertools.islice(cases(op), 0, None, 5):
        operands = {k: v.half() if k == "x" else v for k, v in case.operands.items()}
        attrs = case.attrs | {"out_dtype": "float32"}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
        arguments = [wide.get(o.name) for o in CONTRACTS[op].inputs]
        want = CONTRACTS[op].reference(*arguments, **attrs | {"out_dtype": "float64"})
        call = op_call(op, operands, attrs, features=frozenset({"wgmma"}), multiprocessors=3)
        heights = {way.t: way for way in experts_int_triton.tilings(call)}
        for way in heights.values():
            got = launch(experts_int_triton.emit(call, way), call, operands)["y"]
            error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
            assert error <= 2e-3, (case.label, way.name, error)


def experts_call(entries, bits, group, zeros, silu, E=128, N=768, K=2048):
    """Qwen3-30B-A3B's first product, with or without the gate."""
    rows, groups = (2 * N if silu else N), -(-K // group)
    tiled = TensorSpec((E, rows // 64, groups, 64), "float16")
    specs = {
        "x": TensorSpec((entries, K), "bfloat16"),
        "weight": TensorSpec((E, rows, K // 16 * bits), "int16"),
    }
    specs |= {"weight_scale": tiled} | ({"weight_zero": TensorSpec(tiled.shape, zeros)} if zeros else {})
    specs |= {"order": TensorSpec((entries,), "int32"), "start": TensorSpec((E + 1,), "int32")}
    attrs = {"bits": bits, "group": group, "out_dtype": "", "top_k": 0}
    op = "grouped_silu_mul_int" if silu else "grouped_linear_int"
    dims = CONTRACTS[op].dims(specs, attrs)
    specs |= CONTRACTS[op].infer(specs, attrs)
    tensors = {
        name: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 256) for name, s in specs.items()
    }
    return OpCall(op, tensors, attrs, dims, entries // 8, entries // 8, features=HOPPER)


@pytest.mark.slow
@compiled
def test_experts_cross_compile_without_spilling():
    """One height of two forms; all of all forms where INT_COMPILE_ALL is set."""
    every = os.environ.get("INT_COMPILE_ALL")
    for form, silu in itertools.product(FORMS if every else FORMS[1:2], (True, False) if every else (True,)):
        found = {}
        for entries in (8, 128, 1024, 4096, 65536) if every else (128,):
            call = experts_call(entries, *form, silu)
            for way in experts_int_triton.tilings(call)[: None if every else 1]:
                found.setdefault(way.name, (call, way))
        for call, way in found.values():
            made = aot.compile_launch(experts_int_triton.emit(call, way).launches[0], call)
            assert made.spill_bytes == 0, (form, silu, way.name)
            assert made.waits
            assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, *\{", made.ptx), way.name
            assert made.shared <= call.shared_bytes // 2, way.name
