// From scores of 64 query vectors with L keys to weights, of which a thread has two vectors' and every fourth pair of
// keys, as matrix products leave them. LAZY: see Way in attention/extend_cuda.py; the power of two.
#pragma once
#include "hopper.h"

// Running maxima of scores (unscaled). base: what exponents are taken from; shrink: of what came before.
template <bool MASKED>
__device__ __forceinline__ void maxima(const float (&s)[L / 2], float (&top)[2], float (&base)[2], float (&shrink)[2],
                                       float scale) {
  float m[2] = {top[0], top[1]};
  UNROLL for (int i = 0; i < L / 8; ++i) {
    UNROLL for (int h = 0; h < 2; ++h) m[h] = fmaxf(m[h], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
  }
  UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
    UNROLL for (int h = 0; h < 2; ++h) m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], lanes));
  }
  UNROLL for (int h = 0; h < 2; ++h) {
#if LAZY
    m[h] = (m[h] - top[h]) * scale > LAZY ? m[h] : top[h];
#endif
    base[h] = m[h] * scale;
    if (MASKED) base[h] = m[h] == -INFINITY ? 0.f : base[h];  // nothing seen yet
    shrink[h] = exp2_fast(top[h] * scale - base[h]);
    top[h] = m[h];
  }
}

// Weights exp2(scale * s - base) in place of scores, and their running sums.
__device__ __forceinline__ void exponentials(float (&s)[L / 2], const float (&base)[2], float (&sum)[2],
                                             const float (&shrink)[2], float scale) {
  UNROLL for (int h = 0; h < 2; ++h) {
    float t = 0.f;
    UNROLL for (int i = 0; i < L / 8; ++i) {
      UNROLL for (int j = 0; j < 2; ++j) {
        float& x = s[4 * i + 2 * h + j];
        x = exp2_fast(x * scale - base[h]);
        t += x;
      }
    }
    sum[h] = sum[h] * shrink[h] + t;
  }
}

__device__ __forceinline__ void pack(uint32_t (&p)[L / 16][4], const float (&s)[L / 2]) {
  UNROLL for (int k = 0; k < L / 16; ++k) {
    UNROLL for (int j = 0; j < 4; ++j) p[k][j] = pack2(s[8 * k + 2 * j], s[8 * k + 2 * j + 1]);
  }
}
