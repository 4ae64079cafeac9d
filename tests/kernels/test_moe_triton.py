"""Triton kernels of mixtures of experts without a GPU: interpreted against the references, and cross-compiled.

Triton decides at import whether kernels are interpreted, so the interpreted tests run in a process of their
own, which ``test_interpreted`` starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from interpreted import INTERPRETED, aot, launch_interpreted, op_call
from moe_operands import expert_weights, random, routing
from test_fp8_triton import launch as _patched  # noqa: F401  # importing it mends the interpreter's 8-bit conversion

from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.moe import combine_triton, experts_triton, route_triton

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_interpreted's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
assert combine_triton
assert experts_triton
assert route_triton

FEATURES = frozenset({"pdl", "fp8"})
PLAIN = frozenset({"fp8"})


@compiled
@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def check(op, operands, *, every=False, **attrs):
    """All ways, or one of each tile height, against the reference of float64 operands; what is exact, exactly."""
    contract = CONTRACTS[op]
    attrs = {**contract.attrs, **attrs}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in operands.items()}
    exact = contract.reference(**operands, **attrs)
    want = contract.reference(**wide, **attrs | ({"out_dtype": "float64"} if "out_dtype" in attrs else {}))
    single = len(contract.outputs) == 1
    want, exact = ((want,), (exact,)) if single else (want, exact)
    call = op_call(op, operands, attrs, features=PLAIN, multiprocessors=3)
    (kernel,) = (k for k in registry.cuda_kernels(op) if not k.name.startswith("wgmma"))
    ways = kernel.candidates(replace(call, invariant=every))
    assert ways
    # Warps and stages make no difference here.
    heights = {way.name.partition("_")[0]: way for way in reversed(ways)}
    for way in heights.values() if every or op == "route_and_sort" else ways[:1]:
        got = launch_interpreted(way, call, operands)
        for output, value, integer in zip(contract.outputs, want, exact, strict=True):
            if not integer.is_floating_point():
                assert got[output.name].equal(integer), (output.name, way.name)
                continue
            kind = str(integer.dtype).removeprefix("torch.")
            off = (got[output.name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
            assert off <= getattr(contract.tolerance, kind), (output.name, way.name, off)


ROUTERS = {
    "qwen3": (9, 128, {"top_k": 8, "renormalise": True}),
    "mixtral": (4, 8, {"top_k": 2, "renormalise": True}),
    "qwen2": (5, 60, {"top_k": 4}),
    "v2_lite": (5, 64, {"top_k": 6, "groups": 4, "top_groups": 2, "scale": 2.5}),
    "v3": (5, 256, {"top_k": 8, "score": "sigmoid", "renormalise": True, "scale": 2.5, "groups": 8,
                    "top_groups": 4, "group_members": 2}),
    "one": (2, 1, {"top_k": 1}),
    "three": (7, 3, {"top_k": 3, "score": "sigmoid"}),
    "five": (1, 5, {"top_k": 1}),
    "odd_groups": (6, 15, {"top_k": 4, "groups": 3, "top_groups": 2, "group_members": 2}),
    "all_of_few": (3, 6, {"top_k": 5, "groups": 3, "top_groups": 1}),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("biased", [False, True])
def test_route(name, biased):
    tokens, experts, attrs = ROUTERS[name]
    operands = {
        "logits": random(tokens, experts, seed=1),
        "kv_slot": torch.arange(tokens, dtype=torch.int32) + (tokens == 1),  # the first token is of no row
    }
    if biased:
        operands["bias"] = random(experts, seed=2) * 0.3
    check("route", operands, **attrs)
    check("route_and_sort", operands, experts=experts, **attrs)


@interpreted
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
def test_equal_and_broken_scores_come_in_order(score, groups):
    logits = (random(8, 64, seed=3) * 2).round() / 2  # many equals
    logits[1] = 0.0
    logits[2, 5] = logits[2, 40] = float("nan")
    logits[3] = float("nan")
    logits[4, ::2] = -float("inf")
    logits[5, :60] = float("nan")
    operands = {"logits": logits, "kv_slot": torch.ones(8, dtype=torch.int32)}
    contract = CONTRACTS["route"]
    attrs = {**contract.attrs, "top_k": 6, "score": score, "groups": groups, "top_groups": min(groups, 2)}
    call = op_call("route", operands, attrs, features=PLAIN)
    (way,) = registry.cuda_kernels("route")[0].candidates(call)
    got = launch_interpreted(way, call, operands)
    weight, expert = contract.reference(**operands, **attrs)
    assert got["expert"].equal(expert)
    assert torch.allclose(got["weight"], weight, rtol=1e-5, equal_nan=True)


@interpreted
@pytest.mark.parametrize("entries", ["spread", "one", "none", "nobody", "single", "many"])
def test_sort_by_expert(entries, monkeypatch):
    monkeypatch.setattr(route_triton, "_CHUNK", 64)  # more entries than a block holds at once
    for experts, k in ((8, 2), (60, 4), (3, 1), (128, 8)):
        expert = routing(13 if entries != "many" else 24, experts, k, entries)
        check("sort_by_expert", {"expert": expert}, experts=experts)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "width", "k"), [(1, 2048, 8), (5, 131, 3), (7, 64, 1), (3, 96, 16), (9, 40, 5)]
)
def test_combine(tokens, width, k):
    for dtype in (torch.float32, torch.float16):
        expert = routing(tokens, 16, k, "spread")
        _, place, start = CONTRACTS["sort_by_expert"].reference(expert, experts=16)
        y = random(tokens * k, width, dtype=dtype)
        y[int(start[-1]) :] = float("nan")  # nobody's
        weight = random(tokens, k, seed=4)
        weight[place < 0] = float("nan")
        operands = {"x": y, "place": place, "share": weight}
        check("combine", operands)
        operands |= {"residual": random(tokens, width, dtype=dtype, seed=5), "weight": random(width, seed=6)}
        check("combine_add_rms_norm", operands, eps=1e-6, offset=1.0)
        for group in (width, 128)[: 1 + (width % 128 == 0)]:
            check("combine_add_rms_norm_quantize_fp8", operands, eps=1e-6, group=group)


# tokens, experts, top_k, outputs, inputs
GROUPED = [
    (5, 3, 2, 40, 72),
    (1, 8, 2, 64, 64),
    (33, 5, 4, 70, 96),
    (9, 60, 4, 64, 128),
]


@interpreted
@pytest.mark.parametrize(("tokens", "experts", "k", "outputs", "inputs"), GROUPED)
@pytest.mark.parametrize("entries", ["spread", "one", "nobody", "single"])
def test_grouped(tokens, experts, k, outputs, inputs, entries):
    for act, stored in (("float32", "float32"), ("float16", "float16"), ("float32", "float16")):
        every = entries == "spread" and tokens == 33 and act == stored == "float16"
        for op, gathered in (("grouped_linear", True), ("grouped_silu_mul", False)):
            operands = expert_weights(tokens, experts, k, outputs, inputs, entries, gathered, act, stored)
            check(op, operands, every=every, top_k=0 if gathered else k)


@interpreted
@pytest.mark.parametrize("entries", ["spread", "one"])
def test_grouped_with_biases(entries):
    """A bias of each expert's outputs, then clamped SwiGLU: sums pass its limits on both sides."""
    swiglu = {"alpha": 1.702, "limit": 1.5}
    for tokens, experts, k, outputs, inputs in GROUPED:
        for op, gathered in (("grouped_linear", True), ("grouped_clamped_swiglu", False)):
            operands = expert_weights(
                tokens, experts, k, outputs, inputs, entries, gathered, "float16", "float16"
            )
            operands["bias"] = random(experts, outputs, dtype=torch.float16, seed=9) * 3
            operands["bias"][operands["start"][1:] == operands["start"][:-1]] = float(
                "nan"
            )  # which nobody reads
            check(op, operands, top_k=0 if gathered else k, **({} if gathered else swiglu))


