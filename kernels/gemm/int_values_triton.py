"""Weights of 4 or 8 bits widened in registers: two at once, by bits that are put into a float's mantissa.

``0x4300`` is 128 in bfloat16 with 7 bits of mantissa below, ``0x6400`` 1024 in float16 with 10: a field of a word put
there is that many more. bfloat16 has no room for 8 bits: the lower 7 go there, and the highest decides what is taken
off again. All steps are exact. Words of two neighbouring inputs lie in one register, and so do the floats made of
each field; see kernels/integers.py for which inputs those are. A span is 128 inputs, a tile of scales 64 outputs.

# N outputs, K inputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_ASSEMBLY = tl.constexpr(not knobs.runtime.interpret)  # which the interpreter does not know

_FOUR_BITS = """{{
.reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, {base}, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, {base}, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, {base}, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, {base}, 0xea;
}}"""
_FOUR_TO_BF16 = tl.constexpr(_FOUR_BITS.format(base="0x43004300"))
_FOUR_TO_FP16 = tl.constexpr(_FOUR_BITS.format(base="0x64006400"))
_EIGHT_TO_FP16 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 $0, $2, 0x00ff00ff, 0x64006400, 0xea;
shr.u32 t, $2, 8;
lop3.b32 $1, t, 0x00ff00ff, 0x64006400, 0xea;
}""")
_EIGHT_TO_BF16 = tl.constexpr("""{
.reg .b32 t, low, high, one;
mov.b32 one, 0x3f803f80;
lop3.b32 low, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 high, $2, 0x00800080, 0xc380c380, 0x6a;
fma.rn.bf16x2 $0, low, one, high;
shr.u32 t, $2, 8;
lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea;
lop3.b32 high, t, 0x00800080, 0xc380c380, 0x6a;
fma.rn.bf16x2 $1, low, one, high;
}""")


@triton.constexpr_function
def offset_of(bits, kind):
    """What :func:`fields_of` adds to a field."""
    return 1024.0 if kind == tl.float16 else (128.0 if bits == 4 else -128.0)


@triton.jit
def _field(w, field: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    q = (w.to(tl.int32) >> (BITS * field)) & (2**BITS - 1)
    return (q.to(tl.float32) + offset_of(BITS, KIND)).to(KIND)


@triton.jit
def fields_of(w, BITS: tl.constexpr, KIND: tl.constexpr):
    """All fields of int16 words ``[N, 8 * BITS]`` plus an offset: ``[N, 128]`` of ``KIND`` in the order of inputs."""
    N: tl.constexpr = w.shape[0]
    HALF: tl.constexpr = tl.float16 == KIND
    if BITS == 4:
        if not _ASSEMBLY:
            a = _field(w, 0, BITS, KIND)
            b = _field(w, 1, BITS, KIND)
            c = _field(w, 2, BITS, KIND)
            d = _field(w, 3, BITS, KIND)
        elif HALF:
            a, b, c, d = tl.inline_asm_elementwise(
                _FOUR_TO_FP16, "=r,=r,=r,=r,r", [w], dtype=(tl.float16,) * 4, is_pure=True, pack=2
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _FOUR_TO_BF16, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        by_field = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    else:
        if not _ASSEMBLY:
            a = _field(w, 0, BITS, KIND)
            b = _field(w, 1, BITS, KIND)
        elif HALF:
            a, b = tl.inline_asm_elementwise(
                _EIGHT_TO_FP16, "=r,=r,r", [w], dtype=(tl.float16,) * 2, is_pure=True, pack=2
            )
        else:
            a, b = tl.inline_asm_elementwise(
                _EIGHT_TO_BF16, "=r,=r,r", [w], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2
            )
        by_field = tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(by_field, (N, 128))


@triton.jit
def of_group(tiled, n, k, groups, GROUP: tl.constexpr):
    """Where in tiles of scales or zeros stands what outputs ``n`` have for input ``k``."""
    return tiled + (n // 64 * groups + tl.minimum(k // GROUP, groups - 1)) * 64 + n % 64


@triton.jit
def centred(w, zero, n, k, groups, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr):
    """``q - zero`` of one span of words ``[N, 8 * BITS]``: ``[N, 128]``, exact.

    Args:
        zero: tiles of zeros; of offsets, which :func:`scaled` adds, or None where weights are symmetric.
        n, k: the outputs, ``[N]``, and the first input.
        groups: of a row.
    """
    N: tl.constexpr = w.shape[0]
    OFFSET: tl.constexpr = offset_of(BITS, KIND)
    wide = fields_of(w, BITS, KIND)
    if zero is None or zero.dtype.element_ty == tl.float16:
        if OFFSET + 2 ** (BITS - 1) != 0:
            wide = (wide - (OFFSET + 2 ** (BITS - 1))).to(KIND)
    elif GROUP % 128 == 0:
        own = (tl.load(of_group(zero, n, k, groups, GROUP)).to(tl.float32) + OFFSET).to(KIND)
        wide = (wide - own[:, None]).to(KIND)
    else:
        at = k + GROUP * tl.arange(0, 128 // GROUP)
        own = tl.load(of_group(zero, n[:, None], at[None, :], groups, GROUP)).to(tl.float32)
        own = (own + OFFSET).to(KIND)
        parts = (tl.reshape(wide, (N, 128 // GROUP, GROUP)) - own[:, :, None]).to(KIND)
        wide = tl.reshape(parts, (N, 128))
    return wide


@triton.jit
def scaled(wide, scale, zero, n, k, groups, GROUP: tl.constexpr, KIND: tl.constexpr):
    """``wide[N, 128]``, one span of weights, by their scales, rounded to ``KIND``; plus offsets where ``zero`` holds
    such, of groups below a span.
    """
    N: tl.constexpr = wide.shape[0]
    if GROUP % 128 == 0:
        own = tl.load(of_group(scale, n, k, groups, GROUP)).to(KIND)
        wide = (wide * own[:, None]).to(KIND)
    else:
        at = k + GROUP * tl.arange(0, 128 // GROUP)
        own = tl.load(of_group(scale, n[:, None], at[None, :], groups, GROUP)).to(KIND)
        parts = (tl.reshape(wide, (N, 128 // GROUP, GROUP)) * own[:, :, None]).to(KIND)
        if zero is not None and zero.dtype.element_ty == tl.float16:
            own = tl.load(of_group(zero, n[:, None], at[None, :], groups, GROUP)).to(KIND)
            parts = (parts + own[:, :, None]).to(KIND)
        wide = tl.reshape(parts, (N, 128))
    return wide
