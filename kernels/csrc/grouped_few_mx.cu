// Products of tokens with their experts' weights in MXFP4 for few entries an expert, for Hopper: as grouped_few.cu, with
// weights widened in the registers that matrix instructions of a warp read (linear_few_int.cu says why not wgmma). See
// kernels/mx.py for how words and scales lie: a field of a span's words is a block of 32 inputs, which has one scale.
//
// A tile is twice 64 rows of an expert's weights, a warpgroup's each: neighbours, or the gate and what it multiplies. Two
// blocks share a multiprocessor where products have few columns.
//
// Columns of a product that no entry has may hold anything: nobody stores them, and they touch no other column.
#include "experts.h"
#include "fp4.h"

// TOKENS: columns of a product. GATE: of the first half of the outputs, for the other half; 1: silu, 2: clamped SwiGLU.
static_assert(!EIGHT && !FP16, "bfloat16 has the range of the scales");
constexpr int ROWS = 64, WIDE = 2 * ROWS, DEPTH = 256, PER = TOKENS / 2, CHAINS = TOKENS > 16 ? 1 : 2;
constexpr int BLOCKS = TOKENS <= 16 ? 2 : 1;  // that a multiprocessor has room for
constexpr int W_HALF = ROWS * DEPTH / 2, X_BOX = TOKENS * 128, SCALE_HALF = ROWS * DEPTH / 32;
constexpr int OFF_X = 2 * W_HALF, OFF_SCALES = OFF_X + 4 * X_BOX, STAGE = OFF_SCALES + 2 * SCALE_HALF;
constexpr int PITCH = WIDE + 8, OUT = GATE ? ROWS : WIDE;  // elements of a row of results in shared memory; of a tile's
constexpr int Y_BYTES = (TOKENS * PITCH * 2 + 1023) / 1024 * 1024, BAR_BYTES = 320;
constexpr int FED = (BLOCKS == 2 ? 112 : 224) * 1024, ROOM = (FED - Y_BYTES - BAR_BYTES - 1024) / STAGE, STAGES = ROOM < 8 ? ROOM : 8;
constexpr int OFF_Y = STAGES * STAGE, OFF_BARS = OFF_Y + Y_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
constexpr int WORKERS = 256;

struct Bars { uint64_t full[8], free[8], tile_full[2], tile_free[2]; Tile tile[2]; };
struct Packed { const uint8_t* scale; const uint16_t* bias; float alpha, limit; };  // bias is null where there is none
static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "columns of a product");
static_assert(sizeof(Bars) <= BAR_BYTES && STAGES >= 3 && STAGE % 1024 == 0 && BLOCKS * (SHARED + 1024) <= 228 * 1024, "shared memory");

LAUNCH_FACTS(128 + WORKERS, SHARED, 1);

// The row of an expert's weights at which a half of a tile begins; at or beyond `outputs` the tile lacks it.
__device__ __forceinline__ int first_row(const Call& call, Tile tile, int half) {
  return GATE ? tile.column / 2 + half * (call.outputs / 2) : tile.column + half * ROWS;
}

// Finds tiles and copies their weights and scales, and rows of x where these are not gathered.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const TensorMap* x_map, const TensorMap* w_map, const Call& call, const Packed& packed) {
  int lane = threadIdx.x % 32, steps = ceil_div(call.inputs, DEPTH), blocks = call.inputs / 32, step = 0;
  Tiles tiles(call.start, call.experts, TOKENS, WIDE, call.outputs);
  for (int turn = 0;; ++turn) {
    int slot = turn & 1;
    Tile tile = tiles.at(blockIdx.x + turn * gridDim.x);
    mbar_wait(&bars.tile_free[slot], ((turn >> 1) & 1) ^ 1, "feed: tile_free");
    if (lane == 0) {
      bars.tile[slot] = tile;
      mbar_arrive(&bars.tile_full[slot]);
      for (int i = 0; tile.rows && i < steps; ++i, ++step) {
        int s = step % STAGES, halves = first_row(call, tile, 1) < call.outputs ? 2 : 1;
        int scales = min(8, blocks - 8 * i) * ROWS;
        uint8_t* here = smem + s * STAGE;
        mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "feed: free");
        mbar_expect(&bars.full[s], halves * (W_HALF + scales) + (TOP_K ? 0 : 4 * X_BOX));
        for (int half = 0; half < halves; ++half) {
          int row = first_row(call, tile, half);
          int64_t tiled = (int64_t)tile.expert * ceil_div(call.outputs, ROWS) + row / ROWS;
          tma_3d(here + half * W_HALF, w_map, &bars.full[s], i * (DEPTH / 4), row, tile.expert);
          bulk_load(here + OFF_SCALES + half * SCALE_HALF, packed.scale + (tiled * blocks + 8 * i) * ROWS, &bars.full[s], scales);
        }
        if (!TOP_K) tma_3d(here + OFF_X, x_map, &bars.full[s], 0, tile.row, i * (DEPTH / BK));
      }
    }
    __syncwarp();
    if (tile.rows == 0) break;
  }
}

