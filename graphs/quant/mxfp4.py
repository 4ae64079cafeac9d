"""gpt-oss's checkpoints: experts in MXFP4 (kernels/mx.py), all else in 16 bits.

Of a projection ``blocks[N, K / 2]`` are bytes of two neighbouring inputs, the first in the lower bits, and
``scales[N, K / 32]`` e8m0; see graphs/checkpoint/stacked.py for how files stack them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.reading import names_of
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import MX, Form, WeightOnly, stored_rows
from makeready.kernels.mx import BITS, BLOCK

_EXPERTS = r".+\.experts\."


@dataclass(frozen=True)
class Blocks:
    """See the module's docstring."""

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`.

        Raises:
            PlanError: inputs are no whole blocks.
        """
        width = int(matrix.spec.shape[1])
        if width % BLOCK:
            raise PlanError(
                f"{module_of(matrix.pieces[0].source)}: {width} inputs are no multiple of MXFP4's blocks of "
                f"{BLOCK}; use a checkpoint with 16-bit weights"
            )
        operands = {
            "q": stored_rows(matrix, "weight_blocks", width // 2, "uint8"),
            "s": stored_rows(matrix, "weight_scales", width // BLOCK, "uint8"),
        }
        calls = (
            LoadCall("repack_bytes", {"q": "q"}, {"weight": "weight"}, {"inputs": width}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
        )
        return Derivation(operands, calls)

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


def _mxfp4(said: Mapping[str, Any]) -> WeightOnly:
    """Experts are MXFP4 but those of ``modules_to_not_convert``, whose names may hold ``*``."""
    named = (re.escape(name).replace(r"\*", "[^.]*") for name in names_of(said, "modules_to_not_convert"))
    ignored = tuple(rf"re:(?:.*\.)?{pattern}(?:\.|$)" for pattern in named)
    rules = ((_EXPERTS, Form(bits=BITS, group=BLOCK)),)
    return WeightOnly(Blocks(), None, rules, ignored=ignored, kind=MX)


STORED["mxfp4"] = _mxfp4
