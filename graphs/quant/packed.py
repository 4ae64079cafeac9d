"""Weights of 4 or 8 bits as compressed-tensors stores them (``pack-quantized``).

Of a linear ``weight_packed[N, ceil(K * bits / 32)]`` is int32 with neighbouring inputs, the first in the lowest bits;
``weight_scale[N, G]``; ``weight_zero_point[ceil(N * bits / 32), G]``, where weights are not symmetric, has
neighbouring outputs. Signed numbers are stored plus ``2 ** (bits - 1)``. ``weight_g_idx[K]`` is the group of each
input where ``actorder`` is ``group``; ``weight_shape`` is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand, Piece
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.reading import (
    expect,
    flag,
    integer,
    names_of,
    refused_unless,
    tell_wide_activations,
)
from makeready.graphs.quant.stored import COMPRESSED
from makeready.graphs.quant.weight_only import Form, WeightOnly, groups_of, ordered, stored_rows
from makeready.kernels.spec import TensorSpec

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Packed:
    """See the module's docstring."""

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width = int(matrix.spec.shape[1])
        groups, words = groups_of(width, form), -(-width * form.bits // 32)
        operands = {
            "q": stored_rows(matrix, "weight_packed", words, "int32"),
            "s": stored_rows(matrix, "weight_scale", groups, "float16"),
        }
        read = {"q": "q"} | ({"order": "order"} if form.ordered else {})
        calls = [
            LoadCall("repack_rows", read, {"weight": "weight"}, {"bits": form.bits, "inputs": width}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
        ]
        if form.zeros:
            per = 32 // form.bits
            operands["z"] = stored_rows(matrix, "weight_zero_point", groups, "int32", per=per)
            calls.append(LoadCall("unpack_zeros", {"q": "z"}, {"zero": "zero"}, {"bits": form.bits}))
        by = Derivation(operands, tuple(calls))
        return ordered(by, self.order(matrix)) if form.ordered else by

    def order(self, matrix: Operand) -> Operand:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width, (piece, *others) = int(matrix.spec.shape[1]), matrix.pieces
        assert not others, "one tensor, so one table"
        assert not piece.each
        name = f"{module_of(piece.source)}.weight_g_idx"
        return Operand(TensorSpec((width,), "int32"), (Piece(name, ((0, width),), (0,)),))


def forms_of(
    said: Mapping[str, Any], form_of: Callable[[Mapping[str, Any]], Form], name: str, *, floats: bool = False
) -> tuple[Form | None, tuple[tuple[str, Form | None], ...]]:
    """What a config of the format ``name`` says of all linears, and of some by patterns; see :class:`WeightOnly`.

    Args:
        form_of: the form that the ``weights`` of one of ``config_groups`` have.
        floats: weights are 4-bit floats, and it may say that activations are, too, which are left as they are.

    Raises:
        UnsupportedModelError: what nothing here computes.
    """
    rules: list[tuple[str, Form | None]] = []
    usual: Form | None = None
    for group in (said.get("config_groups") or {}).values():
        expect(group, "format", (name,))
        form = form_of(_weights(group, name, floats))
        for target in names_of(group, "targets"):
            if target == "Linear":
                refused_unless(
                    usual is None, "two of config_groups have the target Linear; correct config.json"
                )
                usual = form
            else:
                rules.append((target[3:] if target.startswith("re:") else f"{re.escape(target)}$", form))
    for field in ("transform_config", "sparsity_config"):
        found = said.get(field)
        dense = field == "sparsity_config" and (not found or found.get("format", "dense") == "dense")
        refused_unless(not found or dense, f"{field} is not supported; use a checkpoint without it")
    refused_unless(usual is not None or bool(rules), "config_groups name no targets; correct config.json")
    return usual, tuple(rules)


def _weights(group: Mapping[str, Any], name: str, floats: bool) -> Mapping[str, Any]:
    given = group.get("input_activations")
    narrow = (
        floats and isinstance(given, Mapping) and (given.get("num_bits"), given.get("type")) == (4, "float")
    )
    for field in ("input_activations", "output_activations"):
        refused_unless(
            not group.get(field) or (field == "input_activations" and narrow),
            f"{field} beside {name} weights are not supported; use a checkpoint without them",
        )
    if narrow:
        tell_wide_activations(4)
    weights = group.get("weights")
    refused_unless(isinstance(weights, Mapping), "weights must be an object; correct config.json")
    assert isinstance(weights, Mapping)
    return weights


def _packed(said: Mapping[str, Any]) -> WeightOnly:
    usual, rules = forms_of(said, _form, FORMAT)
    return WeightOnly(Packed(), usual, rules=rules, ignored=names_of(said, "ignore"))


def _form(weights: Mapping[str, Any]) -> Form:
    expect(weights, "type", ("int",))
    expect(weights, "strategy", ("group", "channel"))
    order = weights.get("actorder")
    order = "group" if order is True else order or "weight"
    refused_unless(
        order in ("group", "dynamic", "weight", "static"),
        f"actorder {order!r} is not supported; use a checkpoint with 'group' or 'weight'",
    )
    by_group = weights.get("strategy", "channel") == "group"
    form = Form(
        bits=integer(weights, "num_bits"),
        group=integer(weights, "group_size") if by_group else 0,
        zeros=not flag(weights, "symmetric", True),
        ordered=by_group and order in ("group", "dynamic"),
    )
    refused_unless(not form.refusal(), form.refusal())
    return form


COMPRESSED[FORMAT] = _packed
