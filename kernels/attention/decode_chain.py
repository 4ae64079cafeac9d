"""Everything between a decoding row's q/k/v projection and its attention's result, as one op."""

from __future__ import annotations

import torch

from makeready.kernels.attention.paged import decode_attention, norm_rope_kv_write
from makeready.kernels.contract import Tolerance, contract


@contract(
    "qkv[R,(heads+2*kv_heads)*head_dim]:A rows[R,Q]:float32 q_norm?[head_dim]:W k_norm?[head_dim]:W kv_slot[R]:int32 "
    "k_cache![P,S,kv_heads,head_dim]:C v_cache![P,S,kv_heads,head_dim]:C page_table[R,B]:int32 context_len[R]:int32 "
    "sinks?[heads]:float32 "
    "-> y[R,heads*head_dim]:A",
    tolerance=Tolerance(bfloat16=1.5e-2),
    flops="4*R*context*heads*head_dim+8*R*(heads+kv_heads)*head_dim",
    rate="qkv",
    traffic={"k_cache": "R*context*kv_heads*head_dim", "v_cache": "R*context*kv_heads*head_dim"},
    chains=("norm_rope_kv_write", "decode_attention"),
)
def norm_rope_kv_write_decode_attention(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    kv_slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_len: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    scale: float,
    offset: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """``decode_attention`` of the queries that ``norm_rope_kv_write`` gives, over the caches that it writes."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    q = norm_rope_kv_write(
        qkv, rows, q_norm, k_norm, kv_slot, k_cache, v_cache, **sizes, eps=eps, offset=offset
    )
    caches = (k_cache, v_cache, page_table, context_len, sinks)
    return decode_attention(q, *caches, **sizes, scale=scale, window=window)
