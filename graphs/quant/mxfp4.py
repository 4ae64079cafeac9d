"""Weights in MXFP4 (kernels/mx.py): as gpt-oss and compressed-tensors store them, and made while they are loaded.

Of a projection ``[N, K / 2]`` are bytes of two neighbouring inputs, the first in the lower bits, and ``[N, K / 32]``
scales, e8m0. gpt-oss, whose experts alone are stored so, calls them ``weight_blocks`` and ``weight_scales`` (see
graphs/checkpoint/stacked.py for how files stack them); compressed-tensors (``mxfp4-pack-quantized``) has
``weight_packed`` and ``weight_scale``; quark.py reads AMD's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.quant.packed import forms_of
from makeready.graphs.quant.reading import expect, flag, integer, names_of, refused_unless
from makeready.graphs.quant.scheme import ON_LOAD
from makeready.graphs.quant.stored import COMPRESSED, STORED
from makeready.graphs.quant.weight_only import MX, Form, WeightOnly, stored_rows, width_of
from makeready.kernels.integers import TILE
from makeready.kernels.mx import BITS, BLOCK

FORMAT = "mxfp4-pack-quantized"
_EXPERTS = r".+\.experts\."
FORM = Form(bits=BITS, group=BLOCK)


@dataclass(frozen=True)
class Blocks:
    """See the module's docstring.

    Attributes:
        numbers, scales: what they are called in the place of ``weight``.
    """

    numbers: str = "weight_blocks"
    scales: str = "weight_scales"

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`.

        Raises:
            PlanError: inputs are no whole blocks.
        """
        width = width_of(matrix, BLOCK, "MXFP4")
        operands = {
            "q": stored_rows(matrix, self.numbers, width // 2, "uint8"),
            "s": stored_rows(matrix, self.scales, width // BLOCK, "uint8"),
        }
        calls = (
            LoadCall("repack_bytes", {"q": "q"}, {"weight": "weight"}, {"inputs": width}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
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
        call = LoadCall("quantize_mx", {"x": "x"}, {"weight": "weight", "scale": "scale"})
        return Derivation({"x": replace(matrix, unit=TILE)}, (call,))

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


def _mxfp4(said: Mapping[str, Any]) -> WeightOnly:
    """Experts are MXFP4 but those of ``modules_to_not_convert``, whose names may hold ``*``."""
    named = (re.escape(name).replace(r"\*", "[^.]*") for name in names_of(said, "modules_to_not_convert"))
    ignored = tuple(rf"re:(?:.*\.)?{pattern}(?:\.|$)" for pattern in named)
    rules = ((_EXPERTS, FORM),)
    return WeightOnly(Blocks(), None, rules, ignored=ignored, kind=MX)


def _compressed(said: Mapping[str, Any]) -> WeightOnly:
    usual, rules = forms_of(said, _form, FORMAT, floats=True)
    layout = Blocks("weight_packed", "weight_scale")
    return WeightOnly(layout, usual, rules=rules, ignored=names_of(said, "ignore"), kind=MX)


def _form(weights: Mapping[str, Any]) -> Form:
    expect(weights, "type", ("float",))
    expect(weights, "strategy", ("group",))
    expect(weights, "scale_dtype", ("torch.uint8",))
    form = Form(integer(weights, "num_bits"), integer(weights, "group_size"))
    refused_unless(
        form == FORM and flag(weights, "symmetric", True),
        f"{FORMAT} weights must be symmetric, of {BITS} bits in groups of {BLOCK}; use another checkpoint",
    )
    refused_unless(
        not weights.get("actorder"), f"actorder of {FORMAT} is not supported; use another checkpoint"
    )
    return form


STORED["mxfp4"] = _mxfp4
COMPRESSED[FORMAT] = _compressed
ON_LOAD["mxfp4"] = WeightOnly(Rounded(), FORM, kind=MX)
