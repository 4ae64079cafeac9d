"""8-bit floats (e4m3, no infinity) in numpy, which has no type for them: bytes and their values."""

from __future__ import annotations

import numpy as np

LARGEST = 448.0
NAN = 0x7F


def to_float8(values: np.ndarray) -> np.ndarray:
    """The bytes of float32 ``values``: to the nearest, ties to even, saturated at 448; NaN stays NaN."""
    magnitude = np.minimum(np.abs(values), np.float32(LARGEST))
    # Normal numbers keep 3 of 23 bits of mantissa; the exponent's bias goes from 127 to 7.
    bits = magnitude.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - np.uint32((127 - 7) << 3)
    # Below 2**-6 the step is 2**-9. A product by 2**9 is exact, and rint takes ties to even.
    small = np.rint(magnitude * np.float32(2**9))
    with np.errstate(invalid="ignore"):
        code = np.where(magnitude < np.float32(2**-6), small.astype(np.uint32), normal)
    code = np.where(np.isnan(values), np.uint32(NAN), code)
    return (code | (np.signbit(values) * np.uint32(0x80))).astype(np.uint8)
