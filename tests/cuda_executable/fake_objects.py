"""What the driver without a GPU keeps of kernels, graphs' nodes and tensor maps, for tests to look at."""

from __future__ import annotations

import json
from dataclasses import dataclass


def cubin(name: str, sizes: list[int]) -> bytes:
    """What the fake takes for machine code: a kernel and the bytes of each of its parameters."""
    return json.dumps({"name": name, "sizes": sizes}).encode()


@dataclass
class FakeFunction:
    """A loaded kernel."""

    name: str
    sizes: list[int]
    dynamic_shared: int = 48 * 1024


@dataclass
class FakeNode:
    """A kernel node as the driver got it: parameters as bytes, and which nodes it is behind, by which kind of edge:
    "plain" or "programmatic". ``after`` and ``edge`` are the first of them, or None.
    """

    function: FakeFunction
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: list[bytes]
    edges: tuple[tuple[int, str], ...] = ()

    @property
    def after(self) -> int | None:
        return self.edges[0][0] if self.edges else None

    @property
    def edge(self) -> str | None:
        return self.edges[0][1] if self.edges else None

    def words(self) -> list[int]:
        """Parameters as unsigned numbers, maps left out."""
        return [int.from_bytes(p, "little") for p in self.parameters if len(p) <= 8]


@dataclass
class FakeMap:
    """Arguments of one cuTensorMapEncodeTiled, in the driver's order: innermost axis first."""

    element_type: int
    rank: int
    address: int
    shape: list[int]
    strides: list[int]
    box: list[int]
    element_strides: list[int]
    options: tuple[int, int, int, int]  # interleave, swizzle, L2 promotion, out-of-bounds fill
