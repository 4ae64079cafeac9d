"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel store them.

Of a linear ``qweight[K * bits / 32, N]`` is int32 with neighbouring inputs of an output, the first in the lowest
bits; ``scales[G, N]``; ``qzeros[G, N * bits / 32]`` has neighbouring outputs, in the first format (``gptq``) less
one, modulo ``2 ** bits``, in the second (``gptq_v2``) as they are; ``g_idx[K]`` is the group of each input. A weight
is ``(q - zero) * scale``. Symmetric files hold the middle in all zeros, which are not read.

With ``desc_act`` inputs were quantized in the order of their activations' sizes, and a group's lie anywhere. Then
inputs are put in the order of groups: weights while they are loaded, activations before each projection. Every
projection has an order of its own as far as a plan knows, so that such ones do not merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand, Piece
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.reading import flag, integer, names_of, refused_unless
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import Form, WeightOnly, groups_of, ordered, stored_rows
from makeready.kernels.spec import TensorSpec


@dataclass(frozen=True)
class Gptq:
    """See the module's docstring; ``plus`` is added to stored zeros."""

    plus: int = 1

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        rows, width = (int(n) for n in matrix.spec.shape)
        per, groups = 32 // form.bits, groups_of(width, form)
        refused_unless(
            not (rows % per or width % per),
            f"{module_of(matrix.pieces[0].source)}: {rows} outputs of {width} inputs do not fill words of {per}",
        )
        operands = {
            "q": stored_rows(matrix, "qweight", width // per, "int32", transposed=True),
            "s": stored_rows(matrix, "scales", groups, "float16", transposed=True),
        }
        read = {"q": "q"} | ({"order": "order"} if form.ordered else {})
        calls = [
            LoadCall("repack_rows", read, {"weight": "weight"}, {"bits": form.bits, "inputs": width}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
        ]
        if form.zeros:
            operands["z"] = stored_rows(matrix, "qzeros", groups, "int32", per=per, transposed=True)
            attrs = {"bits": form.bits, "plus": self.plus}
            calls.append(LoadCall("unpack_zeros", {"q": "z"}, {"zero": "zero"}, attrs))
        by = Derivation(operands, tuple(calls))
        return ordered(by, self.order(matrix)) if form.ordered else by

    def order(self, matrix: Operand) -> Operand:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width, (piece, *others) = int(matrix.spec.shape[1]), matrix.pieces
        assert not others, "one tensor, so one table"
        assert not piece.each
        name = f"{module_of(piece.source)}.g_idx"
        return Operand(TensorSpec((width,), "int32"), (Piece(name, ((0, width),), (0,)),))


def _gptq(said: Mapping[str, Any]) -> WeightOnly:
    form = said.get("checkpoint_format") or said.get("format") or "gptq"
    if said.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(
            f"quantization_config: GPTQ's checkpoint_format {form!r} is not supported; "
            "use a checkpoint in format 'gptq' or 'gptq_v2'"
        )
    usual = _form(said, Form(bits=4, group=128, zeros=False))
    inside = said.get("modules_in_block_to_quantize") or []
    refused_unless(
        isinstance(inside, list), "modules_in_block_to_quantize must be a list of names; correct config.json"
    )
    flat = [name for entry in inside for name in (entry if isinstance(entry, list) else [entry])]
    refused_unless(
        all(isinstance(name, str) for name in flat),
        "modules_in_block_to_quantize must be a list of names; correct config.json",
    )
    head = () if flag(said, "lm_head", False) else ("lm_head",)
    return WeightOnly(
        Gptq(plus=int(form == "gptq")),
        usual,
        rules=tuple(_rules(said.get("dynamic") or {}, usual)),
        ignored=(*head, *names_of(said, "modules_to_not_convert")),
        only=(*flat, *(() if head or not flat else ("lm_head",))),
    )


def _form(said: Mapping[str, Any], usual: Form) -> Form:
    group = integer(said, "group_size", usual=usual.group or -1)
    form = Form(
        bits=integer(said, "bits", usual=usual.bits),
        group=max(group, 0),
        zeros=not flag(said, "sym", not usual.zeros),
        ordered=flag(said, "desc_act", usual.ordered),
    )
    refused_unless(not form.refusal(), form.refusal())
    return form


def _rules(dynamic: Any, usual: Form) -> list[tuple[str, Form | None]]:
    """GPTQModel's ``dynamic``: patterns of modules, with ``-:`` those that stay wide, and what differs in them."""
    refused_unless(isinstance(dynamic, Mapping), "dynamic must be an object; correct config.json")
    rules: list[tuple[str, Form | None]] = []
    for pattern, own in dynamic.items():
        if pattern.startswith("-:"):
            rules.append((pattern[2:], None))
            continue
        refused_unless(
            isinstance(own, Mapping), f"dynamic: {pattern!r} must be an object; correct config.json"
        )
        rules.append((pattern.removeprefix("+:"), _form(own, usual)))
    return rules


STORED["gptq"] = STORED["gptq_marlin"] = _gptq
