"""Kernels of mixtures of experts on the GPU against float64, smallest first.

Run ``-k first_look`` first on a new machine: its waits give up, so that a fault is a wrong number and not a hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from benchmarks.gpu.moe import SHAPES, Shape, exact
from moe_operands import expert_weights, random, routing
from prepared import prepare

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.moe import grouped_cuda

PRODUCTS = ("grouped_linear", "grouped_silu_mul")
SCALES = ("", "channel", "block", "int8")
SUFFIX = {"": "", "channel": "_fp8", "block": "_fp8_block", "int8": "_int8"}
KINDS = ("spread", "one", "none", "nobody", "single")
# What tensor cores add up of 8-bit floats keeps about 13 fraction bits; bf16 results keep 8.
ALLOWED = {"": 5e-3, "channel": 6e-3, "block": 5e-3, "int8": 5e-3}

Tensors = dict[str, torch.Tensor]


def ways(op: str, call: OpCall) -> list[Candidate]:
    """All ways of all kernels."""
    return [way for kernel in registry.cuda_kernels(op) for way in kernel.candidates(call)]


def every_tile(op: str, tensors: Tensors, attrs: dict[str, Any], give_up: int = 0) -> list[Candidate]:
    """The kernels in CUDA C++ with all their tiles, whatever suits the call."""
    call = replace(launcher.op_call(CONTRACTS[op], tensors, attrs), invariant=True)
    return [grouped_cuda.candidate(call, tile, give_up=give_up) for tile in grouped_cuda.tiles(call)]


def attrs_of(scales: str, top_k: int) -> dict[str, Any]:
    return {"top_k": top_k, "out_dtype": "bfloat16", **({"block": 128} if scales == "block" else {})}


def hold(
    op: str, tensors: Tensors, attrs: dict[str, Any], found: Sequence[Candidate], allowed: float
) -> None:
    """Hold ways to float64 and to themselves, run twice; rows of nobody to zeros."""
    call = launcher.op_call(CONTRACTS[op], tensors, attrs)
    want = exact(op, tensors, attrs)
    entries = int(tensors["start"][-1])
    for way in found:
        if not launcher.fits(way, call):
            continue
        first, second = (launcher.run(way, call, tensors)["y"] for _ in range(2))
        assert torch.equal(first, second), f"{op}/{way.name} differs between two runs"
        assert not first[entries:].any(), f"{op}/{way.name}: rows of nobody are not zeros"
        error = float((first.double() - want).norm() / want.norm().clamp_min(1e-30))
        assert error <= allowed, f"{op}/{way.name} at {call.dims} is off by {error:.1e}"


def small(
    kind: str, gathered: bool, scales: str, shape: tuple[int, int, int, int, int], seed: int = 0
) -> Tensors:
    tokens, experts, k, outputs, inputs = shape
    made = expert_weights(tokens, experts, k, outputs, inputs, kind, gathered, scales=scales, seed=seed)
    return {name: x.cuda() for name, x in made.items()}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("product", PRODUCTS)
def test_first_look(product: str, gathered: bool, scales: str) -> None:
    """One small product with each tile, whose waits give up."""
    op, attrs = product + SUFFIX[scales], attrs_of(scales, 0 if gathered else 2)
    tensors = small("spread", gathered, scales, (40, 6, 2, 256, 512))
    hold(op, tensors, attrs, every_tile(op, tensors, attrs, give_up=200_000), 2 * ALLOWED[scales])


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "qwen2", "v2_lite", "v3", "one", "three", "odd_groups"])
def test_route(name: str) -> None:
    from test_moe_triton import ROUTERS

    _, experts, attrs = ROUTERS[name]
    attrs = {**CONTRACTS["route"].attrs, **attrs}
    for tokens in (1, 7, 64, 1000):
        for bias in (None, random(experts, seed=2) * 0.3):
            tensors = {"logits": random(tokens, experts, seed=tokens).cuda()}
            tensors["kv_slot"] = (torch.arange(tokens) % 5 + (tokens == 1)).int().cuda()
            if bias is not None:
                tensors["bias"] = bias.cuda()
            call = launcher.op_call(CONTRACTS["route"], tensors, attrs)
            # In fp32, as the kernel: in float64 other experts would win where scores nearly tie.
            weight, expert = CONTRACTS["route"].reference(
                *(tensors[n].cpu() if n in tensors else None for n in ("logits", "kv_slot", "bias")), **attrs
            )
            for way in ways("route", call):
                got = launcher.run(way, call, tensors)
                same = (got["expert"].cpu() == expert).all(1)
                assert same.float().mean() >= 0.995, f"{int((~same).sum())} of {tokens} tokens differ"
                off = (got["weight"].cpu() - weight)[same].norm() / weight.norm().clamp_min(1e-30)
                assert off <= 1e-5


@pytest.mark.parametrize("kind", ["spread", "many", "one", "none", "nobody", "single"])
def test_sort_by_expert(kind: str) -> None:
    for tokens, experts, k in (
        (1, 128, 8),
        (64, 128, 8),
        (70, 60, 4),
        (8192, 128, 8),
        (3000, 8, 2),
        (9, 3, 1),
    ):
        tensors = {"expert": routing(tokens, experts, k, kind).cuda()}
        launcher.check(
            CONTRACTS["sort_by_expert"], lambda c: ways("sort_by_expert", c), tensors, {"experts": experts}
        )


def test_combine() -> None:
    for tokens, width, k in ((1, 2048, 8), (64, 2048, 8), (33, 131, 3), (1000, 4096, 2), (5, 64, 16)):
        expert = routing(tokens, 64, k, "spread")
        _, place, start = CONTRACTS["sort_by_expert"].reference(expert, experts=64)
        y = random(tokens * k, width, dtype=torch.bfloat16)
        y[int(start[-1]) :] = float("nan")
        tensors = {"x": y.cuda(), "place": place.cuda(), "share": random(tokens, k, seed=3).cuda()}
        launcher.check(CONTRACTS["combine"], lambda c: ways("combine", c), tensors)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_routings(scales: str, kind: str) -> None:
    for product in PRODUCTS:
        for gathered in (True, False):
            for shape in ((70, 5, 2, 256, 512), (1, 60, 4, 128, 256), (300, 7, 3, 384, 128)):
                op, attrs = product + SUFFIX[scales], attrs_of(scales, 0 if gathered else shape[2])
                tensors = small(kind, gathered, scales, shape)
                call = launcher.op_call(CONTRACTS[op], tensors, attrs)
                (triton,) = (k for k in registry.cuda_kernels(op) if k.name == "tiles")
                every = [*every_tile(op, tensors, attrs), *triton.candidates(call)[:4]]
                launcher.prepare([(call, every)])
                prepare([(call, every)])
                hold(op, tensors, attrs, every, ALLOWED[scales])


@pytest.mark.parametrize("scales", SCALES)
def test_sizes_that_only_triton_takes(scales: str) -> None:
    for product in PRODUCTS:
        op, attrs = product + SUFFIX[scales], attrs_of(scales, 2)
        tensors = small("spread", False, scales, (33, 5, 2, 202, 384 if scales else 75))
        hold(op, tensors, attrs, ways(op, launcher.op_call(CONTRACTS[op], tensors, attrs)), ALLOWED[scales])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("tokens", [1, 8, 64, 300, 2048])
def test_real_shapes(shape: Shape, scales: str, tokens: int) -> None:
    for gate in (True, False):
        op, tensors, attrs = shape.product(tokens, gate=gate, scales=scales)
        call = launcher.op_call(CONTRACTS[op], tensors, attrs, tokens=tokens)
        found = [
            way
            for k in registry.cuda_kernels(op)
            for way in k.candidates(call)[: 1 if k.name == "tiles" else 3]
        ]
        prepare([(call, found)])
        hold(op, tensors, attrs, found, ALLOWED[scales])


@pytest.mark.parametrize("scales", SCALES)
def test_an_entry_does_not_depend_on_the_others(scales: str) -> None:
    """The same bits for a token alone and among others, in every way that deterministic plans may take."""
    op, attrs = "grouped_silu_mul" + SUFFIX[scales], attrs_of(scales, 2)
    tensors = small("many", False, scales, (90, 5, 2, 256, 512))
    call = replace(launcher.op_call(CONTRACTS[op], tensors, attrs), invariant=True)
    order, start = tensors["order"].tolist(), tensors["start"].tolist()
    prepare([(call, ways(op, call))])
    for way in ways(op, call):
        if not launcher.fits(way, call):
            continue
        whole = launcher.run(way, call, tensors)["y"]
        for entry in (0, 37, 100):
            expert = next(e for e in range(5) if start[e] <= entry < start[e + 1])
            token = order[entry] // 2
            alone = {
                name: x[token : token + 1] if name in ("x", "x_scale") else x for name, x in tensors.items()
            }
            alone["order"] = torch.tensor([order[entry] % 2], dtype=torch.int32, device="cuda")
            alone["start"] = torch.tensor(
                [0] * (expert + 1) + [1] * (5 - expert), dtype=torch.int32, device="cuda"
            )
            one = replace(launcher.op_call(CONTRACTS[op], alone, attrs), invariant=True)
            same = next(
                w
                for w in ways(op, one)
                if w.name == way.name and w.launches[0].function == way.launches[0].function
            )
            assert torch.equal(launcher.run(same, one, alone)["y"][0], whole[entry]), way.name
