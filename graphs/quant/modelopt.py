"""Checkpoints of NVIDIA's Model Optimizer (``modelopt``).

What they hold is said by ``quantization_config`` of config.json, or by ``quantization`` in
hf_quant_config.json, which the reader of folders puts in its place: ``quant_algo`` and the modules that stay
wide, in whose names ``*`` may stand for anything. NVFP4 is in nvfp4.py; of FP8 a module has ``weight`` and one
``weight_scale``, or one an output, and ``input_scale`` where activations have a stored one. With ``MIXED_PRECISION``
the object ``quantized_layers`` has a ``quant_algo``, and a ``group_size`` for NVFP4, for every module that is
quantized; modules that are in a named one are as that is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import unrolled
from makeready.graphs.planner.ir import Program
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.nvfp4 import FORM, Halves
from makeready.graphs.quant.reading import (
    integer,
    names_of,
    patterns,
    refused_unless,
    tell_cache,
    tell_wide_activations,
)
from makeready.graphs.quant.scheme import CHANNEL, TENSOR, Quantization, Scheme
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import NV, Form, WeightOnly
from makeready.kernels.nvfp4 import BLOCK

_NVFP4, _WEIGHTS_ALONE = "NVFP4", "W4A16_NVFP4"
_LAYOUT = Halves("weight", "weight_scale", "weight_scale_2", divides=False)
_FP8 = {
    "FP8": (TENSOR, True),
    "FP8_PER_CHANNEL_PER_TOKEN": (CHANNEL, False),
}  # what shares a scale, and whether activations have a stored one


_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class _Floats8(Scheme):
    """FP8 of some modules.

    Attributes:
        names: of those, and of what they are in.
    """

    names: frozenset[str] = frozenset()

    def covers(self, module: str) -> bool:
        """See :class:`~makeready.graphs.quant.scheme.Scheme`."""
        return _within(module, self.names) is not None and super().covers(module)


@dataclass(frozen=True)
class _Floats4(WeightOnly):
    """NVFP4 of some modules, named as in :class:`_Floats8`."""

    names: frozenset[str] = frozenset()

    def of(self, module: str) -> Form | None:
        """See :class:`~makeready.graphs.quant.weight_only.WeightOnly`."""
        return super().of(module) if _within(module, self.names) is not None else None


@dataclass(frozen=True)
class Mixed:
    """A quantization of several, each of its own modules.

    Attributes:
        algorithms: by the name of a module, or of what it is in.
    """

    parts: tuple[Scheme | WeightOnly, ...]
    algorithms: Mapping[str, str]

    @property
    def features(self) -> frozenset[str]:
        """See :class:`~makeready.graphs.quant.scheme.Quantization`."""
        return frozenset().union(*(part.features for part in self.parts))

    def rewrite(self, program: Program) -> Program:
        """See :class:`~makeready.graphs.quant.scheme.Quantization`.

        Raises:
            PlanError: parts of one weight are quantized differently.
        """
        for param in program.params.values():
            modules = {module_of(read.source) for piece in param.pieces for read in unrolled(piece)}
            found = {self.algorithms.get(_within(module, self.algorithms) or "") for module in modules}
            if len(found) > 1:
                raise PlanError(
                    f"{min(modules)} and what is used with it are quantized differently; "
                    "use a checkpoint whose experts are quantized alike"
                )
        for part in self.parts:
            program = part.rewrite(program)
        return program


def _within(module: str, names: Container[str]) -> str | None:
    """The name of the module, or of what it is in, that is among ``names``."""
    parts = module.split(".")
    ends = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in ends if name in names), None)


def _modelopt(said: Mapping[str, Any]) -> Quantization:
    inner = said.get("quantization") or said
    refused_unless(isinstance(inner, Mapping), "quantization must be an object; correct hf_quant_config.json")
    algorithm = _algorithm(inner, "", (_MIXED,))
    ignored = patterns((*names_of(inner, "exclude_modules"), *names_of(inner, "ignore")))
    if inner.get("kv_cache_quant_algo"):
        tell_cache()
    if algorithm == _MIXED:
        return _mixed(inner, ignored)
    if algorithm in _FP8:
        weights, static = _FP8[algorithm]
        return Scheme(weights, static=static, stored=True, ignored=ignored)
    _check_block(inner, "", algorithm)
    return WeightOnly(_LAYOUT, FORM, ignored=ignored, kind=NV)


def _mixed(said: Mapping[str, Any], ignored: tuple[str, ...]) -> Mixed:
    layers = said.get("quantized_layers")
    refused_unless(
        isinstance(layers, Mapping)
        and bool(layers)
        and all(isinstance(one, Mapping) for one in layers.values()),
        f"quantized_layers of modelopt's {_MIXED} must be an object of objects by module; correct the config",
    )
    assert isinstance(layers, Mapping)
    found: dict[str, str] = {}
    for name, own in layers.items():
        found[name] = _algorithm(own, f" of {name}")
        if found[name] not in _FP8:
            _check_block(own, f" of {name}", found[name])
    parts: list[Scheme | WeightOnly] = []
    for algorithm, (weights, static) in _FP8.items():
        names = frozenset(name for name, its in found.items() if its == algorithm)
        if names:
            parts.append(_Floats8(weights, static=static, stored=True, ignored=ignored, names=names))
    names = frozenset(name for name, its in found.items() if its not in _FP8)
    if names:
        parts.append(_Floats4(_LAYOUT, FORM, ignored=ignored, kind=NV, names=names))
    return Mixed(tuple(parts), found)


def _algorithm(said: Mapping[str, Any], place: str, more: tuple[str, ...] = ()) -> str:
    given = said.get("quant_algo")
    algorithm = given.upper() if isinstance(given, str) else given
    known = (_NVFP4, _WEIGHTS_ALONE, *_FP8, *more)
    refused_unless(
        algorithm in known,
        f"quant_algo {given!r:.80}{place} of modelopt is not supported; use a checkpoint with {' or '.join(known)}",
    )
    assert isinstance(algorithm, str)
    return algorithm


def _check_block(said: Mapping[str, Any], place: str, algorithm: str) -> None:
    size = integer(said, "group_size", usual=BLOCK)
    refused_unless(
        size == BLOCK,
        f"NVFP4 in groups of {size}{place} is not supported; use a checkpoint with groups of {BLOCK}",
    )
    if algorithm == _NVFP4:
        tell_wide_activations()


STORED["modelopt"] = _modelopt
