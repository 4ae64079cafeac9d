// One row times weights W[N, K] of 16 or 8 bits, which stay rows as the checkpoint has them.
//
// A block takes neighbouring outputs, whose weights are one piece of memory: one thread copies it into a ring in shared
// memory, eight warps share every row of weights, the row of x in registers. Launched dependently, the ring fills
// before x is there. It is less than half of a multiprocessor's shared memory, so that the next kernel's blocks find
// room and start to copy while this kernel's last ones multiply. Rings of 48, 64 and 192 KiB, a trigger at the last
// copy and a warp a row were slower (docs/NOTES.md).
//
//   FP8   1: weights are e4m3 with a scale each; x becomes e4m3 with one scale, as its largest is 448 (entry gemv_fp8);
//         2: x is e4m3 with a scale for every 128 inputs, weights with one for every square of 128 (gemv_fp8_block)
//   NORM  0: x as it is; 1: its RMS norm; 2: the norm of x + residual, which block 0 writes to residual_out;
//         3: silu(g) * u, where x has K values g, then K values u
//   GATE  1: y[i] = silu(g[i]) * u[i], where the product has n values g, then n values u
//   WIDE  1: y is float32 (entry gemv_wide)
#include "hopper.h"

#ifndef K
#error "K: inputs"
#endif
constexpr int WARPS = 8, THREADS = WARPS * 32, ROW = FP8 ? K : K * 2;
constexpr int PIECE = FP8 ? 16 : 8;  // inputs of which weights are 16 bytes
constexpr int CHUNKS = (K + PIECE * THREADS - 1) / (PIECE * THREADS);  // pieces of a thread; of the last some lack one
constexpr int PER = CHUNKS * PIECE;
constexpr int RING = 96 << 10, MOST = 24 << 10;  // bytes of the ring and of a stage
constexpr int rows_of_a_stage() {
  int rows = GATE ? 2 : 1;
  while (rows < 8 && 2 * rows * ROW <= MOST) rows *= 2;
  return rows;
}
constexpr int ROWS = rows_of_a_stage(), OUTS = GATE ? ROWS / 2 : ROWS, STAGE = ROWS * ROW;
constexpr int STAGES = RING / STAGE < 32 ? RING / STAGE : 32, FLUSH = 8;  // stages whose sums are written together
constexpr int PART = FLUSH * ROWS * WARPS;
constexpr int OFF_PART = STAGES * STAGE, OFF_WARPS = OFF_PART + 2 * PART * 4, OFF_BARS = OFF_WARPS + 2 * WARPS * 4;
constexpr int SHARED = OFF_BARS + STAGES * 16 + 1024;  // 1024: the base is aligned by hand
static_assert(!(FP8 && GATE) && !(FP8 == 2 && (NORM || K % 128)) && K % PIECE == 0 && STAGES >= 2 && FLUSH * OUTS <= THREADS && OFF_BARS % 8 == 0, "shape");
LAUNCH_FACTS(THREADS + 32, SHARED, 1);

// Whether thread t has inputs in a chunk, and its first eighth input there.
__device__ __forceinline__ bool holds(int chunk, int t) {
  return (chunk + 1) * THREADS * PIECE <= K || (chunk * THREADS + t) * PIECE < K;
}
__device__ __forceinline__ int input_of(int eight, int t) {
  return (eight / (PIECE / 8) * THREADS + t) * PIECE + eight % (PIECE / 8) * 8;
}
__device__ __forceinline__ void widen8(float* to, Int4 v) {
  uint32_t two[4] = {(uint32_t)v.x, (uint32_t)v.y, (uint32_t)v.z, (uint32_t)v.w};
  UNROLL for (int j = 0; j < 4; ++j) { to[2 * j] = low2(two[j]); to[2 * j + 1] = high2(two[j]); }
}

// A piece of weights.
__device__ __forceinline__ void widen_weights(float (&to)[PIECE], Int4 v) {
#if FP8
  uint32_t four[4] = {(uint32_t)v.x, (uint32_t)v.y, (uint32_t)v.z, (uint32_t)v.w};
  UNROLL for (int j = 0; j < 4; ++j) {
    widen_fp8(to + 4 * j, four[j] & 0xffff);
    widen_fp8(to + 4 * j + 2, four[j] >> 16);
  }
#else
  widen8(to, v);
#endif
}

