// Matrix products of the shapes that products with experts' weights use: d[64 x N] = a[64 x 16 or 32] b[N x 16 or 32]^T,
// plus d where `accumulate`; operands in shared memory with columns contiguous, N by the size of d. 16-bit elements
// (float16 where FP16, else bfloat16), e4m3, and int8 with sums of int32. The emulator has the same names.
#pragma once
#include "hopper.h"
#ifndef EMULATED
#define OUT8(d, i) OUT4(d, i), OUT4(d, i + 4)
#define OUT32(d, i) OUT16(d, i), OUT16(d, i + 16)
#define NAMES4 "{%0, %1, %2, %3}"
#define NAMES8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define NAMES16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define NAMES32                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "    \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define NAMES128                                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "    \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "     \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "     \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "     \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "   \
  "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "   \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127}"

// SUM: of sums. TYPES of operands and TAIL: as the instruction has them.
#define PRODUCT_OF(NAME, SUM, N, REGISTERS, K, TYPES, TAIL, NAMES, A, B, P, ...)                             \
  __device__ __forceinline__ void NAME(SUM (&d)[REGISTERS], uint64_t a, uint64_t b, int accumulate) {        \
    asm volatile(                                                                                            \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                                     \
        "wgmma.mma_async.sync.aligned.m64n" #N "k" #K TYPES " " NAMES ", %" #A ", %" #B ", p" TAIL ";\n}\n"   \
        : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate));                                                    \
  }
#define PRODUCT(NAME, N, REGISTERS, K, TYPES, TAIL, ...) PRODUCT_OF(NAME, float, N, REGISTERS, K, ".f32." TYPES, ", 1, 1" TAIL, __VA_ARGS__)
#define PRODUCTS(N, REGISTERS, NAMES, A, B, P, ...)                                                          \
  PRODUCT(wgmma_ss_16bit, N, REGISTERS, 16, ELEMENT "." ELEMENT, ", 0, 0", NAMES, A, B, P, __VA_ARGS__)      \
  PRODUCT(wgmma_ss_e4m3, N, REGISTERS, 32, "e4m3.e4m3", "", NAMES, A, B, P, __VA_ARGS__)
PRODUCTS(8, 4, NAMES4, 4, 5, 6, OUT4(d, 0))
PRODUCTS(16, 8, NAMES8, 8, 9, 10, OUT8(d, 0))
PRODUCTS(32, 16, NAMES16, 16, 17, 18, OUT16(d, 0))
PRODUCTS(64, 32, NAMES32, 32, 33, 34, OUT32(d, 0))
PRODUCTS(128, 64, NAMES64, 64, 65, 66, OUT32(d, 0), OUT32(d, 32))
PRODUCTS(256, 128, NAMES128, 128, 129, 130, OUT32(d, 0), OUT32(d, 32), OUT32(d, 64), OUT32(d, 96))

#define SUMS4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SUMS8(d, i) SUMS4(d, i), SUMS4(d, i + 4)
#define SUMS16(d, i) SUMS8(d, i), SUMS8(d, i + 8)
#define SUMS32(d, i) SUMS16(d, i), SUMS16(d, i + 16)
#define INTEGERS(N, REGISTERS, NAMES, A, B, P, ...) PRODUCT_OF(wgmma_ss_s8, int, N, REGISTERS, 32, ".s32.s8.s8", "", NAMES, A, B, P, __VA_ARGS__)
INTEGERS(8, 4, NAMES4, 4, 5, 6, SUMS4(d, 0))
INTEGERS(16, 8, NAMES8, 8, 9, 10, SUMS8(d, 0))
INTEGERS(32, 16, NAMES16, 16, 17, 18, SUMS16(d, 0))
INTEGERS(64, 32, NAMES32, 32, 33, 34, SUMS32(d, 0))
INTEGERS(128, 64, NAMES64, 64, 65, 66, SUMS32(d, 0), SUMS32(d, 32))
INTEGERS(256, 128, NAMES128, 128, 129, 130, SUMS32(d, 0), SUMS32(d, 32), SUMS32(d, 64), SUMS32(d, 96))

// Of a warp: d[16 x 8] += a[16 x 16] b[16 x 8] of 16-bit elements, the fragments as PTX has them for mma.m16n8k16.
__device__ __forceinline__ void mma_16x8x16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four blocks of 8 rows of 16 bytes: lane l has where row l % 8 of block l / 8 is, and gets two elements of row l / 4 of each.
__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_u32(row)) : "memory");
}
__device__ __forceinline__ uint32_t keep_field(uint32_t words, uint32_t lift) {  // the lowest 4 bits of each half, on top of lift
  uint32_t r;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xea;" : "=r"(r) : "r"(words), "r"(lift));
  return r;
}
#endif  // EMULATED
