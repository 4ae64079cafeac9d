// Products of few tokens with dense weights, for Hopper. Weights are the long side of the matrix instructions (64 outputs
// a warpgroup), tokens the short one, so that little is padded and memory sets the pace.
//
// No kernel writes weights, so those of the first stages are asked for before the wait for the kernels before; half of a
// multiprocessor's shared memory is left to the next kernel, which does the same. Where outputs are few, the blocks of a
// cluster share the inputs of a tile and add up their sums through each other's shared memory, in the order of ranks.
//
// Columns of a product that are no token's may hold anything: nobody stores them, and they touch no other column.
#include "wgmma.h"

// TOKENS: columns of a product. WAYS: warpgroups, 64 outputs of a tile each. SPLIT: blocks of a cluster. FP8: operands are
// e4m3, else 16-bit floats. SCALES: of e4m3; 1: of tokens and of outputs, 2: of tokens and groups of 128 inputs, and of
// squares of 128. WIDE: y is float32.
constexpr int BK = FP8 ? 128 : 64;  // 128 bytes of a row
constexpr int BN = 64 * WAYS, PER = TOKENS / 2, WORKERS = 128 * WAYS, THREADS = WORKERS + 32;
constexpr int W_BYTES = BN * 128, X_BYTES = TOKENS * 128, STAGE = W_BYTES + X_BYTES;
constexpr int PITCH = BN + 4;  // numbers of a token's sums in shared memory
constexpr int SUM_BYTES = TOKENS * PITCH * 4, BAR_BYTES = 320;
constexpr int ROOM = (111 * 1024 - SUM_BYTES - BAR_BYTES - 1024) / STAGE, STAGES = ROOM < 16 ? ROOM : 16;
constexpr int OFF_SUMS = STAGES * STAGE, OFF_BARS = OFF_SUMS + SUM_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
constexpr int MINE = BN / SPLIT, FOURS = MINE / 4;  // outputs that a block of a cluster finishes

struct Bars { uint64_t full[16], free[16], summed, taken; };
static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "columns of a product");
static_assert(sizeof(Bars) <= BAR_BYTES && STAGES >= 3 && 2 * (SHARED + 1024) <= 228 * 1024, "shared memory");
static_assert(MINE % 4 == 0 && SPLIT <= 8 && (FP8 ? SCALES == 1 || SCALES == 2 : SCALES == 0), "macros");

LAUNCH_FACTS(THREADS, SHARED, SPLIT);

// A call's operands; scales and bias are null where there are none. Strides in elements.
struct Call { const float* x_scale; const float* weight_scale; const uint16_t* bias; void* y; int tokens, outputs, inputs, y_stride; };

// A block's steps, over all tiles of its cluster one after the other.
struct Work {
  int cluster, clusters, tiles, first, each;  // first: step of a tile that this block begins with, and how many it takes

  __device__ __forceinline__ Work(const Call& call)
      : cluster(blockIdx.x / SPLIT), clusters(gridDim.x / SPLIT), tiles(ceil_div(call.outputs, BN)) {
    int steps = ceil_div(call.inputs, BK), rank = SPLIT > 1 ? cluster_rank() : 0;
    first = rank * steps / SPLIT;
    each = (rank + 1) * steps / SPLIT - first;
  }
  __device__ __forceinline__ int all() const { return cluster < tiles ? ceil_div(tiles - cluster, clusters) * each : 0; }
};

__device__ __forceinline__ void copy_weights(uint8_t* smem, Bars& bars, const TensorMap* map, const Work& work, int n) {
  int s = n % STAGES;
  mbar_expect(&bars.full[s], STAGE);
  tma_2d(smem + s * STAGE, map, &bars.full[s], (work.first + n % work.each) * BK, (work.cluster + n / work.each * work.clusters) * BN);
}
__device__ __forceinline__ void copy_tokens(uint8_t* smem, Bars& bars, const TensorMap* map, const Work& work, int n) {
  int s = n % STAGES;
  tma_2d(smem + s * STAGE + W_BYTES, map, &bars.full[s], (work.first + n % work.each) * BK, 0);
}

