"""Parameters that are quantized on their way in: rows to a slot of the arena, kernels from there to the weights.

A plan says what runs (``Plan.loading``). Here its conversions become chunks, each a task of its own for the
threads that load weights: rows are read, converted to the operand's dtype where they are stored in another,
and copied to a free slot; the chunk's launch reads them there. A slot is free again when the launch ended.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from makeready.graphs.checkpoint.base import Checkpoint
from makeready.graphs.executable.cuda_convert import reader
from makeready.graphs.executable.cuda_driver import Driver, Function
from makeready.graphs.executable.cuda_graph import GraphBuilder, PreparedNode
from makeready.graphs.plan import LOAD, Conversion, Loading, Plan
from makeready.graphs.recipe import Piece


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
class Chunk:
    """One launch of a conversion.

    Attributes:
        launch: its number in the loading program.
        rows: what reads rows of the operand, and the byte of the slot where they go.
        results: byte offset in the weights region of each result, by its name in the contract.
        weights: indices of the parameters that are made.
    """

    launch: int
    rows: tuple[tuple[Callable[[], np.ndarray], int], ...]
    results: Mapping[str, int]
    weights: tuple[int, ...]


def chunks(plan: Plan, checkpoint: Checkpoint) -> list[Chunk]:
    """Every chunk of a plan's conversions."""
    if plan.loading is None:
        return []
    at = {weight.offset: index for index, weight in enumerate(plan.weights)}
    return [
        chunk
        for conversion in plan.loading.conversions
        for chunk in _cut(conversion, plan.loading, checkpoint, at)
    ]


class Converter:
    """Runs chunks, from several threads at once.

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
        self._program = loading.program
        self._base = base
        self._builder = GraphBuilder(driver, plan, functions, scratch=0, pages=0, device="")
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(loading.slots):
            self._slots.put(arena + slot * loading.slot_bytes)
        self._mine = threading.local()

    def run(self, chunk: Chunk, lane: Lane) -> None:
        """Bring a chunk's rows to the device and make parameters of them; ends when they are there."""
        slot = self._slots.get()
        try:
            for read, offset in chunk.rows:
                lane.push(read(), slot - self._base + offset)
            launch = self._program.launches[chunk.launch]
            names = {**launch.operands, **launch.results}
            addresses = {launch.results[name]: self._base + offset for name, offset in chunk.results.items()}
            addresses[launch.operands["x"]] = slot
            for node in self._prepared(launch.op_class):
                self._driver.launch_kernel(node.function, node.grid, node.bind(names, addresses), lane.stream)
            lane.drain()
        finally:
            self._slots.put(slot)

    def _prepared(self, op_class: int) -> list[PreparedNode]:
        """The nodes of a class, this thread's own."""
        made: dict[int, list[PreparedNode]] = self._mine.__dict__.setdefault("nodes", {})
        if op_class not in made:
            (choice, *_) = self._program.classes[op_class].candidates[str(LOAD)]
            made[op_class] = [self._builder.prepare(node) for node in choice.nodes]
        return made[op_class]


def _cut(
    conversion: Conversion, loading: Loading, checkpoint: Checkpoint, at: Mapping[int, int]
) -> Iterator[Chunk]:
    weights = tuple(at[offset] for offset in conversion.results.values())
    first, results = 0, dict(conversion.results)
    for number in conversion.launches:
        launch = loading.program.launches[number]
        operand = loading.program.buffers[launch.operands["x"]].spec
        stop = first + operand.at({})[0]
        row = operand.nbytes({}) // (stop - first)
        rows = tuple(
            (reader(checkpoint, part.source, slice(part.start, part.stop), operand.dtype), part.at * row)
            for part in _between(conversion.pieces, first, stop)
        )
        yield Chunk(number, rows, dict(results), weights)
        for name in results:
            results[name] += loading.program.buffers[launch.results[name]].spec.nbytes({})
        first = stop


def _between(pieces: tuple[Piece, ...], first: int, stop: int) -> Iterator[Piece]:
    """What of ``pieces`` makes up rows ``first:stop`` of the operand; places are counted from ``first``."""
    for piece in pieces:
        start = max(first, piece.at)
        end = min(stop, piece.at + piece.stop - piece.start)
        if start < end:
            moved = piece.start - piece.at
            yield Piece(piece.source, start + moved, end + moved, start - first)
