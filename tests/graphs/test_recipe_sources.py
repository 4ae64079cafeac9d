"""Which tensors of a checkpoint a model reads, however its parameters are made of them."""

from __future__ import annotations

from tiny_programs import LLAMA, dummy
from torch import nn

from makeready.graphs.layers.parameter import constant, parameter, sources
from makeready.graphs.plan.recipe import Derivation, Derived, Each, LoadCall, Operand, Piece, whole
from makeready.graphs.planner.compile import compile_plan
from makeready.kernels.spec import TensorSpec


class Model(nn.Module):
    """A parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        expert = Piece("e.{e}.up", ((0, 4), (0, 2)), (0, 0, 0), each=(Each("e", 3, place=(1, 0, 0)),))
        self.plain = parameter((4, 2), "plain")
        self.both = parameter((8, 2), [whole("a", (4, 2)), whole("b", (4, 2), (4, 0))])
        self.experts = parameter((3, 4, 2), [expert])
        self.table = constant((4, 2), "rope_table", {})
        self.halves = parameter((4, 2), self.halved)

    @staticmethod
    def halved(dtype: str) -> Derived:
        """silu_mul of a tensor."""
        operand = Operand(TensorSpec((4, 4), dtype), (whole("gate_up", (4, 4)),), unit=1)
        return Derived(Derivation({"x": operand}, (LoadCall("silu_mul", {"gate_up": "x"}, {"y": "y"}),)), "y")


def test_all_tensors_of_all_recipes_are_known_before_tracing():
    assert sources(Model()) == {"plain", "a", "b", "e.0.up", "e.1.up", "e.2.up", "gate_up"}


def test_the_fingerprint_counts_what_derivations_read():
    """All tensors of this checkpoint are read, some of them only to be quantized."""
    checkpoint = dummy(LLAMA)
    plan = compile_plan(checkpoint, max_rows=2, weight_dtype="float32", quant="fp8")
    assert any(weight.param.derived for weight in plan.weights)
    assert plan.checkpoint == checkpoint.fingerprint()
