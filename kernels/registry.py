"""Implementations of op contracts, and the choice among them.

Every op has its reference on every target. A module named ``*_cpu.py`` holds implementations for the CPU,
registered by :func:`kernel`; the parity tests find them here and hold them to the reference. A module named
``*_triton.py`` holds implementations for CUDA targets, registered by :func:`cuda_kernel`: functions that
run when a plan is made and say what the GPU shall launch.
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
from makeready.kernels.device import Candidate, OpCall
from makeready.kernels.spec import TensorSpec

REFERENCE, BY_ROWS = "reference", "reference_by_rows"

Applies: TypeAlias = Callable[[Mapping[str, TensorSpec], Mapping[str, Any]], bool]


Operands: TypeAlias = Sequence[Any]  # tensors, packed parameters, None for absent optionals
Bind: TypeAlias = Callable[[Operands, Sequence[torch.Tensor], Mapping[str, Any]], Callable[[], None] | None]


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        run: same operands, attributes and results as the contract's reference.
        layouts: operands that are parameters and must be stored in another layout than ``rows``.
        invariant: what it makes of a row depends on that row alone, to the last bit: not on how many there are,
            on its place, or on the others. A deterministic plan takes no other kernel.
        ordinary: whether other plans may take it.
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
    invariant: bool = False
    ordinary: bool = True
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


Emit: TypeAlias = Callable[[OpCall], Sequence[Candidate]]


@dataclass(frozen=True)
class CudaKernel:
    """One implementation of an op for CUDA targets.

    Attributes:
        emit: ways to run a call, best first by its own model of cost; none where it cannot.
        invariant: whether ``emit`` honours :attr:`~.device.OpCall.invariant`.
        features: what the target must have, of ``OpCall.features``.
        applies: whether it handles a call.
        tuned_only: whether it was not timed on hardware as it is now, or was slower. A plan runs it only where it
            carries several candidates (``plan.candidates``), behind the others, and it was measured to be faster.
    """

    op: str
    name: str
    emit: Emit = field(repr=False)
    features: frozenset[str]
    applies: Callable[[OpCall], bool] = field(repr=False)
    invariant: bool = False
    tuned_only: bool = False

    def candidates(self, call: OpCall) -> Sequence[Candidate]:
        """Ways to run ``call``, best first; none where the target or the call is not for it."""
        fits = self.features <= call.features and self.applies(call)
        return self.emit(call) if fits and (self.invariant or not call.invariant) else ()


_KERNELS: dict[tuple[str, str], list[Kernel]] = {}
_CUDA_KERNELS: dict[str, list[CudaKernel]] = {}


def kernel(
    contract: Contract,
    name: str,
    *,
    target: str,
    layouts: Mapping[str, str] | None = None,
    invariant: bool = False,
    ordinary: bool = True,
    applies: Applies | None = None,
    bind: Bind | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an implementation of ``contract`` for ``target``."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        given = {"applies": applies, "bind": bind}
        optional: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        made = Kernel(contract.name, name, target, run, layouts or {}, invariant, ordinary, **optional)
        _KERNELS.setdefault((target, contract.name), []).append(made)
        return run

    return register


def cuda_kernel(
    contract: Contract,
    name: str,
    *,
    features: Sequence[str] = (),
    applies: Callable[[OpCall], bool] | None = None,
    invariant: bool = False,
    tuned_only: bool = False,
) -> Callable[[Emit], Emit]:
    """Register the decorated function as an implementation of ``contract`` for CUDA targets.

    Among implementations that apply the one registered first is preferred; ``applies`` keeps them apart. For
    ``tuned_only`` see :class:`CudaKernel`.
    """

    def register(emit: Emit) -> Emit:
        known = _CUDA_KERNELS.setdefault(contract.name, [])
        if any(k.name == name for k in known):
            raise TypeError(f"CUDA kernel {contract.name}/{name} is registered twice")
        always = applies or (lambda call: True)
        known.append(
            CudaKernel(contract.name, name, emit, frozenset(features), always, invariant, tuned_only)
        )
        return emit

    return register


def discover(target: str = "cpu") -> None:
    """Import every module of kernels/, so that all contracts and implementations for ``target`` are registered.

    Modules named ``*_triton`` import Triton and are left out for the CPU.
    """
    for module in pkgutil.walk_packages(makeready.kernels.__path__, "makeready.kernels."):
        if module.name == "makeready.kernels._cpu_ops":  # a plain library, see native.py
            continue
        if target != "cpu" or not module.name.endswith("_triton"):
            importlib.import_module(module.name)


def cuda_kernels(op: str) -> tuple[CudaKernel, ...]:
    """All discovered implementations of ``op`` for CUDA targets, in the order of their registration."""
    return tuple(_CUDA_KERNELS.get(op, ()))


def kernels(op: str, target: str) -> tuple[Kernel, ...]:
    """All implementations of ``op`` for ``target``; after those of its own the reference, whole and by rows."""
    contract = CONTRACTS[op]
    found = [*_KERNELS.get((target, op), ())]
    # Where results are exact, whatever order they are computed in gives the same.
    found.append(Kernel(op, REFERENCE, target, contract.reference, invariant=contract.tolerance.exact))
    if contract.rowwise and not contract.tolerance.exact:
        found.append(
            Kernel(op, BY_ROWS, target, by_rows(contract, contract.reference), invariant=True, ordinary=False)
        )
    return tuple(found)


def by_rows(contract: Contract, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` for one row of a row-wise op after the other.

    PyTorch's vectors cross rows and threads cut them anywhere, and some of its functions give an element of a
    vector other bits than one that is left over. A row by itself, at an address of its own alignment, is always
    computed alike.
    """
    names = [operand.name for operand in contract.inputs]
    sliced = {operand.name for operand in contract.inputs if operand.axes[0] == contract.rowwise}

    def call(*operands: Any, **attrs: Any) -> Any:
        given = dict(zip(names, operands, strict=False))
        rows = len(next(given[name] for name in names if name in sliced))
        made = [
            run(
                *(x[r : r + 1].clone() if n in sliced and x is not None else x for n, x in given.items()),
                **attrs,
            )
            for r in range(rows)
        ]
        if len(contract.outputs) == 1:
            return torch.cat(made)
        return tuple(torch.cat(parts) for parts in zip(*made, strict=True))

    return call


def choose(
    op: str,
    target: str,
    specs: Mapping[str, TensorSpec],
    attrs: Mapping[str, Any],
    *,
    invariant: bool = False,
) -> Kernel:
    """The first implementation that applies, of those that are ``invariant`` where that is asked for.

    Raises:
        LookupError: none of them is.
    """
    for found in kernels(op, target):
        if (found.invariant if invariant else found.ordinary) and found.applies(specs, attrs):
            return found
    raise LookupError(f"{op} has no invariant kernel for target {target}")


def find(op: str, name: str, target: str) -> Kernel:
    """The implementation called ``name``.

    Raises:
        KeyError: there is none; a plan asks for a kernel of another version of the code.
    """
    for candidate in kernels(op, target):
        if candidate.name == name:
            return candidate
    raise KeyError(f"no kernel {op}/{name} for target {target}")
