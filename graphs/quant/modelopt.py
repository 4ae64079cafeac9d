"""Checkpoints of NVIDIA's Model Optimizer (``modelopt``).

What they hold is said by ``quantization_config`` of config.json, or by ``quantization`` in hf_quant_config.json,
which the reader of folders puts in its place: ``quant_algo`` and the modules that stay wide, in whose names ``*`` may
stand for anything. NVFP4 is in nvfp4.py; of FP8 and INT8 a module has ``weight`` and one ``weight_scale``, or one an
output, and ``input_scale`` where activations have a stored one. Of ``W4A16_AWQ`` it has ``weight[N / 2, K]``, bytes
of two neighbouring outputs, the first in the lower bits, each from -8 to 7, and ``weight_scale[N, K / group_size]``,
which multiplies. Numbers that activations are scaled by: smoothed.py. With ``MIXED_PRECISION`` the object
``quantized_layers`` has a ``quant_algo``, and a ``group_size`` for 4 bits, for every module that is quantized;
modules that are in a named one are as that is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.reads import unrolled
from makeready.graphs.plan.recipe import Derivation, LoadCall, Operand
from makeready.graphs.planner.ir import Program
from makeready.graphs.quant.linears import module_of
from makeready.graphs.quant.nvfp4 import FORM, Halves
from makeready.graphs.quant.reading import (
    flag,
    integer,
    names_of,
    patterns,
    refused_unless,
    tell_cache,
    tell_wide_activations,
)
from makeready.graphs.quant.scheme import CHANNEL, INT8, TENSOR, Quantization, Scheme
from makeready.graphs.quant.stored import STORED
from makeready.graphs.quant.weight_only import NV, Form, WeightOnly, groups_of, stored_rows
from makeready.kernels.nvfp4 import BLOCK

_NARROW, _WEIGHTS_ALONE = ("NVFP4", "NVFP4_AWQ"), "W4A16_NVFP4"  # activations of the first have 4 bits, too
_LAYOUT = Halves("weight", "weight_scale", "weight_scale_2", divides=False)
_EIGHT_BITS = {
    "FP8": Scheme(TENSOR, static=True, stored=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(CHANNEL, stored=True),
    "W8A8_SQ_PER_CHANNEL": Scheme(CHANNEL, static=True, stored=True, dtype=INT8),
}
_AWQ, _MIXED = "W4A16_AWQ", "MIXED_PRECISION"


@dataclass(frozen=True)
class Pairs:
    """Weights of ``W4A16_AWQ``; see the module's docstring."""

    stored = True

    def derivation(self, matrix: Operand, form: Form) -> Derivation:
        """See :class:`~makeready.graphs.quant.weight_only.Layout`."""
        width = int(matrix.spec.shape[1])
        operands = {
            "q": stored_rows(matrix, "weight", width, "uint8", per=2),
            "s": stored_rows(matrix, "weight_scale", groups_of(width, form), "float16"),
        }
        calls = (
            LoadCall("repack_pairs", {"q": "q"}, {"weight": "weight"}),
            LoadCall("tile_scales", {"scale": "s"}, {"tiled": "scale"}),
        )
        return Derivation(operands, calls)

    def order(self, matrix: Operand) -> Operand:
        """Inputs are never ordered."""
        raise NotImplementedError


@dataclass(frozen=True)
class _EightBits(Scheme):
    """FP8 or INT8 of some modules.

    Attributes:
        names: of those, and of what they are in.
    """

    names: frozenset[str] = frozenset()

    def covers(self, module: str) -> bool:
        """See :class:`~makeready.graphs.quant.scheme.Scheme`."""
        return _within(module, self.names) is not None and super().covers(module)


@dataclass(frozen=True)
class _FourBits(WeightOnly):
    """NVFP4 or INT4 of some modules, named as in :class:`_EightBits`."""

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
    if algorithm in _EIGHT_BITS:
        return replace(_EIGHT_BITS[algorithm], ignored=ignored)
    return _few_bits(inner, "", algorithm, ignored)


def _mixed(said: Mapping[str, Any], ignored: tuple[str, ...]) -> Mixed:
    layers = said.get("quantized_layers")
    refused_unless(
        isinstance(layers, Mapping)
        and bool(layers)
        and all(isinstance(one, Mapping) for one in layers.values()),
        f"quantized_layers of modelopt's {_MIXED} must be an object of objects by module; correct the config",
    )
    assert isinstance(layers, Mapping)
    algorithms: dict[str, str] = {}
    found: dict[Scheme | WeightOnly, list[str]] = {}
    for name, own in layers.items():
        algorithms[name] = algorithm = _algorithm(own, f" of {name}")
        if algorithm in _EIGHT_BITS:
            scheme = replace(_EIGHT_BITS[algorithm], ignored=ignored)
        else:
            scheme = _few_bits(own, f" of {name}", algorithm, ignored)
        found.setdefault(scheme, []).append(name)
    parts = [_of_some(scheme, frozenset(names)) for scheme, names in found.items()]
    parts.sort(key=lambda part: isinstance(part, WeightOnly))
    return Mixed(tuple(parts), algorithms)


def _of_some(scheme: Scheme | WeightOnly, names: frozenset[str]) -> Scheme | WeightOnly:
    own = {field.name: getattr(scheme, field.name) for field in fields(scheme)}
    return (_EightBits if isinstance(scheme, Scheme) else _FourBits)(**own, names=names)


def _algorithm(said: Mapping[str, Any], place: str, more: tuple[str, ...] = ()) -> str:
    given = said.get("quant_algo")
    algorithm = given.upper() if isinstance(given, str) else given
    known = (*_NARROW, _WEIGHTS_ALONE, _AWQ, *_EIGHT_BITS, *more)
    refused_unless(
        algorithm in known,
        f"quant_algo {given!r:.80}{place} of modelopt is not supported; use a checkpoint with {' or '.join(known)}",
    )
    assert isinstance(algorithm, str)
    return algorithm


def _few_bits(said: Mapping[str, Any], place: str, algorithm: str, ignored: tuple[str, ...]) -> WeightOnly:
    if algorithm == _AWQ:
        form = Form(bits=4, group=_group(said))
        refused_unless(not form.refusal(), form.refusal())
        refused_unless(
            not flag(said, "has_zero_point", False),
            f"{_AWQ}{place} with zero points is not supported; use a checkpoint with symmetric weights",
        )
        return WeightOnly(Pairs(), form, ignored=ignored)
    size = integer(said, "group_size", usual=BLOCK)
    refused_unless(
        size == BLOCK,
        f"NVFP4 in groups of {size}{place} is not supported; use a checkpoint with groups of {BLOCK}",
    )
    if algorithm in _NARROW:
        tell_wide_activations()
    return WeightOnly(_LAYOUT, FORM, ignored=ignored, kind=NV)


def _group(said: Mapping[str, Any]) -> int:
    """Inputs that share a scale, which newer files say of their weights."""
    groups = (said.get("config_groups") or {}).values()
    own = next((group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)), {})
    return integer({**own, **said}, "group_size")


STORED["modelopt"] = _modelopt
