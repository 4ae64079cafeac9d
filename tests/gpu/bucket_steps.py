"""Steps that go through every bucket of a plan: full, and as empty as it may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scripted_steps import Row, Step, make_step, open_slot

from makeready.graphs.plan.buckets import BucketTable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import DECODE, EXTEND, Bucket


@dataclass(frozen=True)
class Case:
    """A step in ``bucket``, and the steps before it that fill the cache of its rows.

    Attributes:
        fill: "full", or "sparse": a row and a token more than the next smaller bucket takes.
    """

    bucket: Bucket
    fill: str
    before: tuple[Step, ...]
    step: Step


def cases(plan: Plan, least_id: int = 0) -> Iterator[Case]:
    """Two cases for every bucket, with rows of random lengths behind random contexts.

    Args:
        least_id: smallest token id that occurs.
    """
    for bucket in plan.buckets:
        for fill in ("full", "sparse"):
            rows, tokens = (bucket.rows, bucket.tokens) if fill == "full" else _fewest(plan, bucket)
            yield _case(plan, bucket, fill, rows, tokens, least_id)


def _fewest(plan: Plan, bucket: Bucket) -> tuple[int, int]:
    """Rows and tokens of the smallest batch that runs in ``bucket``, of two rows where there is one."""
    table, legal = BucketTable(plan.buckets), plan.steps[bucket.phase].legal
    sizes = [
        (rows, tokens)
        for tokens in range(1, bucket.tokens + 1)
        for rows in (range(1, bucket.rows + 1) if bucket.phase == DECODE else (2, *range(1, bucket.rows + 1)))
        if rows <= bucket.rows and legal(rows, tokens)
    ]
    return next(size for size in sizes if table.covering(bucket.phase, *size) == bucket)


def _case(plan: Plan, bucket: Bucket, fill: str, rows: int, tokens: int, least_id: int) -> Case:
    random = np.random.default_rng([bucket.rows, bucket.tokens, fill == "full", bucket.phase == DECODE])
    limits, vocabulary = plan.limits, plan.config["vocab_size"]
    lengths = _lengths(random, rows, tokens, limits.context_len)
    if plan.steps[bucket.phase].gain is not None:  # trees are of one size
        lengths = [tokens // rows] * rows
    contexts = [int(random.integers(bucket.phase == DECODE, limits.context_len - n + 1)) for n in lengths]
    ids = [
        random.integers(least_id, vocabulary, c + n).tolist() for c, n in zip(contexts, lengths, strict=True)
    ]
    before = []
    for slot, context in enumerate(contexts):
        for at in range(0, context, limits.max_tokens):
            chunk = ids[slot][at : min(at + limits.max_tokens, context)]
            before.append(make_step(plan, EXTEND, [Row(slot, chunk, at)]))
    step = make_step(plan, bucket.phase, [Row(s, ids[s][c:], c) for s, c in enumerate(contexts)])
    assert step.bucket == bucket, f"{rows} rows and {tokens} tokens run in {step.bucket}, not in {bucket}"
    return Case(bucket, fill, tuple(before), step)


def _lengths(random: np.random.Generator, rows: int, tokens: int, most: int) -> list[int]:
    """Tokens of each row: one row as long as can be, the others share the rest unevenly."""
    lengths = [1] * rows
    left = tokens - rows
    for row in random.permutation(rows):
        more = min(left, most - 1) if row == 0 else min(int(random.integers(0, left + 1)), most - 1)
        lengths[row] += more
        left -= more
    for row in range(rows):  # what is left goes where there is room
        more = min(left, most - lengths[row])
        lengths[row] += more
        left -= more
    assert left == 0, f"{rows} rows of {most} tokens hold no {tokens}"
    return lengths


def run(executable: Any, case: Case, *, poison: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[rows, vocabulary]`` and greedy tokens ``[rows]`` of a case's last step."""
    for slot in range(len(case.step.rows)):
        open_slot(executable, slot)
    for step in case.before:
        executable.launch(step.bucket, step.arrays).wait()
    if poison:
        executable.poison()
    tokens = executable.launch(case.bucket, case.step.arrays).wait()["tokens"]
    count = len(case.step.rows)
    return executable.operand(case.bucket, "sample", "logits")[:count].copy(), tokens[:count].copy()
