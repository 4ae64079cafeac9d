// Products of few tokens with dense weights of 4 bits in groups of a multiple of 128 inputs, for Hopper; see few.h, and
// kernels/integers.py for how words lie. Two neighbouring weights of a field become two floats by a shift and a mask in the
// register that the matrix instruction reads: |1|q| is 128 + q as bfloat16, 1024 + q as float16, of which the zero is
// subtracted. A step is two spans of 128 inputs, one for each of two warpgroups, whose sums are scaled in fp32.
//
// Instructions of a warp (mma), since wgmma with weights in registers takes some 58 cycles however few tokens there are:
// 28 us for a product of 50 MB, whose reading takes 11 on one H200.
#include "few.h"

// ZEROS: weights have zeros of their own, else all have 8. GROUP: inputs that share a scale.
static_assert(GROUP % 128 == 0 && SCALES == 0, "macros");
constexpr int BLOCKS = TOKENS <= 32 ? 2 : 1;  // that a multiprocessor has room for
constexpr uint32_t LIFT = FP16 ? 0x64006400 : 0x43004300;  // what a field is put on top of

// d[16 x 8] += a[16 x 16] b[16 x 8] of a warp; d of floats as wgmma has them.
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], const uint32_t* b) { mma_16x8x16(d, a, b[0], b[1]); }

struct Form {
  static constexpr int WAYS = 2, DEPTH = 256, CHAINS = TOKENS > 16 ? 1 : 2;  // sums of a span that do not wait for each other
  static constexpr int W_BYTES = BN * 128, X_BOX = TOKENS * 128, SCALE_BYTES = 256, ZERO_BYTES = 128;
  static constexpr int OFF_X = W_BYTES, OFF_SCALES = OFF_X + 4 * X_BOX, OFF_ZEROS = OFF_SCALES + SCALE_BYTES;
  static constexpr int STAGE = OFF_SCALES + 1024, COPIED = OFF_SCALES + SCALE_BYTES + (ZEROS ? ZERO_BYTES : 0);
  static constexpr int FED = BLOCKS == 2 ? HALF : 2 * HALF;
  static constexpr int ROOM = (FED - WAYS * SUM_BYTES - BAR_BYTES - 1024) / STAGE;
  static constexpr int STAGES = ROOM < MOST_STAGES ? ROOM : MOST_STAGES;
  static constexpr int OFF_SUMS = STAGES * STAGE, OFF_BARS = OFF_SUMS + WAYS * SUM_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
  const TensorMap* x_map; const TensorMap* w_map; const uint16_t* scale; const uint8_t* zero;

  __device__ __forceinline__ void copy_weights(uint8_t* to, uint64_t* full, Place place, const Call& call) const {
    int step = place.step, groups = ceil_div(call.inputs, GROUP);
    mbar_expect(full, COPIED);
    tma_2d(to, w_map, full, step * 64, place.column);
    int64_t tile = (int64_t)(place.column / 64) * groups;
    if (GROUP == 128 && 2 * step + 1 < groups) {  // both spans' at once: what one thread can ask for sets the pace
      bulk_load(to + OFF_SCALES, scale + (tile + 2 * step) * 64, full, 256);
      if (ZEROS) bulk_load(to + OFF_ZEROS, zero + (tile + 2 * step) * 64, full, 128);
    } else {
      UNROLL for (int span = 0; span < 2; ++span) {
        int64_t at = (tile + min((2 * step + span) * 128 / GROUP, groups - 1)) * 64;
        bulk_load(to + OFF_SCALES + span * 128, scale + at, full, 128);
        if (ZEROS) bulk_load(to + OFF_ZEROS + span * 64, zero + at, full, 64);
      }
    }
  }
  __device__ __forceinline__ void copy_tokens(uint8_t* to, uint64_t* full, Place place) const {
    tma_3d(to + OFF_X, x_map, full, 0, 0, place.step * (DEPTH / 64));  // four boxes of 64 inputs
  }
  __device__ __forceinline__ void ready(uint8_t*, const Call&, const Work&) const {}

  // A warpgroup's sums of a tile over its spans. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for
  // tokens 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
  __device__ __forceinline__ void sum_up(float (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, const Work& work, int column, int& step) const {
    int lane = threadIdx.x % 32, span = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t lift = from_here(LIFT);  // in a register, so that one instruction masks and lifts
    UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
    for (int i = 0; i < work.each; ++i, ++step) {
      int s = step % STAGES;
      uint8_t* here = smem + s * STAGE;
      mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
      uint32_t middle[2], words[2][4];
      float scales[2];
      UNROLL for (int high = 0; high < 2; ++high) {
        int r = row + 8 * high;
        scales[high] = half_as_float(((const uint16_t*)(here + OFF_SCALES))[span * 64 + r]);
        uint32_t zeros = ZEROS ? (here + OFF_ZEROS)[span * 64 + r] : 8;
        middle[high] = LIFT | zeros * 0x10001;
        UNROLL for (int m = 0; m < 4; ++m) words[high][m] = *(const uint32_t*)(here + r * 128 + ((4 * span + m ^ r & 7) * 16) + lane % 4 * 4);
      }
      const uint8_t* x = here + OFF_X + 2 * span * X_BOX + lane % 8 * 128;
      float part[CHAINS][PER] = {};
      UNROLL for (int pair = 0; pair < 4; ++pair) {  // of chunks of 16 inputs: field `pair` of all words
        uint32_t a[2][4], b[4];
        UNROLL for (int j = 0; j < 8; ++j) {
          uint32_t two = words[j & 1][j >> 1] >> (4 * pair);
          a[j >> 2][j & 3] = minus2(keep_field(two, lift), middle[j & 1]);
        }
        UNROLL for (int token = 0; token < TOKENS; token += 8) {
          load_blocks(b, x + pair / 2 * X_BOX + token * 128 + (pair % 2 * 4 + lane / 8 ^ lane & 7) * 16);
          multiply(&part[0][token / 2], a[0], b);
          multiply(&part[CHAINS - 1][token / 2], a[1], b + 2);
        }
      }
      fence_async_proxy();  // reads of this stage come before the copies that fill it again; scales came late without
      __syncwarp();
      if (lane == 0) mbar_arrive(&bars.free[s]);
      UNROLL for (int j = 0; j < PER; ++j) acc[j] += (CHAINS > 1 ? part[0][j] + part[CHAINS - 1][j] : part[0][j]) * scales[(j >> 1) & 1];
    }
  }
};

LAUNCH_FACTS(128 * Form::WAYS + 32, Form::SHARED, SPLIT);

#if ZEROS
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_zeros(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                     const uint8_t* weight_zero, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                     int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, weight_zero},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
               const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#endif