// The one thread that copies. Weights are parameters, so it waits for no kernel.
__device__ __forceinline__ void feed(uint8_t* ring, uint64_t* full, uint64_t* free, const uint8_t* weight, int n,
                                     int from, int count) {
  for (int i = 0; i * OUTS < count; ++i) {
    int s = i % STAGES;
    uint32_t bytes = min(OUTS, count - i * OUTS) * ROW;
    const uint8_t* rows = weight + (int64_t)(from + i * OUTS) * ROW;
    mbar_wait(&free[s], ((i / STAGES) & 1) ^ 1, "feed: free");
    mbar_expect(&full[s], GATE ? 2 * bytes : bytes);
    bulk_load(ring + s * STAGE, rows, &full[s], bytes);
    if (GATE) bulk_load(ring + s * STAGE + OUTS * ROW, rows + (int64_t)n * ROW, &full[s], bytes);
  }
}

// The largest of all multiplying threads' values, or their sum.
template <bool LARGEST> __device__ __forceinline__ float over_threads(float mine, float* of_warps) {
  UNROLL for (int d = 16; d; d /= 2) {
    float other = __shfl_xor_sync(~0u, mine, d);
    mine = LARGEST ? fmaxf(mine, other) : mine + other;
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  named_sync(1, THREADS);
  float all = of_warps[0];
  UNROLL for (int w = 1; w < WARPS; ++w) all = LARGEST ? fmaxf(all, of_warps[w]) : all + of_warps[w];
  return all;
}

__device__ __forceinline__ Int4 narrow8(const float* from) {
  int p[4];
  UNROLL for (int j = 0; j < 4; ++j) p[j] = (int)pack2(from[2 * j], from[2 * j + 1]);
  return Int4{p[0], p[1], p[2], p[3]};
}

// Eight inputs as they are before a norm. Sums are kept as they are stored, as the ops one by one have them.
__device__ __forceinline__ void read8(float* to, int at, const uint16_t* x, const uint16_t* residual,
                                      uint16_t* residual_out) {
  widen8(to, load_written(x + at));
  if (NORM == 2) {
    float other[8];
    widen8(other, load_written(residual + at));
    UNROLL for (int j = 0; j < 8; ++j) to[j] += other[j];
    Int4 total = narrow8(to);
    if (blockIdx.x == 0) *(Int4*)(residual_out + at) = total;
    widen8(to, total);
  }
  if (NORM == 3) {
    float up[8];
    widen8(up, load_written(x + K + at));
    UNROLL for (int j = 0; j < 8; ++j) to[j] = to[j] / (1.f + exp2_fast(-1.44269504f * to[j])) * up[j];
  }
}

// A thread's part of the row that is multiplied; returns the row's scale.
__device__ __forceinline__ float prepare(float (&xs)[PER], const Int4* gains, float* of_warps, const uint16_t* x,
                                         const uint16_t* residual, uint16_t* residual_out, float eps, float offset) {
  int t = threadIdx.x;
  float sum = 0, largest = 0;
  UNROLL for (int e = 0; e < PER / 8; ++e) {
    float* mine = xs + 8 * e;
    UNROLL for (int j = 0; j < 8; ++j) mine[j] = 0;
    if (!holds(e / (PIECE / 8), t)) continue;
    read8(mine, input_of(e, t), x, residual, residual_out);
    UNROLL for (int j = 0; j < 8; ++j) sum += mine[j] * mine[j];
  }
  if (NORM == 1 || NORM == 2) {
    float scale = rsqrtf(over_threads<false>(sum, of_warps) * (1.f / K) + eps);
    UNROLL for (int e = 0; e < PER / 8; ++e) {
      float gain[8];
      widen8(gain, gains[e]);
      UNROLL for (int j = 0; j < 8; ++j) xs[8 * e + j] *= scale * (gain[j] + offset);
    }
  }
  if (NORM) {  // what ops one by one store in 16 bits
    UNROLL for (int e = 0; e < PER / 8; ++e) widen8(xs + 8 * e, narrow8(xs + 8 * e));
  }
  if (!FP8) return 1.f;
  UNROLL for (int e = 0; e < PER / 8; ++e) {
    UNROLL for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(xs[8 * e + j]));
  }
  float scale = fmaxf(over_threads<true>(largest, of_warps + WARPS) * (1.f / 448), 1e-12f), inverse = 1.f / scale;
  UNROLL for (int j = 0; j < PER; j += 2) widen_fp8(xs + j, pack_fp8(xs[j] * inverse, xs[j + 1] * inverse));
  return scale;
}

