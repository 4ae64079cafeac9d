"""Checkpoints side by side (graphs/checkpoint/paired.py), each with a quantization of its own.

A scheme knows its tensors by the names that its own file has. So each is shown a program in which the parameters of
its part have these names, and all others are out of its reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from makeready.graphs.plan.recipe import Operand, Param, Piece
from makeready.graphs.planner.ir import Program
from makeready.graphs.quant.scheme import Quantization

_BESIDE = "beside."  # before names of tensors that are no part's


@dataclass(frozen=True)
class ByPart:
    """A quantization (graphs/quant/scheme.py) of several.

    Attributes:
        parts: what the names of a checkpoint's tensors begin with, empty for one of them, and its quantization; None:
            it stays wide.
    """

    parts: Mapping[str, Quantization | None]

    @property
    def features(self) -> frozenset[str]:
        """See :class:`~makeready.graphs.quant.scheme.Quantization`."""
        return frozenset().union(*(scheme.features for scheme in self.parts.values() if scheme is not None))

    def rewrite(self, program: Program) -> Program:
        """See :class:`~makeready.graphs.quant.scheme.Quantization`."""
        for prefix, scheme in self.parts.items():
            if scheme is not None:
                program = self._rewritten(program, prefix, scheme)
        return program

    def _rewritten(self, program: Program, prefix: str, scheme: Quantization) -> Program:
        others = {n: p for n, p in program.params.items() if self._part(p) != prefix}
        hidden = {n: replace(_named(p, lambda s: _BESIDE + s), quantizable=False) for n, p in others.items()}
        own = {
            n: _named(p, lambda s: s.removeprefix(prefix))
            for n, p in program.params.items()
            if n not in others
        }
        made = scheme.rewrite(replace(program, params=hidden | own))
        params = {n: others.get(n) or _named(p, lambda s: prefix + s) for n, p in made.params.items()}
        return replace(made, params=params)

    def _part(self, param: Param) -> str | None:
        """The longest prefix of all that a parameter is read from; None where it is read from nothing."""
        sources = [piece.source for operand in param.operands for piece in operand.pieces]
        return (
            max((p for p in self.parts if all(s.startswith(p) for s in sources)), key=len)
            if sources
            else None
        )


def _named(param: Param, name: Callable[[str], str]) -> Param:
    """``param`` with other names of tensors."""

    def pieces(given: tuple[Piece, ...]) -> tuple[Piece, ...]:
        return tuple(replace(piece, source=name(piece.source)) for piece in given)

    def operand(given: Operand) -> Operand:
        return replace(given, pieces=pieces(given.pieces))

    if param.derived is None:
        return replace(param, pieces=pieces(param.pieces))
    by = param.derived.by
    by = replace(by, operands={key: operand(given) for key, given in by.operands.items()})
    return replace(param, derived=replace(param.derived, by=by))


def by_part(parts: Mapping[str, Quantization | None]) -> Quantization | None:
    """One quantization for all parts; None where all stay wide."""
    first, *others = parts.values()
    if all(scheme is first for scheme in others):
        return first
    return ByPart(parts)
