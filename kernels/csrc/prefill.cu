// Causal attention of new tokens over a paged KV cache, after FlashAttention-3 (arXiv:2407.08608), for Hopper.
//
// An item is a tile of M query vectors (TOKENS tokens x GROUP heads of one KV head) of one row. Blocks are persistent
// and take items from a counter, so that one launch serves any batch. The first warp finds items and copies; three
// write zeros for tokens of no row, then widen what an 8-bit cache holds; MATH warpgroups take 64 query vectors each.
// Per step of L keys a warpgroup issues the product of this step's keys and that of the previous step's values
// together, and computes exponentials meanwhile; named barriers let the warpgroups take turns at issuing. Steps run
// from the last keys to the first: masks of the diagonal come first, those of a window last.
//
// Slots without a token are never used (they may hold NaN): a run of 64 keys that reaches beyond the row's length is
// copied from further left, so that it ends with the last token, and slots before a page's first are zeros. Nor are
// pages that lie wholly before the window of a tile's first token: they may have another owner by now.
#include "prefill_feed.h"
#include "prefill_softmax.h"
#include "prefill_wgmma.h"

// No scores of keys that the tokens at position_a and position_b do not see.
__device__ __forceinline__ void hide(float (&s)[L / 2], int key, int length, int position_a, int position_b) {
  int lane = from_here(threadIdx.x % 32), low_a = first_seen(position_a), low_b = first_seen(position_b);
  UNROLL for (int run = 0; run < RUNS; ++run) {
    int first = key + run * RUN, valid = min(max(length - first, 0), RUN), shift = RUN - valid;
    UNROLL for (int i = 0; i < 8; ++i) {
      UNROLL for (int j = 0; j < 2; ++j) {
        int slot = 8 * i + 2 * (lane % 4) + j, at_key = first + slot - shift;
        bool there = slot >= shift;
        float& a = s[4 * (8 * run + i) + j];
        float& b = s[4 * (8 * run + i) + 2 + j];
        a = there && at_key <= position_a && (WINDOW == 0 || at_key >= low_a) ? a : -INFINITY;
        b = there && at_key <= position_b && (WINDOW == 0 || at_key >= low_b) ? b : -INFINITY;
      }
    }
  }
}

// Queries where products of scores have them: in registers, or in shared memory at `q`.
#if Q_REGISTERS
typedef uint32_t Queries[D / 16][4];
#else
typedef uint32_t Queries;
#endif

__device__ __forceinline__ void issue_scores(float (&s)[L / 2], const Queries& q, uint32_t k) {
  const uint64_t from_k = at(operand_128b(16, 1024), k);
#if Q_REGISTERS
  UNROLL for (int i = 0; i < D / 16; ++i) {
    wgmma_rs<0>(s, q[i], at(from_k, (i / 4) * KV_CHUNK + (i % 4) * 32), i != 0);
  }
#else
  const uint64_t from_q = at(operand_128b(16, 1024), q);
  UNROLL for (int i = 0; i < D / 16; ++i) {
    uint32_t column = (i % 4) * 32;
    wgmma_ss(s, at(from_q, (i / 4) * Q_CHUNK + column), at(from_k, (i / 4) * KV_CHUNK + column), i != 0);
  }
#endif
  wgmma_commit();
}

__device__ __forceinline__ void issue_values(float (&o)[D / 2], const uint32_t (&p)[L / 16][4], uint32_t v) {
  const uint64_t from = at(operand_128b(KV_CHUNK, 1024), v);
  UNROLL for (int i = 0; i < L / 16; ++i) wgmma_rs<1>(o, p[i], at(from, i * 2048), 1);
  wgmma_commit();
}

// Bytes of 16 in a warpgroup's 64 rows of queries: where unit `u` lies, with D / 8 units a row.
__device__ __forceinline__ uint32_t unit_at(int row, int unit) {
  return (unit / 8) * Q_CHUNK + row * 128 + ((unit % 8 ^ (row & 7)) << 4);
}

// A warpgroup: its queries to float16, where products take that.
__device__ __forceinline__ void narrow_queries(uint8_t* q, int half) {
  for (int u = from_here(threadIdx.x % 128); u < 64 * D / 8; u += 128) {
    Int4* at = (Int4*)(q + unit_at(half * 64 + u / (D / 8), u % (D / 8)));
    Int4 x = *at;
    *at = Int4{(int)half2_of_bf16(x.x), (int)half2_of_bf16(x.y), (int)half2_of_bf16(x.z), (int)half2_of_bf16(x.w)};
  }
  fence_async_proxy();
  named_sync(1 + MATH + half, 128);
}

