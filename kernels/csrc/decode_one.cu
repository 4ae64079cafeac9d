// From one token's q/k/v projection to its attention over a paged cache: head norms, rotation, cache write, and
// FlashDecoding (Dao et al. 2023) whose last block of a KV head adds the parts.
//
// The grid is KV heads x SPLITS; a block takes an equal share of the row's keys. LANES threads hold a key of 16-byte
// pieces, a thread NB keys at once, and of those of the block's next keys while it works at these. All keys but the
// token's own are there before the kernels ahead have ended, so the first ones are on their way before the wait.
// The block that has the last share makes the token's key and value and keeps them.
#include "hopper.h"

constexpr int WARPS = 8, THREADS = WARPS * 32, LANES = D / 8, NB = LANES / GROUP < 4 ? LANES / GROUP : 4;
constexpr int VALUES = GROUP * NB;                    // scores that LANES threads make at once
constexpr int SUBS = 32 / LANES, TILE = WARPS * SUBS * NB;  // keys of a block at once
constexpr int RUN = 16;                               // shares are multiples of it
constexpr int HEADS = KV_HEADS * GROUP, EACH = D / 32;  // features of a lane where a warp has a head
constexpr int OFF_Q = 0, OFF_K = GROUP * D * 4, OFF_TOP = OFF_K + D * 2, OFF_SUM = OFF_TOP + WARPS * GROUP * 4;
constexpr int OFF_ACC = (OFF_SUM + WARPS * GROUP * 4 + 15) / 16 * 16, OFF_LAST = OFF_ACC + WARPS * GROUP * D * 4;
constexpr int SHARED = OFF_LAST + 16 + 1024;
static_assert((D == 64 || D == 128) && (GROUP == 1 || GROUP == 2 || GROUP == 4) && PAGE % NB == 0 && RUN % NB == 0, "shape");
static_assert(SPLITS >= 1 && SPLITS <= 32 && WINDOW >= 0, "shares");
LAUNCH_FACTS(THREADS, SHARED, 1);

__device__ __forceinline__ void widen8(float* to, Int4 v) {
  uint32_t two[4] = {(uint32_t)v.x, (uint32_t)v.y, (uint32_t)v.z, (uint32_t)v.w};
  UNROLL for (int j = 0; j < 4; ++j) { to[2 * j] = low2(two[j]); to[2 * j + 1] = high2(two[j]); }
}

// A thread's pieces of NB keys (or values) from `position` on, of those from `low` to before `high`; others are zeros.
__device__ __forceinline__ void load(Int4 (&to)[NB], const uint16_t* cache, int page, int head, int position, int low,
                                     int high) {
  int lane = threadIdx.x % LANES;
  UNROLL for (int i = 0; i < NB; ++i) {
    int at = position + i;
    int64_t slot = (int64_t)page * PAGE + at % PAGE;
    to[i] = Int4{0, 0, 0, 0};
    if (at >= low && at < high) to[i] = load_kept(cache + (slot * KV_HEADS + head) * D + lane * 8);
  }
}

// A warp's head, EACH features a lane: its norm by the weights g, then the rotation by the token's angles.
__device__ __forceinline__ void turn(float (&x)[EACH], const float (&g)[EACH], const float* rows, float eps) {
  int lane = threadIdx.x % 32;
  if (NORM) {
    float power = 0;
    UNROLL for (int j = 0; j < EACH; ++j) power += x[j] * x[j];
    UNROLL for (int d = 16; d; d /= 2) power += __shfl_xor_sync(~0u, power, d);
    float scale = rsqrtf(power * (1.f / D) + eps);
    UNROLL for (int j = 0; j < EACH; ++j) x[j] *= scale * g[j];
  }
  UNROLL for (int j = 0; j < EACH; ++j) {
    int angle = (lane % 16) * EACH + j;
    float cosine = load_written_one(rows + angle), sine = load_written_one(rows + D / 2 + angle);
    float other = __shfl_xor_sync(~0u, x[j], 16);
    x[j] = x[j] * cosine + (lane < 16 ? -other : other) * sine;
  }
}

