"""How a projection of 8-bit floats or integers is cut into blocks: every way that can run, with what it should cost.

    describe the call → ways to tile it → cost of each → cheapest first

As linear_tiling.py, for kernels of another kind. A block of a stream takes a run of steps that may end
inside a tile (stream-K); runs of whole tiles, and of even parts of one, were the fastest, since others read
the same weights at different times. What a step takes was fitted for every shape of tile, since most of it is
waiting: for copies, for the matrix unit, for threads to meet.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

from makeready.kernels.device import H100_BANDWIDTH, H100_FLOPS

STREAM, PERSISTENT = "stream", "persistent"
GROUP = 128  # side of a group of scales

# Of an H100, fitted to 675 timings of Qwen3-8B's projections at 1 to 4,096 rows: the way that is predicted to
# be fastest then takes 0.7 % longer than the one that was, on average over the shapes, and 4.5 % at most.
# Predictions are off by 12 %. Bandwidth and matrix rate are those of the device that a plan is chosen for; on other
# GPUs the rest only ranks. Persistent kernels with scales by groups are reasoned: their timings are of an older
# kernel. Integers have the figures of floats.
_MEMORY = 3.05 / 3.0  # of the bandwidth of a copy that reading operands reaches
_L2 = 1.40e13  # bytes/s; above the data sheet's, since neighbours ask for the same lines
_L2_HELD = 5.28e7  # bytes that blocks may have asked for since and still find in L2
_COPY = 0.99e-6  # from asking for a tile to having it
_COPY_RATE = 2.42e11  # bytes/s on top
_SHARPNESS = 3.23  # of the maximum over what goes on at once
_LAUNCH = 1.00e-6
_STAGE = 0.19e-6  # of the pipeline: its barrier, and asking for its first copies
_TILE_END = 0.10e-6  # writing a tile, as far as copies do not hide it
_REDUCE = 2.75e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 8.00e10  # bytes/s at which one block reads sums
_REDUCE_L2 = 9.97e12  # bytes/s at which all do

# Of a stream's tile, by scales of groups, its tokens and its outputs: seconds of a step that has a
# multiprocessor to itself and does not wait for copies, and the share of the matrix rate that several reach together.
_STREAM = {
    (False, 16, 64): (0.332e-6, 0.136), (False, 16, 128): (0.573e-6, 1.032),
    (False, 32, 64): (0.156e-6, 0.225), (False, 32, 128): (0.628e-6, 0.292),
    (False, 64, 64): (0.400e-6, 0.538), (False, 64, 128): (0.100e-6, 0.403),
    (False, 128, 64): (0.379e-6, 0.733), (True, 16, 64): (0.531e-6, 0.156),
    (True, 16, 128): (0.411e-6, 0.155), (True, 32, 64): (0.568e-6, 0.212),
    (True, 32, 128): (0.388e-6, 0.232), (True, 64, 64): (0.700e-6, 0.329),
    (True, 64, 128): (0.584e-6, 0.564), (True, 128, 64): (0.508e-6, 0.510),
}  # fmt: skip
# The same of the persistent kernels' tiles and blocks of a multiprocessor.
_PERSISTENT = {
    (False, 128, 256, 1): (0.157e-6, 1.006), (False, 128, 128, 1): (0.101e-6, 1.117),
    (False, 128, 128, 2): (0.100e-6, 1.120), (True, 128, 128, 2): (0.500e-6, 0.850),
    (True, 128, 128, 1): (0.530e-6, 0.720), (True, 128, 64, 2): (0.380e-6, 0.750),
    (True, 64, 128, 2): (0.380e-6, 0.700), (True, 64, 128, 3): (0.380e-6, 0.700),
    (True, 64, 192, 2): (0.550e-6, 0.720), (True, 64, 64, 3): (0.300e-6, 0.500),
}  # fmt: skip

_SM_SHARED = 1 << 10  # bytes of shared memory that the system takes for every block
_REGISTERS = 65536
_LEAST = 1024  # of K that a block takes, where there is as much


@dataclass(frozen=True)
class Product:
    """What matters of a call: sizes, bytes of a result's element, and what its operands allow.

    Attributes:
        grouped: scales by groups of 128 rather than by rows.
        tma: operands are aligned for tensor maps and the target has them.
        tma_out: so is the result.
        bandwidth: bytes/s from memory.
        rate: operations/s of all multiprocessors in the operands' dtype.
        invariant: the same ways whatever T is, and no tile is cut: where, would depend on T.
    """

    T: int
    N: int
    K: int
    out_bytes: int
    grouped: bool
    tma: bool
    tma_out: bool
    multiprocessors: int
    shared_bytes: int
    bandwidth: float = H100_BANDWIDTH
    rate: float = H100_FLOPS["float8_e4m3fn"]
    invariant: bool = False


@dataclass(frozen=True)
class Tiling:
    """One way.

    Attributes:
        kind: of kernel.
        t, n, k: sides of a tile, and how far along K one step goes.
        share: steps of a block of a stream; 0 elsewhere.
        warps, stages: compile options.
        pieces: of ``n / pieces`` outputs whose sums leave the matrix unit one after the other.
        halves: steps in which a tile is written.
        a_sm: blocks of a multiprocessor.
    """

    kind: str
    t: int
    n: int
    k: int
    share: int
    warps: int
    stages: int
    pieces: int = 1
    halves: int = 1
    a_sm: int = 1

    @property
    def name(self) -> str:
        """Such as ``stream_16x128x128_u47_w4_s8_b1``: a share of 47 steps, one block a multiprocessor."""
        share = f"_u{self.share}" if self.share else f"_p{self.pieces}"
        return f"{self.kind}_{self.t}x{self.n}x{self.k}{share}_w{self.warps}_s{self.stages}_b{self.a_sm}"

    def tiles(self, product: Product) -> int:
        """Output tiles."""
        return _cdiv(product.T, self.t) * _cdiv(product.N, self.n)

    def steps(self, product: Product) -> int:
        """Steps of a tile."""
        return _cdiv(product.K, self.k)

    def blocks(self, product: Product) -> int:
        """Blocks of the launch."""
        tiles = self.tiles(product)
        if self.kind == PERSISTENT:
            return min(tiles, self.a_sm * product.multiprocessors)
        return _cdiv(tiles * self.steps(product), self.share)

    def sharers(self, product: Product) -> int:
        """Blocks that work on one tile, at most; 1 where every tile has one block."""
        steps = self.steps(product)
        if self.kind == PERSISTENT or self.share % steps == 0:
            return 1
        return _cdiv(steps, self.share) if steps % self.share == 0 else _cdiv(steps - 1, self.share) + 1

    def shared(self, product: Product) -> int:
        """Bytes of shared memory: the pipeline, room to turn results round, barriers."""
        pipeline = self.stages * (self.t + self.n) * self.k
        if self.kind == PERSISTENT:
            # Results and scales of outputs change their layout in it.
            turned = self.t * self.n * product.out_bytes // (self.pieces * self.halves) + 4 * self.n
            return pipeline + turned + 128
        return pipeline + (4 * self.t * self.n if self.sharers(product) > 1 else 1024 * self.warps) + 1152


def tilings(product: Product) -> list[Tiling]:
    """Every way to run ``product``, the cheapest first; there is always one."""
    ways = {*_streams(product), *_persistents(product)}
    fitting = [way for way in ways if way.shared(product) <= product.shared_bytes]
    return sorted(fitting, key=lambda way: (seconds(product, way), way.name))


def _streams(product: Product) -> Iterator[Tiling]:
    for t, n, a_sm in product_of((16, 32, 64, 128), (64, 128), (1, 2, 3)):
        # A tile that half would hold is waste; many tiles of tokens are for the persistent kernel.
        widest = 128 if product.tma else 64
        mismatched = (t > 16 and t >= 2 * product.T) or (t < widest and 4 * t < product.T)
        if mismatched and not product.invariant:
            continue
        # Two boxes of K a step pay where sums are few.
        k = GROUP if product.grouped or t > 32 or not product.tma else 2 * GROUP
        if not _compiles_well(product, t, n, a_sm):
            continue
        room = (product.shared_bytes + _SM_SHARED) // a_sm - _SM_SHARED - 1152
        stages = min(12, (room - 4 * t * n) // ((t + n) * k))
        if stages >= 3:
            for share in _shares(product, t, n, k, a_sm):
                yield Tiling(STREAM, t, n, k, share, 4, stages, a_sm=a_sm)


def _compiles_well(product: Product, t: int, n: int, a_sm: int) -> bool:
    """Whether registers hold a tile's sums, ``a_sm`` times; from cross-compiled kernels."""
    if not product.tma and (t > 64 or n > 64):
        return False  # operands may pass through registers
    sums = t * n // 128  # a thread's
    registers = min(255, 48 + (3 if product.grouped else 2) * sums)
    return sums <= 64 and a_sm * 128 * registers <= _REGISTERS


