// What products with experts' weights have in common: tiles found on the device, rows gathered, the gate.
#pragma once
#include "wgmma.h"

// FP8: operands are e4m3; INT8: integers; else 16-bit floats. SCALES: of those of 8 bits; 1: of rows and of (expert, output), 2: of rows and groups
// of 128 inputs, and of squares of 128. TOP_K: rows of x are order[entry] / TOP_K; 0: rows of x are the entries.
// SILU: y is silu of the first half of the outputs times the other half, both rounded to y's dtype before. EXPERTS: at
// most, a multiple of 32. PDL: waits for the kernels before it on the device.
#ifndef INT8
#define INT8 0
#endif
constexpr bool EIGHT = FP8 || INT8;
constexpr int BK = EIGHT ? 128 : 64;  // 128 bytes of a row
constexpr int PER_LANE = EXPERTS / 32;
static_assert(EXPERTS % 32 == 0 && EXPERTS > 0 && (FP8 ? SCALES == 1 || SCALES == 2 : SCALES == INT8) && !(FP8 && INT8), "macros");

struct Tile { int expert, row, rows, column; };  // the first entry, how many, the first output; no rows: none are left

// Tiles of all experts in a row; within an expert, entries before outputs. Lane l keeps those of experts
// l * PER_LANE and following; all lanes of a warp call together.
struct Tiles {
  int begin[PER_LANE + 1], mine, end, total, high, wide, across;

  // high, wide: entries and outputs of a tile.
  __device__ __forceinline__ Tiles(const int* start, int experts, int high, int wide, int outputs)
      : mine(0), high(high), wide(wide), across(ceil_div(outputs, wide)) {
    int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i <= PER_LANE; ++i) begin[i] = start[min(lane * PER_LANE + i, experts)];
    UNROLL for (int i = 0; i < PER_LANE; ++i) mine += ceil_div(begin[i + 1] - begin[i], high) * across;
    end = mine;
    UNROLL for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    total = __shfl_sync(~0u, end, 31);
  }

  __device__ __forceinline__ Tile at(int place) const {
    Tile tile{};
    if (place >= total) return tile;
    int lane = threadIdx.x % 32, owner = __ffs(__ballot_sync(~0u, end > place)) - 1, local = place - (end - mine);
    UNROLL for (int i = 0; i < PER_LANE; ++i) {  // meant for the owner; others compute nonsense
      int entries = begin[i + 1] - begin[i], down = ceil_div(entries, high), tiles = down * across;
      if (local >= 0 && local < tiles) {
        tile.expert = lane * PER_LANE + i;
        tile.row = begin[i] + local % down * high;
        tile.rows = min(high, entries - local % down * high);
        tile.column = local / down * wide;
      }
      local -= tiles;
    }
    tile.expert = __shfl_sync(~0u, tile.expert, owner);
    tile.row = __shfl_sync(~0u, tile.row, owner);
    tile.rows = __shfl_sync(~0u, tile.rows, owner);
    tile.column = __shfl_sync(~0u, tile.column, owner);
    return tile;
  }
};

// The row of x that an entry's is.
__device__ __forceinline__ int row_of(const int* order, int entry) {
  return TOP_K > 0 ? order[entry] / max(TOP_K, 1) : entry;
}

// A warp's share of the rows that are nobody's: zeros. width: of y, a multiple of 8.
__device__ __forceinline__ void clear_rows(uint16_t* y, int first, int rows, int y_stride, int width, int worker,
                                           int workers) {
  for (int row = first + worker; row < rows; row += workers) {
    for (int c = threadIdx.x % 32 * 8; c < width; c += 256) *(Int4*)(y + (int64_t)row * y_stride + c) = Int4{0, 0, 0, 0};
  }
}

// Rows of a tile to shared memory, 128 bytes of each a step, laid out as a copy with the 128-byte swizzle would. Lanes
// of WARPS warps share them: eight lanes a row. Rows that the tile lacks keep what is there.
template <int HIGH, int WARPS> struct Gather {
  static constexpr int EACH = HIGH / (4 * WARPS);
  static_assert(HIGH % (4 * WARPS) == 0, "whole turns of all lanes");
  const uint8_t* x;
  uint32_t from[EACH];  // in 16 bytes
  int lane, rows;

  // lane: among all warps'. stride: bytes from one row of x to the next.
  __device__ __forceinline__ Gather(const uint8_t* x, const int* order, Tile tile, int stride, int lane)
      : x(x), lane(lane), rows(tile.rows) {
    UNROLL for (int i = 0; i < EACH; ++i) {
      int row = lane / 8 + i * 4 * WARPS;
      from[i] = (row < rows ? row_of(order, tile.row + row) * (uint32_t)(stride / 16) : 0u) + lane % 8;
    }
  }
  __device__ __forceinline__ void copy(uint8_t* to, int step) const {
    UNROLL for (int i = 0; i < EACH; ++i) {
      int row = lane / 8 + i * 4 * WARPS;
      if (row < rows) copy_16(to + row * 128 + (lane % 8 ^ row & 7) * 16, x + ((int64_t)from[i] + step * 8) * 16);
    }
  }
};

// silu(gate) * up of two neighbours, both rounded as results are.
__device__ __forceinline__ uint32_t gated(uint32_t gate, uint32_t up) {
  float g[2], u[2];
  unpack2(gate, g);
  unpack2(up, u);
  UNROLL for (int j = 0; j < 2; ++j) g[j] = g[j] / (1.f + exp2_fast(-1.4426950408889634f * g[j])) * u[j];
  return pack2(g[0], g[1]);
}

// A call's operands; x and weight_scale are null where there are none. outputs: of an expert. Strides in elements.
struct Call {
  const uint8_t* x; const float* x_scale; const float* weight_scale; uint16_t* y; const int* order; const int* start;
  int entries, experts, outputs, inputs, x_stride, y_stride;
};
#if INT8
using Sum = int;
#else
using Sum = float;
#endif
template <class Sums> __device__ __forceinline__ void multiply(Sums& d, uint64_t a, uint64_t b, int accumulate) {
#if FP8
  wgmma_ss_e4m3(d, a, b, accumulate);
#elif INT8
  wgmma_ss_s8(d, a, b, accumulate);
#else
  wgmma_ss_16bit(d, a, b, accumulate);
#endif
}
