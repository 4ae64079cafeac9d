// Causal attention of new tokens over a paged KV cache, after FlashAttention-3 (arXiv:2407.08608), for Hopper.
//
// An item is a tile of 128 query vectors (TOKENS tokens x GROUP heads of one KV head) of one row. Blocks are
// persistent and take items from a counter, so that one launch serves any batch. Of 12 warps the first finds items
// and copies, three write zeros for tokens of no row, and two warpgroups take 64 query vectors each. Per step of 128
// keys a warpgroup issues the product of this step's keys and that of the previous step's values together, and
// computes exponentials meanwhile; named barriers let the two take turns at issuing. Steps run from the last keys to
// the first: masks of the diagonal come first, those of a window last.
//
// Slots without a token are never used (they may hold NaN): a run of 64 keys that reaches beyond the row's length is
// copied from further left, so that it ends with the last token; slots before a page's first arrive as zeros. Nor
// are pages that lie wholly before the window of a tile's first token: they may have another owner by now.
#include "hopper.h"

// GROUP: query heads a KV head. PAGE: slots of a page. WINDOW: tokens that a token sees, 0: all. PDL: waits for the
// kernels before it on the device.
constexpr int D = 128, M = 128, L = 128, RUN = 64;  // head size, query vectors of a tile, keys of a step and of a copy
constexpr int TOKENS = M / GROUP;
constexpr int Q_BYTES = M * D * 2, KV_BYTES = L * D * 2, HALF_BYTES = L * 128;  // a half: 64 columns
constexpr int OFF_Q = 0, OFF_K = 2 * Q_BYTES, OFF_V = OFF_K + 2 * KV_BYTES, OFF_BARS = OFF_V + 2 * KV_BYTES;
constexpr int SHARED = OFF_BARS + 256 + 1024;  // 1024: the base is aligned by hand
static_assert(GROUP >= 1 && GROUP <= 8 && PAGE % RUN == 0 && WINDOW >= 0, "a run of keys lies in one page");

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };
// count: tokens of the tile; position, length: of its first token, of its row; low: the first key that it sees; its
// keys are steps `end - steps` to `end - 1`. No steps: no items are left.
struct Item { int token, count, position, length, head, row, end, steps; };
struct Bars { uint64_t q_full[2], q_free[2], k_full[2], k_free[2], v_full[2], v_free[2]; Item item[2]; };
static_assert(sizeof(Bars) <= 256, "shared memory");

__device__ __forceinline__ int first_seen(int position) { return WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0; }