// Gathers rows of x.
__device__ __forceinline__ void gather(uint8_t* smem, Bars& bars, const Call& call) {
  int lane = threadIdx.x % 32, steps = ceil_div(call.inputs, DEPTH), boxes = call.inputs / BK, step = 0;
  for (int turn = 0;; ++turn) {
    int slot = turn & 1;
    mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "gather: tile_full");
    Tile tile = bars.tile[slot];
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.tile_free[slot]);
    if (tile.rows == 0) break;
    Gather<TOKENS, 1> rows(call.x, call.order, tile, call.x_stride * 2, lane);
    for (int i = 0; i < steps; ++i, ++step) {
      int s = step % STAGES;
      mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "gather: free");
      for (int box = 0; box < DEPTH / BK && i * (DEPTH / BK) + box < boxes; ++box) {
        rows.copy(smem + s * STAGE + OFF_X + box * X_BOX, i * (DEPTH / BK) + box);
      }
      mbar_arrive_after_copies(&bars.full[s]);
    }
  }
}

// A warpgroup's sums of its half of a tile. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for entries
// 8 * (j / 4) + 2 * (lane % 4) + (j & 1). What a lane adds to a step's address is kept in registers.
__device__ __forceinline__ void sum_up(float (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, bool present, int& step) {
  int lane = from_here(threadIdx.x % 32), half = threadIdx.x / 128 - 1, first = threadIdx.x % 128 / 32 * 16;
  int steps = ceil_div(call.inputs, DEPTH), left = present ? call.inputs / 32 : 0;
  int at = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;  // row lane % 8, chunk lane / 8, swizzled
  int words_at = from_here(half * W_HALF + first * 128 + at), even_at = from_here(OFF_X + at), odd_at = from_here(OFF_X + (at ^ 64));
  int scales_at = from_here(OFF_SCALES + half * SCALE_HALF + first + lane / 4);
  float sums[CHAINS][PER] = {};
  int s = step % STAGES, turn = step / STAGES;
  step += steps;
  for (int i = 0; i < steps; ++i, left -= DEPTH / 32) {
    const uint8_t* here = smem + s * STAGE;
    mbar_wait(&bars.full[s], turn & 1, "multiply: full");
    UNROLL for (int span = 0; span < 2; ++span) {
      uint32_t words[2][4];
      UNROLL for (int high = 0; high < 2; ++high) load_blocks(words[high], here + high * 1024 + (words_at ^ span * 64));
      const uint8_t* scales = here + scales_at + 4 * span * ROWS;
      auto multiply = [&](int pair, auto two) {  // a block of 32 inputs: two chunks of 16
        uint32_t a[2][4], b[4];
        UNROLL for (int j = 0; j < 8; ++j) a[j >> 2][j & 3] = two(words[j & 1][j >> 1], j & 1);
        UNROLL for (int token = 0; token < TOKENS; token += 8) {
          load_blocks(b, here + (2 * span + pair / 2) * X_BOX + token * 128 + (pair % 2 ? odd_at : even_at));
          mma_16x8x16(&sums[0][token / 2], a[0], b[0], b[1]);
          mma_16x8x16(&sums[CHAINS - 1][token / 2], a[1], b[2], b[3]);
        }
      };
      Factors factors([&](int block, int r) { return (uint32_t)scales[block * ROWS + 8 * r]; });
      if (factors.plain && 4 * span + 4 <= left) {
        UNROLL for (int pair = 0; pair < 4; ++pair)
          multiply(pair, [&](uint32_t two, int r) { return times2(bits_of(two, pair), factors.of[pair][r]); });
      } else {
        UNROLL for (int pair = 0; pair < 4; ++pair) {
          if (4 * span + pair >= left) continue;  // rows of x are anything there
          Factor factor(scales[pair * ROWS], scales[pair * ROWS + 8]);
          multiply(pair, [&](uint32_t two, int r) { return two_of(two, pair, factor, r); });
        }
      }
    }
    fence_async_proxy();  // reads of this stage come before the copies that fill it again
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.free[s]);
    if (++s == STAGES) s = 0, ++turn;
  }
  UNROLL for (int j = 0; j < PER; ++j) acc[j] = CHAINS > 1 ? sums[0][j] + sums[CHAINS - 1][j] : sums[0][j];
}

