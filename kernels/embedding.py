"""Token ids and their embeddings."""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract


@contract(
    "token_ids[T]:int32 token_slot[T]:int32 positions[T]:int32 history![S,L]:int32 -> ids[T]:int32",
    tolerance=Tolerance(exact=True),
    traffic={"history": "2*T"},
)
def load_tokens(
    token_ids: torch.Tensor, token_slot: torch.Tensor, positions: torch.Tensor, history: torch.Tensor
) -> torch.Tensor:
    """Ids to run, and the record of them in ``history``.

    A non-negative ``token_ids[t]`` comes from the host and is written to
    ``history[token_slot[t], positions[t]]``. A negative one means "what the previous step sampled",
    which the sampler left in that place: the next token never passes through the host.
    """
    place = (token_slot.long(), positions.long())
    ids = torch.where(token_ids >= 0, token_ids, history[place])
    history[place] = ids
    return ids


@contract("ids[T]:int32 weight[V,C]:W -> x[T,C]:out_dtype|W", rowwise="T", traffic={"weight": "T*C"})
def embedding(ids: torch.Tensor, weight: torch.Tensor, *, out_dtype: str = "") -> torch.Tensor:
    """Rows of ``weight``, converted to the activations' dtype."""
    rows = weight[ids.long()]
    return rows.to(getattr(torch, out_dtype)) if out_dtype else rows
