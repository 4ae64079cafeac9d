"""What attention kernels share: where a row's keys lie, and what the cache's dtype asks for.

# L keys of a step
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pages_of(pages, key, end, PAGE: tl.constexpr, L: tl.constexpr):
    """Pages of the tokens from ``key`` on: one where a step lies in one, else one a token; none past ``end``."""
    if PAGE % L == 0:
        page = tl.load(pages + tl.minimum(key, end - 1) // PAGE)
    else:
        page = tl.load(pages + tl.minimum(key + tl.arange(0, L), end - 1) // PAGE)
    return page


@triton.jit
def slots_of(page, key, PAGE: tl.constexpr, L: tl.constexpr):
    """Slots (page * PAGE + place in it) of the tokens from ``key`` on, in pages as :func:`pages_of` gives them."""
    l = tl.arange(0, L)  # noqa: E741
    if PAGE % L == 0:
        slot_L = page.to(tl.int64) * PAGE + (key % PAGE) + l
    else:
        slot_L = page.to(tl.int64) * PAGE + (key + l) % PAGE
    return slot_L


@triton.jit
def as_queries(q, k_cache):
    """Queries as products take them, in the type that keys and values are then widened to.

    It is the activations', or fp16 where the cache has 8 bits: fp16 holds every e4m3 number, and the device
    converts two of them in an instruction, to bf16 in five. bf16 queries keep all their bits between 6e-5 and
    65504; larger ones saturate.
    """
    if k_cache.dtype.element_ty.is_fp8():
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def as_cached(x, cache):
    """``x`` as ``cache`` holds it: see :func:`~.paged.cached`."""
    kind = cache.dtype.element_ty
    if kind.is_fp8():
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(kind)
