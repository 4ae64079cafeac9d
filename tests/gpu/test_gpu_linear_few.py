"""Products of few tokens on the GPU (csrc/few.h) against float64, alone and launched early behind each other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the kernel is for Hopper", allow_module_level=True)

from benchmarks.gpu import gemm_int4, launcher
from benchmarks.gpu.shapes import SPARE
from case import Random
from int_inputs import int_weights, offsets
from mx_inputs import WEIGHTS

from makeready.kernels.contract import CONTRACTS
from makeready.kernels.gemm import linear_few_cuda, linear_few_int_cuda

GIVE_UP = 200_000  # polls: a fault in the ring gives wrong numbers instead of a hang
OPS = ("linear", "linear_fp8", "linear_fp8_block", "linear_int8")
# Tokens, outputs, inputs.
SHAPES = (
    (1, 64, 256),
    (7, 200, 1152),
    (16, 2048, 4096),
    (13, 5120, 2048),
    (33, 516, 12288),
    (64, 6144, 4096),
)
ERROR = {torch.bfloat16: 4e-3, torch.float16: 8e-4, torch.float32: 1e-4}
Tensors = dict[str, torch.Tensor]


def make(op: str, T: int, N: int, K: int, dtype: torch.dtype, *, bias: bool, seed: int = 0) -> Tensors:
    """Operands; rows of NaN follow the tokens."""
    random = torch.Generator("cuda").manual_seed(seed + T + N + K)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=random)

    def followed(x: torch.Tensor) -> torch.Tensor:
        nobodys = torch.full((SPARE, *x.shape[1:]), 99.0 if kind == torch.int8 else math.nan, device="cuda")
        return torch.cat((x, nobodys)).to(kind)[: len(x)]

    kind = {"linear": dtype, "linear_int8": torch.int8}.get(op, torch.float8_e4m3fn)
    made = {"bias": normal(N).to(dtype)} if bias else {}
    if op == "linear":
        return {"x": followed(normal(T, K)), "weight": (normal(N, K) / math.sqrt(K)).to(dtype), **made}
    shapes = ((T, K // 128), (-(-N // 128), K // 128)) if op == "linear_fp8_block" else ((T, 1), (N,))
    scales = [1e-3 + 1e-2 * torch.rand(*shape, device="cuda", generator=random) for shape in shapes]
    size, most = (40, 127) if kind == torch.int8 else (60, 448)
    return {
        "x": followed((size * normal(T, K)).clamp(-most, most)),
        "weight": (size * normal(N, K)).clamp(-most, most).to(kind),
        "x_scale": scales[0],
        "weight_scale": scales[1],
        **made,
    }


def _attrs(op: str, out: torch.dtype) -> dict[str, Any]:
    out_dtype = str(out).removeprefix("torch.")
    return {"out_dtype": out_dtype, **({"block": 128} if op == "linear_fp8_block" else {})}


def hold(op: str, tensors: Tensors, out: torch.dtype, *, give_up: int = 0) -> None:
    """Hold every way to the contract's reference in float64 and to itself."""
    attrs = _attrs(op, out)
    call = launcher.op_call(CONTRACTS[op], tensors, attrs, spare=True)
    assert linear_few_cuda.applies(call)
    wide = [tensors[o.name].double() if o.name in tensors else None for o in CONTRACTS[op].inputs]
    want = CONTRACTS[op].reference(*wide, **{**attrs, "out_dtype": "float64"})
    for way in linear_few_cuda.ways(call):
        candidate = linear_few_cuda.candidate(call, way, give_up=give_up)
        if not launcher.fits(candidate, call):
            continue
        y, again = (launcher.run(candidate, call, tensors)["y"] for _ in range(2))
        assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)), (
            f"{way.name} differs between two runs"
        )
        error = float((y.double() - want).norm() / want.norm())
        assert error <= ERROR[out], f"{way.name} of {call.dims} is off by {error:.1e}"


