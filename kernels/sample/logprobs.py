"""Log-probabilities of sampled tokens and of their most probable rivals."""

from __future__ import annotations

import torch

from makeready.kernels.contract import contract


def _largest(x_V: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the ``count`` largest entries, descending, the lowest id first among equals."""
    pool = (x_V >= x_V.topk(count, sorted=False).values.min()).nonzero().squeeze(1)
    return pool[x_V[pool].sort(descending=True, stable=True).indices[:count]]


@contract(
    "logits[R,V]:float32 tokens[R]:int32 row_slot[R]:int32 top_logprobs[S]:int32 "
    "-> logprob[R]:float32 top_ids[R,max_top]:int32 top_values[R,max_top]:float32",
    rowwise="R",
    flops="4*R*V",
)
def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    row_slot: torch.Tensor,
    top_logprobs: torch.Tensor,
    *,
    max_top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Natural-log probabilities under the model's own distribution, the softmax of the raw ``logits``.

    Bias, penalties, temperature and filters do not enter. What row r gets depends on
    ``k = top_logprobs[row_slot[r]]``:

    * ``k < 0``: nothing was asked, and nothing is computed (the null slot's is negative);
    * ``k == 0``: ``logprob[r]``, that of ``tokens[r]``;
    * ``k > 0``: also the ``min(k, max_top, V)`` most probable tokens, descending, the lowest id first
      among equals, in ``top_ids[r]`` and ``top_values[r]``. The sampled token is not added to them.

    Entries that were not asked for are 0, their ids -1. A negative token, which the sampler gives where there
    is none, has the log-probability NaN.
    """
    rows, vocabulary = logits.shape
    logprob = torch.zeros(rows)
    top_ids = torch.full((rows, max_top), -1, dtype=torch.int32)
    top_values = torch.zeros(rows, max_top)
    for r, asked in enumerate(top_logprobs[row_slot.long()].tolist()):
        if asked < 0:
            continue
        gaps = logits[r] - logits[r].max()
        # Summed in fp64 so that the logarithm of a sum just above 1 is exact to fp32.
        norm = gaps.exp().sum(dtype=torch.float64).log()
        logprob[r] = gaps[int(tokens[r])] - norm if tokens[r] >= 0 else float("nan")
        count = min(asked, max_top, vocabulary)
        if count:
            ids = _largest(logits[r], count)
            top_ids[r, : len(ids)] = ids.int()
            top_values[r, : len(ids)] = (gaps[ids] - norm).float()
    return logprob, top_ids, top_values
