"""How ops that work row by row are cut into blocks of threads."""

from __future__ import annotations

from dataclasses import dataclass

_BLOCKS_A_CORE = 4  # blocks a multiprocessor that keep memory busy before rows are packed into tiles


@dataclass(frozen=True)
class RowTiles:
    """Tiles of ``rows`` x ``width`` elements, a block of threads each, row after row.

    Attributes:
        rows, width: of a tile, powers of two.
        columns: tiles that a row is cut into.
        blocks: tiles in all.
        num_warps: of a block.
    """

    rows: int
    width: int
    columns: int
    blocks: int
    num_warps: int


def row_tiles(
    rows: int, width: int, *, multiprocessors: int, whole_rows: bool = False, invariant: bool = False
) -> RowTiles:
    """Tiles for ``rows`` rows of ``width`` elements.

    With few rows latency counts: 8 elements a thread, so that every thread loads once. With many, tiles of up
    to 8,192 elements, 32 a thread, keep enough loads in flight for bandwidth. Only these two sorts of tile
    exist for a width, so that all buckets of a plan share few binaries.

    Args:
        whole_rows: a tile spans its rows, because they are reduced.
        invariant: the same tiles, those for few rows, whatever their number.
    """
    block = power_of_two(width)
    if not whole_rows:
        block = min(block, 2048)
    columns = -(-width // block)
    packed = max(1, 8192 // block)
    busy = _BLOCKS_A_CORE * multiprocessors
    many = not invariant and rows * columns >= busy * packed
    tile_rows = packed if many else max(1, 512 // block)
    elements = tile_rows * block
    num_warps = min(max(elements // (1024 if many else 256), 1), 8 if many and block <= 8192 else 32)
    return RowTiles(tile_rows, block, columns, -(-rows // tile_rows) * columns, num_warps)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
