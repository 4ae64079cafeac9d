"""Projections of 8-bit floats and integers, and quantization, on the GPU against float64: awkward and real shapes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from benchmarks.gpu.gemm_fp8 import GROUPS_SCALED, KINDS, attributes, contract_of, operands, shapes
from benchmarks.gpu.ops import candidates as all_ways
from benchmarks.gpu.quantize_fp8 import hold_equal, hold_near, run_all
from benchmarks.gpu.shapes import MATRICES
from prepared import prepare

from makeready.kernels import norm, registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear_fp8_tiling import tilings
from makeready.kernels.gemm.linear_fp8_triton import candidates, describe

for module in ("norm", "quantize", "norm_quantize"):
    importlib.import_module(f"makeready.kernels.{module}_triton")

ROWS = (1, 17, 33, 65, 128, 257, 1000)
EVERY = (17, 200)  # rows at which all ways are tried
ODD = ((131, 96), (8, 16), (1, 64), (200, 528), (64, 100))
GROUPED_ODD = ((131, 128), (8, 256), (200, 1280))
# What tensor cores add up of floats keeps about 13 fraction bits, of integers all; bf16 results keep 8.
ALLOWED = {
    "rows": {"float32": 4e-3, "bfloat16": 5e-3},
    "groups": {"float32": 1e-3, "bfloat16": 3e-3},
    "integers": {"float32": 1e-6, "bfloat16": 3e-3},
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A product to hold to float64; all its ways or the planner's first."""

    T: int
    N: int
    K: int
    kind: str
    every: bool
    bias: bool = False
    spare: bool = False
    out: str = "bfloat16"

    def call(self, tensors: Tensors) -> OpCall:
        attrs = {**attributes(self.kind), "out_dtype": self.out}
        return launcher.op_call(contract_of(self.kind), tensors, attrs, spare=self.spare)

    def ways(self, call: OpCall) -> list[Candidate]:
        return candidates(call)[: None if self.every else 1]


def _real() -> Iterator[Case]:
    for kind, (N, K), T in product(KINDS, MATRICES.values(), ROWS):
        yield Case(T, N, K, kind, every=False, spare=True)
    for kind, T in product(KINDS, EVERY):
        yield Case(T, *MATRICES["down"], kind, every=True, spare=True)
    for kind, T in product(KINDS, (17, 129)):  # rows that maps may not reach are zeros
        yield Case(T, 4096, 4096, kind, every=False)


def _odd() -> Iterator[Case]:
    for kind, T in product(KINDS, (1, 17, 130)):
        for N, K in GROUPED_ODD if kind == GROUPS_SCALED else ODD:
            yield Case(T, N, K, kind, every=True, bias=True)
        yield Case(T, 131, 256, kind, every=False, bias=True, out="float32")
    for kind, T in product(KINDS, (300, 2048)):
        yield Case(T, 1536, 2048, kind, every=False, bias=True)


def _padded() -> Iterator[Case]:
    yield from (Case(130, 4096, 4096, kind, every=True, spare=True) for kind in KINDS)


