"""How a projection with weights of 4 or 8 bits, or in MXFP4, is cut into blocks: all ways, the cheapest first.

    describe the call → ways to tile it → cost of each → cheapest first

As linear_fp8_tiling.py, whose runs of units a stream has, too.

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

from makeready.kernels.device import H100_BANDWIDTH, H100_FLOPS

STREAM, PERSISTENT = "stream", "persistent"
SPAN = 128  # inputs of a step

# By timings of Qwen3-8B's projections on one H200 at 1 to 8,192 rows (suite=[gemm_int4] of scripts/bench.py). A
# matrix instruction whose weights are in registers takes some 58 cycles however few tokens there are, which is why
# units of few tokens take as long as those of many, and why csrc/linear_few_int.cu has other instructions.
_MEMORY = 0.95  # of the bandwidth of a copy
_L2 = 1.0e13  # bytes/s
_L2_HELD = 5.28e7  # bytes that blocks may have asked for since and still find in L2
_COPY = 0.99e-6  # from asking for a tile to having it
_COPY_RATE = 2.42e11  # bytes/s on top
# Of the matrix rate that tiles of as many tokens and outputs reach.
_MATRIX = {
    (PERSISTENT, 256, 128): 0.76, (PERSISTENT, 128, 128): 0.63, (PERSISTENT, 128, 64): 0.50, (STREAM, 128, 128): 0.53,
    (STREAM, 128, 64): 0.36, (STREAM, 64, 128): 0.35, (STREAM, 64, 64): 0.25, (STREAM, 32, 128): 0.25,
    (STREAM, 32, 64): 0.20, (STREAM, 16, 128): 0.16, (STREAM, 16, 64): 0.11,
}  # fmt: skip
# Of a stream's unit that has a multiprocessor to itself, by its tokens: waits, widening, matrix instructions.
_UNIT = {16: 0.85e-6, 32: 0.75e-6, 64: 1.10e-6, 128: 1.20e-6}
_WIDEN = {
    4: 1.9,
    8: 2.4,
}  # instructions of a thread for one weight: fields, zeros, scales, and a share of the loop's
_OFFSET = 0.5  # of an offset, reasoned: one sum for two weights
_WIDEN_MX = 2.9  # of a 4-bit float, reasoned: sign and size are masked apart
_CLOCK = 1.7e9
_LANES = 128  # threads of a multiprocessor that issue at once
_SHARPNESS = 3.2  # of the maximum over what goes on at once
_LAUNCH = 1.0e-6
_STAGE = 0.19e-6  # of the pipeline: its barrier, and asking for its first copies
_TILE_END = 0.10e-6  # writing a tile, as far as copies do not hide it
_REDUCE = 2.75e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 8.00e10  # bytes/s at which one block reads sums
_REDUCE_L2 = 9.97e12  # bytes/s at which all do

_BARRIERS = 1 << 10  # bytes of shared memory beside the pipeline, at most
_SM_SHARED = 1 << 10  # that the system takes for every block
_REGISTERS = 65536
_STAGES = 8  # more give nothing
_LEAST = 8  # units that a block takes, where there are as many

# Sides, warps, and the registers of a thread that cross-compiled kernels need at most.
_STREAMS = {
    (16, 64, 4): 128, (16, 128, 4): 168, (32, 64, 4): 128, (32, 128, 4): 255, (64, 64, 4): 128, (64, 128, 8): 128,
    (128, 64, 4): 168, (128, 128, 8): 168,
}  # fmt: skip
_PERSISTENTS = {(256, 128, 8): 255, (128, 128, 8): 200, (128, 64, 4): 200}


@dataclass(frozen=True)
class Product:
    """What matters of a call.

    Attributes:
        out_bytes: of a result's element.
        tma: operands are aligned for tensor maps and the target has them.
        tma_out: so is the result.
        wgmma: the target has Hopper's matrix instructions.
        bandwidth: bytes/s from memory.
        rate: operations/s of all multiprocessors at 16 bits.
        scale_bytes, zero_bytes: of what inputs of a group share; two for an offset in the place of a zero.
        floats: weights are 4-bit floats.
        invariant: the same ways whatever T is, and no tile is cut: where, would depend on T.
    """

    T: int
    N: int
    K: int
    bits: int
    group: int
    zero_bytes: int
    out_bytes: int
    tma: bool
    tma_out: bool
    wgmma: bool
    multiprocessors: int
    shared_bytes: int
    bandwidth: float = H100_BANDWIDTH
    rate: float = H100_FLOPS["bfloat16"]
    scale_bytes: int = 2
    floats: bool = False
    invariant: bool = False

    @property
    def steps(self) -> int:
        """Units of a tile."""
        return _cdiv(self.K, SPAN)

    @property
    def weight_bytes(self) -> float:
        """Words, scales and zeros."""
        scales = self.N * _cdiv(self.K, self.group) * (self.scale_bytes + self.zero_bytes)
        return self.N * self.steps * SPAN * self.bits / 8 + scales

    @property
    def moved(self) -> float:
        """Bytes of weights, activations and results, each once."""
        return self.weight_bytes + 2 * self.T * self.K + self.out_bytes * self.T * self.N


@dataclass(frozen=True)
class Tiling:
    """One way: kind of kernel, sides of a tile, units of a stream's block, compile options.

    Attributes:
        share: units of a block of a stream; 0 elsewhere.
        a_sm: blocks of a multiprocessor.
    """

    kind: str
    t: int
    n: int
    share: int
    warps: int
    stages: int
    a_sm: int

    @property
    def name(self) -> str:
        """Such as ``stream_16x128_u8_w4_s6_b2``: a share of 8 units, two blocks a multiprocessor."""
        share = f"_u{self.share}" if self.share else ""
        return f"{self.kind}_{self.t}x{self.n}{share}_w{self.warps}_s{self.stages}_b{self.a_sm}"

    def tiles(self, product: Product) -> int:
        """Output tiles."""
        return _cdiv(product.T, self.t) * _cdiv(product.N, self.n)

    def blocks(self, product: Product) -> int:
        """Blocks of the launch."""
        tiles = self.tiles(product)
        if self.kind == PERSISTENT:
            return min(tiles, self.a_sm * product.multiprocessors)
        return _cdiv(tiles * product.steps, self.share)

    def sharers(self, product: Product) -> int:
        """Blocks that work on one tile, at most; 1 where every tile has one block."""
        steps = product.steps
        if self.kind == PERSISTENT or self.share % steps == 0:
            return 1
        return _cdiv(steps, self.share) if steps % self.share == 0 else _cdiv(steps - 1, self.share) + 1

    def stage(self, product: Product) -> int:
        """Bytes of a step's operands."""
        return self.n * SPAN * product.bits // 8 + self.t * SPAN * 2

    def shared(self, product: Product) -> int:
        """Bytes of shared memory: the pipeline, room to turn results round, barriers."""
        return _shared(self.kind, self.t, self.n, self.stage(product), product.out_bytes, self.stages)


