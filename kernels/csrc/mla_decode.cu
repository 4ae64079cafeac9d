// Attention over a paged cache of latents in the absorbed form, for Hopper: latents are keys, and values in their
// first 512 columns, of all heads.
//
// Keys are the long side of the matrix instructions: scores [64 keys x N query vectors] = K Q^T and results
// [512 x N] += V^T P^T, so that few heads are not padded and memory sets the pace. How work is cut: mla_shapes.h.
// The first warp copies blocks of keys, in three groups of three chunks that are used, and free again, one by one;
// three warps write zeros for what sees no key. A warpgroup makes scores and weights; one, or two at 64 vectors,
// weighted values, which are behind by one block.
//
// Slots without a token are never used (they may hold NaN): of a row's last block boxes of 16 slots are copied, from
// further left, so that they end with the last token. Scores of other slots do not count, values of boxes that were not
// copied are not multiplied.
#include "mla_feed.h"
#include "mla_wgmma.h"

LAUNCH_FACTS(THREADS, SHARED, 1);

// Over the 8 lanes that have the same vectors: of `x`, the maximum or the sum of each. Lane l ends with those from
// `first` on, VALUES / 8 of them, or one that others have, too.
template <bool MAXIMA, int VALUES> __device__ __forceinline__ int over_lanes(float (&x)[VALUES]) {
  int lane = threadIdx.x % 32, first = 0;
  UNROLL for (int many = VALUES, d = 16; d > 2; d /= 2) {
    bool upper = lane & d, halves = many > 1;
    if (halves) many /= 2;
    if (halves && upper) first += many;
    UNROLL for (int j = 0; j < VALUES; ++j) if (j < many) {
      float mine = halves && upper ? x[j + many] : x[j], other = halves && !upper ? x[j + many] : x[j];
      other = __shfl_xor_sync(~0u, other, d);
      x[j] = MAXIMA ? fmaxf(mine, other) : mine + other;
    }
  }
  return first;
}
template <int VALUES>
__device__ __forceinline__ void to_warps(Bars& bars, const float (&x)[VALUES], int first, int warp) {
  UNROLL for (int j = 0; j < (VALUES > 8 ? VALUES / 8 : 1); ++j) bars.top[vector_of(first + j)].x[warp] = x[j];
}

