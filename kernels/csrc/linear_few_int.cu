// Products of few tokens with dense weights of 4 or 8 bits, for Hopper; see few.h, and kernels/integers.py for how words
// lie. Two neighbouring weights of a field become two floats by a shift and a mask in the register that the matrix
// instruction reads: |1|q| is 128 + q as bfloat16, 1024 + q as float16, of which the zero is subtracted. bfloat16 has room
// for 7 bits: the eighth decides what is subtracted. A step is a span of 128 inputs for each warpgroup. Their
// sums are scaled in fp32 where groups are whole spans, else weights are, by two 16-bit numbers at once.
//
// Numbers of 4-bit floats (kernels/mx.py) are put into a float's sign, exponent and mantissa, and multiplied with their scale
// and a power of two; their sums need no scale but NVFP4's global one.
//
// A multiprocessor issues little more than it must for memory to set the pace, so words are loaded as the matrix instructions
// lay them out, and all addresses of a step are one of four offsets. Sixteen warps hide each other's latencies: two
// blocks' of two warpgroups, or one block's of four.
//
// Instructions of a warp (mma), since wgmma with weights in registers takes some 58 cycles however few tokens there are:
// 28 us for a product of 50 MB, whose reading takes 11 on one H200.
#include "few.h"
#include "fp4.h"

// ZEROS: weights have 1: zeros of their own, 2: offsets, which are added; else the middle is their zero. GROUP: inputs that
// share a scale. FLOATS: weights are 4-bit floats, whose fields of 32 inputs have scales of 1: e8m0 or 2: a pair of e4m3.
// SPANS: of a step.
#ifndef FLOATS
#define FLOATS 0
#endif
#ifndef BITS
#define BITS 4
#endif
#ifndef SPANS
#define SPANS 2
#endif
#define PARTS (GROUP < 128)  // groups lie in spans
static_assert(FLOATS ? GROUP == 32 && !ZEROS && BITS == 4 && SCALES == (FLOATS == 2 ? 3 : 0)
                     : SCALES == 0 && (PARTS ? (GROUP == 16 || GROUP == 32 || GROUP == 64) && ZEROS != 1 : GROUP % 128 == 0 && ZEROS < 2), "macros");
static_assert(SPANS == 2 || (SPANS == 4 && TOKENS <= 16), "macros");
constexpr int BLOCKS = SPANS == 2 && TOKENS <= (BITS == 8 ? 16 : 32) ? 2 : 1;  // that a multiprocessor has room for
constexpr int GROUPS = PARTS ? SPANS * 128 / GROUP : SPANS;  // of a step, at most

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
#elif FP16
// Scales of a field of 32 inputs of a thread's two rows, its halves of 16 apart. at: field and output.
struct Scales {
  uint32_t of[2][2];
  __device__ __forceinline__ Scales(const uint8_t* tile, int at) {
    UNROLL for (int r = 0; r < 2; ++r) {
      if (FLOATS == 1) {
        int e = tile[at + 8 * r];
        of[r][0] = of[r][1] = twice(__int_as_float(e == 255 ? 0x7fc00000 : e == 0 ? 0x00400000 : e << 23));
      } else {
        int pair = ((const uint16_t*)tile)[at + 8 * r];
        UNROLL for (int half = 0; half < 2; ++half) of[r][half] = twice(from_e4m3(pair >> 8 * half));
      }
    }
  }
  // Two neighbouring numbers: field `pair` of two words.
  __device__ __forceinline__ uint32_t two(uint32_t words, int pair, int r, int half) const {
    words >>= 4 * pair;
    uint32_t bits = (words & 0x00070007) << 9 | (words & 0x00080008) << 12;
    return times2(times2(bits, 0x74007400), of[r][half]);  // 2^14
  }
};
#elif FLOATS == 2
// As they are put together, numbers are 2^-126 too small: 2^119 of it is in scales, which leaves them the most that bfloat16
// has room for, and 2^7 in sums.
struct Scales {
  uint32_t of[2][2];
  __device__ __forceinline__ Scales(const uint8_t* tile, int at) {
    UNROLL for (int r = 0; r < 2; ++r) {
      int pair = ((const uint16_t*)tile)[at + 8 * r];
      UNROLL for (int half = 0; half < 2; ++half) of[r][half] = twice(from_e4m3(pair >> 8 * half) * 0x1p119f);
    }
  }
  __device__ __forceinline__ uint32_t two(uint32_t words, int pair, int r, int half) const { return times2(bits_of(words, pair), of[r][half]); }
};
#endif

