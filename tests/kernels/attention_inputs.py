"""Random valid inputs of the ops around the paged KV cache; see inputs.py.

T tokens, R rows, H query heads, G KV heads, D head size, Q rotated features
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from case import NAN, Case, Random, in_columns, int32


@dataclass(frozen=True)
class Heads:
    """Geometry of attention: H query heads, G KV heads, D head size, page size."""

    heads: int
    kv_heads: int
    size: int
    page: int = 8

    @property
    def label(self) -> str:
        return f"H{self.heads}G{self.kv_heads}D{self.size}P{self.page}"


GEOMETRIES = (
    Heads(4, 2, 32),
    Heads(3, 3, 64),
    Heads(9, 3, 64, page=16),
    Heads(3, 1, 80),
    Heads(8, 1, 128, page=1),
    Heads(16, 2, 32, page=5),
)
ACT_AND_CACHE = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("float32", "float8_e4m3fn"),
)


def _caches(random: Random, heads: Heads, pages: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of NaN, so that whatever is read without having been written shows."""
    shape = (pages, heads.page, heads.kv_heads, heads.size)
    return tuple(torch.full(shape, NAN, dtype=getattr(torch, dtype)) for _ in range(2))  # type: ignore[return-value]


def _kv_slots(random: Random, heads: Heads, tokens: int, padding: int) -> tuple[torch.Tensor, int]:
    """Distinct slots outside page 0; padding tokens share page 0's first. Also the pages needed."""
    pages = 2 + -(-tokens // heads.page)
    slots = heads.page + random.permutation((pages - 1) * heads.page)[:tokens]
    slots[tokens - padding :] = 0
    return slots.int(), pages


def _new_tokens() -> Iterator[tuple[Heads, int, int, str, str]]:
    for heads, (act, cache) in itertools.product(GEOMETRIES, ACT_AND_CACHE):
        for tokens, padding in ((5, 2), (1, 0), (heads.page, 0), (heads.page + 1, 1)):
            yield heads, tokens, min(padding, tokens), act, cache


def kv_write(op: str) -> Iterator[Case]:
    for seed, (heads, tokens, padding, act, cache) in enumerate(_new_tokens()):
        random = Random(seed)
        k, v = (random.normal(tokens, heads.kv_heads * heads.size, dtype=act) for _ in range(2))
        kv_slot, pages = _kv_slots(random, heads, tokens, padding)
        k_cache, v_cache = _caches(random, heads, pages, cache)
        operands = {"k": k, "v": v, "kv_slot": kv_slot, "k_cache": k_cache, "v_cache": v_cache}
        attrs = {"kv_heads": heads.kv_heads, "head_dim": heads.size}
        label = f"{heads.label}-{tokens}-{act}-{cache}"
        if padding > 1:  # which of several lands on the null page is nobody's business: give them all one
            k[-padding:], v[-padding:] = k[-1].clone(), v[-1].clone()
        yield Case(op, label, operands, attrs)
        yield Case(op, f"{label}-columns", operands | {"k": in_columns(k), "v": in_columns(v)}, attrs)


def norm_rope_kv_write(op: str) -> Iterator[Case]:
    for seed, (heads, tokens, padding, act, cache) in enumerate(_new_tokens()):
        random = Random(seed)
        qkv = random.normal(tokens, (heads.heads + 2 * heads.kv_heads) * heads.size, dtype=act)
        kv_slot, pages = _kv_slots(random, heads, tokens, padding)
        k_cache, v_cache = _caches(random, heads, pages, cache)
        # Whole heads and, as partial rotary does, a quarter of them.
        for rotary, normed, offset in (
            *((heads.size, False, 0.0), (heads.size // 4, True, 0.0), (heads.size, True, 0.0)),
            (heads.size, True, 1.0),
        ):
            rows = random.rotary(tokens, rotary)
            if padding > 1:
                qkv[-padding:], rows[-padding:] = qkv[-1].clone(), rows[-1].clone()
            operands = {"qkv": qkv, "rows": rows, "kv_slot": kv_slot, "k_cache": k_cache, "v_cache": v_cache}
            if normed:
                operands["q_norm"] = random.uniform(heads.size, dtype=act)
                operands["k_norm"] = random.uniform(heads.size, dtype=act)
            attrs = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size}
            attrs |= {"eps": 1e-6, "offset": offset}
            yield Case(
                op, f"{heads.label}-{tokens}-Q{rotary}-{normed}+{offset}-{act}-{cache}", operands, attrs
            )


def filled_cache(
    random: Random, heads: Heads, lengths: Sequence[int], dtype: str, spare_columns: int = 1
) -> dict[str, torch.Tensor]:
    """Caches in which row r's first ``lengths[r]`` tokens are random and everything else is NaN.

    Pages are shuffled; table entries behind a row's last page are the null page, or, in odd rows, a page
    that nobody wrote.
    """
    needed = [-(-length // heads.page) for length in lengths]
    pages = 2 + sum(needed)
    k_cache, v_cache = _caches(random, heads, pages, dtype)
    order = (random.permutation(pages - 2) + 1).tolist()
    table = torch.zeros(len(lengths), max(needed) + spare_columns, dtype=torch.int32)
    for r, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r] = (pages - 1) * (r % 2) if length else 0
        table[r, :count] = int32(mine)
        for cache in (k_cache, v_cache):
            rows = torch.full((count * heads.page, heads.kv_heads, heads.size), NAN, dtype=cache.dtype)
            rows[:length] = random.normal(length, heads.kv_heads, heads.size, dtype=dtype)
            cache[torch.tensor(mine, dtype=torch.int64)] = rows.view(count, *cache.shape[1:])
    return {"k_cache": k_cache, "v_cache": v_cache, "page_table": table}


def _attention_attrs(heads: Heads, window: int) -> dict[str, Any]:
    made: dict[str, Any] = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size}
    return made | {"scale": heads.size**-0.5, "window": window}


def _sinks(random: Random, heads: Heads, number: int) -> dict[str, torch.Tensor]:
    """Sinks in every other case: far above and below all scores, and among them."""
    if number % 2:
        return {}
    sinks = random.normal(heads.heads, scale=3)
    sinks[:: max(2, heads.heads // 2)] = 300.0 * (1 - number % 4)
    return {"sinks": sinks}


def decode_attention(op: str) -> Iterator[Case]:
    for seed, (heads, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = heads.page
        batches = [
            [2 * page + 3, 1, page],
            [1],
            [page - 1 or 1, page, page + 1, 0, 0],
            [0, 5, 0],
            [0],
            [40] * 8,
        ]
        for at, lengths in enumerate(batches):
            window = (0, 4)[(at + seed) % 2]  # over the seeds every batch meets both
            random = Random(seed)
            operands = {"q": random.normal(len(lengths), heads.heads * heads.size, dtype=act)}
            operands |= filled_cache(random, heads, lengths, cache)
            operands["context_len"] = int32(lengths)
            operands |= _sinks(random, heads, at + seed // 2)
            label = f"{heads.label}-{lengths}-w{window}-{act}-{cache}".replace(" ", "")
            yield Case(op, label, operands, _attention_attrs(heads, window))


def norm_rope_kv_write_decode_attention(op: str) -> Iterator[Case]:
    for seed, heads in enumerate(GEOMETRIES):
        for lengths, act, normed in (
            ([2 * heads.page + 3, 1, heads.page], "float32", True),
            ([1], "bfloat16", False),
            ([0, heads.page + 1, 0], "float16", True),
        ):
            random = Random(seed)
            caches = filled_cache(random, heads, lengths, act)
            lasts = [max(length - 1, 0) for length in lengths]
            pages = [
                int(row[last // heads.page]) for row, last in zip(caches["page_table"], lasts, strict=True)
            ]
            slots = [p * heads.page + last % heads.page for p, last in zip(pages, lasts, strict=True)]
            operands = {
                "qkv": random.normal(
                    len(lengths), (heads.heads + 2 * heads.kv_heads) * heads.size, dtype=act
                ),
                "rows": random.rotary(len(lengths), heads.size),
                "kv_slot": int32([slot if n else 0 for slot, n in zip(slots, lengths, strict=True)]),
                **caches,
                "context_len": int32(lengths),
                **_sinks(random, heads, seed),
            }
            if normed:
                operands |= {name: random.uniform(heads.size, dtype=act) for name in ("q_norm", "k_norm")}
            attrs = {**_attention_attrs(heads, 4 * normed), "eps": 1e-6, "offset": 0.0}
            yield Case(op, f"{heads.label}-{lengths}-{act}".replace(" ", ""), operands, attrs)


def extend_attention(op: str) -> Iterator[Case]:
    for seed, (heads, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = heads.page
        # (new tokens, tokens of context with them) of every row; tokens of no row follow.
        batches = [
            [(3, 2 * page + 3), (page + 1, page + 1), (1, page)],
            [(1, 1)],
            [(page, page), (1, page + 1), (0, 0), (page + 1, 2 * page + 1), (0, 0)],
            [(0, 0), (2, 7)],
            [(0, 0)],
        ]
        for at, batch in enumerate(batches):
            window, spare = ((0, 3), (4, 3), (0, 0), (4, 0))[(at + seed) % 4]
            tokens = max(1, sum(n for n, _ in batch)) + spare
            yield _queries(op, Random(seed), heads, (act, cache), batch, tokens, window, at + seed // 4)
        yield _chained(op, Random(seed), heads, (act, cache), seed)


def verify_attention(op: str) -> Iterator[Case]:
    """Rows with at most as many tokens as each has room for; those that lack some are made up for behind all."""
    for seed, (heads, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = heads.page
        batches = [
            (5, [(5, 2 * page + 3), (1, page), (3, page + 2), (0, 0)]),
            (5, [(5, 5)]),
            (4, [(2, 2), (0, 0), (4, page + 4)]),
            (2, [(1, 1), (2, 40)]),
            (3, [(0, 0)]),
        ]
        for at, (each, batch) in enumerate(batches):
            window, tokens = (0, 4, 0, 3)[(at + seed) % 4], each * len(batch)
            yield _queries(op, Random(seed), heads, (act, cache), batch, tokens, window, at + seed // 4)
        yield _chained(op, Random(seed), heads, (act, cache), seed)


def _chained(op: str, random: Random, heads: Heads, dtypes: tuple[str, str], number: int) -> Case:
    """A token a row, as in chains of drafts: rows that have none, and so tokens of no row, between the others."""
    batch = [(0, 0), (1, heads.page), (0, 0), (0, 0), (1, 1), (1, heads.page + 2), (0, 0)]
    case = _queries(op, random, heads, dtypes, batch, len(batch), 0, number)
    live = [n > 0 for n, _ in batch]
    q = torch.full_like(case.operands["q"], NAN)
    q[live] = case.operands["q"][: sum(live)]
    given = {"q": q, "query_start": int32(list(range(len(batch))))}
    return Case(op, f"chain-{case.label}", case.operands | given, case.attrs)


def _queries(
    op: str,
    random: Random,
    heads: Heads,
    dtypes: tuple[str, str],
    batch: list[tuple[int, int]],
    tokens: int,
    window: int,
    number: int,
) -> Case:
    """Rows of (queries, tokens of context with them), one behind the other, in a step of ``tokens``."""
    act, cache = dtypes
    counts, lengths = [n for n, _ in batch], [length for _, length in batch]
    operands = {"q": random.normal(tokens, heads.heads * heads.size, dtype=act)}
    operands["q"][sum(counts) :] = NAN
    operands |= filled_cache(random, heads, lengths, cache)
    operands |= {
        "query_start": int32([sum(counts[:r]) if n else 0 for r, n in enumerate(counts)]),
        "query_len": int32(counts),
        "context_len": int32(lengths),
        **_sinks(random, heads, number),
    }
    label = f"{heads.label}-{batch}-w{window}-{act}-{cache}".replace(" ", "")
    return Case(op, label, operands, _attention_attrs(heads, window))