// All lanes: the item at `place`, by a sweep over the rows' tiles, and how many there are.
__device__ __forceinline__ Item find_item(int place, int rows, int kv_heads, const int* query_start,
                                          const int* query_len, const int* context_len, int* total) {
  int lane = threadIdx.x % 32, base = 0;
  Item item{};
  for (int r0 = 0; r0 < rows; r0 += 32) {
    int r = r0 + lane, len = r < rows ? query_len[r] : 0;
    int mine = ceil_div(len, TOKENS) * kv_heads, end = mine;
    UNROLL for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    uint32_t hit = __ballot_sync(~0u, base + end > place);
    if (hit && item.steps == 0) {
      int l = __ffs(hit) - 1, row = r0 + l;
      int start = base + __shfl_sync(~0u, end - mine, l), n = __shfl_sync(~0u, len, l);
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
    }
    base += __shfl_sync(~0u, end, 31);
  }
  *total = base;
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

// Weights exp2(scale * (s - max)) in place of scores, running maxima (unscaled) and sums; shrink: of what came before.
template <bool MASKED>
__device__ __forceinline__ void weights(float (&s)[64], float (&top)[2], float (&sum)[2], float (&shrink)[2],
                                        float scale) {
  UNROLL for (int h = 0; h < 2; ++h) {
    float m = top[h];
    UNROLL for (int i = 0; i < 16; ++i) m = fmaxf(m, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    float base = m * scale;
    if (MASKED) base = m == -INFINITY ? 0.f : base;  // nothing seen yet
    shrink[h] = exp2_fast(top[h] * scale - base);
    top[h] = m;
    float t = 0.f;
    UNROLL for (int i = 0; i < 16; ++i) {
      UNROLL for (int j = 0; j < 2; ++j) {
        float& x = s[4 * i + 2 * h + j];
        x = exp2_fast(x * scale - base);
        t += x;
      }
    }
    sum[h] = sum[h] * shrink[h] + t;
  }
}

// No scores of keys that the tokens at position_a and position_b do not see.
__device__ __forceinline__ void hide(float (&s)[64], int key, int length, int position_a, int position_b) {
  int lane = threadIdx.x % 32, low_a = first_seen(position_a), low_b = first_seen(position_b);
  UNROLL for (int run = 0; run < 2; ++run) {
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

__device__ __forceinline__ void pack(uint32_t (&p)[8][4], const float (&s)[64]) {
  UNROLL for (int k = 0; k < 8; ++k) {
    UNROLL for (int j = 0; j < 4; ++j) p[k][j] = pack2(s[8 * k + 2 * j], s[8 * k + 2 * j + 1]);
  }
}

__device__ __forceinline__ void issue_scores(float (&s)[64], uint32_t q, uint32_t k) {
  const uint64_t form = operand_128b(16, 1024);
  UNROLL for (int i = 0; i < D / 16; ++i) {
    uint32_t column = (i / 4) * HALF_BYTES + (i % 4) * 32;
    wgmma_ss_n128(s, at(form, q + column), at(form, k + column), i != 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void issue_values(float (&o)[64], const uint32_t (&p)[8][4], uint32_t v) {
  const uint64_t form = operand_128b(HALF_BYTES, 1024);
  UNROLL for (int i = 0; i < L / 16; ++i) wgmma_rs_n128(o, p[i], at(form, v + i * 2048), 1);
  wgmma_commit();
}

// One step's keys or values into `to`, in halves of columns and runs of slots.
__device__ __forceinline__ void copy_step(uint8_t* to, const TensorMap* map, uint64_t* full, int head,
                                          const int (&slot)[2], const int (&page)[2]) {
  mbar_expect(full, KV_BYTES);
  UNROLL for (int c = 0; c < 4; ++c) {
    tma_4d(to + (c >> 1) * HALF_BYTES + (c & 1) * (RUN * 128), map, full, (c >> 1) * 64, head, slot[c & 1],
           page[c & 1]);
  }
}

LAUNCH_FACTS(384, SHARED, 1);

// y: rows of y_stride elements. counter: 0 before and after. tokens: of q and y. scale_log2: of scores, times log2(e);
// positive.
extern "C" __global__ void __launch_bounds__(384, 1)
attention_prefill(GRID_CONSTANT TensorMap q_map, GRID_CONSTANT TensorMap k_map, GRID_CONSTANT TensorMap v_map,
                  uint16_t* y, const int* page_table, const int* query_start, const int* query_len,
                  const int* context_len, int* counter, int rows, int tokens, int kv_heads, int table_stride,
                  int y_stride, float scale_log2) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbar_init(&bars.q_full[i], 1); mbar_init(&bars.k_full[i], 1); mbar_init(&bars.v_full[i], 1);
      mbar_init(&bars.q_free[i], 8); mbar_init(&bars.k_free[i], 8); mbar_init(&bars.v_free[i], 8);
    }
    mbar_fence_init();
    tma_prefetch_map(&q_map); tma_prefetch_map(&k_map); tma_prefetch_map(&v_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<40>();
    if (warp > 0) {
      clear_idle(y, query_start, query_len, rows, tokens, y_stride, kv_heads * GROUP * D, blockIdx.x * 3 + warp - 1,
                 gridDim.x * 3);
    } else {
      int step = 0;  // of all items
      for (int turn = 0;; ++turn) {
        int place = 0, total, stage = turn % 2;
        if (lane == 0) place = atomicAdd(counter, 1);
        place = __shfl_sync(~0u, place, 0);
        Item item = find_item(place, rows, kv_heads, query_start, query_len, context_len, &total);
        if (lane == 0 && place == total + (int)gridDim.x - 1) *counter = 0;  // all blocks have been here
        mbar_wait(&bars.q_free[stage], ((turn / 2) & 1) ^ 1, "feed: q_free");
        if (lane == 0) {
          bars.item[stage] = item;
          if (item.steps == 0) {
            mbar_arrive(&bars.q_full[stage]);
          } else {
            uint8_t* q = smem + OFF_Q + stage * Q_BYTES;
            mbar_expect(&bars.q_full[stage], TOKENS * GROUP * D * 2);
            UNROLL for (int c = 0; c < D / 64; ++c) {
              tma_3d(q + c * HALF_BYTES, &q_map, &bars.q_full[stage], c * 64, item.head * GROUP, item.token);
            }
            const int* pages = page_table + (int64_t)item.row * table_stride;
            int page[2][2], slot[2][2];  // of this step's keys and of the previous step's, which values still need
            for (int i = 0; i <= item.steps; ++i) {
              if (i < item.steps) {
                int key = (item.end - 1 - i) * L, n = (step + i) & 1;
                UNROLL for (int run = 0; run < 2; ++run) {
                  int first = key + run * RUN, valid = min(item.length - first, RUN);
                  if (WINDOW > 0 && first + RUN <= first_seen(item.position)) valid = 0;
                  page[0][run] = valid > 0 ? pages[first / PAGE] : 0;
                  slot[0][run] = valid > 0 ? first % PAGE + valid - RUN : PAGE;  // beyond the page: zeros
                }
                mbar_wait(&bars.k_free[n], (((step + i) >> 1) & 1) ^ 1, "feed: k_free");
                copy_step(smem + OFF_K + n * KV_BYTES, &k_map, &bars.k_full[n], item.head, slot[0], page[0]);
              }
              if (i > 0) {
                int n = (step + i - 1) & 1;
                mbar_wait(&bars.v_free[n], (((step + i - 1) >> 1) & 1) ^ 1, "feed: v_free");
                copy_step(smem + OFF_V + n * KV_BYTES, &v_map, &bars.v_full[n], item.head, slot[1], page[1]);
              }
              UNROLL for (int run = 0; run < 2; ++run) { page[1][run] = page[0][run]; slot[1][run] = slot[0][run]; }
            }
            step += item.steps;
          }
        }
        __syncwarp();
        if (item.steps == 0) break;
      }
    }
  } else {
    setmaxnreg_inc<232>();
    int half = warp / 4 - 1;  // which 64 query vectors
    int vector = half * 64 + (warp % 4) * 16 + lane / 4;  // and this one + 8
    if (half == 1) named_arrive(1, 256);  // the first may begin
    float o[64], s[64], top[2], sum[2], shrink[2];
    uint32_t p[8][4];
    int step = 0;
    for (int turn = 0;; ++turn) {
      int stage = turn % 2;
      mbar_wait(&bars.q_full[stage], (turn / 2) & 1, "attend: q_full");
      Item item = bars.item[stage];
      if (item.steps == 0) break;
      uint8_t* q_here = smem + OFF_Q + stage * Q_BYTES;
      uint32_t q = smem_u32(q_here) + half * 64 * 128, k0 = smem_u32(smem + OFF_K), v0 = smem_u32(smem + OFF_V);
      int position_a = item.position + vector / GROUP, position_b = item.position + (vector + 8) / GROUP;
      UNROLL for (int i = 0; i < 64; ++i) o[i] = 0.f;
      UNROLL for (int h = 0; h < 2; ++h) { top[h] = -INFINITY; sum[h] = 0.f; }
      int key = (item.end - 1) * L;
      int masked = max(item.end - (item.position + 1) / L, 1);  // steps with the diagonal
      int open = WINDOW > 0 ? max(item.position + item.count - WINDOW, 0) : 0;  // all tokens see keys from here on

      mbar_wait(&bars.k_full[step & 1], (step >> 1) & 1, "attend: k_full");
      named_sync(1 + half, 256);
      wgmma_fence();
      issue_scores(s, q, k0 + (step & 1) * KV_BYTES);
      named_arrive(2 - half, 256);
      wgmma_wait<0>();
      keep(s);
      if (lane == 0) mbar_arrive(&bars.k_free[step & 1]);
      hide(s, key, item.length, position_a, position_b);
      weights<true>(s, top, sum, shrink, scale_log2);
      pack(p, s);
      if (item.steps > 1) mbar_wait(&bars.k_full[(step + 1) & 1], ((step + 1) >> 1) & 1, "attend: k_full");

      auto next = [&](auto is_masked, bool more) {  // this step's keys are there
        constexpr bool MASKED = decltype(is_masked)::value;
        int before = step & 1, parity = (step >> 1) & 1;
        ++step;
        key -= L;
        named_sync(1 + half, 256);
        wgmma_fence();
        issue_scores(s, q, k0 + (step & 1) * KV_BYTES);
        mbar_wait(&bars.v_full[before], parity, "attend: v_full");
        issue_values(o, p, v0 + before * KV_BYTES);
        named_arrive(2 - half, 256);
        wgmma_wait<1>();
        keep(s);
        if (lane == 0) mbar_arrive(&bars.k_free[step & 1]);
        if (MASKED) hide(s, key, item.length, position_a, position_b);
        weights<MASKED>(s, top, sum, shrink, scale_log2);
        // The wait for the next keys stands here because the assembler moves the wait for the product below up across
        // exponentials, but not across a loop.
        if (more) mbar_wait(&bars.k_full[(step + 1) & 1], ((step + 1) >> 1) & 1, "attend: k_full");
        wgmma_wait<0>();
        keep(o);
        if (lane == 0) mbar_arrive(&bars.v_free[before]);
        pack(p, s);
        UNROLL for (int i = 0; i < 64; ++i) o[i] *= shrink[(i >> 1) & 1];
      };
      int i = 1;
      for (; i < masked; ++i) next(Yes{}, i + 1 < item.steps);
      for (; i < item.steps && (WINDOW == 0 || key - L >= open); ++i) next(No{}, i + 1 < item.steps);
      if (WINDOW > 0) {
        for (; i < item.steps; ++i) next(Yes{}, i + 1 < item.steps);
      }

      mbar_wait(&bars.v_full[step & 1], (step >> 1) & 1, "attend: v_full");
      wgmma_fence();
      issue_values(o, p, v0 + (step & 1) * KV_BYTES);
      UNROLL for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        sum[h] = 1.f / sum[h];
      }
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) mbar_arrive(&bars.v_free[step & 1]);
      ++step;

      // To memory through the place of the queries, which nobody needs any more; a warp writes and reads 16 rows.
      named_sync(3 + half, 128);
      UNROLL for (int i = 0; i < 16; ++i) {
        UNROLL for (int h = 0; h < 2; ++h) {
          int r = vector + 8 * h, byte = (8 * i + 2 * (lane % 4)) * 2;
          uint8_t* to = q_here + (byte / 128) * HALF_BYTES + r * 128 + ((byte % 128) ^ ((r & 7) << 4));
          *(uint32_t*)to = pack2(o[4 * i + 2 * h] * sum[h], o[4 * i + 2 * h + 1] * sum[h]);
        }
      }
      __syncwarp();
      UNROLL for (int i = 0; i < 8; ++i) {
        int r = half * 64 + (warp % 4) * 16 + i * 2 + lane / 16, byte = (lane % 16) * 16, t = r / GROUP;
        Int4 x = *(Int4*)(q_here + (byte / 128) * HALF_BYTES + r * 128 + ((byte % 128) ^ ((r & 7) << 4)));
        if (t < item.count && r < TOKENS * GROUP) {
          int64_t to = (int64_t)(item.token + t) * y_stride + (item.head * GROUP + r % GROUP) * D + byte / 2;
          *(Int4*)(y + to) = x;
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbar_arrive(&bars.q_free[stage]);
    }
  }
}
