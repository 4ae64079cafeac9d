"""8-bit projections and quantization on the GPU against float64, over awkward and over real shapes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import launcher
from bench_gemm_fp8 import MATRICES, contract_of, operands, shapes

from makeready.kernels import norm, quantize, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear_fp8_tiling import tilings
from makeready.kernels.gemm.linear_fp8_triton import candidates, describe

for module in ("quantize", "norm_quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

BOTH = (False, True)  # scales of rows, of groups
ROWS = (1, 2, 7, 16, 17, 33, 64, 65, 128, 129, 200, 256, 257, 512, 1000)
EVERY = (16, 200, 257)  # rows at which all ways are tried
ODD = ((131, 96), (96, 130), (8, 16), (1, 64), (200, 528), (64, 100))
GROUPED_ODD = ((131, 128), (96, 256), (8, 128), (200, 640))
# What tensor cores add up keeps about 13 fraction bits; bf16 results keep 8.
ALLOWED = {False: {"float32": 4e-3, "bfloat16": 5e-3}, True: {"float32": 1e-3, "bfloat16": 3e-3}}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A product to hold to float64; all its ways or the planner's first."""

    T: int
    N: int
    K: int
    grouped: bool
    every: bool
    bias: bool = False
    spare: bool = False
    out: str = "bfloat16"

    def call(self, tensors: Tensors) -> OpCall:
        attrs = {"out_dtype": self.out, **({"block": 128} if self.grouped else {})}
        return launcher.op_call(contract_of(self.grouped), tensors, attrs, spare=self.spare)

    def ways(self, call: OpCall) -> list[Candidate]:
        return candidates(call)[: None if self.every else 1]


def _real() -> Iterator[Case]:
    for grouped, (name, (N, K)), T in product(BOTH, MATRICES.items(), ROWS):
        every = T in EVERY and name in ("o", "down")
        yield Case(T, N, K, grouped, every, spare=True)
    for grouped, T in product(BOTH, (1, 17, 129, 300)):  # rows that maps may not reach are zeros
        yield Case(T, 4096, 4096, grouped, every=False)


def _odd() -> Iterator[Case]:
    for grouped, T in product(BOTH, (1, 3, 17, 130)):
        for N, K in GROUPED_ODD if grouped else ODD:
            yield Case(T, N, K, grouped, every=True, bias=True)
            yield Case(T, N, K, grouped, every=False, bias=True, out="float32")
    for grouped, T in product(BOTH, (5, 300, 2048)):
        yield Case(T, 1536, 2048, grouped, every=False, bias=True)


def _padded() -> Iterator[Case]:
    yield from (Case(130, 4096, 4096, grouped, every=True, spare=True) for grouped in BOTH)


