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

# H100. Memory, L2, copies, launches and sums are those that 16-bit products were fitted to (linear_cost.py);
# the matrix unit's rate was measured, its shares are reasoned.
_MEMORY = 2.99e12  # bytes/s
_L2 = 12.5e12  # bytes/s; above the data sheet's, since neighbours ask for the same lines
_MATRIX = 1402e12 / 132  # operations/s of one multiprocessor
_COPY = 0.69e-6  # from asking for a tile to having it
_COPY_RATE = 250e9  # bytes/s on top
_SHARPNESS = 3.4  # of the maximum over what goes on at once
_LAUNCH = 0.5e-6
_LAUNCH_SHARED = 2.6e-6  # where a multiprocessor holds several blocks
_SCALED = 0.15e-6  # a step whose sums leave the matrix unit to be scaled, beside its instructions
_TILE_END = 0.3e-6  # writing a tile, as far as copies do not hide it
_REDUCE = 2.1e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 32e9  # bytes/s at which one block reads sums
_REDUCE_L2 = 5.0e12  # bytes/s at which all do

# Share of _MATRIX that a stream's tile reaches, by its tokens: operands' way out of shared memory.
_STREAM_SHARE = {16: 0.38, 32: 0.43, 64: 0.65, 128: 0.92, 256: 1.0}

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
        second: outputs of ``n`` that have an accumulator of their own.
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
    second: int = 0
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
            out = self.t * (self.n - self.second) * product.out_bytes // (self.pieces * self.halves)
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
        widest = 128 if product.tma else 64
        if (t > 16 and t >= 2 * product.T) or (t < widest and 4 * t < product.T):
            continue
        if not _compiles_well(product, t, n, k, warps, a_sm):
            continue
        halves = 2 if t == 256 else 1
        room = (product.shared_bytes + _SM_SHARED) // a_sm - _SM_SHARED - 1152
        stages = min(12, (room - 4 * t * n // halves) // ((t + n) * k))
        if stages < 3:
            continue
        for share in _shares(product, t, n, k, a_sm):
            way = Tiling(STREAM, t, n, k, share, warps, stages, halves=halves, a_sm=a_sm)
            # A tile of 256 tokens that is written at once, and never added up, spills.
            if t < 256 or way.sharers(product) > 1:
                yield way


def _compiles_well(product: Product, t: int, n: int, k: int, warps: int, a_sm: int) -> bool:
    """Whether registers hold a tile's sums, ``a_sm`` times; from cross-compiled kernels."""
    if not product.tma and (t > 64 or n > 64 or k > GROUP):
        return False  # operands may pass through registers
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
    for t, n, second, warps, stages, halves, a_sm, efficiency in (
        (128, 256, 0, 8, 3, 1, 1, 1.05),
        (128, 256, 0, 8, 4, 2, 1, 1.1),
        (256, 128, 0, 8, 3, 2, 1, 1.0),
        (256, 192, 64, 8, 3, 2, 1, 1.0),
        (128, 192, 64, 8, 4, 2, 1, 1.0),
        (128, 192, 64, 4, 4, 2, 1, 0.95),
        (128, 128, 0, 4, 3, 2, 2, 0.93),
        (128, 128, 0, 8, 5, 1, 1, 0.9),
        (64, 256, 0, 4, 3, 2, 1, 1.0),
        (64, 128, 0, 4, 3, 1, 2, 0.8),
    ):
        yield Tiling(
            PERSISTENT, t, n, GROUP, 0, warps, stages,
            second=second, halves=halves, a_sm=a_sm, efficiency=efficiency,
        )  # fmt: skip


def _stream_seconds(product: Product, way: Tiling) -> float:
    sms = product.multiprocessors
    blocks = way.blocks(product)
    units = way.tiles(product) * way.steps(product)
    step = 2 * way.t * way.n * way.k / (_MATRIX * _STREAM_SHARE[way.t])
    if product.grouped:
        step += _SCALED / way.a_sm
    at_once = (
        product.moved_bytes / _MEMORY,
        units * _stage(way) / _L2,
        _cdiv(blocks, sms) * way.share * step,
        way.share * _copies(way),
    )
    ends = _TILE_END * _cdiv(way.share, way.steps(product))
    return _start(way) + _slowest(*at_once) + ends + _reduction(product, way)


def _reduction(product: Product, way: Tiling) -> float:
    sharers = way.sharers(product)
    if sharers == 1:
        return 0.0
    sums = 4 * min(way.t, product.T) * way.n
    return _REDUCE + sharers * sums / _REDUCE_RATE + 4 * sums * way.blocks(product) / _REDUCE_L2


def _persistent_seconds(product: Product, way: Tiling) -> float:
    tiles, steps = way.tiles(product), way.steps(product)
    a_block = _cdiv(tiles, way.blocks(product))
    on_one = min(way.a_sm, _cdiv(tiles, product.multiprocessors))
    step = 2 * way.t * way.n * way.k / (_MATRIX * way.efficiency)
    at_once = (
        product.moved_bytes / _MEMORY,
        tiles * steps * _stage(way) / _L2,
        on_one * a_block * steps * step,
        a_block * steps * _copies(way),
    )
    return _start(way) + _slowest(*at_once) + _TILE_END * a_block


def _stage(way: Tiling) -> int:
    return (way.t + way.n) * way.k


def _copies(way: Tiling) -> float:
    """Seconds of one step if nothing but its copies took time: ``stages - 1`` are under way."""
    return (_COPY + _stage(way) / _COPY_RATE) / (way.stages - 1)


def _start(way: Tiling) -> float:
    return _LAUNCH if way.a_sm == 1 else _LAUNCH_SHARED


def _slowest(*parts: float) -> float:
    """What goes on at once takes as long as its slowest part, and a little for the others."""
    return sum(part**_SHARPNESS for part in parts) ** (1 / _SHARPNESS)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
