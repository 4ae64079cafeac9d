"""How a dense projection is cut into blocks: every way that can run, each with what it should cost.

    describe the call → ways to tile it → cost of each → cheapest first

Plain arithmetic over sizes, so a choice is the same wherever and whenever a plan is made. The cost is a
roofline: streaming from memory, traffic between L2 and the multiprocessors, and matrix instructions overlap,
so the slowest counts; filling the pipeline, waiting for the last wave and adding up split sums come on top.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

STREAM, PERSISTENT = "stream", "persistent"

# H100, measured: device copy; dense bf16 product.
_MEMORY = 3.0e12  # bytes/s
_MATRIX = 779e12 / 132  # operations/s of one multiprocessor
_L2 = 7.0e12  # bytes/s, all multiprocessors together
_IN_FLIGHT = 2 << 10  # bytes under way in one multiprocessor that would give half of its share of _MEMORY
_ONE_SM = 40e9  # bytes/s that one multiprocessor can take from memory at most
_LAUNCH = 2.0e-6  # from the end of the kernel before to the first matrix instruction, with early launch
_REDUCE = 1.5e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 80e9  # bytes/s at which one block reads sums
_TILE_END = 0.7e-6  # writing a tile, as far as the next one's copies do not hide it

# Share of _MATRIX that a tile reaches, by its smaller and larger side: operand reuse out of shared memory.
_EFFICIENCY = {
    (16, 64): 0.20, (16, 128): 0.22, (32, 64): 0.35, (32, 128): 0.40, (64, 64): 0.55,
    (64, 128): 0.70, (64, 256): 0.80, (128, 128): 0.88, (128, 256): 1.0,
}  # fmt: skip

_SUMS = 128  # sums that a thread keeps in registers
_STREAM_SIDES = ((64, 128, 4), (64, 64, 4), (128, 128, 8), (128, 64, 8), (128, 64, 4))  # n, k, warps


@dataclass(frozen=True)
class Product:
    """What matters of a call: sizes, bytes of an element in and out, and what its operands allow.

    Attributes:
        tma: operands are aligned for tensor maps and the target has them.
        tma_out: so is the result.
        tensor_cores: both operands are of the same 16-bit dtype.
    """

    T: int
    N: int
    K: int
    out_bytes: int
    tma: bool
    tma_out: bool
    tensor_cores: bool
    multiprocessors: int
    shared_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the 16-bit weights."""
        return 2 * self.N * self.K


@dataclass(frozen=True)
class Tiling:
    """One way: ``kind`` of kernel, tile sides over T, N, K, ranges of K, and compile options."""

    kind: str
    t: int
    n: int
    k: int
    split: int
    warps: int
    stages: int
    halves: int = 1

    @property
    def name(self) -> str:
        """Such as ``stream_16x64x128_k4_w4_s5``."""
        return f"{self.kind}_{self.t}x{self.n}x{self.k}_k{self.split}_w{self.warps}_s{self.stages}"

    def tiles(self, product: Product) -> int:
        """Output tiles."""
        return _cdiv(product.T, self.t) * _cdiv(product.N, self.n)

    def blocks(self, product: Product) -> int:
        """Blocks of the launch."""
        tiles = self.tiles(product)
        return min(tiles, product.multiprocessors) if self.kind == PERSISTENT else tiles * self.split

    def shared(self, product: Product) -> int:
        """Bytes of shared memory, barriers aside."""
        pipeline = self.stages * (self.t + self.n) * self.k * 2
        out = self.t * self.n * product.out_bytes // self.halves
        return pipeline + out if self.kind == PERSISTENT else max(pipeline, out)


def tilings(product: Product) -> list[Tiling]:
    """Every way to run ``product``, the cheapest first; there is always one."""
    if not product.tensor_cores:
        rows = 16 if product.T <= 16 else 32
        return [Tiling(STREAM, rows, 32, 32, 1, 4, 2)]
    ways = {*_streams(product), *_persistents(product)}
    fitting = [w for w in ways if w.shared(product) + 1024 <= product.shared_bytes]
    return sorted(fitting, key=lambda way: (seconds(product, way), way.name))


