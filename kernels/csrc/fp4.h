// 4-bit floats (e2m1) in the registers that matrix instructions of a warp read, as bfloat16. See kernels/mx.py for how words
// lie: a field of a span's words is a block of 32 inputs.
#pragma once
#include "wgmma.h"

__device__ __forceinline__ float from_e4m3(int s) { return __int_as_float((s & 0x7f) << 20) * 0x1p120f; }

// Two neighbouring numbers, 2^-126 too small: field `pair` of two words, put into sign, exponent and mantissa.
__device__ __forceinline__ uint32_t bits_of(uint32_t words, int pair) {
  uint32_t sign = words << (12 - 4 * pair), rest = pair < 2 ? words << (6 - 4 * pair) : words >> (4 * pair - 6);
  return (sign & 0x80008000u) | (rest & 0x01c001c0u);
}

// What a block's scale is to its numbers, as two bfloat16 each: put into a bfloat16's exponent and mantissa, e2m1 is 2^-126
// too small. A scale above 2 would be beyond bfloat16 with that, and is a second factor, of 2^(s - 128).
struct Factor {
  uint32_t first[2], second[2];
  bool twice;

  // scales: of a thread's two rows.
  __device__ __forceinline__ Factor(uint32_t low, uint32_t high) {
    uint32_t s[2] = {low, high};
    UNROLL for (int r = 0; r < 2; ++r) {
      first[r] = (s[r] == 255 ? 0x7fc0u : (min((int)s[r], 128) + 126) << 7) * 0x10001u;
      second[r] = (uint32_t)(max((int)s[r], 128) - 1 << 7) * 0x10001u;
    }
    twice = __ballot_sync(~0u, low > 128 || high > 128) != 0;
  }
};

// The same of a span's four blocks where no scale needs a second factor, without a branch for each.
struct Factors {
  uint32_t of[4][2];
  bool plain;  // for all threads of a warp

  // scale: of a block and one of a thread's two rows.
  template <class Scale> __device__ __forceinline__ Factors(Scale scale) {
    uint32_t beyond = 0;  // in bit 15: a scale above 128
    UNROLL for (int block = 0; block < 4; ++block) {
      UNROLL for (int r = 0; r < 2; ++r) {
        uint32_t next = scale(block, r) * 0x00800080u + 0x3f803f80u;
        beyond |= next;
        of[block][r] = next - 0x00800080u;
      }
    }
    plain = __ballot_sync(~0u, (beyond & 0x8000u) != 0) == 0;
  }
};

// Two neighbouring numbers of a block: field `pair` of two words.
__device__ __forceinline__ uint32_t two_of(uint32_t words, int pair, const Factor& factor, int r) {
  uint32_t two = times2(bits_of(words, pair), factor.first[r]);
  return factor.twice ? times2(two, factor.second[r]) : two;
}

