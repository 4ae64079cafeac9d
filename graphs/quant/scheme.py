"""What is quantized and how: read from a checkpoint, or asked for when a plan is compiled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from makeready.graphs.planner.ir import Program

CHANNEL, TENSOR, BLOCK = "channel", "tensor", "block"
FP8, INT8 = "float8_e4m3fn", "int8"
BLOCK_SIZE = 128  # rows and columns of a block where we choose: DeepSeek-V3's, which kernels are made for


class Quantization(Protocol):
    """What a quantization is to the planner: a rewrite of the traced program.

    It replaces calls and says what the parameters of the new ones are: pieces of the checkpoint, or results of
    derivations (graphs/plan/recipe.py), whose calls may be of any contract.
    """

    @property
    def features(self) -> frozenset[str]:
        """What a GPU must have, of ``Target.features``."""
        ...

    def rewrite(self, program: Program) -> Program:
        """``program`` with quantized calls.

        Raises:
            PlanError: a weight cannot be quantized so.
        """
        ...


@dataclass(frozen=True)
class Scheme:
    """Linears whose weights and activations are 8-bit floats (e4m3) or integers with scales.

    Attributes:
        weights: what shares a scale of the weights: an output ``channel``, the ``tensor``, or a ``block``.
        block: rows and columns of a block, and columns of a token's group of activations; 0 without.
        static: whether one scale of the activations comes with the checkpoint; else each token, or group,
            gets its own while the model runs.
        stored: whether the checkpoint holds 8-bit weights; else they are quantized when they are loaded.
        dtype: of weights and of activations, :data:`FP8` or :data:`INT8`.
        targets: modules that are quantized, named as in ``ignored``; empty: all linears.
        scale: what a stored weight's scale is called in the place of ``weight``.
        ignored: modules that stay as they are, with all below them: names, dotted parts of names
            (``lm_head``, ``layers.0.mlp``), or ``re:`` and a pattern.
    """

    weights: str
    block: int = 0
    static: bool = False
    stored: bool = False
    dtype: str = FP8
    targets: tuple[str, ...] = ()
    scale: str = "weight_scale"
    ignored: tuple[str, ...] = ("lm_head",)

    @property
    def number(self) -> str:
        """What names of ops call the dtype."""
        return "int8" if self.dtype == INT8 else "fp8"

    @property
    def kind(self) -> str:
        """What ops are asked for: those whose contract quantizes another for schemes of this kind."""
        return f"{self.number}_{self.weights}"

    @property
    def features(self) -> frozenset[str]:
        """See :class:`Quantization`."""
        return frozenset({"fp8"} if self.dtype == FP8 else ())

    def rewrite(self, program: Program) -> Program:
        """See :func:`makeready.graphs.quant.eight_bits.quantize_linears`."""
        # Imported here because that module imports this one, under a second name to the type checker.
        from makeready.graphs.quant import eight_bits

        quantize_linears: Any = eight_bits.quantize_linears
        return quantize_linears(program, self)

    def covers(self, module: str) -> bool:
        """Whether the linear of the checkpoint called ``module`` is quantized."""
        wanted = not self.targets or any(matches(entry, module) for entry in self.targets)
        return wanted and not any(matches(entry, module) for entry in self.ignored)

    def group(self, width: int) -> int:
        """Columns of an activation of ``width`` that share a scale."""
        return self.block or width


ON_LOAD: dict[str, Quantization] = {
    "fp8": Scheme(CHANNEL),
    "fp8_block": Scheme(BLOCK, block=BLOCK_SIZE),
    "int8": Scheme(CHANNEL, dtype=INT8),
}
"""What ``quant=`` may ask for; modules of this package add theirs.

The logits' projection keeps its dtype, as is the field's custom.
"""


def matches(entry: str, module: str) -> bool:
    """Whether an entry of a list of modules means this one: a name, dotted parts of it, or ``re:`` and a pattern."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return f".{entry}." in f".{module}."
