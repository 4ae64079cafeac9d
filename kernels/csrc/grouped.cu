// Products of tokens with their experts' weights for many entries an expert, for Hopper.
//
// Blocks are persistent and tiles are found on the device, so that one launch serves every routing: entries of an expert
// are neither padded nor moved. Of 12 warps the first finds tiles and copies weights (and rows of x where they lie in
// order), two gather rows of x, one writes zeros to rows that are nobody's, and two warpgroups multiply. WAYS 2: each
// takes 64 of 128 entries and WN outputs; WAYS 1: both the same 64 entries, and WN outputs each. Scales of groups are
// applied to sums over 128 inputs outside of the tensor cores, as DeepSeek-V3 does (arXiv:2412.19437).
// Where SILU, half of a warpgroup's WN outputs are the gate's and half those that they multiply.
//
// Rows of a product that no entry has may hold anything: nobody stores them, and they touch no other row.
#include "experts.h"

// WIDE: 256 outputs a warpgroup instead of 128, so that rows are read half as often.
constexpr int WN = WIDE ? 256 : 128, BM = 64 * WAYS, CHUNKS = 3 - WAYS, BN = WN * CHUNKS, OUT = SILU ? WN / 2 : WN;
constexpr int SPAN = OUT < 128 ? OUT : 128;  // columns that are written at once
constexpr int A_BYTES = BM * 128, B_BYTES = BN * 128, STAGE = A_BYTES + B_BYTES;
constexpr int Y_BYTES = 8 * 16 * SPAN * 2, BAR_BYTES = 256;
constexpr int ROOM = (232448 - Y_BYTES - BAR_BYTES - 1024) / STAGE, STAGES = ROOM < 8 ? ROOM : 8;
constexpr int OFF_Y = STAGES * STAGE, OFF_BARS = OFF_Y + Y_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
constexpr int GATHERERS = 2;  // warps
// Registers of a thread that copies, and of one that multiplies: gathering holds 16 rows.
constexpr int COPYING = TOP_K ? 72 : 40, MULTIPLYING = TOP_K ? 216 : 232;
static_assert(128 * COPYING + 256 * MULTIPLYING <= 65536, "registers");

struct Bars { uint64_t full[8], free[8], tile_full[2], tile_free[2]; Tile tile[2]; };
static_assert((WAYS == 1 || WAYS == 2) && BN <= 256 && !(EIGHT && WIDE), "a tile");
static_assert(sizeof(Bars) <= BAR_BYTES && STAGES >= 3 && SHARED <= 232448, "shared memory");

LAUNCH_FACTS(384, SHARED, 1);

// Finds tiles and copies their weights, and rows of x where these are not gathered.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const TensorMap* x_map, const TensorMap* w_map, const Call& call) {
  int lane = threadIdx.x % 32, steps = call.inputs / BK, step = 0;
  Tiles tiles(call.start, call.experts, BM, BN, call.outputs);
  for (int turn = 0;; ++turn) {
    int slot = turn & 1;
    Tile tile = tiles.at(blockIdx.x + turn * gridDim.x);
    mbar_wait(&bars.tile_free[slot], ((turn >> 1) & 1) ^ 1, "feed: tile_free");
    if (lane == 0) {
      bars.tile[slot] = tile;
      mbar_arrive(&bars.tile_full[slot]);
      for (int i = 0; tile.rows && i < steps; ++i, ++step) {
        int s = step % STAGES;
        uint8_t* here = smem + s * STAGE;
        mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "feed: free");
        mbar_expect(&bars.full[s], B_BYTES + (TOP_K ? 0 : A_BYTES));
        if (SILU) {
          UNROLL for (int half = 0; half < 2 * CHUNKS; ++half) {
            int column = tile.column / 2 + half / 2 * OUT + half % 2 * (call.outputs / 2);
            tma_3d(here + A_BYTES + half * OUT * 128, w_map, &bars.full[s], i * BK, column, tile.expert);
          }
        } else {
          tma_3d(here + A_BYTES, w_map, &bars.full[s], i * BK, tile.column, tile.expert);
        }
        if (!TOP_K) tma_2d(here, x_map, &bars.full[s], i * BK, tile.row);
      }
    }
    __syncwarp();
    if (tile.rows == 0) break;
  }
}

// Gathers rows of x. lane: among those of all warps that do.
__device__ __forceinline__ void gather(uint8_t* smem, Bars& bars, const Call& call, int lane) {
  int steps = call.inputs / BK, step = 0;
  for (int turn = 0;; ++turn) {
    int slot = turn & 1;
    mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "gather: tile_full");
    Tile tile = bars.tile[slot];
    __syncwarp();
    if (lane % 32 == 0) mbar_arrive(&bars.tile_free[slot]);
    if (tile.rows == 0) break;
    Gather<BM, GATHERERS> rows(call.x, call.order, tile, call.x_stride * (EIGHT ? 1 : 2), lane);
    for (int i = 0; i < steps; ++i, ++step) {
      int s = step % STAGES;
      mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "gather: free");
      rows.copy(smem + s * STAGE, i);
      mbar_arrive_after_copies(&bars.full[s]);
    }
  }
}

