"""From a plan's nodes to CUDA graphs, node by node.

Calls of one op class differ in addresses alone. So the parameters of a class's nodes are laid out once per
bucket, with everything but addresses filled in (:class:`PreparedNode`), and each launch writes its addresses
there and adds the nodes; the driver copies the parameters when a node is added. That leaves about 8 µs of
Python a node on a slow core, so that 45 graphs of 260 nodes take 0.1 s beside what the driver needs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from makeready.graphs.executable.cuda.driver import Driver, Function
from makeready.graphs.plan.lanes import turns
from makeready.graphs.plan.plan import Plan, PlanError
from makeready.graphs.plan.program import (
    ONE_LANE,
    Chain,
    Launch,
    Node,
    NodeArgument,
    PlanCandidate,
    lanes_key,
)
from makeready.graphs.plan.spec import Bucket
from makeready.kernels.size import parse, value
from makeready.kernels.spec import DTYPE_BYTES, PAGES

_MAP_BYTES, _MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
_SCALARS = {"int32": "<i", "int64": "<q", "float32": "<f"}  # as struct has them


class GraphBuilder:
    """Builds the graph of each bucket.

    Args:
        functions: loaded kernels by their key in ``Plan.binaries``.
        scratch: address of the scratch region.
        pages: KV pages, what the symbol P in a tensor map's shape stands for.
        device: name of the GPU, under which measured choices are kept.
    """

    def __init__(
        self,
        driver: Driver,
        plan: Plan,
        functions: Mapping[str, Function],
        *,
        scratch: int,
        pages: int,
        device: str,
    ) -> None:
        self._driver = driver
        self._plan = plan
        self._functions = functions
        self._scratch = scratch
        self._pages = pages
        self._tuned = plan.tuned.get(device, {})
        self._maps: dict[NodeArgument, _Maps] = {}

    def build(
        self,
        bucket: Bucket,
        addresses: Mapping[str, int],
        stream: Any,
        *,
        choices: Mapping[str, str] | None = None,
        only: slice = slice(None),
    ) -> Any:
        """The executable graph of ``bucket``: nodes in the order of launches, in one lane or two.

        Args:
            addresses: of every value that the launches name.
            stream: where the graph is sent to the device.
            choices: by :func:`tuned_key` and :func:`lanes_key`, in place of those that measured best on this device.
            only: which of the launches.

        Raises:
            PlanError: the plan has no kernels for the bucket.
            DriverError: the driver refuses a node.
        """
        program = self._plan.programs[bucket.phase]
        best = self._tuned if choices is None else choices
        calls = program.calls(bucket, best, only)
        order = turns(program, calls, one_lane=best.get(lanes_key(bucket)) == ONE_LANE)
        prepared: dict[tuple[int, bool], list[PreparedNode]] = {}
        ends: list[list[Any]] = []  # by call, the node that those behind it start behind
        graph = self._driver.graph()
        try:
            for call, turn in zip(calls, order, strict=True):
                launch = call.launch
                nodes = prepared.get((launch.op_class, turn.side))
                if nodes is None:
                    chosen = self._choose(bucket, launch, best)
                    nodes = [self.prepare(node, side=turn.side) for node in chosen.nodes]
                    prepared[launch.op_class, turn.side] = nodes
                names = {**launch.operands, **launch.results}
                after, early = [node for other in turn.behind for node in ends[other]], turn.early
                for node in nodes:
                    parameters = node.bind(names, addresses)
                    added = self._driver.add_kernel(
                        graph, node.function, node.grid, parameters, after, node.dependent and early
                    )
                    after, early = [added], True
                ends.append(after)
            return self._driver.instantiate(graph, stream)
        finally:
            self._driver.destroy_graph(graph)

    def calls(self, bucket: Bucket) -> list[Chain]:
        """What the graph of ``bucket`` runs, in order."""
        return self._plan.programs[bucket.phase].calls(bucket, self._tuned)

    def _choose(self, bucket: Bucket, launch: Launch, best: Mapping[str, str]) -> PlanCandidate:
        """The candidate that ``best`` names, else the planner's first."""
        found = self._plan.programs[bucket.phase].candidate(launch.op_class, bucket, best)
        if found is None:
            raise PlanError(f"the plan has no kernel for {launch.op} in bucket {bucket}; compile it again")
        return found

    def prepare(self, node: Node, *, side: bool = False) -> PreparedNode:
        """What it takes to launch ``node`` again and again, in the ``side`` lane or the main one; not for several
        threads at once.
        """
        return PreparedNode(
            node,
            self._functions[node.binary],
            self._scratch + (self._plan.memory.side_scratch if side else 0),
            self._pages,
            self._maps_of,
            null_pointers=self._plan.binaries[node.binary].null_pointers,
        )

    def _maps_of(self, argument: NodeArgument) -> _Maps:
        """The maps of ``argument``, which buckets share: weights and caches do not move."""
        key = replace(argument, kind="map")
        found = self._maps.get(key)
        if found is None:
            found = self._maps[key] = _Maps(self._driver, argument, _shape(argument, self._pages))
        return found


