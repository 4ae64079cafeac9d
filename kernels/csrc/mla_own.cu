// Causal attention of each row's tokens over those of the same step, with keys and values of every head, for Hopper:
// latent attention of prompts. The schedule is that of prefill.cu, with steps of 128 keys for 128 tokens of a head.
//
// A head's key is 128 columns of kv and 64 of the latents, which all heads share; its values are 128 more columns of
// kv. Nothing is paged. A run of 64 keys that ends beyond its row brings tokens of others, whose scores do not count;
// values, which zero weights must not make NaN, are written by the first warp there, and zeros behind the row.
#include "places.h"

constexpr int D = 128, NOPE = 128, KEY = NOPE + 64;  // features of values, and of keys: without and with rotated ones
constexpr int RANK = 512;                            // those of a latent before its rotated ones
constexpr int M = 128, TOKENS = M, L = 128, RUN = 64, RUNS = L / RUN, WINDOW = 0;
constexpr int THREADS = 384, FEED_REGISTERS = 40, MATH_REGISTERS = 232;
constexpr int K_STAGES = 2, V_STAGES = 2;  // of queries there is room for one
constexpr int CHUNK = 128 * 128;           // 64 columns of a tile, and of a step
constexpr int Q_BYTES = M * KEY * 2, K_BYTES = L * KEY * 2, V_BYTES = L * D * 2;
constexpr int OFF_K = Q_BYTES, OFF_V = OFF_K + K_STAGES * K_BYTES, OFF_BARS = OFF_V + V_STAGES * V_BYTES;
constexpr int SHARED = OFF_BARS + 256 + 1024;  // 1024: aligned by hand
static_assert(FEED_REGISTERS + 2 * MATH_REGISTERS <= 3 * (65536 / THREADS / 8 * 8), "warps wait for ever");
static_assert(SHARED <= 232448, "shared memory");
LAUNCH_FACTS(THREADS, SHARED, 1);

#include "prefill_items.h"
#include "prefill_softmax.h"
#include "prefill_wgmma.h"

struct Bars {
  Places<1> q;
  Places<K_STAGES> k;
  Places<V_STAGES> v;
  Item item;
};
static_assert(sizeof(Bars) <= 256, "shared memory");
struct Maps { const TensorMap *q, *kv, *rope; };

// One thread: a step's keys, of runs that have any.
__device__ __forceinline__ void copy_keys(uint8_t* to, const Maps& maps, uint64_t* full, const Item& item, int key) {
  int first = item.token - item.position + key, runs = min(ceil_div(item.length - key, RUN), RUNS);
  mbar_expect(full, runs * RUN * KEY * 2);
  for (int run = 0; run < runs; ++run, first += RUN) {
    uint8_t* here = to + run * (RUN * 128);
    UNROLL for (int c = 0; c < 2; ++c) tma_3d(here + c * CHUNK, maps.kv, full, c * 64, item.head, first);
    tma_2d(here + 2 * CHUNK, maps.rope, full, RANK, first);
  }
}

// All lanes: a step's values; kv: of the head's first token.
__device__ __forceinline__ void copy_values(uint8_t* to, const Maps& maps, uint64_t* full, const Item& item, int key,
                                            const uint16_t* kv, int kv_stride) {
  int lane = threadIdx.x % 32, whole = min((item.length - key) / RUN, RUNS);
  if (whole < RUNS) {
    for (int u = whole * RUN * 16 + lane; u < L * 16; u += 32) {  // 16 bytes
      int row = u / 16, unit = u % 16;
      Int4 x{0, 0, 0, 0};
      if (key + row < item.length) x = load_written(kv + (int64_t)(key + row) * kv_stride + NOPE + unit * 8);
      *(Int4*)(to + unit / 8 * CHUNK + row * 128 + ((unit % 8 ^ (row & 7)) << 4)) = x;
    }
    fence_async_proxy();
    __syncwarp();
  }
  if (lane > 0) return;
  int first = item.token - item.position + key;
  mbar_expect(full, whole * RUN * D * 2);
  for (int run = 0; run < whole; ++run, first += RUN) {
    UNROLL for (int c = 0; c < 2; ++c) {
      tma_3d(to + run * (RUN * 128) + c * CHUNK, maps.kv, full, NOPE + c * 64, item.head, first);
    }
  }
}

