// The warps of prefill.cu that do not multiply: one finds items and copies their queries, keys and values; three
// write zeros, then widen what an 8-bit cache holds.
#pragma once
#include "prefill_shapes.h"
#define ROLLED _Pragma("unroll 1")  // these warps have few registers

// Slots at the beginning of the run of keys from `first` on that have no token of use: its last token is in the last.
__device__ __forceinline__ int empty_slots(const Item& item, int first) {
  if (WINDOW > 0 && first + RUN <= first_seen(item.position)) return RUN;
  return RUN - min(max(item.length - first, 0), RUN);
}

// Where the runs of one step lie. Of a run with empty slots boxes of BOX slots are copied, but those that are empty:
// the device is slow at making zeros of what a map does not have.
struct Runs { int page[RUNS], slot[RUNS], empty[RUNS]; };

__device__ __forceinline__ Runs find_runs(const Item& item, const int* pages, int key) {
  Runs at;
  UNROLL for (int run = 0; run < RUNS; ++run) {
    int first = key + run * RUN;
    at.empty[run] = empty_slots(item, first);
    at.page[run] = at.empty[run] < RUN ? pages[first / PAGE] : 0;
    at.slot[run] = first % PAGE - at.empty[run];
  }
  return at;
}

// One thread: a step's keys or values into `to`, in chunks of columns, or raw as the 8-bit cache has it.
__device__ __forceinline__ void copy_step(uint8_t* to, const TensorMap* map, const TensorMap* box_map, uint64_t* full,
                                          int head, const Runs& at) {
  constexpr int COPIES = CACHE8 ? 1 : D / 64, COLUMNS = D / COPIES, LINE = CACHE8 ? D : 128;  // LINE: bytes of a slot
  int slots = 0;
  UNROLL for (int run = 0; run < RUNS; ++run) slots += RUN - at.empty[run] / BOX * BOX;
  mbar_expect(full, slots * COPIES * LINE);
  UNROLL for (int run = 0; run < RUNS; ++run) {
    int first = at.empty[run] == 0 ? RUN : at.empty[run] / BOX * BOX;
    UNROLL for (int c = 0; c < COPIES; ++c) {
      uint8_t* part = to + c * L * LINE + run * RUN * LINE;
      if (at.empty[run] == 0) tma_4d(part, map, full, c * COLUMNS, head, at.slot[run], at.page[run]);
      ROLLED for (int slot = first; slot < RUN; slot += BOX) {
        tma_4d(part + slot * LINE, box_map, full, c * COLUMNS, head, at.slot[run] + slot, at.page[run]);
      }
    }
  }
}

// All lanes: zeros where nothing is copied to. Weights there are zero, which values must not make NaN.
__device__ __forceinline__ void clear_step(uint8_t* to, const Runs& at) {
  UNROLL for (int run = 0; run < RUNS; ++run) {
    ROLLED for (int u = threadIdx.x % 32; u < at.empty[run] / BOX * BOX * 8; u += 32) {
      uint8_t* here = to + run * RUN * 128 + u * 16;
      UNROLL for (int c = 0; c < D / 64; ++c) *(Int4*)(here + c * KV_CHUNK) = Int4{0, 0, 0, 0};
    }
  }
  fence_async_proxy();
  __syncwarp();
}

// A share of one step's keys or values from 8 bits to the 16 that products take; empty: as in Runs.
__device__ __forceinline__ void widen_step(uint8_t* to, const uint8_t* raw, const int (&empty)[RUNS], int worker,
                                           int workers) {
  constexpr int PIECES = D / 16;  // of 16 numbers, of a slot
#pragma unroll(MATH == 2 ? 4 : 1)  // as many loads on their way as there are registers for
  for (int c = worker; c < L * PIECES; c += workers) {
    int slot = c / PIECES, piece = c % PIECES;
    bool copied = slot % RUN >= (slot < RUN ? empty[0] : empty[RUNS - 1]) / BOX * BOX;
    Int4 x = copied ? *(const Int4*)(raw + c * 16) : Int4{0, 0, 0, 0};
    uint8_t* line = to + (piece / 4) * KV_CHUNK + slot * 128;
    int place = (piece % 4) * 32, turned = (slot & 7) << 4;
    *(Int4*)(line + (place ^ turned)) = widen8(x.x, x.y);
    *(Int4*)(line + ((place + 16) ^ turned)) = widen8(x.z, x.w);
  }
}

// Maps of keys, of values, and of both in boxes of BOX slots.
struct Maps { const TensorMap *q, *k, *v, *k_box, *v_box; };