// Scales of a step that a thread's sums need: of its tokens and of the tile's square of weights.
struct GroupScales {
  const float* of_tokens; const float* of_square; int token[TOKENS / 4]; float square, tokens[TOKENS / 4];

  __device__ __forceinline__ GroupScales(const Call& call, int column, int step) : of_tokens(call.x_scale) {
    int lane = threadIdx.x % 32, groups = call.inputs / 128;
    of_square = call.weight_scale + (int64_t)(column / 128) * groups;
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) token[h] = min(8 * (h / 2) + 2 * (lane % 4) + (h & 1), call.tokens - 1) * groups;
    load(step);
  }
  __device__ __forceinline__ void load(int step) {
    square = of_square[step];
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) tokens[h] = load_written_one(of_tokens + token[h] + step);
  }
};

// This block's sums of a tile. A thread has rows 64 * way + 16 * warp + lane / 4 (and that + 8) of the weights for tokens
// 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
__device__ __forceinline__ void sum_up(float (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, const Work& work, int column, int& step) {
  int lane = threadIdx.x % 32, way = threadIdx.x / 128;
  uint32_t base = smem_u32(smem);
  const uint64_t form = operand_128b(16, 1024);
#if FP8
  UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
#endif
#if SCALES == 2
  GroupScales scales(call, min(column + 64 * way, call.outputs - 1), work.first);
#endif
  for (int i = 0; i < work.each; ++i, ++step) {
    int s = step % STAGES;
    uint32_t a = base + s * STAGE + way * 8192, b = base + s * STAGE + W_BYTES;
    mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
    wgmma_fence();
#if FP8  // sums of 8-bit products keep 14 bits: those of 128 inputs are added in fp32
    float part[PER];
    UNROLL for (int j = 0; j < 4; ++j) wgmma_ss_e4m3(part, at(form, a + j * 32), at(form, b + j * 32), j != 0);
    wgmma_commit();
#if SCALES == 2
    float scale[TOKENS / 4];
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) scale[h] = scales.tokens[h] * scales.square;
    scales.load(work.first + min(i + 1, work.each - 1));
#endif
    wgmma_wait<0>();
    keep(part);
    if (lane == 0) mbar_arrive(&bars.free[s]);
#if SCALES == 2
    UNROLL for (int j = 0; j < PER; ++j) acc[j] += part[j] * scale[2 * (j / 4) + (j & 1)];
#else
    UNROLL for (int j = 0; j < PER; ++j) acc[j] += part[j];
#endif
#else
    UNROLL for (int j = 0; j < 4; ++j) wgmma_ss_16bit(acc, at(form, a + j * 32), at(form, b + j * 32), j != 0 ? 1 : i != 0);
    wgmma_commit();
    wgmma_wait<1>();  // the product before this one is done
    if (i > 0 && lane == 0) mbar_arrive(&bars.free[(step - 1) % STAGES]);
#endif
  }
#if !FP8
  wgmma_wait<0>();
  keep(acc);
  if (lane == 0) mbar_arrive(&bars.free[(step - 1) % STAGES]);
#endif
}

// Four outputs of a token from four sums: scaled, the bias added, rounded.
__device__ __forceinline__ void store(Float4 sum, const Call& call, int token, int column) {
  float v[4] = {sum.x, sum.y, sum.z, sum.w};
#if SCALES == 1
  float of_token = load_written_one(call.x_scale + token);
  UNROLL for (int j = 0; j < 4; ++j) v[j] *= of_token * call.weight_scale[column + j];
#endif
  if (call.bias != nullptr) UNROLL for (int j = 0; j < 4; ++j) v[j] += low2(call.bias[column + j]);
  int64_t place = (int64_t)token * call.y_stride + column;
#if WIDE
  *(Float4*)((float*)call.y + place) = Float4{v[0], v[1], v[2], v[3]};
#else
  *(Two*)((uint16_t*)call.y + place) = Two{pack2(v[0], v[1]), pack2(v[2], v[3])};
#endif
}

