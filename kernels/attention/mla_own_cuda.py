"""Latent attention of a step's own tokens on Hopper in CUDA C++ (csrc/mla_own.cu), with keys of every head."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from makeready.kernels.attention.extend_cuda import most_tiles
from makeready.kernels.attention.mla import mla_own_attention
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

_SIZES = {"nope": 128, "rope": 64, "value": 128, "rank": 512}
_TILE, _RUN = 128, 64  # tokens of a tile and keys of a step; keys of a copy
# Microseconds of a launch, of an item without its steps and of a step, of 1,024 to 16,384 tokens with 16 heads as a
# prototype ran on one H200; other devices are taken to be as much faster or slower as their matrix rate is.
_LAUNCH_US, _ITEM_US, _STEP_US = 2.0, 1.3, 2.05


def _applies(call: OpCall) -> bool:
    q, kv, latent, y = (call.tensors[name] for name in ("q", "kv", "latent", "y"))
    return (
        all(call.attrs[name] == size for name, size in _SIZES.items())
        and q.dtype in ("bfloat16", "float16")
        and kv.dtype == latent.dtype == y.dtype == q.dtype
        and all(x.alignment % 16 == 0 and x.row_stride % 8 == 0 for x in (q, kv, latent, y))
        and call.attrs["scale"] > 0
    )


@cuda_kernel(mla_own_attention, "wgmma", features=("tma", "wgmma"), applies=_applies)
def mla_own_attention_wgmma(call: OpCall) -> Sequence[Candidate]:
    """One cut."""
    return [candidate(call)]


def candidate(call: OpCall, *, give_up: int = 0) -> Candidate:
    """The launch for ``call``.

    Args:
        give_up: polls after which a wait gives up, so that a fault gives wrong numbers instead of a hang; 0: never.
            For debugging; plans hold kernels that wait.
    """
    q, kv, latent, y = (call.tensors[name] for name in ("q", "kv", "latent", "y"))
    heads, rows, tokens = call.attrs["heads"], int(call.tensors["query_len"].shape[0]), int(q.shape[0])
    key, of_head = _SIZES["nope"] + _SIZES["rope"], _SIZES["nope"] + _SIZES["value"]
    dependent = "pdl" in call.features
    constants = {"FP16": q.dtype == "float16", "PDL": dependent}

    def reach(spare: bool) -> int:
        # Tiles reach beyond the last token; where the memory there is the plan's, copying is faster than zeros.
        return tokens + (_TILE if spare else 0)

    launch = DeviceLaunch(
        function="csrc/mla_own.cu:mla_own",
        constants=constants | ({"GIVE_UP": give_up} if give_up else {}),
        arguments={
            "q_map": Descriptor(
                "q", (reach(q.spare), heads, key), (q.row_stride, key, 1), (_TILE, 1, 64), swizzle=128
            ),
            # Columns of a head come in several copies: the first brings more of them.
            "kv_map": Descriptor(
                "kv",
                (reach(kv.spare), heads, of_head),
                (kv.row_stride, of_head, 1),
                (_RUN, 1, 64),
                swizzle=128,
                promotion=256,
            ),
            "rope_map": Descriptor(
                "latent",
                (reach(latent.spare), _SIZES["rank"] + _SIZES["rope"]),
                (latent.row_stride, 1),
                (_RUN, 64),
                swizzle=128,
            ),
            **{name: Pointer(name) for name in ("kv", "y", "log_sum", "query_start", "query_len")},
            "counter": Scratch(0, "int32"),
            "rows": Scalar(rows, "int32"),
            "tokens": Scalar(tokens, "int32"),
            "heads": Scalar(heads, "int32"),
            "kv_stride": Scalar(kv.row_stride, "int32"),
            "y_stride": Scalar(y.row_stride, "int32"),
            "scale_log2": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(min(call.multiprocessors, heads * most_tiles(rows, tokens, _TILE)), 1, 1),
        dependent=dependent,
    )
    return Candidate(
        "wgmma_128x128", (launch,), scratch=256, zeroed=256, seconds=1e-6 * microseconds(call, tokens, heads)
    )


def microseconds(call: OpCall, tokens: int, heads: int) -> float:
    """What one prompt takes that fills the bucket."""
    flops = call.flops[call.tensors["q"].dtype]
    a_step = _STEP_US * (H100_FLOPS["bfloat16"] / 132) / (flops / call.multiprocessors)
    tiles = -(-tokens // _TILE)
    ends = [0.0] * min(call.multiprocessors, heads * tiles)
    for steps in range(tiles, 0, -1):  # in the order in which blocks take them
        for _ in range(heads):
            heapq.heapreplace(ends, ends[0] + _ITEM_US + steps * a_step)
    return _LAUNCH_US + max(ends)
