"""How tokens are guessed before they are sampled, so that a step can check several at once.

Imports neither torch nor triton: plans remember it, and the runtime reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

CHAIN = "num_draft_tokens"  # the field that trees do not read
MOST_NODES = 64  # of a tree, its root among them: what a token sees of it is as many bits
Paths: TypeAlias = tuple[tuple[int, ...], ...]


def _paths(tree: Any) -> Any:
    """The ways to all nodes of a tree, also of one that is given by how many children the nodes of each level have.

    There likely nodes come first: those with few younger siblings on their way. What is no such list stays as it is.
    """
    if not isinstance(tree, Sequence) or isinstance(tree, str):
        return tree
    if not tree or not all(type(count) is int and count > 0 for count in tree):
        return tuple(tuple(path) if isinstance(path, Sequence) else path for path in tree)
    found: list[tuple[int, ...]] = [()]
    for depth, count in enumerate(tree):
        found += [(*path, rank) for path in found if len(path) == depth for rank in range(count)]
        if len(found) > MOST_NODES:
            break
    return tuple(sorted(found[1:], key=lambda path: (sum(path), len(path), path)))


@dataclass(frozen=True)
class Speculative:
    """Speculative decoding, as a plan is compiled for it; see docs/speculation.md.

    Attributes:
        method: ``ngram`` guesses that what followed the last tokens where they came before, in the prompt or the
            output, follows them again: it needs no second model and pays where answers repeat what they were given.
            ``draft``: a small model of the same vocabulary, ``speculative.checkpoint``, is asked. ``eagle`` (EAGLE-1
            and 2) and ``eagle3``: a head that was trained for the model, from there, too. ``mtp``: the model's own
            further layer (DeepSeek-V3). null: no guesses.
        num_draft_tokens: tokens that are guessed for a row in a step, at most, one behind the other; not beside
            a tree.
        tree: of methods with a model that drafts: guesses are a tree, of the same shape in every step. Either how
            many children the nodes of each level have, ``[3,2,1]``, or the way to each node, by ranks of children
            from the most likely one (0) on: ``[[0],[0,0],[1]]``. Rows with few places left have the first nodes of
            the list. Empty: a chain.
        ngram_min: of ``ngram``: last tokens that have to be found again; without them nothing is guessed.
        ngram_max: of ``ngram``: last tokens that are looked for; the place where most of them are found counts.
        max_rows: batches of more rows generate token by token. All logits of a step exist at once, for
            ``max_rows * (1 + num_draft_tokens)`` tokens.
        forced_acceptance: for measurements alone: each draft counts as right with this probability, whatever it is,
            so that answers are of no use. null: as it is.
    """

    method: str | None = None
    num_draft_tokens: int = 4
    ngram_min: int = 1
    ngram_max: int = 4
    max_rows: int = 32
    forced_acceptance: float | None = None
    tree: Paths = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", _paths(self.tree))

    @property
    def drafts(self) -> int:
        """Tokens that are guessed for a row in a step, at most."""
        return len(self.tree) or self.num_draft_tokens