class _Maps:
    """Tensor maps that differ in their address alone, by address."""

    def __init__(self, driver: Driver, argument: NodeArgument, shape: list[int]) -> None:
        self._driver = driver
        self._argument = argument
        self._shape = shape
        self._made: dict[int, np.ndarray] = {}

    def at(self, address: int) -> np.ndarray:
        """The 16 words of the map over ``address``."""
        found = self._made.get(address)
        if found is None:
            argument = self._argument
            size = DTYPE_BYTES[argument.dtype]
            encoded = self._driver.tensor_map(
                address,
                argument.element_type,
                self._shape[::-1],
                [stride * size for stride in argument.strides[-2::-1]],
                argument.block[::-1],
                argument.swizzle,
                argument.promotion,
            )
            found = self._made[address] = np.frombuffer(encoded, np.uint64)
        return found


class PreparedNode:
    """The parameters of one kernel node in memory, and where its addresses go.

    Attributes:
        function, grid, dependent: what to launch, and whether it may start early.
    """

    def __init__(
        self,
        node: Node,
        function: Function,
        scratch: int,
        pages: int,
        maps_of: Callable[[NodeArgument], _Maps],
        *,
        null_pointers: int,
    ) -> None:
        self.function = function
        self.grid = node.grid
        self.dependent = node.dependent
        self._pointers: list[tuple[int, str]] = []  # word of the values, operand
        self._maps: list[tuple[int, str, _Maps]] = []  # first word of the values, operand
        values, offsets = bytearray(), []

        def add(raw: bytes, alignment: int) -> int:
            values.extend(bytes(-len(values) % alignment))
            offsets.append(len(values))
            values.extend(raw)
            return offsets[-1]

        for argument in node.arguments:
            if argument.kind == "pointer":
                self._pointers.append((add(bytes(8), 8) // 8, argument.operand))
            elif argument.kind == "scratch":
                add(struct.pack("<Q", scratch + argument.offset), 8)
            elif argument.kind == "scalar":
                raw = struct.pack(_SCALARS[argument.dtype], argument.value)
                add(raw, len(raw))
            elif argument.kind in ("descriptor", "map"):
                word = add(bytes(_MAP_BYTES), _MAP_ALIGNMENT) // 8
                self._maps.append((word, argument.operand, maps_of(argument)))
                if argument.kind == "descriptor":
                    for size in _shape(argument, pages):
                        add(struct.pack("<i", size), 4)
                    for stride in argument.strides:
                        add(struct.pack("<q", stride), 8)
            else:
                raise PlanError(
                    f"the plan has an argument of unknown kind {argument.kind!r}; compile it again"
                )
        for _ in range(null_pointers):
            add(bytes(8), 8)
        values.extend(bytes(-len(values) % 8))  # whole words
        memory = np.zeros(len(values) + _MAP_ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _MAP_ALIGNMENT
        memory[start : start + len(values)] = values
        self._words = memory[start : start + len(values)].view(np.uint64)
        self._table = np.asarray(offsets, np.uint64) + np.uint64(self._words.ctypes.data)
        self._parameters = self._table.ctypes.data

    def bind(self, names: Mapping[str, str], addresses: Mapping[str, int]) -> int:
        """Write the addresses of one launch; returns the address of the array of parameter addresses.

        Args:
            names: value of each operand and result.
        """
        words = self._words
        for word, operand in self._pointers:
            words[word] = addresses[names[operand]]
        for word, operand, maps in self._maps:
            words[word : word + 16] = maps.at(addresses[names[operand]])
        return self._parameters


def _shape(argument: NodeArgument, pages: int) -> list[int]:
    return [n if isinstance(n, int) else value(parse(n), {PAGES: pages}) for n in argument.shape]
