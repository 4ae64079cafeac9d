"""Activations that are scaled, input by input, before they meet quantized weights (modelopt's ``pre_quant_scale``).

SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) and AWQ (Lin et al. 2023, arXiv:2306.00978) divide the inputs of a
weight by numbers before it is quantized, and multiply activations with them. Where a norm is ahead, exporters may
put the numbers into its weight; where they are in the file, ``pre_quant_scale[K]``, activations are multiplied by an
op of their own. That is exact, which putting them into weights is not: inputs of one scale would differ.

Projections of one input have numbers of their own as far as a plan knows, so that such ones do not merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import unrolled
from makeready.graphs.plan.recipe import Param, Piece
from makeready.graphs.planner.ir import Call, Program
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.scheme import Quantization
from makeready.kernels.contract import Contract
from makeready.kernels.elementwise import scale_columns
from makeready.kernels.spec import TensorSpec

assert isinstance(scale_columns, Contract)

SCALE = ".pre_quant_scale"


@dataclass(frozen=True)
class Smoothed:
    """A quantization (graphs/quant/scheme.py) of weights whose activations are scaled before.

    Attributes:
        scheme: what the weights are.
        modules: of the checkpoint, those that have the numbers.
    """

    scheme: Quantization
    modules: frozenset[str]

    @property
    def features(self) -> frozenset[str]:
        """See :class:`~makeready.graphs.quant.scheme.Quantization`."""
        return self.scheme.features

    def rewrite(self, program: Program) -> Program:
        """``linear(x, w)`` → ``linear(scale_columns(x, s), w)`` where the weight's module has ``s``, then the scheme.

        Raises:
            PlanError: anything but one projection has them, such as experts.
        """
        params: dict[str, Param] = {}
        calls: list[Call] = []
        for call in program.calls:
            for param in (program.params.get(value) for value in call.operands.values()):
                modules = {} if param is None else self._modules(param)
                if param is None or not any(modules.values()):
                    continue
                if call.op != "linear" or len(modules) > 1:
                    raise PlanError(
                        f"{min(modules)} has pre_quant_scale and is no projection by itself, as experts and what is "
                        "fused are none; use a checkpoint that was quantized without it"
                    )
                (module,) = modules
                scale, x = _scale(param, module), call.operands["x"]
                params[scale.name] = scale
                made = f"{x}.of.{param.name}"
                calls.append(Call("scale_columns", {"x": x, "scale": scale.name}, {"y": made}))
                call = replace(call, operands={**call.operands, "x": made})
            calls.append(call)
        return self.scheme.rewrite(program.with_calls(calls, params))

    def _modules(self, param: Param) -> dict[str, bool]:
        """The modules that a parameter is made of, and whether each has the numbers."""
        sources = {read.source for piece in param.pieces for read in unrolled(piece)}
        weights = {module_of(source) for source in sources if source != module_of(source)}
        return {module: module in self.modules for module in weights}


def _scale(param: Param, module: str) -> Param:
    width = int(param.spec.shape[-1])
    piece = Piece(f"{module}{SCALE}", ((0, width),), (0,))
    name = f"{param.name.removesuffix('.weight')}{SCALE}"
    return Param(name, TensorSpec((width,), "float32"), pieces=(piece,))


def smoothed(scheme: Quantization, tensors: Iterable[str]) -> Quantization:
    """``scheme``, for a checkpoint with these tensors."""
    modules = frozenset(name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE))
    return Smoothed(scheme, modules) if modules else scheme