// Adds up what the blocks of a cluster have of a tile, each its part of the outputs.
__device__ __forceinline__ void finish(const float (&acc)[PER], float* sums, Bars& bars, const Call& call, int column, int turn) {
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, t = threadIdx.x;
  if (SPLIT > 1 && turn > 0) mbar_wait_cluster(&bars.taken, (turn - 1) & 1, "finish: taken");
  UNROLL for (int j = 0; j < PER; ++j) sums[(8 * (j / 4) + 2 * (lane % 4) + (j & 1)) * PITCH + row + (j & 2) * 4] = acc[j];
  named_sync(1, WORKERS);
  int rank = 0;
  if (SPLIT > 1) {
    rank = cluster_rank();
    if (t < SPLIT) mbar_arrive_at(&bars.summed, t);
    mbar_wait_cluster(&bars.summed, turn & 1, "finish: summed");
  }
  for (int c = t; c < call.tokens * FOURS; c += WORKERS) {
    int token = c / FOURS, inside = rank * MINE + c % FOURS * 4;
    if (column + inside >= call.outputs) continue;
    const float* from = sums + token * PITCH + inside;
    Float4 sum = SPLIT > 1 ? load_of_rank(from, 0) : *(const Float4*)from;
    UNROLL for (int r = 1; r < SPLIT; ++r) {
      Float4 other = load_of_rank(from, r);
      sum = Float4{sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
    }
    store(sum, call, token, column + inside);
  }
  named_sync(1, WORKERS);
  if (SPLIT > 1 && t < SPLIT) mbar_arrive_at(&bars.taken, t);
}

__device__ __forceinline__ void run(const TensorMap* x_map, const TensorMap* w_map, const Call& call) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  Work work(call);
  int early = min(work.all(), STAGES);
  bool feeds = threadIdx.x == WORKERS;
  dependents_go();
  if (feeds) {
    for (int i = 0; i < STAGES; ++i) { mbar_init(&bars.full[i], 1); mbar_init(&bars.free[i], 4 * WAYS); }
    mbar_init(&bars.summed, SPLIT);
    mbar_init(&bars.taken, SPLIT);
    mbar_fence_init();
    for (int n = 0; n < early; ++n) copy_weights(smem, bars, w_map, work, n);
  }
  __syncthreads();
  if (SPLIT > 1) cluster_sync();  // arrivals from other blocks find barriers
  dependence_wait();
  if (feeds) {
    for (int n = 0; n < early; ++n) copy_tokens(smem, bars, x_map, work, n);
    for (int n = early; n < work.all(); ++n) {
      mbar_wait(&bars.free[n % STAGES], (n / STAGES - 1) & 1, "feed: free");
      copy_weights(smem, bars, w_map, work, n);
      copy_tokens(smem, bars, x_map, work, n);
    }
  } else if (threadIdx.x < WORKERS) {
    int step = 0, turn = 0;
    for (int tile = work.cluster; tile < work.tiles; tile += work.clusters, ++turn) {
      float acc[PER];
      sum_up(acc, smem, bars, call, work, tile * BN, step);
      finish(acc, (float*)(smem + OFF_SUMS), bars, call, tile * BN, turn);
    }
  }
  if (SPLIT > 1) {
    __syncwarp();
    cluster_sync();  // others may still read this block's sums
  }
}

#if FP8
extern "C" __global__ void __launch_bounds__(THREADS, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few_fp8(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const float* x_scale, const float* weight_scale,
               const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(&x_map, &w_map, Call{x_scale, weight_scale, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif WIDE
extern "C" __global__ void __launch_bounds__(THREADS, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few_wide(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* bias, float* y, int tokens,
                int outputs, int inputs, int y_stride) {
  run(&x_map, &w_map, Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* bias, uint16_t* y, int tokens,
           int outputs, int inputs, int y_stride) {
  run(&x_map, &w_map, Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#endif
