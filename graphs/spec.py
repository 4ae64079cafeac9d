"""Values that planner and runtime share: buckets, limits, KV geometry, what a step reads and writes.

Imports neither torch nor triton: the runtime reads this module without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, Dim, TensorSpec

DECODE, EXTEND, SCORE = "decode", "extend", "score"
PHASES = (DECODE, EXTEND, SCORE)  # of a step; a plan has those of Limits.phases
TARGET_RESULTS = ("target_logprob", "target_top_ids", "target_top_values")  # of the last alone


@dataclass(frozen=True, order=True)
class Bucket:
    """A batch shape that a plan has a program for: key, label and log line at once.

    ``decode`` runs one token a row (tokens == rows); ``extend`` runs rows of any length, flattened; ``score``
    does, too, and reports how probable each of its tokens made the next one.
    """

    phase: str
    rows: int
    tokens: int

    @property
    def sizes(self) -> dict[str, int]:
        """Values of the shape symbols under this bucket."""
        return {ROWS: self.rows, TOKENS: self.tokens}

    def covers(self, rows: int, tokens: int) -> bool:
        """Whether a batch of this phase with so many rows and tokens fits."""
        return rows <= self.rows and tokens <= self.tokens

    def __str__(self) -> str:
        shape = f"{self.rows}" if self.phase == DECODE else f"{self.rows}x{self.tokens}"
        return f"{self.phase}-{shape}"


@dataclass(frozen=True)
class Limits:
    """What the runtime may legally ask for. Every figure is a promise that the plan's buckets keep.

    Attributes:
        max_rows: requests running at once.
        max_tokens: tokens of one step, over all rows.
        context_len: tokens of one request, prompt and output together.
        page_size: tokens a KV page holds.
        max_stop_ids: token ids a request may ask to be held back until its ``min_new_tokens``.
        max_logit_bias: entries of a request's logit bias.
        max_top_logprobs: alternatives reported a token.
        max_logprob_tokens: tokens of one step that reports log-probabilities of its input; 0 where there are
            no such steps. They are fewer than ``max_tokens`` since all their logits exist at once.
    """

    max_rows: int
    max_tokens: int
    context_len: int
    page_size: int
    max_stop_ids: int = 16
    max_logit_bias: int = 300
    max_top_logprobs: int = 20
    max_logprob_tokens: int = 0

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that a plan has programs for."""
        return PHASES if self.max_logprob_tokens else (DECODE, EXTEND)

    def most_tokens(self, phase: str) -> int:
        """Tokens of the largest step of a phase."""
        return {DECODE: self.max_rows, EXTEND: self.max_tokens, SCORE: self.max_logprob_tokens}[phase]

    @property
    def pages_per_row(self) -> int:
        """Pages of a request that fills its context."""
        return -(-self.context_len // self.page_size)

    @property
    def slots(self) -> int:
        """Entries of the slot table: one a running request and a last one for padding rows."""
        return self.max_rows + 1

    @property
    def null_slot(self) -> int:
        """The slot that padding rows point at."""
        return self.max_rows


@dataclass(frozen=True)
class Field:
    """A named array that the host writes: its spec and the value it holds where nobody wrote."""

    name: str
    spec: TensorSpec
    default: float | int = 0


def _fields(*rows: tuple[str, tuple[Dim, ...], str, float | int]) -> tuple[Field, ...]:
    return tuple(Field(name, TensorSpec(shape, dtype), default) for name, shape, dtype, default in rows)


def step_fields(limits: Limits, phase: str) -> tuple[Field, ...]:
    """What the host stages for every step of a phase; defaults are what padding tokens and rows hold.

    Padding tokens belong to the null slot and write page 0; padding rows have no query and no context.
    """
    fields = _fields(
        ("token_ids", (TOKENS,), "int32", 0),  # negative: the token that the step before sampled
        ("positions", (TOKENS,), "int32", 0),
        ("token_slot", (TOKENS,), "int32", limits.null_slot),
        ("kv_slot", (TOKENS,), "int32", 0),  # page * page_size + slot of the page
        ("query_start", (ROWS,), "int32", 0),
        ("query_len", (ROWS,), "int32", 0),
        ("context_len", (ROWS,), "int32", 0),  # cached tokens and this step's
        ("row_slot", (ROWS,), "int32", limits.null_slot),
        ("page_table", (ROWS, limits.pages_per_row), "int32", 0),
    )
    return fields if phase != SCORE else fields + _fields(
        ("target_ids", (TOKENS,), "int32", 0),  # the token behind each
        ("target_slot", (TOKENS,), "int32", limits.null_slot),  # whose it is; the null slot's is not asked for
    )  # fmt: skip


def slot_fields(limits: Limits) -> tuple[Field, ...]:
    """What the device keeps for every running request; the host writes it when the request is admitted."""
    slots = limits.slots
    return _fields(
        ("history", (slots, limits.context_len), "int32", 0),
        ("prompt_len", (slots,), "int32", 0),
        ("temperature", (slots,), "float32", 0.0),
        ("top_k", (slots,), "int32", 0),
        ("top_p", (slots,), "float32", 1.0),
        ("min_p", (slots,), "float32", 0.0),
        ("presence_penalty", (slots,), "float32", 0.0),
        ("frequency_penalty", (slots,), "float32", 0.0),
        ("repetition_penalty", (slots,), "float32", 1.0),
        ("seed", (slots,), "int64", 0),
        ("min_new_tokens", (slots,), "int32", 0),
        ("stop_ids", (slots, limits.max_stop_ids), "int32", -1),
        ("bias_ids", (slots, limits.max_logit_bias), "int32", -1),
        ("bias_values", (slots, limits.max_logit_bias), "float32", 0.0),
        ("top_logprobs", (slots,), "int32", -1),
    )


def result_fields(limits: Limits, phase: str) -> tuple[Field, ...]:
    """What every step of a phase leaves for the host to read."""
    top = limits.max_top_logprobs
    fields = _fields(
        ("tokens", (ROWS,), "int32", -1),
        ("logprob", (ROWS,), "float32", 0.0),
        ("top_ids", (ROWS, top), "int32", -1),
        ("top_values", (ROWS, top), "float32", 0.0),
    )
    logprob, top_ids, top_values = TARGET_RESULTS
    return fields if phase != SCORE else fields + _fields(
        (logprob, (TOKENS,), "float32", 0.0),  # of the token behind each
        (top_ids, (TOKENS, top), "int32", -1),
        (top_values, (TOKENS, top), "float32", 0.0),
    )  # fmt: skip


@dataclass(frozen=True)
class KVPart:
    """One cache tensor ``[P, *page_shape]``, such as layer 3's keys."""

    name: str
    page_shape: tuple[int, ...]
    dtype: str

    @property
    def spec(self) -> TensorSpec:
        """Spec of the whole tensor, pages first."""
        return TensorSpec((PAGES, *self.page_shape), self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes of this tensor."""
        return math.prod(self.page_shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class KVSpec:
    """The paged cache of a model: its tensors, each holding the same pages."""

    page_size: int
    parts: tuple[KVPart, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all tensors."""
        return sum(part.page_bytes for part in self.parts)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token over all tensors."""
        return self.page_bytes / self.page_size
