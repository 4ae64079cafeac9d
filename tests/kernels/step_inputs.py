"""Batches as the engine stages them: rows of any length of sequences in any state, padding behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from case import Case

POISON = -7777  # in places that nothing may read


def batch(
    seed: int, counts: Sequence[int], *, tokens: int, rows: int, page_size: int, context: int, gain: int = 1
) -> dict[str, torch.Tensor]:
    """Operands of ``locate`` and ``find_pages`` for rows of ``counts`` tokens; tensors that no op knows too.

    ``starts`` are what rows start behind, by the slot's length or as staged; every row may gain a page.
    """
    random = np.random.default_rng(seed)
    slots = rows + 3
    null, width = slots - 1, -(-context // page_size)
    own = random.permutation(null)[: len(counts)]
    starts = np.array([random.integers(0, context - n + 1) for n in counts], np.int64)
    by_slot = random.random(len(counts)) < 0.5
    at = {
        "row_slot": np.full(rows, null),
        "row_start": np.full(rows, -1),
        "query_start": np.zeros(rows),
        "query_len": np.zeros(rows),
        "grow_at": np.zeros(rows),
        "grow_page": np.zeros((rows, gain)),
    }
    live = len(counts)
    at["row_slot"][:live] = own
    at["row_start"][:live] = np.where(by_slot, -1, starts)
    at["query_start"][:live] = np.cumsum(counts) - counts
    at["query_len"][:live] = counts
    length = random.integers(0, context, slots)
    length[own[by_slot]] = starts[by_slot]
    length[null] = 0
    ids = np.zeros(tokens)
    ids[: sum(counts)] = np.where(random.random(sum(counts)) < 0.4, -1, random.integers(0, 999, sum(counts)))
    pages = np.zeros((slots, width))
    for r, (slot, start, count) in enumerate(zip(own, starts, counts, strict=True)):
        held = -(-(start + count) // page_size)
        new = min(int(random.integers(0, gain + 1)), held)
        pages[slot, : held - new] = random.integers(1, 9999, held - new)
        at["grow_at"][r] = held - new
        at["grow_page"][r, :new] = random.integers(1, 9999, new)
    made = {
        "token_ids": ids,
        **at,
        "length": length,
        "history": random.integers(0, 999, (slots, context)),
        "pages": pages,
        "starts": starts,
    }
    return {name: torch.from_numpy(np.asarray(array, np.int32)) for name, array in made.items()}


def apart(seed: int, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch as chains of drafts have theirs: rows in another order, padding rows among them, and tokens of no row
    before, between and behind theirs. ``starts`` has all rows.
    """
    random = np.random.default_rng(seed)
    rows, tokens = len(made["row_slot"]), len(made["token_ids"])
    made["starts"] = torch.cat((made["starts"], torch.zeros(rows - len(made["starts"]), dtype=torch.int32)))
    order = torch.from_numpy(random.permutation(rows))
    named = ("row_slot", "row_start", "query_start", "query_len", "grow_at", "grow_page", "starts")
    moved = {**made, **{name: made[name][order] for name in named}}
    count, ids = moved["query_len"], torch.zeros_like(made["token_ids"])
    spare = np.sort(random.integers(0, tokens - int(count.sum()) + 1, rows))
    start = (count.cumsum(0) - count + torch.from_numpy(spare)).int()
    for old, new, n in zip(moved["query_start"].tolist(), start.tolist(), count.tolist(), strict=True):
        ids[new : new + n] = made["token_ids"][old : old + n]
    return {**moved, "query_start": start, "token_ids": ids}


