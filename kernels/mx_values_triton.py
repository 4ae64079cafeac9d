"""4-bit floats widened in registers (see kernels/mx.py): two numbers at once, by bits that are put into a float's.

Sign and the lower three bits of a number go where a float has its sign, the lowest two bits of its exponent and the
highest of its mantissa. That is the number times 2^-126 in bfloat16, 2^-14 in float16: zeros and halves are subnormal
there, and a product with the power of two makes all of them what they are. Scales of NVFP4 are widened so, too, two
outputs at once; numbers times such scales have 6 bits at most. All steps are exact; NVFP4's global scales are left to
the sums.

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


def _pair_assembly(kind: str, power: str, mask: str, up: int) -> str:
    """Of two pairs of e4m3: exponent and mantissa move ``up`` from where the lower byte has them."""
    lines = [".reg .b32 t, zero, power;", "mov.b32 zero, 0x80008000;", f"mov.b32 power, {power};"]
    for byte in range(2):
        move = up - 8 * byte
        lines.append(f"{'shl' if move > 0 else 'shr'}.b32 t, $2, {abs(move)};")
        lines.append(f"and.b32 t, t, {mask};")
        lines.append(f"fma.rn.{kind}x2 ${byte}, t, power, zero;")
    return "{\n" + "\n".join(lines) + "\n}"


_PAIR_TO_BF16 = tl.constexpr(_pair_assembly("bf16", "0x7b807b80", "0x07f007f0", 4))
_PAIR_TO_FP16 = tl.constexpr(_pair_assembly("f16", "0x5c005c00", "0x3f803f80", 7))


@triton.jit
def e4m3_of(s):
    """What scales of e4m3 stand for, of their bytes as int32, whose sign is not read: float32."""
    return ((s & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _pair(found, KIND: tl.constexpr):
    """What two scales of e4m3 in 16 bits stand for, ``[N]`` → ``[N, 2]``; signs are not read."""
    if not _ASSEMBLY:
        first = e4m3_of(found.to(tl.int32)).to(KIND)
        second = e4m3_of(found.to(tl.int32) >> 8).to(KIND)
    elif tl.float16 == KIND:
        first, second = tl.inline_asm_elementwise(
            _PAIR_TO_FP16, "=r,=r,r", [found], dtype=(tl.float16,) * 2, is_pure=True, pack=2
        )
    else:
        first, second = tl.inline_asm_elementwise(
            _PAIR_TO_BF16, "=r,=r,r", [found], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2
        )
    return tl.join(first, second)


@triton.jit
def _scaled(field, scale, n, block, blocks, KIND: tl.constexpr):
    """Numbers of a field ``[N, 32]`` times their scales; what fills a span up has the last field's."""
    N: tl.constexpr = field.shape[0]
    at = (n // 64 * blocks + tl.minimum(block, blocks - 1)) * 64 + n % 64
    found = tl.load(scale + at)
    if found.dtype == tl.uint8:
        wide = (field * power_of(found.to(tl.int32)).to(KIND)[:, None]).to(KIND)
    else:
        halves = tl.reshape(field, (N, 2, 16)) * _pair(found, KIND)[:, :, None]
        wide = tl.reshape(halves.to(KIND), (N, 32))
    return wide


@triton.jit
def mx_values(w, scale, n, k, blocks, KIND: tl.constexpr):
    """Weights of one span of words ``[N, 32]``: ``[N, 128]`` of ``KIND`` in the order of inputs.

    Args:
        scale: tiles of e8m0 in bytes, or of pairs of e4m3 in 16 bits.
        n, k: the outputs, ``[N]``, and the first input.
        blocks: fields of a row.
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
    a = _scaled(a, scale, n, first, blocks, KIND)
    b = _scaled(b, scale, n, first + 1, blocks, KIND)
    c = _scaled(c, scale, n, first + 2, blocks, KIND)
    d = _scaled(d, scale, n, first + 3, blocks, KIND)
    by_block = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(by_block, (N, 128))
