// Products of few tokens with dense weights of 4 or 8 bits, for Hopper; see few.h, and kernels/integers.py for how words
// lie. Two neighbouring weights of a field become two floats by a shift and a mask in the register that the matrix
// instruction reads: |1|q| is 128 + q as bfloat16, 1024 + q as float16, of which the zero is subtracted. bfloat16 has room
// for 7 bits: the eighth decides what is subtracted. A step is two spans of 128 inputs, one for each of two warpgroups. Their
// sums are scaled in fp32 where groups are whole spans, else weights are, by two 16-bit numbers at once.
//
// Numbers of 4-bit floats (kernels/mx.py) are put into a float's sign, exponent and mantissa, and multiplied with a power of
// two and with their scale, as in mx_values_triton.py; their sums need no scale but NVFP4's global one.
//
// Instructions of a warp (mma), since wgmma with weights in registers takes some 58 cycles however few tokens there are:
// 28 us for a product of 50 MB, whose reading takes 11 on one H200.
#include "few.h"

// ZEROS: weights have 1: zeros of their own, 2: offsets, which are added; else the middle is their zero. GROUP: inputs that
// share a scale. FLOATS: weights are 4-bit floats, whose fields of 32 inputs have scales of 1: e8m0 or 2: a pair of e4m3.
#ifndef FLOATS
#define FLOATS 0
#endif
#ifndef BITS
#define BITS 4
#endif
#define PARTS (GROUP < 128)  // groups lie in spans
static_assert(FLOATS ? GROUP == 32 && !ZEROS && BITS == 4 && SCALES == (FLOATS == 2 ? 3 : 0)
                     : SCALES == 0 && (PARTS ? (GROUP == 16 || GROUP == 32 || GROUP == 64) && ZEROS != 1 : GROUP % 128 == 0 && ZEROS < 2), "macros");
constexpr int BLOCKS = TOKENS <= (BITS == 8 ? 16 : 32) ? 2 : 1;  // that a multiprocessor has room for
constexpr int GROUPS = PARTS ? 256 / GROUP : 2;  // of a step, at most

// d[16 x 8] += a[16 x 16] b[16 x 8] of a warp; d of floats as wgmma has them.
__device__ __forceinline__ void multiply(float* d, const uint32_t (&a)[4], const uint32_t* b) { mma_16x8x16(d, a, b[0], b[1]); }

__device__ __forceinline__ uint32_t twice(float x) { return pack2(x, x); }
#if !FLOATS
constexpr uint32_t LIFT = FP16 ? 0x64006400 : 0x43004300;  // what a field is put on top of
// What is subtracted of lifted fields; of 8 bits in bfloat16, of what is left of them without their middle.
__device__ __forceinline__ uint32_t middle_of(int zero) {
  return BITS == 8 && !FP16 ? twice((float)(zero - 128)) : LIFT | (uint32_t)zero * 0x10001;
}
// Two neighbouring fields, in the lowest bits of each half, less their zero.
__device__ __forceinline__ uint32_t centred(uint32_t two, uint32_t lift, uint32_t middle) {
#if BITS == 4
  return minus2(keep_field(two, lift), middle);
#elif FP16
  return minus2(two & 0x00ff00ff | lift, middle);
#else
  uint32_t q = minus2(two & 0x007f007f | lift, two & 0x00800080 ^ 0x43804380);  // less 256, or 128 where the bit is set
  return ZEROS ? minus2(q, middle) : q;
#endif
}
// Scales, or offsets, of the halves of 32 inputs, each in both halves of a register; at: first of their groups.
__device__ __forceinline__ void halves_of(uint32_t (&two)[2], const uint8_t* tile, int at, int last, int row) {
  UNROLL for (int half = 0; half < 2; ++half)
    two[half] = half && GROUP > 16 ? two[0] : twice(half_as_float(((const uint16_t*)tile)[min(at + half, last) * 64 + row]));
}
#else
// Two neighbouring numbers, in the lowest 4 bits of each half.
__device__ __forceinline__ uint32_t numbers(uint32_t words) {
  uint32_t bits = (words & 0x00070007) << (FP16 ? 9 : 6) | (words & 0x00080008) << 12;
  return times2(bits, FP16 ? 0x74007400 : 0x7e807e80);  // 2^14, 2^126
}
__device__ __forceinline__ uint32_t from_e4m3(int s) { return twice(__int_as_float((s & 0x7f) << 20) * 0x1p120f); }
// Scales of a field's first and last 16 inputs, each in both halves of a register; at: field and output.
__device__ __forceinline__ void scales_of(uint32_t (&scale)[2], const uint8_t* tile, int at) {
  if (FLOATS == 1) {
    int e = tile[at];
    scale[0] = scale[1] = twice(__int_as_float(e == 255 ? 0x7fc00000 : e == 0 ? 0x00400000 : e << 23));
  } else {
    int pair = ((const uint16_t*)tile)[at];
    scale[0] = from_e4m3(pair);
    scale[1] = from_e4m3(pair >> 8);
  }
}
#endif

