// Matrix products of attention: d[64 x N] = a[64 x 16] b, plus d where `accumulate`. wgmma_ss: a and b[N x 16]^T in
// shared memory, columns contiguous. wgmma_rs: a in registers, b[16 x N] with contiguous rows where ROWS, else as
// before. The emulator has the same names.
#pragma once
#include "hopper.h"
#ifndef EMULATED
#define SUMS32(d) OUT16(d, 0), OUT16(d, 16)
#define SUMS64(d) OUT64(d)
#define SUMS128(d) OUT64(d), OUT16(d, 64), OUT16(d, 80), OUT16(d, 96), OUT16(d, 112)
#define SUM_NAMES32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SUM_NAMES64 NAMES64
#define SUM_NAMES128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
  "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// COUNT: numbers of d a thread has; X0 to X6: the operands behind them.
#define WGMMA(N, COUNT, X0, X1, X2, X3, X4, X5, X6)                                                                  \
  __device__ __forceinline__ void wgmma_ss(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " X2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                 \
                 "k16.f32." ELEMENT "." ELEMENT " " SUM_NAMES##COUNT ", " X0 ", " X1 ", p, 1, 1, 0, 0;\n}\n"         \
                 : SUMS##COUNT(d) : "l"(a), "l"(b), "r"(accumulate));                                                \
  }                                                                                                                  \
  template <int ROWS> __device__ __forceinline__ void wgmma_rs(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b,\
                                                               int accumulate) {                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " X5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                 \
                 "k16.f32." ELEMENT "." ELEMENT " " SUM_NAMES##COUNT ", {" X0 ", " X1 ", " X2 ", " X3 "}, " X4       \
                 ", p, 1, 1, " X6 ";\n}\n"                                                                           \
                 : SUMS##COUNT(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(ROWS)); \
  }
WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef WGMMA
#endif  // EMULATED
