"""One decoding row from its q/k/v projection to its attention's result in one launch (csrc/decode_one.cu).

With one row all is latency: the head norms' launch, and the way of keys that they wrote to memory and back, are as
long as the attention itself. Keys are asked for before the projection has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from makeready.kernels.attention.decode_chain import norm_rope_kv_write_decode_attention
from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar, Scratch
from makeready.kernels.registry import cuda_kernel

_MOST_SPLITS = 16  # parts that the last block of a head holds in registers at once


def _applies(call: OpCall) -> bool:
    qkv, k, v, y = (call.tensors[name] for name in ("qkv", "k_cache", "v_cache", "y"))
    head_dim, group = call.attrs["head_dim"], call.attrs["heads"] // call.attrs["kv_heads"]
    norms = [call.tensors[name] for name in ("q_norm", "k_norm") if name in call.tensors]
    return (
        call.dims["R"] == 1
        and head_dim in (64, 128)
        and call.dims["Q"] == head_dim
        and group in (1, 2, 4)
        and group * call.attrs["kv_heads"] == call.attrs["heads"]
        and int(k.shape[1]) % 16 == 0
        and qkv.dtype in ("bfloat16", "float16")
        and all(x.dtype == qkv.dtype for x in (k, v, y, *norms))
        and all(x.alignment % 16 == 0 for x in (qkv, k, v, y))
        and call.attrs["scale"] > 0
        and "sinks" not in call.tensors
    )


@cuda_kernel(norm_rope_kv_write_decode_attention, "one", features=("tma", "pdl"), applies=_applies)
def decode_one(call: OpCall) -> Sequence[Candidate]:
    """The one way there is."""
    return [candidate(call)]


def candidate(call: OpCall) -> Candidate:
    """The launch for ``call``, with as many shares of a head's keys as multiprocessors have room for."""
    heads, kv_heads, head_dim = (call.attrs[name] for name in ("heads", "kv_heads", "head_dim"))
    group, norm = heads // kv_heads, "q_norm" in call.tensors
    splits = max(1, min(_MOST_SPLITS, call.multiprocessors // kv_heads))
    counters = -(-4 * kv_heads // 256) * 256
    stats = -(-kv_heads * splits * group * 8 // 256) * 256
    launch = DeviceLaunch(
        function="csrc/decode_one.cu:decode_one",
        constants={
            "D": head_dim,
            "GROUP": group,
            "KV_HEADS": kv_heads,
            "PAGE": int(call.tensors["k_cache"].shape[1]),
            "WINDOW": call.attrs["window"],
            "NORM": norm,
            "SPLITS": splits,
            "FP16": call.tensors["qkv"].dtype == "float16",
        },
        arguments={
            **{name: Pointer(name) for name in ("qkv", "rows", "kv_slot", "k_cache", "v_cache")},
            **{name: Pointer(name) for name in ("page_table", "context_len", "y")},
            "q_norm": Pointer("q_norm" if norm else "qkv"),
            "k_norm": Pointer("k_norm" if norm else "qkv"),
            "arrived": Scratch(0, "int32"),
            "stats": Scratch(counters, "float32"),
            "sums": Scratch(counters + stats, "float32"),
            "eps": Scalar(call.attrs["eps"], "float32"),
            "offset": Scalar(call.attrs["offset"], "float32"),
            "scale_log2": Scalar(call.attrs["scale"] * math.log2(math.e), "float32"),
        },
        grid=(kv_heads * splits, 1, 1),
        dependent=True,
        early=(
            "k_cache",
            "v_cache",
            "page_table",
            "context_len",
            *(("q_norm", "k_norm") if norm else ()),
        ),
    )
    scratch = counters + stats + kv_heads * splits * group * head_dim * 4
    return Candidate("one", (launch,), scratch=scratch, zeroed=counters)