@interpreted
@pytest.mark.parametrize("entries", ["spread", "nobody"])
@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize("outputs", [384, 72, 130])
def test_grouped_fp8(scales, entries, outputs):
    suffix = "_block" if scales == "block" else ""
    for op, gathered in (("grouped_linear", True), ("grouped_silu_mul", False)):
        operands = expert_weights(9, 5, 2, outputs, 256, entries, gathered, scales=scales)
        attrs = {"top_k": 0 if gathered else 2, "out_dtype": "float32", **({"block": 128} if suffix else {})}
        check(f"{op}_fp8{suffix}", operands, every=outputs == 130, **attrs)


@interpreted
def test_a_deterministic_plan_has_one_way_for_all_sizes():
    """The same bits for an entry, whatever stands beside it and however many there are."""
    operands = expert_weights(17, 4, 2, 64, 96, "spread", False, "float16", "float16")
    attrs = {**CONTRACTS["grouped_linear"].attrs, "top_k": 2}
    few = {**operands, **dict(zip(("order", "start"), _order_of(operands, 3), strict=True))}
    (kernel,) = (k for k in registry.cuda_kernels("grouped_linear") if k.features <= PLAIN)
    names = []
    for mine in (operands, few):
        call = replace(op_call("grouped_linear", mine, attrs, features=PLAIN), invariant=True)
        names.append(sorted(way.name for way in kernel.candidates(call)))
    assert names[0]
    assert names[0] == names[1]


