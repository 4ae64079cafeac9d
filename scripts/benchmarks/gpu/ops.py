"""Single ops timed one like the other: all ways that the planner has, beside a floor and perhaps eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import launcher, rates
from benchmarks.gpu.shapes import copies
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS, Contract
from makeready.kernels.device import Candidate, OpCall

ROTATED = 150e6  # bytes that calls rotate over

Tensors = dict[str, torch.Tensor]
Operands = Mapping[str, torch.Tensor]
Eager = Callable[[Operands], object]


@dataclass(frozen=True)
class Case:
    """A call to time.

    Attributes:
        op, label: name of the contract, and what tells this call from others of it.
        size: tokens or rows.
        make: new operands; which device they are on is settled.
        nbytes: moved, each byte once.
        eager: the same in PyTorch; None where it has nothing like it.
        most: sets of operands that calls rotate over.
    """

    op: str
    label: str
    size: int
    make: Callable[[], Tensors] = field(repr=False)
    attrs: Mapping[str, Any]
    nbytes: float
    eager: Eager | None = field(default=None, repr=False)
    most: int = 16

    @property
    def contract(self) -> Contract:
        """Of the op."""
        return CONTRACTS[self.op]

    def call(self, tensors: Tensors) -> OpCall:
        """The call on such operands."""
        return launcher.op_call(self.contract, tensors, self.attrs)


def candidates(call: OpCall) -> list[Candidate]:
    """All ways of all imported kernels."""
    ways = [way for kernel in registry.cuda_kernels(call.op) for way in kernel.candidates(call)]
    assert ways, f"no kernel for {call}"
    return ways


def calls(cases: Iterable[Case]) -> Iterator[tuple[OpCall, Sequence[Candidate]]]:
    """What is going to run; ``cases`` may be of device meta."""
    for case in cases:
        call = case.call(case.make())
        yield call, candidates(call)


def measure(cases: Iterable[Case], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of every way of every case, beside its floor and eager PyTorch's seconds."""
    found = []
    for case in cases:
        note(f"{case.op} {case.label} {case.size}")
        sets = [case.make() for _ in range(copies(case.nbytes, over=ROTATED, most=case.most))]
        call = case.call(sets[0])
        reps = 20 if case.nbytes < 1e9 else 2
        eager = None if case.eager is None else launcher.time_each(case.eager, sets, reps)
        found += [
            {
                "op": f"{case.op} {case.label}".rstrip(),
                "size": case.size,
                "way": way.name,
                "seconds": launcher.time(way, call, sets, reps),
                "floor": rates.present().floor(case.nbytes),
                "eager": eager,
            }
            for way in candidates(call)
        ]
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """µs, the share of the floor, and eager PyTorch's time over ours."""
    width = max(len(row["op"]) for row in found)
    lines = [f"{'op':{width}} {'size':>6} {'µs':>9} {'floor':>7} {'eager':>7}"]
    for row in found:
        took = row["seconds"]
        eager = "" if row["eager"] is None else f"{row['eager'] / took:.2f}"
        lines.append(
            f"{row['op']:{width}} {row['size']:6} {1e6 * took:9.2f} {row['floor'] / took:7.2f} {eager:>7}  "
            f"{row['way']}"
        )
    return lines
