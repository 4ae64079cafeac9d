"""Trees of drafts: nodes level by level while they are drawn, and all packed for the step that checks them.

A tree is the same for all rows. Node 0 is its root, the sequence's own last token; every other node comes behind its
``parent`` in the order of nodes, so that the first nodes of a tree are a tree. Node i of a row lies in the cache i
places behind the root, and is at position ``depth[i]`` behind it. Where a row has few places left, it has the first
nodes alone.

    T tokens, R rows, S slots (the last is the null slot of padding rows), L tokens of context, M nodes of a tree,
    K children of a node at most, W nodes of a level (N of all rows), V of the next one, C features, X tokens of the
    vocabulary, ``deep`` levels behind the root
"""

from __future__ import annotations

import torch

from makeready.kernels.contract import Tolerance, contract

_EXACT = Tolerance(exact=True)


@contract(
    "row_slot[R]:int32 start[R]:int32 history[S,L]:int32 parent[M]:int32 -> tree[R,M]:int32",
    tolerance=_EXACT,
    traffic={"history": "R"},
)
def plant_tree(
    row_slot: torch.Tensor, start: torch.Tensor, history: torch.Tensor, parent: torch.Tensor
) -> torch.Tensor:
    """Trees of which the root is known alone, the token at place ``start[r]`` of the history; all else is 0."""
    tree = torch.zeros(len(row_slot), len(parent), dtype=torch.int32)
    tree[:, 0] = torch.where(row_slot == len(history) - 1, 0, history[row_slot.long(), start.long()])
    return tree


@contract(
    "row_slot[R]:int32 sample_slot[R]:int32 start[R]:int32 drafts[R]:int32 tree[R,M]:int32 parent[M]:int32 "
    "depth[M]:int32 ancestors[M]:int64 level[W]:int32 length[S]:int32 -> ids[R*W]:int32 positions[R*W]:int32 "
    "places[R*W]:int32 token_slot[R*W]:int32 visible[R*W]:int64 draw_slot[R*W]:int32 draw_context[R*W]:int32 "
    "path[R*W,deep+1]:int32 path_len[R*W]:int32 query_start[R]:int32 query_len[R]:int32 context_len[R]:int32 "
    "tree_start[R]:int32",
    tolerance=_EXACT,
    traffic={"length": "1"},
)
def place_level(
    row_slot: torch.Tensor,
    sample_slot: torch.Tensor,
    start: torch.Tensor,
    drafts: torch.Tensor,
    tree: torch.Tensor,
    parent: torch.Tensor,
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    level: torch.Tensor,
    length: torch.Tensor,
    *,
    behind: int,
    deep: int,
) -> tuple[torch.Tensor, ...]:
    """The nodes ``level`` (ascending) of every row, which a drafter runs to draw their children.

    Node i of row r, whose root is at place ``start[r]`` of the sequence, lies ``behind`` places before
    ``start[r] + i`` and is at the position ``behind`` before ``start[r] + depth[i]``. It sees what is before
    ``tree_start[r]``, the place of the root, and of the places from there on those of ``visible``, a bit each. Its
    children are drawn for ``draw_slot`` and come at place ``draw_context`` of a sequence that ends in the first
    ``path_len`` tokens of ``path``, the nodes from the root on that lead to it.

    A row has the nodes up to ``drafts[r]``; the last of the level that it has is the last of its ``context_len``
    places. Other nodes, and all where ``drafts[r]`` is 0, are padding: the null slot, and 0 of all else.
    ``query_start`` counts levels.
    """
    null, rows, wide = len(length) - 1, len(row_slot), len(level)
    flat = torch.zeros(9, rows * wide, dtype=torch.int64)
    ids, positions, places, token_slot, visible, draw_slot, draw_context, path_len, _ = flat
    token_slot.fill_(null)
    draw_slot.fill_(null)
    path = torch.zeros(rows * wide, deep + 1, dtype=torch.int32)
    query_len, context_len, tree_start = (torch.zeros(rows, dtype=torch.int32) for _ in range(3))
    for r, most in enumerate(drafts.tolist()):
        first = int(start[r]) - behind
        for w, node in enumerate(level.tolist() if most else []):
            if node > most:
                continue
            t, far = r * wide + w, int(depth[node])
            ids[t], positions[t], places[t] = tree[r, node], first + far, first + node
            token_slot[t], draw_slot[t], visible[t] = row_slot[r], sample_slot[r], ancestors[node]
            draw_context[t], path_len[t] = int(start[r]) + far + 1, far + 1
            for d in range(far, -1, -1):
                path[t, d] = tree[r, node]
                node = int(parent[node])
            query_len[r] += 1
            context_len[r], tree_start[r] = places[t] + 1, first
    made = (ids, positions, places, token_slot)
    made = (*(x.int() for x in made), visible, draw_slot.int(), draw_context.int(), path, path_len.int())
    return *made, wide * torch.arange(rows, dtype=torch.int32), query_len, context_len, tree_start