def _hold(case: Case, tensors: Tensors) -> None:
    """Hold the ways to the float64 product; and to themselves, run twice."""
    call = case.call(tensors)
    attrs = {**call.attrs, "out_dtype": "float64"}
    want = contract_of(case.grouped).reference(**{k: v.double() for k, v in tensors.items()}, **attrs)
    allowed = ALLOWED[case.grouped][case.out]
    fitting = [way for way in case.ways(call) if launcher.fits(way, call)]
    assert fitting, case
    for way in fitting:
        first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
        assert torch.equal(first, second), f"{way.name} differs between two runs"
        error = ((first.double() - want).norm() / want.norm()).item()
        assert error <= allowed, f"{way.name} of {case} is off by {error:.1e}"


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All projections of this file at once, on all cores."""
    work = []
    for case in (*_real(), *_odd(), *_padded()):
        call = case.call(shapes(case.T, case.N, case.K, case.grouped, bias=case.bias))
        work.append((call, case.ways(call)))
    launcher.prepare(work)


def test_matrices_of_a_real_model():
    for case in _real():
        _hold(case, operands(case.T, case.N, case.K, case.grouped, spare=case.spare))


def test_odd_sizes_with_bias():
    for case in _odd():
        _hold(case, operands(case.T, case.N, case.K, case.grouped, bias=True))


def test_padding_leaves_nothing_behind():
    """NaN in rows past T, of operands and of scales, never reaches a result."""
    for case in _padded():
        tensors = operands(case.T, case.N, case.K, case.grouped, spare=True)
        long = torch.full((400, tensors["x_scale"].shape[1]), float("nan"), device="cuda")
        long[: case.T] = tensors["x_scale"]
        _hold(case, {**tensors, "x_scale": long[: case.T]})


def test_launches_that_start_early_wait_for_each_other():
    """Quantize, multiply, eight times over, each reading the last one's result, over one scratch."""
    tensors = operands(16, 4096, 4096, False)
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    fixed = {k: tensors[k] for k in ("weight", "weight_scale")}
    first = launcher.op_call(quantize.quantize_fp8, {"x": x}, {"group": 4096})
    (make,) = registry.cuda_kernels("quantize_fp8")[0].candidates(first)
    call = Case(16, 4096, 4096, False, every=True).call(tensors)
    size = describe(call)
    shared = [w for w, t in zip(candidates(call), tilings(size), strict=True) if t.sharers(size) > 1]
    for way in shared[:3]:
        want = x
        for _ in range(8):
            made = launcher.run(make, first, {"x": want})
            step = {**fixed, "x": made["q"], "x_scale": made["scale"]}
            want = launcher.run(way, call, step)["y"]
        xs = [x, *(torch.empty_like(x) for _ in range(8))]
        q = torch.empty_like(tensors["x"])
        scale = torch.empty_like(tensors["x_scale"])
        scratch = launcher.new_scratch(way)
        stream = torch.cuda.current_stream()
        for _ in range(5):
            for before, after in pairwise(xs):
                launcher._launch_all(make, first, {"x": before, "q": q, "scale": scale}, scratch, stream)
                step = {**fixed, "x": q, "x_scale": scale, "y": after}
                launcher._launch_all(way, call, step, scratch, stream)
            torch.cuda.synchronize()
            assert torch.equal(xs[-1], want), way.name


