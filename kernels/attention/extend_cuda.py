"""Extend attention on Hopper in CUDA C++ (csrc/prefill.cu): long rows, where Triton's leaves the tensor cores idle.

No tile is split over blocks, so a few tokens behind a long prefix run on few multiprocessors; rows' sums depend on
how their keys were cut into chunks. Both are what the Triton kernel is for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from makeready.kernels.attention.paged import extend_attention
from makeready.kernels.device import (
    H100_FLOPS,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.registry import cuda_kernel

_RUN, _BOX = 64, 8  # keys of a copy, and of one where a run has few
_GROUPS = (*range(1, 9), 16)  # query heads a KV head, for which the kernel is tested
# Microseconds of a launch and of an item without its steps, of 8 x 1,024 to 1 x 16,384 tokens with 32 heads of 128 on
# one H200 at bf16; other devices are taken to be as much faster or slower as their matrix rate is.
_LAUNCH_US, _ITEM_US = 2.0, 1.0
_STREAMED = 0.8  # share of the bandwidth at which 256 rows of 8 tokens read their 1,024 keys


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts heads of one size; csrc/prefill.cu says the same.

    Attributes:
        vectors: query vectors of an item.
        keys: of a step.
        step_us: microseconds of a step at 16 bits: of 128 measured as above; of 64 and 256 estimated, from its
            exponentials and its products.
        narrow_us: the same with an 8-bit cache, estimated: what it moves within shared memory.
    """

    vectors: int
    keys: int
    step_us: float
    narrow_us: float


TILES = {64: Tile(192, 128, 1.7, 1.8), 128: Tile(128, 128, 1.85, 2.2), 256: Tile(128, 64, 1.9, 2.2)}


def _applies(call: OpCall) -> bool:
    q, y, k, v = (call.tensors[name] for name in ("q", "y", "k_cache", "v_cache"))
    heads, kv_heads = call.attrs["heads"], call.attrs["kv_heads"]
    return (
        call.attrs["head_dim"] in TILES
        and heads % kv_heads == 0
        and heads // kv_heads in _GROUPS
        and int(k.shape[1]) % _RUN == 0
        and q.dtype in ("bfloat16", "float16")
        and y.dtype == q.dtype
        and k.dtype == v.dtype
        and k.dtype in (q.dtype, "float8_e4m3fn")
        and all(x.alignment % 16 == 0 for x in (q, y, k, v))
        and all(x.row_stride % 8 == 0 for x in (q, y))
        and call.attrs["scale"] > 0
    )


@dataclass(frozen=True)
class Schedule:
    """What the kernel can do in two ways, with the same result but for rounding.

    Attributes:
        lazy: sums are rescaled when a maximum has risen by a factor of 2^8 of weights, not whenever it rises
            (FlashAttention-4's rule).
        queries: are held in registers, which spares shared memory.
        early: the product with values is waited for before exponentials, so that packing weights and rescaling sums
            are hidden behind them.
    """

    lazy: bool = False
    queries: bool = False
    early: bool = False

    @property
    def suffix(self) -> str:
        """For a candidate's name."""
        chosen = {"_q": self.queries, "_early": self.early, "_lazy": self.lazy}
        return "".join(name for name, on in chosen.items() if on)


def schedules(call: OpCall) -> list[Schedule]:
    """All that have the registers for ``call``: what suite=[attention] times, of which plans carry one."""
    either = (False, True)
    roomy = either if call.attrs["head_dim"] == 128 and not _narrow(call) else (False,)
    return [Schedule(lazy, queries, early) for queries in roomy for early in either for lazy in either]


def _narrow(call: OpCall) -> bool:
    return call.tensors["k_cache"].dtype == "float8_e4m3fn"


@cuda_kernel(extend_attention, "prefill", features=("tma", "wgmma"), applies=_applies)
def extend_attention_prefill(call: OpCall) -> Sequence[Candidate]:
    """One cut, one way."""
    return [candidate(call)]


_CHOSEN = Schedule()


