"""Tiles of absorbed latent attention, and what they cost.

# N query vectors of a tile, K keys of a tile
"""

from __future__ import annotations

from dataclasses import dataclass

from makeready.kernels.device import OpCall
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

LEAST = 4  # key tiles of a share, at least: leaving and adding a part costs what some tiles do
# Estimates: seconds of a launch, of an item around its tiles and of a tile at least, what products
# reach of the matrix rate, and how much faster L2 is than memory.
_LAUNCH, _ITEM, _TILE, _REACHED, _L2 = 3e-6, 2e-6, 7e-7, 0.4, 2.5
_LONGER = 1.6  # times that: 16 rows of 1,024 keys, 16 heads, took 21 us on one H200
_SLOW = 0.12  # of the matrix rate, tiles of 32 keys: warps repeat each other's scores
_FEW = 512  # keys that a row is taken to have where the plan expects no context before a chunk


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile, compile options, and whether items are cut along the context."""

    n: int
    keys: int
    warps: int
    stages: int
    split: bool

    @property
    def local_bytes(self) -> int:
        """Of local memory that a thread may use.

        Where each descriptor of queries for a matrix instruction, which stay the same, has two registers, the largest
        tile lacks some: 10 of them are read again in every tile of keys, the rest lies outside of the loop.
        """
        return 384 if (self.n, self.keys) == (32, 64) else 0

    @property
    def name(self) -> str:
        """Such as ``split_16x64_w4_s3``."""
        return f"{'split' if self.split else 'whole'}_{self.n}x{self.keys}_w{self.warps}_s{self.stages}"

    def shared(self, call: OpCall) -> int:
        """Bytes of shared memory: queries, weights, and latents that are on their way or widened."""
        width, element = sum(padded(call)), DTYPE_BYTES[call.tensors["cache"].dtype]
        widened = self.keys * width * 2 if element == 1 else 0
        rank, rope = padded(call)
        tile = self.keys * (rank + 2 * rope if "scales" in call.tensors else width * element)
        return (self.n * width + self.keys * self.n) * 2 + self.stages * tile + widened

    def blocks(self, call: OpCall) -> int:
        """Blocks of the launch: all that run at once, or as many as there can be something to do for."""
        resident = max(1, min(call.shared_bytes // (self.shared(call) + 1024), 8 // self.warps))
        pages, page = int(call.tensors["page_table"].shape[1]), int(call.tensors["cache"].shape[1])
        most = self.items(call)
        if self.split:
            most = -(-most * -(-pages * page // self.keys) // LEAST)
        return max(1, min(most, call.multiprocessors * resident))

    def items(self, call: OpCall) -> int:
        """The most items that rows of the bucket can make."""
        rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
        heads = call.attrs["heads"]
        if "query_len" not in call.tensors:
            return rows * -(-heads // self.n)
        # A row wastes at most n - 1 places of its last tile, and no item is empty.
        return min((tokens * heads + rows * (self.n - 1)) // self.n, tokens * -(-heads // self.n))

    def seconds(self, call: OpCall) -> float:
        """What rows with the context that the plan expects take."""
        rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
        heads, rank, rope = (call.attrs[name] for name in ("heads", "rank", "rope"))
        if "query_len" not in call.tensors or call.rows == tokens:
            items, keys, distinct = tokens * -(-heads // self.n), call.context, rows
        else:
            items, keys, distinct = -(-tokens * heads // self.n), max(call.context - tokens, _FEW), 1
        tiles, blocks = -(-keys // self.keys), self.blocks(call)
        at_once = max(blocks, call.multiprocessors)
        read = self.keys * token_bytes(call)
        work = 2 * self.n * self.keys * (2 * rank + rope)
        a_tile = max(
            _TILE,
            read * at_once / (_L2 * call.bandwidth),
            work * at_once / ((_REACHED if self.keys == 64 else _SLOW) * call.flops["bfloat16"]),
        )
        if self.split:
            share = max(-(-items * tiles // blocks), LEAST)
            busy = -(-items * tiles // share)
            parts = 2 * 2 * busy * self.n * rank * 4 / (_L2 * call.bandwidth)  # written and read
            took = share * a_tile + -(-share // tiles) * _ITEM + _LAUNCH + parts
        else:
            took = -(-items // blocks) * (tiles * a_tile + _ITEM)
        return _LONGER * (_LAUNCH + max(took, distinct * tiles * read / call.bandwidth))


def token_bytes(call: OpCall) -> int:
    """Bytes of a token in the cache, those of its scale included."""
    element, (rank, rope) = DTYPE_BYTES[call.tensors["cache"].dtype], (call.attrs["rank"], call.attrs["rope"])
    return (rank + rope) * element if "scales" not in call.tensors else rank * element + 2 * rope + 4


def padded(call: OpCall) -> tuple[int, int]:
    """Rank and rotated features in powers of two."""
    return power_of_two(max(16, call.attrs["rank"])), power_of_two(max(16, call.attrs["rope"]))


def tilings(call: OpCall) -> list[Tiling]:
    """All that fit the call and the target, best first.

    64 keys are the least that a Hopper matrix instruction takes on its long side.
    """
    page, element = int(call.tensors["cache"].shape[1]), DTYPE_BYTES[call.tensors["cache"].dtype]
    sides = [(16, 32, 4, 3), (32, 32, 8, 2)] if element == 2 else [(16, 32, 8, 3), (32, 32, 8, 2)]
    # Addresses of tiles that span pages, or values that are widened, leave no registers for 64 keys.
    if "wgmma" in call.features and page % 64 == 0 and element == 2:
        sides = [(16, 64, 4, 2), (32, 64, 4, 2), *sides]
    cut = (False,) if call.invariant else (True, False)
    made = [Tiling(*side, split) for side in sides for split in cut]
    heads, tokens = call.attrs["heads"], int(call.tensors["q"].shape[0])
    many = "query_len" in call.tensors and (
        call.invariant or tokens > int(call.tensors["page_table"].shape[0])
    )
    vectors = heads * 4 if many else heads
    fitting = [
        tiling
        for tiling in made
        if tiling.n <= max(16, power_of_two(vectors)) and tiling.shared(call) <= call.shared_bytes - 1024
    ]
    return sorted(fitting, key=lambda tiling: tiling.seconds(call))
