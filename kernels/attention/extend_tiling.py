"""Which tiles extend attention is cut into, and what they cost.

# M query vectors of a tile, L keys of a step
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from makeready.kernels.device import H100_FLOPS, OpCall
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_LEAST = 256  # keys of a part, at least: leaving and adding parts costs what 100 keys do
_ITEM_US, _SPLIT_US = (
    2.0,
    2.5,
)  # until the first product of an item and after its last; to leave and add parts
# Operations/s of a multiprocessor with one block and with all it can hold, by (M, L, steps at once, warps), of
# 8,000 tokens after none and of 512 after 7,680, with 32 heads of 128 on one H100 at bf16; other devices'
# are taken to be as much higher or lower as their matrix rate is.
_RATES = {
    (128, 64, 1, 4): (2.16e12, 3.86e12),
    (128, 32, 1, 4): (1.70e12, 3.24e12),
    (64, 64, 1, 4): (1.9e12, 3.28e12),
    (128, 64, 2, 8): (3.4e12, 3.5e12),
    (128, 64, 1, 8): (3.56e12, 3.56e12),
}
_NARROW = (
    1.35  # times as long with an 8-bit cache, of 8,000 tokens after none there: keys and values are converted
)
_H100_COUNT = 132  # multiprocessors of it
_SLOWEST = (1.5e12, 3.0e12)
_STREAMED = 0.8  # share of the bandwidth at which rows read their keys and values, as in extend_cuda.py


@dataclass(frozen=True)
class Tiling:
    """Sides of a tile, compile options and the grid.

    Attributes:
        m: query vectors of a tile.
        keys: of a step.
        pair: two steps share one update of the running maximum.
        tma: keys come through tensor maps.
        resident: blocks that a multiprocessor holds.
        rounds: as many blocks as the device holds go through the items in rounds; else a block an item.
        masked: a query's sums do not depend on its tile: no tile is cut, and all steps have masks.
    """

    m: int
    keys: int
    pair: bool
    tma: bool
    warps: int
    stages: int
    resident: int
    rounds: bool = True
    masked: bool = False

    @property
    def least(self) -> int:
        """Keys of a part, at least: more than any row has where tiles are not to be cut."""
        return 1 << 30 if self.masked else _LEAST

    @property
    def name(self) -> str:
        """Such as ``tma_128x64x2_w8_s3``."""
        kind, pair = "tma" if self.tma else "gather", "x2" if self.pair else ""
        kind = "masked" if self.masked else kind
        grid = "" if self.rounds else "_each"
        return f"{kind}_{self.m}x{self.keys}{pair}_w{self.warps}_s{self.stages}{grid}"

    def shares(self, call: OpCall) -> int:
        """Blocks that run at once, for which the work is divided."""
        return call.multiprocessors * self.resident

    def slots(self, call: OpCall) -> int:
        """Parts that can be left at once.

        A row that is cut has more keys than a share, so its parts are fewer than twice its keys over a
        share; a tile sees half of its row's keys or more on average; shares add up to all that tiles see.
        """
        pages, page = int(call.tensors["page_table"].shape[1]), int(call.tensors["k_cache"].shape[1])
        parts = -(-pages * page // self.least)
        return 1 if parts == 1 else min(4 * self.shares(call), self.tiles(call) * parts)

    def tiles(self, call: OpCall) -> int:
        """The most tiles that rows of the bucket can make, of all KV heads."""
        rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
        a_tile = self.m // _group(call)
        # A row wastes at most a_tile - 1 places of its last tile, and every tile has a token.
        return call.attrs["kv_heads"] * min(tokens, (tokens + rows * (a_tile - 1)) // a_tile)

    def blocks(self, call: OpCall) -> int:
        """Blocks of the launch."""
        most = self.tiles(call) + self.slots(call)
        return min(most, self.shares(call)) if self.rounds else most

    def microseconds(self, call: OpCall) -> float:
        """What one prompt takes that fills the bucket, or is a chunk of the context that the plan expects.

        Of steps that verify drafts, what rows with that context take.
        """
        rows, tokens, group = 1, int(call.tensors["q"].shape[0]), _group(call)
        if call.op.startswith("verify"):
            rows, tokens = call.rows, -(-tokens // call.rows)
        a_tile, window = self.m // group, call.attrs["window"]
        before = max(0, call.context - tokens)
        keys = [min(before + end, before + tokens) for end in range(a_tile, tokens + a_tile, a_tile)] * rows
        if self.masked and call.rows == tokens:  # a decode step
            keys = [call.context] * tokens
        if window:
            keys = [min(n, window + a_tile) for n in keys]
        share = max(call.attrs["kv_heads"] * sum(keys) / self.shares(call), self.least)
        items = sorted((n / -(-n // share) for n in keys for _ in range(int(-(-n // share)))), reverse=True)
        alone, full = _RATES.get((self.m, self.keys, 1 + self.pair, self.warps), _SLOWEST)
        crowded = call.attrs["kv_heads"] * len(items) > call.multiprocessors
        rate = full / self.resident if crowded and self.resident > 1 else alone
        rate *= (call.flops["bfloat16"] / call.multiprocessors) / (H100_FLOPS["bfloat16"] / _H100_COUNT)
        a_key = 4e6 * self.m * call.attrs["head_dim"] / rate
        if DTYPE_BYTES[call.tensors["k_cache"].dtype] == 1:
            a_key *= _NARROW
        ends = [0.0] * min(self.shares(call), call.attrs["kv_heads"] * len(items))
        if rows > 1:  # no other tile has brought their keys to L2
            a_key = max(a_key, 1e6 * key_bytes(call) * len(ends) / (_STREAMED * call.bandwidth))
        for n in items:
            for _ in range(call.attrs["kv_heads"]):
                heapq.heapreplace(ends, ends[0] + _ITEM_US + n * a_key)
        return max(ends) + _SPLIT_US * (len(items) > len(keys))


def tilings(call: OpCall) -> list[Tiling]:
    """All that fit the call and the target, best first.

    With two blocks of 4 warps on a multiprocessor one computes maxima and exponentials while the other
    multiplies; with one block of 8 warps a tile is done sooner, which counts where there are few.
    """
    head_dim, page, group = call.attrs["head_dim"], int(call.tensors["k_cache"].shape[1]), _group(call)
    D = power_of_two(max(head_dim, 16))
    tma, scaled = _addressable(call, D) and page % 32 == 0, "scales" in call.tensors
    keys, short = min(64, 8192 // D), 32
    if call.attrs.get("bits") == 4:  # unpacking takes registers
        keys //= 2
        short = min(keys, short)
    if tma:
        keys = max(n for n in (32, 64) if n <= keys and page % n == 0)
    m = max(128 if D <= 128 else 64, power_of_two(group))
    element = DTYPE_BYTES[call.tensors["k_cache"].dtype]
    made = [
        Tiling(m, keys, False, tma, 4, 2, 2, False),
        Tiling(m, short, False, tma, 4, 3, 2, False),
        Tiling(m, keys, tma and not scaled, tma, 8, 2, 1),
        Tiling(m, keys, False, tma, 8, 3, 1),
        Tiling(64, keys, False, tma, 4, 2, 2),
    ]
    if call.invariant:
        tma = False
        sides = ((m, keys, 8, 1), (m, short, 8, 1), (64, keys, 4, 2), (64, short, 4, 2))
        made = [Tiling(t, n, False, tma, warps, 3, resident, masked=True) for t, n, warps, resident in sides]
    # What leaves registers for 192 sums and scores, else 144.
    plain = tma and call.attrs["window"] == 0 and not scaled
    fitting = [
        tiling
        for tiling in dict.fromkeys(made)
        if tiling.m >= max(16 * tiling.warps, group)
        and tiling.m * (D + tiling.keys) <= (192 if plain else 144) * 32 * tiling.warps
        and _shared(tiling, D, element) <= call.shared_bytes
    ]
    return sorted(fitting, key=lambda tiling: tiling.microseconds(call))


def key_bytes(call: OpCall) -> int:
    """Of a token's key and value in a KV head, with their scales."""
    stored = [call.tensors[name] for name in ("k_cache", "v_cache", "scales") if name in call.tensors]
    return sum(int(x.shape[3]) * DTYPE_BYTES[x.dtype] for x in stored)


def _group(call: OpCall) -> int:
    return call.attrs["heads"] // call.attrs["kv_heads"]


def _addressable(call: OpCall, D: int) -> bool:
    """Whether tensor maps can describe the caches and feed the tensor cores with what they hold."""
    caches = [call.tensors[name] for name in ("k_cache", "v_cache")]
    kinds = {call.tensors["q"].dtype, "float8_e4m3fn", "int8"}
    return (
        "tma" in call.features
        and call.attrs["head_dim"] == D
        and all(c.alignment % 16 == 0 and c.dtype in kinds for c in caches)
    )


def _shared(tiling: Tiling, D: int, element: int) -> int:
    """Bytes of shared memory: queries, and the keys and values that are on their way."""
    return tiling.m * D * 2 + 2 * tiling.stages * (1 + tiling.pair) * tiling.keys * D * element + 1024
