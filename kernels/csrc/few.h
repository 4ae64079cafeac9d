// What products of few tokens with dense weights have in common, for Hopper. Weights are the long side of the matrix
// instructions (64 outputs of a tile), tokens the short one, so that little is padded and memory sets the pace.
//
// No kernel writes weights, so those of the first stages are asked for before the wait for the kernels before; half of a
// multiprocessor's shared memory is left to the next kernel, which does the same. Where outputs are few, the blocks of a
// cluster share the inputs of a tile and add up their sums through each other's shared memory, in the order of ranks.
//
// Columns of a product that are no token's may hold anything: nobody stores them, and they touch no other column.
#pragma once
#include "wgmma.h"

// TOKENS: columns of a product. SPLIT: blocks of a cluster. SCALES: 1: sums are scaled by token and output at the end. WIDE:
// y is float32. INT8: sums are integers, exact until they are scaled.
#ifndef INT8
#define INT8 0
#endif
#if INT8
typedef int Sum;
#else
typedef float Sum;
#endif
constexpr int BN = 64, PER = TOKENS / 2, HALF = 111 * 1024;  // outputs of a tile; a thread's sums; half of the shared memory
constexpr int PITCH = BN + 4, SUM_BYTES = TOKENS * PITCH * 4;  // numbers of a token's sums in shared memory; of all
constexpr int MINE = BN / SPLIT, FOURS = MINE / 4;  // outputs that a block of a cluster finishes
constexpr int MOST_STAGES = 16, BAR_BYTES = 320;

struct Bars { uint64_t full[MOST_STAGES], free[MOST_STAGES], summed, taken; };
static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "columns of a product");
static_assert(sizeof(Bars) <= BAR_BYTES && MINE % 4 == 0 && SPLIT <= 8, "macros");

// A call's operands; scales and bias are null where there are none. Strides in elements.
struct Call { const float* x_scale; const float* weight_scale; const uint16_t* bias; void* y; int tokens, outputs, inputs, y_stride; };

struct Place { int step, column; };  // a step of a tile, and the tile's first output

// A block's steps, over all tiles of its cluster one after the other.
struct Work {
  int cluster, clusters, tiles, first, each;  // first: step of a tile that this block begins with, and how many it takes

  // depth: inputs of a step.
  __device__ __forceinline__ Work(const Call& call, int depth)
      : cluster(blockIdx.x / SPLIT), clusters(gridDim.x / SPLIT), tiles(ceil_div(call.outputs, BN)) {
    int steps = ceil_div(call.inputs, depth), rank = SPLIT > 1 ? cluster_rank() : 0;
    first = rank * steps / SPLIT;
    each = (rank + 1) * steps / SPLIT - first;
  }
  __device__ __forceinline__ Place begin() const { return Place{first, cluster * BN}; }
  __device__ __forceinline__ Place after(Place p) const {
    return p.step + 1 < first + each ? Place{p.step + 1, p.column} : Place{first, p.column + clusters * BN};
  }
  __device__ __forceinline__ int all() const { return cluster < tiles ? ceil_div(tiles - cluster, clusters) * each : 0; }
};

// Sums as they come from shared memory, where a register of floats may hold the bits of integers.
__device__ __forceinline__ float widened(float sum) { return INT8 ? (float)__float_as_int(sum) : sum; }
__device__ __forceinline__ float plus(float a, float b) {
  return INT8 ? __int_as_float(__float_as_int(a) + __float_as_int(b)) : a + b;
}
__device__ __forceinline__ Float4 plus(Float4 a, Float4 b) {
  return Float4{plus(a.x, b.x), plus(a.y, b.y), plus(a.z, b.z), plus(a.w, b.w)};
}

