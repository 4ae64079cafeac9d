// Products of tokens with their experts' weights for few entries an expert, for Hopper. Weights are the long side of the
// matrix instructions (64 of a tile), entries the short one (TOKENS), so that little is padded and memory sets the pace.
//
// Blocks are persistent and tiles are found on the device, so that one launch serves every routing. Two small blocks
// share a multiprocessor, each with some 100 KiB of copies under way: warp 0 finds tiles and copies weights (and rows of
// x where they lie in order), warp 1 gathers rows of x, two write zeros to rows that are nobody's, four multiply.
// Where SILU, a tile is 32 rows of the gate and the 32 that they multiply.
//
// Columns of a product that no entry has may hold anything: nobody stores them, and they touch no other column.
#include "experts.h"

constexpr int BN = 64, PER = TOKENS / 2, OUT = SILU ? BN / 2 : BN;
constexpr int W_BYTES = BN * 128, X_BYTES = TOKENS * 128, STAGE = W_BYTES + X_BYTES;
constexpr int PITCH = BN + 8;  // elements of a row of results in shared memory
constexpr int Y_BYTES = TOKENS * PITCH * 2, BAR_BYTES = 320;
constexpr int ROOM = (112 * 1024 - Y_BYTES - BAR_BYTES - 1024) / STAGE, STAGES = ROOM < 12 ? ROOM : 12;
constexpr int OFF_Y = STAGES * STAGE, OFF_BARS = OFF_Y + Y_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;

struct Bars { uint64_t full[12], free[12], tile_full[2], tile_free[2]; Tile tile[2]; };
static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32 || TOKENS == 64, "columns of a product");
static_assert(sizeof(Bars) <= BAR_BYTES && STAGES >= 4 && OFF_Y % 1024 == 0 && 2 * (SHARED + 1024) <= 228 * 1024, "shared memory");

LAUNCH_FACTS(256, SHARED, 1);

// Finds tiles and copies their weights, and rows of x where these are not gathered.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const TensorMap* x_map, const TensorMap* w_map, const Call& call) {
  int lane = threadIdx.x % 32, steps = call.inputs / BK, step = 0;
  Tiles tiles(call.start, call.experts, TOKENS, BN, call.outputs);
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
        mbar_expect(&bars.full[s], W_BYTES + (TOP_K ? 0 : X_BYTES));
        if (SILU) {
          int column = tile.column / 2;
          tma_3d(here, w_map, &bars.full[s], i * BK, column, tile.expert);
          tma_3d(here + W_BYTES / 2, w_map, &bars.full[s], i * BK, call.outputs / 2 + column, tile.expert);
        } else {
          tma_3d(here, w_map, &bars.full[s], i * BK, tile.column, tile.expert);
        }
        if (!TOP_K) tma_2d(here + W_BYTES, x_map, &bars.full[s], i * BK, tile.row);
      }
    }
    __syncwarp();
    if (tile.rows == 0) break;
  }
}

// Gathers rows of x.
__device__ __forceinline__ void gather(uint8_t* smem, Bars& bars, const Call& call) {
  int lane = threadIdx.x % 32, steps = call.inputs / BK, step = 0;
  for (int turn = 0;; ++turn) {
    int slot = turn & 1;
    mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "gather: tile_full");
    Tile tile = bars.tile[slot];
    __syncwarp();
    if (lane == 0) mbar_arrive(&bars.tile_free[slot]);
    if (tile.rows == 0) break;
    Gather<TOKENS, 1> rows(call.x, call.order, tile, call.x_stride * (EIGHT ? 1 : 2), lane);
    for (int i = 0; i < steps; ++i, ++step) {
      int s = step % STAGES;
      mbar_wait(&bars.free[s], ((step / STAGES) & 1) ^ 1, "gather: free");
      rows.copy(smem + s * STAGE + W_BYTES, i);
      mbar_arrive_after_copies(&bars.full[s]);
    }
  }
}

// Scales that a thread's sums need, where they are of groups: of its entries and of its warp's outputs.
struct GroupScales {
  const float* of_outputs; int of_entry[TOKENS / 4]; float outputs, entries[TOKENS / 4];

  __device__ __forceinline__ GroupScales(const Call& call, Tile tile, int warp) {
    int lane = threadIdx.x % 32, groups = call.inputs / 128;
    int column = SILU ? tile.column / 2 + (warp < 2 ? 0 : call.outputs / 2) : tile.column;
    of_outputs = call.weight_scale + ((int64_t)tile.expert * ceil_div(call.outputs, 128) + column / 128) * groups;
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) {
      int token = 8 * (h / 2) + 2 * (lane % 4) + (h & 1);
      of_entry[h] = row_of(call.order, tile.row + min(token, tile.rows - 1)) * groups;
    }
    load(call, 0);
  }
  __device__ __forceinline__ void load(const Call& call, int step) {
    outputs = of_outputs[step];
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) entries[h] = call.x_scale[of_entry[h] + step];
  }
};

// A tile's sums. A thread has rows 16 * warp + lane / 4 (and that + 8) of the weights for entries
// 8 * (j / 4) + 2 * (lane % 4) + (j & 1).
__device__ __forceinline__ void sum_up(Sum (&acc)[PER], uint8_t* smem, Bars& bars, const Call& call, Tile tile, int& step) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, steps = call.inputs / BK;
  uint32_t base = smem_u32(smem);
  const uint64_t form = operand_128b(16, 1024);
#if FP8
  UNROLL for (int j = 0; j < PER; ++j) acc[j] = 0.f;
#endif
#if SCALES == 2
  GroupScales scales(call, tile, warp);
