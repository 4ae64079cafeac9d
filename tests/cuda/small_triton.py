"""Small kernels for the planner's own tests."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def scale_rows(x, y, factor, STRIDE: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr):
    """``y = factor * x``, one row a block; ``x`` has rows of ``STRIDE`` elements, ``y`` of ``C``."""
    row = tl.program_id(0)
    at = tl.arange(0, C)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * STRIDE + at).to(tl.float32)
    tl.store(y + row * C + at, (value * factor).to(y.dtype.element_ty))


@triton.jit
def copy_tiles(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of ``ROWS`` × ``COLUMNS`` a block, through tensor maps."""
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    y.store([row, column], x.load([row, column]))


@triton.jit
def count_blocks(x, y, counter, partial, C: tl.constexpr):
    """``y = x`` by way of scratch; the last of two blocks sets the counter back."""
    at = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(partial + at, tl.load(x + at).to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1) == 1:
        tl.store(counter, 0)
    tl.store(y + at, tl.load(partial + at).to(y.dtype.element_ty))
