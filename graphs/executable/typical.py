"""A full batch of a bucket, for measuring."""

from __future__ import annotations

import numpy as np

from makeready.graphs.plan import Plan
from makeready.graphs.spec import DECODE, Bucket, step_fields


def typical_step(plan: Plan, bucket: Bucket, pages: int, context: int = 1024) -> dict[str, np.ndarray]:
    """What a step stages: rows that decode behind ``context`` tokens, or one prompt of all the bucket's tokens.

    Rows take the pages that they need in turn and share them where there are too few; token ids are random.

    Args:
        pages: KV pages that there are, the null page included.
    """
    limits = plan.limits
    fields = step_fields(limits, bucket.phase)
    made = {f.name: np.full(f.spec.at(bucket.sizes), f.default, f.spec.dtype) for f in fields}
    rows = bucket.rows if bucket.phase == DECODE else 1
    each = bucket.tokens // rows
    last = min(context, limits.context_len) if bucket.phase == DECODE else each
    positions = np.arange(last - each, last)
    table, needed = np.arange(limits.pages_per_row), -(-last // limits.page_size)
    for row in range(rows):
        held = 1 + (row * needed + table) % (pages - 1)
        tokens = slice(row * each, (row + 1) * each)
        ids = np.random.default_rng(row).integers(0, plan.config["vocab_size"], each)
        made["token_ids"][tokens] = ids
        made["positions"][tokens] = positions
        made["token_slot"][tokens] = row
        made["kv_slot"][tokens] = held[positions // limits.page_size] * limits.page_size
        made["kv_slot"][tokens] += (positions % limits.page_size).astype(np.int32)
        made["query_start"][row] = row * each
        made["query_len"][row] = each
        made["context_len"][row] = last
        made["row_slot"][row] = row
        made["page_table"][row] = held
    return made
