"""Products with experts' weights in MXFP4 on the GPU, few entries an expert, against float64, smallest first.

Run ``-k first_look`` first on a new machine: its waits give up, so that a fault is a wrong number and not a hang.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from benchmarks.gpu import launcher
from moe_mx_operands import GATES, operands
from prepared import prepare

from makeready.kernels.contract import CONTRACTS
from makeready.kernels.moe.grouped_few_mx_cuda import TILES, applies, candidate

ALLOWED = {"grouped_linear_mx": 3e-3, "grouped_silu_mul_mx": 1e-2, "grouped_clamped_swiglu_mx": 1e-2}
GPT_OSS = {
    True: (32, 4, 5760, 2880),
    False: (32, 4, 2880, 2880),
}  # experts, k, outputs, inputs; with a gate or not


def hold(
    op: str,
    kind: str,
    shape: tuple[int, ...],
    *,
    gathered: bool,
    least: int = 0,
    give_up: int = 0,
    times: int = 2,
) -> None:
    """Hold all tiles to float64 and to themselves, run some times; rows of nobody to zeros."""
    made = operands(kind, shape, gathered=gathered, bias=op != "grouped_silu_mul_mx", least=least)
    tensors = {name: x.cuda() for name, x in made.items()}
    attrs = {"top_k": 0 if gathered else shape[2], "out_dtype": "bfloat16", **GATES.get(op, {})}
    call = launcher.op_call(CONTRACTS[op], tensors, attrs)
    assert applies(call)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in made.items()}
    want = CONTRACTS[op].reference(**{"weight_global_scale": None} | wide, **attrs | {"out_dtype": "float64"})
    entries = int(made["start"][-1])
    every = [candidate(call, tile, give_up=give_up) for tile in TILES]
    prepare([(call, every)])
    for way in every:
        first, *others = (launcher.run(way, call, tensors)["y"] for _ in range(times))
        assert all(torch.equal(first, other) for other in others), f"{op}/{way.name} differs between runs"
        assert not first[entries:].any(), f"{op}/{way.name}: rows of nobody are not zeros"
        error = float((first.cpu().double() - want).norm() / want.norm().clamp_min(1e-300))
        assert error <= ALLOWED[op], f"{op}/{way.name} at {call.dims} is off by {error:.1e}"


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("op", ALLOWED)
def test_first_look(op: str, gathered: bool) -> None:
    hold(op, "spread", (40, 6, 2, 256, 576), gathered=gathered, give_up=200_000)


@pytest.mark.parametrize("kind", ["spread", "one", "none", "nobody", "single"])
@pytest.mark.parametrize("op", ALLOWED)
def test_awkward_routings(op: str, kind: str) -> None:
    for gathered in (True, False):
        for shape in ((70, 5, 2, 256, 512), (1, 60, 4, 128, 64), (300, 7, 3, 384, 1984)):
            hold(op, kind, shape, gathered=gathered)


@pytest.mark.parametrize("least", [-109, 26, 106])
def test_scales_far_from_one(least: int) -> None:
    hold("grouped_linear_mx", "spread", (9, 5, 2, 192, 320), gathered=False, least=least)


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("gate", [True, False])
def test_shapes_of_gpt_oss(gate: bool, tokens: int) -> None:
    """Twenty runs alike: a ring whose stages are given back too early shows now and then."""
    op = "grouped_clamped_swiglu_mx" if gate else "grouped_linear_mx"
    hold(op, "many", (tokens, *GPT_OSS[gate]), gathered=not gate, times=20)
