"""How a dense projection is cut into blocks: every way that can run, the cheapest first.

    describe the call → ways to tile it → cost of each (linear_cost.py) → cheapest first

Plain arithmetic over sizes, so a choice is the same wherever and whenever a plan is made.

# T tokens, N rows of the weights, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product as product_of

from makeready.kernels.device import H100_BANDWIDTH, H100_FLOPS

STREAM, PERSISTENT = "stream", "persistent"

_BARRIERS = 1 << 10  # bytes of shared memory beside the pipeline, at most
_STAGES = 8  # more give nothing

# Sides over N and K and warps. 64 outputs are the least that a Hopper matrix instruction takes; a warp group
# (4 warps) that owns a tile of 128 x 128 alone was 12 % faster than two that share it.
_STREAM_SIDES = (
    (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8), (192, 64, 4), (192, 64, 8),
    (256, 64, 8),
)  # fmt: skip
_PERSISTENT_SIDES = (  # t, n, warps
    (64, 128, 4), (64, 256, 4), (128, 128, 4), (128, 128, 8), (128, 192, 4), (128, 192, 8), (128, 256, 8),
    (256, 128, 8), (256, 192, 8),
)  # fmt: skip

# Sums that a thread keeps in registers at most. Beside 192 there is no room for operands; and for sm_100a
# Triton 3.6 makes an empty kernel of a tile of 256 x 192, without a word.
_SUMS_WGMMA, _SUMS = 192, 128
# Of a streamed tile whose result is stored element by element: as many addresses want registers as well. For 6,144
# rows of 513 fp32 outputs, tiles with 128 sums spilled 536 to 824 bytes on sm_90a and 168 to 1,056 on sm_100a, those
# with 96 and a bias 544; those with 64 none.
_SUMS_SINGLY = 64


@dataclass(frozen=True)
class Product:
    """What matters of a call: sizes, bytes of an element in and out, and what its operands allow.

    Attributes:
        tma: operands are aligned for tensor maps and the target has them.
        tma_out: so is the result.
        wide_stores: rows of the result begin at multiples of 16 elements, so that threads store several at once.
        tensor_cores: both operands are of the same 16-bit dtype.
        bandwidth: bytes/s from memory.
        rate: operations/s of all multiprocessors at 16 bits.
        wgmma: the target has Hopper's matrix instructions, which read both operands from shared memory.
        invariant: the same ways whatever T is, that one of them may serve all batch shapes.
    """

    T: int
    N: int
    K: int
    out_bytes: int
    tma: bool
    tma_out: bool
    tensor_cores: bool
    wgmma: bool
    multiprocessors: int
    shared_bytes: int
    bandwidth: float = H100_BANDWIDTH
    rate: float = H100_FLOPS["bfloat16"]
    invariant: bool = False
    wide_stores: bool = True

    @property
    def moved(self) -> int:
        """Bytes of both operands and the result, each once."""
        return 2 * (self.N + self.T) * self.K + self.out_bytes * self.T * self.N


@dataclass(frozen=True)
class Tiling:
    """One way: ``kind`` of kernel, tile sides over T, N, K, ranges of K, and compile options.

    Attributes:
        second: of the tile's ``n`` outputs, those in a second accumulator.
        parts: copies in which a persistent block writes the first accumulator.
    """

    kind: str
    t: int
    n: int
    k: int
    split: int
    warps: int
    stages: int
    second: int = 0
    parts: int = 1

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
        if self.kind == PERSISTENT:
            return pipeline + _out_bytes(product, self.t, self.n - self.second, self.parts)
        return max(pipeline, self.t * (self.n - self.second) * product.out_bytes)

    def a_multiprocessor(self, product: Product) -> int:
        """Blocks that one multiprocessor has room for."""
        registers = 32 * self.warps * (self.t * self.n // (32 * self.warps) + 56)
        return max(1, min(product.shared_bytes // (self.shared(product) + _BARRIERS), 65536 // registers))


def ways(product: Product) -> list[Tiling]:
    """Every way to run ``product``, in no order that means anything; there is always one."""
    if not product.tensor_cores:
        few = product.T <= 16 and not product.invariant
        return [Tiling(STREAM, 16 if few else 32, 32, 32, 1, 4, 2)]
    return [*_streams(product), *_persistents(product)]


def _sums(product: Product) -> int:
    return _SUMS_WGMMA if product.wgmma else _SUMS


def _second(n: int) -> int:
    """Outputs in the second accumulator of a tile of ``n``: a third makes 192 of 128 and 64."""
    return n // 3 if n % 3 == 0 else 0


def _streams(product: Product) -> Iterator[Tiling]:
    sums = _sums(product) if product.wide_stores else _SUMS_SINGLY
    for t, (n, k, warps) in product_of((16, 32, 64, 128, 256), _STREAM_SIDES):
        if not product.invariant and _mismatched(t, product.T):
            continue
        second = _second(n)
        if t * n > sums * 32 * warps or (second and not product.tma):
            continue
        if n > 128 and t < 128:  # lost 3 to 8 % beside tiles of 64 outputs
            continue
        for a_sm in (1, 2, 3):
            room = product.shared_bytes // a_sm - 2 * _BARRIERS
            stages = min(_STAGES, room // ((t + n) * k * 2))
            if stages < 3 or t * (n - second) * product.out_bytes > room:
                continue
            for split in (1,) if second else (1, 2, 3, 4, 6, 8):
                way = Tiling(STREAM, t, n, k, split, warps, stages, second)
                depth, blocks = product.K // split, way.blocks(product)
                if split == 1 or (depth >= 4 * k and blocks <= 4 * product.multiprocessors):
                    yield way


def _mismatched(t: int, tokens: int) -> bool:
    """Whether half of the tile would do, or it is so small that the same weights come from L2 too often."""
    return (t > 16 and t >= 2 * tokens) or (t < 64 and t < tokens) or (t < 128 and 4 * t < tokens)


def _persistents(product: Product) -> Iterator[Tiling]:
    if not (product.tma and product.tma_out) or (product.T <= 64 and not product.invariant):
        return
    for t, n, warps in _PERSISTENT_SIDES:
        second = _second(n)
        if t * n > _sums(product) * 32 * warps:
            continue
        # The columns of a second accumulator are written in one copy, as wide as each of the first one's.
        choices = ((n - second) // second,) if second else (1, 2, 4)
        stages, parts = max(
            (_deepest(product, t, n, _out_bytes(product, t, n - second, parts)), -parts) for parts in choices
        )
        if stages >= 3:
            yield Tiling(PERSISTENT, t, n, 64, 1, warps, stages, second, -parts)


def _deepest(product: Product, t: int, n: int, out: int) -> int:
    """Stages of a persistent block that fit beside ``out`` bytes."""
    return min(6, (product.shared_bytes - 2 * _BARRIERS - out) // ((t + n) * 64 * 2))


def _out_bytes(product: Product, t: int, columns: int, parts: int) -> int:
    """Shared memory that a tile is written through."""
    return t * columns // parts * product.out_bytes


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