struct Form {
  static constexpr int WAYS = 2, DEPTH = 256, CHAINS = TOKENS > 16 ? 1 : 2;  // sums of a span that do not wait for each other
  static constexpr int W_BOX = BN * 128, W_BYTES = W_BOX * BITS / 4, X_BOX = TOKENS * 128;
  static constexpr int GROUP_BYTES = 64 * (FLOATS == 1 ? 1 : 2), SCALE_BYTES = GROUPS * GROUP_BYTES;
  static constexpr int ZERO_BYTES = ZEROS == 2 ? SCALE_BYTES : ZEROS ? 128 : 0;
  static constexpr int OFF_X = W_BYTES, OFF_SCALES = OFF_X + 4 * X_BOX, OFF_ZEROS = OFF_SCALES + SCALE_BYTES;
  static constexpr int STAGE = OFF_SCALES + (SCALE_BYTES + ZERO_BYTES + 1023) / 1024 * 1024;
  static constexpr int FED = BLOCKS == 2 ? HALF : 2 * HALF;
  static constexpr int ROOM = (FED - WAYS * SUM_BYTES - BAR_BYTES - 1024) / STAGE;
  static constexpr int STAGES = ROOM < MOST_STAGES ? ROOM : MOST_STAGES;
  static constexpr int OFF_SUMS = STAGES * STAGE, OFF_BARS = OFF_SUMS + WAYS * SUM_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
  const TensorMap* x_map; const TensorMap* w_map; const void* scale; const uint8_t* zero;

  __device__ __forceinline__ void copy_weights(uint8_t* to, uint64_t* full, Place place, const Call& call) const {
    int step = place.step, groups = ceil_div(call.inputs, GROUP);
    int bytes = PARTS ? min(GROUPS, groups - GROUPS * step) * GROUP_BYTES : SCALE_BYTES + ZERO_BYTES;
    mbar_expect(full, OFF_SCALES + (ZEROS == 2 ? 2 : 1) * bytes);
    UNROLL for (int box = 0; box < BITS / 4; ++box) tma_2d(to + box * W_BOX, w_map, full, step * 16 * BITS + 64 * box, place.column);
    int64_t tile = (int64_t)(place.column / 64) * groups;
#if PARTS
    bulk_load(to + OFF_SCALES, (const uint8_t*)scale + (tile + GROUPS * step) * GROUP_BYTES, full, bytes);
    if (ZEROS) bulk_load(to + OFF_ZEROS, zero + (tile + GROUPS * step) * GROUP_BYTES, full, bytes);
#else
    const uint16_t* scale = (const uint16_t*)this->scale;
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
#endif
  }
  __device__ __forceinline__ void copy_tokens(uint8_t* to, uint64_t* full, Place place) const {
    tma_3d(to + OFF_X, x_map, full, 0, 0, place.step * (DEPTH / 64));  // four boxes of 64 inputs
  }
  __device__ __forceinline__ void ready(uint8_t*, const Call&, const Work&) const {}

