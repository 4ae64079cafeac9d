"""Values that planner and runtime share: buckets, limits, KV geometry, what a step reads and writes.

Imports neither torch nor triton: the runtime reads this module without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, Dim, TensorSpec

DECODE, EXTEND, INPUT_LOGPROBS = "decode", "extend", "input_logprobs"  # kinds of step that the engine knows
HOST, DEVICE = "host", "device"  # who keeps a slot field up to date


@dataclass(frozen=True, order=True)
class Bucket:
    """A batch shape that a plan has a program for: key, label and log line at once.

    ``phase`` is the kind of step, a key of ``Plan.steps``, which says what a row and a token are to it.
    """

    phase: str
    rows: int
    tokens: int

    @property
    def sizes(self) -> dict[str, int]:
        """Values of the shape symbols under this bucket."""
        return {ROWS: self.rows, TOKENS: self.tokens}

    def covers(self, rows: int, tokens: int) -> bool:
        """Whether a batch of this kind with ``rows`` and ``tokens`` fits."""
        return rows <= self.rows and tokens <= self.tokens

    def __str__(self) -> str:
        shape = f"{self.rows}" if self.rows == self.tokens else f"{self.rows}x{self.tokens}"
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
    """

    max_rows: int
    max_tokens: int
    context_len: int
    page_size: int
    max_stop_ids: int = 16
    max_logit_bias: int = 300
    max_top_logprobs: int = 20

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
    """A named array of a step or of the slot table: its spec and the value it holds where nobody wrote.

    Attributes:
        keeper: of a slot field, who keeps it up to date while a request runs. The ``host`` writes its fields
            once, when the request is admitted; those that it does not name take their default. What the
            ``device`` keeps (how long a sequence is, its tokens) changes with every step; the host may set
            its first entries at admission.
    """

    name: str
    spec: TensorSpec
    default: int | float = 0
    keeper: str = HOST


def fields(*rows: tuple[str, tuple[Dim, ...], str, int | float], keeper: str = HOST) -> tuple[Field, ...]:
    """Fields from rows of name, shape, dtype and default."""
    return tuple(
        Field(name, TensorSpec(shape, dtype), default, keeper) for name, shape, dtype, default in rows
    )


@dataclass(frozen=True)
class StepSpec:
    """A kind of step, as a plan declares it: everything that host and device have to agree on.

    Made by a module of ``graphs/steps/``; staging, executables, the proof of coverage and pictures read it.

    Attributes:
        rows: rows of the largest batch.
        tokens: tokens of the largest batch, over all rows.
        each: tokens that every row has; None where rows differ in length, each with at least one.
        staged: what the host writes for every step; defaults are what padding rows and tokens hold.
        results: what every step leaves for the host to read.
    """

    rows: int
    tokens: int
    each: int | None
    staged: tuple[Field, ...]
    results: tuple[Field, ...]

    def legal(self, rows: int, tokens: int) -> bool:
        """Whether the runtime may ask for a batch of this size."""
        fits = 1 <= rows <= self.rows and rows <= tokens <= self.tokens
        return fits and (self.each is None or tokens == rows * self.each)

    @property
    def largest(self) -> dict[str, int]:
        """Values of the shape symbols in the largest batch."""
        return {ROWS: self.rows, TOKENS: self.tokens}


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
