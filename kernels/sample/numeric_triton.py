"""Arithmetic that sampling shares on the device: an order on logits, gaps, masses and noise.

Everything but exp and log equals the reference bit for bit: divisions are IEEE's, and products whose sums
could be contracted are exact in the wider format they are formed in.
"""
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from makeready.kernels.sample.filters import MASS_UNIT

_MASS_UNIT = tl.constexpr(MASS_UNIT)
LOWEST = tl.constexpr(-(2**31))  # below the key of every logit
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def order_key(z):
    """int32 that orders as the fp32 ``z`` does; both zeros have the same."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    """The fp32 whose :func:`order_key` is ``key``."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(z, ids):
    """int64 that orders by ``z``, then by falling id: its maximum is the largest z of the lowest id."""
    return (order_key(z).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def packed_id(packed):
    """The id in a :func:`pack`."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def packed_key(packed):
    """The :func:`order_key` in a :func:`pack`."""
    return (packed >> 32).to(tl.int32)


@triton.jit
def gaps(z, largest, temperature):
    """``(z - largest) / temperature``, 0 where z is the largest; see :func:`~.filters.candidates`."""
    return tl.where(z == largest, 0.0, tl.div_rn(z - largest, temperature))


@triton.jit
def exp_gap(gap):
    """``exp`` of non-positive numbers to the last bit but one, 1 at 0; tl.exp loses 4 bits at -28."""
    x = tl.maximum(gap, -87.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    series = 1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040))))
    power = 1.0 + (r + r * r * (0.5 + r * series))
    return power * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def masses(gap):
    """``exp(gap)`` in integers of ``filters.MASS_UNIT``, truncated."""
    return (exp_gap(gap) * _MASS_UNIT).to(tl.int64)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _fmix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, position):
    """Key of one draw; see noise.py. ``seed`` is a loaded int64, ``position`` a loaded int32."""
    start = _mix64(seed.to(tl.uint64, bitcast=True) + _GOLDEN)
    return _mix64(start + position.to(tl.uint64) * _GOLDEN)


@triton.jit
def scores(gap, ids, key):
    """``gap - log(noise)`` of the tokens ``ids`` under the key of :func:`noise_key`."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = _fmix32(_fmix32(ids.to(tl.uint32) ^ low) ^ high)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # -log1p(-v) keeps its precision near 0 as 2 atanh(v / (2 - v)); from 1/2 on the logarithm does.
    s = v / (2.0 - v)
    ss = s * s
    tail = 1 / 9 + ss * (1 / 11 + ss * (1 / 13 + ss * (1 / 15)))
    small = 2.0 * s + 2.0 * s * ss * (1 / 3 + ss * (1 / 5 + ss * (1 / 7 + ss * tail)))
    noise = tl.where(v < 0.5, small, -tl.log(1.0 - v))
    return gap - tl.log(noise)