struct Form {
  static constexpr int WAYS = SPANS, DEPTH = SPANS * 128, CHAINS = TOKENS > 16 ? 1 : 2;  // sums of a span that do not wait for each other
  static constexpr int W_BOX = BN * 128, W_BOXES = SPANS * BITS / 8, W_BYTES = W_BOXES * W_BOX, X_BOX = TOKENS * 128;
  static constexpr int GROUP_BYTES = 64 * (FLOATS == 1 ? 1 : 2), SCALE_BYTES = GROUPS * GROUP_BYTES;
  static constexpr int ZERO_BYTES = ZEROS == 2 ? SCALE_BYTES : ZEROS ? GROUPS * 64 : 0;
  static constexpr int OFF_X = W_BYTES, OFF_SCALES = OFF_X + 2 * SPANS * X_BOX, OFF_ZEROS = OFF_SCALES + SCALE_BYTES;
  static constexpr int STAGE = OFF_SCALES + (SCALE_BYTES + ZERO_BYTES + 1023) / 1024 * 1024;
  static constexpr int FED = BLOCKS == 2 || (SPANS == 4 && BITS * TOKENS == 32) ? HALF : 2 * HALF;
  static constexpr int ROOM = (FED - WAYS * SUM_BYTES - BAR_BYTES - 1024) / STAGE;
  static constexpr int STAGES = ROOM < MOST_STAGES ? ROOM : MOST_STAGES;
  static constexpr int OFF_SUMS = STAGES * STAGE, OFF_BARS = OFF_SUMS + WAYS * SUM_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
  const TensorMap* x_map; const TensorMap* w_map; const void* scale; const uint8_t* zero;

  __device__ __forceinline__ void copy_weights(uint8_t* to, uint64_t* full, Place place, const Call& call) const {
    int groups = ceil_div(call.inputs, GROUP), own = min(GROUPS, groups - GROUPS * place.step);
    int64_t tile = (int64_t)(place.column / 64) * groups;
    // What one thread can ask for sets the pace: groups of a step lie behind each other but where they span several steps.
    bool together = PARTS || GROUP == 128;
    if (!together) own = SPANS;
    constexpr int OF_ZERO = ZEROS == 2 ? GROUP_BYTES : 64;
    mbar_expect(full, OFF_SCALES + own * (GROUP_BYTES + (ZEROS ? OF_ZERO : 0)));
    UNROLL for (int box = 0; box < W_BOXES; ++box) tma_2d(to + box * W_BOX, w_map, full, 64 * (place.step * W_BOXES + box), place.column);
    if (together) {
      bulk_load(to + OFF_SCALES, (const uint8_t*)scale + (tile + GROUPS * place.step) * GROUP_BYTES, full, own * GROUP_BYTES);
      if (ZEROS) bulk_load(to + OFF_ZEROS, zero + (tile + GROUPS * place.step) * OF_ZERO, full, own * OF_ZERO);
    } else {
      UNROLL for (int span = 0; span < SPANS; ++span) {
        int64_t at = tile + min((SPANS * place.step + span) * 128 / GROUP, groups - 1);
        bulk_load(to + OFF_SCALES + span * GROUP_BYTES, (const uint8_t*)scale + at * GROUP_BYTES, full, GROUP_BYTES);
        if (ZEROS) bulk_load(to + OFF_ZEROS + span * OF_ZERO, zero + at * OF_ZERO, full, OF_ZERO);
      }
    }
  }
  __device__ __forceinline__ void copy_tokens(uint8_t* to, uint64_t* full, Place place) const {
    tma_3d(to + OFF_X, x_map, full, 0, 0, place.step * (DEPTH / 64));  // boxes of 64 inputs
  }
  __device__ __forceinline__ void ready(uint8_t*, const Call&, const Work&) const {}

