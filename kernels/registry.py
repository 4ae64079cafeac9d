"""Implementations of op contracts, and the choice among them.

Every op has its reference on every target. A module named ``*_cpu.py`` holds implementations for the CPU,
registered by :func:`kernel`; the parity tests find them here and hold them to the reference.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

import makeready.kernels
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.spec import TensorSpec

REFERENCE = "reference"

Applies: TypeAlias = Callable[[Mapping[str, TensorSpec], Mapping[str, Any]], bool]


Operands: TypeAlias = Sequence[Any]  # tensors, packed parameters, None for absent optionals
Bind: TypeAlias = Callable[[Operands, Sequence[torch.Tensor], Mapping[str, Any]], Callable[[], None] | None]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        run: same operands, attributes and results as the contract's reference.
        layouts: operands that are parameters and must be stored in another layout than ``rows``.
        applies: whether it handles given operand specs and attributes.
        bind: given the operands and results of a launch, whose places stay, a call that writes the results
            in place; None where ``run`` and a copy of what it makes are to be used instead. The call may hold
            bare addresses: whoever makes it keeps the tensors.
    """

    op: str
    name: str
    target: str
    run: Callable[..., Any] = field(repr=False)
    layouts: Mapping[str, str] = field(default_factory=dict)
    applies: Applies = field(default=lambda specs, attrs: True, repr=False)
    bind: Bind = field(default=lambda operands, results, attrs: None, repr=False)

    def bound(
        self, operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
    ) -> Callable[[], None]:
        """A call that reads ``operands`` and writes ``results``, as often as it is made."""
        return self.bind(operands, results, attrs) or self._copying(operands, results, attrs)

    def _copying(
        self, operands: Operands, results: Sequence[torch.Tensor], attrs: Mapping[str, Any]
    ) -> Callable[[], None]:
        def call() -> None:
            made = self.run(*operands, **attrs)
            if len(results) == 1:
                results[0].copy_(made)
            elif results:
                for result, value in zip(results, made, strict=True):
                    result.copy_(value)

        return call


_KERNELS: dict[tuple[str, str], list[Kernel]] = {}


def kernel(
    contract: Contract,
    name: str,
    *,
    target: str,
    layouts: Mapping[str, str] | None = None,
    applies: Applies | None = None,
    bind: Bind | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an implementation of ``contract`` for ``target``."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        given = {"applies": applies, "bind": bind}
        optional: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        made = Kernel(contract.name, name, target, run, layouts or {}, **optional)
        _KERNELS.setdefault((target, contract.name), []).append(made)
        return run

    return register


def discover() -> None:
    """Import every module of kernels/, so that all contracts and implementations are registered."""
    for module in pkgutil.walk_packages(makeready.kernels.__path__, "makeready.kernels."):
        if module.name == "makeready.kernels._cpu_ops":  # a plain library, see native.py
            continue
        importlib.import_module(module.name)


def kernels(op: str, target: str) -> tuple[Kernel, ...]:
    """All implementations of ``op`` for ``target``, the reference last."""
    reference = Kernel(op, REFERENCE, target, CONTRACTS[op].reference)
    return (*_KERNELS.get((target, op), ()), reference)


def choose(op: str, target: str, specs: Mapping[str, TensorSpec], attrs: Mapping[str, Any]) -> Kernel:
    """The first implementation that applies."""
    return next(k for k in kernels(op, target) if k.applies(specs, attrs))


def find(op: str, name: str, target: str) -> Kernel:
    """The implementation called ``name``.

    Raises:
        KeyError: there is none; a plan asks for a kernel of another version of the code.
    """
    for candidate in kernels(op, target):
        if candidate.name == name:
            return candidate
    raise KeyError(f"no kernel {op}/{name} for target {target}")