def _shared(kind: str, t: int, n: int, stage: int, out_bytes: int, stages: int) -> int:
    if kind == PERSISTENT:
        return stages * stage + t * n * out_bytes + _BARRIERS
    return stages * stage + 4 * t * n + _BARRIERS


def tilings(product: Product) -> list[Tiling]:
    """Every way to run ``product``, the cheapest first; there is always one."""
    ways = {*_streams(product), *_persistents(product)}
    return sorted(ways, key=lambda way: (seconds(product, way), way.name))


def _streams(product: Product) -> Iterator[Tiling]:
    for ((t, n, warps), registers), a_sm in product_of(_STREAMS.items(), (1, 2, 3)):
        widest = 128 if product.wgmma else 64
        # A tile that half would hold is waste; many tiles of tokens are for the persistent kernel.
        mismatched = (t > 16 and t >= 2 * product.T) or (t < widest and 4 * t < product.T)
        if (mismatched and not product.invariant) or t > widest or (n > 64 and not product.wgmma):
            continue
        if a_sm * 32 * warps * registers > _REGISTERS:
            continue
        stages = _deepest(product, STREAM, t, n, a_sm)
        if stages >= 3 or (not product.tma and stages >= 2):
            for share in _shares(product, t, n, a_sm):
                yield Tiling(STREAM, t, n, share, warps, stages, a_sm)


