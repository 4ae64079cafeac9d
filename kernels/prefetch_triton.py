"""Bytes that a kernel will want, brought to L2 while it waits."""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(starts, nbytes):
    """Ask for ``nbytes`` (a multiple of 16) from each of the 16-byte aligned addresses to come to L2."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [starts.to(tl.int64), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
