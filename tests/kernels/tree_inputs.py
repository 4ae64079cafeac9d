"""Random valid inputs of the ops on trees of drafts: any trees, rows that have some of one, padding anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from attention_inputs import GEOMETRIES, Heads
from case import NAN, Case, Random
from step_inputs import POISON

Table = dict[str, torch.Tensor]
SIZES = (  # label, nodes, rows that run (negative: staged), rows, tokens more than rows need, context, page
    ("one", 2, [1], 1, 0, 4, 1),
    ("root-alone", 5, [0, 4], 2, 1, 30, 4),
    ("many", 9, [8, 8, 3, 0, 8, 1], 9, 7, 60, 7),
    ("staged", 7, [6, -6, 2, -1], 6, 2, 50, 16),
    ("most", 64, [63, 20, 63], 3, 5, 200, 64),
    ("padding", 4, [], 2, 3, 9, 8),
)


def ints(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32))


def tree_of(random: np.random.Generator, nodes: int) -> Table:
    """Tables of a random tree: every node is behind its parent."""
    parent = [0, *(int(random.integers(max(0, i - 5), i)) for i in range(1, nodes))]
    depth, ancestors, children = [0], [1], [[] for _ in range(nodes)]
    for node in range(1, nodes):
        depth.append(depth[parent[node]] + 1)
        ancestors.append(ancestors[parent[node]] | 1 << node)
        children[parent[node]].append(node)
    wide = max(map(len, children))
    return {
        "parent": ints(parent),
        "depth": ints(depth),
        "ancestors": torch.tensor([bits - (bits >> 63 << 64) for bits in ancestors], dtype=torch.int64),
        "children": ints([own + [-1] * (wide - len(own)) for own in children]),
    }


def levels_of(tree: Table) -> list[torch.Tensor]:
    depth = tree["depth"]
    return [(depth == d).nonzero()[:, 0].int() for d in range(int(depth.max()) + 1)]


def batch(seed: int, nodes: int, drafts: list[int], rows: int, more: int, context: int, page: int) -> Table:
    """Rows of sequences that have ``drafts`` behind their roots; what nobody may look at is :data:`POISON`."""
    random = np.random.default_rng(seed)
    made, slots = tree_of(random, nodes), rows + 3
    null, live = slots - 1, len(drafts)
    order = random.permutation(rows)[:live]  # padding rows anywhere
    slot, start, guesses, first, count = (np.zeros(rows, np.int64) for _ in range(5))
    slot[:] = null
    slot[order] = random.permutation(null)[:live]
    begin = 0
    staged = np.full(rows * nodes + more, -1)
    for r, asked in zip(order, drafts, strict=True):
        start[r] = random.integers(1, context - nodes - 1) if context > nodes + 2 else 1
        first[r], count[r], guesses[r] = begin, nodes, max(asked, 0)
        if asked < 0:
            count[r], guesses[r] = 1 - asked, 0
            staged[begin : begin + count[r]] = random.integers(0, 999, count[r])
        begin += nodes
    history = random.integers(0, 999, (slots, context))
    history[null] = POISON
    sample_slot = np.where(random.random(rows) < 0.8, slot, null)
    pages = 1 + random.permutation(slots * -(-context // page)).reshape(slots, -1)
    given = {"token_ids": staged, "row_slot": slot, "start": start, "drafts": guesses, "query_start": first}
    given |= {"query_len": count, "history": history, "sample_slot": sample_slot, "pages": pages}
    made |= {name: ints(value) for name, value in given.items()}
    return made | {
        "length": torch.zeros(slots, dtype=torch.int32),
        "tree": ints(random.integers(0, 999, (rows, nodes))),
    }


def _batches() -> Iterator[tuple[str, Table, np.random.Generator]]:
    for seed, (label, nodes, drafts, *sizes) in enumerate(SIZES):
        yield label, batch(seed, nodes, drafts, *sizes), np.random.default_rng(seed)


def _deep(made: Table) -> int:
    return int(made["depth"].max())


def plant_tree(op: str) -> Iterator[Case]:
    for label, made, _ in _batches():
        yield Case(op, label, {n: made[n] for n in ("row_slot", "start", "history", "parent")})


LEVEL = ("row_slot", "sample_slot", "start", "drafts", "tree", "parent", "depth", "ancestors")


def place_level(op: str) -> Iterator[Case]:
    for label, made, _ in _batches():
        for number, level in enumerate(levels_of(made)):
            operands = {n: made[n] for n in LEVEL} | {"level": level, "length": made["length"]}
            yield Case(op, f"{label}-{number}", operands, {"behind": number % 2, "deep": _deep(made)})


def grow_tree(op: str) -> Iterator[Case]:
    for label, made, random in _batches():
        for number, level in enumerate(levels_of(made)):
            drawn = ints(random.integers(-1, 999, len(made["row_slot"]) * len(level)))
            operands = {"tree": made["tree"], "drawn": drawn, "level": level, "children": made["children"]}
            for rank in {0, made["children"].shape[1] - 1}:
                yield Case(op, f"{label}-{number}-{rank}", operands, {"rank": rank})


def exclude(op: str) -> Iterator[Case]:
    for seed, (rows, vocabulary) in enumerate(((1, 1), (5, 96), (3, 2500))):
        random = Random(seed)
        tokens = random.integers(vocabulary, rows)
        tokens[-1] = -1
        yield Case(op, f"{rows}x{vocabulary}", {"logits": random.normal(rows, vocabulary), "tokens": tokens})


def take_parents(op: str) -> Iterator[Case]:
    for label, made, _ in _batches():
        levels, random = levels_of(made), Random(3)
        for number, (level, below) in enumerate(itertools.pairwise(levels)):
            wide = (3, 64, 1100)[number % 3]
            x = random.normal(
                len(made["row_slot"]) * len(level), wide, dtype=("float32", "float16")[number % 2]
            )
            operands = {
                "tree": made["tree"],
                "x": x,
                "level": level,
                "below": below,
                "parent": made["parent"],
            }
            yield Case(op, f"{label}-{number}", operands)


PACK = ("token_ids", "row_slot", "query_start", "query_len", "sample_slot", "start", "drafts", "tree")
PACK += ("parent", "depth", "ancestors", "length")


def pack_tree(op: str) -> Iterator[Case]:
    for label, made, _ in _batches():
        yield Case(op, label, {n: made[n] for n in PACK}, {"deep": _deep(made)})


ACCEPT = ("ids", "tokens", "row_slot", "start", "query_start", "query_len", "parent", "length", "history")


def checked(made: Table, random: np.random.Generator) -> Table:
    """A batch whose nodes are packed, and what was sampled behind each: often a child of its."""
    count = torch.where(made["row_slot"] == len(made["length"]) - 1, 0, 1 + made["drafts"])
    begin = (count.cumsum(0) - count).int()
    ids = ints(random.integers(0, 3, len(made["token_ids"])))  # so that siblings are alike now and then
    tokens = ints(random.integers(-1, 3, len(ids)))
    return made | {"ids": ids, "tokens": tokens, "query_start": begin, "query_len": count.int()}


def accept_tree(op: str) -> Iterator[Case]:
    for label, made, random in _batches():
        made = checked(made, random)
        yield Case(op, label, {n: made[n] for n in ACCEPT}, {"deep": _deep(made)})
    full = checked(batch(9, 6, [5, 5], 2, 0, 40, 8), np.random.default_rng(9))
    for r in range(2):  # nothing of what is sampled behind the last places is kept
        full["start"][r] = 38 - r
    yield Case(op, "at-the-end", {n: full[n] for n in ACCEPT}, {"deep": _deep(full)})


def order_results(op: str) -> Iterator[Case]:
    for tokens, wide in ((1, 1), (9, 20)):
        random = Random(tokens)
        operands = {"order": random.permutation(tokens).int(), "tokens": random.integers(99, tokens)}
        operands |= {"logprob": random.normal(tokens), "top_ids": random.integers(99, tokens, wide)}
        yield Case(op, f"{tokens}x{wide}", operands | {"top_values": random.normal(tokens, wide)})


def lines(made: Table, random: np.random.Generator) -> torch.Tensor:
    """Nodes of any branch of each row's tree, as far as the row has it."""
    line = torch.zeros(len(made["row_slot"]), _deep(made), dtype=torch.int32)
    for r, most in enumerate(made["drafts"].tolist()):
        node = int(random.integers(0, most + 1))
        while node:
            line[r, int(made["depth"][node]) - 1], node = node, int(made["parent"][node])
    return line


