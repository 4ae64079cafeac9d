// The warps of prefill.cu that do not multiply: one finds items and copies their queries, keys and values; three write
// zeros, then widen what an 8-bit cache holds.
#pragma once
#include "prefill_shapes.h"

// Where the search for the next item goes on: rows from `row` on, whose first tile is item `base`.
struct Sweep { int row, base; };

// All lanes: the item at `place`, which is beyond those found before. Without one, `base` is how many there are.
__device__ __forceinline__ Item find_item(int place, Sweep& from, int rows, int kv_heads, const int* query_start,
                                          const int* query_len, const int* context_len) {
  int lane = threadIdx.x % 32;
  Item item{};
  for (; from.row < rows; from.row += 32) {
    int r = from.row + lane, len = r < rows ? query_len[r] : 0;
    int mine = ceil_div(len, TOKENS) * kv_heads, end = mine;
    UNROLL for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    uint32_t hit = __ballot_sync(~0u, from.base + end > place);
    if (hit) {
      int l = __ffs(hit) - 1, row = from.row + l;
      int start = from.base + __shfl_sync(~0u, end - mine, l), n = __shfl_sync(~0u, len, l);
      int local = place - start;
      int tile = ceil_div(n, TOKENS) - 1 - local / kv_heads;  // the last tiles see most keys
      item.length = context_len[row];
      item.row = row;
      item.head = local % kv_heads;
      item.token = query_start[row] + tile * TOKENS;
      item.count = min(TOKENS, n - tile * TOKENS);
      item.position = item.length - n + tile * TOKENS;
      item.end = ceil_div(item.position + item.count, L);
      item.steps = item.end - first_seen(item.position) / L;
      break;
    }
    from.base += __shfl_sync(~0u, end, 31);
  }
  return item;
}

// A warp's share of the tokens of no row: zeros.
__device__ __forceinline__ void clear_idle(uint16_t* y, const int* query_start, const int* query_len, int rows,
                                           int tokens, int y_stride, int width, int worker, int workers) {
  int lane = threadIdx.x % 32, total = 0;
  for (int r = lane; r < rows; r += 32) total += query_len[r];
  UNROLL for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
  if (total >= tokens) return;
  for (int token = worker; token < tokens; token += workers) {
    bool owned = false;
    for (int r0 = 0; r0 < rows && !owned; r0 += 32) {
      int r = r0 + lane, after = r < rows ? token - query_start[r] : -1;
      owned = __ballot_sync(~0u, after >= 0 && after < query_len[r < rows ? r : 0]) != 0;
    }
    if (owned) continue;
    for (int c = lane * 8; c < width; c += 256) *(Int4*)(y + (int64_t)token * y_stride + c) = Int4{0, 0, 0, 0};
  }
}

// Where the runs of one step lie, and their copy into `to`: in chunks of columns, or raw as the 8-bit cache has it.
struct Runs { int page[RUNS], slot[RUNS]; };

__device__ __forceinline__ Runs find_runs(const Item& item, const int* pages, int key) {
  Runs at;
  UNROLL for (int run = 0; run < RUNS; ++run) {
    int first = key + run * RUN, valid = min(item.length - first, RUN);
    if (WINDOW > 0 && first + RUN <= first_seen(item.position)) valid = 0;
    at.page[run] = valid > 0 ? pages[first / PAGE] : 0;
    at.slot[run] = valid > 0 ? first % PAGE + valid - RUN : PAGE;  // beyond the page: zeros
  }
  return at;
}

__device__ __forceinline__ void copy_step(uint8_t* to, const TensorMap* map, uint64_t* full, int head,
                                          const Runs& at) {
  mbar_expect(full, CACHE8 ? RAW_BYTES : KV_BYTES);
  UNROLL for (int run = 0; run < RUNS; ++run) {
    if (CACHE8) {
      tma_4d(to + run * RUN * D, map, full, 0, head, at.slot[run], at.page[run]);
    } else {
      UNROLL for (int c = 0; c < D / 64; ++c) {
        tma_4d(to + c * KV_CHUNK + run * (RUN * 128), map, full, c * 64, head, at.slot[run], at.page[run]);
      }
    }
  }
}

