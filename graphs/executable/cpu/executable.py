"""The CPU executable: interprets a plan's launches over its arena with PyTorch.

It runs the very launch list that a GPU would, at the same arena offsets, with the op references or the
CPU implementations that the plan names. It is the oracle for every other backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cpu.check import check_launches
from makeready.graphs.executable.cpu.memory import check_memory, room_for
from makeready.graphs.executable.cpu.weights import Progress, load_weights
from makeready.graphs.executable.match import check_checkpoint
from makeready.graphs.executable.unowned import Held, unowned
from makeready.graphs.plan import memory
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import Chain, Launch
from makeready.graphs.plan.spec import HOST, Bucket, Field
from makeready.kernels import registry
from makeready.kernels.contract import CONTRACTS
from makeready.kernels.idle_threads import spin_briefly
from makeready.kernels.spec import PAGES, TensorSpec


@dataclass(frozen=True)
class _Bound:
    """A launch with everything looked up: ``call`` reads the operands and writes the results."""

    call: Callable[[], None]
    operands: tuple[torch.Tensor | None, ...]
    results: tuple[torch.Tensor, ...]  # kept for ``call``, which may hold bare addresses


@dataclass(frozen=True)
class _Program:
    """A bucket's launches, the step and result tensors that they read and write, and all values by name."""

    launches: tuple[_Bound, ...]
    step: Mapping[str, torch.Tensor]
    results: Mapping[str, np.ndarray]
    names: Mapping[str, Any]


class _Running:
    """A step, whose results are there when its last launch has run, those named ``early`` at its cut."""

    def __init__(self, program: _Program, early: Sequence[str]) -> None:
        self._left = iter(program.launches)
        self._program = program
        self._early = early
        self._results: Mapping[str, np.ndarray] = {}

    def run(self, count: int | None = None) -> None:
        """Run the next ``count`` launches, or all that are left."""
        for launch in islice(self._left, count):
            launch.call()
        if count is None:
            self._results = {name: array.copy() for name, array in self._program.results.items()}

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._results

    def early(self) -> Mapping[str, np.ndarray]:
        return {name: self._program.results[name].copy() for name in self._early}


