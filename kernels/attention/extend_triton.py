"""Extend attention on the GPU in Triton: from a call to launches of extend_tiles_triton.py, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from makeready.kernels.attention import extend_tiles_triton
from makeready.kernels.attention.extend_tiling import Tiling, tilings
from makeready.kernels.attention.paged import extend_attention, verify_attention
from makeready.kernels.attention.scaled import extend_attention_scaled, verify_attention_scaled
from makeready.kernels.device import (
    Argument,
    Candidate,
    Descriptor,
    DeviceLaunch,
    OpCall,
    Pointer,
    Scalar,
    Scratch,
)
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2 and call.attrs["scale"] > 0


@cuda_kernel(verify_attention_scaled, "tiles", applies=_sixteen_bits)
@cuda_kernel(verify_attention, "tiles", applies=_sixteen_bits)
@cuda_kernel(extend_attention_scaled, "tiles", applies=_sixteen_bits, invariant=True)
@cuda_kernel(extend_attention, "tiles", applies=_sixteen_bits, invariant=True)
def extend_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Tiles of different sides, best first by the model of extend_tiling.py."""
    return [candidate(call, tiling) for tiling in tilings(call)]


def candidate(call: OpCall, tiling: Tiling) -> Candidate:
    """The launch of ``tiling``, its parts in scratch behind one counter a slot."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    page = int(call.tensors["k_cache"].shape[1])
    rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
    slots = tiling.slots(call)
    counters = -(-4 * slots // 256) * 256
    stats = -(-8 * slots * tiling.m // 256) * 256
    dependent = "pdl" in call.features
    optional = {name for name in ("scales", "sinks") if name in call.tensors}

    def cache(name: str) -> Argument:
        strides = (page * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        shape = ("P", page, kv_heads, head_dim)
        return (
            Descriptor(name, shape, strides, (1, tiling.keys, 1, head_dim)) if tiling.tma else Pointer(name)
        )

    launch = DeviceLaunch(
        function=f"{extend_tiles_triton.__name__}:extend_attention_tiles",
        constants={
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "HEAD_DIM": head_dim,
            "BITS": call.attrs.get("bits", 0),
            "PAGE": page,
            "WINDOW": call.attrs["window"],
            "R": max(64, power_of_two(call.most_rows if call.invariant else rows)),
            "M": tiling.m,
            "D": power_of_two(max(head_dim, 16)),
            "L": tiling.keys,
            "EDGE": tiling.keys if tiling.masked else min(tiling.keys, 32),
            "PAIR": tiling.pair,
            "TMA": tiling.tma,
            "SHARES": tiling.shares(call),
            "LEAST": tiling.least,
            "ROUNDS": tiling.rounds,
            "MASKED": tiling.masked,
            "PDL": dependent,
            **dict.fromkeys(sorted({"scales", "sinks"} - optional)),
        },
        arguments={
            **{name: Pointer(name) for name in ("q", "k_cache", "v_cache", "page_table", "y")},
            **{name: Pointer(name) for name in ("query_start", "query_len", "context_len")},
            **{name: Pointer(name) for name in sorted(optional)},
            "k_tiles": cache("k_cache"),
            "v_tiles": cache("v_cache"),
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "rows": Scalar(rows, "int32", specialize=False),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(tiling.blocks(call), 1, 1),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        dependent=dependent,
        local_bytes=96,  # 72 are used at 4 warps of 128 x 64, none of them inside a loop
    )
    scratch = counters + stats + slots * tiling.m * head_dim * 4
    return Candidate(tiling.name, (launch,), scratch, counters, 1e-6 * tiling.microseconds(call))
