"""Scales of weights that the checkpoint stores as one matrix with others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_programs import LLAMA

from makeready.graphs.checkpoint.dummy import DummyCheckpoint
from makeready.graphs.executable.cpu.weights import assemble
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.recipe import Param, Piece
from makeready.graphs.plan.spec import EXTEND
from makeready.graphs.planner.ir import STEP, Call, Program, Value
from makeready.graphs.quant.eight_bits import quantize_linears
from makeready.graphs.quant.scheme import Scheme
from makeready.kernels import registry
from makeready.kernels.spec import TensorSpec

FUSED = "m.qkv.weight"
KINDS = {"channel": Scheme("channel", stored=True), "tensor": Scheme("tensor", stored=True)}
KINDS |= {"block": Scheme("block", 8, stored=True)}


def fused(scheme: Scheme, *boxes: tuple[int, int], at: int = 0) -> list[Param]:
    """Parameters of the program in which each of ``boxes`` (rows of one matrix of 32 by 16) is a linear's weight."""
    registry.discover()  # as the planner does, else it depends on other tests which contracts there are
    calls, params = [], {}
    for i, (first, stop) in enumerate(boxes):
        spec = TensorSpec((stop - first, 16), "bfloat16")
        piece = Piece(FUSED, ((first, stop), (0, 16)), (at, 0))
        params[f"w{i}"] = Param(f"w{i}", spec, pieces=(piece,), quantizable=True)
        calls.append(Call("linear", {"x": "x", "weight": f"w{i}"}, {"y": f"y{i}"}, {"out_dtype": ""}))
    values = {"x": Value("x", TensorSpec(("T", 16), "bfloat16"), STEP)}
    program = Program(EXTEND, values, params, (), {c.result: c.result for c in calls}).with_calls(calls)
    return [p for name, p in quantize_linears(program, scheme).params.items() if name.endswith("_scale")]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_fused_weight_have_their_rows_of_its_scales(kind):
    """As Phi-3 stores q, k and v: what a row's weight is multiplied with is the whole matrix's number there."""
    whole = {
        "channel": torch.rand(32),
        "tensor": torch.tensor([3.0]),
        "block": torch.rand(4, 2),
    }[kind]

    class Scales(DummyCheckpoint):
        def read(self, name: str, box: Any = None) -> np.ndarray:
            assert name == "m.qkv.weight_scale"
            return whole.numpy()[tuple(box or ())]

    boxes = ((0, 16), (16, 24), (24, 32))
    made = fused(KINDS[kind], *boxes)
    checkpoint = Scales(dict(LLAMA), {"m.qkv.weight_scale": tuple(whole.shape)})
    for (first, stop), param in zip(boxes, made, strict=True):
        found = torch.full(param.spec.at({}), float("nan"))
        (operand,) = param.operands
        assemble(operand, checkpoint, found)
        wanted = {
            "channel": lambda rows: whole[rows],
            "tensor": lambda rows: torch.full((rows.stop - rows.start,), 3.0),
            "block": lambda rows: whole[rows.start // 8 : rows.stop // 8],
        }
        assert torch.equal(found, wanted[kind](slice(first, stop)))


def test_parts_whose_scales_are_not_theirs_alone_are_refused():
    with pytest.raises(PlanError, match=r"a part of m\.qkv\.weight begins within a block of 8, whose scale"):
        fused(KINDS["block"], (0, 12), (12, 32))
    with pytest.raises(PlanError, match=r"a part of m\.qkv\.weight begins within a block of 8"):
        fused(KINDS["block"], (0, 16), at=4)