  // A warpgroup's sums of a tile over its spans. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for
  // tokens 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
  __device__ __forceinline__ void sum_up(float (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, const Work& work, int column, int& step) const {
    int lane = threadIdx.x % 32, span = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#if PARTS
    int last = ceil_div(call.inputs, GROUP) - 1 - GROUPS * work.first;  // of the groups of a step, that has a scale
#endif
#if !FLOATS
    const uint32_t lift = from_here(LIFT);  // in a register, so that one instruction masks and lifts
#endif
    UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
    for (int i = 0; i < work.each; ++i, ++step) {
      int s = step % STAGES;
      uint8_t* here = smem + s * STAGE;
      mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
      uint32_t words[2][BITS];
#if !FLOATS
      uint32_t middle[2];
#endif
#if !PARTS
      float scales[2];
#endif
      UNROLL for (int high = 0; high < 2; ++high) {
        int r = row + 8 * high;
#if !PARTS
        scales[high] = half_as_float(((const uint16_t*)(here + OFF_SCALES))[span * 64 + r]);
        middle[high] = middle_of(ZEROS ? (here + OFF_ZEROS)[span * 64 + r] : 1 << BITS - 1);
#elif !FLOATS
        middle[high] = middle_of(1 << BITS - 1);
#endif
        const uint8_t* w = here + (BITS == 8 ? span * W_BOX : 0) + r * 128;
        UNROLL for (int m = 0; m < BITS; ++m) words[high][m] = *(const uint32_t*)(w + (((BITS == 8 ? 0 : 4 * span) + m ^ r & 7) * 16) + lane % 4 * 4);
      }
      const uint8_t* x = here + OFF_X + 2 * span * X_BOX + lane % 8 * 128;
      float part[CHAINS][PER] = {};
      UNROLL for (int pair = 0; pair < 4; ++pair) {  // of chunks of 16 inputs: field `pair` of all words, or of half of them
        uint32_t a[2][4], b[4];
#if FLOATS
        uint32_t own[2][2];
        UNROLL for (int high = 0; high < 2; ++high)
          scales_of(own[high], here + OFF_SCALES, min(4 * span + pair, last - 8 * i) * 64 + row + 8 * high);
#elif PARTS
        uint32_t own[2][2], offset[2][2];
        UNROLL for (int high = 0; high < 2; ++high) {
          int at = (128 * span + 32 * pair) / GROUP;
          halves_of(own[high], here + OFF_SCALES, at, last - GROUPS * i, row + 8 * high);
          if (ZEROS) halves_of(offset[high], here + OFF_ZEROS, at, last - GROUPS * i, row + 8 * high);
        }
#endif
        UNROLL for (int j = 0; j < 8; ++j) {
          uint32_t two = BITS == 8 ? words[j & 1][pair % 2 * 4 + (j >> 1)] >> (8 * (pair / 2)) : words[j & 1][j >> 1] >> (4 * pair);
#if FLOATS
          a[j >> 2][j & 3] = times2(numbers(two), own[j & 1][j >> 2]);
#elif PARTS
          uint32_t q = centred(two, lift, middle[j & 1]), scale = own[j & 1][j >> 2];
          a[j >> 2][j & 3] = ZEROS ? times_plus2(q, scale, offset[j & 1][j >> 2]) : times2(q, scale);
#else
          a[j >> 2][j & 3] = centred(two, lift, middle[j & 1]);
#endif
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
      UNROLL for (int j = 0; j < PER; ++j) {
        float sum = CHAINS > 1 ? part[0][j] + part[CHAINS - 1][j] : part[0][j];
#if PARTS
        acc[j] += sum;
#else
        acc[j] += sum * scales[(j >> 1) & 1];
#endif
      }
    }
  }
};

LAUNCH_FACTS(128 * Form::WAYS + 32, Form::SHARED, SPLIT);

#if FLOATS == 1
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_mxfp4(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint8_t* weight_scale,
                 const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif FLOATS == 2
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_nvfp4(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const int16_t* weight_scale,
                 const float* weight_global_scale, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                 int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, weight_global_scale, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif ZEROS == 2
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_offsets(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                       const uint16_t* weight_zero, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                       int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, (const uint8_t*)weight_zero},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif ZEROS
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_zeros(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                     const uint8_t* weight_zero, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                     int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, weight_zero},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif WIDE
extern "C" __global__ void __launch_bounds__(288, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_wide(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                    const uint16_t* bias, float* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
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
