"""``quant=int4``: weights to the nearest of 16 steps, symmetric, in groups of 128 inputs, while they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.graphs.quant.weight_only import Form, WeightOnly
from makeready.kernels.integers import TILE


@dataclass(frozen=True)
class Rounded:
    """No file has it: what a 16-bit or wider weight becomes."""

    stored = False

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        attrs = {"bits": form.bits, "group": form.inputs(int(matrix.spec.shape[1]))}
        call = LoadCall("quantize_int", {"x": "x"}, {"weight": "weight", "scale": "scale"}, attrs)
        return Derivation({"x": replace(matrix, unit=TILE)}, (call,))

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


ON_LOAD["int4"] = WeightOnly(Rounded(), Form(bits=4, group=128))
