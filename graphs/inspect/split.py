"""The memory of windows and states beside pages, in words."""

from __future__ import annotations

from makeready.graphs.inspect import units
from makeready.graphs.plan.plan import Plan


def beside_pages(plan: Plan, pages: int) -> str:
    """What windows and states take where memory holds ``pages``, the null page included; "" where there are none.

    Such as ``4.70 GiB of state (65 blocks of 73.7 MiB: 16 rows in flight, 32 snapshots)``.
    """
    kv, limits = plan.kv, plan.limits
    split, blocks = kv.split(pages, limits), kv.blocks(pages, limits)
    rows = (
        f"{split.rows} rows" if split.rows == limits.max_rows else f"{split.rows} of {limits.max_rows} rows"
    )
    return ", ".join(
        f"{units.nbytes(blocks[group.name] * group.block_bytes)} of {group.name} ({blocks[group.name]:,} blocks of "
        f"{units.nbytes(group.block_bytes)}: {rows} in flight, {split.snapshots:,} snapshots)"
        for group in kv.bounded
    )
