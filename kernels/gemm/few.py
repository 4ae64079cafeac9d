"""How a product of few tokens is cut into tiles of 64 outputs, clusters and blocks, and what that costs (csrc/few.h).

# T tokens, N outputs, K inputs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from makeready.kernels.device import OpCall

OUTPUTS = 64  # of a tile
_COLUMNS = (8, 16, 32, 64)  # of a product: tokens are filled up to one of these
_SHARPNESS = 4.1  # of the maximum over what goes on at once
# Blocks of a cluster, and of a multiprocessor. Larger clusters found room late where a multiprocessor had two blocks,
# and took half as long again.
_CUTS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (8, 1))


@dataclass(frozen=True)
class Way:
    """One way to cut a call.

    Attributes:
        tokens: columns of a product.
        split: blocks that share a tile, a cluster.
        blocks: of the launch.
    """

    tokens: int
    split: int
    blocks: int

    @property
    def name(self) -> str:
        """Such as ``few_16_c4_128``: a cluster of four, 128 blocks."""
        return f"few_{self.tokens}_c{self.split}_{self.blocks}"


@dataclass(frozen=True)
class Costs:
    """Of a kernel, in microseconds unless said otherwise.

    Attributes:
        start: of a launch.
        tile: of the end of a tile.
        exchange, block: of what a cluster's blocks tell each other about a tile, and on top for each.
        step, column: of a step of a block, and on top for each column of its product.
        memory: share of the device's bandwidth at which weights stream.
        from_l2: bytes/s of all blocks together.
    """

    start: float
    tile: float
    exchange: float
    block: float
    step: float
    column: float
    memory: float
    from_l2: float


def columns(T: int) -> int:
    """Columns of a product of ``T`` tokens, at most 64."""
    return next(n for n in _COLUMNS if n >= T)


def ways(call: OpCall, steps: int) -> Iterator[Way]:
    """Every way to run a call whose tiles take so many ``steps``."""
    tiles = _tiles(call)
    for split, a_sm in _CUTS:
        room = a_sm * call.multiprocessors // split
        if steps >= 2 * split and room and (a_sm == 1 or tiles > room // 2):
            yield Way(columns(int(call.tensors["x"].shape[0])), split, min(tiles, room) * split)


def microseconds(call: OpCall, way: Way, steps: int, costs: Costs, *, weights: int, tokens: int) -> float:
    """What the call takes.

    Args:
        steps: of a tile.
        weights, tokens: bytes that a step copies of the weights, and of one token.
    """
    tiles, clusters = _tiles(call), way.blocks // way.split
    turns, each = -(-tiles // clusters), -(-steps // way.split)
    at_once = (
        1e6 * tiles * steps * weights / (costs.memory * call.bandwidth),
        1e6 * tiles * steps * (weights + way.tokens * tokens) / costs.from_l2,
        turns * each * (costs.step + costs.column * way.tokens),
    )
    slowest = sum(part**_SHARPNESS for part in at_once) ** (1 / _SHARPNESS)
    exchange = costs.exchange + costs.block * way.split if way.split > 1 else 0.0
    return costs.start + slowest + turns * (costs.tile + exchange)


def _tiles(call: OpCall) -> int:
    return -(-int(call.tensors["weight"].shape[0]) // OUTPUTS)