def candidate(call: OpCall, schedule: Schedule = _CHOSEN, *, give_up: int = 0) -> Candidate:
    """The launch for ``call``.

    Args:
        give_up: polls after which a wait gives up, so that a fault gives wrong numbers instead of a hang; 0: never.
            For debugging; plans hold kernels that wait.
    """
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    q, k, y, table = (call.tensors[name] for name in ("q", "k_cache", "y", "page_table"))
    page, group, tile = int(k.shape[1]), heads // kv_heads, TILES[head_dim]
    rows, tokens, a_tile = int(table.shape[0]), int(q.shape[0]), tile.vectors // group
    dependent, narrow = "pdl" in call.features, _narrow(call)
    constants = {
        "HEAD": head_dim,
        "CACHE8": narrow,
        "FP16": narrow or q.dtype == "float16",
        "BF16_IO": narrow and q.dtype == "bfloat16",
        "GROUP": group,
        "PAGE": page,
        "WINDOW": call.attrs["window"],
        "LAZY": 8 if schedule.lazy else 0,
        "Q_REGISTERS": schedule.queries,
        "EARLY": schedule.early,
        "SINKS": "sinks" in call.tensors,
        "PDL": dependent,
    }
    # Tiles reach beyond the last token; where the memory there is the plan's, copying is faster than zeros.
    q_tokens = tokens + a_tile if q.spare else tokens
    width = kv_heads * head_dim

    def cache(name: str, keys: int) -> Descriptor:
        strides = (page * width, width, head_dim, 1)
        columns, swizzle = (head_dim, 0) if narrow else (64, 128)
        shape = ("P", page, kv_heads, head_dim)
        # Columns of a head come in several copies: the first brings more of them.
        promotion = 128 if head_dim * (1 if narrow else 2) == 128 else 256
        box = (1, keys, 1, columns)
        return Descriptor(name, shape, strides, box, swizzle=swizzle, promotion=promotion)

    launch = DeviceLaunch(
        function="csrc/prefill.cu:attention_prefill",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            "q_map": Descriptor(
                "q",
                (q_tokens, heads, head_dim),
                (q.row_stride, head_dim, 1),
                (a_tile, group, 64),
                swizzle=128,
            ),
            "k_map": cache("k_cache", _RUN),
            "v_map": cache("v_cache", _RUN),
            "k_box_map": cache("k_cache", _BOX),
            "v_box_map": cache("v_cache", _BOX),
            **{
                name: Pointer(name) for name in ("y", "page_table", "query_start", "query_len", "context_len")
            },
            # Without sinks anything of their type, which is not read.
            "sinks": Pointer("sinks") if "sinks" in call.tensors else Scratch(0, "float32"),
            "counter": Scratch(0, "int32"),
            "rows": Scalar(rows, "int32"),
            "tokens": Scalar(tokens, "int32"),
            "kv_heads": Scalar(kv_heads, "int32"),
            "table_stride": Scalar(table.row_stride, "int32"),
            "y_stride": Scalar(y.row_stride, "int32"),
            "scale_log2": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(min(call.multiprocessors, kv_heads * most_tiles(rows, tokens, a_tile)), 1, 1),
        dependent=dependent,
        local_bytes=16,  # at 64, and with some versions of NVRTC; none of it in a loop over keys
    )
    return Candidate(
        f"wgmma_{tile.vectors}x{tile.keys}{schedule.suffix}",
        (launch,),
        scratch=256,
        zeroed=256,
        seconds=1e-6 * microseconds(call),
    )


def most_tiles(rows: int, tokens: int, a_tile: int) -> int:
    """Tiles of ``a_tile`` tokens that rows with ``tokens`` tokens in all can make, at most."""
    # A row wastes at most a_tile - 1 places of its last tile, and every tile has a token.
    return min(tokens, (tokens + rows * (a_tile - 1)) // a_tile)


def microseconds(call: OpCall) -> float:
    """What the batch takes that the bucket is for.

    That is one prompt, or a chunk of the context that the plan expects; with fewer than two tokens a row it is rows
    of one token, of whose tiles most is padding, so that such steps stay the Triton kernel's.
    """
    tokens, kv_heads = int(call.tensors["q"].shape[0]), call.attrs["kv_heads"]
    narrow, tile = _narrow(call), TILES[call.attrs["head_dim"]]
    a_tile, window = tile.vectors // (call.attrs["heads"] // kv_heads), call.attrs["window"]
    if tokens < 2 * call.rows:
        tiles = [(call.context - 1, call.context)] * tokens
        keys = tokens * call.context
    else:
        before = max(0, call.context - tokens)
        keys = before + tokens
        tiles = [(first, min(first + a_tile, keys)) for first in range(before, keys, a_tile)]
    steps = [
        -(-end // tile.keys) - (max(first - window + 1, 0) // tile.keys if window else 0)
        for first, end in tiles
    ]
    rate = (call.flops["bfloat16"] / call.multiprocessors) / (H100_FLOPS["bfloat16"] / 132)
    a_step = (tile.narrow_us if narrow else tile.step_us) / rate
    ends = [0.0] * min(call.multiprocessors, kv_heads * len(steps))
    for n in sorted(steps, reverse=True):  # in the order in which blocks take them
        for _ in range(kv_heads):
            heapq.heapreplace(ends, ends[0] + _ITEM_US + n * a_step)
    # Rows read their keys and values once; those of a prompt stay in L2 for its other tiles.
    nbytes = (1 if narrow else 2) * 2 * call.attrs["head_dim"] * kv_heads * keys
    streamed = 1e6 * nbytes / (_STREAMED * call.bandwidth)
    return _LAUNCH_US + max(*ends, streamed)
