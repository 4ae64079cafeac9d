"""MXFP4 widened in registers (see kernels/mx.py): two numbers at once, by bits that are put into a float's.

Sign and the lower three bits of a number go where a float has its sign, the lowest two bits of its exponent and the
highest of its mantissa. That is the number times 2^-126 in bfloat16, 2^-14 in float16: zeros and halves are subnormal
there, and a product with the power of two makes all of them what they are. All steps are exact.

# N outputs
"""
# pyright: reportIndexIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

_ASSEMBLY = tl.constexpr(not knobs.runtime.interpret)  # which the interpreter does not know


def _assembly(kind: str, power: str, mask: str, down: int) -> str:
    """Of four fields: a field's three lower bits move ``down`` from where the highest field has them."""
    lines = [".reg .b32 s, m, zero, power;", "mov.b32 zero, 0x80008000;", f"mov.b32 power, {power};"]
    for field in range(4):
        sign, rest = 12 - 4 * field, 12 - 4 * field - down
        lines.append(f"shl.b32 s, $4, {sign};")
        lines.append("and.b32 s, s, 0x80008000;")
        lines.append(f"{'shl' if rest > 0 else 'shr'}.b32 m, $4, {abs(rest)};")
        lines.append(f"lop3.b32 m, m, {mask}, s, 0xea;")
        lines.append(f"fma.rn.{kind}x2 ${field}, m, power, zero;")  # zero is negative: signs of zeros stay
    return "{\n" + "\n".join(lines) + "\n}"


_TO_BF16 = tl.constexpr(_assembly("bf16", "0x7e807e80", "0x01c001c0", 6))
_TO_FP16 = tl.constexpr(_assembly("f16", "0x74007400", "0x0e000e00", 3))


@triton.jit
def _number(w, field: tl.constexpr, KIND: tl.constexpr):
    q = (w.to(tl.int32) >> (4 * field)) & 15
    exponent = (q >> 1) & 3
    half = (q & 1).to(tl.float32) * 0.5
    size = tl.where(exponent == 0, half, (1.0 + half) * tl.exp2(exponent.to(tl.float32) - 1.0))
    return tl.where(q >= 8, -size, size).to(KIND)


@triton.jit
def power_of(s):
    """What scales stand for, of their bytes as int32: float32."""
    bits = tl.where(s == 0, 0x00400000, tl.where(s == 255, 0x7FC00000, s << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power(scale, n, block, blocks, KIND: tl.constexpr):
    """Scales of a block of outputs ``n``, ``[N, 1]``; what fills a span up has the last block's."""
    at = (n // 64 * blocks + tl.minimum(block, blocks - 1)) * 64 + n % 64
    return power_of(tl.load(scale + at).to(tl.int32)).to(KIND)[:, None]


@triton.jit
def mx_values(w, scale, n, k, blocks, KIND: tl.constexpr):
    """Weights of one span of words ``[N, 32]``: ``[N, 128]`` of ``KIND`` in the order of inputs.

    Args:
        scale: tiles of e8m0.
        n, k: the outputs, ``[N]``, and the first input.
        blocks: of a row.
    """
    N: tl.constexpr = w.shape[0]
    if not _ASSEMBLY:
        a = _number(w, 0, KIND)
        b = _number(w, 1, KIND)
        c = _number(w, 2, KIND)
        d = _number(w, 3, KIND)
    elif tl.float16 == KIND:
        a, b, c, d = tl.inline_asm_elementwise(
            _TO_FP16, "=r,=r,=r,=r,r", [w], dtype=(tl.float16,) * 4, is_pure=True, pack=2
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    first = k // 32
    a = (a * _power(scale, n, first, blocks, KIND)).to(KIND)
    b = (b * _power(scale, n, first + 1, blocks, KIND)).to(KIND)
    c = (c * _power(scale, n, first + 2, blocks, KIND)).to(KIND)
    d = (d * _power(scale, n, first + 3, blocks, KIND)).to(KIND)
    by_block = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(by_block, (N, 128))
