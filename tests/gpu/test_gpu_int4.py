"""Weights of 4 and 8 bits on the GPU: products against float64, what makes them against the references, byte by byte.

python -m pytest tests/gpu/test_gpu_int4.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import gemm_int4, launcher
from benchmarks.gpu.ops import candidates as all_ways
from benchmarks.gpu.shapes import MATRICES, SPARE
from case import Case as OpCase
from case import Random
from inputs import cases
from int_inputs import int_weights
from prepared import prepare

from makeready.kernels import integers_triton
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.linear_int import linear_int
from makeready.kernels.gemm.linear_int_tiling import tilings
from makeready.kernels.gemm.linear_int_triton import candidates, describe
from makeready.kernels.integers import values
from makeready.kernels.moe import experts_int_triton

assert integers_triton

EXACT = (
    "repack_rows", "repack_awq", "repack_pairs", "unpack_zeros", "tile_scales", "order_of_groups", "quantize_int",
    "gather_columns",
)  # fmt: skip
EXPERTS = ("grouped_linear_int", "grouped_silu_mul_int")
FORMS = ((4, 128, False), (4, 128, True), (4, 32, True), (4, 64, False), (8, 128, False), (8, 32, True))
# Outputs, inputs, bits, group: parts of spans, of tiles and of groups.
ODD = (
    (131, 96, 4, 32),
    (8, 64, 4, 64),
    (200, 528, 4, 128),
    (65, 1000, 8, 1000),
    (320, 2080, 4, 1024),
    (64, 200, 8, 64),
)
DTYPES = ("bfloat16", "float16")
# Weights and their scales are rounded to 8 or 11 bits where rows are many, results always.
ALLOWED = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 5e-3}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A product to hold to float64; all its ways or the planner's first."""

    T: int
    N: int
    K: int
    bits: int
    group: int
    zeros: bool
    every: bool
    dtype: str = "bfloat16"
    bias: bool = False
    spare: bool = False
    out: str = ""

    def operands(self, device: str = "cuda") -> Tensors:
        """Rows that maps may reach are NaN; ``device`` meta gives shapes alone."""
        dtype = getattr(torch, self.dtype)
        rows = self.T + (SPARE if self.spare else 0)
        x = torch.full((rows, self.K), float("nan"), dtype=dtype, device=device)[: self.T]
        if device == "meta":
            groups = -(-self.K // self.group)
            tiled = (-(-self.N // 64), groups, 64)
            words = (self.N, -(-self.K // 128) * 8 * self.bits)
            made = {
                "weight": torch.empty(words, dtype=torch.int16, device=device),
                "weight_scale": torch.empty(tiled, dtype=torch.float16, device=device),
            }
            if self.zeros:
                made["weight_zero"] = torch.empty(tiled, dtype=torch.uint8, device=device)
        elif self.N * self.K > 2**23:  # made there: the host takes seconds
            x.normal_()
            made = gemm_int4.operands(self.N, self.K, self.zeros)
        else:
            random = Random(self.T + self.N)
            x.copy_(random.normal(self.T, self.K))
            weights = int_weights(random, self.N, self.K, self.bits, self.group, self.zeros)
            made = {name: value.to(device) for name, value in weights.items()}
        if self.bias:
            made["bias"] = torch.linspace(-3, 3, self.N, dtype=dtype, device=device)
        return {"x": x, **made}

    def call(self, tensors: Tensors) -> OpCall:
        attrs = {"bits": self.bits, "group": self.group, "out_dtype": self.out}
        return launcher.op_call(linear_int, tensors, attrs, spare=self.spare)

    def ways(self, call: OpCall) -> list[Candidate]:
        return candidates(call)[: None if self.every else 1]


def _odd() -> Iterator[Case]:
    for (N, K, bits, group), T, zeros in product(ODD, (1, 17, 130), (False, True)):
        yield Case(T, N, K, bits, group, zeros, every=T == 17, dtype=DTYPES[T % 2], bias=zeros)
    yield Case(33, 131, 256, 4, 128, True, every=False, bias=True, out="float32")


def _forms() -> Iterator[Case]:
    """All ways of every form, few rows and many."""
    for (bits, group, zeros), T in product(FORMS, (1, 40, 300)):
        yield Case(T, 1536, 2048, bits, group, zeros, every=True, dtype=DTYPES[T == 40], spare=True)


def _real() -> Iterator[Case]:
    for (N, K), T in product(MATRICES.values(), (1, 16, 65, 256, 1000)):
        yield Case(T, N, K, 4, 128, T % 2 == 0, every=False, spare=True)


def _hold(case: Case) -> None:
    """Hold the ways to the float64 product; and to themselves, run twice."""
    tensors = case.operands()
    call = case.call(tensors)
    wide = values(
        tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero"),
        bits=case.bits, group=case.group, inputs=case.K, dtype=torch.float64,
    )  # fmt: skip
    want = tensors["x"].double() @ wide.T
    if case.bias:
        want += tensors["bias"].double()
    for way in case.ways(call):
        assert launcher.fits(way, call), f"{way.name} spills, or wants more shared memory than there is"
        first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
        assert torch.equal(first, second), f"{way.name} differs between two runs"
        error = ((first.double() - want).norm() / want.norm()).item()
        assert error <= ALLOWED[case.out or case.dtype], f"{way.name} of {case} is off by {error:.1e}"


def _some(op: str) -> list[OpCase]:
    """Operands of an op that the GPU's kernels take."""
    made = [case for case in cases(op) if "float32" not in case.label or op in EXACT]
    return [
        OpCase(case.op, case.label, case.operands, {**case.contract.attrs, **case.attrs}) for case in made
    ]


def _op_call(case: OpCase, tensors: Tensors) -> OpCall:
    return launcher.op_call(CONTRACTS[case.op], tensors, case.attrs)


def _ways(case: OpCase, call: OpCall) -> list[Candidate]:
    if case.op == "quantize_int" and case.attrs["group"] != 128:
        return []
    return all_ways(call)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels of this file at once, on all cores."""
    work: list[tuple[OpCall, Any]] = []
    for case in (*_odd(), *_forms(), *_real()):
        call = case.call(case.operands("meta"))
        work.append((call, case.ways(call)))
    for op in (*EXACT, "dequantize_int", *EXPERTS):
        for made in _some(op):
            call = _op_call(made, {k: v.to("meta") for k, v in made.operands.items()})
            work.append((call, _ways(made, call)))
    prepare(work)


def test_first_look():
    """The smallest first, on a new machine."""
    _hold(Case(1, 64, 128, 4, 128, False, every=True))
    _hold(Case(16, 128, 256, 4, 128, True, every=True))


def test_odd_sizes():
    for case in _odd():
        _hold(case)


def test_every_form():
    for case in _forms():
        _hold(case)


def test_matrices_of_a_real_model():
    for case in _real():
        _hold(case)


@pytest.mark.parametrize("op", EXACT)
def test_what_makes_weights_gives_the_bytes_of_the_reference(op: str):
    for case in _some(op):
        tensors = {k: v.cuda() for k, v in case.operands.items()}
        call = _op_call(case, tensors)
        want = case.run()
        for way in _ways(case, call):
            got = launcher.run(way, call, tensors)
            for name, value in want.items():
                bits = (x.contiguous().view(torch.uint8) for x in (got[name].cpu(), value))
                assert torch.equal(*bits), f"{name} of {case.label}"


def test_dequantized_weights():
    for case in _some("dequantize_int"):
        tensors = {k: v.cuda() for k, v in case.operands.items()}
        call = _op_call(case, tensors)
        for way in _ways(case, call):
            assert torch.equal(launcher.run(way, call, tensors)["x"].cpu(), case.run()["x"]), case.label


@pytest.mark.parametrize("op", EXPERTS)
def test_experts(op: str):
    """Every way, experts of nobody with NaN for scales, and rows of nobody."""
    for case in _some(op):
        tensors = {k: v.cuda() for k, v in case.operands.items()}
        call = _op_call(case, tensors)
        wide = case.mapped(lambda x: x.double() if x.is_floating_point() else x)
        want = OpCase(case.op, case.label, wide.operands, {**case.attrs, "out_dtype": "float64"}).run()["y"]
        entries = int(case.operands["start"][-1])
        for way in experts_int_triton.candidates(call):
            if not launcher.fits(way, call):
                continue
            first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
            assert torch.equal(first, second), f"{way.name} of {case.label} differs between two runs"
            assert not first[entries:].any(), f"{way.name} of {case.label}: rows of nobody are not zeros"
            error = float((first.cpu().double() - want).norm() / want.norm().clamp_min(1e-30))
            assert error <= 8e-3, f"{way.name} of {case.label} is off by {error:.1e}"


def test_launches_that_start_early_wait_for_each_other():
    """Products eight times over, each reading the last one's result, over one scratch."""
    case = Case(16, 4096, 4096, 4, 128, False, every=True)
    tensors = case.operands()
    tensors["weight_scale"].fill_(0.003)
    call = case.call(tensors)
    size = describe(call)
    shared = [w for w, t in zip(candidates(call), tilings(size), strict=True) if t.sharers(size) > 1]
    for way in shared[:3]:
        want = tensors["x"]
        for _ in range(8):
            want = launcher.run(way, call, {**tensors, "x": want})["y"]
        xs = [tensors["x"], *(torch.empty_like(want) for _ in range(8))]
        scratch, stream = launcher.new_scratch(way), torch.cuda.current_stream()
        for _ in range(5):
            for before, after in pairwise(xs):
                launcher.launch_all(way, call, {**tensors, "x": before, "y": after}, scratch, stream)
            torch.cuda.synchronize()
            assert torch.equal(xs[-1], want), way.name