#endif
  for (int i = 0; i < steps; ++i, ++step) {
    int s = step % STAGES;
    uint32_t a = base + s * STAGE, b = a + W_BYTES;
    mbar_wait(&bars.full[s], (step / STAGES) & 1, "multiply: full");
    if (TOP_K) fence_async_proxy();  // rows of x were written by ordinary copies
    wgmma_fence();
#if FP8  // sums of 8-bit products keep 14 bits: those of 128 inputs are added in fp32
    float part[PER];
    UNROLL for (int j = 0; j < 4; ++j) multiply(part, at(form, a + j * 32), at(form, b + j * 32), j != 0);
    wgmma_commit();
#if SCALES == 2
    float scale[TOKENS / 4];
    UNROLL for (int h = 0; h < TOKENS / 4; ++h) scale[h] = scales.entries[h] * scales.outputs;
    scales.load(call, min(i + 1, steps - 1));
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
__device__ __forceinline__ void scale_channels(float (&acc)[PER], const Call& call, Tile tile) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  int row = SILU ? tile.column / 2 + (warp < 2 ? warp : warp - 2) * 16 + (warp < 2 ? 0 : call.outputs / 2) : tile.column + warp * 16;
  const float* of = call.weight_scale + (int64_t)tile.expert * call.outputs + row + lane / 4;
  float outputs[2] = {of[0], of[8]};
  UNROLL for (int j = 0; j < PER; ++j) {
    int token = 8 * (j / 4) + 2 * (lane % 4) + (j & 1);
    acc[j] *= call.x_scale[row_of(call.order, tile.row + min(token, tile.rows - 1))] * outputs[(j >> 1) & 1];
  }
}

// To memory through shared memory, where [entry][output] lies; rows of this expert alone.
__device__ __forceinline__ void store(const float (&acc)[PER], uint16_t* shared, const Call& call, Tile tile) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, t = threadIdx.x % 128;
  UNROLL for (int j = 0; j < PER; j += 2) {
    int token = 8 * (j / 4) + 2 * (lane % 4), row = warp * 16 + lane / 4 + (j & 2) * 4;
    uint32_t both = pack2(acc[j], acc[j + 1]);
    shared[token * PITCH + row] = (uint16_t)both;
    shared[(token + 1) * PITCH + row] = (uint16_t)(both >> 16);
  }
  named_sync(1, 128);
  for (int c = t; c < TOKENS * OUT / 8; c += 128) {
    int token = c / (OUT / 8), column = c % (OUT / 8) * 8;
    if (token >= tile.rows) continue;
    const uint16_t* from = shared + token * PITCH + column;
    Int4 eight = *(const Int4*)from;
    if (SILU) {
      Int4 up = *(const Int4*)(from + OUT);
      eight = Int4{(int)gated(eight.x, up.x), (int)gated(eight.y, up.y), (int)gated(eight.z, up.z), (int)gated(eight.w, up.w)};
    }
    *(Int4*)(call.y + (int64_t)(tile.row + token) * call.y_stride + (SILU ? tile.column / 2 : tile.column) + column) = eight;
  }
  named_sync(1, 128);
}

__device__ __forceinline__ void run(const TensorMap* x_map, const TensorMap* w_map, const Call& call) {
  uint8_t* smem = smem_base();
  Bars& bars = *(Bars*)(smem + OFF_BARS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) { mbar_init(&bars.full[i], TOP_K ? 33 : 1); mbar_init(&bars.free[i], 4); }
    for (int i = 0; i < 2; ++i) { mbar_init(&bars.tile_full[i], 1); mbar_init(&bars.tile_free[i], TOP_K ? 5 : 4); }
    mbar_fence_init();
    tma_prefetch_map(w_map);
    if (!TOP_K) tma_prefetch_map(x_map);
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  __syncthreads();

  if (warp == 0) {
    feed(smem, bars, x_map, w_map, call);
  } else if (warp == 1) {
    if (TOP_K) gather(smem, bars, call);
  } else if (warp < 4) {
    clear_rows(call.y, call.start[call.experts], call.entries, call.y_stride, call.outputs / (SILU ? 2 : 1),
               blockIdx.x * 2 + warp - 2, gridDim.x * 2);
  } else {
    int step = 0;
    for (int turn = 0;; ++turn) {
      int slot = turn & 1;
      mbar_wait(&bars.tile_full[slot], (turn >> 1) & 1, "multiply: tile_full");
      Tile tile = bars.tile[slot];
      if (tile.rows == 0) break;
      Sum sums[PER];
      sum_up(sums, smem, bars, call, tile, step);
      float acc[PER];
      UNROLL for (int j = 0; j < PER; ++j) acc[j] = (float)sums[j];
      if (SCALES == 1) scale_channels(acc, call, tile);
      store(acc, (uint16_t*)(smem + OFF_Y), call, tile);
      if (lane == 0) mbar_arrive(&bars.tile_free[slot]);
    }
  }
}

#if FP8 || INT8
extern "C" __global__ void __launch_bounds__(256, 2)
grouped_few_scaled(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint8_t* x, const float* x_scale,
                const float* weight_scale, uint16_t* y, const int* order, const int* start, int entries, int experts,
                int outputs, int inputs, int x_stride, int y_stride) {
  run(&x_map, &w_map, Call{x, x_scale, weight_scale, y, order, start, entries, experts, outputs, inputs, x_stride, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(256, 2)
grouped_few(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* x, uint16_t* y, const int* order,
            const int* start, int entries, int experts, int outputs, int inputs, int x_stride, int y_stride) {
  run(&x_map, &w_map,
      Call{(const uint8_t*)x, nullptr, nullptr, y, order, start, entries, experts, outputs, inputs, x_stride, y_stride});
}
#endif