def _hold(case: Case, tensors: Tensors) -> None:
    """Hold the ways to the float64 product; and to themselves, run twice."""
    call = case.call(tensors)
    attrs = {**call.attrs, "out_dtype": "float64"}
    want = contract_of(case.kind).reference(**{k: v.double() for k, v in tensors.items()}, **attrs)
    allowed = ALLOWED[case.kind][case.out]
    for way in case.ways(call):
        assert launcher.fits(way, call), f"{way.name} spills, or wants more shared memory than there is"
        first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
        assert torch.equal(first, second), f"{way.name} differs between two runs"
        error = ((first.double() - want).norm() / want.norm()).item()
        assert error <= allowed, f"{way.name} of {case} is off by {error:.1e}"


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file at once, on all cores."""
    work = []
    for case in (*_real(), *_odd(), *_padded()):
        call = case.call(shapes(case.T, case.N, case.K, case.kind, bias=case.bias))
        work.append((call, case.ways(call)))
    others = (*_vocabulary("meta"), *_apart("meta"), *_bf16_numbers("meta"))
    for op, tensors, attrs in (
        *others,
        *(c for s in SHAPES for c in (*_plain(*s, "meta"), *_fused(*s, "meta"))),
    ):
        call = launcher.op_call(CONTRACTS[op], tensors, attrs)
        work.append((call, all_ways(call)))
    prepare(work)


def test_matrices_of_a_real_model():
    for case in _real():
        _hold(case, operands(case.T, case.N, case.K, case.kind, spare=case.spare))


def test_odd_sizes_with_bias():
    for case in _odd():
        _hold(case, operands(case.T, case.N, case.K, case.kind, bias=True))


def test_padding_leaves_nothing_behind():
    """NaN in rows past T, of operands and of scales, never reaches a result."""
    for case in _padded():
        tensors = operands(case.T, case.N, case.K, case.kind, spare=True)
        long = torch.full((400, tensors["x_scale"].shape[1]), float("nan"), device="cuda")
        long[: case.T] = tensors["x_scale"]
        _hold(case, {**tensors, "x_scale": long[: case.T]})


@pytest.mark.parametrize(("kind", "quantize"), [("rows", "quantize_fp8"), ("integers", "quantize_int8")])
def test_launches_that_start_early_wait_for_each_other(kind: str, quantize: str):
    """Quantize, multiply, eight times over, each reading the last one's result, over one scratch."""
    tensors = operands(16, 4096, 4096, kind)
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    fixed = {k: tensors[k] for k in ("weight", "weight_scale")}
    first = launcher.op_call(CONTRACTS[quantize], {"x": x}, {"group": 4096})
    (make,) = registry.cuda_kernels(quantize)[0].candidates(first)
    call = Case(16, 4096, 4096, kind, every=True).call(tensors)
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
                launcher.launch_all(make, first, {"x": before, "q": q, "scale": scale}, scratch, stream)
                step = {**fixed, "x": q, "x_scale": scale, "y": after}
                launcher.launch_all(way, call, step, scratch, stream)
            torch.cuda.synchronize()
            assert torch.equal(xs[-1], want), way.name


SHAPES = (
    (1, 128, torch.bfloat16), (3, 384, torch.float16), (8, 640, torch.float32), (1, 4096, torch.bfloat16),
    (64, 4096, torch.float16), (256, 12288, torch.bfloat16), (2050, 1024, torch.float32),
    (1100, 4096, torch.bfloat16),
)  # fmt: skip

Call = tuple[str, Tensors, dict[str, object]]


