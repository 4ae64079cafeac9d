"""What a way to cut a dense projection should cost, in seconds.

Four things go on at once and the slowest counts, the others a little: bytes from memory, bytes from L2,
matrix instructions, and each block's own pipeline, which has ``stages - 1`` copies under way and so never
does more steps than that in the time that a copy takes. Starting, and adding up split sums, come on top.

The numbers were fitted to 2,369 timings of Qwen3-8B's projections on an H100 at 1 to 1,024 rows: the way that
is predicted to be fastest then takes 2.5 % longer than the one that was, on average over the shapes. On
other GPUs they only rank.
"""

from __future__ import annotations

from makeready.kernels.gemm.linear_tiling import PERSISTENT, Product, Tiling, ways

_MEMORY = 2.99e12  # bytes/s
_L2 = 12.5e12  # bytes/s; above the data sheet's, since neighbours ask for the same lines
_MATRIX = 779e12 / 132  # operations/s of one multiprocessor
_COPY = 0.69e-6  # from asking for a tile to having it
_COPY_RATE = 250e9  # bytes/s on top
_SHARPNESS = 3.4  # of the maximum over the four
_LAUNCH = 0.5e-6
_LAUNCH_SHARED = 2.6e-6  # where a multiprocessor holds several blocks
_TAIL = 1.6  # waves that a last, unfull one costs in copies
_REDUCE = 2.1e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 32e9  # bytes/s at which one block reads sums
_REDUCE_L2 = 5.0e12  # bytes/s at which all do

# Share of _MATRIX by tile sides and warps; above 1 since short products run at higher clocks.
_STREAM_SHARE = {
    (16, 64, 4): 0.40, (16, 128, 4): 0.35, (16, 128, 8): 0.16, (32, 64, 4): 0.23, (32, 128, 4): 0.43,
    (32, 128, 8): 0.36, (64, 64, 4): 0.50, (64, 128, 4): 0.80, (64, 128, 8): 0.65, (128, 64, 4): 0.97,
    (128, 128, 4): 0.98, (128, 128, 8): 0.88, (256, 64, 4): 1.00, (256, 128, 8): 1.06,
    (16, 192, 4): 0.35, (32, 192, 4): 0.43, (64, 192, 4): 0.90, (64, 192, 8): 0.70, (128, 192, 4): 0.98,
    (128, 192, 8): 0.96, (256, 192, 8): 1.06,
}  # fmt: skip
_PERSISTENT_SHARE = {
    (64, 128, 4): 0.80, (64, 256, 4): 1.15, (128, 128, 4): 0.93, (128, 128, 8): 0.91, (128, 256, 8): 1.20,
    (256, 128, 8): 1.06, (64, 192, 4): 0.95, (128, 96, 4): 0.85, (128, 192, 4): 0.98, (128, 192, 8): 1.05,
    (256, 96, 8): 0.95, (256, 192, 8): 1.06,
}  # fmt: skip


def tilings(product: Product) -> list[Tiling]:
    """Every way to run ``product``, the cheapest first."""
    fitting = (w for w in ways(product) if w.shared(product) <= product.shared_bytes)
    return sorted(fitting, key=lambda way: (seconds(product, way), way.name))


def seconds(product: Product, way: Tiling) -> float:
    """Predicted time of ``product`` cut in this way."""
    blocks, multiprocessors = way.blocks(product), product.multiprocessors
    steps = _cdiv(_cdiv(product.K, way.k), way.split)
    stage = (way.t + way.n) * way.k * 2
    copies = steps * (_COPY + stage / _COPY_RATE) / (way.stages - 1)
    matrix = steps * 2 * way.t * way.n * way.k / (_MATRIX * _share(way))
    if way.kind == PERSISTENT:
        a_block = _cdiv(way.tiles(product), multiprocessors)
        copies, matrix = copies * a_block, matrix * a_block
        read, start = way.tiles(product), _LAUNCH
    else:
        together = way.a_multiprocessor(product)
        waves = blocks / (together * multiprocessors)
        copies *= 1 if waves <= 1 else waves + _TAIL
        matrix *= _cdiv(blocks, multiprocessors)
        read, start = blocks, _LAUNCH if together == 1 else _LAUNCH_SHARED
    cached = read * steps * stage / _L2
    at_once = (product.moved / _MEMORY, cached, matrix, copies)
    return start + sum(part**_SHARPNESS for part in at_once) ** (1 / _SHARPNESS) + _reduction(product, way)


def _reduction(product: Product, way: Tiling) -> float:
    if way.split == 1:
        return 0.0
    tiles = way.tiles(product)
    sums = 4 * way.split * min(way.t, product.T) * way.n
    one_by_one = sums / _REDUCE_RATE * _cdiv(tiles, product.multiprocessors)
    return _REDUCE + one_by_one + 2 * sums * tiles / _REDUCE_L2


def _share(way: Tiling) -> float:
    table = _PERSISTENT_SHARE if way.kind == PERSISTENT else _STREAM_SHARE
    return table.get((way.t, way.n, way.warps), 0.25 if way.t < 64 else 0.9)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
