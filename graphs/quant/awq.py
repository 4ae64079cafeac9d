"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978) in AutoAWQ's ``gemm`` layout.

Of a linear ``qweight[K, N / 8]`` and ``qzeros[G, N / 8]`` are int32, each with 8 outputs, of which field i is
the ``0 2 4 6 1 3 5 7``-th; ``scales[G, N]``. A weight is ``(q - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.models.family import UnsupportedModelError
from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.quant.reading import integer, names_of, refused_unless
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import Form, WeightOnly, groups_of, stored_rows

_PER = 8  # outputs of an int32


@dataclass(frozen=True)
class Awq:
    """See the module's docstring."""

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width = int(matrix.spec.shape[1])
        groups = groups_of(width, form)
        operands = {
            "q": stored_rows(matrix, "qweight", width, "int32", per=_PER, transposed=True),
            "s": stored_rows(matrix, "scales", groups, "float16", transposed=True),
            "z": stored_rows(matrix, "qzeros", groups, "int32", per=_PER, transposed=True),
        }
        calls = (
            LoadCall("repack_awq", {"q": "q"}, {"weight": "weight"}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
            LoadCall("unpack_zeros", {"q": "z"}, {"zero": "zero"}, {"bits": 4, "awq": True}),
        )
        return Derivation(operands, calls)

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


def _awq(said: Mapping[str, Any]) -> WeightOnly:
    version = said.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnsupportedModelError(
            f"quantization_config: AWQ's version {version!r} is not supported; use a checkpoint in version 'gemm'"
        )
    bits, group = integer(said, "bits", "w_bit"), integer(said, "group_size", "q_group_size")
    refused_unless(bits == 4, f"AWQ with {bits} bits is not supported; use a checkpoint with 4")
    form = Form(bits=4, group=max(group, 0), zeros=True)
    refused_unless(not form.refusal(), form.refusal())
    return WeightOnly(Awq(), form, ignored=("lm_head", *names_of(said, "modules_to_not_convert")))


STORED["awq"] = STORED["awq_marlin"] = _awq
