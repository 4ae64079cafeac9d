"""Steps written by hand: what the engine stages, for checks and measurements that run without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from makeready.graphs.executable.base import Executable
from makeready.graphs.plan.plan import Plan
from makeready.graphs.plan.spec import Bucket


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence.

    Attributes:
        slot: where it lives; its page list is written to it before (``write_slot``), its state is in block slot + 1.
        ids: a negative one stands for what the device sampled last.
        start: tokens that went before.
    """

    slot: int
    ids: Sequence[int]
    start: int


def example_step(plan: Plan, bucket: Bucket, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """A step of ``rows``, each of which samples the token behind its last; other fields hold their defaults."""
    step = {
        f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype)
        for f in plan.steps[bucket.phase].staged
    }
    begin, kv = 0, plan.kv
    for at, row in enumerate(rows):
        for group in kv.states:
            step[kv.field(group.name, "state_in")][at] = 1 + row.slot if row.start else 0
            step[kv.field(group.name, "state_out")][at] = 1 + row.slot
        count = len(row.ids)
        step["token_ids"][begin : begin + count] = row.ids
        step["row_slot"][at] = step["sample_slot"][at] = row.slot
        step["row_start"][at] = row.start
        step["query_start"][at] = begin
        step["query_len"][at] = count
        begin += count
    return step


def typical_step(executable: Executable, bucket: Bucket, context: int = 1024) -> dict[str, np.ndarray]:
    """A full batch: rows that decode behind ``context`` tokens, or one prompt of all the bucket's tokens.

    Rows are given the pages that they need in turn and share them where there are too few; token ids are
    random. The step may be run again and again: it says where its rows start.
    """
    plan = executable.plan
    blocks = plan.kv.blocks(executable.pages, plan.limits)
    limits, each = plan.limits, plan.steps[bucket.phase].each
    rows = bucket.rows if each is not None else 1
    count = bucket.tokens // rows
    last = min(max(context, count), limits.context_len) if each is not None else count
    needed = -(-last // limits.page_size)
    made = []
    for row in range(rows):
        held = {
            plan.kv.field(group.name, "pages"): 1
            + (row * needed + np.arange(needed)) % (blocks[group.name] - 1)
            for group in plan.kv.paged
        }
        executable.write_slot(row, held)
        ids = np.random.default_rng(row).integers(0, plan.config["vocab_size"], count)
        made.append(Row(row, ids.tolist(), last - count))
    step = example_step(plan, bucket, made)
    for group in plan.kv.states:  # of which there may be fewer than rows, too
        for field in ("state_in", "state_out"):
            state = step[plan.kv.field(group.name, field)]
            state[state > 0] = 1 + (state[state > 0] - 1) % (blocks[group.name] - 1)
    return step
