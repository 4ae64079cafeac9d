"""Random valid inputs of the ops of latent attention; see inputs.py.

letters as in :mod:`makeready.kernels.attention.mla`; W = L + Q, features of a latent
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention_inputs import ACT_AND_CACHE
from case import FLOATS, NAN, Case, Random, in_columns, int32
from mla_operands import scaled_latents

EIGHT_BITS = ("int8", "float8_e4m3fn")


@dataclass(frozen=True)
class Latents:
    """Geometry of latent attention."""

    heads: int
    nope: int
    rope: int
    value: int
    rank: int
    page: int = 8

    @property
    def width(self) -> int:
        return self.rank + self.rope

    @property
    def label(self) -> str:
        return f"H{self.heads}N{self.nope}Q{self.rope}V{self.value}L{self.rank}P{self.page}"

    def attrs(self, *names: str) -> dict[str, Any]:
        known = {name: getattr(self, name) for name in ("heads", "nope", "rope", "value", "rank")}
        return {name: known[name] for name in names}

    def kv_b(self, random: Random, dtype: str) -> torch.Tensor:
        shape = (self.heads * (self.nope + self.value), self.rank)
        return random.normal(*shape, dtype=dtype, scale=self.rank**-0.5)


GEOMETRIES = (
    Latents(3, 12, 8, 20, 24),
    Latents(1, 16, 2, 16, 32, page=1),
    Latents(16, 8, 4, 6, 10, page=7),
    Latents(2, 128, 64, 128, 512, page=64),  # DeepSeek's
)
BATCHES = (  # (new tokens, tokens of context with them) of every row; in units of a page where they are beyond 3
    ((3, 19), (9, 9), (1, 8)),
    ((1, 1),),
    ((8, 8), (1, 9), (0, 0), (9, 17), (0, 0)),
    ((0, 0), (2, 7)),
    ((0, 0),),
)
# A token a row, as in chains of drafts: rows that have none, and so tokens of no row, between the others.
CHAIN = ((0, 0), (1, 8), (0, 0), (0, 0), (1, 1), (1, 10), (0, 0))


def mla_write(op: str) -> Iterator[Case]:
    for seed, (form, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        for tokens, padding in ((5, 2), (1, 0), (form.page + 1, 1)):
            random = Random(seed)
            kv = random.normal(tokens, form.width, dtype=act)
            rows = random.rotary(tokens, form.rope)
            if padding > 1:  # which of several lands on the null page is nobody's business: give them all one
                kv[-padding:], rows[-padding:] = kv[-1].clone(), rows[-1].clone()
            pages = 2 + -(-tokens // form.page)
            slots = form.page + random.permutation((pages - 1) * form.page)[:tokens]
            slots[tokens - padding :] = 0
            operands = {
                "kv": in_columns(kv) if seed % 2 else kv,
                "rows": rows,
                "weight": random.uniform(form.rank, dtype=act),
                "kv_slot": slots.int(),
                "cache": torch.full((pages, form.page, form.width), NAN, dtype=getattr(torch, cache)),
            }
            for interleaved in (True, False):
                attrs = form.attrs("rank", "rope") | {"eps": 1e-6, "interleaved": interleaved}
                yield Case(op, f"{form.label}-{tokens}-{interleaved}-{act}-{cache}", operands, attrs)


def _rows_of_heads(op: str, *names: str, kv_b: bool) -> Iterator[Case]:
    for seed, (form, act) in enumerate(itertools.product(GEOMETRIES, FLOATS)):
        for tokens in (5, 1):
            random = Random(seed)
            q = random.normal(tokens, form.heads * (form.nope + form.rope), dtype=act)
            operands = {"q": in_columns(q) if seed % 2 else q, "rows": random.rotary(tokens, form.rope)}
            if kv_b:
                operands["kv_b"] = form.kv_b(random, act)
            attrs = form.attrs(*names) | {"interleaved": tokens > 1}
            yield Case(op, f"{form.label}-{tokens}-{act}", operands, attrs)


def mla_rope(op: str) -> Iterator[Case]:
    yield from _rows_of_heads(op, "heads", "nope", "rope", kv_b=False)


def mla_absorb(op: str) -> Iterator[Case]:
    yield from _rows_of_heads(op, "heads", "nope", "rope", "value", "rank", kv_b=True)


def mla_values(op: str) -> Iterator[Case]:
    for seed, (form, act) in enumerate(itertools.product(GEOMETRIES, FLOATS)):
        for tokens in (5, 1):
            random = Random(seed)
            operands = {"x": random.normal(tokens, form.heads * form.rank, dtype=act)}
            operands["kv_b"] = form.kv_b(random, act)
            yield Case(
                op, f"{form.label}-{tokens}-{act}", operands, form.attrs("heads", "nope", "value", "rank")
            )


def merge_attention(op: str) -> Iterator[Case]:
    """Both parts, one of them, and neither: what has no keys may be anything."""
    for seed, ((heads, value), act) in enumerate(itertools.product(((3, 20), (1, 2), (16, 128)), FLOATS)):
        random = Random(seed)
        for tokens in (7, 1):
            operands: dict[str, torch.Tensor] = {}
            for name, missing in (("x", (1, 3)), ("y", (2, 3))):
                part = random.normal(tokens, heads * value, dtype=act)
                sums = random.normal(tokens, heads, scale=5)
                if tokens > 1:
                    part[list(missing)], sums[list(missing)] = NAN, float("-inf")
                operands |= {name: part, f"{name}_log_sum": sums}
            yield Case(op, f"{tokens}x{heads}x{value}-{act}", operands, {"heads": heads, "value": value})


def filled_latents(
    random: Random, form: Latents, lengths: Sequence[int], dtype: str
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A cache in which row r's first ``lengths[r]`` latents are random and all else is NaN, its page table, and the
    latents of every row. Pages are shuffled; entries behind a row's last page are page 0 or a page nobody wrote.
    """
    needed = [-(-length // form.page) for length in lengths]
    pages = 2 + sum(needed)
    cache = torch.full((pages, form.page, form.width), NAN, dtype=getattr(torch, dtype))
    order = (random.permutation(pages - 2) + 1).tolist()
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    held = []
    for r, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine, order = order[:count], order[count:]
        table[r] = (pages - 1) * (r % 2) if length else 0
        table[r, :count] = int32(mine)
        rows = torch.full((count * form.page, form.width), NAN, dtype=cache.dtype)
        rows[:length] = random.normal(length, form.width, dtype=dtype)
        held.append(rows[:length])
        cache[torch.tensor(mine, dtype=torch.int64)] = rows.view(count, *cache.shape[1:])
    return cache, table, held


def _batches(form: Latents, act: str, cache: str, seed: int) -> Iterator[tuple[str, Random, dict[str, Any]]]:
    """Operands of rows, pages and the step's own latents, tokens of no row behind them or between them."""
    for at, batch in enumerate((*BATCHES, CHAIN)):
        scaled = [(n if n < 4 else n - 8 + form.page, length) for n, length in batch]
        counts = [n for n, _ in scaled]
        lengths = [max(n, length if length < 4 else length - 8 + form.page) for n, length in scaled]
        random = Random(seed)
        paged, table, held = filled_latents(random, form, lengths, cache)
        tokens = len(batch) if batch is CHAIN else max(1, sum(counts)) + 3 * (at % 2)
        latent = torch.full((tokens, form.width), NAN, dtype=getattr(torch, act))
        starts = [sum(counts[:r]) if n else 0 for r, n in enumerate(counts)]
        if batch is CHAIN:
            starts = list(range(len(batch)))
        for x, start, n in zip(held, starts, counts, strict=True):
            latent[start : start + n] = x[len(x) - n :]
        yield (
            f"{form.label}-{scaled}-{act}-{cache}".replace(" ", ""),
            random,
            {
                "latent": latent,
                "cache": paged,
                "page_table": table,
                "query_start": int32(starts),
                "query_len": int32(counts),
                "context_len": int32(lengths),
            },
        )


def _all_batches() -> Iterator[tuple[Latents, str, str, Random, dict[str, Any]]]:
    for seed, (form, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        for label, random, operands in _batches(form, act, cache, seed):
            yield form, act, label, random, operands


def _of_nobody(x: torch.Tensor, operands: dict[str, Any]) -> torch.Tensor:
    nobodys = torch.ones(len(x), dtype=torch.bool)
    for start, count in zip(operands["query_start"].tolist(), operands["query_len"].tolist(), strict=True):
        nobodys[start : start + count] = False
    x[nobodys] = NAN
    return x


def mla_extend_attention(op: str) -> Iterator[Case]:
    for form, act, label, random, operands in _all_batches():
        q = random.normal(len(operands["latent"]), form.heads * form.width, dtype=act)
        rows = {k: x for k, x in operands.items() if k != "latent"}
        for own in (True, False):
            attrs = form.attrs("heads", "rank", "rope") | {"scale": form.width**-0.5, "own": own}
            yield Case(op, f"{label}-own={own}", {"q": _of_nobody(q, operands), **rows}, attrs)


def mla_decode_attention(op: str) -> Iterator[Case]:
    for seed, (form, (act, cache)) in enumerate(itertools.product(GEOMETRIES, ACT_AND_CACHE)):
        page = form.page
        for lengths in ([2 * page + 3, 1, page], [1], [page, page + 1, 0, 0], [0, 5, 0], [0], [40] * 8):
            random = Random(seed)
            paged, table, _ = filled_latents(random, form, lengths, cache)
            q = random.normal(len(lengths), form.heads * form.width, dtype=act)
            operands = {"q": q, "cache": paged, "page_table": table, "context_len": int32(lengths)}
            attrs = form.attrs("heads", "rank", "rope") | {"scale": form.width**-0.5}
            yield Case(op, f"{form.label}-{lengths}-{act}-{cache}".replace(" ", ""), operands, attrs)


def mla_own_attention(op: str) -> Iterator[Case]:
    for form, act, label, random, operands in _all_batches():
        tokens = len(operands["latent"])
        q = random.normal(tokens, form.heads * (form.nope + form.rope), dtype=act)
        kv = random.normal(tokens, form.heads * (form.nope + form.value), dtype=act)
        given = {"q": _of_nobody(q, operands), "kv": _of_nobody(kv, operands), "latent": operands["latent"]}
        given |= {name: operands[name] for name in ("query_start", "query_len")}
        attrs = form.attrs("heads", "nope", "rope", "value", "rank") | {"scale": 0.2}
        yield Case(op, label, given, attrs)


def mla_attention(op: str) -> Iterator[Case]:
    for form, act, label, random, operands in _all_batches():
        tokens = len(operands["latent"])
        q = random.normal(tokens, form.heads * (form.nope + form.rope), dtype=act)
        given = {"q": _of_nobody(q, operands), "latent": operands["latent"], "kv_b": form.kv_b(random, act)}
        given |= {"rows": random.rotary(tokens, form.rope), **operands}
        attrs = form.attrs("heads", "nope", "rope", "value", "rank")
        attrs |= {"scale": (form.nope + form.rope) ** -0.5, "interleaved": len(label) % 2 == 0}
        yield Case(op, label, given, attrs)


def with_scales(case: Case, dtype: str) -> Case:
    """A case of the op that keeps latents as they are, as one of the op with scales."""
    apart = scaled_latents(case.operands["cache"], case.attrs["rank"], dtype)
    label = case.label.rpartition("-")[0] if "own=" not in case.label else case.label
    return Case(f"{case.op}_scaled", f"{label}-{dtype}", case.operands | apart, case.attrs)


def _scaled(base: Callable[[str], Iterator[Case]]) -> Callable[[str], Iterator[Case]]:
    """Cases of an op over a cache in the activations' dtype, as those of the op with scales."""

    def cases(op: str) -> Iterator[Case]:
        for case in base(op.removesuffix("_scaled")):
            if case.operands["cache"].dtype == next(iter(case.operands.values())).dtype:
                yield from (with_scales(case, dtype) for dtype in EIGHT_BITS)

    return cases


def mla_write_scaled(op: str) -> Iterator[Case]:
    """A token of zeros and two that are not finite among them."""
    yield from _scaled(mla_write)(op)
    case = next(iter(mla_write("mla_write")))
    kv = case.operands["kv"].clone()
    kv[0], kv[1, 2], kv[2, 0] = 0, NAN, float("inf")
    case = replace(case, operands=case.operands | {"kv": kv})
    yield from (replace(with_scales(case, dtype), label=f"awkward-{dtype}") for dtype in EIGHT_BITS)


mla_extend_attention_scaled = _scaled(mla_extend_attention)
mla_decode_attention_scaled = _scaled(mla_decode_attention)
mla_attention_scaled = _scaled(mla_attention)
