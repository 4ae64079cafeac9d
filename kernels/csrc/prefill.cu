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
// copied from further left, so that it ends with the last token; slots before a page's first arrive as zeros. Nor
// are pages that lie wholly before the window of a tile's first token: they may have another owner by now.
#include "prefill_wgmma.h"

// HEAD: head size. GROUP: query heads a KV head. PAGE: slots of a page. WINDOW: tokens that a token sees, 0: all.
// CACHE8: the cache holds e4m3; products then take float16 (FP16). BF16_IO: queries and results are bfloat16
// nevertheless. PDL: waits for the kernels before it on the device.
constexpr int D = HEAD, RUN = 64;             // RUN: keys of a copy
constexpr int MATH = D == 64 ? 3 : 2;         // warpgroups that multiply
constexpr int M = 64 * MATH, TOKENS = M / GROUP, L = D == 256 ? 64 : 128, RUNS = L / RUN;
constexpr int THREADS = 128 * (1 + MATH), FEED_REGISTERS = MATH == 3 ? 32 : CACHE8 ? 64 : 40;
constexpr int MATH_REGISTERS = (65536 / 128 - FEED_REGISTERS) / MATH / 8 * 8;
constexpr bool TURNS = D <= 128;              // else 128 numbers of the result leave little to do between products
constexpr int Q_STAGES = D == 256 ? 1 : 2, RAW_STAGES = D == 64 ? 4 : 2;
constexpr int Q_CHUNK = M * 128, KV_CHUNK = L * 128;  // 64 columns: the 128 bytes that a pattern of addresses has
constexpr int Q_BYTES = M * D * 2, KV_BYTES = L * D * 2, RAW_BYTES = CACHE8 ? L * D : 0;
constexpr int OFF_K = Q_STAGES * Q_BYTES, OFF_V = OFF_K + 2 * KV_BYTES, OFF_RAW = OFF_V + 2 * KV_BYTES;
constexpr int OFF_BARS = OFF_RAW + RAW_STAGES * RAW_BYTES, SHARED = OFF_BARS + 256 + 1024;  // 1024: aligned by hand
constexpr int FEED = CACHE8 ? 3 : 1;          // warps that say that keys or values are there
static_assert(D == 64 || D == 128 || D == 256, "head size");
static_assert(GROUP >= 1 && GROUP <= 16 && PAGE % RUN == 0 && WINDOW >= 0, "a run of keys lies in one page");
static_assert(SHARED <= 232448, "shared memory");

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };
// count: tokens of the tile; position, length: of its first token, of its row; low: the first key that it sees; its
// keys are steps `end - steps` to `end - 1`. No steps: no items are left.
struct Item { int token, count, position, length, head, row, end, steps; };
struct Bars {
  uint64_t q_full[2], q_free[2], k_full[2], k_free[2], v_full[2], v_free[2], raw_full[4], raw_free[4];
  Item item[2];
};
static_assert(sizeof(Bars) <= 256, "shared memory");

__device__ __forceinline__ int first_seen(int position) { return WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0; }

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

