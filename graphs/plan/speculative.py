"""How tokens are guessed before they are sampled, so that a step can check several at once.

Imports neither torch nor triton: plans remember it, and the runtime reads them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speculative:
    """Speculative decoding, as a plan is compiled for it; see docs/speculation.md.

    Attributes:
        method: ``ngram`` guesses that what followed the last tokens where they came before, in the prompt or the
            output, follows them again: it needs no second model and pays where answers repeat what they were given.
            ``draft``: a small model of the same vocabulary, ``speculative.checkpoint``, is asked. ``eagle`` (EAGLE-1
            and 2) and ``eagle3``: a head that was trained for the model, from there, too. ``mtp``: the model's own
            further layer (DeepSeek-V3). null: no guesses.
        num_draft_tokens: tokens that are guessed for a row in a step, at most.
        ngram_min: of ``ngram``: last tokens that have to be found again; without them nothing is guessed.
        ngram_max: of ``ngram``: last tokens that are looked for; the place where most of them are found counts.
        max_rows: batches of more rows generate token by token. All logits of a step exist at once, for
            ``max_rows * (1 + num_draft_tokens)`` tokens.
        forced_acceptance: for measurements alone: each draft counts as right with this probability, whatever it is,
            so that answers are of no use. null: as it is.
    """

    method: str | None = None
    num_draft_tokens: int = 4
    ngram_min: int = 1
    ngram_max: int = 4
    max_rows: int = 32
    forced_acceptance: float | None = None
