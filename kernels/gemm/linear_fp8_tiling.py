"""How a projection of 8-bit floats is cut into blocks: every way that can run, with what it should cost.

    describe the call → ways to tile it → cost of each → cheapest first

As linear_tiling.py, for kernels of another kind: streams here take equal shares of the work wherever tiles
end (stream-K), so no last wave is ragged, and what is weighed is how much shared memory keeps under way, how
often operands come from L2, and how long it takes to add up shared tiles.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

STREAM, PERSISTENT = "stream", "persistent"
GROUP = 128  # side of a group of scales

# H100. Measured: device copy; dense 8-bit product. Reasoned, to be held against a sweep: the others.
_MEMORY = 3.0e12  # bytes/s
_MATRIX = 1402e12 / 132  # operations/s of one multiprocessor
_L2 = 9.8e12 / 132  # bytes/s of one multiprocessor through TMA
_IN_FLIGHT = 5 << 10  # bytes under way in one multiprocessor that would give half of its share of _MEMORY
_ONE_SM = 40e9  # bytes/s that one multiprocessor can take from memory at most
_LAUNCH = 2.0e-6  # from the end of the kernel before to the first matrix instruction, with early launch
_UNIT = 0.10e-6  # a block's loop, once round, beside its matrix instructions
_REDUCE = 1.5e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 80e9  # bytes/s at which one block reads sums
_TILE_END = 0.4e-6  # writing a tile

# Share of _MATRIX that a stream's tile reaches, by its tokens: operands' way out of shared memory.
_STREAM_EFFICIENCY = {16: 0.3, 32: 0.45, 64: 0.65, 128: 0.8, 256: 0.9}
_WAITING = 0.75  # of that, where every unit's sums leave the matrix unit to be scaled

_SM_SHARED = 1 << 10  # bytes of shared memory that the system takes for every block
_REGISTERS = 65536


@dataclass(frozen=True)
class Product:
    """What matters of a call: sizes, bytes of a result's element, and what its operands allow.

    Attributes:
        grouped: scales by groups of 128 rather than by rows.
        tma: operands are aligned for tensor maps and the target has them.
        tma_out: so is the result.
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

    @property
    def moved_bytes(self) -> int:
        """Bytes of all operands and results, scales aside."""
        return self.N * self.K + self.T * self.K + self.out_bytes * self.T * self.N


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
        efficiency: share of the matrix unit's rate, for kinds other than streams.
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
    efficiency: float = 1.0

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
            out = self.t * self.n * product.out_bytes // (self.pieces * self.halves)
        else:
            out = 4 * self.t * self.n // self.halves if self.sharers(product) > 1 else 1024 * self.warps
        return pipeline + out + 1152


def tilings(product: Product) -> list[Tiling]:
    """Every way to run ``product``, the cheapest first; there is always one."""
    ways = {*_streams(product), *_persistents(product)}
    fitting = [way for way in ways if way.shared(product) <= product.shared_bytes]
    return sorted(fitting, key=lambda way: (seconds(product, way), way.name))


def seconds(product: Product, way: Tiling) -> float:
    """Predicted time of ``product`` cut in this way."""
    return _persistent_seconds(product, way) if way.kind == PERSISTENT else _stream_seconds(product, way)


_STREAM_SIDES = ((128, 128, 4), (64, 128, 4), (128, 128, 8), (128, 256, 4), (64, 256, 4))  # n, k, warps