// Weights exp2(scale * (s - max)) in place of scores, running maxima (unscaled) and sums; shrink: of what came before.
template <bool MASKED>
__device__ __forceinline__ void weights(float (&s)[L / 2], float (&top)[2], float (&sum)[2], float (&shrink)[2],
                                        float scale) {
  float m[2] = {top[0], top[1]};
  UNROLL for (int i = 0; i < L / 8; ++i) {
    UNROLL for (int h = 0; h < 2; ++h) m[h] = fmaxf(m[h], fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
  }
  UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
    UNROLL for (int h = 0; h < 2; ++h) m[h] = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], lanes));
  }
  UNROLL for (int h = 0; h < 2; ++h) {
#if LAZY
    m[h] = (m[h] - top[h]) * scale > LAZY ? m[h] : top[h];
#endif
    float base = m[h] * scale;
    if (MASKED) base = m[h] == -INFINITY ? 0.f : base;  // nothing seen yet
    shrink[h] = exp2_fast(top[h] * scale - base);
    top[h] = m[h];
    float t = 0.f;
    UNROLL for (int i = 0; i < L / 8; ++i) {
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

__device__ __forceinline__ void pack(uint32_t (&p)[L / 16][4], const float (&s)[L / 2]) {
  UNROLL for (int k = 0; k < L / 16; ++k) {
    UNROLL for (int j = 0; j < 4; ++j) p[k][j] = pack2(s[8 * k + 2 * j], s[8 * k + 2 * j + 1]);
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

__device__ __forceinline__ void copy_step(uint8_t* to, const TensorMap* map, uint64_t* full, int head, const Runs& at) {
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
  int lane = threadIdx.x % 32, step = 0, raw = 0, place = 0;  // step, raw: copies of keys, of both, of all items
  Sweep from{0, 0};
  auto copy = [&](const TensorMap* map, uint64_t* full, uint64_t* free, uint8_t* to, int n, int head, const Runs& at) {
    if (CACHE8) {
      int stage = raw % RAW_STAGES;
      mbar_wait(&bars.raw_free[stage], ((raw / RAW_STAGES) & 1) ^ 1, "feed: raw_free");
      copy_step(smem + OFF_RAW + stage * RAW_BYTES, map, &bars.raw_full[stage], head, at);
      ++raw;
    } else {
      mbar_wait(&free[n & 1], ((n >> 1) & 1) ^ 1, "feed: free");
      copy_step(to + (n & 1) * KV_BYTES, map, &full[n & 1], head, at);
    }
  };
  if (lane == 0) place = atomicAdd(counter, 1);
  for (int turn = 0;; ++turn) {
    int stage = turn % Q_STAGES;
    place = __shfl_sync(~0u, place, 0);
    Item item = find_item(place, from, rows, kv_heads, query_start, query_len, context_len);
    if (lane == 0) {
      const int* pages = page_table + (int64_t)item.row * table_stride;
      Runs now, before{};  // of this step's keys, and of the previous step's, whose values are still to come
      auto keys = [&](int i) {
        now = find_runs(item, pages, (item.end - 1 - i) * L);
        copy(k_map, bars.k_full, bars.k_free, smem + OFF_K, step + i, item.head, now);
      };
      if (item.steps > 0) keys(0);  // before the queries, whose place may still be in use
      mbar_wait(&bars.q_free[stage], ((turn / Q_STAGES) & 1) ^ 1, "feed: q_free");
      bars.item[stage] = item;
      if (item.steps == 0) {
        if (place == from.base + (int)gridDim.x - 1) *counter = 0;  // all blocks have been here
        mbar_arrive(&bars.q_full[stage]);
      } else {
        mbar_expect(&bars.q_full[stage], TOKENS * GROUP * D * 2);
        UNROLL for (int c = 0; c < D / 64; ++c) {
          tma_3d(smem + stage * Q_BYTES + c * Q_CHUNK, q_map, &bars.q_full[stage], c * 64, item.head * GROUP,
                 item.token);
        }
        for (int i = 1; i <= item.steps; ++i) {
          before = now;
          if (i < item.steps) keys(i);
          else place = atomicAdd(counter, 1);  // not sooner: another block may be done before this one
          copy(v_map, bars.v_full, bars.v_free, smem + OFF_V, step + i - 1, item.head, before);
        }
        step += item.steps;
      }
    }
    __syncwarp();
    if (item.steps == 0) break;
  }
}

// Three warps: keys and values of an 8-bit cache in the order in which the first warp copies them.
__device__ __forceinline__ void widen(uint8_t* smem, Bars& bars, int worker) {
  int lane = threadIdx.x % 32, step = 0, raw = 0;
  auto one = [&](uint64_t* full, uint64_t* free, uint8_t* to, int n) {
    int stage = raw % RAW_STAGES;
    mbar_wait(&bars.raw_full[stage], (raw / RAW_STAGES) & 1, "widen: raw_full");
    mbar_wait(&free[n & 1], ((n >> 1) & 1) ^ 1, "widen: free");
    widen_step(to + (n & 1) * KV_BYTES, smem + OFF_RAW + stage * RAW_BYTES, worker * 32 + lane, 32 * FEED);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      mbar_arrive(&full[n & 1]);
      mbar_arrive(&bars.raw_free[stage]);
    }
    ++raw;
  };
  for (int turn = 0;; ++turn) {
    int stage = turn % Q_STAGES;
    mbar_wait(&bars.q_full[stage], (turn / Q_STAGES) & 1, "widen: q_full");
    int steps = bars.item[stage].steps;
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.q_free[stage]);
    if (steps == 0) break;
    for (int i = 0; i <= steps; ++i) {
      if (i < steps) one(bars.k_full, bars.k_free, smem + OFF_K, step + i);
      if (i > 0) one(bars.v_full, bars.v_free, smem + OFF_V, step + i - 1);
    }
    step += steps;
  }
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
      *(uint32_t*)(q + unit_at(first + lane / 4 + 8 * h, i) + lane % 4 * 4) = BF16_IO ? pack_bf16(low, high) : pack2(low, high);
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
                  uint16_t* y, const int* page_table, const int* query_start, const int* query_len,
                  const int* context_len, int* counter, int rows, int tokens, int kv_heads, int table_stride,
                  int y_stride, float scale_log2) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // by a lane: the same in all
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbar_init(&bars.q_full[i], 1); mbar_init(&bars.k_full[i], FEED); mbar_init(&bars.v_full[i], FEED);
      mbar_init(&bars.q_free[i], 4 * MATH + (CACHE8 ? FEED : 0));
      mbar_init(&bars.k_free[i], 4 * MATH); mbar_init(&bars.v_free[i], 4 * MATH);
    }
    for (int i = 0; i < 4; ++i) { mbar_init(&bars.raw_full[i], 1); mbar_init(&bars.raw_free[i], FEED); }
    mbar_fence_init();
    tma_prefetch_map(&q_map); tma_prefetch_map(&k_map); tma_prefetch_map(&v_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<FEED_REGISTERS>();
    if (warp == 0) {
      feed(smem, bars, &q_map, &k_map, &v_map, page_table, query_start, query_len, context_len, counter, rows,
           kv_heads, table_stride);
    } else {
      clear_idle(y, query_start, query_len, rows, tokens, y_stride, kv_heads * GROUP * D, blockIdx.x * 3 + warp - 1,
                 gridDim.x * 3);
      if (CACHE8) widen(smem, bars, warp - 1);
    }
    return;
  }
  setmaxnreg_inc<MATH_REGISTERS>();
  int half = warp / 4 - 1;  // which 64 query vectors
  auto my_turn = [&] { if (TURNS) named_sync(1 + half, 256); };
  auto next_turn = [&] { if (TURNS) named_arrive(1 + (half + 1) % MATH, 256); };
  if (half == MATH - 1) next_turn();  // the first may begin
  float o[D / 2], s[L / 2], top[2], sum[2], shrink[2];
  uint32_t p[L / 16][4];
  int step = 0;
  for (int turn = 0;; ++turn) {
    int stage = turn % Q_STAGES;
    mbar_wait(&bars.q_full[stage], (turn / Q_STAGES) & 1, "attend: q_full");
    Item item = bars.item[stage];
    if (item.steps == 0) break;
    uint8_t* q_here = smem + stage * Q_BYTES;
    uint32_t k0 = smem_u32(smem + OFF_K), v0 = smem_u32(smem + OFF_V);
    if (item.count * GROUP <= half * 64) {  // none of its vectors is a token's: it lets the others have their turns
      for (int i = 0; i < item.steps; ++i, ++step) {
        mbar_wait(&bars.k_full[step & 1], (step >> 1) & 1, "skip: k_full");
        my_turn();
        next_turn();
        if (lane == 0) mbar_arrive(&bars.k_free[step & 1]);
        mbar_wait(&bars.v_full[step & 1], (step >> 1) & 1, "skip: v_full");
        if (lane == 0) mbar_arrive(&bars.v_free[step & 1]);
      }
      __syncwarp();
      if (lane == 0) mbar_arrive(&bars.q_free[stage]);
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

    mbar_wait(&bars.k_full[step & 1], (step >> 1) & 1, "attend: k_full");
    my_turn();
    wgmma_fence();
    issue_scores(s, q, k0 + (step & 1) * KV_BYTES);
    next_turn();
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
      my_turn();
      wgmma_fence();
      issue_scores(s, q, k0 + (step & 1) * KV_BYTES);
      mbar_wait(&bars.v_full[before], parity, "attend: v_full");
      issue_values(o, p, v0 + before * KV_BYTES);
      next_turn();
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
#if LAZY
      if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f))
#endif
      UNROLL for (int i = 0; i < D / 2; ++i) o[i] *= shrink[(i >> 1) & 1];
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
    store(q_here, o, sum, item, half, y, y_stride);
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.q_free[stage]);
  }
}