def seconds(product: Product, way: Tiling) -> float:
    """Predicted time of ``product`` cut in this way."""
    return _persistent_seconds(product, way) if way.kind == PERSISTENT else _stream_seconds(product, way)


def _streams(product: Product) -> Iterator[Tiling]:
    for t, (n, k, warps) in product_of((16, 32, 64, 128, 256), _STREAM_SIDES):
        # A tile that half would hold is waste; weights that many tiles of tokens share are read from L2.
        if (t > 16 and t >= 2 * product.T) or (t < 128 and 4 * t < product.T):
            continue
        if t * n > _SUMS * 32 * warps:
            continue
        for a_sm in (1, 2, 3):
            stages = min(8, (product.shared_bytes // a_sm - 2048) // ((t + n) * k * 2))
            if stages < 3:
                continue
            for split in (1, 2, 3, 4, 6, 8):
                way = Tiling(STREAM, t, n, k, split, warps, stages)
                depth, blocks = product.K // split, way.blocks(product)
                if split == 1 or (depth >= 4 * k and blocks <= 4 * product.multiprocessors):
                    yield way


def _persistents(product: Product) -> Iterator[Tiling]:
    if not (product.tma and product.tma_out) or product.T <= 64:
        return
    for t, n, warps, stages, halves in (
        (128, 256, 8, 4, 2),
        (128, 256, 8, 3, 1),
        (256, 128, 8, 4, 2),
        (256, 128, 8, 3, 1),
        (128, 128, 8, 4, 1),
        (128, 128, 4, 4, 1),
        (64, 256, 4, 4, 1),
        (64, 128, 4, 5, 1),
    ):
        yield Tiling(PERSISTENT, t, n, 64, 1, warps, stages, halves)


def _stream_seconds(product: Product, way: Tiling) -> float:
    sms = product.multiprocessors
    blocks = way.blocks(product)
    a_sm = max(1, min(product.shared_bytes // (way.shared(product) + 1024), 64 // way.warps))
    depth = _cdiv(_cdiv(product.K, way.k), way.split) * way.k
    # Blocks that all fit at once share the memory evenly; otherwise the last wave runs half empty.
    resident = min(blocks, a_sm * sms)
    tail = 1.0 if blocks <= resident else 1 + 0.5 * resident / blocks
    flying = resident * way.stages * way.n * way.k * 2
    rate = min(_MEMORY * flying / (flying + sms * _IN_FLIGHT), _ONE_SM * min(blocks, sms))
    moved = product.weight_bytes + 2 * product.T * product.K + product.out_bytes * product.T * product.N
    memory = moved / rate * tail
    cached = blocks * (way.t + way.n) * depth * 2 / _L2
    per_block = 2 * way.t * way.n * depth / (_MATRIX * _efficiency(way))
    matrix = per_block * _cdiv(blocks, sms)
    reduce = 0.0
    if way.split > 1:
        sums = 4 * way.split * min(way.t, product.T) * way.n
        reduce = _REDUCE + sums / _REDUCE_RATE * _cdiv(way.tiles(product), sms)
        reduce += 2 * sums * way.tiles(product) / _L2
    return _LAUNCH + max(memory, cached, matrix) + reduce


def _persistent_seconds(product: Product, way: Tiling) -> float:
    waves = _cdiv(way.tiles(product), product.multiprocessors)
    tile = 2 * way.t * way.n * product.K / (_MATRIX * _efficiency(way)) + _TILE_END
    moved = product.weight_bytes + 2 * product.T * product.K + product.out_bytes * product.T * product.N
    cached = way.tiles(product) * (way.t + way.n) * product.K * 2 / (1.4 * _L2)
    return _LAUNCH + max(moved / _MEMORY, cached, tile * waves)


def _efficiency(way: Tiling) -> float:
    side = (min(way.t, way.n), max(way.t, way.n))
    return _EFFICIENCY.get(side, 0.25 if side[0] < 64 else 0.8)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