  // A warpgroup's sums of a tile over its spans. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for
  // tokens 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
  __device__ __forceinline__ void sum_up(float (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, const Work& work, int column, int& step) const {
    // What a lane adds to a step's address is kept in registers: else much of it is computed anew in every step.
    int lane = from_here(threadIdx.x % 32), span = from_here(threadIdx.x / 128), first = threadIdx.x % 128 / 32 * 16, row = from_here(first + lane / 4);
    // Groups of a step beyond the last have no scale in its copy.
    int left = ceil_div(call.inputs, GROUP) - 1 - GROUPS * work.first;
    // What a lane loads of words and of tokens: row lane % 8, chunk lane / 8, swizzled.
    int at = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    int words_at = from_here((BITS == 8 ? span * W_BOX : span / 2 * W_BOX) + first * 128 + (BITS == 8 ? at : at ^ span % 2 * 64));
    int even_at = from_here(OFF_X + 2 * span * X_BOX + at), odd_at = from_here(OFF_X + 2 * span * X_BOX + (at ^ 64));
#if !FLOATS
    const uint32_t lift = from_here(LIFT);  // in a register, so that one instruction masks and lifts
#endif
    UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
    int s = step % STAGES, turn = step / STAGES;
    step += work.each;
    for (int i = 0; i < work.each; ++i, left -= GROUPS) {
      uint8_t* here = smem + s * STAGE;
      mbar_wait(&bars.full[s], turn & 1, "multiply: full");
      uint32_t words[2][BITS / 4][4];  // by row, and by half of the inputs of 8 bits
      UNROLL for (int high = 0; high < 2; ++high) {
        UNROLL for (int half = 0; half < BITS / 4; ++half) load_blocks(words[high][half], here + high * 1024 + (words_at ^ half * 64));
      }
#if !FLOATS
      uint32_t middle[2];
#endif
#if !PARTS
      float scales[2];
#endif
#if !FLOATS
      UNROLL for (int high = 0; high < 2; ++high) {
#if PARTS
        middle[high] = middle_of(1 << BITS - 1);
#else
        int of = (GROUP == 128 ? min(span, left) : span) * 64 + row + 8 * high;
        scales[high] = half_as_float(((const uint16_t*)(here + OFF_SCALES))[of]);
        middle[high] = middle_of(ZEROS ? (here + OFF_ZEROS)[of] : 1 << BITS - 1);
#endif
      }
#endif
      float part[CHAINS][PER] = {};
      auto multiply_pair = [&](int pair, auto two) {  // of chunks of 16 inputs: field `pair` of all words, or of half of them
        uint32_t a[2][4], b[4];
        UNROLL for (int j = 0; j < 8; ++j) a[j >> 2][j & 3] = two(words[j & 1][BITS == 8 ? pair % 2 : 0][j >> 1], j & 1, j >> 2);
        UNROLL for (int token = 0; token < TOKENS; token += 8) {
          load_blocks(b, here + pair / 2 * X_BOX + token * 128 + (pair % 2 ? odd_at : even_at));
          multiply(&part[0][token / 2], a[0], b);
          multiply(&part[CHAINS - 1][token / 2], a[1], b + 2);
        }
      };
#if FLOATS == 1 && !FP16
      auto scale = [&](int block, int r) { return (uint32_t)here[OFF_SCALES + min(4 * span + block, left) * 64 + row + 8 * r]; };
      Factors factors(scale);
      if (factors.plain) {
        UNROLL for (int pair = 0; pair < 4; ++pair)
          multiply_pair(pair, [&](uint32_t two, int r, int) { return times2(bits_of(two, pair), factors.of[pair][r]); });
      } else {
        UNROLL for (int pair = 0; pair < 4; ++pair) {
          Factor factor(scale(pair, 0), scale(pair, 1));
          multiply_pair(pair, [&](uint32_t two, int r, int) { return two_of(two, pair, factor, r); });
        }
      }
#elif FLOATS
      UNROLL for (int pair = 0; pair < 4; ++pair) {
        Scales own(here + OFF_SCALES, min(4 * span + pair, left) * 64 + row);
        multiply_pair(pair, [&](uint32_t two, int r, int half) { return own.two(two, pair, r, half); });
      }
#else
      UNROLL for (int pair = 0; pair < 4; ++pair) {
#if PARTS
        uint32_t own[2][2], offset[2][2];
        UNROLL for (int high = 0; high < 2; ++high) {
          int of = (128 * span + 32 * pair) / GROUP;
          halves_of(own[high], here + OFF_SCALES, of, left, row + 8 * high);
          if (ZEROS) halves_of(offset[high], here + OFF_ZEROS, of, left, row + 8 * high);
        }
#endif
        multiply_pair(pair, [&](uint32_t two, int r, int half) {
          uint32_t q = centred(two >> (BITS == 8 ? 8 * (pair / 2) : 4 * pair), lift, middle[r]);
#if PARTS
          q = ZEROS ? times_plus2(q, own[r][half], offset[r][half]) : times2(q, own[r][half]);
#endif
          return q;
        });
      }
#endif
      fence_async_proxy();  // reads of this stage come before the copies that fill it again; scales came late without
      __syncwarp();
      if (lane == 0) mbar_arrive(&bars.free[s]);
      if (++s == STAGES) s = 0, ++turn;
      UNROLL for (int j = 0; j < PER; ++j) {
        float sum = CHAINS > 1 ? part[0][j] + part[CHAINS - 1][j] : part[0][j];
#if PARTS
        acc[j] += sum;
#else
        acc[j] += sum * scales[(j >> 1) & 1];
#endif
      }
    }
#if FLOATS == 2 && !FP16
    UNROLL for (int j = 0; j < PER; ++j) acc[j] *= 0x1p7f;
#endif
  }
};

constexpr int THREADS = 128 * Form::WAYS + 32;
LAUNCH_FACTS(THREADS, Form::SHARED, SPLIT);

#if FLOATS == 1
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_mxfp4(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint8_t* weight_scale,
                 const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif FLOATS == 2
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_nvfp4(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const int16_t* weight_scale,
                 const float* weight_global_scale, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                 int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, weight_global_scale, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif ZEROS == 2
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_offsets(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                       const uint16_t* weight_zero, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                       int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, (const uint8_t*)weight_zero},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif ZEROS
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_zeros(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                     const uint8_t* weight_zero, const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs,
                     int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, weight_zero},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#elif WIDE
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int_wide(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
                    const uint16_t* bias, float* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(SPLIT, 1, 1)
linear_few_int(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* weight_scale,
               const uint16_t* bias, uint16_t* y, int tokens, int outputs, int inputs, int y_stride) {
  run(Form{&x_map, &w_map, weight_scale, nullptr},
      Call{nullptr, nullptr, BIAS ? bias : nullptr, y, tokens, outputs, inputs, y_stride});
}
#endif
