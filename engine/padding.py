"""What padding a step has that a smaller one before it would spare."""

from __future__ import annotations

from collections.abc import Sequence

from makeready.engine.batch import Chunk
from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.spec import Bucket


class Padding:
    """Compares a step with two in smaller buckets.

    A step costs about as much as its bucket has tokens, and at least as much as ``max_rows`` of them. The
    generating rows run in the next step anyway.

    Args:
        buckets: of the plan.
        phase: of the steps.
        max_rows: of the plan.
    """

    def __init__(self, buckets: Sequence[Bucket], phase: str, max_rows: int) -> None:
        self._table, self._phase, self._least = BucketTable(buckets), phase, max_rows
        self._sizes = [(bucket.rows, bucket.tokens) for bucket in buckets if bucket.phase == phase]

    def left_over(self, decoding: int, chunks: Sequence[Chunk]) -> int:
        """Tokens of the last chunk that are better run in the next step, never all of them; 0 for none.

        Args:
            decoding: generating rows.
            chunks: beside them, one at least.
        """
        rows, tokens = decoding + len(chunks), decoding + sum(chunk.count for chunk in chunks)
        smaller = max((size for most, size in self._sizes if most >= rows and size < tokens), default=0)
        rest = tokens - smaller
        if rest >= chunks[-1].count:
            return 0
        after = self._table.covering(self._phase, decoding + 1, decoding + rest).tokens
        after = after - decoding if decoding else max(after, self._least)
        return rest if smaller + after < self._table.covering(self._phase, rows, tokens).tokens else 0