// Scores of a block, in order of its columns as they come.
__device__ __forceinline__ void make_scores(float (&x)[PER], uint8_t* smem, Bars& bars, Ring<K_PLACES>& k) {
  const uint64_t form = operand_128b(16, 1024);
  uint32_t k0 = smem_u32(smem + OFF_K), q0 = smem_u32(smem + OFF_Q);
  constexpr bool TWO = N < 64;  // sums, so that short products need not wait for each other
  float other[PER];
  wgmma_fence();
  UNROLL for (int g = 0; g < GROUPS; ++g, k.next()) {
    wait_full(bars.k, k, "score: k full");
    uint32_t here = k0 + k.place() * GROUP_BYTES;
    UNROLL for (int c = 0; c < 3; ++c) {
      UNROLL for (int j = 0; j < 4; ++j) {
        uint64_t keys = at(form, here + c * CHUNK + j * 32), queries = at(form, q0 + (g * 3 + c) * Q_CHUNK + j * 32);
        bool more = (g | c | (TWO ? j / 2 : j)) != 0;
        if (TWO && (j & 1)) wgmma_ss_16bit(other, keys, queries, more);
        else wgmma_ss_16bit(x, keys, queries, more);
      }
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  keep(x);
  if (TWO) {
    keep(other);
    UNROLL for (int j = 0; j < PER; ++j) x[j] += other[j];
  }
}

// The warpgroup of scores. Numbers 4 i + j and 4 i + 2 + j of a thread are of vector_of(2 i + j), of its key and of
// the eighth from there; thread t < N has vector t's maximum.
__device__ __forceinline__ void score(uint8_t* smem, Bars& bars, const Call& call) {
  int t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  float scale = call.scale_log2;
  Ring<K_PLACES> k;
  Ring<P_PLACES> p;
  Ring<2> items;
  Ring<1> q;
  for (;; items.next(), q.next()) {
    wait_full(bars.item, items, "score: item full");
    Item item = bars.items[items.place()];
    if (item.blocks == 0) break;
    float top = -INFINITY, sum[PER / 2];
    UNROLL for (int h = 0; h < PER / 2; ++h) sum[h] = 0.f;
    wait_full(bars.q, q, "score: q full");
    for (int i = 0; i < item.blocks; ++i, p.next()) {
      float x[PER], m[PER / 2];
      make_scores(x, smem, bars, k);
      if (i == item.blocks - 1 && lane == 0) mbar_arrive(bars.q.free);
      int key = warp * 16 + lane / 4, empty = L - min(item.keys - (item.first + i) * L, L);
      if (empty > 0) {
        UNROLL for (int j = 0; j < PER; ++j) x[j] = key + (j & 2) * 4 >= empty ? x[j] : -INFINITY;
      }
      UNROLL for (int h = 0; h < PER / 2; ++h) m[h] = fmaxf(x[h / 2 * 4 + (h & 1)], x[h / 2 * 4 + 2 + (h & 1)]);
      to_warps(bars, m, over_lanes<true>(m), warp);
      wait_free(bars.p, p, "score: p free");
      named_sync(1, 128);
      if (t < N) {
        Four four = bars.top[t];
        float higher = fmaxf(fmaxf(fmaxf(four.x[0], four.x[1]), fmaxf(four.x[2], four.x[3])), top);  // finite
        bars.factors[p.place()][t] = Factors{higher * scale, exp2_fast((top - higher) * scale)};
        top = higher;
      }
      named_sync(1, 128);
      uint8_t* weights = smem + OFF_P + p.place() * P_BYTES;
      UNROLL for (int h = 0; h < PER / 2; h += 2) {
        Four two = *(const Four*)&bars.factors[p.place()][vector_of(h)];  // of this vector and the next
        UNROLL for (int j = 0; j < 2; ++j) {
          float &a = x[2 * h + j], &b = x[2 * h + 2 + j];
          a = exp2_fast(a * scale - two.x[2 * j]);
          b = exp2_fast(b * scale - two.x[2 * j]);
          sum[h + j] = sum[h + j] * two.x[2 * j + 1] + (a + b);
        }
        int row = 4 * h + lane % 8, unit = 2 * warp + (lane / 8 & 1);
        store_turned(weights + row * 128 + ((unit ^ (row & 7)) << 4), pack2(x[2 * h], x[2 * h + 1]),
                     pack2(x[2 * h + 2], x[2 * h + 3]));
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbar_arrive(&bars.p.full[p.place()]);
    }
    to_warps(bars, sum, over_lanes<false>(sum), warp);
    wait_free(bars.end, q, "score: end free");
    named_sync(1, 128);
    if (t < N) {
      Four four = bars.top[t];
      float total = (four.x[0] + four.x[1]) + (four.x[2] + four.x[3]), log = top * scale + log2f(total);
      bars.scale[t] = 1.f / total;
      if (item.part >= 0) {
        call.logs[item.part * N + t] = log;
      } else if (EXTEND && t < item.count * GROUP) {
        int64_t token = item.token + t / GROUP;
        call.log_sum[token * (HEAD_GROUPS * GROUP) + head_group() * GROUP + t % GROUP] = log * 0.6931471805599453f;
      }
    }
    named_sync(1, 128);
    if (lane == 0) {
      mbar_arrive(bars.end.full);
      mbar_arrive(&bars.item.free[items.place()]);
    }
  }
}

// A warpgroup of values: tiles FIRST and following of the results, OWN of them.
template <int FIRST, int OWN> __device__ __forceinline__ void weigh(uint8_t* smem, Bars& bars, const Call& call) {
  int t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
  const uint64_t form = operand_128b(16, 1024);
  float o[OWN][PER];
  auto give_back = [&](uint64_t* free) { if (lane == 0) mbar_arrive(free); };
  Ring<K_PLACES> k;
  Ring<P_PLACES> p;
  Ring<2> items;
  Ring<1> end;
  for (;; items.next(), end.next()) {
    wait_full(bars.item, items, "values: item full");
    Item item = bars.items[items.place()];
    if (item.blocks == 0) break;
    UNROLL for (int d = 0; d < OWN; ++d) { UNROLL for (int j = 0; j < PER; ++j) o[d][j] = 0.f; }
    for (int i = 0; i < item.blocks; ++i, p.next()) {
      wait_full(bars.p, p, "values: p full");
      UNROLL for (int h = 0; h < PER / 2; h += 2) {
        Four two = *(const Four*)&bars.factors[p.place()][vector_of(h)];
        UNROLL for (int d = 0; d < OWN; ++d) {
          UNROLL for (int j = 0; j < 4; ++j) o[d][2 * h + j] *= two.x[2 * (j & 1) + 1];
        }
      }
      int from = (L - min(item.keys - (item.first + i) * L, L)) / BOX;  // keys before were not copied
      uint32_t weights = smem_u32(smem + OFF_P) + p.place() * P_BYTES, k0 = smem_u32(smem + OFF_K);
      uint64_t* free[GROUPS];
      wgmma_fence();
      UNROLL for (int g = 0; g < GROUPS; ++g, k.next()) {
        free[g] = &bars.k.free[k.place()];
        uint32_t here = k0 + k.place() * GROUP_BYTES;
        for (int j = from; j < 4; ++j) {
          UNROLL for (int c = 0; c < 3; ++c) {
            int d = g * 3 + c - FIRST;
            if (d < 0 || d >= OWN) continue;
            wgmma_turned(o[d], at(form, here + c * CHUNK + j * 2048), at(form, weights + j * 32), 1);
          }
        }
        wgmma_commit();
      }
      wgmma_wait<2>();
      give_back(free[0]);
      wgmma_wait<1>();
      give_back(free[1]);
      wgmma_wait<0>();
      UNROLL for (int d = 0; d < OWN; ++d) keep(o[d]);
      give_back(free[2]);
      give_back(&bars.p.free[p.place()]);
    }
    wait_full(bars.end, end, "values: end full");
    UNROLL for (int h = 0; h < PER / 2; ++h) {
      float scale = bars.scale[vector_of(h)];
      UNROLL for (int d = 0; d < OWN; ++d) {
        o[d][h / 2 * 4 + (h & 1)] *= scale;
        o[d][h / 2 * 4 + 2 + (h & 1)] *= scale;
      }
    }
    if (item.part >= 0) {  // as the registers have it
      float* to = call.parts + (int64_t)item.part * (RANK * N) + t;
      UNROLL for (int d = 0; d < OWN; ++d) {
        UNROLL for (int j = 0; j < PER; ++j) to[((FIRST + d) * PER + j) * 128] = o[d][j];
      }
    } else {
      // Lanes of neighbouring columns exchange one of two vectors, so that each stores two columns of one.
      bool odd = lane & 4;
      UNROLL for (int h = 0; h < PER / 2; h += 2) {
        int vector = vector_of(h) + odd, token = item.token + vector / GROUP;
        int head = head_group() * GROUP + vector % GROUP;
        uint16_t* to = call.y + (int64_t)token * call.y_stride + head * RANK + warp * 16 + (lane / 8) * 2;
        UNROLL for (int d = 0; d < OWN; ++d) {
          UNROLL for (int j = 0; j < 2; ++j) {
            float a = o[d][2 * h + 2 * j], b = o[d][2 * h + 2 * j + 1], other = __shfl_xor_sync(~0u, odd ? a : b, 4);
            uint32_t two = odd ? pack2(other, b) : pack2(a, other);
            if (vector < item.count * GROUP) *(uint32_t*)(to + (FIRST + d) * 64 + j * 8) = two;
          }
        }
      }
    }
    __syncwarp();
    give_back(bars.end.free);
    give_back(&bars.item.free[items.place()]);
  }
}

__device__ __forceinline__ void run(const Call& call) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);  // by a lane: the same in all
  if (threadIdx.x == 0) {
    init(bars.k, 1, 4 * VALUE_GROUPS);
    init(bars.p, 4, 4 * VALUE_GROUPS);
    init(bars.item, 1, 4 + 4 * VALUE_GROUPS);
    init(bars.q, 1, 4);
    init(bars.end, 4, 4 * VALUE_GROUPS);
    mbar_fence_init();
    tma_prefetch_map(call.q_map); tma_prefetch_map(call.k_map); tma_prefetch_map(call.k_box_map);
  }
#if PDL
  dependents_go();
  if (warp > 0) dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    if (N == 64) setmaxnreg_dec<FEED_REGISTERS>();
    if (warp == 0) feed(smem, bars, call);
    else clear(call, blockIdx.x * 3 + warp - 1, gridDim.x * 3);
  } else if (warp < 8) {
    score(smem, bars, call);
  } else {
    if (N == 64) setmaxnreg_inc<VALUE_REGISTERS>();
    if (warp < 12) weigh<0, TILES / VALUE_GROUPS>(smem, bars, call);
    else weigh<TILES / 2, TILES / 2>(smem, bars, call);
  }
}