def _streams(product: Product) -> Iterator[Tiling]:
    for t, (n, k, warps), a_sm in product_of((16, 32, 64, 128, 256), _STREAM_SIDES, (1, 2, 3)):
        # A tile that half would hold is waste; many tiles of tokens are for the persistent kernel.
        if (t > 16 and t >= 2 * product.T) or (t < 128 and 4 * t < product.T):
            continue
        if not _compiles_well(product, t, n, k, warps, a_sm):
            continue
        halves = 2 if t == 256 else 1
        room = (product.shared_bytes + _SM_SHARED) // a_sm - _SM_SHARED - 1152
        stages = min(10, (room - 4 * t * n // halves) // ((t + n) * k))
        if stages < 3:
            continue
        for share in _shares(product, t, n, k, a_sm):
            way = Tiling(STREAM, t, n, k, share, warps, stages, halves=halves, a_sm=a_sm)
            # A tile of 256 tokens that is written at once, and never added up, spills.
            if t < 256 or way.sharers(product) > 1:
                yield way


def _compiles_well(product: Product, t: int, n: int, k: int, warps: int, a_sm: int) -> bool:
    """Whether registers hold a tile's sums, ``a_sm`` times; from cross-compiled kernels."""
    sums = t * n // (32 * warps)  # a thread's
    if product.grouped:
        registers = min(255, 48 + 3 * sums)
        fits = sums <= 64 and k == GROUP
    else:
        registers = min(255, 48 + 2 * sums)
        # Two boxes of K a step pay where sums are few.
        fits = sums <= (128 if t == 256 else 64) and (k == GROUP or t <= 32)
    return fits and (warps == 4 or sums >= 64) and a_sm * 32 * warps * registers <= _REGISTERS


def _shares(product: Product, t: int, n: int, k: int, a_sm: int) -> set[int]:
    """Steps of a block: as even as can be, or such that tiles have 1 to 4 blocks each."""
    steps = _cdiv(product.K, k)
    units = _cdiv(product.T, t) * _cdiv(product.N, n) * steps
    resident = a_sm * product.multiprocessors
    even = max(_cdiv(units, resident), min(4, steps))
    whole = _cdiv(even, steps) * steps
    parts = {_cdiv(steps, j) for j in (1, 2, 3, 4)}
    return {even, whole, *(share for share in parts if even <= share <= 2 * even)}


def _persistents(product: Product) -> Iterator[Tiling]:
    if not (product.tma and product.tma_out) or product.T <= 64:
        return
    if product.grouped:
        for t, n, warps, stages, pieces, a_sm, efficiency in (
            (128, 192, 8, 4, 3, 1, 0.78),
            (64, 192, 4, 3, 3, 2, 0.72),
            (64, 128, 4, 2, 1, 3, 0.65),
            (64, 128, 4, 3, 2, 2, 0.65),
            (128, 128, 8, 5, 2, 1, 0.68),
            (128, 128, 8, 5, 1, 1, 0.60),
        ):
            yield Tiling(
                PERSISTENT, t, n, GROUP, 0, warps, stages, pieces, a_sm=a_sm, efficiency=efficiency
            )  # fmt: skip
        return
    for t, n, warps, stages, halves, a_sm, efficiency in (
        (128, 256, 8, 3, 1, 1, 0.97),
        (128, 256, 8, 4, 2, 1, 1.0),
        (256, 128, 8, 3, 2, 1, 0.95),
        (128, 128, 4, 3, 2, 2, 0.9),
        (128, 128, 8, 5, 1, 1, 0.85),
        (64, 256, 4, 3, 2, 1, 0.8),
        (64, 128, 4, 3, 1, 2, 0.75),
    ):
        yield Tiling(
            PERSISTENT, t, n, 128, 0, warps, stages, halves=halves, a_sm=a_sm, efficiency=efficiency
        )  # fmt: skip


def _stream_seconds(product: Product, way: Tiling) -> float:
    sms = product.multiprocessors
    blocks = way.blocks(product)
    resident = min(blocks, way.a_sm * sms)
    units = way.tiles(product) * way.steps(product)
    busiest = min(_cdiv(blocks, sms) * way.share, units)  # steps of the multiprocessor that has most
    flying = resident * way.stages * way.n * way.k
    rate = _MEMORY * flying / (flying + sms * _IN_FLIGHT)
    memory = max(product.moved_bytes / rate, busiest * way.n * way.k / _ONE_SM)
    cached = busiest * (way.t + way.n) * way.k / _L2
    efficiency = _STREAM_EFFICIENCY[way.t] * (_WAITING if product.grouped else 1.0)
    unit = 2 * way.t * way.n * way.k / (_MATRIX * efficiency)
    matrix = max(busiest * unit, way.share * (unit + _UNIT) * _cdiv(blocks, resident))
    ends = _TILE_END * _cdiv(way.share, way.steps(product))
    reduce = 0.0
    if (sharers := way.sharers(product)) > 1:
        sums = 4 * min(way.t, product.T) * way.n
        reduce = _REDUCE + (sharers + 1) * sums / _REDUCE_RATE
    return _LAUNCH + max(memory, cached, matrix) + ends + reduce


def _persistent_seconds(product: Product, way: Tiling) -> float:
    sms = product.multiprocessors
    tiles = way.tiles(product)
    waves = _cdiv(tiles, way.a_sm * sms) * way.a_sm if tiles > sms else 1
    tile = 2 * way.t * way.n * product.K / (_MATRIX * way.efficiency) + _TILE_END
    cached = waves * (way.t + way.n) * product.K / _L2
    return _LAUNCH + max(product.moved_bytes / _MEMORY, cached, tile * waves)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
