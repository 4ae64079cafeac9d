// Sizes of mla_decode.cu and mla_combine.cu, and how the work is cut.
//
// A unit is TOKENS tokens x GROUP heads of a row: query vectors that see the same keys, COLUMNS at most. All units'
// blocks of 64 keys form one line, which is cut into equal shares, one for each thread block (for HEAD_GROUPS thread
// blocks, which take a group of heads each). A unit that lies in several shares leaves parts for mla_combine.cu.
#pragma once
#include "hopper.h"

// EXTEND: rows of several tokens, which see the keys before them; else one token a row, which sees its own key, too.
// PAGE: slots of a page. PDL: waits for the kernels before it on the device.
constexpr int N = COLUMNS, WIDTH = 576, RANK = 512, L = 64;
constexpr int CHUNK = L * 128, TILES = RANK / 64;  // a chunk: 64 columns of a block of keys; a tile: of the results
constexpr int PER = N / 2;                         // numbers of a product of 64 x N that a thread has
static_assert(N == 8 || N == 16 || N == 32 || N == 64, "columns of a product");
static_assert(GROUP >= 1 && TOKENS >= 1 && TOKENS * GROUP <= N && (EXTEND || TOKENS == 1) && PAGE % L == 0, "shape");

struct Batch { const int* query_start; const int* query_len; const int* context_len; int rows, tokens; };
// keys: that all its tokens see. blocks: of 64 keys.
struct Row {
  int keys, tokens, blocks, units;
  __device__ __forceinline__ int total() const { return blocks * units; }
};
__device__ __forceinline__ Row row_at(const Batch& batch, int r) {
  Row row{0, 1, 0, 1};
  if (r < batch.rows) {
    if (EXTEND) row.tokens = batch.query_len[r];
    row.keys = row.tokens > 0 ? batch.context_len[r] - (EXTEND ? row.tokens : 0) : 0;
  }
  row.blocks = ceil_div(row.keys, L);
  row.units = ceil_div(row.tokens, TOKENS);
  return row;
}

// All lanes: the length of a share, and of the line.
struct Line { int total, share; };
__device__ __forceinline__ Line line_of(const Batch& batch, int shares) {
  int total = 0;
  for (int r = threadIdx.x % 32; r < batch.rows; r += 32) total += row_at(batch, r).total();
  UNROLL for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
  return Line{total, max(ceil_div(total, shares), 1)};
}

// All lanes: the row that has the line's block at `place`, and where the row's blocks start in the line.
struct Cursor { int row, start; };
__device__ __forceinline__ Cursor find_row(const Batch& batch, int place) {
  Cursor at{0, 0};
  int lane = threadIdx.x % 32;
  for (;;) {
    int mine = row_at(batch, at.row + lane).total(), end = mine;
    UNROLL for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    uint32_t hit = __ballot_sync(~0u, at.start + end > place);
    if (hit) {
      int l = __ffs(hit) - 1;
      return Cursor{at.row + l, at.start + __shfl_sync(~0u, end - mine, l)};
    }
    at.start += __shfl_sync(~0u, end, 31);
    at.row += 32;
  }
}

// A part's place in scratch: two of each thread block, for a unit that an earlier share began, and for one that a
// later share ends.
__device__ __forceinline__ int64_t part_at(int share, bool first, int group) {
  return (int64_t)(2 * share + (first ? 1 : 0)) * HEAD_GROUPS + group;
}
// The query vector of number `i` of a product's columns that a thread has; numbers i and i + 1 are neighbours.
__device__ __forceinline__ int vector_of(int i) { return 8 * (i / 2) + 2 * (threadIdx.x % 4) + (i & 1); }