// The first warp: items, and copies of their queries, keys and values.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const Maps& maps, const int* page_table,
                                     const int* query_start, const int* query_len, const int* context_len,
                                     int* counter, int rows, int kv_heads, int table_stride) {
  int lane = threadIdx.x % 32, number = 0;
  Sweep from{0, 0};
  Ring<Q_STAGES> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  Ring<RAW_STAGES> raw;
  auto copy = [&](auto is_value, auto& places, auto& ring, uint8_t* to, const Item& item, int i) {  // step i
    constexpr bool VALUE = decltype(is_value)::value;
    Runs at = find_runs(item, page_table + (int64_t)item.row * table_stride, (item.end - 1 - i) * L);
    const TensorMap *map = VALUE ? maps.v : maps.k, *box_map = VALUE ? maps.v_box : maps.k_box;
    if (CACHE8) {
      wait_free(bars.raw, raw, "feed: raw free");
      if (lane == 0) {
        copy_step(smem + OFF_RAW + raw.place() * RAW_BYTES, map, box_map, &bars.raw.full[raw.place()], item.head, at);
      }
      raw.next();
    } else {
      wait_free(places, ring, "feed: free");
      uint8_t* here = to + ring.place() * KV_BYTES;
      if (VALUE && at.empty[0] + at.empty[RUNS - 1] > 0) clear_step(here, at);
      if (lane == 0) copy_step(here, map, box_map, &places.full[ring.place()], item.head, at);
      ring.next();
    }
  };
  if (lane == 0) number = atomicAdd(counter, 1);
  for (;; q.next()) {
    number = __shfl_sync(~0u, number, 0);
    Item item = find_item(number, from, rows, kv_heads, query_start, query_len, context_len);
    // Before the queries, whose place may still be in use.
    if (item.steps > 0) copy(No{}, bars.k, k, smem + OFF_K, item, 0);
    wait_free(bars.q, q, "feed: q free");
    if (lane == 0) {
      bars.item[q.place()] = item;
      if (item.steps == 0) {
        if (number == from.base + (int)gridDim.x - 1) *counter = 0;  // all blocks have been here
        mbar_arrive(&bars.q.full[q.place()]);
      } else {
        mbar_expect(&bars.q.full[q.place()], TOKENS * GROUP * D * 2);
        UNROLL for (int c = 0; c < D / 64; ++c) {
          tma_3d(smem + q.place() * Q_BYTES + c * Q_CHUNK, maps.q, &bars.q.full[q.place()], c * 64,
                 item.head * GROUP, item.token);
        }
      }
    }
    if (item.steps == 0) break;
    for (int i = 1; i <= item.steps; ++i) {
      if (i < item.steps) copy(No{}, bars.k, k, smem + OFF_K, item, i);
      else if (lane == 0) number = atomicAdd(counter, 1);  // not sooner: another block may be done before this one
      copy(Yes{}, bars.v, v, smem + OFF_V, item, i - 1);
    }
  }
}

// Three warps: keys and values of an 8-bit cache in the order in which the first warp copies them.
__device__ __forceinline__ void widen(uint8_t* smem, Bars& bars, int worker) {
  int lane = threadIdx.x % 32;
  Ring<Q_STAGES> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  Ring<RAW_STAGES> raw;
  auto one = [&](auto& places, auto& ring, uint8_t* to, const Item& item, int i) {
    int empty[RUNS];
    UNROLL for (int run = 0; run < RUNS; ++run) empty[run] = empty_slots(item, (item.end - 1 - i) * L + run * RUN);
    wait_full(bars.raw, raw, "widen: raw full");
    wait_free(places, ring, "widen: free");
    widen_step(to + ring.place() * KV_BYTES, smem + OFF_RAW + raw.place() * RAW_BYTES, empty, worker * 32 + lane,
               32 * FEED);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      mbar_arrive(&places.full[ring.place()]);
      mbar_arrive(&bars.raw.free[raw.place()]);
    }
    ring.next();
    raw.next();
  };
  for (;; q.next()) {
    wait_full(bars.q, q, "widen: q full");
    Item item = bars.item[q.place()];
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.q.free[q.place()]);
    if (item.steps == 0) break;
    for (int i = 0; i <= item.steps; ++i) {
      if (i < item.steps) one(bars.k, k, smem + OFF_K, item, i);
      if (i > 0) one(bars.v, v, smem + OFF_V, item, i - 1);
    }
  }
}
