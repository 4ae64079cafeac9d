"""Quantization to 8-bit floats at Qwen3-8B's shapes on the present GPU, beside its floor.

    python tests/gpu/bench_quantize_fp8.py

The floor is every byte moved once at the device-copy rate; operands rotate, so that they come from memory.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import launcher

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS

for module in ("quantize", "norm_quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

BANDWIDTH = 3.0e12  # bytes/s of a device copy, read and written, on an H100
ROTATED = 150e6  # bytes that calls rotate over; L2 has 50 MiB
HIDDEN, INNER = 4096, 12288
TOKENS = (1, 16, 64, 256, 1024, 8192)

Case = tuple[str, str, dict[str, tuple[int, ...]], dict[str, Any], float]


def _cases(tokens: int) -> list[Case]:
    """Op, label, shapes of operands (bf16), attributes, bytes moved."""
    hidden, inner = tokens * HIDDEN, tokens * INNER
    x, weight = (tokens, HIDDEN), (HIDDEN,)
    made: list[Case] = []
    for group, label in ((0, "row"), (128, "128")):
        attrs = {"eps": 1e-6, "group": group or HIDDEN}
        made += [
            ("quantize_fp8", label, {"x": x}, {"group": group or HIDDEN}, 3 * hidden),
            ("rms_norm_quantize_fp8", label, {"x": x, "weight": weight}, attrs, 3 * hidden),
            (
                "add_rms_norm_quantize_fp8",
                label,
                {"x": x, "residual": x, "weight": weight},
                attrs,
                7 * hidden,
            ),
            (
                "silu_mul_quantize_fp8",
                label,
                {"gate_up": (tokens, 2 * INNER)},
                {"group": group or INNER},
                5 * inner,
            ),
        ]
    return made


def _weights() -> list[Case]:
    """Loading: whole matrices."""
    made: list[Case] = []
    for rows, width in ((24576, HIDDEN), (4096, INNER), (151936, HIDDEN)):
        shape, nbytes = {"x": (rows, width)}, 3.0 * rows * width
        made.append(("quantize_fp8", f"{width} rows", shape, {"group": width}, nbytes))
        made.append(("quantize_fp8_block", f"{width} squares", shape, {"block": 128}, nbytes))
    return made


def _measure(case: Case, size: int) -> None:
    op, label, shapes, attrs, nbytes = case
    copies = max(2, min(16, round(ROTATED / nbytes + 0.5)))
    sets = [
        {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
        for _ in range(copies)
    ]
    call = launcher.op_call(CONTRACTS[op], sets[0], attrs)
    for kernel in registry.cuda_kernels(op):
        for way in kernel.candidates(call):
            took = launcher.time(way, call, sets, reps=20 if nbytes < 1e9 else 2)
            rate = nbytes / took / 1e12
            print(
                f"{op + ' ' + label:40} {size:6} {took * 1e6:9.2f} {rate:6.2f} "
                f"{nbytes / BANDWIDTH / took:6.2f}  {way.name}",
                flush=True,
            )


def bench() -> None:
    """Print µs, TB/s and the share of the floor of every op and size."""
    torch.manual_seed(0)
    print(f"{'op':40} {'rows':>6} {'us':>9} {'TB/s':>6} {'floor':>6}")
    for tokens in TOKENS:
        for case in _cases(tokens):
            _measure(case, tokens)
    for case in _weights():
        _measure(case, case[2]["x"][0])


if __name__ == "__main__":
    bench()