def _random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def _columns(x: torch.Tensor, margin: int = 16) -> torch.Tensor:
    """``x`` as columns of a wider tensor, NaN elsewhere."""
    wide = torch.full((x.shape[0], x.shape[1] + margin), float("nan"), dtype=x.dtype, device=x.device)
    return wide[:, margin // 2 : margin // 2 + x.shape[1]].copy_(x)


def _plain(tokens: int, width: int, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """Quantization, by every kind of scale; ``device`` meta gives calls without their operands."""
    x = _columns(_random(tokens, width, dtype=dtype, device=device))
    x[0] = 0
    for group in (width, 128):
        yield "quantize_fp8", {"x": x}, {"group": group}
    yield "quantize_int8", {"x": x}, {"group": width}
    for number, scale in (("fp8", 0.004), ("int8", 0.014)):
        yield f"quantize_{number}_static", {"x": x, "scale": torch.full((1,), scale, device=device)}, {}
    yield "quantize_fp8_block", {"x": x}, {"block": 128}
    yield "quantize_fp8_block", {"x": x[:, : width - 37]}, {"block": 128}


def _fused(tokens: int, width: int, dtype: torch.dtype, device: str) -> Iterator[Call]:
    """What is fused with quantization."""
    x = _columns(_random(tokens, width, dtype=dtype, device=device, scale=3))
    weight, residual = (_random(*s, dtype=dtype, device=device) for s in ((width,), (tokens, width)))
    half = _columns(_random(tokens, 2 * width, dtype=dtype, device=device, scale=2))
    for number, group in (("fp8", width), ("fp8", 128), ("int8", width)):
        yield f"rms_norm_quantize_{number}", {"x": x, "weight": weight}, {"eps": 1e-6, "group": group}
        tensors = {"x": x, "residual": residual, "weight": weight.float()}
        yield f"add_rms_norm_quantize_{number}", tensors, {"eps": 1e-5, "group": group}
        yield f"add_rms_norm_and_quantize_{number}", tensors, {"eps": 1e-5, "group": group}
        yield f"silu_mul_quantize_{number}", {"gate_up": half}, {"group": group}


def _bf16_numbers(device: str) -> Iterator[Call]:
    """All finite bf16 numbers by the scale of the largest of each row: ties and subnormals included."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()][: 65024 // 128 * 128].reshape(-1, 128).to(device)
    for number in ("fp8", "int8"):
        yield f"quantize_{number}", {"x": x}, {"group": 128}
        for scale in (1.0, 0.75, 3.0):
            yield f"quantize_{number}_static", {"x": x, "scale": torch.full((1,), scale, device=device)}, {}


def _vocabulary(device: str) -> Iterator[Call]:
    x = _random(152064, 4096, dtype=torch.bfloat16, device=device)
    yield "quantize_fp8", {"x": x}, {"group": 4096}
    yield "quantize_fp8_block", {"x": x}, {"block": 128}


def _apart(device: str) -> Iterator[Call]:
    """A norm, quantization of what it gives, and both at once."""
    x = _random(300, 4096, dtype=torch.bfloat16, device=device)
    weight = _random(4096, dtype=torch.bfloat16, device=device)
    yield norm.rms_norm.name, {"x": x, "weight": weight}, {"eps": 1e-6}
    yield "quantize_fp8", {"x": x}, {"group": 4096}
    yield "rms_norm_quantize_fp8", {"x": x, "weight": weight}, {"eps": 1e-6, "group": 4096}


@pytest.mark.parametrize(("tokens", "width", "dtype"), SHAPES, ids=str)
def test_quantization_gives_the_bytes_of_the_reference(tokens: int, width: int, dtype: torch.dtype):
    torch.manual_seed(tokens)
    for call in _plain(tokens, width, dtype, "cuda"):
        hold_equal(*call)


def test_rounding_of_every_bf16_number():
    for call in _bf16_numbers("cuda"):
        hold_equal(*call)


def test_weights_of_a_vocabulary():
    """Its first and last rows."""
    for op, tensors, attrs in _vocabulary("cuda"):
        (made,) = run_all(op, tensors, attrs)
        a_scale = len(made["q"]) // len(made["scale"])
        for start in (0, 152064 - 256):
            q, scale = CONTRACTS[op].reference(tensors["x"][start : start + 256].cpu(), **attrs)
            assert torch.equal(made["q"][start : start + 256].cpu().float(), q.float())
            few = made["scale"][start // a_scale : (start + 256) // a_scale]
            assert torch.equal(few.cpu(), scale)


@pytest.mark.parametrize(("tokens", "width", "dtype"), SHAPES, ids=str)
def test_fused_ops(tokens: int, width: int, dtype: torch.dtype):
    torch.manual_seed(tokens)
    for call in _fused(tokens, width, dtype, "cuda"):
        hold_near(*call)


def test_fused_norm_is_the_two_ops_in_a_row():
    """The norm's kernel and quantization's, one after the other, give nearly all the same bytes."""
    first, (op, _, attrs), fused = _apart("cuda")
    for made in run_all(*first):
        (apart,) = run_all(op, {"x": made["y"]}, attrs)
        (both,) = run_all(*fused)
        differ = (apart["q"].view(torch.uint8) != both["q"].view(torch.uint8)).float().mean().item()
        assert differ < 1e-3