def _order_of(operands, tokens):
    order, start = operands["order"], operands["start"]
    kept = (order < 2 * tokens) & (order >= 0)
    counts = [int(kept[a:b].sum()) for a, b in zip(start.tolist(), start.tolist()[1:], strict=False)]
    return order[kept], torch.tensor([0, *counts]).cumsum(0).int()


def _calls():
    """Calls at the shapes of Qwen3-30B-A3B."""
    for tokens in (1, 8192):
        logits = torch.empty(tokens, 128, device="meta")
        slot = torch.empty(tokens, dtype=torch.int32, device="meta")
        yield "route", {"logits": logits, "kv_slot": slot}, {"top_k": 8, "renormalise": True}
        expert = torch.empty(tokens, 8, dtype=torch.int32, device="meta")
        yield "sort_by_expert", {"expert": expert}, {"experts": 128}
        both = {"top_k": 8, "experts": 128, "renormalise": True}
        yield "route_and_sort", {"logits": logits[:32], "kv_slot": slot[:32]}, both
        wide = torch.empty(tokens, 256, device="meta")
        yield "route", {"logits": wide, "kv_slot": slot}, ROUTERS["v3"][2]
        y = torch.empty(tokens * 8, 2048, dtype=torch.bfloat16, device="meta")
        yield "combine", {"x": y, "place": expert, "share": torch.empty(tokens, 8, device="meta")}, {}
        normed = {
            "x": y,
            "place": expert,
            "share": torch.empty(tokens, 8, device="meta"),
            "residual": y[:tokens],
            "weight": y[0],
        }
        yield "combine_add_rms_norm", normed, {"eps": 1e-6}
        yield "combine_add_rms_norm_quantize_fp8", normed, {"eps": 1e-6, "group": 128}
        yield from _products(tokens, 128, 8, 2048, 768)


def _products(tokens, experts, k, width, inner):
    def made(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    entries = tokens * k
    ints = {"order": made(entries, dtype=torch.int32), "start": made(experts + 1, dtype=torch.int32)}
    for gate, outputs, inputs in ((True, 2 * inner, width), (False, width, inner)):
        top_k, rows = (k, tokens) if gate else (0, entries)
        op = "grouped_silu_mul" if gate else "grouped_linear"
        yield op, {"x": made(rows, inputs), "weight": made(experts, outputs, inputs)} | ints, {"top_k": top_k}
        small = {
            "x": made(rows, inputs, dtype=torch.float8_e4m3fn),
            "weight": made(experts, outputs, inputs, dtype=torch.float8_e4m3fn),
        } | ints
        channel = {
            "x_scale": made(rows, 1, dtype=torch.float32),
            "weight_scale": made(experts, outputs, dtype=torch.float32),
        }
        yield f"{op}_fp8", small | channel, {"top_k": top_k, "out_dtype": "bfloat16"}
        squares = made(experts, -(-outputs // 128), inputs // 128, dtype=torch.float32)
        block = {"x_scale": made(rows, inputs // 128, dtype=torch.float32), "weight_scale": squares}
        yield f"{op}_fp8_block", small | block, {"top_k": top_k, "out_dtype": "bfloat16", "block": 128}


@compiled
@pytest.mark.slow
def test_cross_compiles():
    """Of every call the first way that does not spill, as the planner takes it."""
    for op, operands, attrs in _calls():
        call = op_call(op, operands, {**CONTRACTS[op].attrs, **attrs}, features=FEATURES)
        for kernel in (k for k in registry.cuda_kernels(op) if k.features <= FEATURES):
            fitting = []
            for way in kernel.candidates(call)[:4]:
                compiled = [(launch, aot.compile_launch(launch, call)) for launch in way.launches]
                assert all(made.waits for _, made in compiled)
                if all(m.spill_bytes <= n.local_bytes and m.shared <= call.shared_bytes for n, m in compiled):
                    fitting.append(way)
                    break
            assert fitting, (op, kernel.name)