// (up + 1) * gate * sigmoid(alpha * gate) of two neighbours, both clamped; NaN stays.
__device__ __forceinline__ uint32_t clamped(uint32_t gate, uint32_t up, const Packed& packed) {
  float g[2], u[2], most = packed.limit;
  unpack2(gate, g);
  unpack2(up, u);
  UNROLL for (int j = 0; j < 2; ++j) {
    g[j] = g[j] > most ? most : g[j];
    u[j] = u[j] > most ? most : u[j] < -most ? -most : u[j];
    g[j] = (u[j] + 1.f) * (g[j] / (1.f + exp2_fast(-1.4426950408889634f * packed.alpha * g[j])));
  }
  return pack2(g[0], g[1]);
}

__device__ __forceinline__ int of_gate(int gate, int up, const Packed& packed) {
  return (int)(GATE == 2 ? clamped((uint32_t)gate, (uint32_t)up, packed) : gated((uint32_t)gate, (uint32_t)up));
}

// To memory through shared memory, where [entry][half][row] lies, rounded; rows of this expert alone.
__device__ __forceinline__ void store(const float (&acc)[PER], uint16_t* shared, const Call& call, const Packed& packed, Tile tile) {
  int lane = threadIdx.x % 32, half = threadIdx.x / 128 - 1, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  int first = first_row(call, tile, half);
  float bias[2] = {0.f, 0.f};
  if (packed.bias != nullptr && first < call.outputs) {
    const uint16_t* of = packed.bias + (int64_t)tile.expert * call.outputs + first + row;
    bias[0] = low2(of[0]), bias[1] = low2(of[8]);
  }
  UNROLL for (int j = 0; j < PER; ++j) {
    int token = 8 * (j / 4) + 2 * (lane % 4) + (j & 1), high = j >> 1 & 1;
    shared[token * PITCH + half * ROWS + row + 8 * high] = (uint16_t)pack2(acc[j] + bias[high], 0.f);
  }
  named_sync(1, WORKERS);
  int column = GATE ? tile.column / 2 : tile.column;
  for (int c = threadIdx.x - 128; c < TOKENS * OUT / 8; c += WORKERS) {
    int token = c / (OUT / 8), inside = c % (OUT / 8) * 8;
    if (token >= tile.rows || (!GATE && column + inside >= call.outputs)) continue;
    const uint16_t* from = shared + token * PITCH + inside;
    Int4 eight = *(const Int4*)from;
    if (GATE) {
      Int4 up = *(const Int4*)(from + ROWS);
      eight = Int4{of_gate(eight.x, up.x, packed), of_gate(eight.y, up.y, packed), of_gate(eight.z, up.z, packed), of_gate(eight.w, up.w, packed)};
    }
    *(Int4*)(call.y + (int64_t)(tile.row + token) * call.y_stride + column + inside) = eight;
  }
  named_sync(1, WORKERS);
}

extern "C" __global__ void __launch_bounds__(384, BLOCKS)
grouped_few_mx(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* x, const uint8_t* weight_scale,
               const uint16_t* bias, uint16_t* y, const int* order, const int* start, int entries, int experts,
               int outputs, int inputs, int x_stride, int y_stride, float alpha, float limit) {
  Call call{(const uint8_t*)x, nullptr, nullptr, y, order, start, entries, experts, outputs, inputs, x_stride, y_stride};
  Packed packed{weight_scale, BIAS ? bias : nullptr, alpha, limit};
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) { mbar_init(&bars.full[i], TOP_K ? 33 : 1); mbar_init(&bars.free[i], WORKERS / 32); }
    for (int i = 0; i < 2; ++i) { mbar_init(&bars.tile_full[i], 1); mbar_init(&bars.tile_free[i], WORKERS / 32 + (TOP_K ? 1 : 0)); }
    mbar_fence_init();
    tma_prefetch_map(&w_map);
    if (!TOP_K) tma_prefetch_map(&x_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp == 0) {
    feed(smem, bars, &x_map, &w_map, call, packed);
  } else if (warp == 1) {
    if (TOP_K) gather(smem, bars, call);
  } else if (warp < 4) {
    clear_rows(call.y, call.start[call.experts], call.entries, call.y_stride, call.outputs / (GATE ? 2 : 1),
               blockIdx.x * 2 + warp - 2, gridDim.x * 2);
  } else {
    int step = 0;
    for (int turn = 0;; ++turn) {
      int slot = turn & 1;
      mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "multiply: tile_full");
      Tile tile = bars.tile[slot];
      if (tile.rows == 0) break;
      float acc[PER];
      sum_up(acc, smem, bars, call, first_row(call, tile, threadIdx.x / 128 - 1) < call.outputs, step);
      store(acc, (uint16_t*)(smem + OFF_Y), call, packed, tile);
      if (lane == 0) mbar_arrive(&bars.tile_free[slot]);
    }
  }
}
