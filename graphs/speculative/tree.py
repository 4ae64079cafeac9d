"""Trees of drafts: a drafter runs a level of every row's tree at a time, and draws the children of its nodes.

A tree is the same for all rows and steps, so its shape is constants of a program. The first child of a node is the
token that the sampler draws there with the sequence's own parameters and noise, every further one what it draws where
its elder siblings cannot be. So trees hold what a drafter takes for likely at any temperature: greedy, the tokens of
the largest logits.

Nodes are numbered as the option lists them, which says what a row goes without that has few places left.

    T tokens, R rows, M nodes, W nodes of a level, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from makeready.graphs.checkpoint.paired import DRAFT
from makeready.graphs.layers.inputs import Inputs
from makeready.graphs.layers.parameter import constant
from makeready.graphs.plan.plan import PlanError
from makeready.graphs.plan.spec import CacheSpec, Limits
from makeready.graphs.plan.speculative import MOST_NODES, Paths
from makeready.graphs.speculative.states import NAME as STATES
from makeready.graphs.steps.generate import draw, paged, sample
from makeready.kernels.step import draft_chain, draft_tree, move_entries


@dataclass(frozen=True)
class Shape:
    """Parents, depths and ancestors of nodes, the root's among them, and the children of each by rank."""

    parent: tuple[int, ...]
    depth: tuple[int, ...]
    ancestors: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]

    @property
    def deep(self) -> int:
        return max(self.depth)

    @property
    def levels(self) -> list[list[int]]:
        """The nodes of every depth, ascending."""
        return [[n for n, depth in enumerate(self.depth) if depth == d] for d in range(self.deep + 1)]

    def wide(self, level: int) -> int:
        """Children that a node of a level has, at most."""
        return max(sum(child >= 0 for child in self.children[node]) for node in self.levels[level])


def shape_of(paths: Paths) -> Shape:
    """The tree of ``paths`` as :class:`~makeready.graphs.plan.speculative.Speculative` has them.

    Raises:
        PlanError: they are no tree.
    """
    whole = isinstance(paths, tuple) and all(
        isinstance(path, tuple) and path and all(type(rank) is int and rank >= 0 for rank in path)
        for path in paths
    )
    if not whole:
        raise PlanError(
            f"speculative.tree={paths} must be a list of how many children the nodes of each level have, [3,2,1], or "
            "of the way to each node by ranks of children, [[0],[1],[0,0]]"
        )
    known: set[tuple[int, ...]] = {()}
    for path in paths:
        elder = (*path[:-1], path[-1] - 1)
        if path in known or path[:-1] not in known or (path[-1] and elder not in known):
            raise PlanError(
                f"speculative.tree has {list(path)} twice, or before its parent or its elder sibling; list each once "
                "and behind them"
            )
        known.add(path)
    if len(known) > MOST_NODES:
        raise PlanError(
            f"speculative.tree has {len(paths)} nodes, and steps check {MOST_NODES - 1} at most; leave some out"
        )
    numbers = {(): 0} | {path: number for number, path in enumerate(paths, 1)}
    parent = tuple(numbers[path[:-1]] for path in numbers)
    ancestors = tuple(sum(1 << numbers[path[:d]] for d in range(len(path) + 1)) for path in numbers)
    wide = max(path[-1] for path in paths) + 1
    children = tuple(tuple(numbers.get((*path, rank), -1) for rank in range(wide)) for path in numbers)
    return Shape(parent, tuple(map(len, numbers)), ancestors, children)


def check_tree(paths: Paths, limits: Limits, cache: CacheSpec, *, deterministic: bool) -> None:
    """Raise :class:`PlanError` for trees that cannot be."""
    if deterministic:
        raise PlanError(
            "speculative.tree attends by kernels of its own, and in a plan.deterministic plan all steps run the "
            "same; leave one of them out, or use speculative.num_draft_tokens for a chain"
        )
    deep = max(map(len, paths))
    other = next((part.name for part in cache.parts if not part.name.endswith((".k", ".v", STATES))), None)
    if other is not None:
        raise PlanError(
            f"speculative.tree moves keys, values and hidden states, and the cache has {other}, too (latents, or "
            "numbers with scales); use speculative.num_draft_tokens for a chain"
        )
    narrow = next((g.window for g in cache.paged if g.window and g.window <= deep), None)
    if narrow is not None:
        raise PlanError(
            f"speculative.tree is {deep} levels deep, and the model has a window of {narrow} tokens; make it less "
            "deep"
        )
    wide = max(path[-1] for path in paths) + 1
    if wide > limits.vocabulary:
        raise PlanError(
            f"speculative.tree gives a node {wide} children, and the vocabulary has {limits.vocabulary} tokens; "
            "leave some out"
        )


class Tables:
    """A tree's shape as constants of a plan."""

    def __init__(self, paths: Paths) -> None:
        self.shape = shape_of(paths)
        self.deep = self.shape.deep
        self.parent, self.depth = self._table(self.shape.parent), self._table(self.shape.depth)
        self.ancestors = self._table([_signed(bits) for bits in self.shape.ancestors], "int64")
        self.children = self._table(self.shape.children)
        self.levels = [self._table(nodes) for nodes in self.shape.levels[:-1]]

    def _table(self, values: Sequence[Any], dtype: str = "int32") -> torch.Tensor:
        shape = (len(values), len(values[0])) if isinstance(values[0], tuple) else (len(values),)
        return constant(shape, "numbers", {"values": list(values), "dtype": dtype}, dtype=dtype)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        for name in ("parent", "depth", "ancestors", "children"):
            yield f"tree.{name}", getattr(self, name)
        for number, table in enumerate(self.levels):
            yield f"tree.level.{number}", table


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


