"""Products of one row on the GPU (csrc/gemv.cu) against float64, alone and launched early behind each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("the kernel is for Hopper and later", allow_module_level=True)

from benchmarks.gpu import launcher

from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.gemm.gemv_cuda import applies, candidate

GIVE_UP = 200_000  # polls: a fault in the ring gives wrong numbers instead of a hang
NORMS = {
    "linear": "",
    "rms_norm_linear": "rms",
    "add_rms_norm_linear": "add",
    "add_rms_norm_linear_silu_mul": "add",
}
# Qwen3-8B's, then rows that not all threads have a part of, few outputs, and the largest.
SHAPES = (
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (1154, 896),
    (2050, 2560),
    (130, 64),
    (2, 8),
)
Tensors = dict[str, torch.Tensor]


def _make(op: str, N: int, K: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    random = torch.Generator("cuda").manual_seed(N + K)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=random)

    made = {"x": 3 * normal(1, K), "weight": normal(N, K) / math.sqrt(K)}
    if NORMS[op]:
        made["gain"] = 1 + 0.3 * normal(K)
    if NORMS[op] == "add":
        made["residual"] = 5 * normal(1, K)
    if bias:
        made["bias"] = normal(N)
    return {name: x.to(dtype) for name, x in made.items()}


def _attrs(op: str, **more: Any) -> dict[str, Any]:
    return {**({"eps": 1e-6, "offset": 0.0} if NORMS[op] else {}), **more}


def _hold(op: str, tensors: Tensors, attrs: Mapping[str, Any], *, give_up: int = 0) -> None:
    """Hold the kernel to the contract's reference in float64 on the GPU, and to itself."""
    call = launcher.op_call(CONTRACTS[op], tensors, attrs)
    assert applies(call)
    wide = {k: v.double() for k, v in tensors.items()}
    contract = CONTRACTS[op]
    want = contract.reference(
        *(wide.get(o.name) for o in contract.inputs), **{**contract.attrs, **attrs, "out_dtype": "float64"}
    )
    wants = dict(
        zip((o.name for o in contract.outputs), want if isinstance(want, tuple) else (want,), strict=True)
    )
    way = candidate(call, give_up=give_up)
    first, second = (launcher.run(way, call, tensors) for _ in range(2))
    for name, w in wants.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between two runs"
        error = ((first[name].double() - w).norm() / w.norm()).item()
        # Two factors, each off by what the norm's rounding to 16 bits makes of it, and the result's own rounding.
        allowed = 8e-3 if op.endswith("silu_mul") else 5e-3
        assert error <= allowed, f"{op}: {name} at {dict(call.dims)} is off by {error:.1e}"


@pytest.mark.parametrize("op", NORMS)
def test_waits_that_give_up(op: str) -> None:
    """The first to run on a new GPU: it cannot hang."""
    for N, K in SHAPES[:5]:
        _hold(op, _make(op, N, K), _attrs(op), give_up=GIVE_UP)


@pytest.mark.parametrize("op", NORMS)
def test_shapes(op: str) -> None:
    for N, K in (*SHAPES, *(((512, 16384),) if op == "linear" else ((512, 8192),))):
        _hold(op, _make(op, N, K), _attrs(op))


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_biases(op: str, dtype: torch.dtype) -> None:
    for out in ("", "float32"):
        _hold(op, _make(op, 3000, 2048, bias=True, dtype=dtype), _attrs(op, out_dtype=out))


def test_the_vocabulary() -> None:
    op = "add_rms_norm_linear"
    _hold(op, _make(op, 151936, 4096), _attrs(op, out_dtype="float32"))


FP8 = {
    "quantize_fp8_linear_fp8": "",
    "rms_norm_quantize_fp8_linear_fp8": "rms",
    "add_rms_norm_quantize_fp8_linear_fp8": "add",
    "silu_mul_quantize_fp8_linear_fp8": "gate",
}


