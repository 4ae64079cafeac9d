"""Weights in NVFP4 (kernels/mx.py): as compressed-tensors and modelopt store them, and made while loading.

Of a projection ``[N, K / 2]`` are bytes of two neighbouring inputs, the first in the lower bits,
``[N, K / 16]`` scales of e4m3, and one fp32 number for all of it. compressed-tensors
(``nvfp4-pack-quantized``) calls them ``weight_packed``, ``weight_scale`` and ``weight_global_scale``, and scales
are divided by the last; modelopt (modelopt.py) ``weight``, ``weight_scale`` and ``weight_scale_2``, which
multiplies. Files whose activations have 4 bits as well hold a number for those (``input_global_scale``,
``input_scale``), which is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.quant.packed import forms_of
from makeready.graphs.quant.reading import expect, flag, integer, names_of, refused_unless
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.graphs.quant.stored import COMPRESSED
from makeready.graphs.quant.weight_only import NV, Form, WeightOnly, stored_number, stored_rows, width_of
from makeready.kernels.integers import TILE
from makeready.kernels.mx import BITS
from makeready.kernels.nvfp4 import BLOCK

FORMAT = "nvfp4-pack-quantized"
FORM = Form(bits=BITS, group=BLOCK)


@dataclass(frozen=True)
class Halves:
    """See the module's docstring.

    Attributes:
        numbers, scales, whole: what they are called in the place of ``weight``.
        divides: whether scales are divided by the last.
    """

    numbers: str = "weight_packed"
    scales: str = "weight_scale"
    whole: str = "weight_global_scale"
    divides: bool = True

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`.

        Raises:
            PlanError: inputs are no whole blocks.
        """
        width = width_of(matrix, BLOCK, "NVFP4")
        operands = {
            "q": stored_rows(matrix, self.numbers, width // 2, "uint8"),
            "s": stored_rows(matrix, self.scales, width // BLOCK, "float8_e4m3fn"),
            "g": stored_number(matrix, self.whole),
        }
        checked = {"given": "g", "scale": "s"}
        calls = (
            LoadCall("repack_bytes", {"q": "q"}, {"weight": "weight"}, {"inputs": width}),
            LoadCall("pair_scales", {"scale": "s"}, {"paired": "scale"}),
            LoadCall(
                "check_global_scales", checked, {"global_scale": "global_scale"}, {"divides": self.divides}
            ),
        )
        return Derivation(operands, calls)

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rounded:
    """No file has it: what a 16-bit or wider weight becomes."""

    stored = False

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        calls = (
            LoadCall("make_global_scales", {"x": "x"}, {"global_scale": "global_scale"}),
            LoadCall(
                "quantize_nvfp4",
                {"x": "x", "global_scale": "global_scale"},
                {"weight": "weight", "scale": "scale"},
            ),
        )
        return Derivation({"x": replace(matrix, unit=TILE)}, calls)

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


def _compressed(said: Mapping[str, Any]) -> WeightOnly:
    usual, rules = forms_of(said, _form, FORMAT, floats=True)
    return WeightOnly(Halves(), usual, rules=rules, ignored=names_of(said, "ignore"), kind=NV)


def _form(weights: Mapping[str, Any]) -> Form:
    expect(weights, "type", ("float",))
    expect(weights, "strategy", ("tensor_group",))
    expect(weights, "scale_dtype", ("torch.float8_e4m3fn",))
    form = Form(integer(weights, "num_bits"), integer(weights, "group_size"))
    refused_unless(
        form == FORM and flag(weights, "symmetric", True),
        f"{FORMAT} weights must be symmetric, of {BITS} bits in groups of {BLOCK}; use another checkpoint",
    )
    refused_unless(
        not weights.get("actorder"), f"actorder of {FORMAT} is not supported; use another checkpoint"
    )
    return form


COMPRESSED[FORMAT] = _compressed
ON_LOAD["nvfp4"] = WeightOnly(Rounded(), FORM, kind=NV)
