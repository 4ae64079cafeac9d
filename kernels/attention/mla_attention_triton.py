"""Absorbed latent attention on the GPU: from calls to launches of mla_latents_triton.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from makeready.kernels.attention.mla import mla_decode_attention, mla_extend_attention
from makeready.kernels.attention.mla_latents_tiling import LEAST, Tiling, padded, tilings
from makeready.kernels.attention.mla_scaled import mla_decode_attention_scaled, mla_extend_attention_scaled
from makeready.kernels.device import Argument, Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.row_tiles import power_of_two
from makeready.kernels.spec import DTYPE_BYTES

_MODULE = "makeready.kernels.attention.mla_latents_triton"
_AT_ONCE = 8192  # sums that a block reads at once: 64 registers of a thread


def _sixteen_bits(call: OpCall) -> bool:
    return DTYPE_BYTES[call.tensors["q"].dtype] == 2 and call.attrs["scale"] > 0


@cuda_kernel(mla_decode_attention, "latents", applies=_sixteen_bits)
@cuda_kernel(mla_decode_attention_scaled, "latents", applies=_sixteen_bits)
def mla_decode_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """Whole items and items that are cut, best first by the model of mla_latents_tiling.py."""
    return [candidate(call, tiling) for tiling in tilings(call)]


@cuda_kernel(mla_extend_attention, "latents", applies=_sixteen_bits, invariant=True)
@cuda_kernel(mla_extend_attention_scaled, "latents", applies=_sixteen_bits, invariant=True)
def mla_extend_attention_cuda(call: OpCall) -> Sequence[Candidate]:
    """As :func:`mla_decode_attention_cuda`; where rows must not depend on each other, nothing is cut."""
    return [candidate(call, tiling) for tiling in tilings(call)]


def candidate(call: OpCall, tiling: Tiling) -> Candidate:
    """The launches of ``tiling``: attention, and where items are cut what adds their parts."""
    heads, rank, rope = (call.attrs[name] for name in ("heads", "rank", "rope"))
    rows, tokens = int(call.tensors["page_table"].shape[0]), int(call.tensors["q"].shape[0])
    extend, scales = "query_len" in call.tensors, ("rope_cache", "scales")
    scaled = "scales" in call.tensors
    D, Q = padded(call)
    blocks, dependent = tiling.blocks(call), "pdl" in call.features
    element = DTYPE_BYTES[call.tensors["cache"].dtype]
    brought = rank * element if scaled else (rank + rope) * element  # of a token, before the kernel begins
    stats = -(-2 * blocks * 2 * tiling.n * 4 // 256) * 256
    fields = ("query_start", "query_len", "context_len") if extend else ("context_len",)
    constants = {
        "HEADS": heads,
        "RANK": rank,
        "OWN": call.attrs.get("own", True),
        # Sums over rows wait for all warps of a block, which one row alone is spared.
        "R": max(64, power_of_two(call.most_rows if call.invariant else rows)) if extend or rows > 1 else 1,
        "N": tiling.n,
        "D": D,
        "K": tiling.keys,
        "PDL": dependent,
        **({} if extend else {"query_start": None, "query_len": None, "log_sum": None}),
    }
    arguments: dict[str, Argument] = {
        **{name: Pointer(name) for name in (*fields, "y", *(("log_sum",) if extend else ()))},
        "rows": Scalar(rows, "int32", specialize=False),
        "y_stride": Scalar(call.tensors["y"].row_stride, "int32"),
        "log_stride": Scalar(call.tensors["log_sum"].row_stride if extend else 0, "int32", specialize=False),
    }
    parts: dict[str, Argument] = {"stats": Scratch(0, "float32"), "sums": Scratch(stats, "float32")}
    attend = DeviceLaunch(
        function=f"{_MODULE}:latent_attention_tiles",
        constants={
            **constants,
            "ROPE": rope,
            "PAGE": int(call.tensors["cache"].shape[1]),
            "Q": Q,
            "SPLIT": tiling.split,
            "LEAST": LEAST,
            # Bulk prefetch takes multiples of 16 bytes.
            "AHEAD": brought % 16 == 0 and "tma" in call.features,
            **({} if scaled else dict.fromkeys(scales)),
            **({} if tiling.split else {"sums": None, "stats": None}),
        },
        arguments={
            **arguments,
            **{name: Pointer(name) for name in ("q", "cache", *(scales if scaled else ()), "page_table")},
            **(parts if tiling.split else {}),
            "tokens": Scalar(tokens, "int32", specialize=False),
            "table_stride": Scalar(call.tensors["page_table"].row_stride, "int32", specialize=False),
            "q_stride": Scalar(call.tensors["q"].row_stride, "int32"),
            "scale": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(blocks, 1, 1),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        dependent=dependent,
        early=(*fields, "page_table"),
        local_bytes=tiling.local_bytes,
    )
    if not tiling.split:
        return Candidate(tiling.name, (attend,), seconds=tiling.seconds(call))
    V = max(1, tiling.n // 32)
    add = DeviceLaunch(
        function=f"{_MODULE}:add_latent_parts",
        constants={**constants, "LEAST": LEAST, "V": V, "AT_ONCE": max(1, min(16, _AT_ONCE // (V * D)))},
        arguments={**arguments, **parts, "blocks": Scalar(blocks, "int32", specialize=False)},
        grid=(blocks * (tiling.n // V), 1, 1),
        dependent=dependent,
        early=fields,
    )
    scratch = stats + 2 * blocks * tiling.n * rank * 4
    return Candidate(tiling.name, (attend, add), scratch, seconds=tiling.seconds(call))