// A warpgroup: results to memory through the place of its queries, which nobody needs any more.
__device__ __forceinline__ void store(uint8_t* q, const float (&o)[D / 2], const float (&factor)[2], const Item& item,
                                      int half, uint16_t* y, int y_stride) {
  int thread = from_here(threadIdx.x % 128), lane = thread % 32, first = half * 64 + thread / 32 * 16;
  named_sync(1 + MATH + half, 128);
  UNROLL for (int i = 0; i < D / 8; ++i) {
    UNROLL for (int h = 0; h < 2; ++h) {
      float low = o[4 * i + 2 * h] * factor[h], high = o[4 * i + 2 * h + 1] * factor[h];
      uint32_t* to = (uint32_t*)(q + unit_at(first + lane / 4 + 8 * h, i) + lane % 4 * 4);
      *to = BF16_IO ? pack_bf16(low, high) : pack2(low, high);
    }
  }
  __syncwarp();
  UNROLL for (int i = 0; i < D / 16; ++i) {  // a warp writes and reads 16 rows
    int u = i * 32 + lane, r = first + u / (D / 8), unit = u % (D / 8), t = r / GROUP;
    Int4 x = *(Int4*)(q + unit_at(r, unit));
    if (t < item.count && r < TOKENS * GROUP) {
      int64_t to = (int64_t)(item.token + t) * y_stride + (item.head * GROUP + r % GROUP) * D + unit * 8;
      *(Int4*)(y + to) = x;
    }
  }
  fence_async_proxy();
}

LAUNCH_FACTS(THREADS, SHARED, 1);

