"""Quantization to 8-bit floats at Qwen3-8B's shapes on the present GPU, beside its floor.

The floor is every byte moved once at the device-copy rate; operands rotate, so that they come from memory. Each op
is held to its reference first, at CHECKED tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu import launcher, ops
from benchmarks.gpu.ops import Case, Tensors
from benchmarks.gpu.shapes import HIDDEN, INNER, VOCABULARY
from makeready.kernels.contract import CONTRACTS

for module in ("quantize", "norm_quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

TOKENS = (1, 16, 64, 256, 1024, 8192)
MATRICES = ((24576, HIDDEN), (4096, INNER), (VOCABULARY, HIDDEN))  # quantized while they are loaded
CHECKED = 64


def cases(device: str) -> Iterator[Case]:
    """Activations by tokens, then whole matrices."""
    for tokens in TOKENS:
        yield from _activations(tokens, device)
    for rows, width in MATRICES:
        nbytes, make = 3.0 * rows * width, _maker({"x": (rows, width)}, device)
        yield Case("quantize_fp8", f"{width} rows", rows, make, {"group": width}, nbytes)
        yield Case("quantize_fp8_block", f"{width} squares", rows, make, {"block": 128}, nbytes)


def measure(note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Check, then seconds of every way of every case; see :func:`benchmarks.gpu.ops.measure`."""
    torch.manual_seed(0)
    launcher.prepare(ops.calls(cases("meta")))
    for case in _activations(CHECKED, "cuda"):
        hold = hold_equal if case.op == "quantize_fp8" else hold_near
        hold(case.op, case.make(), case.attrs)
    hold_equal("quantize_fp8_block", _maker({"x": (CHECKED, HIDDEN)}, "cuda")(), {"block": 128})
    return ops.measure(cases("cuda"), note)


def _activations(tokens: int, device: str) -> Iterator[Case]:
    """By one scale a row, and by groups of 128."""
    hidden, inner = tokens * HIDDEN, tokens * INNER
    x, weight = (tokens, HIDDEN), (HIDDEN,)
    for group, label in ((0, "row"), (128, "128")):
        shapes: Sequence[tuple[str, dict[str, tuple[int, ...]], dict[str, Any], float]] = (
            ("quantize_fp8", {"x": x}, {}, 3.0 * hidden),
            ("rms_norm_quantize_fp8", {"x": x, "weight": weight}, {"eps": 1e-6}, 3.0 * hidden),
            (
                "add_rms_norm_quantize_fp8",
                {"x": x, "residual": x, "weight": weight},
                {"eps": 1e-6},
                7.0 * hidden,
            ),
            ("silu_mul_quantize_fp8", {"gate_up": (tokens, 2 * INNER)}, {}, 5.0 * inner),
        )
        for op, made, attrs, nbytes in shapes:
            whole = INNER if op.startswith("silu") else HIDDEN
            yield Case(op, label, tokens, _maker(made, device), {**attrs, "group": group or whole}, nbytes)


def _maker(shapes: Mapping[str, tuple[int, ...]], device: str) -> Callable[[], Tensors]:
    return lambda: {name: torch.randn(shape, device=device).bfloat16() for name, shape in shapes.items()}


def run_all(op: str, tensors: Tensors, attrs: Mapping[str, Any]) -> list[Tensors]:
    """Operands and results of every way, run once."""
    call = launcher.op_call(CONTRACTS[op], tensors, attrs)
    return [launcher.run(way, call, tensors) for way in ops.candidates(call)]


def hold_equal(op: str, tensors: Tensors, attrs: Mapping[str, Any]) -> None:
    """The fp32 reference's numbers, made on the CPU: the GPU divides by constants with a product."""
    contract = CONTRACTS[op]
    want = contract.reference(**{k: v.cpu() for k, v in tensors.items()}, **attrs)
    for got in run_all(op, tensors, attrs):
        for output, value in zip(contract.outputs, want, strict=True):
            differ = got[output.name].cpu().float() != value.float()
            assert not differ.any(), f"{op} {output.name}: {differ.sum()} of {differ.numel()} differ"


def hold_near(op: str, tensors: Tensors, attrs: Mapping[str, Any]) -> None:
    """Values and scales as a float64 reference has them, as far as one 8-bit rounding and a 16-bit one go."""
    contract = CONTRACTS[op]
    want = contract.reference(**{k: v.double() for k, v in tensors.items()}, **attrs)
    values = want[0].double().unflatten(-1, (want[1].shape[1], -1)) * want[1].double()[..., None]
    for got in run_all(op, tensors, attrs):
        own = got["q"].double().unflatten(-1, (want[1].shape[1], -1)) * got["scale"].double()[..., None]
        assert (own - values).norm() <= 4e-2 * values.norm()
        assert (got["scale"].double() - want[1].double()).norm() <= 6e-3 * want[1].double().norm()
        for output, value in list(zip(contract.outputs, want, strict=True))[2:]:
            error = (got[output.name].double() - value.double()).norm() / value.double().norm()
            assert error <= 5e-3, output.name