@pytest.mark.parametrize("op", FP8)
def test_chains_of_8_bits(op: str) -> None:
    """Against the reference on the CPU, which rounds what it quantizes to 16 bits, too."""
    contract, random = CONTRACTS[op], torch.Generator("cuda").manual_seed(1)
    for N, K in ((6144, 4096), (4096, 12288), (300, 880), (24576, 4096)):

        def normal(*shape: int, width: int = K) -> torch.Tensor:
            return torch.randn(*shape, width, device="cuda", generator=random)

        tensors = {"gate_up": normal(1, width=2 * K)} if FP8[op] == "gate" else {"x": 3 * normal(1)}
        tensors |= {"gain": 1 + 0.3 * normal(width=K)} if FP8[op] in ("rms", "add") else {}
        tensors |= {"residual": 5 * normal(1)} if FP8[op] == "add" else {}
        tensors = {name: x.bfloat16() for name, x in tensors.items()}
        tensors["weight"] = (60 * normal(N)).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors["weight_scale"] = 0.01 + torch.rand(N, device="cuda", generator=random)
        attrs = {"group": K, "out_dtype": "bfloat16"} | (
            {"eps": 1e-6, "offset": 0.0} if "gain" in tensors else {}
        )
        call = launcher.op_call(contract, tensors, attrs)
        assert applies(call)
        host = {name: x.cpu() for name, x in tensors.items()}
        want = contract.reference(*(host.get(o.name) for o in contract.inputs), **attrs)
        for give_up in (GIVE_UP, 0):
            got = launcher.run(candidate(call, give_up=give_up), call, tensors)
            for operand, w in zip(
                contract.outputs, want if isinstance(want, tuple) else (want,), strict=True
            ):
                error = ((got[operand.name].cpu().double() - w.double()).norm() / w.double().norm()).item()
                allowed = contract.tolerance.bfloat16
                assert error <= allowed, f"{op}: {operand.name} at {N} x {K} is off by {error:.1e}"


def test_squares_of_scales() -> None:
    op, random = "linear_fp8_block", torch.Generator("cuda").manual_seed(2)
    for N, K in ((5120, 2048), (2048, 4096), (1536, 7168), (300, 640), (24576, 1536), (7168, 16384)):

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=random)

        tensors = {
            "x": (100 * normal(1, K)).clamp(-448, 448).to(torch.float8_e4m3fn),
            "x_scale": normal(1, K // 128).abs(),
            "weight": (60 * normal(N, K)).clamp(-448, 448).to(torch.float8_e4m3fn),
            "weight_scale": normal(-(-N // 128), K // 128).abs(),
        }
        for give_up in (GIVE_UP, 0):
            _hold(op, tensors, {"block": 128, "out_dtype": "bfloat16"}, give_up=give_up)


def _layers(count: int) -> list[tuple[Candidate, OpCall, Tensors]]:
    """o, gate_up, down and the next qkv, again and again, each over what the one before gave."""
    sizes = {
        "linear": (4096, 4096),
        "add_rms_norm_linear_silu_mul": (24576, 4096),
        "down": (4096, 12288),
        "add_rms_norm_linear": (4096, 4096),
    }
    made: list[tuple[Candidate, OpCall, Tensors]] = []
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    residual = torch.randn(1, 4096, device="cuda").bfloat16()
    for _ in range(count):
        for name, (N, K) in sizes.items():
            op = "linear" if name == "down" else name
            tensors = {**_make(op, N, K), "x": x}
            if NORMS[op]:
                tensors["residual"] = residual
            call = launcher.op_call(CONTRACTS[op], tensors, _attrs(op))
            results = launcher.results(call, tensors)
            made.append((candidate(call), call, {**tensors, **results}))
            x, residual = results["y"], results.get("residual_out", residual)
    return made


def test_launched_early_they_give_what_they_give_one_by_one() -> None:
    """Bit for bit, in a graph that runs many times, with poison in all results before each."""
    chain = _layers(3)
    scratch = launcher.new_scratch(chain[0][0])

    def poison() -> None:
        for _, call, tensors in chain:
            for operand in CONTRACTS[call.op].outputs:
                tensors[operand.name].fill_(math.nan)

    def run(*, wait: bool) -> None:
        for way, call, tensors in chain:
            apart = replace(way, launches=tuple(replace(one, dependent=not wait) for one in way.launches))
            launcher.launch_all(apart, call, tensors, scratch, torch.cuda.current_stream())

    poison()
    run(wait=True)
    torch.cuda.synchronize()
    want = [tensors["y"].clone() for _, _, tensors in chain]
    assert all(y.isfinite().all() for y in want)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(wait=False)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run(wait=False)
    for _ in range(200):
        poison()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(tensors["y"], y) for (_, _, tensors), y in zip(chain, want, strict=True))