class Tree:
    """The trees of a step's rows, from their roots to what became of them.

    Args:
        drafter, group, unmasked: of :class:`~.chain.Followed`, whose drafter it asks.
    """

    def __init__(
        self, tables: Tables, drafter: Any, group: str, unmasked: Mapping[str, torch.Tensor]
    ) -> None:
        self.tables, self.drafter, self.group, self.unmasked = tables, drafter, group, unmasked

    def draw(self, i: Inputs, limits: Limits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the rows' roots are, how many drafts each has, and tokens of all nodes ``[R, M]``."""
        t, i = self.tables, i.beside(self.group, DRAFT)
        start, drafts = draft_chain.count_drafts(
            i.token_ids, i.row_slot, i.row_start, i.query_start, i.query_len, i.limit, i.length
        )
        tree = draft_tree.plant_tree(i.row_slot, start, i.history, t.parent)
        before = elder = None
        for number, level in enumerate(t.levels):
            ids, at, drawn = self._placed(i, limits, start, drafts, tree, level)
            if number == 0:
                before = self.drafter.begin(at.adding(state_slot=at.kv_slot))
            elif before is not None:
                before = draft_tree.take_parents(tree, before, t.levels[number - 1], level, t.parent)
            logits, before = self.drafter.step(ids, before, at)
            for rank in range(t.shape.wide(number)):
                if elder is not None and rank:
                    logits = draft_tree.exclude(logits, elder)
                elder = draw(logits, drawn)
                tree = draft_tree.grow_tree(tree, elder, level, t.children, rank=rank)
        return start, drafts, tree

    def _placed(
        self,
        i: Inputs,
        limits: Limits,
        start: torch.Tensor,
        drafts: torch.Tensor,
        tree: torch.Tensor,
        level: torch.Tensor,
    ) -> tuple[torch.Tensor, Inputs, Inputs]:
        """Ids of the nodes of a level, inputs to run them, and inputs to draw their children."""
        t = self.tables
        (
            ids, positions, places, token_slot, visible, draw_slot, draw_context, path, path_len,
            query_start, query_len, context_len, tree_start,
        ) = draft_tree.place_level(
            i.row_slot, i.sample_slot, start, drafts, tree, t.parent, t.depth, t.ancestors, level, i.length,
            behind=self.drafter.behind, deep=t.deep,
        )  # fmt: skip
        at = i.branching(t.deep).adding(
            positions=positions, token_slot=token_slot, query_start=query_start, query_len=query_len,
            context_len=context_len, tree_start=tree_start, visible=visible,
        )  # fmt: skip
        drawn = at.adding(
            sample_slot=draw_slot, context_len=draw_context, path=path, path_len=path_len, **self.unmasked
        )
        return ids, paged(at, limits, places), drawn


def check(model: Any, i: Inputs, limits: Limits) -> Mapping[str, torch.Tensor]:
    """A step that verifies trees: what :meth:`~makeready.graphs.steps.verify.Verify.trace` gives."""
    tree: Tree = model.tree
    t = tree.tables
    start, drafts, tokens = tree.draw(i, limits)
    (
        ids, positions, places, after, token_slot, visible, draw_slot, draw_context, path, path_len,
        first, count, context_len,
    ) = draft_tree.pack_tree(
        i.token_ids, i.row_slot, i.query_start, i.query_len, i.sample_slot, start, drafts, tokens,
        t.parent, t.depth, t.ancestors, i.length, deep=t.deep,
    )  # fmt: skip
    i = i.branching(t.deep).adding(
        token_ids=ids, positions=positions, places=places, after=after, token_slot=token_slot, visible=visible,
        query_start=first, query_len=count, context_len=context_len, tree_start=start,
    )  # fmt: skip
    for group in i.cache.paged:
        i = paged(i.of(group.name), limits, places)
    i = i.of(i.cache.groups[0].name)
    logits = model(ids, i)
    drawn = i.adding(sample_slot=draw_slot, context_len=draw_context, path=path, path_len=path_len)
    made = sample(logits, drawn, limits)
    drafted, accepted, line, order = draft_tree.accept_tree(
        ids, made["tokens"], i.row_slot, start, first, count, t.parent, i.length, i.history, deep=t.deep
    )
    _move(i, start, line, tree.drafter.behind, t.deep)
    gained = draft_tree.order_results(order, *made.values())
    return dict(zip(made, gained, strict=True)) | {"drafted": drafted, "accepted": accepted}


def _move(inputs: Inputs, start: torch.Tensor, line: torch.Tensor, behind: int, deep: int) -> None:
    """What the cache has of nodes that were right comes to the places of their tokens."""
    for group in inputs.cache.paged:
        i = inputs.of(group.name)
        own, drafts = (
            [part.name for part in group.parts if part.name.startswith(DRAFT) == second]
            for second in (False, True)
        )
        states = [name for name in drafts if name == DRAFT + STATES]
        entries = [name for name in drafts if name not in states]
        for names, less in ((own + states, 0), (entries, behind)) if behind else ((own + drafts, 0),):
            if not names:
                continue
            moves = move_entries.place_moves(
                i.row_slot, start, line, i.pages, page_size=i.cache.page_size, behind=less, deep=deep
            )
            for name in names:
                if name.endswith(".k"):
                    move_entries.move_entries(*moves, i.kv(name), i.kv(f"{name[:-1]}v"), deep=deep)
                elif not name.endswith(".v"):
                    move_entries.move_states(*moves, i.kv(name), deep=deep)
