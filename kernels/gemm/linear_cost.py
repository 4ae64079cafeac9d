"""What a way to cut a dense projection should cost, in seconds.

Three things go on at once and the slowest counts, the others a little: bytes from memory, matrix instructions,
and each block's own pipeline, which has ``stages - 1`` copies under way and so never does more steps than that
in the time that a copy takes. Starting, ends of tiles, and adding up split sums come on top.

The numbers were fitted to 1,500 timings of Qwen3-8B's projections on an H100 at 1 to 1,024 rows
(``scripts/bench.py suite=[gemm_sweep]``): the way that is predicted to be fastest takes 1.5 % longer than the one
that was, on average over the shapes. Bandwidth and matrix rate are those of the device that a plan is chosen for;
the rest was fitted with an H100's, and elsewhere it only ranks.
"""

from __future__ import annotations

from makeready.kernels.gemm.linear_tiling import PERSISTENT, Product, Tiling, ways

_MEMORY = 3.02 / 3.0  # of the bandwidth of a copy that reading operands reaches
_ONE = 59e9  # bytes/s of weights that one multiprocessor takes from memory at most
_COPY = 0.80e-6  # from asking for a tile to having it
_COPY_RATE = 360e9  # bytes/s on top
_SHARPNESS = 3.6  # of the maximum over the three
_LAUNCH = 1.8e-6  # of any way on an H200, so that other kernels compare
_SHARED = 3.4e-6  # to start, where a multiprocessor holds several blocks
_PERSISTENT = 2.8e-6  # to start, with no weights asked for beforehand
_TILE_END = 5.2e-6  # until the next tile of a multiprocessor is under way
_RESTART = 1.5e-6  # on top where the loop over tiles is not flattened
_TAIL = 1.5  # waves that a last, unfull one costs in copies
_REDUCE = 2.4e-6  # arrival, and the first sums back from L2
_REDUCE_RATE = 42e9  # bytes/s at which one block reads sums
_REDUCE_L2 = 5.9e12  # bytes/s at which all do

# Share of the matrix rate by tile sides and warps; above 1 since short products run at higher clocks, and since the
# end of a tile is counted apart.
_STREAM_SHARE = {
    (16, 64, 4): 0.43, (16, 128, 4): 0.36, (16, 128, 8): 0.15, (32, 64, 4): 0.25, (32, 128, 4): 0.45,
    (32, 128, 8): 0.36, (64, 64, 4): 0.67, (64, 128, 4): 0.65, (64, 128, 8): 0.60, (128, 64, 4): 0.87,
    (128, 128, 4): 1.02, (128, 128, 8): 0.91, (128, 192, 4): 1.14, (128, 192, 8): 1.00, (128, 256, 8): 1.06,
    (256, 64, 4): 1.04, (256, 128, 8): 1.06, (256, 192, 8): 1.08,
}  # fmt: skip
_PERSISTENT_SHARE = {
    (64, 128, 4): 1.25, (64, 256, 4): 1.12, (128, 128, 4): 1.12, (128, 128, 8): 1.08, (128, 256, 8): 1.21,
    (256, 128, 8): 1.20, (128, 192, 4): 1.05, (128, 192, 8): 1.05, (256, 192, 8): 1.08,
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
    matrix = steps * 2 * way.t * way.n * way.k / (product.rate / multiprocessors * _share(way))
    memory = product.moved / (_MEMORY * product.bandwidth)
    if way.kind == PERSISTENT:
        each = _cdiv(way.tiles(product), multiprocessors)
        start, end = _PERSISTENT, _TILE_END + (_RESTART if way.second else 0)
        copies, matrix = copies * each, (matrix + end) * each
    else:
        together, each = way.a_multiprocessor(product), _cdiv(blocks, multiprocessors)
        waves = blocks / (together * multiprocessors)
        start = _SHARED if together > 1 else 0
        copies *= 1 if waves <= 1 else waves + _TAIL
        matrix = matrix * each + _TILE_END * max(each / together - 1, 0)
        if way.t >= product.T:  # else others ask for the same weights
            memory = max(memory, each * way.n * product.K * 2 / way.split / _ONE)
    at_once = (memory, matrix, copies)
    return (
        _LAUNCH
        + start
        + sum(part**_SHARPNESS for part in at_once) ** (1 / _SHARPNESS)
        + _reduction(product, way)
    )


def _reduction(product: Product, way: Tiling) -> float:
    if way.split == 1:
        return 0.0
    tiles = way.tiles(product)
    sums = 4 * way.split * min(way.t, product.T) * way.n
    one_by_one = sums / _REDUCE_RATE * _cdiv(tiles, product.multiprocessors)
    return _REDUCE + one_by_one + 2 * sums * tiles / _REDUCE_L2


def _share(way: Tiling) -> float:
    table = _PERSISTENT_SHARE if way.kind == PERSISTENT else _STREAM_SHARE
    return table.get((way.t, way.n, way.warps), 0.40 if way.t < 64 else 0.65)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