def positions_of(made: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """``positions`` and ``context_len`` of a batch, token by token."""
    positions = torch.zeros_like(made["token_ids"])
    context_len = torch.zeros_like(made["row_slot"])
    for r, start in enumerate(made["starts"].tolist()):
        first, count = int(made["query_start"][r]), int(made["query_len"][r])
        for i in range(count):
            positions[first + i] = start + i
        context_len[r] = start + count
    return positions, context_len


BATCHES = (
    ("one", [1], {"tokens": 1, "rows": 1, "page_size": 1, "context": 1}),
    ("decode", [1] * 7, {"tokens": 8, "rows": 8, "page_size": 16, "context": 100}),
    ("edges", [16, 1, 17], {"tokens": 40, "rows": 4, "page_size": 16, "context": 64}),
    ("mixed", [1, 1, 130, 3, 1], {"tokens": 150, "rows": 9, "page_size": 7, "context": 211}),
    ("long", [2500], {"tokens": 2600, "rows": 3, "page_size": 1, "context": 2501}),
    ("padding", [], {"tokens": 5, "rows": 2, "page_size": 4, "context": 9}),
    ("several-pages", [1, 4, 2], {"tokens": 9, "rows": 3, "page_size": 1, "context": 30, "gain": 4}),
    ("few-of-many", [1] * 90, {"tokens": 300, "rows": 300, "page_size": 4, "context": 40}),
)
DRAFTS = (  # label, tokens of each row (negative: staged), most n-gram, sizes
    ("one", [1], (1, 1), {"tokens": 1, "rows": 1, "context": 1}),
    ("a-repetition", [5], (1, 4), {"tokens": 5, "rows": 1, "context": 40}),
    ("many", [4] * 9, (1, 3), {"tokens": 44, "rows": 11, "context": 150}),
    ("pairs-at-least", [9, 9, -3, 1, 9], (2, 5), {"tokens": 45, "rows": 6, "context": 90}),
    ("staged", [-2, 4, -140, 2, 3], (1, 2), {"tokens": 170, "rows": 5, "context": 300}),
    ("long", [9, 9], (3, 8), {"tokens": 18, "rows": 2, "context": 2600}),
    ("padding", [], (1, 4), {"tokens": 5, "rows": 2, "context": 9}),
)
DRAFT = (
    "token_ids",
    "row_slot",
    "row_start",
    "query_start",
    "query_len",
    "sample_slot",
    "limit",
    "length",
    "history",
)


def drafting(
    seed: int, counts: Sequence[int], *, tokens: int, rows: int, context: int
) -> dict[str, torch.Tensor]:
    """Operands of ``draft_ngram``, of three different tokens, so that n-grams repeat.

    Args:
        counts: tokens that each row may run, which end within the context, or would not but for the row's limit;
            a row of a negative count has them all staged.
    """
    random = np.random.default_rng(seed)
    made = batch(seed, [abs(n) for n in counts], tokens=tokens, rows=rows, page_size=1, context=context)
    made["history"] = torch.from_numpy(random.integers(0, 3, made["history"].shape).astype(np.int32))
    made["limit"], made["sample_slot"] = torch.zeros_like(made["row_slot"]), made["row_slot"].clone()
    for r, count in enumerate(counts):
        first, slot = int(made["query_start"][r]), int(made["row_slot"][r])
        if count < 0:
            staged = random.integers(0, 3, -count)
            staged[: -count - 1 : 2] = -1
            made["token_ids"][first : first - count] = torch.from_numpy(staged)
            made["sample_slot"][r] = made["length"].shape[0] - 1
            continue
        made["token_ids"][first : first + count] = -1
        start = int(random.integers(0, context))
        made["starts"][r] = start
        if made["row_start"][r] >= 0:
            made["row_start"][r] = start
        else:
            made["length"][slot] = start
        made["limit"][r] = min(context, start + int(random.integers(1, count + 4)))
        if start > 3 and random.random() < 0.3:  # a period of one token, up to the end
            made["history"][slot, start - 3 : start + 1] = 1
    return made


def draft_ngram(op: str) -> Iterator[Case]:
    for seed, (label, counts, (least, most), sizes) in enumerate(DRAFTS):
        made = drafting(seed, counts, **sizes)
        yield Case(op, label, {n: made[n] for n in DRAFT}, {"ngram_min": least, "ngram_max": most})


def accept_drafts(op: str) -> Iterator[Case]:
    for seed, (label, counts, _, sizes) in enumerate(DRAFTS):
        random = np.random.default_rng(seed)
        made = batch(seed, [abs(n) for n in counts], page_size=1, **sizes)
        _, made["context_len"] = positions_of(made)
        sampled = torch.from_numpy(random.integers(0, 2, sizes["tokens"]).astype(np.int32))
        made["tokens"], made["token_ids"] = sampled, torch.roll(sampled, 1)
        wrong = torch.from_numpy(random.random(sizes["tokens"]) < 0.2)
        made["token_ids"][wrong] ^= 1
        names = ("token_ids", "tokens", "row_slot", "query_start", "query_len", "context_len", "length")
        yield Case(op, label, {n: made[n] for n in names})


COUNT_DRAFTS = ("token_ids", "row_slot", "row_start", "query_start", "query_len", "limit", "length")
NEXT_DRAFT = ("row_slot", "sample_slot", "start", "drafts", "history")
PACK_DRAFTS = (
    "token_ids",
    "row_slot",
    "query_start",
    "query_len",
    "sample_slot",
    "start",
    "drafts",
    "history",
)


def count_drafts(op: str) -> Iterator[Case]:
    for seed, (label, counts, _, sizes) in enumerate(DRAFTS):
        made = drafting(seed, counts, **sizes)
        yield Case(op, label, {n: made[n] for n in COUNT_DRAFTS})


def chained(seed: int, counts: Sequence[int], **sizes: int) -> dict[str, torch.Tensor]:
    """A batch of :func:`drafting` whose rows have any number of the drafts that they may have, in their history."""
    random = np.random.default_rng(seed)
    made = drafting(seed, counts, **sizes)
    made["start"], made["drafts"] = torch.zeros_like(made["row_slot"]), torch.zeros_like(made["row_slot"])
    for r, count in enumerate(counts):
        made["start"][r] = made["starts"][r]
        room = min(count, int(made["limit"][r]) - 1 - int(made["starts"][r])) - 1
        made["drafts"][r] = int(random.integers(0, room + 1)) if room > 0 else 0
    return made


def next_draft(op: str) -> Iterator[Case]:
    for seed, (label, counts, _, sizes) in enumerate(DRAFTS):
        made = chained(seed, counts, **sizes)
        made["start"] = torch.where(made["drafts"] > 0, made["start"].clamp(min=1), made["start"])
        for step, behind in ((0, 0), (0, 1), (2, 0), (3, 1)):
            attrs = {"step": step, "behind": behind}
            yield Case(op, f"{label}-{step}-{behind}", {n: made[n] for n in NEXT_DRAFT}, attrs)


def pack_drafts(op: str) -> Iterator[Case]:
    for seed, (label, counts, _, sizes) in enumerate(DRAFTS):
        made = chained(seed, counts, **sizes)
        yield Case(op, label, {n: made[n] for n in PACK_DRAFTS})


def force_drafts(op: str) -> Iterator[Case]:
    random = np.random.default_rng(0)
    for tokens in (1, 5, 300):
        made = {name: random.integers(-1, 2000, tokens) for name in ("tokens", "draft_slot", "draft_context")}
        operands = {name: torch.from_numpy(np.maximum(x, 0).astype(np.int32)) for name, x in made.items()}
        for share in (0.0, 0.7, 1.0):
            yield Case(op, f"{tokens}-{share}", operands, {"share": share})


def place_before(op: str) -> Iterator[Case]:
    for seed, (label, counts, sizes) in enumerate(BATCHES):
        made = batch(seed, counts, **sizes)
        made["positions"], _ = positions_of(made)
        made["token_slot"] = torch.full_like(made["token_ids"], len(made["length"]) - 1)
        for r in range(len(counts)):
            first, count = int(made["query_start"][r]), int(made["query_len"][r])
            made["token_slot"][first : first + count] = made["row_slot"][r]
        operands = {n: made[n] for n in ("positions", "token_slot", "pages")}
        yield Case(op, label, operands, {"page_size": sizes["page_size"]})


def _hidden(op: str, random: np.random.Generator) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for dtype in (torch.float32, torch.float16):
        for tokens, pages, size, width in ((1, 1, 1, 3), (7, 5, 4, 64), (90, 30, 16, 131)):
            normal = lambda *shape: torch.from_numpy(random.standard_normal(shape)).to(dtype)  # noqa: B023, E731
            places = random.permutation(pages * size)[:tokens]
            kv_slot = torch.from_numpy(np.resize(places, tokens).astype(np.int32))
            x, hidden = normal(tokens, width), normal(pages, size, width)
            yield f"{tokens}x{width}-{dtype}", {"x": x, "kv_slot": kv_slot, "hidden": hidden}


def hidden_write(op: str) -> Iterator[Case]:
    for label, made in _hidden(op, np.random.default_rng(0)):
        yield Case(op, label, made)


def hidden_read(op: str) -> Iterator[Case]:
    for label, made in _hidden(op, np.random.default_rng(1)):
        yield Case(op, label, {n: made[n] for n in ("kv_slot", "hidden")})


def spread_logits(op: str) -> Iterator[Case]:
    random = np.random.default_rng(0)
    for rows, drafted, vocabulary in ((1, 1, 1), (3, 40, 96), (2, 1500, 5000)):
        tokens = np.sort(random.permutation(vocabulary)[:drafted]) - np.arange(drafted)
        logits = torch.from_numpy(random.standard_normal((rows, drafted)).astype(np.float32))
        operands = {"logits": logits, "d2t": torch.from_numpy(tokens)}
        yield Case(op, f"{rows}x{drafted}", operands, {"vocabulary": vocabulary})
        beyond = torch.from_numpy(tokens + np.where(np.arange(drafted) % 3 == 0, vocabulary, 0))
        yield Case(op, f"{rows}x{drafted}-beyond", operands | {"d2t": beyond}, {"vocabulary": vocabulary})


LOCATE = ("token_ids", "row_slot", "row_start", "query_start", "query_len", "length", "history")
FIND_PAGES = ("positions", "row_slot", "query_start", "query_len", "context_len")
FIND_PAGES += ("grow_at", "grow_page", "pages")


def _batches() -> Iterator[tuple[str, dict[str, torch.Tensor], int]]:
    for seed, (label, counts, sizes) in enumerate(BATCHES):
        yield label, batch(seed, counts, **sizes), sizes["page_size"]
        yield f"{label}-apart", apart(seed, batch(seed, counts, **sizes)), sizes["page_size"]


def locate(op: str) -> Iterator[Case]:
    for label, made, _ in _batches():
        yield Case(op, label, {name: made[name] for name in LOCATE})


def find_pages(op: str) -> Iterator[Case]:
    for label, made, page_size in _batches():
        made["positions"], made["context_len"] = positions_of(made)
        yield Case(op, label, {n: made[n] for n in FIND_PAGES}, {"page_size": page_size})