// The first warp: items, and copies of their queries, keys and values.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const Maps& maps, const uint16_t* kv,
                                     const int* query_start, const int* query_len, int* counter, int rows, int heads,
                                     int kv_stride) {
  int lane = threadIdx.x % 32, number = 0;
  Sweep from{0, 0};
  Ring<1> q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  auto keys = [&](const Item& item, int i) {  // of step i
    wait_free(bars.k, k, "feed: k free");
    uint8_t* to = smem + OFF_K + k.place() * K_BYTES;
    if (lane == 0) copy_keys(to, maps, &bars.k.full[k.place()], item, (item.end - 1 - i) * L);
    k.next();
  };
  auto values = [&](const Item& item, int i) {
    wait_free(bars.v, v, "feed: v free");
    const uint16_t* of = kv + (int64_t)(item.token - item.position) * kv_stride + item.head * (NOPE + D);
    copy_values(smem + OFF_V + v.place() * V_BYTES, maps, &bars.v.full[v.place()], item, (item.end - 1 - i) * L, of,
                kv_stride);
    v.next();
  };
  if (lane == 0) number = atomicAdd(counter, 1);
  for (;; q.next()) {
    number = __shfl_sync(~0u, number, 0);
    Item item = find_item(number, from, rows, heads, query_start, query_len, query_len);
    if (item.steps > 0) keys(item, 0);  // before the queries, whose place may still be in use
    wait_free(bars.q, q, "feed: q free");
    if (lane == 0) {
      bars.item = item;
      if (item.steps == 0) {
        if (number == from.base + (int)gridDim.x - 1) *counter = 0;  // all blocks have been here
        mbar_arrive(bars.q.full);
      } else {
        mbar_expect(bars.q.full, Q_BYTES);
        UNROLL for (int c = 0; c < KEY / 64; ++c) {
          tma_3d(smem + c * CHUNK, maps.q, bars.q.full, c * 64, item.head, item.token);
        }
      }
    }
    if (item.steps == 0) break;
    for (int i = 1; i <= item.steps; ++i) {
      if (i < item.steps) keys(item, i);
      else if (lane == 0) number = atomicAdd(counter, 1);  // not sooner: another block may be done before this one
      values(item, i - 1);
    }
  }
}

// No scores of keys behind the tokens at position_a and position_b.
__device__ __forceinline__ void hide(float (&s)[L / 2], int key, int position_a, int position_b) {
  int first = key + from_here(threadIdx.x % 4) * 2;
  UNROLL for (int i = 0; i < L / 8; ++i) {
    UNROLL for (int j = 0; j < 2; ++j) {
      float &a = s[4 * i + j], &b = s[4 * i + 2 + j];
      a = first + 8 * i + j <= position_a ? a : -INFINITY;
      b = first + 8 * i + j <= position_b ? b : -INFINITY;
    }
  }
}