def _shares(product: Product, t: int, n: int, k: int, a_sm: int) -> set[int]:
    """Steps of a block: whole tiles, or an even part of one; where none fits, as even among blocks as can be."""
    steps = _cdiv(product.K, k)
    units = _cdiv(product.T, t) * _cdiv(product.N, n) * steps
    even = max(_cdiv(units, a_sm * product.multiprocessors), min(_LEAST // k, steps))
    whole = _cdiv(even, steps) * steps
    if product.invariant:
        return {whole}
    parts = {steps // j for j in (2, 3, 4, 6, 8) if steps % j == 0 and even <= steps // j <= 2 * even}
    return {whole, *(parts or {even})}


def _persistents(product: Product) -> Iterator[Tiling]:
    if not (product.tma and product.tma_out) or (product.T <= 64 and not product.invariant):
        return
    for t, n, warps, stages, pieces, halves, a_sm in _GROUPED if product.grouped else _BY_ROWS:
        yield Tiling(PERSISTENT, t, n, GROUP, 0, warps, stages, pieces, halves, a_sm)


# Sides of tiles, warps, stages, pieces, halves, blocks of a multiprocessor.
_BY_ROWS = ((128, 256, 8, 4, 1, 2, 1), (128, 128, 8, 5, 1, 1, 1), (128, 128, 4, 3, 1, 2, 2))
_GROUPED = (
    (128, 128, 8, 3, 2, 1, 2),
    (128, 128, 8, 5, 1, 1, 1),
    (128, 64, 8, 4, 1, 1, 2),
    (64, 128, 4, 4, 2, 1, 2),
    (64, 128, 4, 2, 1, 1, 3),
    (64, 192, 4, 3, 3, 1, 2),
    (64, 64, 4, 4, 1, 1, 3),
)


def seconds(product: Product, way: Tiling) -> float:
    """Predicted time of ``product`` cut in this way.

    Five things go on at once and the slowest counts, the others a little: bytes from memory, bytes from L2,
    matrix instructions of a multiprocessor, steps of one block, and that block's copies. Starting, writing
    tiles, and adding up shared ones come on top.
    """
    tiles, steps, blocks = way.tiles(product), way.steps(product), way.blocks(product)
    share = way.share or _cdiv(tiles, blocks) * steps
    alone, reached = _rates(product, way)
    on_one = _cdiv(blocks, product.multiprocessors)
    turns = _cdiv(on_one, way.a_sm)
    stage = (way.t + way.n) * way.k
    operations = 2 * way.t * way.n * way.k
    at_once = (
        _read(product, way) / (_MEMORY * product.bandwidth),
        tiles * steps * stage / _L2,
        on_one * share * operations / (product.rate / product.multiprocessors * reached),
        turns * share * alone,
        # ``stages - 1`` copies are under way.
        turns * share * (_COPY + stage / _COPY_RATE) / (way.stages - 1),
    )
    slowest = sum(part**_SHARPNESS for part in at_once) ** (1 / _SHARPNESS)
    start = _LAUNCH + _STAGE * way.stages
    return start + slowest + _TILE_END * turns * _cdiv(share, steps) + _reduction(product, way)


def _rates(product: Product, way: Tiling) -> tuple[float, float]:
    if way.kind == STREAM:
        return _STREAM[product.grouped, way.t, way.n]
    return _PERSISTENT[product.grouped, way.t, way.n, way.a_sm]


def _read(product: Product, way: Tiling) -> float:
    """Bytes from memory. Blocks that go through tiles of the same weights one after the other find them in L2
    only if not too much was asked for in between.
    """
    weights = product.N * product.K
    again = 1
    if way.kind == STREAM and way.share > way.steps(product):
        between = way.blocks(product) * way.n * product.K
        again = _cdiv(product.T, way.t) if between > _L2_HELD else 1
    return again * weights + product.T * product.K + product.out_bytes * product.T * product.N


def _reduction(product: Product, way: Tiling) -> float:
    sharers = way.sharers(product)
    if sharers == 1:
        return 0.0
    sums = 4 * min(way.t, product.T) * way.n
    return _REDUCE + sharers * sums / _REDUCE_RATE + 4 * sums * way.blocks(product) / _REDUCE_L2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