// A share of one step's keys or values from 8 bits to the 16 that products take.
__device__ __forceinline__ void widen_step(uint8_t* to, const uint8_t* raw, int worker, int workers) {
  constexpr int PIECES = D / 16;  // of 16 numbers, of a slot
  for (int c = worker; c < L * PIECES; c += workers) {
    Int4 x = *(const Int4*)(raw + c * 16);
    int slot = c / PIECES, piece = c % PIECES;
    uint8_t* line = to + (piece / 4) * KV_CHUNK + slot * 128;
    int place = (piece % 4) * 32, turned = (slot & 7) << 4;
    *(Int4*)(line + (place ^ turned)) = widen8(x.x, x.y);
    *(Int4*)(line + ((place + 16) ^ turned)) = widen8(x.z, x.w);
  }
}

// The first warp: items, and copies of their queries, keys and values.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const TensorMap* q_map, const TensorMap* k_map,
                                     const TensorMap* v_map, const int* page_table, const int* query_start,
                                     const int* query_len, const int* context_len, int* counter, int rows,
                                     int kv_heads, int table_stride) {
  int lane = threadIdx.x % 32, number = 0;
  Sweep from{0, 0};
  Ring<Q_STAGES> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  Ring<RAW_STAGES> raw;
  auto copy = [&](const TensorMap* map, auto& places, auto& ring, uint8_t* to, int head, const Runs& at) {
    if (CACHE8) {
      wait_free(bars.raw, raw, "feed: raw free");
      copy_step(smem + OFF_RAW + raw.place() * RAW_BYTES, map, &bars.raw.full[raw.place()], head, at);
      raw.next();
    } else {
      wait_free(places, ring, "feed: free");
      copy_step(to + ring.place() * KV_BYTES, map, &places.full[ring.place()], head, at);
      ring.next();
    }
  };
  if (lane == 0) number = atomicAdd(counter, 1);
  for (;;) {
    number = __shfl_sync(~0u, number, 0);
    Item item = find_item(number, from, rows, kv_heads, query_start, query_len, context_len);
    if (lane == 0) {
      const int* pages = page_table + (int64_t)item.row * table_stride;
      Runs now, before{};  // of this step's keys, and of the previous step's, whose values are still to come
      auto keys = [&](int i) {
        now = find_runs(item, pages, (item.end - 1 - i) * L);
        copy(k_map, bars.k, k, smem + OFF_K, item.head, now);
      };
      if (item.steps > 0) keys(0);  // before the queries, whose place may still be in use
      wait_free(bars.q, q, "feed: q free");
      bars.item[q.place()] = item;
      if (item.steps == 0) {
        if (number == from.base + (int)gridDim.x - 1) *counter = 0;  // all blocks have been here
        mbar_arrive(&bars.q.full[q.place()]);
      } else {
        mbar_expect(&bars.q.full[q.place()], TOKENS * GROUP * D * 2);
        UNROLL for (int c = 0; c < D / 64; ++c) {
          tma_3d(smem + q.place() * Q_BYTES + c * Q_CHUNK, q_map, &bars.q.full[q.place()], c * 64, item.head * GROUP,
                 item.token);
        }
        for (int i = 1; i <= item.steps; ++i) {
          before = now;
          if (i < item.steps) keys(i);
          else number = atomicAdd(counter, 1);  // not sooner: another block may be done before this one
          copy(v_map, bars.v, v, smem + OFF_V, item.head, before);
        }
      }
      q.next();
    }
    __syncwarp();
    if (item.steps == 0) break;
  }
}

// Three warps: keys and values of an 8-bit cache in the order in which the first warp copies them.
__device__ __forceinline__ void widen(uint8_t* smem, Bars& bars, int worker) {
  int lane = threadIdx.x % 32;
  Ring<Q_STAGES> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  Ring<RAW_STAGES> raw;
  auto one = [&](auto& places, auto& ring, uint8_t* to) {
    wait_full(bars.raw, raw, "widen: raw full");
    wait_free(places, ring, "widen: free");
    widen_step(to + ring.place() * KV_BYTES, smem + OFF_RAW + raw.place() * RAW_BYTES, worker * 32 + lane, 32 * FEED);
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
    int steps = bars.item[q.place()].steps;
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.q.free[q.place()]);
    if (steps == 0) break;
    for (int i = 0; i <= steps; ++i) {
      if (i < steps) one(bars.k, k, smem + OFF_K);
      if (i > 0) one(bars.v, v, smem + OFF_V);
    }
  }
}
