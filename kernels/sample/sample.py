"""The next token of every row, drawn where the logits are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from makeready.kernels.contract import Tolerance, contract
from makeready.kernels.sample.filters import adjust, candidates, survivors
from makeready.kernels.sample.noise import exponential_noise

NOT_FINITE = -1  # instead of a token: the row's logits are no numbers to choose by


class _Knobs(NamedTuple):
    """One row's scalars."""

    slot: int
    context_len: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    min_new_tokens: int
    prompt_len: int
    biased: bool
    masked: bool

    @property
    def adjusts(self) -> bool:
        """Whether anything changes the logits themselves."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(
            self.biased
            or self.masked
            or penalties
            or self.context_len - self.prompt_len < self.min_new_tokens
        )


def _mask(allowed_W: torch.Tensor, place: int, vocabulary: int) -> torch.Tensor:
    """The mask of a place, of those that a slot has."""
    masks = allowed_W.unflatten(0, (-1, -(-vocabulary // 32)))
    return masks[place % len(masks)]


def _draw(z_V: torch.Tensor, row: _Knobs) -> int:
    """Draw from the filtered distribution by the Gumbel-max trick."""
    tokens = candidates(z_V, row.temperature)
    tokens = survivors(tokens, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    noise = exponential_noise(row.seed, row.context_len, tokens.ids)
    return int(tokens.ids[(tokens.gaps - noise.log_()).argmax()])


@contract(
    "logits[R,V]:float32 row_slot[R]:int32 context_len[R]:int32 history![S,L]:int32 prompt_len[S]:int32 "
    "temperature[S]:float32 top_k[S]:int32 top_p[S]:float32 min_p[S]:float32 "
    "presence_penalty[S]:float32 frequency_penalty[S]:float32 repetition_penalty[S]:float32 "
    "seed[S]:int64 min_new_tokens[S]:int32 stop_ids[S,E]:int32 bias_ids[S,B]:int32 bias_values[S,B]:float32 "
    "masked[S]:int32 allowed[S,W]:int32 path?[R,D]:int32 path_len?[R]:int32 -> tokens[R]:int32",
    tolerance=Tolerance(exact=True),
    flops="8*R*V",
    traffic={"history": "R*context", "allowed": "R"},
)
def sample(
    logits: torch.Tensor,
    row_slot: torch.Tensor,
    context_len: torch.Tensor,
    history: torch.Tensor,
    prompt_len: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    presence_penalty: torch.Tensor,
    frequency_penalty: torch.Tensor,
    repetition_penalty: torch.Tensor,
    seed: torch.Tensor,
    min_new_tokens: torch.Tensor,
    stop_ids: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    masked: torch.Tensor,
    allowed: torch.Tensor,
    path: torch.Tensor | None = None,
    path_len: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token a row and append it to the row's history.

    Row r belongs to slot ``s = row_slot[r]``. Its tokens so far are ``history[s, :context_len[r]]``, the
    first ``prompt_len[s]`` of them the prompt, the others output. The sampled token is also written to
    ``history[s, context_len[r]]``, unless the context is full (``context_len[r] == L``). ``logits`` stay
    as they are. Rows that share a slot have different ``context_len``, and all of them see the history as it was
    before. The last slot is the null slot of padding rows: their token is 0, nothing of them is read, nothing is
    written for them.

    With ``path`` rows are ends of branches: the last ``path_len[r]`` of the row's tokens so far are the first ones of
    ``path[r]``, those before them are in the history. Rows that share a slot may then have the same ``context_len``,
    and nothing is written to the history.

    In this order:

    1. the logits are adjusted by bias, minimum length, penalties and, where ``masked[s]`` is not 0, by a mask of
       ``cdiv(V, 32)`` words (bit i % 32 of word i // 32 is token i's): see :func:`~.filters.adjust`. ``allowed[s]``
       has as many as it holds, for places in turn: that of place ``context_len[r]`` is number ``context_len[r]``
       modulo their number. Where nothing is masked it need hold none;
    2. ``temperature[s] <= 0`` is greedy: the largest adjusted logit, the lowest id among equals. Else
       ``gap = (logit - largest logit) / temperature``, 0 for the largest;
    3. ``top_k``, ``top_p``, ``min_p`` choose the survivors: see :func:`~.filters.survivors`;
    4. the survivor with the largest ``gap - log(noise)`` wins, the lowest id among equals, where ``noise``
       is :func:`~.noise.exponential_noise` of ``seed[s]``, position ``context_len[r]`` and the token's id.
       This draws from the softmax of the survivors' gaps (Maddison et al. 2014, arXiv:1411.0030).

    A token with a logit of -inf is never drawn. A row with NaN or +inf among its adjusted logits, or with
    nothing but -inf, has no distribution: its token is :data:`NOT_FINITE`, and its history gets id 0, which
    may be run before the host learns of it. All is computed in fp32 with IEEE division; only exp, log and
    log1p may differ between devices, in the last bit.
    """
    per_slot = (temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty)
    per_slot += (seed, min_new_tokens, prompt_len, (bias_ids >= 0).any(1), masked != 0)
    table = list(zip(*(x.tolist() for x in per_slot), strict=True))
    places = zip(row_slot.tolist(), context_len.tolist(), strict=True)
    rows = [_Knobs(slot, length, *table[slot]) for slot, length in places]
    null = len(history) - 1

    if all(row.slot == null or (row.temperature <= 0 and not row.adjusts) for row in rows):
        tokens = logits.argmax(-1)
        largest = logits.gather(1, tokens[:, None]).squeeze(1)  # NaN where any logit is
        tokens = tokens.int().masked_fill_(~largest.isfinite(), NOT_FINITE)
    else:
        tokens = torch.zeros(len(rows), dtype=torch.int32)
        for r, row in enumerate(rows):
            if row.slot == null:
                continue
            z = logits[r]
            if row.adjusts:
                so_far = history[row.slot, : row.context_len]
                if path is not None and path_len is not None and (count := int(path_len[r])):
                    so_far = torch.cat((so_far[:-count], path[r, :count]))
                z = adjust(
                    z,
                    prompt=so_far[: row.prompt_len],
                    output=so_far[row.prompt_len :],
                    stop_ids=stop_ids[row.slot],
                    bias_ids=bias_ids[row.slot],
                    bias_values=bias_values[row.slot],
                    allowed=_mask(allowed[row.slot], row.context_len, logits.shape[1])
                    if row.masked
                    else None,
                    min_new_tokens=row.min_new_tokens,
                    presence_penalty=row.presence_penalty,
                    frequency_penalty=row.frequency_penalty,
                    repetition_penalty=row.repetition_penalty,
                )
            if not z.max().isfinite():
                tokens[r] = NOT_FINITE
            else:
                tokens[r] = int(z.argmax()) if row.temperature <= 0 else _draw(z, row)

    if path is not None:
        return tokens.masked_fill_(row_slot == null, 0)
    writes = [r for r, row in enumerate(rows) if row.slot != null and row.context_len < history.shape[1]]
    history[row_slot[writes], context_len[writes]] = tokens[writes].clamp_min(0)
    return tokens.masked_fill_(row_slot == null, 0)
