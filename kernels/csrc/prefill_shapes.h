// Sizes of prefill.cu, its places in shared memory, and what its warps tell each other.
#pragma once
#include "places.h"

// HEAD: head size. GROUP: query heads a KV head. PAGE: slots of a page. WINDOW: tokens that a token sees, 0: all.
// CACHE8: the cache holds e4m3; products then take float16 (FP16). BF16_IO: queries and results are bfloat16
// nevertheless. PDL: waits for the kernels before it on the device. LAZY, Q_REGISTERS, EARLY: see Way in
// attention/extend_cuda.py; LAZY is the power of two.
constexpr int D = HEAD, MATH = D == 64 ? 3 : 2;  // MATH: warpgroups that multiply
constexpr int RUN = 64, BOX = 8;                 // keys of a copy, and of one where a run has few
constexpr int M = 64 * MATH, TOKENS = M / GROUP, L = D == 256 ? 64 : 128, RUNS = L / RUN;
constexpr int THREADS = 128 * (1 + MATH);
constexpr int FEED_REGISTERS = MATH == 3 ? 32 : CACHE8 ? 56 : 40;
constexpr int MATH_REGISTERS = MATH == 3 ? 160 : CACHE8 ? 224 : 232;
constexpr bool TURNS = D <= 128;  // else 128 numbers of the result leave little to do between products
// Places in shared memory. Values have one more than keys where there is room: they are free again late.
constexpr int Q_STAGES = D == 256 ? 1 : 2, K_STAGES = 2, V_STAGES = CACHE8 ? 2 : 3, RAW_STAGES = D == 64 ? 4 : 2;
constexpr int Q_CHUNK = M * 128, KV_CHUNK = L * 128;  // 64 columns: the 128 bytes that a pattern of addresses has
constexpr int Q_BYTES = M * D * 2, KV_BYTES = L * D * 2, RAW_BYTES = CACHE8 ? L * D : 0;
constexpr int OFF_K = Q_STAGES * Q_BYTES, OFF_V = OFF_K + K_STAGES * KV_BYTES, OFF_RAW = OFF_V + V_STAGES * KV_BYTES;
constexpr int OFF_BARS = OFF_RAW + RAW_STAGES * RAW_BYTES, SHARED = OFF_BARS + 256 + 1024;  // 1024: aligned by hand
constexpr int FEED = CACHE8 ? 3 : 1;  // warps that say that keys or values are there
static_assert(FEED_REGISTERS + MATH * MATH_REGISTERS <= (1 + MATH) * (65536 / THREADS / 8 * 8), "warps wait for ever");
static_assert(D == 64 || D == 128 || D == 256, "head size");
static_assert(GROUP >= 1 && GROUP <= 16 && PAGE % RUN == 0 && WINDOW >= 0, "a run of keys lies in one page");
static_assert(SHARED <= 232448, "shared memory");

#include "prefill_items.h"

struct Bars {
  Places<Q_STAGES> q;
  Places<K_STAGES> k;
  Places<V_STAGES> v;
  Places<RAW_STAGES> raw;
  Item item[Q_STAGES];
};
static_assert(sizeof(Bars) <= 256, "shared memory");