SHAPES = [(1, 128), (3, 384), (8, 640), (1, 4096), (64, 4096), (256, 12288), (2050, 1024), (1100, 4096)]


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def _columns(x: torch.Tensor, margin: int = 16) -> torch.Tensor:
    """``x`` as columns of a wider tensor, NaN elsewhere."""
    wide = torch.full((x.shape[0], x.shape[1] + margin), float("nan"), dtype=x.dtype, device="cuda")
    return wide[:, margin // 2 : margin // 2 + x.shape[1]].copy_(x)


def _run_all(op: str, tensors: Tensors, **attrs: object) -> list[Tensors]:
    call = launcher.op_call(CONTRACTS[op], tensors, attrs)
    ways = [way for kernel in registry.cuda_kernels(op) for way in kernel.candidates(call)]
    assert ways
    return [launcher.run(way, call, tensors) for way in ways]


def _equal(op: str, tensors: Tensors, **attrs: object) -> None:
    """The fp32 reference's numbers, made on the CPU: the GPU divides by constants with a product."""
    contract = CONTRACTS[op]
    want = contract.reference(**{k: v.cpu() for k, v in tensors.items()}, **attrs)
    for got in _run_all(op, tensors, **attrs):
        for output, value in zip(contract.outputs, want, strict=True):
            differ = got[output.name].cpu().float() != value.float()
            assert not differ.any(), f"{op} {output.name}: {differ.sum()} of {differ.numel()} differ"


def _near(op: str, tensors: Tensors, **attrs: object) -> None:
    """Values and scales as a float64 reference has them, as far as one 8-bit rounding and a 16-bit one go."""
    contract = CONTRACTS[op]
    want = contract.reference(**{k: v.double() for k, v in tensors.items()}, **attrs)
    values = want[0].double().unflatten(-1, (want[1].shape[1], -1)) * want[1].double()[..., None]
    for got in _run_all(op, tensors, **attrs):
        own = got["q"].double().unflatten(-1, (want[1].shape[1], -1)) * got["scale"].double()[..., None]
        assert (own - values).norm() <= 4e-2 * values.norm()
        assert (got["scale"].double() - want[1].double()).norm() <= 6e-3 * want[1].double().norm()
        for output, value in list(zip(contract.outputs, want, strict=True))[2:]:
            error = (got[output.name].double() - value.double()).norm() / value.double().norm()
            assert error <= 5e-3, output.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_quantization_gives_the_bytes_of_the_reference(tokens: int, width: int, dtype: torch.dtype):
    torch.manual_seed(tokens)
    x = _columns(_random(tokens, width, dtype=dtype))
    x[0] = 0
    for group in (width, 128):
        _equal("quantize_fp8", {"x": x}, group=group)
    _equal("quantize_fp8_static", {"x": x, "scale": torch.tensor([0.004], device="cuda")})
    _equal("quantize_fp8_block", {"x": x}, block=128)
    _equal("quantize_fp8_block", {"x": x[:, : width - 37]}, block=128)


def test_rounding_of_every_bf16_number():
    """All finite bf16 numbers by the scale of the largest of each row: ties and subnormals included."""
    bits = torch.arange(65536, device="cuda", dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()][: 65024 // 128 * 128].reshape(-1, 128)
    _equal("quantize_fp8", {"x": x}, group=128)
    for scale in (1.0, 0.75, 3.0):
        _equal("quantize_fp8_static", {"x": x, "scale": torch.tensor([scale], device="cuda")})


def test_weights_of_a_vocabulary():
    """Its first and last rows."""
    x = _random(152064, 4096, dtype=torch.bfloat16)
    for op, attrs, a_scale in (
        ("quantize_fp8", {"group": 4096}, 1),
        ("quantize_fp8_block", {"block": 128}, 128),
    ):
        (made,) = _run_all(op, {"x": x}, **attrs)
        for start in (0, 152064 - 256):
            q, scale = CONTRACTS[op].reference(x[start : start + 256].cpu(), **attrs)
            assert torch.equal(made["q"][start : start + 256].cpu().float(), q.float())
            few = made["scale"][start // a_scale : (start + 256) // a_scale]
            assert torch.equal(few.cpu(), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_fused_ops(tokens: int, width: int, dtype: torch.dtype):
    torch.manual_seed(tokens)
    x, weight = _columns(_random(tokens, width, dtype=dtype, scale=3)), _random(width, dtype=dtype)
    residual = _random(tokens, width, dtype=dtype)
    for group in (width, 128):
        _near("rms_norm_quantize_fp8", {"x": x, "weight": weight}, eps=1e-6, group=group)
        tensors = {"x": x, "residual": residual, "weight": weight.float()}
        _near("add_rms_norm_quantize_fp8", tensors, eps=1e-5, group=group)
        half = {"gate_up": _columns(_random(tokens, 2 * width, dtype=dtype, scale=2))}
        _near("silu_mul_quantize_fp8", half, group=group)


def test_fused_norm_is_the_two_ops_in_a_row():
    """The norm's kernel and quantization's, one after the other, give nearly all the same bytes."""
    importlib.import_module("makeready.kernels.norm_triton")
    x, weight = _random(300, 4096, dtype=torch.bfloat16), _random(4096, dtype=torch.bfloat16)
    (y,) = (made["y"] for made in _run_all(norm.rms_norm.name, {"x": x, "weight": weight}, eps=1e-6))
    (apart,) = _run_all("quantize_fp8", {"x": y}, group=4096)
    (fused,) = _run_all("rms_norm_quantize_fp8", {"x": x, "weight": weight}, eps=1e-6, group=4096)
    differ = (apart["q"].view(torch.uint8) != fused["q"].view(torch.uint8)).float().mean().item()
    assert differ < 1e-3
