"""Drafts by chance on GPUs, a thread a token."""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from makeready.kernels.device import Candidate, DeviceLaunch, OpCall, Pointer, Scalar
from makeready.kernels.registry import cuda_kernel
from makeready.kernels.step.draft_forced import WRONG, force_drafts

_TOKENS = 128  # of a block


@triton.jit
def force_tokens(
    tokens,
    draft_slot,
    draft_context,
    draft_ids,
    count,
    BELOW: tl.constexpr,
    WRONG: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`~.draft_forced.force_drafts`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < count
    slot = tl.load(draft_slot + t, mask=inside, other=0).to(tl.uint32)
    x = slot * 0x9E3779B1 + tl.load(draft_context + t, mask=inside, other=0).to(tl.uint32) * 0x85EBCA6B
    x = x.to(tl.uint32)
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D).to(tl.uint32)
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B).to(tl.uint32)
    x = x ^ (x >> 16)
    truth = tl.load(tokens + (t + count - 1) % count, mask=inside, other=0)
    tl.store(draft_ids + t, tl.where((x >> 8) < BELOW, truth, WRONG), mask=inside)


@cuda_kernel(force_drafts, "tokens", invariant=True)
def force_launches(call: OpCall) -> Sequence[Candidate]:
    """See :func:`force_tokens`."""
    count, pdl = int(call.tensors["tokens"].shape[0]), "pdl" in call.features
    launch = DeviceLaunch(
        function="makeready.kernels.step.draft_forced_triton:force_tokens",
        constants={
            "BELOW": int(call.attrs["share"] * 2**24),
            "WRONG": WRONG,
            "BLOCK": _TOKENS,
            "PDL": pdl,
        },
        arguments={
            **{name: Pointer(name) for name in call.tensors},
            "count": Scalar(count, "int32", specialize=False),
        },
        grid=(-(-count // _TOKENS), 1, 1),
        dependent=pdl,
    )
    return (Candidate("tokens", (launch,)),)
