"""4-bit floats: what MXFP4's bits stand for, and Triton kernels without a GPU, interpreted and cross-compiled.

NVFP4's own are in test_nvfp4.py.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from case import Random, in_columns
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from inputs import cases
from interpreted import INTERPRETED, aot, launch_interpreted, op_call
from mx_inputs import WEIGHTS, awkward
from test_fp8_triton import launch

from makeready.kernels import integers_triton, mx, mx_triton, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Tensor
from makeready.kernels.gemm import linear_int_tiling, linear_int_triton
from makeready.kernels.gemm.linear_int_cpu import IntMatrix
from makeready.kernels.integers import by_output, tiles, unpack_words
from makeready.kernels.moe import experts_int_triton
from makeready.kernels.spec import TensorSpec

assert integers_triton, mx_triton  # whose kernels are registered by now
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
HOPPER = frozenset({"tma", "wgmma", "pdl", "fp8"})
OPS = ("grouped_linear_mx", "grouped_clamped_swiglu_mx")
EXPERTS = (*OPS, "grouped_silu_mul_mx")


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def by_definition(bits: int, exponent: int) -> float:
    """One number, section 5.3.3 of the specification with the scale of 5.4.1."""
    sign, e, m = bits >> 3, bits >> 1 & 3, bits & 1
    size = math.ldexp(1 + m / 2, e - 1) if e else m / 2
    return math.nan if exponent == 255 else math.copysign(math.ldexp(size, exponent - 127), -1 if sign else 1)


@compiled
def test_all_numbers_under_all_scales_are_the_definitions() -> None:
    q = torch.arange(16).repeat(256, 2)  # of row s the scale is s
    words = CONTRACTS["repack_bytes"].reference((q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8), inputs=32)
    scale = tiles(torch.arange(256).to(torch.uint8)[:, None])
    ((_, _, compiled),) = IntMatrix(words, scale, None, mx.BITS, mx.BLOCK, 32).parts()
    for made in (
        *(mx.values(words, scale, inputs=32, dtype=d) for d in (torch.float64, torch.float32)),
        compiled,
    ):
        wanted = [[by_definition(bits, s) for bits in range(16)] * 2 for s in range(256)]
        torch.testing.assert_close(
            made, torch.tensor(wanted, dtype=torch.float64).to(made.dtype), rtol=0, atol=0, equal_nan=True
        )


@compiled
def test_blocks_of_files_are_what_transformers_makes_of_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = Random(1)
    blocks = random.integers(256, 3, 70, 5, 16).to(torch.uint8)
    scales = (random.integers(40, 3, 70, 5) + 100).to(torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    for e in range(3):
        words = CONTRACTS["repack_bytes"].reference(blocks[e].flatten(1), inputs=160)
        assert mx.values(words, tiles(scales[e]), inputs=160, dtype=torch.float32).equal(theirs[e])


def nearest(x: float, exponent: int) -> int:
    """The number of 4 bits that is nearest to ``x`` under a scale, the even one of two; its sign is that of ``x``."""
    most = min(range(8), key=lambda bits: (abs(abs(x) - by_definition(bits, exponent)), bits % 2))
    return most | (8 if math.copysign(1, x) < 0 else 0)


@compiled
@pytest.mark.parametrize("inputs", [64, 45])
def test_wide_weights_become_the_nearest_numbers(inputs: int) -> None:
    """Section 6.3 of the specification, number by number: under every scale, ties, zeros, what is not finite."""
    random = Random(3)
    x = random.normal(300, inputs) * (2.0 ** (random.integers(254, 300, 1) - 126).float())
    x[:5] = awkward()[:, :inputs]
    words, scale = CONTRACTS["quantize_mx"].reference(x)
    found, own = unpack_words(words, 4, inputs), by_output(scale, 300)
    for row, numbers in enumerate(x.tolist()):
        for first in range(0, inputs, 32):
            block, made = numbers[first : first + 32], found[row, first : first + 32].tolist()
            most, exponent = max(map(abs, block)), int(own[row, first // 32])
            if not all(map(math.isfinite, block)):
                assert exponent == 255
                continue
            wanted = math.floor(math.log2(most)) - 2 + 127 if most else 0
            assert exponent == min(max(wanted, 0), 254)
            assert made == [nearest(number, exponent) for number in block]


@compiled
def test_numbers_under_scales_are_those_of_compressed_tensors() -> None:
    """Both ways: what that library packs, and what it makes of what is packed here."""
    x = Random(4).normal(70, 160)
    words, scale = CONTRACTS["quantize_mx"].reference(x)
    own = by_output(scale, 70)
    wide = torch.exp2(own.float() - 127)
    packed = quantize_and_pack_fp4(x, wide, group_size=32)
    theirs = CONTRACTS["repack_bytes"].reference(packed, inputs=160)
    numbers = mx.e2m1(unpack_words(words, 4, 160), torch.float32)
    # They forget the sign of what becomes zero.
    assert mx.e2m1(unpack_words(theirs, 4, 160), torch.float32).equal(numbers)
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    state = {"weight_packed": packed, "weight_scale": own}
    widened = MXFP4PackedCompressor.decompress(state, scheme)["weight"].float()
    made = CONTRACTS["dequantize_mx"].reference(words, scale, inputs=160, out_dtype="float32")
    assert widened.equal(made)


@interpreted
@pytest.mark.parametrize("op", ["repack_bytes", "tile_scales", "quantize_mx", "dequantize_mx"])
def test_weights_are_made(op: str) -> None:
    for case in cases(op):
        if op == "dequantize_mx" and "bfloat16" in case.label:  # the interpreter rounds it otherwise
            continue
        (kernel,) = registry.cuda_kernels(op)
        for way in kernel.candidates(op_call(op, case.operands, case.attrs, features=frozenset())):
            got = launch_interpreted(
                way, op_call(op, case.operands, case.attrs, features=frozenset()), case.operands
            )
            for name, wanted in case.run().items():
                assert got[name].equal(wanted), case.label


@interpreted
@pytest.mark.parametrize("op", EXPERTS)
def test_experts(op: str) -> None:
    """Every height of tiles, and experts of nobody, whose scales are NaN."""
    for case in itertools.islice(cases(op), 0, None, 11):
        operands = {k: v.half() if k in ("x", "bias") else v for k, v in case.operands.items()}
        attrs = {**CONTRACTS[op].attrs, **case.attrs, "out_dtype": "float32"}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
        arguments = [wide.get(o.name) for o in CONTRACTS[op].inputs]
        want = CONTRACTS[op].reference(*arguments, **attrs | {"out_dtype": "float64"})
        call = op_call(op, operands, attrs, features=frozenset({"wgmma"}), multiprocessors=3)
        heights = {way.t: way for way in experts_int_triton.tilings(call)}
        for way in heights.values():
            got = launch_interpreted(experts_int_triton.emit(call, way), call, operands)["y"]
            error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
            assert error <= 2e-3, (case.label, way.name, error)


@interpreted
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_dense_products(kind: torch.dtype, form: str) -> None:
    """Every kernel that pointers can feed, blocks so many that tiles are shared; what lies beside x is NaN."""
    sharers = set()
    for T, N, K, bias in ((1, 131, 96, False), (17, 70, 1160, True), (34, 65, 320, False), (3, 64, 7, True)):
        random, tried = Random(T * N), set()
        operands = {
            "x": in_columns(random.normal(T, K, dtype="float32").to(kind)),
            **WEIGHTS[form](random, N, K),
        }
        operands |= {"bias": random.normal(N, dtype="float32").to(kind)} if bias else {}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
        want = CONTRACTS["linear_mx"].reference(**wide, out_dtype="float64")
        for multiprocessors in (2, 40):
            call = op_call(
                "linear_mx", operands, {"out_dtype": "float32"}, features=frozenset({"wgmma"}),
                multiprocessors=multiprocessors,
            )  # fmt: skip
            product = linear_int_triton.describe(call)
            for way in linear_int_tiling.tilings(product):
                key = (way.t, way.n, min(way.sharers(product), 3))
                if key in tried:
                    continue
                tried.add(key)
                sharers.add(way.sharers(product))
                got = launch(linear_int_triton.emit(call, way, product), call, operands)["y"]
                error = (got.double() - want).norm() / want.norm()
                assert error <= 5e-4, (way.name, error)
    assert {1, 2} <= sharers


def scales(form: str, stacked: tuple[int, ...], outputs: int, inputs: int) -> dict[str, TensorSpec]:
    """Scales of a matrix, or of several."""
    tiled = (*stacked, -(-outputs // 64), -(-inputs // 32), 64)
    found = {"weight_scale": TensorSpec(tiled, "uint8" if form == "mxfp4" else "int16")}
    whole = {"weight_global_scale": TensorSpec((*stacked, outputs), "float32")}
    return found if form == "mxfp4" else found | whole


def dense_call(T: int, N: int, K: int, dtype: str = "bfloat16", form: str = "mxfp4") -> OpCall:
    specs = {
        "x": TensorSpec((T, K), dtype),
        "weight": TensorSpec((N, -(-K // 128) * 32), "int16"),
        **scales(form, (), N, K),
    }
    attrs = {"out_dtype": ""}
    dims = CONTRACTS["linear_mx"].dims(specs, attrs)
    specs |= CONTRACTS["linear_mx"].infer(specs, attrs)
    tensors = {
        name: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 256, spare=name in ("x", "weight"))
        for name, s in specs.items()
    }
    return OpCall("linear_mx", tensors, attrs, dims, T, T, features=HOPPER)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("form", WEIGHTS)
def test_dense_products_cross_compile_without_spilling(form: str) -> None:
    """The first choice for few and for many rows; all that Qwen3-8B's shapes ask for where MX_COMPILE_ALL is set."""
    every, found = bool(os.environ.get("MX_COMPILE_ALL")), {}
    for T in (1, 16, 24, 33, 64, 96, 200, 256, 1000, 8192) if every else (16, 8192):
        for N, K in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))[: None if every else 1]:
            call = dense_call(T, N, K, form=form)
            product = linear_int_triton.describe(call)
            for way in linear_int_tiling.tilings(product)[: None if every else 1]:
                key = (way.kind, way.t, way.n, way.warps, way.stages, way.sharers(product) > 1)
                found.setdefault(key, (call, way, product))
    assert {kind for kind, *_ in found} == {"stream", "persistent"}
    for call, way, product in found.values():
        made = aot.compile_launch(linear_int_triton.emit(call, way, product).launches[0], call)
        assert made.spill_bytes == 0, way.name
        assert made.waits
        assert made.shared <= way.shared(product), (way.name, made.shared)
        assert "fma.rn.bf16x2" in made.ptx
        assert "cp.async.bulk.tensor" in made.ptx
        # Widened weights stay in registers.
        assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, *\{", made.ptx), way.name
        assert way.a_sm * (made.shared + 1024) <= 233472, way.name
        assert way.a_sm * 32 * made.warps * -(-made.registers // 8) * 8 <= 65536, (way.name, made.registers)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("op", ["quantize_mx", "dequantize_mx"])
def test_what_makes_weights_cross_compiles(op: str) -> None:
    case = next(iter(cases(op)))
    call = op_call(op, case.operands, case.attrs, features=HOPPER)
    for kernel in registry.cuda_kernels(op):
        (candidate,) = kernel.candidates(call)
        made = aot.compile_launch(candidate.launches[0], call)
        assert made.spill_bytes == 0
        assert made.waits


def gpt_oss_call(
    entries: int, gated: bool, dtype: str = "bfloat16", features: frozenset[str] = HOPPER, form: str = "mxfp4"
) -> OpCall:
    """A product of gpt-oss-20b: no whole spans of inputs, no whole tiles of 128 outputs."""
    rows = 5760 if gated else 2880
    specs = {
        "x": TensorSpec((entries // 4 if gated else entries, 2880), dtype),
        "weight": TensorSpec((32, rows, 23 * 32), "int16"),
        **scales(form, (32,), rows, 2880),
        "order": TensorSpec((entries,), "int32"),
        "start": TensorSpec((33,), "int32"),
        "bias": TensorSpec((32, rows), dtype),
    }
    attrs = {"out_dtype": "", "top_k": 4 if gated else 0} | ({"alpha": 1.702, "limit": 7.0} if gated else {})
    op = OPS[gated]
    dims = CONTRACTS[op].dims(specs, attrs)
    specs |= CONTRACTS[op].infer(specs, attrs)
    tensors = {
        name: Tensor(s.shape, s.dtype, math.prod(map(int, s.shape[1:])), 256) for name, s in specs.items()
    }
    return OpCall(op, tensors, attrs, dims, entries // 4, entries // 4, features=features)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("form", WEIGHTS)
def test_the_gate_of_other_experts_cross_compiles_without_spilling(form: str) -> None:
    """The first choice for 64 entries, or for all numbers of them where MX_COMPILE_ALL is set; no biases."""
    for entries in (4, 64, 1024, 32768) if os.environ.get("MX_COMPILE_ALL") else (64,):
        made = gpt_oss_call(entries, gated=True, form=form)
        tensors = {name: tensor for name, tensor in made.tensors.items() if name != "bias"}
        attrs = {name: made.attrs[name] for name in ("out_dtype", "top_k")}
        call = replace(made, op="grouped_silu_mul_mx", tensors=tensors, attrs=attrs)
        launched = experts_int_triton.emit(call, experts_int_triton.tilings(call)[0]).launches[0]
        compiled = aot.compile_launch(launched, call)
        assert compiled.spill_bytes == 0
        assert compiled.waits
        assert launched.constants["GATE"] == "silu_mul"


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("form", WEIGHTS)
def test_experts_cross_compile_without_spilling(form: str) -> None:
    """The first choice for few tokens; all where MX_COMPILE_ALL is set."""
    every = bool(os.environ.get("MX_COMPILE_ALL"))
    for gated, entries in itertools.product(
        (True, False)[: 2 if every else 1], (4, 64, 1024, 32768) if every else (64,)
    ):
        found = {}
        call = gpt_oss_call(entries, gated, form=form)
        for way in experts_int_triton.tilings(call)[: None if every else 1]:
            found.setdefault(way.name, way)
        for way in found.values():
            made = aot.compile_launch(experts_int_triton.emit(call, way).launches[0], call)
            assert made.spill_bytes == 0, (gated, way.name)
            assert made.waits
            assert "fma.rn.bf16x2" in made.ptx
            # Widened weights stay in registers.
            assert re.search(r"wgmma\.mma_async\S* \{[^}]*\}, *\{", made.ptx), way.name
            assert made.shared <= call.shared_bytes // 2, way.name
