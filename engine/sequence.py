"""A sequence as the scheduler knows it: its tokens, and what decides when they run. No text, no clocks.

All of it follows from what is submitted, sampled and ended, in that order, so that processes that are told of
the same events hold equal sequences. What its caller gets is made beside it, in ``reply.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from makeready.engine.constraint import Constraint
from makeready.engine.kv.radix import Prefix
from makeready.engine.sampling import SamplingParams

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"


@dataclass(eq=False, slots=True)
class TokenSequence:
    """The tokens of one sample of one prompt, from arrival to finish.

    Attributes:
        prompt: its token ids.
        sampling: how the others are chosen, and how many at most.
        seed: what its random choices are drawn from.
        end_ids: token ids that end it.
        salt: it shares cached prefixes with sequences of the same salt only (SGLang's ``extra_key``).
        priority: higher goes first, under the policy of that name.
        constraint: says which tokens may come; None where all may.
        output: token ids generated so far.
        finish_reason: why it ended: :data:`STOP`, :data:`LENGTH`, :data:`ABORT` or :data:`ERROR`; None before.
        most: output tokens that it can come to; one is sampled in any case.
        scored: the first token of its prompt whose log-probability is yet to be computed; its length if none.
        slot: its place on the device while it runs, else -1.
        prefix: what it holds of the prefix cache while it runs.
        cached_tokens: of its prompt, how many did not have to be run.
        retractions: how often it was sent back to wait.
        ticket: its place in the order of arrival.
        passed_over: how often another was admitted while this one had waited longest.
        urgent: it has waited for so long that it goes before all others.
        borrowed: it used pages that another sequence computed.
        isolated: it shares pages with no other.
        gain: tokens that steps which verified its drafts brought lately, on average; None before the first.
        verify_steps: those steps.
        drafted: tokens that were guessed for it in them.
        accepted: of these, those that were right.
    """

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    end_ids: frozenset[int]
    salt: str = ""
    priority: int = 0
    constraint: Constraint | None = None
    output: list[int] = field(default_factory=list, init=False)
    finish_reason: str | None = field(default=None, init=False)
    most: int = field(init=False)
    scored: int = field(init=False)
    slot: int = field(default=-1, init=False)
    prefix: Prefix | None = field(default=None, init=False)
    cached_tokens: int = field(default=0, init=False)
    retractions: int = field(default=0, init=False)
    ticket: int = field(default=-1, init=False)
    passed_over: int = field(default=0, init=False)
    urgent: bool = field(default=False, init=False)
    borrowed: bool = field(default=False, init=False)
    isolated: bool = field(default=False, init=False)
    gain: float | None = field(default=None, init=False)
    verify_steps: int = field(default=0, init=False)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)
    _ids: np.ndarray | None = field(default=None, init=False, repr=False)
    _page_keys: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.most = max(1, self.sampling.max_new_tokens)
        self._begin_scoring()

    def _begin_scoring(self) -> None:
        first, length = self.sampling.logprob_start_len, len(self.prompt)
        self.scored = max(first, 1) if 0 <= first < length else length

    def isolate(self) -> None:
        """Compute what is known again, with pages of its own alone."""
        self.isolated, self.borrowed, self.cached_tokens = True, False, 0
        self.salt = f"{self.salt}\0{self.ticket}"
        self._page_keys.clear()
        if not self.output:
            self._begin_scoring()

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens that it can come to at most."""
        return len(self.prompt) + self.most

    @property
    def left(self) -> int:
        """Tokens that may still be sampled for it."""
        return self.most - len(self.output)

    @property
    def done(self) -> bool:
        """Whether it has ended for whatever reason."""
        return self.finish_reason is not None

    @property
    def ends_with_token(self) -> bool:
        """Whether a token ended it, its last one, which is then no part of what it says."""
        return self.finish_reason == STOP and bool(self.output) and self.output[-1] in self.end_ids

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of its prompt are yet to be computed."""
        return self.scored < len(self.prompt)

    @property
    def reusable(self) -> int:
        """Tokens, from the first on, that need not be run if they are cached.

        The last is run whatever is cached, for its logits; so is whatever comes before a token whose
        log-probability is asked for.
        """
        return (self.scored if self.scoring else self.length) - 1

    def ids(self) -> np.ndarray:
        """Token ids of prompt and output, int32; kept until there are more."""
        if self._ids is None:
            self._ids = np.array(self.prompt, np.int32)
        more = len(self._ids) - len(self.prompt)
        if more < len(self.output):
            self._ids = np.append(self._ids, np.array(self.output[more:], np.int32))
        return self._ids

    def page_key(self, page: int, page_size: int) -> int:
        """A number that stands for all tokens up to the end of a page, and for the salt.

        Equal beginnings have equal keys; others differ, but for a chance of 2**-64. ``page_size`` is the
        same at every call. Processes have different keys for the same.
        """
        keys = self._page_keys
        if page >= len(keys):
            ids = self.ids()
            key = keys[-1] if keys else hash(self.salt)
            for at in range(len(keys) * page_size, (page + 1) * page_size, page_size):
                key = hash((key, ids[at : at + page_size].tobytes()))
                keys.append(key)
        return keys[page]

    def append(self, token: int) -> bool:
        """Take in a sampled token; whether that ends it."""
        output = self.output
        output.append(token)
        if token not in self.end_ids and len(output) < self.most and self.constraint is None:
            return False
        return self._ends(token)

    def force(self, least: int = 1, *, begins: bool = False) -> int:
        """Take in the tokens that are sure to come, which may end it; returns how many.

        Args:
            least: fewer are left to be sampled.
            begins: it has not run yet, and shall: one that may end it is left to be sampled.
        """
        assert self.constraint is not None
        tokens, before = tuple(self.constraint.forced()), len(self.output)
        if self.sampling.return_logprob or len(tokens) < least:
            return 0
        for token in tokens[: min(len(tokens), self.left) - 1 if begins else None]:
            if (begins and token in self.end_ids) or self.append(token):
                break
        return len(self.output) - before

    def _ends(self, token: int) -> bool:
        """Whether the last token that was taken in does end it; it may be held back, or not wanted at all."""
        sampling, output = self.sampling, self.output
        if not sampling.max_new_tokens:
            output.clear()
            self.finish_reason = LENGTH
        elif token in self.end_ids and len(output) > sampling.min_new_tokens:
            self.finish_reason = STOP
        elif self.constraint is not None and self.constraint.take(token):
            self.finish_reason = STOP if self.constraint.error is None else ERROR
        elif len(output) >= self.most:
            self.finish_reason = LENGTH
        return self.done

    def finish(self, reason: str, count: int | None = None) -> None:
        """End it, or say better why it ended.

        Args:
            reason: one of the finish reasons.
            count: output tokens that it ends with; those behind them were sampled in vain. None for all.
        """
        self.finish_reason = reason
        if count is not None:
            del self.output[count:]
            self._ids = None