// y: rows of y_stride elements. counter: 0 before and after. tokens: of q and y. scale_log2: of scores, times log2(e);
// positive.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_prefill(GRID_CONSTANT TensorMap q_map, GRID_CONSTANT TensorMap k_map, GRID_CONSTANT TensorMap v_map,
                  GRID_CONSTANT TensorMap k_box_map, GRID_CONSTANT TensorMap v_box_map, uint16_t* y,
                  const int* page_table, const int* query_start, const int* query_len, const int* context_len,
                  const float* sinks, int* counter, int rows, int tokens, int kv_heads, int table_stride, int y_stride,
                  float scale_log2) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // by a lane: the same in all
  if (threadIdx.x == 0) {
    init(bars.q, 1, 4 * MATH + (CACHE8 ? FEED : 0));
    init(bars.k, FEED, 4 * MATH);
    init(bars.v, FEED, 4 * MATH);
    init(bars.raw, 1, FEED);
    mbar_fence_init();
    tma_prefetch_map(&q_map); tma_prefetch_map(&k_map); tma_prefetch_map(&v_map);
    tma_prefetch_map(&k_box_map); tma_prefetch_map(&v_box_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<FEED_REGISTERS>();
    if (warp == 0) {
      Maps maps{&q_map, &k_map, &v_map, &k_box_map, &v_box_map};
      feed(smem, bars, maps, page_table, query_start, query_len, context_len, counter, rows, kv_heads, table_stride);
    } else {
      clear_idle(y, query_start, query_len, rows, tokens, y_stride, kv_heads * GROUP * D, blockIdx.x * 3 + warp - 1,
                 gridDim.x * 3, [](int) {});
      if (CACHE8) widen(smem, bars, warp - 1);
    }
    return;
  }
  setmaxnreg_inc<MATH_REGISTERS>();
  int half = warp / 4 - 1;  // which 64 query vectors
  auto my_turn = [&] { if (TURNS) named_sync(1 + half, 256); };
  auto next_turn = [&] { if (TURNS) named_arrive(1 + (half + 1) % MATH, 256); };
  if (half == MATH - 1) next_turn();  // the first may begin
  float o[D / 2], s[L / 2], top[2], base[2], sum[2], shrink[2];
  uint32_t p[L / 16][4];
  Ring<Q_STAGES> at_q;
  Ring<K_STAGES> k;
  Ring<V_STAGES> v;
  auto give_back = [&](uint64_t* free) { if (lane == 0) mbar_arrive(free); };
  for (;; at_q.next()) {
    wait_full(bars.q, at_q, "attend: q full");
    Item item = bars.item[at_q.place()];
    if (item.steps == 0) break;
    uint8_t* q_here = smem + at_q.place() * Q_BYTES;
    uint32_t k0 = smem_u32(smem + OFF_K), v0 = smem_u32(smem + OFF_V);
    if (item.count * GROUP <= half * 64) {  // none of its vectors is a token's: it lets the others have their turns
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
      give_back(&bars.q.free[at_q.place()]);
      continue;
    }
    if (CACHE8 && BF16_IO) narrow_queries(q_here, half);
    int vector = half * 64 + from_here(threadIdx.x % 128) / 32 * 16 + lane / 4;  // and this one + 8
    int position_a = item.position + vector / GROUP, position_b = item.position + (vector + 8) / GROUP;
#if Q_REGISTERS
    Queries q;
    UNROLL for (int i = 0; i < D / 8; ++i) {
      UNROLL for (int h = 0; h < 2; ++h) {
        q[i / 2][i % 2 * 2 + h] = *(uint32_t*)(q_here + unit_at(vector + 8 * h, i) + lane % 4 * 4);
      }
    }
#else
    Queries q = smem_u32(q_here) + half * 64 * 128;
#endif
    UNROLL for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    UNROLL for (int h = 0; h < 2; ++h) { top[h] = -INFINITY; sum[h] = 0.f; }
    int key = (item.end - 1) * L;
    int masked = max(item.end - (item.position + 1) / L, 1);  // steps with the diagonal
    int open = WINDOW > 0 ? max(item.position + item.count - WINDOW, 0) : 0;  // all tokens see keys from here on

    wait_full(bars.k, k, "attend: k full");
    my_turn();
    wgmma_fence();
    issue_scores(s, q, k0 + k.place() * KV_BYTES);
    next_turn();
    wgmma_wait<0>();
    keep(s);
    give_back(&bars.k.free[k.place()]);
    k.next();
    hide(s, key, item.length, position_a, position_b);
    maxima<true>(s, top, base, shrink, scale_log2);
    exponentials(s, base, sum, shrink, scale_log2);
    pack(p, s);
    if (item.steps > 1) wait_full(bars.k, k, "attend: k full");

    auto rescale = [&] {
#if LAZY
      if (!__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) return;
#endif
      UNROLL for (int i = 0; i < D / 2; ++i) o[i] *= shrink[(i >> 1) & 1];
    };
    auto next = [&](auto is_masked, bool more) {  // this step's keys are there
      constexpr bool MASKED = decltype(is_masked)::value;
      key -= L;
      my_turn();
      wgmma_fence();
      issue_scores(s, q, k0 + k.place() * KV_BYTES);
      wait_full(bars.v, v, "attend: v full");
      issue_values(o, p, v0 + v.place() * KV_BYTES);
      next_turn();
      wgmma_wait<1>();
      keep(s);
      give_back(&bars.k.free[k.place()]);
      k.next();
      if (MASKED) hide(s, key, item.length, position_a, position_b);
      maxima<MASKED>(s, top, base, shrink, scale_log2);
#if EARLY
      wgmma_wait<0>();
      keep(o);
      give_back(&bars.v.free[v.place()]);
      v.next();
      exponentials(s, base, sum, shrink, scale_log2);
      pack(p, s);
      rescale();
      if (more) wait_full(bars.k, k, "attend: k full");
#else
      exponentials(s, base, sum, shrink, scale_log2);
      // The wait for the next keys stands here because the assembler moves the wait for the product below up across
      // exponentials, but not across a loop.
      if (more) wait_full(bars.k, k, "attend: k full");
      wgmma_wait<0>();
      keep(o);
      give_back(&bars.v.free[v.place()]);
      v.next();
      pack(p, s);
      rescale();
#endif
    };
    int i = 1;
    for (; i < masked; ++i) next(Yes{}, i + 1 < item.steps);
    for (; i < item.steps && (WINDOW == 0 || key - L >= open); ++i) next(No{}, i + 1 < item.steps);
    if (WINDOW > 0) {
      for (; i < item.steps; ++i) next(Yes{}, i + 1 < item.steps);
    }

    wait_full(bars.v, v, "attend: v full");
    wgmma_fence();
    issue_values(o, p, v0 + v.place() * KV_BYTES);
    UNROLL for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
#if SINKS
      sum[h] += exp2_fast(sinks[item.head * GROUP + (vector + 8 * h) % GROUP] * 1.44269504f - base[h]);
#endif
      sum[h] = 1.f / sum[h];
    }
    wgmma_wait<0>();
    keep(o);
    give_back(&bars.v.free[v.place()]);
    v.next();
    store(q_here, o, sum, item, half, y, y_stride);
    __syncwarp();
    give_back(&bars.q.free[at_q.place()]);
  }
}
