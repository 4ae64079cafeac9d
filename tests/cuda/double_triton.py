"""A small kernel for the planner's own tests: ``y = scale * x`` over rows with any stride."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def scale_rows(x, y, factor, STRIDE: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr):
    """One row a block; ``x`` has rows of ``STRIDE`` elements, ``y`` of ``C``."""
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