// What a thread of a multiplying warpgroup has: entries `row` and row + 8 of the tile; outputs
// 8 * (j / 4) + 2 * (lane % 4) + (j & 1) from `column` on (of y), where SILU the second half of them OUT further on.
struct Part { int row, column, b; };

// Scales of groups for a thread's sums.
struct GroupScales {
  const float* of_outputs[2]; const float* of_rows[2]; float outputs[2], rows[2];

  __device__ __forceinline__ GroupScales(const Call& call, Tile tile, Part part) {
    int groups = call.inputs / 128, squares = ceil_div(call.outputs, 128);
    UNROLL for (int h = 0; h < 2; ++h) {
      int square = min((part.column + (SILU ? h * (call.outputs / 2) : 0)) / 128, squares - 1);
      of_outputs[h] = call.weight_scale + ((int64_t)tile.expert * squares + square) * groups;
      of_rows[h] = call.x_scale + (int64_t)row_of(call.order, tile.row + min(part.row + 8 * h, tile.rows - 1)) * groups;
    }
    load(0);
  }
  __device__ __forceinline__ void load(int step) {
    UNROLL for (int h = 0; h < 2; ++h) {
      outputs[h] = h == 0 || SILU ? of_outputs[h][step] : outputs[0];
      rows[h] = of_rows[h][step];
    }
  }
};