@pytest.mark.parametrize("op", OPS)
def test_waits_that_give_up(op: str) -> None:
    hold(op, make(op, 16, 2048, 4096, torch.bfloat16, bias=False), torch.bfloat16, give_up=GIVE_UP)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_against_float64(op: str, T: int, N: int, K: int) -> None:
    hold(op, make(op, T, N, K, torch.bfloat16, bias=T % 2 == 1), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits(dtype: torch.dtype) -> None:
    """Results in float32 of more tiles than there are blocks."""
    hold("linear", make("linear", 5, 20_004, 896, dtype, bias=True), torch.float32)


@pytest.mark.parametrize("op", OPS[:1])
def test_launched_behind_each_other(op: str) -> None:
    """Each product reads what the one before wrote; most start before that has ended."""
    width, tokens = 2048, 16
    tensors = [make(op, tokens, width, width, torch.bfloat16, bias=False, seed=i) for i in range(6)]
    call = launcher.op_call(CONTRACTS[op], tensors[0], _attrs(op, torch.bfloat16), spare=True)
    for way in linear_few_cuda.ways(call):
        candidate = linear_few_cuda.candidate(call, way)
        room = [torch.full((tokens + SPARE, width), math.nan, device="cuda").bfloat16() for _ in range(7)]
        room[0][:tokens] = tensors[0]["x"]
        scratch = launcher.new_scratch(candidate)
        for _ in range(20):
            for one, (x, y) in zip(tensors, pairwise(room), strict=True):
                operands = {"x": x[:tokens], "weight": one["weight"], "y": y[:tokens]}
                launcher.launch_all(candidate, call, operands, scratch, torch.cuda.current_stream())
        torch.cuda.synchronize()
        want = tensors[0]["x"]
        for one in tensors:
            want = (want.double() @ one["weight"].double().T).bfloat16()
        error = float((room[-1][:tokens].double() - want.double()).norm() / want.double().norm())
        assert error <= 2e-2, f"{way.name} is off by {error:.1e}"


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("T", "N", "K"), [(1, 64, 512), (7, 200, 1152), (16, 4096, 4096), (31, 6148, 12288), (64, 6144, 4096)]
)
def test_four_bits(T: int, N: int, K: int, zeros: bool) -> None:
    tensors = {"x": gemm_int4.activations(T, K), **gemm_int4.operands(N, K, zeros)}
    call = gemm_int4.call_of(tensors)
    assert linear_few_int_cuda.applies(call)
    wide = {**tensors, "x": tensors["x"].double()}
    want = CONTRACTS["linear_int"].reference(**wide, **gemm_int4.ATTRS, out_dtype="float64")
    for way in linear_few_int_cuda.ways(call):
        for give_up in (GIVE_UP, 0):
            candidate = linear_few_int_cuda.candidate(call, way, give_up=give_up)
            y, again = (launcher.run(candidate, call, tensors)["y"] for _ in range(2))
            assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)), (
                f"{way.name} differs between two runs"
            )
            error = float((y.double() - want).norm() / want.norm())
            assert error <= ERROR[torch.bfloat16], f"{way.name} of {call.dims} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("bits", "group", "zeros"),
    [(8, 128, "uint8"), (8, 0, ""), (4, 32, "float16"), (8, 16, ""), (8, 32, "float16")],
)
@pytest.mark.parametrize(
    ("T", "N", "K"), [(1, 64, 512), (7, 200, 1152), (16, 4096, 4096), (31, 6148, 12288), (64, 6144, 4096)]
)
def test_eight_bits_and_groups_in_spans(T: int, N: int, K: int, bits: int, group: int, zeros: str) -> None:
    random, group = Random(T + N), group or K
    made = int_weights(random, N, K, bits, group, zeros=zeros == "uint8")
    made |= {"weight_zero": offsets(random, N, K, group)} if zeros == "float16" else {}
    tensors = {"x": gemm_int4.activations(T, K), **{name: tensor.cuda() for name, tensor in made.items()}}
    attrs = {"bits": bits, "group": group, "out_dtype": ""}
    call = launcher.op_call(CONTRACTS["linear_int"], tensors, attrs, spare=True)
    assert linear_few_int_cuda.applies(call)
    wide = {name: tensor.cpu() for name, tensor in tensors.items()}
    wide["x"] = wide["x"].double()
    want = CONTRACTS["linear_int"].reference(**wide, **{**attrs, "out_dtype": "float64"}).cuda()
    for way in linear_few_int_cuda.ways(call):
        for give_up in (GIVE_UP, 0):
            candidate = linear_few_int_cuda.candidate(call, way, give_up=give_up)
            y, again = (launcher.run(candidate, call, tensors)["y"] for _ in range(2))
            assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)), way.name
            error = float((y.double() - want).norm() / want.norm())
            assert error <= 1.7 * ERROR[torch.bfloat16], f"{way.name} of {call.dims} is off by {error:.1e}"


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize(
    ("T", "N", "K"), [(1, 64, 512), (7, 200, 1216), (16, 4096, 4096), (31, 6148, 12288), (64, 6144, 4096)]
)
def test_four_bit_floats(form: str, T: int, N: int, K: int) -> None:
    weights = {name: tensor.cuda() for name, tensor in WEIGHTS[form](Random(T + N), N, K).items()}
    tensors = {"x": gemm_int4.activations(T, K), **weights}
    call = launcher.op_call(CONTRACTS["linear_mx"], tensors, {"out_dtype": ""}, spare=True)
    assert linear_few_int_cuda.applies(call)
    wide = {name: tensor.cpu() for name, tensor in tensors.items()}
    want = CONTRACTS["linear_mx"].reference(**{**wide, "x": wide["x"].double()}, out_dtype="float64").cuda()
    for way in linear_few_int_cuda.ways(call):
        for give_up in (GIVE_UP, 0):
            candidate = linear_few_int_cuda.candidate(call, way, give_up=give_up)
            y, again = (launcher.run(candidate, call, tensors)["y"] for _ in range(2))
            assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)), way.name
            error = float((y.double() - want).norm() / want.norm())
            assert error <= ERROR[torch.bfloat16], f"{way.name} of {call.dims} is off by {error:.1e}"
