"""Values that planner and runtime share: buckets, limits, the cache's groups, what a step reads and writes.

Imports neither torch nor triton: the runtime reads this module without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from makeready.kernels.spec import DTYPE_BYTES, PAGES, ROWS, TOKENS, Dim, TensorSpec

# Kinds of step that the engine knows.
DECODE, EXTEND, INPUT_LOGPROBS, VERIFY = "decode", "extend", "input_logprobs", "verify"
LEAST_PAGES = 2  # the null page and one to use
STATES_PER_ROW = 2  # one that is read, one that is written where the first is left to others
HOST, DEVICE, LATE = "host", "device", "late"  # who keeps a slot field up to date, and when


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
        vocabulary: tokens that have a logit.
        max_gain: tokens that a generating row gains in a step, at most, or that a step puts behind it.
        branches: whether drafts are trees.
    """

    max_rows: int
    max_tokens: int
    context_len: int
    page_size: int
    max_stop_ids: int = 16
    max_logit_bias: int = 300
    max_top_logprobs: int = 20
    vocabulary: int = 0
    max_gain: int = 1
    branches: bool = False

    @property
    def mask_places(self) -> int:
        """Places of a row that have a mask in a step: rows that follow a grammar run no trees."""
        return 1 if self.branches else self.max_gain

    @property
    def mask_words(self) -> int:
        """32-bit words of a mask over the vocabulary."""
        return max(1, -(-self.vocabulary // 32))

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
            its first entries at admission. ``late`` fields are the host's, too: it writes them while a step runs,
            at the step's cut (:meth:`~.plan.Plan.cut`), and else never.
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
        early: results that the host may read at a step's cut: they do not wait for all launches before it.
        gain: tokens that a generating row gains at most, where that is less than it runs: of trees of drafts.
        ratios: of steps that verify drafts, by the rows of their buckets: by how much longer than a decode step of as
            many rows they are predicted to take.
    """

    rows: int
    tokens: int
    each: int | None
    staged: tuple[Field, ...]
    results: tuple[Field, ...]
    early: tuple[str, ...] = ()
    gain: int | None = None
    ratios: Mapping[int, float] = field(default_factory=dict)

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
class CacheGroup:
    """Cache tensors whose blocks belong together: a row has the same blocks of all of them.

    Attributes:
        name: of the group; fields of further groups end in it.
        unit: tokens of a block, which is then a page; None where a block is the state of a whole sequence.
        window: tokens that a token reads, itself included, so that pages before them can be freed; 0 keeps all.
    """

    name: str
    parts: tuple[KVPart, ...]
    unit: int | None
    window: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all tensors."""
        return sum(part.page_bytes for part in self.parts)

    @property
    def tail(self) -> int:
        """Pages before a page border that the tokens behind it read, of a group with a window."""
        assert self.unit is not None
        return -(-(self.window - 1) // self.unit)


@dataclass(frozen=True)
class CacheSpec:
    """The cache of a model: groups of tensors, each with blocks of its own.

    Block 0 of every group belongs to nobody. That of a state group is the state before the first token, zeros.

    Attributes:
        context: tokens that a sequence is expected to have, by which memory is split between pages and the rest.
        snapshots: states, and tails of windows, that are kept behind cached prefixes beside those of rows; None: one
            for each ``context`` tokens of pages that rows do not take.

    Raises:
        ValueError: there is no group, two have one name, or one has pages of another size or a windowed state.
    """

    page_size: int
    groups: tuple[CacheGroup, ...]
    context: int = 1024
    snapshots: int | None = None

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a cache needs groups of different names, these are {names}; rename them")
        for group in self.groups:
            if group.unit not in (None, self.page_size):
                raise ValueError(
                    f"cache group {group.name} has pages of {group.unit} tokens and the plan of {self.page_size}; "
                    "give all groups the plan's page size"
                )
            if group.unit is None and group.window:
                raise ValueError(f"cache group {group.name} is a state, which has no window; leave it out")

    @property
    def paged(self) -> tuple[CacheGroup, ...]:
        """Groups of pages."""
        return tuple(group for group in self.groups if group.unit is not None)

    @property
    def states(self) -> tuple[CacheGroup, ...]:
        """Groups of states."""
        return tuple(group for group in self.groups if group.unit is None)

    @property
    def parts(self) -> tuple[KVPart, ...]:
        """Tensors of all groups."""
        return tuple(part for group in self.groups for part in group.parts)

    def field(self, group: str, name: str) -> str:
        """What the field ``name`` is called that ``group`` has: plainly so for the first group."""
        return name if group == self.groups[0].name else f"{name}.{group}"

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all groups of which there are as many pages as memory holds."""
        return sum(group.block_bytes for group in self._scaling)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token in such a page."""
        return self.page_bytes / self.page_size

    def split(self, pages: int, limits: Limits) -> Split:
        """Whose windows and states are kept where memory holds ``pages``, the null page included.

        A row takes its blocks and pages for ``context`` tokens, a snapshot goes with as many tokens of pages that are
        cached. So memory is all rows' first, or that of as many rows as get both; then that of pages until a row of
        full context has its own; then that of snapshots.
        """
        each = -(-min(self.context, limits.context_len) // self.page_size)
        rows = max(1, min(limits.max_rows, (pages - 1) // each))
        cached = max(0, pages - 1 - max(limits.max_rows * each, limits.pages_per_row)) // each
        return Split(rows, cached if self.snapshots is None else self.snapshots)

    def blocks(self, pages: int, limits: Limits) -> dict[str, int]:
        """Blocks of each group, the null block included, where memory holds ``pages``."""
        return {
            group.name: pages if group in self._scaling else self._bounded(group, pages, limits)
            for group in self.groups
        }

    def bounded_bytes(self, pages: int, limits: Limits) -> int:
        """Bytes of windows and states where memory holds ``pages`` beside them."""
        return sum(group.block_bytes * self._bounded(group, pages, limits) for group in self.bounded)

    def nbytes(self, pages: int, limits: Limits) -> int:
        """Bytes of all groups where memory holds ``pages``, the null page included."""
        return pages * self.page_bytes + self.bounded_bytes(pages, limits)

    def pages_in(self, nbytes: int, limits: Limits) -> int:
        """The most pages, the null page included, that ``nbytes`` hold beside the windows and states that go with
        them; 0 where not even two fit."""
        if nbytes < self.nbytes(LEAST_PAGES, limits):
            return 0
        if not self.bounded:
            return nbytes // self.page_bytes
        # Pages and what goes with them never become fewer bytes as there are more.
        fits, beyond = LEAST_PAGES, nbytes // self.page_bytes + 1
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            fits, beyond = (middle, beyond) if self.nbytes(middle, limits) <= nbytes else (fits, middle)
        return fits

    def pages_of_rows(self, rows: int, limits: Limits) -> int:
        """The fewest pages, the null page included, beside which ``rows`` rows have windows and states."""
        return rows * -(-min(self.context, limits.context_len) // self.page_size) + 1

    @property
    def bounded(self) -> tuple[CacheGroup, ...]:
        """Windows and states beside groups of which there are as many pages as memory holds."""
        return tuple(group for group in self.groups if group not in self._scaling)

    @property
    def _scaling(self) -> tuple[CacheGroup, ...]:
        everything = tuple(group for group in self.paged if not group.window)
        return everything or self.groups[:1]

    def _bounded(self, group: CacheGroup, pages: int, limits: Limits) -> int:
        split = self.split(pages, limits)
        if group.unit is None:
            return STATES_PER_ROW * split.rows + split.snapshots + 1
        # As kv/rows.py of the engine counts them: what a step adds before the one before it is read.
        ahead = max(0, (2 * limits.max_gain - 3) // group.unit)
        row = min(limits.pages_per_row, group.tail + 2 + ahead)
        chunk = -(-limits.max_tokens // group.unit)
        return split.rows * row + split.snapshots * group.tail + chunk + 1


@dataclass(frozen=True)
class Split:
    """For how many sequences there are blocks of windows and states.

    Attributes:
        rows: that run at once.
        snapshots: behind cached prefixes, beside what rows have.
    """

    rows: int
    snapshots: int
