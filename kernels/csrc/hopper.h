// Instructions of compute capability 9.0a as inline PTX; with -DEMULATED the same names run on the CPU
// (tests/emulator/emulator.h). FP16: 16-bit elements are float16, else bfloat16.
#pragma once
#ifndef FP16
#define FP16 0
#endif
#ifdef EMULATED
#include "emulator.h"
#else
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

struct alignas(64) TensorMap { unsigned long long opaque[16]; };  // what cuTensorMapEncodeTiled writes
static_assert(sizeof(TensorMap) == 128, "CUtensorMap");
struct alignas(16) Int4 { int x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };
struct alignas(8) Two { uint32_t x, y; };

#define INFINITY __int_as_float(0x7f800000)
#define GRID_CONSTANT const __grid_constant__
#define UNROLL _Pragma("unroll")
// What the planner reads out of the machine code: threads of a block, bytes of dynamic shared memory, blocks of a
// cluster.
#define LAUNCH_FACTS(threads, shared, cluster) extern "C" __device__ int launch_facts[3] = {threads, shared, cluster}

#ifndef GIVE_UP
#define GIVE_UP 0  // > 0: a wait gives up after so many polls: wrong numbers instead of a hang, for debugging alone
#endif

__device__ __forceinline__ uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ uint8_t* smem_base() {  // at a multiple of 1,024
  extern __shared__ uint8_t raw[];
  return raw + ((1024u - (smem_u32(raw) & 1023u)) & 1023u);
}

// -- mbarriers

__device__ __forceinline__ void mbar_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbar_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbar_expect(uint64_t* bar, uint32_t bytes) {  // arrives, too
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");
}
__device__ __forceinline__ bool mbar_try(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done) : "r"(smem_u32(bar)), "r"(parity) : "memory");
  return done != 0;
}
// `where`: for the emulator's reports.
__device__ __forceinline__ void mbar_wait(uint64_t* bar, uint32_t parity, const char* where) {
#if GIVE_UP > 0
  for (int i = 0; i < GIVE_UP && !mbar_try(bar, parity); ++i) {
  }
#else
  while (!mbar_try(bar, parity)) {
  }
#endif
}

// -- clusters: blocks of one launch that see each other's shared memory

__device__ __forceinline__ int cluster_rank() {  // of this block in its cluster
  int r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_sync() {  // of all threads of all its blocks
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ uint32_t of_rank(const void* p, int rank) {  // where the block of a rank has what this one has at p
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(smem_u32(p)), "r"(rank));
  return r;
}
__device__ __forceinline__ Float4 load_of_rank(const float* p, int rank) {
  Float4 r;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "r"(of_rank(p, rank)) : "memory");
  return r;
}
__device__ __forceinline__ void mbar_arrive_at(uint64_t* bar, int rank) {  // what this block did is seen by who waits there
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(of_rank(bar, rank)) : "memory");
}
__device__ __forceinline__ bool mbar_try_cluster(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done) : "r"(smem_u32(bar)), "r"(parity) : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbar_wait_cluster(uint64_t* bar, uint32_t parity, const char* where) {
#if GIVE_UP > 0
  for (int i = 0; i < GIVE_UP && !mbar_try_cluster(bar, parity); ++i) {
  }
#else
  while (!mbar_try_cluster(bar, parity)) {
  }
#endif
}

