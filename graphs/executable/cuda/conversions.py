"""Parameters that are derived on their way in: boxes to a place of the arena, kernels from there to the weights.

A plan says what runs (``Plan.loading``). Here its runs become tasks for the threads that load weights: the
operands' boxes are read, converted to the dtype that launches want where they are stored in another, and copied
to a free place; the launches read them there. A place is free again when they ended.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cuda.convert import runs
from makeready.graphs.executable.cuda.driver import Driver, Function
from makeready.graphs.executable.cuda.graph import GraphBuilder, PreparedNode
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.program import Conversion, Loading
from makeready.graphs.plan.recipe import CHUNK_BYTES


class Lane(Protocol):
    """One thread's way to the device."""

    stream: Any

    def push(self, source: np.ndarray, target: int) -> None:
        """Copy the bytes of a contiguous array to ``target`` bytes from the weights region's start."""
        ...

    def drain(self) -> None:
        """Wait for the stream."""
        ...


@dataclass(frozen=True)
class LoadRun:
    """One run of a load program.

    Attributes:
        program: its number in :attr:`Loading.programs`.
        reads: what makes bytes of operands, and the byte of the place where they go.
        results: byte offset in the weights region of each result, by its name in the derivation.
        weights: indices of the parameters that are made.
    """

    program: int
    reads: tuple[tuple[Callable[[], np.ndarray], int], ...]
    results: Mapping[str, int]
    weights: tuple[int, ...]


def load_runs(plan: Plan, checkpoint: Checkpoint) -> list[LoadRun]:
    """Every run of a plan's conversions."""
    loading = plan.loading
    if loading is None:
        return []
    return [run for made in loading.conversions for run in _runs(made, plan, loading, checkpoint)]


class Converter:
    """Runs load programs, from several threads at once.

    Args:
        functions: loaded kernels by their key in ``Plan.binaries``.
        arena, base: addresses of the arena and of the weights region.
    """

    def __init__(
        self,
        driver: Driver,
        plan: Plan,
        loading: Loading,
        functions: Mapping[str, Function],
        arena: int,
        base: int,
    ) -> None:
        self._driver = driver
        self._programs = loading.programs
        self._base = base
        self._builder = GraphBuilder(driver, plan, functions, scratch=0, pages=0, device="")
        self._places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(loading.places):
            self._places.put(arena + place * loading.place_bytes)
        self._mine = threading.local()

    def run(self, run: LoadRun, lane: Lane) -> None:
        """Bring a run's operands to the device and make parameters of them; ends when they are there."""
        place = self._places.get()
        try:
            for make, offset in run.reads:
                lane.push(make(), place - self._base + offset)
            made = self._programs[run.program]
            addresses = {name: place + buffer.offset for name, buffer in made.program.buffers.items()}
            addresses |= {made.results[name].name: self._base + at for name, at in run.results.items()}
            for launch, nodes in zip(made.program.launches, self._prepared(run.program), strict=True):
                names = {**launch.operands, **launch.results}
                for node in nodes:
                    bound = node.bind(names, addresses)
                    self._driver.launch_kernel(node.function, node.grid, bound, lane.stream)
            lane.drain()
        finally:
            self._places.put(place)

    def _prepared(self, number: int) -> list[list[PreparedNode]]:
        """The nodes of every launch of a program, this thread's own."""
        prepared: dict[int, list[list[PreparedNode]]] = self._mine.__dict__.setdefault("nodes", {})
        if number not in prepared:
            made = self._programs[number]
            chosen = [one.candidates[str(made.bucket)][0] for one in made.program.classes]
            prepared[number] = [
                [self._builder.prepare(node) for node in chosen[launch.op_class].nodes]
                for launch in made.program.launches
            ]
        return prepared[number]


def _runs(conversion: Conversion, plan: Plan, loading: Loading, checkpoint: Checkpoint) -> Iterator[LoadRun]:
    weights = tuple(conversion.results.values())
    derived = plan.weights[weights[0]].param.derived
    assert derived is not None, "a conversion makes what its recipe derives"
    at = {result: plan.weights[index].offset for result, index in conversion.results.items()}
    first = 0
    for stop, number in conversion.runs:
        made = loading.programs[number]
        reads = tuple(
            (run.make, made.program.buffers[name].offset + run.offset)
            for name, rows in derived.by.rows(first, stop).items()
            for run in runs(checkpoint, derived.by.operands[name], CHUNK_BYTES, rows)
        )
        yield LoadRun(number, reads, dict(at), weights)
        at = {result: offset + made.results[result].spec.nbytes({}) for result, offset in at.items()}
        first = stop
