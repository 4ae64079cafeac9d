"""NVFP4: what its bits stand for, what wide weights become, and the Triton kernels that make it, without a GPU."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from case import Random
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from inputs import cases
from interpreted import INTERPRETED, aot, launch_interpreted, op_call
from mx_inputs import nv_weights
from nvfp4_inputs import awkward

from makeready.kernels import mx, nvfp4_triton, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm.linear_int_cpu import IntMatrix
from makeready.kernels.integers import unpack_words
from makeready.kernels.nvfp4 import LARGEST, LEAST, pairs

assert nvfp4_triton  # whose kernels are registered by now
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
MAKING = ("pair_scales", "check_global_scales", "make_global_scales", "quantize_nvfp4")


@compiled
@pytest.mark.slow
def test_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def e2m1(bits: int) -> float:
    """A sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, e, m = bits >> 3, bits >> 1 & 3, bits & 1
    return math.copysign(math.ldexp(1 + m / 2, e - 1) if e else m / 2, -1 if sign else 1)


def e4m3(bits: int) -> float:
    """Four bits of exponent with a bias of 7, three of mantissa; no sign."""
    e, m = bits >> 3, bits & 7
    return math.ldexp(8 + m, e - 10) if e else math.ldexp(m, -9)


@compiled
def test_all_numbers_under_all_scales_are_the_definitions() -> None:
    """Of row s the first block has scale s, the second the one that is as far from the last; global scales differ."""
    q = torch.arange(16).repeat(127, 2)
    words = CONTRACTS["repack_bytes"].reference((q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8), inputs=32)
    codes = torch.stack((torch.arange(127), 126 - torch.arange(127)), 1)
    scale, whole = pairs(codes.to(torch.uint8)), torch.exp2(torch.arange(127) % 7 - 3.0)
    ((_, _, native),) = IntMatrix(words, scale, None, mx.BITS, mx.BLOCK, 32, whole).parts()
    for made in (
        *(mx.values(words, scale, whole, inputs=32, dtype=d) for d in (torch.float64, torch.float32)),
        native,
    ):
        for s, row in enumerate(made.tolist()):
            own = [e4m3(s) * whole[s].item(), e4m3(126 - s) * whole[s].item()]
            assert row == [e2m1(bits) * own[block] for block in range(2) for bits in range(16)]


@compiled
def test_damaged_scales_make_their_outputs_nan() -> None:
    """Whatever the word is; all others are what they were."""
    bits = torch.tensor([[3, 126], [127, 5], [5, 0x81], [0x80, 7], [0xFF, 9]]).to(torch.uint8)
    given = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    check = CONTRACTS["check_global_scales"].reference
    scale = bits.view(torch.float8_e4m3fn)
    nan = float("nan")
    for divides, sound in ((False, [1.0, nan, nan, 4.0, nan]), (True, [1.0, nan, nan, 0.25, nan])):
        found = check(given, scale, divides=divides)
        torch.testing.assert_close(found, torch.tensor(sound), rtol=0, atol=0, equal_nan=True)
    words = CONTRACTS["repack_bytes"].reference(torch.full((5, 16), 0x22, dtype=torch.uint8), inputs=32)
    wide = mx.values(words, pairs(bits), check(given, scale, divides=False), inputs=32, dtype=torch.float32)
    assert wide.isnan().any(1).tolist() == [False, True, True, False, True]


@compiled
@pytest.mark.parametrize("inputs", [64, 45])
def test_wide_weights_become_the_nearest_numbers(inputs: int) -> None:
    """Number by number in float64: no other code is nearer than rounding in fp32 could make it seem."""
    x = torch.cat(
        (awkward()[:, :inputs], Random(3).normal(60, inputs) * 10.0 ** torch.arange(-20, 40, 1)[:, None])
    )
    whole = CONTRACTS["make_global_scales"].reference(x)
    words, scale = CONTRACTS["quantize_nvfp4"].reference(x, whole)
    found, own = unpack_words(words, 4, inputs), mx.scales_of(scale, len(x), torch.float64)
    every = [e4m3(bits) for bits in range(127)]
    numbers = [e2m1(bits) for bits in range(8)]
    for row, values in enumerate(x.double().tolist()):
        g, most = whole[row].item(), max(map(abs, values))
        if not all(map(math.isfinite, values)):
            assert math.isnan(g)
            continue
        assert g == pytest.approx(max(most / LARGEST, LEAST), rel=1e-7)
        for first in range(0, inputs, 16):
            block, s = values[first : first + 16], own[row, first // 16].item()
            wanted = max(map(abs, block)) / (6 * g)
            assert abs(s - wanted) <= min(abs(e - wanted) for e in every) + 1e-6 * wanted
            for i, value in enumerate(block):
                code = int(found[row, first + i])
                assert not value or code >> 3 == (value < 0)
                size = abs(value) / (s * g) if s else 0.0
                off = abs(numbers[code & 7] - size)
                assert off <= min(abs(n - size) for n in numbers) + 1e-6 * size
                if size in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):  # a tie
                    assert code % 2 == 0


