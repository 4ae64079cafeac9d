"""Counter-based noise: a pure function of a request's seed, a position and a token id.

No generator state exists, so a request draws the same tokens whatever batch, row, slot or step it runs
in. Two levels, both exact in wrapping unsigned arithmetic on any device:

1. once a row, a 64-bit key ``mix64(mix64(seed + G) + position * G)``: :func:`mix64` is the finaliser of
   SplitMix64 (Steele, Lea and Flood 2014) and G its odd increment, all modulo 2**64;
2. once a token, 32 bits ``fmix32(fmix32(id ^ low) ^ high)`` with the halves of the key: :func:`fmix32`
   is the finaliser of MurmurHash3 (Appleby 2011), modulo 2**32.
"""

from __future__ import annotations

import torch

_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd


def mix64(x: int) -> int:
    """SplitMix64's finaliser, a bijection of 64-bit integers."""
    x &= _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def fmix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser, in place: a bijection of 32-bit integers, held in int64 as 0 .. 2**32-1."""
    x ^= x >> 16
    # The int64 product wraps; its low 32 bits are those of the 32-bit product.
    x.mul_(0x85EBCA6B).bitwise_and_(_MASK32)
    x ^= x >> 13
    x.mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    x ^= x >> 16
    return x


def noise_key(seed: int, position: int) -> int:
    """64-bit key of one draw; ``seed`` is any signed 64-bit integer, ``position`` is not negative."""
    return mix64(mix64(seed + _GOLDEN) + position * _GOLDEN)


def noise_bits(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Uniform 32-bit integers for the tokens ``ids`` (int64[N]), as int64[N]."""
    key = noise_key(seed, position)
    return fmix32(fmix32(ids ^ (key & _MASK32)) ^ (key >> 32))


def exponential_noise(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Independent draws of the unit exponential for the tokens ``ids`` (int64[N]), as float32[N].

    ``v = min((float32(bits) + 0.5) * 2**-32, 1 - 2**-24)`` and ``-log1p(-v)``. Small values, which decide
    who wins, keep fp32's full relative precision down to 1.2e-10; large ones end at 16.6, so that no
    token's noise is infinite.
    """
    uniform = noise_bits(seed, position, ids).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()
