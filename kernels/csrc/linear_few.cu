// Products of few tokens with dense weights of 16 bits, and of 8 with scales, for Hopper; see few.h.
#include "few.h"

// FP8: operands are e4m3; INT8: integers; else 16-bit floats. SCALES: of those of 8 bits; 1: of tokens and of outputs, 2: of
// tokens and groups of 128 inputs, and of squares of 128; SHARE is then the most groups that a block has of a row.
static_assert((FP8 ? SCALES == 1 || SCALES == 2 : SCALES == INT8) && !(FP8 && INT8), "macros");
#if SCALES == 2
constexpr int GROUPS = SHARE;
#else
constexpr int GROUPS = 0;
#endif

#if SCALES == 2
// Scales of groups: those of tokens in shared memory, [group][token], those of the tile's squares with the lanes of each
// warp, since to ask memory for them a step ahead took longer than the step.
struct GroupScales {
  static constexpr int EACH = (GROUPS + 31) / 32;
  const float* tokens; float squares[EACH];

  // All workers together: the tokens' scales of this block's groups.
  static __device__ __forceinline__ void keep_tokens(float* to, const Call& call, const Work& work) {
    int groups = call.inputs / 128;
    for (int c = threadIdx.x; c < TOKENS * work.each; c += 128) {
      int token = c / work.each, group = c % work.each;
      to[group * TOKENS + token] = token < call.tokens ? load_written_one(call.x_scale + (int64_t)token * groups + work.first + group) : 0.f;
    }
    named_sync(1, 128);
  }
  __device__ __forceinline__ GroupScales(const float* kept, const Call& call, const Work& work, int column) : tokens(kept) {
    int lane = threadIdx.x % 32, groups = call.inputs / 128;
    const float* of = call.weight_scale + (int64_t)(min(column, call.outputs - 1) / 128) * groups + work.first;
    UNROLL for (int i = 0; i < EACH; ++i) squares[i] = of[min(i * 32 + lane, work.each - 1)];
  }
  // Of a thread's tokens in a step, times the square's.
  __device__ __forceinline__ void at(float (&scale)[TOKENS / 4], int step) const {
    const float* from = tokens + step * TOKENS + 2 * (threadIdx.x % 4);
    float square = squares[0];
    UNROLL for (int i = 1; i < EACH; ++i) square = step < 32 * i ? square : squares[i];
    square = __shfl_sync(~0u, square, step % 32);
    UNROLL for (int h = 0; h < TOKENS / 8; ++h) {
      scale[2 * h] = from[8 * h] * square;
      scale[2 * h + 1] = from[8 * h + 1] * square;
    }
  }
};
#endif

#if INT8
__device__ __forceinline__ void multiply(int (&d)[PER], uint64_t a, uint64_t b, int accumulate) { wgmma_ss_s8(d, a, b, accumulate); }
#elif FP8
__device__ __forceinline__ void multiply(float (&d)[PER], uint64_t a, uint64_t b, int accumulate) { wgmma_ss_e4m3(d, a, b, accumulate); }
#else
__device__ __forceinline__ void multiply(float (&d)[PER], uint64_t a, uint64_t b, int accumulate) { wgmma_ss_16bit(d, a, b, accumulate); }
#endif

struct Form {
  static constexpr int WAYS = 1, DEPTH = FP8 || INT8 ? 128 : 64;  // 128 bytes of a row
  static constexpr int W_BYTES = BN * 128, STAGE = W_BYTES + TOKENS * 128, SCALE_BYTES = TOKENS * GROUPS * 4;
  static constexpr int ROOM = (HALF - SUM_BYTES - SCALE_BYTES - BAR_BYTES - 1024) / STAGE;
  static constexpr int STAGES = ROOM < MOST_STAGES ? ROOM : MOST_STAGES;
  static constexpr int OFF_SUMS = STAGES * STAGE, OFF_SCALES = OFF_SUMS + SUM_BYTES, OFF_BARS = OFF_SCALES + SCALE_BYTES;
  static constexpr int SHARED = OFF_BARS + BAR_BYTES + 1024;
  const TensorMap* x_map; const TensorMap* w_map;

  __device__ __forceinline__ void copy_weights(uint8_t* to, uint64_t* full, Place place, const Call&) const {
    mbar_expect(full, STAGE);
    tma_2d(to, w_map, full, place.step * DEPTH, place.column);
  }
  __device__ __forceinline__ void copy_tokens(uint8_t* to, uint64_t* full, Place place) const {
    tma_2d(to + W_BYTES, x_map, full, place.step * DEPTH, 0);
  }
  __device__ __forceinline__ void ready(uint8_t* smem, const Call& call, const Work& work) const {
#if SCALES == 2
    GroupScales::keep_tokens((float*)(smem + OFF_SCALES), call, work);
#endif
  }

  // This block's sums of a tile. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for tokens
  // 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
  __device__ __forceinline__ void sum_up(Sum (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, const Work& work, int column, int& step) const {
    int lane = threadIdx.x % 32;
    uint32_t base = smem_u32(smem);
    const uint64_t operand = operand_128b(16, 1024);
#if FP8
    UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
#endif
#if SCALES == 2
    GroupScales scales((const float*)(smem + OFF_SCALES), call, work, column);
#endif
    for (int i = 0; i < work.each; ++i, ++step) {
      int s = step % STAGES;
      uint32_t a = base + s * STAGE, b = a + W_BYTES;
      mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
      wgmma_fence();
#if FP8  // sums of 8-bit products keep 14 bits: those of 128 inputs are added in fp32
      float part[PER];
      UNROLL for (int j = 0; j < 4; ++j) multiply(part, at(operand, a + j * 32), at(operand, b + j * 32), j != 0);
      wgmma_commit();
#if SCALES == 2
      float scale[TOKENS / 4];
      scales.at(scale, i);
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
      UNROLL for (int j = 0; j < 4; ++j) multiply(acc, at(operand, a + j * 32), at(operand, b + j * 32), j != 0 ? 1 : i != 0);
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
};

LAUNCH_FACTS(128 * Form::WAYS + 32, Form::SHARED, SPLIT);

#if FP8 || INT8
extern "C" __global__ void __launch_bounds__(160, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few_eight(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const float* x_scale, const float* weight_scale,
               const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map}, Call{x_scale, weight_scale, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif WIDE
extern "C" __global__ void __launch_bounds__(160, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few_wide(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* bias, float* y, int tokens,
                int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map}, Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(160, 2) __cluster_dims__(SPLIT, 1, 1)
linear_few(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* bias, uint16_t* y, int tokens,
           int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map}, Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#endif