// Four outputs of a token from four sums: scaled, the bias added, rounded.
__device__ __forceinline__ void store(Float4 sum, const Call& call, int token, int column) {
  float v[4] = {widened(sum.x), widened(sum.y), widened(sum.z), widened(sum.w)};
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

// Adds up what the WAYS warpgroups of a block, and the blocks of a cluster, have of a tile, each its part of the outputs.
// sums: [way][token][output].
template <int WAYS>
__device__ __forceinline__ void finish(const Sum (&acc)[PER], Sum* sums, Bars& bars, const Call& call, int column, int turn) {
  int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4, t = threadIdx.x;
  Sum* own = sums + t / 128 * (TOKENS * PITCH);
  if (SPLIT > 1 && turn > 0) mbar_wait_cluster(&bars.taken, (turn - 1) & 1, "finish: taken");
  UNROLL for (int j = 0; j < PER; ++j) own[(8 * (j / 4) + 2 * (lane % 4) + (j & 1)) * PITCH + row + (j & 2) * 4] = acc[j];
  named_sync(1, 128 * WAYS);
  int rank = 0;
  if (SPLIT > 1) {
    rank = cluster_rank();
    if (t < SPLIT) mbar_arrive_at(&bars.summed, t);
    mbar_wait_cluster(&bars.summed, turn & 1, "finish: summed");
  }
  for (int c = t; c < call.tokens * FOURS; c += 128 * WAYS) {
    int token = c / FOURS, inside = rank * MINE + c % FOURS * 4;
    if (column + inside >= call.outputs) continue;
    const float* from = (const float*)sums + token * PITCH + inside;
    Float4 sum;
    UNROLL for (int r = 0; r < SPLIT; ++r) {
      UNROLL for (int way = 0; way < WAYS; ++way) {
        const float* there = from + way * (TOKENS * PITCH);
        Float4 other = SPLIT > 1 ? load_of_rank(there, r) : *(const Float4*)there;
        sum = r + way == 0 ? other : plus(sum, other);
      }
    }
    store(sum, call, token, column + inside);
  }
  named_sync(1, 128 * WAYS);
  if (SPLIT > 1 && t < SPLIT) mbar_arrive_at(&bars.taken, t);
}

// One kernel of a Form: how many warpgroups multiply (WAYS), inputs of a step (DEPTH), STAGES and what lies where in shared
// memory, copies of a step's weights and tokens, and what workers do first (ready) and with a tile (sum_up).
template <class Form> __device__ __forceinline__ void run(const Form& form, const Call& call) {
  constexpr int STAGES = Form::STAGES, WORKERS = 128 * Form::WAYS;
  static_assert(STAGES >= 3 && STAGES <= MOST_STAGES && Form::SHARED <= 227 * 1024, "shared memory");
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + Form::OFF_BARS);
  Work work(call, Form::DEPTH);
  int early = min(work.all(), STAGES);
  bool feeds = threadIdx.x == WORKERS;
  Place next = work.begin();
  dependents_go();
  if (feeds) {
    for (int i = 0; i < STAGES; ++i) { mbar_init(&bars.full[i], 1); mbar_init(&bars.free[i], 4 * Form::WAYS); }
    mbar_init(&bars.summed, SPLIT);
    mbar_init(&bars.taken, SPLIT);
    mbar_fence_init();
    for (int n = 0; n < early; ++n, next = work.after(next)) form.copy_weights(smem + n * Form::STAGE, &bars.full[n], next, call);
  }
  __syncthreads();
  if (SPLIT > 1) cluster_sync();  // arrivals from other blocks find barriers
  dependence_wait();
  if (feeds) {
    Place place = work.begin();
    for (int n = 0; n < early; ++n, place = work.after(place)) form.copy_tokens(smem + n * Form::STAGE, &bars.full[n], place);
    for (int n = early, s = 0, turn = 0; n < work.all(); ++n, next = work.after(next)) {
      mbar_wait(&bars.free[s], turn & 1, "feed: free");
      form.copy_weights(smem + s * Form::STAGE, &bars.full[s], next, call);
      form.copy_tokens(smem + s * Form::STAGE, &bars.full[s], next);
      if (++s == STAGES) s = 0, ++turn;
    }
  } else if (threadIdx.x < WORKERS) {
    int step = 0, turn = 0;
    form.ready(smem, call, work);
    for (int tile = work.cluster; tile < work.tiles; tile += work.clusters, ++turn) {
      Sum acc[PER];
      form.sum_up(acc, smem, bars, call, work, tile * BN, step);
      finish<Form::WAYS>(acc, (Sum*)(smem + Form::OFF_SUMS), bars, call, tile * BN, turn);
    }
  }
  if (SPLIT > 1) {
    __syncwarp();
    cluster_sync();  // others may still read this block's sums
  }
}
