"""What happens to one row of logits before a token is drawn: adjustments, then filters.

Every filter keeps the tokens above a threshold, so their order cannot reorder tokens, and tokens with
equal logits are kept or dropped together. None needs a sort: a kernel finds the thresholds by
radix selection or bisection over the bits of the logits.

    V vocabulary, N tokens that earlier filters kept
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Probabilities relative to the largest are summed as integers of this unit: such sums do not depend on
# their order. 2**18 tokens add up to less than 2**59, and truncation loses at most 2**-22 of the mass.
MASS_UNIT = 2.0**40
_DEEPEST = 28.0  # exp(-28) has no mass
_BUCKETS = 2048


def adjust(
    logits_V: torch.Tensor,
    *,
    prompt: torch.Tensor,
    output: torch.Tensor,
    stop_ids: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    min_new_tokens: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of one row after bias, minimum length, penalties and mask, in this order, as a new tensor.

    1. ``logits[bias_ids] += bias_values``; ids of a row are distinct, those outside ``0 .. V-1`` unused;
    2. while fewer than ``min_new_tokens`` output tokens exist, ``logits[stop_ids] = -inf``, with unused
       ids as above;
    3. every token of the prompt or the output, once: divided by ``repetition_penalty`` where its logit is
       positive, multiplied where not (Keskar et al. 2019, arXiv:1909.05858);
    4. every token of the output, seen ``count`` times: minus
       ``frequency_penalty * count + presence_penalty``;
    5. ``-inf`` where the token's bit in ``allowed`` is 0.

    Args:
        logits_V: raw logits, float32.
        prompt, output: token ids of the request so far, int32.
        stop_ids, bias_ids: int32[E], int32[B].
        bias_values: float32[B].
        allowed: int32[cdiv(V, 32)], bit i % 32 of word i // 32 for token i; None allows all.
    """
    z = logits_V.clone()
    used = (bias_ids >= 0) & (bias_ids < len(z))
    z.index_add_(0, bias_ids[used].long(), bias_values[used])
    if len(output) < min_new_tokens:
        z[stop_ids[(stop_ids >= 0) & (stop_ids < len(z))].long()] = float("-inf")
    if repetition_penalty != 1:
        seen = torch.cat((prompt, output)).long()
        old = z[seen]
        z[seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if presence_penalty or frequency_penalty:
        ids, count = output.long().unique(return_counts=True)
        z[ids] -= frequency_penalty * count + presence_penalty
    if allowed is not None:
        bits = (allowed[:, None] >> torch.arange(32)) & 1
        z[bits.flatten()[: len(z)] == 0] = float("-inf")
    return z


@dataclass(frozen=True)
class Candidates:
    """Tokens that can still be drawn, ascending by id."""

    ids: torch.Tensor  # int64[N]
    logits: torch.Tensor  # [N] adjusted logits: what filters order tokens by
    gaps: torch.Tensor  # [N] (logit - largest logit) / temperature: log p relative to the most probable

    def where(self, keep: torch.Tensor) -> Candidates:
        """Those that the mask ``keep`` (bool[N]) selects."""
        chosen = keep.nonzero().squeeze(1)
        return Candidates(self.ids[chosen], self.logits[chosen], self.gaps[chosen])


def candidates(logits_V: torch.Tensor, temperature: float) -> Candidates:
    """All tokens of one row; the largest logits have gap 0 even where they are infinite.

    Subtracting before dividing keeps the smallest positive temperature from overflowing.
    """
    largest = logits_V.max()
    gaps = ((logits_V - largest) / temperature).masked_fill_(logits_V == largest, 0.0)
    return Candidates(torch.arange(len(logits_V)), logits_V, gaps)


def survivors(tokens: Candidates, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Candidates:
    """Apply top-k, top-p and min-p in this order; at least the most probable token stays.

    * top-k (off at ``<= 0``) keeps every token whose logit is at least the k-th largest.
    * top-p (off at ``>= 1``; Holtzman et al. 2019, arXiv:1904.09751) looks at the distribution
      renormalised over what top-k kept, and keeps every token for which the tokens with strictly larger
      logits hold less than ``top_p`` of the mass: the smallest set of most probable tokens that holds at
      least ``top_p``, completed by the equals of its last member.
    * min-p (off at ``<= 0``; Nguyen et al. 2024, arXiv:2407.01082) keeps every token at least ``min_p``
      times as probable as the most probable one: ``exp(gap) >= min(min_p, 1)``.

    This is the order of transformers, and of SGLang wherever min-p is used.
    """
    if 0 < top_k < len(tokens.ids):
        tokens = tokens.where(tokens.logits >= tokens.logits.topk(top_k, sorted=False).values.min())
    if top_p < 1:
        tokens = tokens.where(tokens.logits >= _nucleus_floor(tokens, top_p))
    if min_p > 0:
        tokens = tokens.where(tokens.gaps.exp() >= min(min_p, 1.0))
    return tokens


def _nucleus_floor(tokens: Candidates, top_p: float) -> torch.Tensor:
    """Logit of the last token of the nucleus.

    Masses are ``int64(exp(gap) * MASS_UNIT)``, truncated; the comparison with ``top_p`` times their sum
    is in float64. A histogram over the gaps narrows the search to one bucket, since sorting the whole
    vocabulary takes five times as long as all the rest.
    """
    mass = (tokens.gaps.exp() * MASS_UNIT).long()
    needed = top_p * float(mass.sum())
    bucket = (tokens.gaps.clamp(min=-_DEEPEST) * (-_BUCKETS / _DEEPEST)).long()
    held = mass.new_zeros(_BUCKETS + 1).scatter_add_(0, bucket, mass).cumsum(0)  # by buckets 0 .. b
    last = torch.searchsorted(held.double(), needed)
    inside = (bucket == last).nonzero().squeeze(1)
    logits, order = tokens.logits[inside].sort(descending=True)
    mass = mass[inside[order]]
    reached = held[last] - mass.sum() + mass.cumsum(0)
    return logits[torch.searchsorted(reached.double(), needed)]
