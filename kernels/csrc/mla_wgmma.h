// What latents as keys and values at once need beyond wgmma.h: products whose first operand lies by columns, and 8 x 8
// blocks stored turned. The emulator has the same names.
#pragma once
#include "wgmma.h"
#ifndef EMULATED
// d[64 x N] += a[16 x 64]^T b[N x 16]^T of 16-bit elements: a with contiguous columns of 64.
#define TURNED(N, REGISTERS, NAMES, A, B, P, ...) \
  PRODUCT(wgmma_turned, N, REGISTERS, 16, ELEMENT "." ELEMENT, ", 1, 0", NAMES, A, B, P, __VA_ARGS__)
TURNED(8, 4, NAMES4, 4, 5, 6, OUT4(d, 0))
TURNED(16, 8, NAMES8, 8, 9, 10, OUT8(d, 0))
TURNED(32, 16, NAMES16, 16, 17, 18, OUT16(d, 0))
TURNED(64, 32, NAMES32, 32, 33, 34, OUT32(d, 0))

// A warp: two 8 x 8 blocks of 16-bit elements, as products leave pairs of columns, to rows that are their columns.
// Lanes 0 to 7 have the addresses of the first block's rows, 8 to 15 the second's.
__device__ __forceinline__ void store_turned(void* to, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
               ::"r"(smem_u32(to)), "r"(first), "r"(second) : "memory");
}
#endif  // EMULATED