class CpuExecutable:
    """A plan for target ``cpu``, or interpreted, loaded. See :class:`makeready.graphs.executable.base.Executable`.

    Args:
        plan: what to run.
        checkpoint: the weights; must be the one that the plan was made for.
        pages: KV pages to allocate, the null page included.
        blocks: blocks of other cache groups; those that are not named get what the plan's limits ask for.
        progress: told how many of how many parameters are loaded.
        interpret: run a plan for another target, too, by the op references that it names: slow, and what
            that target's kernels are held to.

    Raises:
        PlanError: another target's plan, another checkpoint's plan, or a plan of other kernels.
    """

    asynchronous = False

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        *,
        pages: int,
        blocks: Mapping[str, int] | None = None,
        progress: Progress = lambda done, total: None,
        interpret: bool = False,
    ) -> None:
        if plan.target != "cpu" and not interpret:
            raise PlanError(
                f"the plan is for target {plan.target}, this machine runs it as cpu; recompile it"
            )
        check_checkpoint(plan, checkpoint)
        registry.discover()
        check_launches(plan)
        check_memory(plan)
        spin_briefly()
        self.plan = plan
        self.pages = pages
        self.blocks: Mapping[str, int] = {**plan.kv.blocks(pages, plan.limits), **(blocks or {})}
        with room_for(plan, pages):
            self._arena = torch.empty(plan.memory.arena, dtype=torch.uint8)
            self._tensors: dict[str, Any] = dict(load_weights(plan, checkpoint, progress))
            for group in plan.kv.groups:  # zeroed: a page is read up to its last written token only
                for part in group.parts:
                    self._tensors[part.name] = _zeros(part.spec, {PAGES: self.blocks[group.name]})
            self._slots = {f.name: _zeros(f.spec, {}) for f in plan.slots}
            self._step = torch.empty(plan.memory.step, dtype=torch.uint8)
            self._result = torch.empty(plan.memory.result, dtype=torch.uint8)
        self._tensors |= self._slots
        for slot in range(plan.limits.slots):
            self.write_slot(slot, {})
        self._programs: dict[Bucket, _Program] = {}
        self._at_cut: _Running | None = None

    def write_slot(self, slot: int, values: Mapping[str, Any]) -> None:
        unknown = set(values) - set(self._slots)
        assert not unknown, f"slots have no field {unknown}"
        for field in self.plan.slots:
            row = self._slots[field.name][slot]
            if field.keeper == HOST:
                row.fill_(field.default)
            if field.name in values:
                value = torch.as_tensor(values[field.name], dtype=row.dtype)
                if row.dim():
                    row[: len(value)] = value
                else:
                    row.copy_(value)

    @torch.inference_mode()
    def launch(self, bucket: Bucket, step: Mapping[str, np.ndarray], *, cut: bool = False) -> _Running:
        self.resume({})
        running = _Running(self._staged(bucket, step), self.plan.steps[bucket.phase].early)
        running.run(self.plan.cut(bucket.phase) if cut else None)
        self._at_cut = running if cut else None
        return running

    @torch.inference_mode()
    def resume(self, late: Mapping[int, Mapping[str, Any]]) -> None:
        running, self._at_cut = self._at_cut, None
        if running is None:
            return
        for slot, values in late.items():
            for name, value in values.items():
                self._slots[name][slot, : len(value)] = torch.as_tensor(value)
        running.run()

    def calls(self, bucket: Bucket) -> list[Chain]:
        """What a step in ``bucket`` runs, in order: every launch by itself."""
        launches = self.plan.programs[bucket.phase].launches
        return [Chain(launch, at, at + 1) for at, launch in enumerate(launches)]

    def walk(
        self, bucket: Bucket, step: Mapping[str, np.ndarray], stops: Iterable[int] | None = None
    ) -> Iterator[int]:
        """Run a step as :meth:`launch` does, with pauses; see :mod:`makeready.graphs.executable.bisect`.

        Args:
            stops: numbers of launches, rising; None pauses behind each.

        Yields:
            How many launches have run; meanwhile :meth:`peek` and :meth:`poke` see what they left.
        """
        program = self._staged(bucket, step)
        done = 0
        for stop in range(1, len(program.launches) + 1) if stops is None else stops:
            with torch.inference_mode():
                for launch in program.launches[done:stop]:
                    launch.call()
            done = stop
            yield done

    def peek(self, bucket: Bucket, name: str) -> np.ndarray:
        """A copy of the value that launches in ``bucket`` call ``name``, as the bits of its elements.

        Raises:
            KeyError: it is a parameter in a layout of its kernel's own.
        """
        return _bits(self._value(bucket, name)).numpy().copy()

    def poke(self, bucket: Bucket, name: str, bits: np.ndarray) -> None:
        """Set the value that launches in ``bucket`` call ``name``."""
        place = _bits(self._value(bucket, name))
        with torch.inference_mode():
            place.copy_(torch.from_numpy(np.ascontiguousarray(bits)).view(place.dtype))

    def _value(self, bucket: Bucket, name: str) -> torch.Tensor:
        value = self._program(bucket).names[name]
        if not isinstance(value, torch.Tensor):
            raise KeyError(f"{name} is stored in its kernel's layout")
        return value

    def poison(self, held: Sequence[Held] | None = None) -> None:
        """Fill arena, results and the null page with NaN patterns: what a step reads, it must have written.

        Args:
            held: the sequences on the device; whatever belongs to none of them is poisoned as well.
        """
        self._arena.fill_(0xFF)
        self._result.fill_(0xFF)
        for group in self.plan.kv.paged:
            for part in group.parts:
                self._tensors[part.name][0].view(torch.uint8).fill_(0xFF)
        for name, start, stop in () if held is None else unowned(self.plan, self.blocks, held):
            self._tensors[name].view(torch.uint8).flatten()[start:stop] = 0xFF

    def operand(self, bucket: Bucket, op: str, operand: str) -> np.ndarray:
        """A copy of what the first launch of ``op`` in ``bucket`` reads as ``operand``, for comparisons.

        After a step this is what that launch saw, unless a later launch reused the place.
        """
        lowered = self.plan.programs[bucket.phase]
        at = next(i for i, launch in enumerate(lowered.launches) if launch.op == op)
        place = [o.name for o in CONTRACTS[op].inputs].index(operand)
        tensor = self._programs[bucket].launches[at].operands[place]
        assert tensor is not None, f"{op} was launched without {operand}"
        return tensor.float().numpy().copy()

    def close(self) -> None:
        """Let go of weights, cache and arena."""
        self._programs.clear()
        self._tensors.clear()
        self._slots.clear()
        self._arena = self._step = self._result = torch.empty(0, dtype=torch.uint8)

    @torch.inference_mode()
    def _staged(self, bucket: Bucket, step: Mapping[str, np.ndarray]) -> _Program:
        """The bucket's program with the step's fields filled in."""
        if not self._tensors:
            raise PlanError("the model is closed; load it again")
        program = self._program(bucket)
        for name, tensor in program.step.items():
            tensor.copy_(torch.from_numpy(step[name]))
        return program

    def _program(self, bucket: Bucket) -> _Program:
        found = self._programs.get(bucket)
        if found is None:
            found = self._programs[bucket] = self._bind(bucket)
        return found

    def _bind(self, bucket: Bucket) -> _Program:
        """Look up every tensor of the bucket's program once."""
        plan = self.plan
        kind = plan.steps[bucket.phase]
        step = _views(self._step, kind.staged, bucket)
        results = _views(self._result, kind.results, bucket)
        names = {**self._tensors, **step, **results}
        lowered = plan.programs[bucket.phase]
        for name, buffer in lowered.buffers.items():
            names[name] = _view(self._arena, buffer.offset, buffer.spec, bucket.sizes, buffer.row_stride)
        launches = tuple(self._bound(launch, names) for launch in lowered.launches)
        return _Program(launches, step, {name: view.numpy() for name, view in results.items()}, names)

    def _bound(self, launch: Launch, names: Mapping[str, Any]) -> _Bound:
        contract = CONTRACTS[launch.op]
        try:
            kernel = registry.find(launch.op, launch.kernel, self.plan.target)
        except KeyError as error:
            raise PlanError(f"{error.args[0]}; compile the plan again with this version") from None
        operands = tuple(
            names[launch.operands[o.name]] if o.name in launch.operands else None for o in contract.inputs
        )
        results = tuple(names[launch.results[o.name]] for o in contract.outputs)
        return _Bound(kernel.bound(operands, results, launch.attrs), operands, results)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as signed numbers of their width, in place."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _zeros(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    """Zeros that take memory only where they are touched: numpy leaves the clearing to the system."""
    region = torch.from_numpy(np.zeros(spec.nbytes(sizes), np.uint8))
    return region.view(getattr(torch, spec.dtype)).view(spec.at(sizes))


def _view(
    region: torch.Tensor,
    offset: int,
    spec: TensorSpec,
    sizes: Mapping[str, int],
    row_stride: int | None = None,
) -> torch.Tensor:
    """A tensor over bytes ``offset:`` of a region."""
    shape, dtype = spec.at(sizes), getattr(torch, spec.dtype)
    if row_stride is None:
        return region[offset : offset + spec.nbytes(sizes)].view(dtype).view(shape)
    rows, columns = shape
    nbytes = ((rows - 1) * row_stride + columns) * dtype.itemsize
    return region[offset : offset + nbytes].view(dtype).as_strided((rows, columns), (row_stride, 1))


def _views(region: torch.Tensor, fields: tuple[Field, ...], bucket: Bucket) -> dict[str, torch.Tensor]:
    offsets, _ = memory.layout(fields, bucket.sizes)
    return {f.name: _view(region, offsets[f.name], f.spec, bucket.sizes) for f in fields}