@contract(
    "tree[R,M]:int32 drawn[N]:int32 level[W]:int32 children[M,K]:int32 -> grown[R,M]:int32",
    tolerance=_EXACT,
)
def grow_tree(
    tree: torch.Tensor, drawn: torch.Tensor, level: torch.Tensor, children: torch.Tensor, *, rank: int
) -> torch.Tensor:
    """The trees with child ``rank`` of each node of a level, where it has so many; -1 in ``children`` is none.

    Those of all rows' nodes are ``drawn``, node by node. What is drawn where logits are no numbers, a negative one,
    becomes token 0.
    """
    grown, drawn_RW = tree.clone(), drawn.view(len(tree), -1)
    for w, node in enumerate(level.tolist()):
        if (child := int(children[node, rank])) >= 0:
            grown[:, child] = drawn_RW[:, w].clamp_min(0)
    return grown


@contract("logits[N,X]:float32 tokens[N]:int32 -> others[N,X]:float32", tolerance=_EXACT)
def exclude(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logits with -inf for row n's token ``tokens[n]``; a negative one is none."""
    out = torch.arange(logits.shape[1]) == tokens[:, None]
    return logits.masked_fill(out, float("-inf"))


@contract(
    "tree[R,M]:int32 x[N,C]:A level[W]:int32 below[V]:int32 parent[M]:int32 -> y[R*V,C]:A",
    tolerance=_EXACT,
    traffic={"tree": "1"},
)
def take_parents(
    tree: torch.Tensor, x: torch.Tensor, level: torch.Tensor, below: torch.Tensor, parent: torch.Tensor
) -> torch.Tensor:
    """Of every node of the level ``below``, the features that its parent has among the N of ``level``."""
    at = (parent[below.long()][:, None] == level).int().argmax(1)
    return x.unflatten(0, (len(tree), len(level)))[:, at].flatten(0, 1)


@contract(
    "token_ids[T]:int32 row_slot[R]:int32 query_start[R]:int32 query_len[R]:int32 sample_slot[R]:int32 "
    "start[R]:int32 drafts[R]:int32 tree[R,M]:int32 parent[M]:int32 depth[M]:int32 ancestors[M]:int64 "
    "length[S]:int32 -> ids[T]:int32 positions[T]:int32 places[T]:int32 after[T]:int32 token_slot[T]:int32 "
    "visible[T]:int64 draw_slot[T]:int32 draw_context[T]:int32 path[T,deep+1]:int32 path_len[T]:int32 "
    "draft_start[R]:int32 draft_len[R]:int32 context_len[R]:int32",
    tolerance=_EXACT,
    traffic={"length": "1"},
)
def pack_tree(
    token_ids: torch.Tensor,
    row_slot: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    sample_slot: torch.Tensor,
    start: torch.Tensor,
    drafts: torch.Tensor,
    tree: torch.Tensor,
    parent: torch.Tensor,
    depth: torch.Tensor,
    ancestors: torch.Tensor,
    length: torch.Tensor,
    *,
    deep: int,
) -> tuple[torch.Tensor, ...]:
    """Every row's root and the ``drafts[r]`` nodes behind it, packed: ``draft_len[r]`` from ``draft_start[r]`` on.

    What is said of a node is as in :func:`place_level` with ``behind`` 0; ``after`` is the place behind its parent,
    of the root its own. Where the last of the ``query_len[r]`` tokens that are staged from ``query_start[r]`` on is
    not negative, they are the row's nodes instead. Tokens of no row have the null slot and 0 of all else; rows of the
    null slot, or without tokens, have none.
    """
    null, tokens = len(length) - 1, len(token_ids)
    flat = torch.zeros(9, tokens, dtype=torch.int64)
    ids, positions, places, after, token_slot, visible, draw_slot, draw_context, path_len = flat
    token_slot.fill_(null)
    draw_slot.fill_(null)
    path = torch.zeros(tokens, deep + 1, dtype=torch.int32)
    begin, count, context_len = (torch.zeros_like(row_slot) for _ in range(3))
    t = 0
    for r, slot in enumerate(row_slot.tolist()):
        begin[r] = t
        if slot == null or query_len[r] == 0:
            continue
        given = token_ids[int(query_start[r]) :][: int(query_len[r])]
        row = given if given[-1] >= 0 else tree[r, : 1 + int(drafts[r])]
        root, count[r] = int(start[r]), len(row)
        context_len[r] = root + len(row)
        for node in range(len(row)):
            far, up = int(depth[node]), node
            ids[t], positions[t], places[t] = row[node], root + far, root + node
            after[t] = root + int(parent[node]) + 1 if node else root
            token_slot[t], draw_slot[t], visible[t] = slot, sample_slot[r], ancestors[node]
            draw_context[t], path_len[t] = root + far + 1, far + 1
            for d in range(far, -1, -1):
                path[t, d], up = row[up], int(parent[up])
            t += 1
    made = (x.int() for x in (ids, positions, places, after, token_slot))
    made = (*made, visible, draw_slot.int(), draw_context.int(), path, path_len.int())
    return *made, begin, count, context_len


@contract(
    "ids[T]:int32 tokens[T]:int32 row_slot[R]:int32 start[R]:int32 query_start[R]:int32 query_len[R]:int32 "
    "parent[M]:int32 length![S]:int32 history![S,L]:int32 -> drafted[R]:int32 accepted[R]:int32 line[R,deep]:int32 "
    "order[T]:int32",
    tolerance=_EXACT,
    traffic={"length": "R", "history": "R*deep"},
)
def accept_tree(
    ids: torch.Tensor,
    tokens: torch.Tensor,
    row_slot: torch.Tensor,
    start: torch.Tensor,
    query_start: torch.Tensor,
    query_len: torch.Tensor,
    parent: torch.Tensor,
    length: torch.Tensor,
    history: torch.Tensor,
    *,
    deep: int,
) -> tuple[torch.Tensor, ...]:
    """Down each row's tree as far as what is sampled behind a node is one of its children, the first one of these.

    Row r ran ``query_len[r]`` nodes from ``query_start[r]`` on: its root, at place ``start[r]`` of the sequence, and
    ``drafted[r]`` drafts. Behind each ``tokens`` were sampled. ``accepted[r]`` nodes of ``line[r]`` were right, one a
    level; beyond them it is 0. The slot's ``length`` ends behind them, and what was sampled behind the root and
    behind each of them follows the root in the ``history`` (0 where it is negative), as far as that goes. ``order``
    brings the results of these nodes to the row's first places; all others stay where they are. Padding rows have 0.
    """
    null = len(length) - 1
    drafted, accepted = torch.zeros_like(row_slot), torch.zeros_like(row_slot)
    line = torch.zeros(len(row_slot), deep, dtype=torch.int32)
    order = torch.arange(len(ids), dtype=torch.int32)
    for r, slot in enumerate(row_slot.tolist()):
        count, first, node = int(query_len[r]), int(query_start[r]), 0
        if slot == null or count == 0:
            continue
        nodes = [0]
        while True:
            wanted = int(tokens[first + node])
            found = (c for c in range(1, count) if parent[c] == node and ids[first + c] == wanted)
            if (node := next(found, 0)) == 0:
                break
            nodes.append(node)
        drafted[r], accepted[r] = count - 1, len(nodes) - 1
        line[r, : len(nodes) - 1] = torch.tensor(nodes[1:], dtype=torch.int32)
        order[first : first + len(nodes)] = first + torch.tensor(nodes, dtype=torch.int32)
        root = int(start[r])
        length[slot] = root + len(nodes)
        history[slot, root] = ids[first]
        for place, node in enumerate(nodes, root + 1):
            if place < history.shape[1]:
                history[slot, place] = tokens[first + node].clamp_min(0)
    return drafted, accepted, line, order


@contract(
    "order[T]:int32 tokens[T]:int32 logprob[T]:float32 top_ids[T,Q]:int32 top_values[T,Q]:float32 -> "
    "gained[T]:int32 gained_logprob[T]:float32 gained_ids[T,Q]:int32 gained_values[T,Q]:float32",
    tolerance=_EXACT,
)
def order_results(
    order: torch.Tensor,
    tokens: torch.Tensor,
    logprob: torch.Tensor,
    top_ids: torch.Tensor,
    top_values: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """What steps report of sampled tokens, in the order that :func:`accept_tree` gives."""
    at = order.long()
    return tokens[at], logprob[at], top_ids[at], top_values[at]
