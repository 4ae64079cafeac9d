"""How products with experts' weights are cut into tiles by the Triton kernel: every way, the cheapest first.

# M entries, E experts, N outputs, K inputs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

from makeready.kernels.device import OpCall
from makeready.kernels.spec import DTYPE_BYTES

# Reasoned, not measured: shares of bandwidth and matrix rate that this kernel, which finds rows by pointers, should
# reach. They put it behind the kernels of grouped_cuda.py, whose figures are measured.
_MEMORY, _MATRIX = 0.6, 0.4
_LAUNCH = 3e-6
_SUMS, _SUMS_APART = 128, 48  # that a thread has registers for
_TILE = 1.5e-6  # until a tile's copies are under way, and writing it


@dataclass(frozen=True)
class Grouped:
    """What matters of a call.

    Attributes:
        outputs: rows of an expert's weights.
        columns: of the result: as many, or half where a gate and what it multiplies become one.
        hit: experts that have an entry, as far as entries are spread evenly.
        rows_read: rows of x; a token's entries share one.
    """

    entries: int
    experts: int
    outputs: int
    columns: int
    inputs: int
    weight_bytes: float
    x_bytes: int
    out_bytes: int
    hit: float
    rows_read: int

    @property
    def moved(self) -> float:
        """Bytes of what is read and written, each once."""
        weights = self.hit * self.outputs * self.inputs * self.weight_bytes
        return (
            weights
            + self.rows_read * self.inputs * self.x_bytes
            + self.entries * self.columns * self.out_bytes
        )

    @property
    def operations(self) -> float:
        """Of the products."""
        return 2.0 * self.entries * self.outputs * self.inputs

    def most_tiles(self, side: int) -> int:
        """Tiles of ``side`` entries that any routing can make."""
        # Every expert with an entry wastes at most side - 1 places of its last tile.
        some = min(self.entries, self.experts)
        return min(self.entries, (self.entries + some * (side - 1)) // side)

    def tiles(self, side: int) -> float:
        """Tiles of ``side`` entries, expected where entries fall on experts at random."""
        mean = self.entries / self.experts
        if mean > 8 * side:
            return self.experts * (mean / side + 0.5)
        # As many as there are entries beyond each multiple of the side (Poisson).
        chance, below, found = math.exp(-mean), 0.0, 0.0
        for count in range(int(mean + 10 * math.sqrt(mean)) + side + 1):
            below += chance
            found += 1.0 - below if count % side == 0 else 0.0
            chance *= mean / (count + 1)
        return self.experts * found


def hit(entries: int, experts: int, top_k: int) -> float:
    """Experts with an entry, expected where every token's ``top_k`` are equally likely ones: E(1 - (1 - k/E)^T)."""
    tokens = entries / max(top_k, 1)
    return experts * (1.0 - (1.0 - min(top_k, experts) / experts) ** tokens)


def describe(call: OpCall) -> Grouped:
    """What cost models need to know of the call."""
    x, weight = call.tensors["x"], call.tensors["weight"]
    y = call.tensors["y"]
    entries, experts = call.dims["M"], call.dims["E"]
    # Where rows are gathered already, the call does not say how many a token has; the bucket does.
    top_k = call.attrs["top_k"] or max(1, entries // max(call.tokens, 1))
    return Grouped(
        entries=entries,
        experts=experts,
        outputs=int(weight.shape[1]),
        columns=int(y.shape[1]),
        inputs=call.dims["K"],
        weight_bytes=DTYPE_BYTES[weight.dtype],
        x_bytes=DTYPE_BYTES[x.dtype],
        out_bytes=DTYPE_BYTES[y.dtype],
        hit=hit(entries, experts, top_k),
        rows_read=int(x.shape[0]),
    )


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile over entries, outputs and inputs, and compile options."""

    t: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """Such as ``16x64x128_w4_s4``."""
        return f"{self.t}x{self.n}x{self.k}_w{self.warps}_s{self.stages}"


def tilings(call: OpCall, *, narrow: bool, apart: bool) -> list[Tiling]:
    """Every way, the cheapest first by a model that is reasoned.

    Args:
        narrow: both operands are of one dtype of 16 or 8 bits, which matrix units multiply.
        apart: sums of 128 inputs are made on their own, so that a thread has them beside all others.
    """
    grouped = describe(call)
    if not narrow:
        return [Tiling(16, 32, 32, 4, 2), Tiling(32, 64, 32, 4, 2)][:: 1 if grouped.entries < 1024 else -1]
    ways = [
        w
        for w in _ways(grouped, _SUMS_APART if apart else _SUMS)
        if call.invariant or not mismatched(w.t, grouped)
    ]
    fitting = (
        w for w in ways if w.stages * (w.t + w.n) * w.k * grouped.weight_bytes <= call.shared_bytes // 2
    )
    return sorted(fitting, key=lambda w: (seconds(call, w), w.name))


def _ways(grouped: Grouped, sums: int) -> Iterator[Tiling]:
    step = 128 // int(grouped.weight_bytes)
    for t, (n, warps), stages in product_of(
        (16, 32, 64, 128), ((64, 4), (64, 8), (128, 4), (128, 8)), (3, 4)
    ):
        if t * n * (grouped.outputs // grouped.columns) <= sums * 32 * warps:
            yield Tiling(t, n, step, warps, stages)


def mismatched(t: int, grouped: Grouped) -> bool:
    """Whether the tile is much higher than an expert's entries are, or much lower."""
    each = grouped.entries / max(grouped.hit, 1.0)
    return (t > 16 and t >= 4 * each) or (t < 64 and 2 * t < each)


def seconds(call: OpCall, way: Tiling) -> float:
    """What ``call`` should take in this way."""
    return predicted(call, describe(call), way, call.flops[call.tensors["weight"].dtype])


def predicted(
    call: OpCall, grouped: Grouped, way: Tiling, rate: float = 0.0, *, memory_share: float = _MEMORY
) -> float:
    """The same of what a call is described as. A guess: see the figures above.

    Args:
        rate: of products; that of x by default.
        memory_share: of the bandwidth.
    """
    rate = rate or call.flops[call.tensors["x"].dtype]
    tiles = grouped.tiles(way.t) * -(-grouped.columns // way.n)
    worked = 2.0 * tiles * way.t * way.n * grouped.inputs * grouped.outputs / grouped.columns
    matrix = worked / (_MATRIX * rate)
    memory = grouped.moved / (memory_share * call.bandwidth)
    turns = -(-tiles // (2 * call.multiprocessors))
    return _LAUNCH + max(matrix, memory) + turns * _TILE