// A tile's sums.
__device__ __forceinline__ void sum_up(Sum (&acc)[WN / 2], uint8_t* smem, Bars& bars, const Call& call, Tile tile, Part part, int& step) {
  int lane = threadIdx.x % 32, steps = call.inputs / BK;
  uint32_t base = smem_u32(smem), a0 = WAYS == 2 ? part.row / 64 * 64 * 128 : 0;
  const uint64_t form = operand_128b(16, 1024);
#if FP8
  UNROLL for (int j = 0; j < WN / 2; ++j) acc[j] = 0.f;
#endif
#if SCALES == 2
  GroupScales scales(call, tile, part);
#endif
  for (int i = 0; i < steps; ++i, ++step) {
    int s = step % STAGES;
    uint32_t a = base + s * STAGE + a0, b = base + s * STAGE + A_BYTES + part.b;
    mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
    if (TOP_K) fence_async_proxy();  // rows of x were written by ordinary copies
    wgmma_fence();
#if FP8  // sums of 8-bit products keep 14 bits: those of 128 inputs are added in fp32
    float sums[WN / 2];
    UNROLL for (int j = 0; j < 4; ++j) multiply(sums, at(form, a + j * 32), at(form, b + j * 32), j != 0);
    wgmma_commit();
#if SCALES == 2
    float scale[4];
    UNROLL for (int j = 0; j < 4; ++j) scale[j] = scales.rows[j & 1] * scales.outputs[j >> 1];
    scales.load(min(i + 1, steps - 1));
#endif
    wgmma_wait<0>();
    keep(sums);
    if (lane == 0) mbar_arrive(&bars.free[s]);
#if SCALES == 2
    UNROLL for (int j = 0; j < WN / 2; ++j) acc[j] += sums[j] * scale[((j >> 1) & 1) + (SILU && j >= WN / 4 ? 2 : 0)];
#else
    UNROLL for (int j = 0; j < WN / 2; ++j) acc[j] += sums[j];
#endif
#else
    UNROLL for (int j = 0; j < 4; ++j) multiply(acc, at(form, a + j * 32), at(form, b + j * 32), j != 0 ? 1 : i != 0);
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

// Sums by the scales of entries and of outputs.
__device__ __forceinline__ void scale_channels(float (&acc)[WN / 2], const Call& call, Tile tile, Part part) {
  int lane = threadIdx.x % 32, width = SILU ? call.outputs / 2 : call.outputs;
  const float* of = call.weight_scale + (int64_t)tile.expert * call.outputs;
  float rows[2];
  UNROLL for (int h = 0; h < 2; ++h) rows[h] = call.x_scale[row_of(call.order, tile.row + min(part.row + 8 * h, tile.rows - 1))];
  UNROLL for (int j = 0; j < WN / 2; j += 4) {
    bool up = SILU && j >= WN / 4;
    int column = part.column + 2 * j - (up ? WN / 2 : 0) + 2 * (lane % 4);
    if (column >= width) continue;
    const float* here = of + (up ? width : 0) + column;
    UNROLL for (int i = 0; i < 4; ++i) acc[j + i] *= rows[i >> 1] * here[i & 1];
  }
}

// Through shared memory, a warp's own 16 rows of SPAN columns, to rows of this expert alone.
__device__ __forceinline__ void store(const float (&acc)[WN / 2], uint8_t* shared, const Call& call, Tile tile, Part part) {
  int lane = threadIdx.x % 32, width = SILU ? call.outputs / 2 : call.outputs, first = part.row - lane / 4;
  constexpr int LANES = SPAN / 8, ROWS = 32 / LANES;  // of a row, of a turn
  UNROLL for (int c = 0; c < OUT / SPAN; ++c) {
    UNROLL for (int i = 0; i < SPAN / 8; ++i) {
      UNROLL for (int h = 0; h < 2; ++h) {
        int r = lane / 4 + 8 * h, byte = 16 * i + 4 * (lane % 4), j = SPAN / 2 * c + 4 * i + 2 * h;
        uint32_t two = pack2(acc[j], acc[j + 1]);
        if (SILU) two = gated(two, pack2(acc[(j + WN / 4) % (WN / 2)], acc[(j + 1 + WN / 4) % (WN / 2)]));
        *(uint32_t*)(shared + r * SPAN * 2 + (byte ^ (r & 7) << 4)) = two;
      }
    }
    __syncwarp();
    UNROLL for (int i = 0; i < 16 / ROWS; ++i) {
      int r = i * ROWS + lane / LANES, byte = lane % LANES * 16, column = part.column + SPAN * c + byte / 2;
      Int4 eight = *(Int4*)(shared + r * SPAN * 2 + (byte ^ (r & 7) << 4));
      if (first + r < tile.rows && column < width) {
        *(Int4*)(call.y + (int64_t)(tile.row + first + r) * call.y_stride + column) = eight;
      }
    }
    __syncwarp();
  }
}

__device__ __forceinline__ void run(const TensorMap* x_map, const TensorMap* w_map, const Call& call) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) { mbar_init(&bars.full[i], TOP_K ? 1 + 32 * GATHERERS : 1); mbar_init(&bars.free[i], 8); }
    for (int i = 0; i < 2; ++i) { mbar_init(&bars.tile_full[i], 1); mbar_init(&bars.tile_free[i], TOP_K ? 8 + GATHERERS : 8); }
    mbar_fence_init();
    tma_prefetch_map(w_map);
    if (!TOP_K) tma_prefetch_map(x_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp < 4) {
    setmaxnreg_dec<COPYING>();
    if (warp == 0) {
      feed(smem, bars, x_map, w_map, call);
    } else if (warp <= GATHERERS) {
      if (TOP_K) gather(smem, bars, call, threadIdx.x - 32);
    } else {
      clear_rows(call.y, call.start[call.experts], call.entries, call.y_stride, call.outputs / (SILU ? 2 : 1), blockIdx.x, gridDim.x);
    }
  } else {
    setmaxnreg_inc<MULTIPLYING>();
    int half = warp / 4 - 1, step = 0;
    for (int turn = 0;; ++turn) {
      int slot = turn & 1;
      mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "multiply: tile_full");
      Tile tile = bars.tile[slot];
      if (tile.rows == 0) break;
      Part part{(WAYS == 2 ? half * 64 : 0) + warp % 4 * 16 + lane / 4,
                (SILU ? tile.column / 2 : tile.column) + (WAYS == 2 ? 0 : half * OUT), WAYS == 2 ? 0 : half * WN * 128};
      Sum sums[WN / 2];
      sum_up(sums, smem, bars, call, tile, part, step);
      float acc[WN / 2];
      UNROLL for (int j = 0; j < WN / 2; ++j) acc[j] = (float)sums[j];
      if (SCALES == 1) scale_channels(acc, call, tile, part);
      store(acc, smem + OFF_Y + (warp - 4) * 16 * SPAN * 2, call, tile, part);
      if (lane == 0) mbar_arrive(&bars.tile_free[slot]);
    }
  }
}

#if FP8 || INT8
extern "C" __global__ void __launch_bounds__(384, 1)
grouped_scaled(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint8_t* x, const float* x_scale,
            const float* weight_scale, uint16_t* y, const int* order, const int* start, int entries, int experts, int outputs,
            int inputs, int x_stride, int y_stride) {
  run(&x_map, &w_map, Call{x, x_scale, weight_scale, y, order, start, entries, experts, outputs, inputs, x_stride, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(384, 1)
grouped(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* x, uint16_t* y, const int* order,
        const int* start, int entries, int experts, int outputs, int inputs, int x_stride, int y_stride) {
  run(&x_map, &w_map,
      Call{(const uint8_t*)x, nullptr, nullptr, y, order, start, entries, experts, outputs, inputs, x_stride, y_stride});
}
#endif