// The same of a row that is e4m3 already, times the scales of its groups.
__device__ __forceinline__ void take(float (&xs)[PER], const uint8_t* x, const float* x_scale) {
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    int piece = c * THREADS + threadIdx.x;
    float mine[PIECE], scale = 0;
    Int4 raw{0, 0, 0, 0};
    if (holds(c, threadIdx.x)) {
      raw = load_written((const uint16_t*)x + piece * 8);
      scale = load_written_one(x_scale + piece / 8);
    }
    widen_weights(mine, raw);
    UNROLL for (int j = 0; j < PIECE; ++j) xs[PIECE * c + j] = mine[j] * scale;
  }
}

// A thread's scales of the weights of a row of squares.
__device__ __forceinline__ void scales_of(float (&scales)[CHUNKS], const float* weight_scale, int square) {
  UNROLL for (int c = 0; c < CHUNKS; ++c) {
    scales[c] = holds(c, threadIdx.x) ? weight_scale[square * (K / 128) + (c * THREADS + threadIdx.x) / 8] : 0.f;
  }
}

// Sums over the lanes of ROWS values at once: lane l ends with value l / (32 / ROWS).
__device__ __forceinline__ float add_lanes(float (&sum)[ROWS]) {
  int lane = threadIdx.x % 32;
  UNROLL for (int many = ROWS, d = 16; d; d /= 2) {
    if (many > 1) {
      many /= 2;
      UNROLL for (int j = 0; j < (ROWS + 1) / 2; ++j) if (j < many) {
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

__device__ __forceinline__ float add_warps(const float* part) {
  float sum = 0;
  UNROLL for (int w = 0; w < WARPS; ++w) sum += part[w];
  return sum;
}

__device__ __forceinline__ void store(float* y, float v) { *y = v; }
__device__ __forceinline__ void store(uint16_t* y, float v) { *y = (uint16_t)pack2(v, 0.f); }

template <class Y>
__device__ __forceinline__ void gemv_body(const void* weight, const float* weight_scale, const uint16_t* x,
                                          const float* x_scale, const uint16_t* residual, const uint16_t* gain, const uint16_t* bias, Y* y,
                                          uint16_t* residual_out, int n, float eps, float offset) {
  uint8_t* ring = smem_base();
  float* part = (float*)(ring + OFF_PART);
  float* of_warps = (float*)(ring + OFF_WARPS);
  uint64_t* full = (uint64_t*)(ring + OFF_BARS);
  uint64_t* free = full + STAGES;
  int t = threadIdx.x, warp = t / 32, lane = t % 32;
  int from = (int)((int64_t)n * blockIdx.x / gridDim.x), count = (int)((int64_t)n * (blockIdx.x + 1) / gridDim.x) - from;
  if (t == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbar_init(&full[i], 1);
      mbar_init(&free[i], WARPS);
    }
    mbar_fence_init();
    dependents_go();
  }
  __syncthreads();
  if (warp == WARPS) {
    if (lane == 0) feed(ring, full, free, (const uint8_t*)weight, n, from, count);
    return;
  }
  Int4 gains[PER / 8];
  UNROLL for (int e = 0; e < PER / 8; ++e) {
    gains[e] = Int4{0, 0, 0, 0};
    if ((NORM == 1 || NORM == 2) && holds(e / (PIECE / 8), t)) gains[e] = load_constant(gain + input_of(e, t));
  }
  dependence_wait();
  float xs[PER];
  float scale = 1.f, squares[CHUNKS];
  if (FP8 == 2) {
    take(xs, (const uint8_t*)x, x_scale);
    scales_of(squares, weight_scale, from / 128);
  } else {
    scale = prepare(xs, gains, of_warps, x, residual, residual_out, eps, offset);
  }

  int stages = ceil_div(count, OUTS);
  for (int i = 0; i < stages; ++i) {
    int s = i % STAGES;
    float* mine = part + (i / FLUSH & 1) * PART;  // the parts of two flushes, so that one barrier a flush is enough
    float sum[ROWS];
    mbar_wait(&full[s], (i / STAGES) & 1, "multiply: full");
    UNROLL for (int row = 0; row < ROWS; ++row) {
      sum[row] = 0;
      int out = from + i * OUTS + row;
      if (FP8 == 2 && out % 128 == 0 && out < n) scales_of(squares, weight_scale, out / 128);
      UNROLL for (int c = 0; c < CHUNKS; ++c) if (holds(c, t)) {
        float w[PIECE], dot = 0;
        widen_weights(w, *(const Int4*)(ring + s * STAGE + row * ROW + (c * THREADS + t) * 16));
        UNROLL for (int j = 0; j < PIECE; ++j) (FP8 == 2 ? dot : sum[row]) += w[j] * xs[PIECE * c + j];
        if (FP8 == 2) sum[row] += dot * squares[c];
      }
    }
    fence_async_proxy();  // reads of this stage come before the copies that fill it again
    __syncwarp();
    if (lane == 0) mbar_arrive(&free[s]);
    float total = add_lanes(sum);
    if (lane % (32 / ROWS) == 0) mine[((i % FLUSH) * ROWS + lane / (32 / ROWS)) * WARPS + warp] = total;
    if (i % FLUSH < FLUSH - 1 && i < stages - 1) continue;
    named_sync(1, THREADS);
    int first = i / FLUSH * FLUSH * OUTS, stage = t / OUTS, place = t % OUTS;
    if (t >= FLUSH * OUTS || first + t >= count) continue;
    int out = from + first + t;
    float v = add_warps(mine + (stage * ROWS + place) * WARPS);
    if (FP8 == 1) v *= scale * weight_scale[out];
    if (BIAS) v += low2(bias[out]);
    if (GATE) {
      float up = add_warps(mine + (stage * ROWS + OUTS + place) * WARPS);
      if (BIAS) up += low2(bias[n + out]);
      v = v / (1.f + exp2_fast(-1.44269504f * v)) * up;
    }
    store(y + out, v);
  }
}

#if FP8 == 2
extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
gemv_fp8_block(const uint8_t* weight, const float* weight_scale, const uint8_t* x, const float* x_scale,
               const uint16_t* bias, uint16_t* y, int n) {
  gemv_body(weight, weight_scale, (const uint16_t*)x, x_scale, nullptr, nullptr, bias, y, nullptr, n, 0.f, 0.f);
}
#elif FP8
extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
gemv_fp8(const uint8_t* weight, const float* weight_scale, const uint16_t* x, const uint16_t* residual,
         const uint16_t* gain, const uint16_t* bias, uint16_t* y, uint16_t* residual_out, int n, float eps,
         float offset) {
  gemv_body(weight, weight_scale, x, nullptr, residual, gain, bias, y, residual_out, n, eps, offset);
}
#elif WIDE
extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
gemv_wide(const uint16_t* weight, const uint16_t* x, const uint16_t* residual, const uint16_t* gain,
          const uint16_t* bias, float* y, uint16_t* residual_out, int n, float eps, float offset) {
  gemv_body(weight, nullptr, x, nullptr, residual, gain, bias, y, residual_out, n, eps, offset);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
gemv(const uint16_t* weight, const uint16_t* x, const uint16_t* residual, const uint16_t* gain, const uint16_t* bias,
     uint16_t* y, uint16_t* residual_out, int n, float eps, float offset) {
  gemv_body(weight, nullptr, x, nullptr, residual, gain, bias, y, residual_out, n, eps, offset);
}
#endif
