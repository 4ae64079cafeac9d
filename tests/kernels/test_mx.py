"""MXFP4: what its bits stand for, and its Triton kernels without a GPU, interpreted and cross-compiled."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from case import Random
from inputs import cases
from test_small_triton import INTERPRETED, aot, launch_interpreted, op_call

from makeready.kernels import integers_triton, mx, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import OpCall, Tensor
from makeready.kernels.gemm.linear_int_cpu import IntMatrix
from makeready.kernels.integers import tiles
from makeready.kernels.moe import experts_int_triton
from makeready.kernels.spec import TensorSpec

assert integers_triton  # whose kernels are registered by now
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
HOPPER = frozenset({"tma", "wgmma", "pdl", "fp8"})
OPS = ("grouped_linear_mx", "grouped_clamped_swiglu_mx")


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


@interpreted
@pytest.mark.parametrize("op", ["repack_bytes", "tile_scales"])
def test_weights_are_made(op: str) -> None:
    for case in cases(op):
        (kernel,) = registry.cuda_kernels(op)
        for way in kernel.candidates(op_call(op, case.operands, case.attrs, features=frozenset())):
            got = launch_interpreted(
                way, op_call(op, case.operands, case.attrs, features=frozenset()), case.operands
            )
            for name, wanted in case.run().items():
                assert got[name].equal(wanted), case.label


@interpreted
@pytest.mark.parametrize("op", OPS)
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


def gpt_oss_call(
    entries: int, gated: bool, dtype: str = "bfloat16", features: frozenset[str] = HOPPER
) -> OpCall:
    """A product of gpt-oss-20b: no whole spans of inputs, no whole tiles of 128 outputs."""
    rows = 5760 if gated else 2880
    specs = {
        "x": TensorSpec((entries // 4 if gated else entries, 2880), dtype),
        "weight": TensorSpec((32, rows, 23 * 32), "int16"),
        "weight_scale": TensorSpec((32, rows // 64, 90, 64), "uint8"),
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


@compiled
def test_experts_cross_compile_without_spilling() -> None:
    """The first choice for few tokens; all where MX_COMPILE_ALL is set."""
    every = bool(os.environ.get("MX_COMPILE_ALL"))
    for gated, entries in itertools.product(
        (True, False)[: 2 if every else 1], (4, 64, 1024, 32768) if every else (64,)
    ):
        found = {}
        call = gpt_oss_call(entries, gated)
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