// -- copies

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_2d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_3d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_4d(void* dst, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// 16 bytes, without a map. Matrix products see them behind a fence_async_proxy.
__device__ __forceinline__ void copy_16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_u32(dst)), "l"(src) : "memory");
}
// Arrives when all copy_16 of this thread are there; one of the barrier's arrivals.
__device__ __forceinline__ void mbar_arrive_after_copies(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory");
}
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint64_t* bar, uint32_t bytes) {  // a multiple of 16
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_u32(dst)), "l"(src), "r"(bytes), "r"(smem_u32(bar)) : "memory");
}
// What a kernel before this one wrote. L1 may hold what was there before it, since this block may be older.
__device__ __forceinline__ Int4 load_written(const void* p) {
  Int4 r;
  asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ uint32_t load_written_two(const uint16_t* p) {
  uint32_t r;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ float load_written_one(const float* p) {
  float r;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ Int4 load_kept(const void* p) {  // what steps before this one wrote; used once
  Int4 r;
  asm volatile("ld.global.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ Int4 load_constant(const void* p) {  // what no kernel writes
  Int4 r;
  asm volatile("ld.global.nc.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}

// -- order

__device__ __forceinline__ void dependents_go() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void dependence_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N> __device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// -- matrix products

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void keep(float (&x)[N]) {  // no copies of x across this point
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void keep(int (&x)[N]) {
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
// x, of which nothing is computed ahead of a loop around this: that would hold registers through the loop.
__device__ __forceinline__ int from_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

#if FP16
#define ELEMENT "f16"
#else
#define ELEMENT "bf16"
#endif
#define OUT4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT16(d, i) OUT4(d, i), OUT4(d, i + 4), OUT4(d, i + 8), OUT4(d, i + 12)
#define OUT64(d) OUT16(d, 0), OUT16(d, 16), OUT16(d, 32), OUT16(d, 48)
#define NAMES64                                                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "    \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "     \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "     \
  "%62, %63}"

// -- numbers

__device__ __forceinline__ uint32_t pack2(float low, float high) {  // two 16-bit elements
  uint32_t r;
  asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void unpack2(uint32_t two, float (&x)[2]) {
#if FP16
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n" : "=f"(x[0]), "=f"(x[1]) : "r"(two));
#else
  x[0] = __int_as_float((int)(two << 16));
  x[1] = __int_as_float((int)(two & 0xffff0000));
#endif
}
// Two 8-bit floats e4m3 from two numbers, saturated, and as numbers; the first in the lower bits.
__device__ __forceinline__ uint32_t pack_fp8(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void widen_fp8(float* to, uint32_t two) {
  asm("{\n.reg .b32 h;\n.reg .b16 a, b;\ncvt.rn.f16x2.e4m3x2 h, %2;\nmov.b32 {a, b}, h;\ncvt.f32.f16 %0, a;\n"
      "cvt.f32.f16 %1, b;\n}\n" : "=f"(to[0]), "=f"(to[1]) : "h"((uint16_t)two));
}
#if FP16
__device__ __forceinline__ float low2(uint32_t two) {  // the first of two 16-bit elements
  float r;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;\n}\n" : "=f"(r) : "r"(two));
  return r;
}
__device__ __forceinline__ float high2(uint32_t two) { return low2(two >> 16); }
#else
__device__ __forceinline__ float low2(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high2(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }
#endif
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ uint32_t half2_of_e4m3(uint16_t x) {  // two e4m3 numbers as float16, which holds them all
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(x));
  return r;
}
__device__ __forceinline__ uint32_t half2_of_bf16(uint32_t x) {  // to nearest; numbers beyond 65504 saturate
  uint32_t r;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
      : "=r"(r) : "f"(__uint_as_float(x & 0xffff0000u)), "f"(__uint_as_float(x << 16)));
  return r;
}
__device__ __forceinline__ uint32_t minus2(uint32_t a, uint32_t b) {  // of two 16-bit elements each
  uint32_t r;
  asm("sub.rn." ELEMENT "x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t times2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn." ELEMENT "x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t times_plus2(uint32_t a, uint32_t b, uint32_t c) {  // a * b + c, rounded once
  uint32_t r;
  asm("fma.rn." ELEMENT "x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ float half_as_float(uint16_t x) {  // of a float16
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
__device__ __forceinline__ float exp2_fast(float x) {  // volatile: stays before the wait that follows
  float r;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
#endif  // EMULATED

// Descriptor of an operand in shared memory with the 128-byte swizzle; offsets in bytes.
__device__ __forceinline__ uint64_t operand_128b(uint32_t leading, uint32_t stride) {
  return (1ull << 62) | ((uint64_t)(stride >> 4) << 32) | ((uint64_t)(leading >> 4) << 16);
}
__device__ __forceinline__ uint64_t at(uint64_t descriptor, uint32_t bytes) {  // moved by so many, below 256 KiB
  return (descriptor & 0xffffffff00000000ull) | ((uint32_t)descriptor + (bytes >> 4));
}
__device__ __forceinline__ Int4 widen8(uint32_t low, uint32_t high) {  // eight e4m3 numbers as float16
  return Int4{(int)half2_of_e4m3(low & 0xffff), (int)half2_of_e4m3(low >> 16), (int)half2_of_e4m3(high & 0xffff),
              (int)half2_of_e4m3(high >> 16)};
}
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
