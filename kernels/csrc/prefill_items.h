// Tiles of TOKENS tokens of one head and row, in the order in which blocks take them, and what belongs to no row. TOKENS,
// L (keys of a step) and WINDOW (tokens that a token sees, 0: all) are known.
#pragma once
#include "hopper.h"

// count: tokens of the tile; position, length: of its first token, of its row. Its keys are steps `end - steps` to
// `end - 1`. No steps: no items are left.
struct Item { int token, count, position, length, head, row, end, steps; };
__device__ __forceinline__ int first_seen(int position) { return WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0; }

// Where the search for the next item goes on: rows from `row` on, whose first tile is item `base`.
struct Sweep { int row, base; };

// All lanes: the item at `place`, which is beyond those found before. Without one, `base` is how many there are.
__device__ __forceinline__ Item find_item(int place, Sweep& from, int rows, int kv_heads, const int* query_start,
                                          const int* query_len, const int* context_len) {
  int lane = threadIdx.x % 32;
  Item item{};
  for (; from.row < rows; from.row += 32) {
    int r = from.row + lane, len = r < rows ? query_len[r] : 0;
    int mine = ceil_div(len, TOKENS) * kv_heads, end = mine;
    UNROLL for (int d = 1; d < 32; d *= 2) {
      int other = __shfl_up_sync(~0u, end, d);
      if (lane >= d) end += other;
    }
    uint32_t hit = __ballot_sync(~0u, from.base + end > place);
    if (hit) {
      int l = __ffs(hit) - 1, row = from.row + l;
      int start = from.base + __shfl_sync(~0u, end - mine, l), n = __shfl_sync(~0u, len, l);
      int local = place - start;
      int tile = ceil_div(n, TOKENS) - 1 - local / kv_heads;  // the last tiles see most keys
      item.length = context_len[row];
      item.row = row;
      item.head = local % kv_heads;
      item.token = query_start[row] + tile * TOKENS;
      item.count = min(TOKENS, n - tile * TOKENS);
      item.position = item.length - n + tile * TOKENS;
      item.end = ceil_div(item.position + item.count, L);
      item.steps = item.end - first_seen(item.position) / L;
      break;
    }
    from.base += __shfl_sync(~0u, end, 31);
  }
  return item;
}

// A warp's share of the tokens of no row: zeros, and `also` of each.
template <class Also>
__device__ __forceinline__ void clear_idle(uint16_t* y, const int* query_start, const int* query_len, int rows,
                                           int tokens, int y_stride, int width, int worker, int workers, Also also) {
  int lane = threadIdx.x % 32, total = 0;
  for (int r = lane; r < rows; r += 32) total += query_len[r];
  UNROLL for (int d = 1; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
  if (total >= tokens) return;
  for (int token = worker; token < tokens; token += workers) {
    bool owned = false;
    for (int r0 = 0; r0 < rows && !owned; r0 += 32) {
      int r = r0 + lane, after = r < rows ? token - query_start[r] : -1;
      owned = __ballot_sync(~0u, after >= 0 && after < query_len[r < rows ? r : 0]) != 0;
    }
    if (owned) continue;
    for (int c = lane * 8; c < width; c += 256) *(Int4*)(y + (int64_t)token * y_stride + c) = Int4{0, 0, 0, 0};
    also(token);
  }
}