__device__ __forceinline__ void issue_scores(float (&s)[L / 2], uint32_t q, uint32_t k) {
  const uint64_t form = operand_128b(16, 1024);
  UNROLL for (int i = 0; i < KEY / 16; ++i) {
    uint32_t column = i / 4 * CHUNK + i % 4 * 32;
    wgmma_ss(s, at(form, q + column), at(form, k + column), i != 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void issue_values(float (&o)[D / 2], const uint32_t (&p)[L / 16][4], uint32_t v) {
  const uint64_t from = at(operand_128b(CHUNK, 1024), v);
  UNROLL for (int i = 0; i < L / 16; ++i) wgmma_rs<1>(o, p[i], at(from, i * 2048), 1);
  wgmma_commit();
}

// A warpgroup: results to memory through the place of its queries, which nobody needs any more.
__device__ __forceinline__ void store(uint8_t* q, const float (&o)[D / 2], const float (&factor)[2], const Item& item,
                                      int half, uint16_t* y, int y_stride) {
  int thread = from_here(threadIdx.x % 128), lane = thread % 32, first = half * 64 + thread / 32 * 16;
  auto unit_at = [&](int row, int unit) { return q + unit / 8 * CHUNK + row * 128 + ((unit % 8 ^ (row & 7)) << 4); };
  named_sync(3 + half, 128);
  UNROLL for (int i = 0; i < D / 8; ++i) {
    UNROLL for (int h = 0; h < 2; ++h) {
      *(uint32_t*)(unit_at(first + lane / 4 + 8 * h, i) + lane % 4 * 4) =
          pack2(o[4 * i + 2 * h] * factor[h], o[4 * i + 2 * h + 1] * factor[h]);
    }
  }
  __syncwarp();
  UNROLL for (int i = 0; i < D / 16; ++i) {  // a warp writes and reads 16 rows
    int row = first + i * 2 + lane / 16, unit = lane % 16;
    Int4 x = *(Int4*)unit_at(row, unit);
    if (row < item.count) *(Int4*)(y + (int64_t)(item.token + row) * y_stride + item.head * D + unit * 8) = x;
  }
  fence_async_proxy();
}

// Two warpgroups, 64 tokens of a tile each.
__device__ __forceinline__ void attend(uint8_t* smem, Bars& bars, int half, uint16_t* y, float* log_sum, int heads,
                                       int y_stride, float scale_log2) {
  int lane = threadIdx.x % 32;
  auto my_turn = [&] { named_sync(1 + half, 256); };
  auto next_turn = [&] { named_arrive(2 - half, 256); };
  auto give_back = [&](uint64_t* free) { if (lane == 0) mbar_arrive(free); };
  if (half == 1) next_turn();  // the first may begin
  float o[D / 2], s[L / 2], top[2], base[2], sum[2], shrink[2];
  uint32_t p[L / 16][4], q = smem_u32(smem) + half * 64 * 128, k0 = smem_u32(smem + OFF_K), v0 = smem_u32(smem + OFF_V);
  Ring<1> at_q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  for (;; at_q.next()) {
    wait_full(bars.q, at_q, "attend: q full");
    Item item = bars.item;
    if (item.steps == 0) break;
    if (item.count <= half * 64) {  // none of its vectors is a token's: it lets the other have its turns
      for (int i = 0; i < item.steps; ++i) {
        wait_full(bars.k, k, "skip: k full");
        my_turn();
        next_turn();
        give_back(&bars.k.free[k.place()]);
        k.next();
        wait_full(bars.v, v, "skip: v full");
        give_back(&bars.v.free[v.place()]);
        v.next();
      }
      __syncwarp();
      give_back(bars.q.free);
      continue;
    }
    int position = item.position + half * 64 + from_here(threadIdx.x % 128) / 32 * 16 + lane / 4;  // and this one + 8
    UNROLL for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    UNROLL for (int h = 0; h < 2; ++h) { top[h] = -INFINITY; sum[h] = 0.f; }
    int key = (item.end - 1) * L;

    wait_full(bars.k, k, "attend: k full");
    my_turn();
    wgmma_fence();
    issue_scores(s, q, k0 + k.place() * K_BYTES);
    next_turn();
    wgmma_wait<0>();
    keep(s);
    give_back(&bars.k.free[k.place()]);
    k.next();
    hide(s, key, position, position + 8);
    maxima<true>(s, top, base, shrink, scale_log2);
    exponentials(s, base, sum, shrink, scale_log2);
    pack(p, s);
    if (item.steps > 1) wait_full(bars.k, k, "attend: k full");

    for (int i = 1; i < item.steps; ++i) {  // of tokens that see all keys; this step's are there
      my_turn();
      wgmma_fence();
      issue_scores(s, q, k0 + k.place() * K_BYTES);
      wait_full(bars.v, v, "attend: v full");
      issue_values(o, p, v0 + v.place() * V_BYTES);
      next_turn();
      wgmma_wait<1>();
      keep(s);
      give_back(&bars.k.free[k.place()]);
      k.next();
      maxima<false>(s, top, base, shrink, scale_log2);
      exponentials(s, base, sum, shrink, scale_log2);
      // The wait for the next keys stands here because the assembler moves the wait for the product below up across
      // exponentials, but not across a loop.
      if (i + 1 < item.steps) wait_full(bars.k, k, "attend: k full");
      wgmma_wait<0>();
      keep(o);
      give_back(&bars.v.free[v.place()]);
      v.next();
      pack(p, s);
      UNROLL for (int j = 0; j < D / 2; ++j) o[j] *= shrink[(j >> 1) & 1];
    }

    wait_full(bars.v, v, "attend: v full");
    wgmma_fence();
    issue_values(o, p, v0 + v.place() * V_BYTES);
    UNROLL for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      int token = position - item.position + 8 * h;
      if (lane % 4 == 0 && token < item.count) {
        log_sum[(int64_t)(item.token + token) * heads + item.head] = (base[h] + log2f(sum[h])) * 0.6931471805599453f;
      }
      sum[h] = 1.f / sum[h];
    }
    wgmma_wait<0>();
    keep(o);
    give_back(&bars.v.free[v.place()]);
    v.next();
    store(smem, o, sum, item, half, y, y_stride);
    __syncwarp();
    give_back(bars.q.free);
  }
}

// kv: for each token and head 128 columns of keys, 128 of values. y: rows of y_stride elements. counter: 0 before and
// after. tokens: of all operands. scale_log2: of scores, times log2(e); positive.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_own(GRID_CONSTANT TensorMap q_map, GRID_CONSTANT TensorMap kv_map, GRID_CONSTANT TensorMap rope_map,
        const uint16_t* kv, uint16_t* y, float* log_sum, const int* query_start, const int* query_len, int* counter,
        int rows, int tokens, int heads, int kv_stride, int y_stride, float scale_log2) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // by a lane: the same in all
  if (threadIdx.x == 0) {
    init(bars.q, 1, 8);
    init(bars.k, 1, 8);
    init(bars.v, 1, 8);
    mbar_fence_init();
    tma_prefetch_map(&q_map); tma_prefetch_map(&kv_map); tma_prefetch_map(&rope_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<FEED_REGISTERS>();
    if (warp == 0) {
      Maps maps{&q_map, &kv_map, &rope_map};
      feed(smem, bars, maps, kv, query_start, query_len, counter, rows, heads, kv_stride);
    } else {
      clear_idle(y, query_start, query_len, rows, tokens, y_stride, heads * D, blockIdx.x * 3 + warp - 1, gridDim.x * 3,
                 [&](int token) {
                   for (int h = lane; h < heads; h += 32) log_sum[(int64_t)token * heads + h] = -INFINITY;
                 });
    }
    return;
  }
  setmaxnreg_inc<MATH_REGISTERS>();
  attend(smem, bars, warp / 4 - 1, y, log_sum, heads, y_stride, scale_log2);
}