def place_moves(op: str) -> Iterator[Case]:
    for seed, (label, nodes, drafts, rows, more, context, page) in enumerate(SIZES):
        made = batch(seed, nodes, drafts, rows, more, context, page)
        operands = {n: made[n] for n in ("row_slot", "start", "pages")}
        operands["line"] = lines(made, np.random.default_rng(seed))
        for behind in (0, 1):
            attrs = {"page_size": page, "behind": behind, "deep": _deep(made)}
            yield Case(op, f"{label}-{behind}", operands, attrs)


def _moves(seed: int, rows: int, deep: int, places: int) -> Table:
    """Ascending places of each row, of which some come to the next but one's: all overlaps there can be."""
    random = np.random.default_rng(seed)
    source, target = np.zeros((2, rows, deep), np.int64)
    own = 1 + random.permutation(rows * places).reshape(rows, places)
    for r in range(rows):
        line = np.sort(random.permutation(places - 1)[:deep]) + 1
        source[r], target[r] = own[r, line], own[r, 1 : deep + 1]
        if random.random() < 0.3:
            source[r, deep // 2 :] = target[r, deep // 2 :] = 0
    return {"source": ints(source.reshape(-1)), "target": ints(target.reshape(-1))}


def move_entries(op: str) -> Iterator[Case]:
    for seed, (rows, deep, heads, size) in enumerate(((1, 1, 1, 3), (5, 4, 3, 20), (3, 9, 8, 128))):
        random, places = Random(seed), 3 * deep + 2
        shape = (1 + rows * places, 1, heads, size)
        for dtype in ("float32", "bfloat16"):
            caches = {n: random.normal(*shape, dtype=dtype) for n in ("k_cache", "v_cache")}
            yield Case(
                op, f"{rows}x{deep}-{dtype}", _moves(seed, rows, deep, places) | caches, {"deep": deep}
            )


def move_states(op: str) -> Iterator[Case]:
    for seed, (rows, deep, wide) in enumerate(((1, 1, 3), (4, 5, 4096))):
        hidden = Random(seed).normal(-(-(1 + rows * (3 * deep + 2)) // 4), 4, wide, dtype="float32")
        yield Case(
            op, f"{rows}x{deep}", _moves(seed, rows, deep, 3 * deep + 2) | {"hidden": hidden}, {"deep": deep}
        )


def nodes_of_rows(
    seed: int,
    heads: Heads,
    rows: Sequence[tuple[int, int]],
    most: int,
    dtype: str,
    cache: str,
    window: int = 0,
) -> Table:
    """Operands of ``tree_attention`` for rows of (nodes, places before them); what no token sees is NaN.

    Rows of fewer than ``most`` nodes run any of their tree, as drafters run a level.
    """
    random, draw = Random(seed), np.random.default_rng(seed)
    trees = [tree_of(draw, most) for _ in rows]
    nodes = [sorted(draw.permutation(most)[:count].tolist()) for count, _ in rows]
    lengths = [before + own[-1] + 1 if own else 0 for own, (_, before) in zip(nodes, rows, strict=True)]
    held = [-(-length // heads.page) for length in lengths]
    pages = 1 + random.permutation(sum(held))
    table = torch.zeros(len(rows), max(1, *held), dtype=torch.int32)
    shape = (len(pages) + 1, heads.page, heads.kv_heads, heads.size)
    caches = [torch.full(shape, NAN, dtype=getattr(torch, cache)) for _ in range(2)]
    tokens, at = len(rows) * most, 0
    positions, visible = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int64)
    for r, (tree, own, (_, before)) in enumerate(zip(trees, nodes, rows, strict=True)):
        listed, pages = pages[: held[r]].int(), pages[held[r] :]
        table[r, : held[r]] = listed
        seen: set[int] = set()
        for node in own:
            positions[at], visible[at] = before + int(tree["depth"][node]), tree["ancestors"][node]
            seen |= {before + b for b in range(64) if int(tree["ancestors"][node]) >> b & 1}
            at += 1
            seen |= set(range(max(0, int(positions[at - 1]) + 1 - window) if window else 0, before))
        for place in seen:
            for x in caches:
                random_row = random.normal(heads.kv_heads, heads.size)
                x[int(listed[place // heads.page]), place % heads.page] = random_row.to(x.dtype)
    counts = [len(own) for own in nodes]
    return {
        "q": random.normal(tokens, heads.heads * heads.size, dtype=dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "query_start": ints(np.cumsum(counts) - counts),
        "query_len": ints(counts),
        "context_len": ints(lengths),
        "positions": positions,
        "tree_start": ints([before for _, before in rows]),
        "visible": visible,
    }


TREE_ROWS = (
    ([(1, 0)], 1, 0),
    ([(6, 3), (0, 0), (4, 40)], 6, 0),
    ([(13, 17), (1, 9)], 13, 9),
    ([(64, 130)], 64, 0),
)


def tree_attention(op: str) -> Iterator[Case]:
    for seed, heads in enumerate(GEOMETRIES):
        for number, (rows, most, window) in enumerate(TREE_ROWS):
            dtype, cache = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))[
                number % 3
            ]
            operands = nodes_of_rows(seed, heads, rows, most, dtype, cache, window)
            attrs = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.size}
            attrs |= {"scale": heads.size**-0.5, "window": window}
            yield Case(op, f"{heads.label}-{number}", operands, attrs)
            sinks = Random(seed).normal(heads.heads)
            yield Case(op, f"{heads.label}-{number}-sinks", operands | {"sinks": sinks}, attrs)