// y: rows of y_stride elements. log_sum: natural logarithms of sums of weights. parts, logs: of units that several
// shares have. scale_log2: of scores, times log2(e); positive.
#if EXTEND
extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_extend(GRID_CONSTANT TensorMap q_map, GRID_CONSTANT TensorMap k_map, GRID_CONSTANT TensorMap k_box_map, uint16_t* y,
           float* log_sum, float* parts, float* logs, const int* page_table, const int* query_start,
           const int* query_len, const int* context_len, int rows, int tokens, int table_stride, int y_stride,
           float scale_log2) {
  run(Call{&q_map, &k_map, &k_box_map, y, log_sum, parts, logs, page_table,
           Batch{query_start, query_len, context_len, rows, tokens}, table_stride, y_stride, scale_log2});
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode(GRID_CONSTANT TensorMap q_map, GRID_CONSTANT TensorMap k_map, GRID_CONSTANT TensorMap k_box_map, uint16_t* y,
           float* parts, float* logs, const int* page_table, const int* context_len, int rows, int table_stride,
           int y_stride, float scale_log2) {
  run(Call{&q_map, &k_map, &k_box_map, y, nullptr, parts, logs, page_table,
           Batch{nullptr, nullptr, context_len, rows, rows}, table_stride, y_stride, scale_log2});
}
#endif