@compiled
def test_ties_go_to_the_even_code() -> None:
    """A global scale and a block's scale of 1."""
    x = torch.tensor([[448.0 * 6] + [0.0] * 15 + [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] + [0.0] * 8])
    words, scale = CONTRACTS["quantize_nvfp4"].reference(x, torch.ones(1))
    assert mx.scales_of(scale, 1, torch.float32).tolist() == [[448.0, 1.0]]
    assert unpack_words(words, 4, 32)[0, 16:24].tolist() == [7, 0, 2, 2, 4, 4, 6, 6]


@compiled
def test_numbers_under_scales_are_those_of_compressed_tensors() -> None:
    """Both ways: what that library packs, and what it makes of what is packed here."""
    x = Random(4).normal(1, 1600)  # its global scale is that of a matrix
    whole = CONTRACTS["make_global_scales"].reference(x)
    words, scale = CONTRACTS["quantize_nvfp4"].reference(x, whole)
    own = mx.scales_of(scale, 1, torch.float32)
    packed = quantize_and_pack_fp4(x, own, global_scale=1 / whole, group_size=16)
    theirs = CONTRACTS["repack_bytes"].reference(packed, inputs=1600)
    numbers = mx.e2m1(unpack_words(words, 4, 1600), torch.float32)
    # They forget the sign of what becomes zero.
    assert mx.e2m1(unpack_words(theirs, 4, 1600), torch.float32).equal(numbers)
    # They widen in bf16: numbers alone are exact there.
    state = {
        "weight_packed": packed,
        "weight_scale": torch.ones_like(own).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    }
    widened = NVFP4PackedCompressor.decompress(state, preset_name_to_scheme("NVFP4A16", ["Linear"]))
    assert widened["weight"].float().equal(numbers)
    made = CONTRACTS["dequantize_mx"].reference(words, scale, whole, inputs=1600, out_dtype="float32")
    wanted = widened["weight"].double() * (own.double() * whole.double()).repeat_interleave(16, 1)
    torch.testing.assert_close(made.double(), wanted, rtol=2e-7, atol=0)


@interpreted
@pytest.mark.parametrize("op", MAKING)
def test_weights_are_made(op: str) -> None:
    for case in cases(op):
        (kernel,) = registry.cuda_kernels(op)
        call = op_call(op, case.operands, case.attrs, features=frozenset())
        for way in kernel.candidates(call):
            got = launch_interpreted(way, call, case.operands)
            for name, wanted in case.run().items():
                torch.testing.assert_close(got[name], wanted, rtol=0, atol=0, equal_nan=True, msg=case.label)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize(
    "features", [frozenset({"tma", "wgmma", "pdl", "fp8"}), frozenset()], ids=["sm_90", "sm_80"]
)
@pytest.mark.parametrize("op", MAKING)
def test_what_makes_weights_cross_compiles(op: str, features: frozenset[str]) -> None:
    """For GPUs without 8-bit floats as well: scales are moved there, and nothing is computed with them."""
    for case in itertools.islice(cases(op), 3):  # of every dtype
        call = op_call(op, case.operands, case.attrs, features=features)
        (kernel,) = registry.cuda_kernels(op)
        (candidate,) = kernel.candidates(call)
        made = aot.compile_launch(candidate.launches[0], call, 90 if features else 80)
        assert made.spill_bytes == 0, case.label
        assert made.waits == bool(features)


@compiled
def test_a_matrix_in_parts_is_the_whole_one() -> None:
    """Outputs that are widened from the middle of a tile on have their own global scales."""
    weights = nv_weights(Random(5), 1100, 160)
    names = ("weight", "weight_scale", "weight_global_scale")
    weight, scale, whole = (weights[name] for name in names)
    matrix = IntMatrix(weight, scale, None, mx.BITS, mx.BLOCK, 160, whole)
    wide = mx.values(weight, scale, whole, inputs=160, dtype=torch.float32)
    for first, stop, part in matrix.parts():
        torch.testing.assert_close(part, wide[first:stop], rtol=3e-7, atol=0)