def _deepest(product: Product, kind: str, t: int, n: int, a_sm: int) -> int:
    """Stages that fit."""
    room = (product.shared_bytes + _SM_SHARED) // a_sm - _SM_SHARED
    stage = n * SPAN * product.bits // 8 + t * SPAN * 2
    return min(_STAGES, (room - _shared(kind, t, n, stage, product.out_bytes, 0)) // stage)


def _shares(product: Product, t: int, n: int, a_sm: int) -> set[int]:
    """Units of a block: whole tiles, or an even part of one; where none fits, as even among blocks as can be."""
    steps = product.steps
    units = _cdiv(product.T, t) * _cdiv(product.N, n) * steps
    even = max(_cdiv(units, a_sm * product.multiprocessors), min(_LEAST, steps))
    whole = _cdiv(even, steps) * steps
    if product.invariant:
        return {whole}
    parts = {steps // j for j in (2, 3, 4, 6, 8) if steps % j == 0 and even <= steps // j <= 2 * even}
    return {whole, *(parts or {even})}


def _persistents(product: Product) -> Iterator[Tiling]:
    if not (product.tma and product.tma_out and product.wgmma) or (product.T <= 64 and not product.invariant):
        return
    for ((t, n, warps), registers), a_sm in product_of(_PERSISTENTS.items(), (1, 2)):
        stages = min(4, _deepest(product, PERSISTENT, t, n, a_sm))
        if stages >= 2 and a_sm * 32 * warps * registers <= _REGISTERS:
            yield Tiling(PERSISTENT, t, n, 0, warps, stages, a_sm)


def seconds(product: Product, way: Tiling) -> float:
    """Predicted time of ``product`` cut in this way.

    What goes on at once: bytes from memory, bytes from L2, matrix instructions, widening, and one block's chain of
    steps and of copies. The slowest counts, the others a little. Starting, writing tiles, and adding up shared ones
    come on top.
    """
    tiles, steps, blocks = way.tiles(product), product.steps, way.blocks(product)
    share = way.share or _cdiv(tiles, blocks) * steps
    on_one = _cdiv(blocks, product.multiprocessors)
    turns = _cdiv(on_one, way.a_sm)
    stage = way.stage(product)
    operations = 2 * way.t * way.n * SPAN
    matrix = (
        on_one
        * share
        * operations
        / (product.rate / product.multiprocessors * _MATRIX[way.kind, way.t, way.n])
    )
    widen = (
        _WIDEN_MX if product.floats else _WIDEN[product.bits] + (_OFFSET if product.zero_bytes > 1 else 0.0)
    )
    widening = on_one * share * way.n * SPAN * widen / (_LANES * _CLOCK)
    at_once = (
        _read(product, way) / (_MEMORY * product.bandwidth),
        tiles * steps * stage / _L2,
        matrix,
        widening,
        turns * share * (_UNIT[way.t] if way.kind == STREAM else 0.0),
        # ``stages - 1`` copies are under way.
        turns * share * (_COPY + stage / _COPY_RATE) / max(1, way.stages - 1),
    )
    slowest = sum(part**_SHARPNESS for part in at_once) ** (1 / _SHARPNESS)
    start = _LAUNCH + _STAGE * way.stages
    return start + slowest + _TILE_END * turns * _cdiv(share, steps) + _reduction(product, way)


def _read(product: Product, way: Tiling) -> float:
    """Bytes from memory. Blocks that go through tiles of the same weights one after the other find them in L2
    only if not too much was asked for in between.
    """
    again = 1
    if way.kind == STREAM and way.share > product.steps:
        between = way.blocks(product) * way.n * product.K * product.bits / 8
        again = _cdiv(product.T, way.t) if between > _L2_HELD else 1
    return product.moved + (again - 1) * product.weight_bytes


def _reduction(product: Product, way: Tiling) -> float:
    sharers = way.sharers(product)
    if sharers == 1:
        return 0.0
    sums = 4 * min(way.t, product.T) * way.n
    return _REDUCE + sharers * sums / _REDUCE_RATE + 4 * sums * way.blocks(product) / _REDUCE_L2


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