// Sums over LANES threads of VALUES values at once: lane l ends with value l / (LANES / VALUES).
__device__ __forceinline__ float add_lanes(float (&sum)[VALUES]) {
  int lane = threadIdx.x % 32;
  UNROLL for (int many = VALUES, d = LANES / 2; d; d /= 2) {
    if (many > 1) {
      many /= 2;
      UNROLL for (int j = 0; j < (VALUES + 1) / 2; ++j) if (j < many) {
        bool upper = lane & d;
        float mine = upper ? sum[j + many] : sum[j], other = upper ? sum[j] : sum[j + many];
        sum[j] = mine + __shfl_xor_sync(~0u, other, d);
      }
    } else {
      sum[0] += __shfl_xor_sync(~0u, sum[0], d);
    }
  }
  return sum[0];
}
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.f : top; }  // nothing seen yet

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_one(const uint16_t* qkv, const float* rows, const uint16_t* q_norm, const uint16_t* k_norm, const int* kv_slot,
           uint16_t* k_cache, uint16_t* v_cache, const int* page_table, const int* context_len, uint16_t* y,
           float* sums, float* stats, int* arrived, float eps, float offset, float scale_log2) {
  uint8_t* smem = smem_base();
  float* q_shared = (float*)(smem + OFF_Q);
  uint16_t* k_shared = (uint16_t*)(smem + OFF_K);
  float* tops = (float*)(smem + OFF_TOP);
  float* denominators = (float*)(smem + OFF_SUM);
  float* accs = (float*)(smem + OFF_ACC);
  int* last = (int*)(smem + OFF_LAST);
  int t = threadIdx.x, warp = t / 32, lane = t % 32, piece = t % LANES, sub = t / LANES;
  int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
  if (t == 0) dependents_go();
  int length = context_len[0], low = WINDOW > 0 ? max(length - WINDOW, 0) : 0, start = low / NB * NB;
  int share = max(ceil_div(ceil_div(length - start, RUN), SPLITS), 1) * RUN, parts = max(ceil_div(length - start, share), 1);
  int begin = start + split * share, stop = min(begin + share, length), own = length - 1;
  // Blocks without a share stay, too, until the kernels ahead have ended. If they leave at once, two blocks of the next
  // product find room on their multiprocessor and others stay empty: all products behind it took a tenth longer.
  if (split >= parts) {
    dependence_wait();
    return;
  }

  int position = begin + sub * NB;
  Int4 k[NB], v[NB];
  int page = position < stop ? page_table[position / PAGE] : 0;
  load(k, k_cache, page, head, position, low, min(stop, own));
  load(v, v_cache, page, head, position, low, min(stop, own));
  float gains[2][EACH];
  UNROLL for (int j = 0; j < EACH; ++j) {
    gains[0][j] = NORM ? low2(q_norm[lane * EACH + j]) + offset : 1.f;
    gains[1][j] = NORM ? low2(k_norm[lane * EACH + j]) + offset : 1.f;
  }
  dependence_wait();

  bool keeps = own >= begin && own < stop;
  for (int item = warp; item < GROUP + keeps; item += WARPS) {
    bool is_q = item < GROUP;
    const uint16_t* from = qkv + (is_q ? head * GROUP + item : HEADS + head) * D;
    float x[EACH], g[EACH];
    UNROLL for (int j = 0; j < EACH; ++j) g[j] = is_q ? gains[0][j] : gains[1][j];
    UNROLL for (int j = 0; j < EACH; j += 2) {
      uint32_t two = load_written_two(from + lane * EACH + j);
      x[j] = low2(two);
      x[j + 1] = high2(two);
    }
    turn(x, g, rows, eps);
    UNROLL for (int j = 0; j < EACH; j += 2) {
      if (is_q) {
        q_shared[item * D + lane * EACH + j] = x[j] * scale_log2;
        q_shared[item * D + lane * EACH + j + 1] = x[j + 1] * scale_log2;
      } else {
        *(uint32_t*)(k_shared + lane * EACH + j) = pack2(x[j], x[j + 1]);
      }
    }
  }
  __syncthreads();

  float q[GROUP][8], acc[GROUP][8];
  UNROLL for (int h = 0; h < GROUP; ++h) UNROLL for (int j = 0; j < 8; ++j) {
    q[h][j] = q_shared[h * D + piece * 8 + j];
    acc[h][j] = 0;
  }
  // A lane's value: of which of the NB keys, for which head; its head's maximum and sum of weights so far.
  constexpr int REPEAT = LANES / VALUES;
  int value = piece / REPEAT, key = value / GROUP, here = lane / LANES * LANES;
  float top = -INFINITY, denominator = 0;
  for (; begin < stop; begin += TILE) {
    position = begin + sub * NB;
    UNROLL for (int i = 0; i < NB; ++i) if (keeps && position + i == own) {
      k[i] = *(const Int4*)(k_shared + piece * 8);
      v[i] = load_written(qkv + (HEADS + KV_HEADS + head) * D + piece * 8);
      int64_t place = ((int64_t)kv_slot[0] * KV_HEADS + head) * D + piece * 8;
      *(Int4*)(k_cache + place) = k[i];
      *(Int4*)(v_cache + place) = v[i];
    }
    float scores[VALUES];
    UNROLL for (int i = 0; i < NB; ++i) {
      float w[8];
      widen8(w, k[i]);
      UNROLL for (int h = 0; h < GROUP; ++h) {
        float sum = 0;
        UNROLL for (int j = 0; j < 8; ++j) sum += q[h][j] * w[j];
        scores[i * GROUP + h] = sum;
      }
    }
    int next = position + TILE, next_page = next < stop ? page_table[next / PAGE] : 0;
    load(k, k_cache, next_page, head, next, low, min(stop, own));
    float score = add_lanes(scores);
    bool seen = position + key >= low && position + key < stop;
    score = seen ? score : -INFINITY;
    float higher = score;
    UNROLL for (int d = GROUP * REPEAT; d < LANES; d *= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, d));
    higher = fmaxf(higher, top);
    float weight = exp2_fast(score - base_of(higher)), shrink = exp2_fast(top - base_of(higher)), sum = weight;
    UNROLL for (int d = GROUP * REPEAT; d < LANES; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    denominator = denominator * shrink + sum;
    top = higher;
    UNROLL for (int h = 0; h < GROUP; ++h) {
      float s = __shfl_sync(~0u, shrink, here + h * REPEAT);
      UNROLL for (int j = 0; j < 8; ++j) acc[h][j] *= s;
    }
    UNROLL for (int i = 0; i < NB; ++i) {
      float w[8];
      widen8(w, v[i]);
      UNROLL for (int h = 0; h < GROUP; ++h) {
        float p = __shfl_sync(~0u, weight, here + (i * GROUP + h) * REPEAT);
        UNROLL for (int j = 0; j < 8; ++j) acc[h][j] += p * w[j];
      }
    }
    load(v, v_cache, next_page, head, next, low, min(stop, own));
  }

  // The warp's parts become one, then the block's.
  UNROLL for (int h = 0; h < GROUP; ++h) {
    float mine = __shfl_sync(~0u, top, here + h * REPEAT), weights = __shfl_sync(~0u, denominator, here + h * REPEAT);
    float higher = mine;
    UNROLL for (int d = LANES; d < 32; d *= 2) higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, d));
    float shrink = exp2_fast(mine - base_of(higher));
    weights *= shrink;
    UNROLL for (int j = 0; j < 8; ++j) acc[h][j] *= shrink;
    UNROLL for (int d = LANES; d < 32; d *= 2) {
      weights += __shfl_xor_sync(~0u, weights, d);
      UNROLL for (int j = 0; j < 8; ++j) acc[h][j] += __shfl_xor_sync(~0u, acc[h][j], d);
    }
    if (lane < LANES) UNROLL for (int j = 0; j < 8; ++j) accs[(warp * GROUP + h) * D + piece * 8 + j] = acc[h][j];
    if (lane == 0) {
      tops[warp * GROUP + h] = higher;
      denominators[warp * GROUP + h] = weights;
    }
  }
  __syncthreads();
  float* part = sums + (int64_t)blockIdx.x * GROUP * D;
  for (int pair = t; pair < GROUP * D / 2; pair += THREADS) {
    int h = pair / (D / 2), at = pair * 2;
    float higher = -INFINITY, weights = 0, a = 0, b = 0;
    UNROLL for (int w = 0; w < WARPS; ++w) higher = fmaxf(higher, tops[w * GROUP + h]);
    UNROLL for (int w = 0; w < WARPS; ++w) {
      float shrink = exp2_fast(tops[w * GROUP + h] - base_of(higher));
      weights += shrink * denominators[w * GROUP + h];
      a += shrink * accs[w * GROUP * D + at];
      b += shrink * accs[w * GROUP * D + at + 1];
    }
    if (parts == 1) {
      float one = length > 0 ? 1.f / weights : 0.f;  // a row without a token gives zeros
      *(uint32_t*)(y + head * GROUP * D + at) = pack2(a * one, b * one);
    } else {
      part[at] = a;
      part[at + 1] = b;
      if (at % D == 0) {
        stats[(blockIdx.x * GROUP + h) * 2] = higher;
        stats[(blockIdx.x * GROUP + h) * 2 + 1] = weights;
      }
    }
  }
  if (parts == 1) return;

  // The last block to arrive adds all parts of the head in their order.
  fence_gpu();
  __syncthreads();
  if (t == 0) {
    *last = atomicAdd(arrived + head, 1) == parts - 1;
    if (*last) arrived[head] = 0;
  }
  __syncthreads();
  if (!*last) return;
  fence_gpu();
  int first = head * SPLITS;
  for (int pair = t; pair < GROUP * D / 2; pair += THREADS) {
    int h = pair / (D / 2), at = pair * 2;
    float peaks[SPLITS], a[SPLITS], b[SPLITS], shares[SPLITS], higher = -INFINITY, weights = 0, x = 0, z = 0;
    UNROLL for (int p = 0; p < SPLITS; ++p) {
      bool there = p < parts;
      peaks[p] = there ? load_written_one(stats + ((first + p) * GROUP + h) * 2) : -INFINITY;
      shares[p] = there ? load_written_one(stats + ((first + p) * GROUP + h) * 2 + 1) : 0.f;
      a[p] = there ? load_written_one(sums + (int64_t)(first + p) * GROUP * D + at) : 0.f;
      b[p] = there ? load_written_one(sums + (int64_t)(first + p) * GROUP * D + at + 1) : 0.f;
    }
    UNROLL for (int p = 0; p < SPLITS; ++p) higher = fmaxf(higher, peaks[p]);
    UNROLL for (int p = 0; p < SPLITS; ++p) {
      float shrink = exp2_fast(peaks[p] - higher);
      weights += shrink * shares[p];
      x += shrink * a[p];
      z += shrink * b[p];
    }
    *(uint32_t*)(y + head * GROUP * D + at) = pack2(x / weights, z / weights);
  }
}
