"""Triton kernels of weights of 4 and 8 bits without a GPU: interpreted against the references, and cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from inputs import cases
from test_small_triton import INTERPRETED, aot, check_interpreted, op_call

from makeready.kernels import integers_triton, registry

assert integers_triton

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

LOADS = (
    "repack_rows",
    "repack_awq",
    "unpack_zeros",
    "tile_scales",
    "order_of_groups",
    "quantize_int",
    "gather_columns",
)
HOPPER = frozenset({"tma", "wgmma", "pdl"})


@compiled
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
