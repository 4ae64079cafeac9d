// Places of mla_decode.cu in shared memory, and its warps that do not multiply: one copies, three write zeros.
#pragma once
#include "mla_shapes.h"
#include "places.h"
#define ROLLED _Pragma("unroll 1")  // the warps that copy and clear have few registers

constexpr int GROUPS = 3, GROUP_BYTES = 3 * CHUNK, BOX = 16;
constexpr int VALUE_GROUPS = N == 64 ? 2 : 1, THREADS = 256 + 128 * VALUE_GROUPS;
constexpr int Q_CHUNK = N * 128, Q_BYTES = 9 * Q_CHUNK, P_BYTES = N * 128;
constexpr int P_PLACES = N == 64 ? 1 : 2, BAR_BYTES = 2048;
constexpr int ROOM = (232448 - Q_BYTES - P_PLACES * P_BYTES - BAR_BYTES - 1024) / GROUP_BYTES;
constexpr int K_PLACES = ROOM < 8 ? ROOM : 8;
constexpr int OFF_K = 0, OFF_Q = K_PLACES * GROUP_BYTES, OFF_P = OFF_Q + Q_BYTES;
constexpr int OFF_BARS = OFF_P + P_PLACES * P_BYTES, SHARED = OFF_BARS + BAR_BYTES + 1024;
// At 64 vectors half of the results are 128 numbers a thread.
constexpr int FEED_REGISTERS = 48, SCORE_REGISTERS = 128, VALUE_REGISTERS = 168;
static_assert(FEED_REGISTERS + SCORE_REGISTERS + 2 * VALUE_REGISTERS <= 4 * 128, "warps wait for ever");

// Blocks `first` to `first + blocks - 1` of a unit whose keys are `keys`; part: its place, or the unit is whole: -1.
// token: its first of `count`. No blocks: nothing is left.
struct Item { int row, token, count, first, blocks, keys, part; };
struct alignas(16) Four { float x[4]; };
struct Factors { float base, shrink; };  // what exponents are taken from; of what came before
struct Bars {
  Four top[N];  // of each vector and warp: maxima of a block's scores, at an item's end sums of weights
  Factors factors[P_PLACES][N];
  float scale[N];
  Places<K_PLACES> k;
  Places<P_PLACES> p;
  Places<2> item;
  Places<1> q, end;
  Item items[2];
};
static_assert(sizeof(Bars) <= BAR_BYTES && OFF_BARS % 1024 == 0 && SHARED <= 232448, "shared memory");

struct Call {
  const TensorMap *q_map, *k_map, *k_box_map;
  uint16_t* y; float *log_sum, *parts, *logs;
  const int* page_table;
  Batch batch;
  int table_stride, y_stride;
  float scale_log2;
};
__device__ __forceinline__ int head_group() { return blockIdx.x % HEAD_GROUPS; }

// One thread: a block of 64 keys, the last `valid` of them in the place's last slots.
__device__ __forceinline__ void copy_keys(uint8_t* smem, Bars& bars, Ring<K_PLACES>& k, const Call& call, int page,
                                          int slot, int valid) {
  int empty = L - valid, from = empty / BOX * BOX;
  ROLLED for (int g = 0; g < GROUPS; ++g, k.next()) {
    wait_free(bars.k, k, "feed: k free");
    uint8_t* to = smem + OFF_K + k.place() * GROUP_BYTES;
    uint64_t* full = &bars.k.full[k.place()];
    mbar_expect(full, 3 * 128 * (L - from));
    ROLLED for (int c = 0; c < 3; ++c) {
      int column = (g * 3 + c) * 64;
      if (from == 0 && empty == 0) {
        tma_3d(to + c * CHUNK, call.k_map, full, column, slot, page);
      } else {
        ROLLED for (int s = from; s < L; s += BOX) {
          tma_3d(to + c * CHUNK + s * 128, call.k_box_map, full, column, slot + s - empty, page);
        }
      }
    }
  }
}

// The first warp: items, and copies of their keys and queries. Only where the share begins is found before the wait.
__device__ __forceinline__ void feed(uint8_t* smem, Bars& bars, const Call& call) {
  int lane = threadIdx.x % 32, index = blockIdx.x / HEAD_GROUPS;
  Line line = line_of(call.batch, gridDim.x / HEAD_GROUPS);
  int place = min(line.share * index, line.total), end = min(place + line.share, line.total);
  Cursor at{0, 0};
  if (place < end) at = find_row(call.batch, place);
#if PDL
  dependence_wait();
#endif
  Ring<K_PLACES> k;
  Ring<2> items;
  Ring<1> q;
  for (;; items.next(), q.next()) {
    Item item{};
    if (place < end) {
      Row row = row_at(call.batch, at.row);
      while (place - at.start >= row.total()) {
        at.start += row.total();
        row = row_at(call.batch, ++at.row);
      }
      int unit = (place - at.start) / row.blocks;
      item.row = at.row;
      item.token = (EXTEND ? call.batch.query_start[at.row] : at.row) + unit * TOKENS;
      item.count = min(row.tokens - unit * TOKENS, TOKENS);
      item.first = place - at.start - unit * row.blocks;
      item.blocks = min(row.blocks - item.first, end - place);
      item.keys = row.keys;
      item.part = item.blocks == row.blocks ? -1 : (int)part_at(index, item.first == 0, head_group());
    }
    wait_free(bars.item, items, "feed: item free");
    if (lane == 0) {
      bars.items[items.place()] = item;
      mbar_arrive(&bars.item.full[items.place()]);
      const int* pages = call.page_table + (int64_t)item.row * call.table_stride;
      int page = item.blocks ? pages[item.first * L / PAGE] : 0;
      ROLLED for (int i = 0; i < item.blocks; ++i) {
        int key = (item.first + i) * L, next = i + 1 < item.blocks ? pages[(key + L) / PAGE] : 0;
        copy_keys(smem, bars, k, call, page, key % PAGE, min(item.keys - key, L));
        if (i == 0) {  // behind the first keys: the item before may still use its queries
          wait_free(bars.q, q, "feed: q free");
          mbar_expect(bars.q.full, 9 * TOKENS * GROUP * 128);
          ROLLED for (int c = 0; c < 9; ++c) {
            tma_3d(smem + OFF_Q + c * Q_CHUNK, call.q_map, bars.q.full, c * 64, head_group() * GROUP, item.token);
          }
        }
        page = next;
      }
    }
    __syncwarp();
    if (item.blocks == 0) break;
    place += item.blocks;
  }
}

// A warp's share of the tokens that see no key: zeros, and no weights.
__device__ __forceinline__ void clear(const Call& call, int worker, int workers) {
  int lane = threadIdx.x % 32;
  const Batch& batch = call.batch;
#if EXTEND
  int busy = 0;
  for (int r = lane; r < batch.rows; r += 32) busy += row_at(batch, r).keys > 0 ? batch.query_len[r] : 0;
  UNROLL for (int d = 1; d < 32; d *= 2) busy += __shfl_xor_sync(~0u, busy, d);
  if (busy >= batch.tokens) return;
#endif
  for (int token = worker; token < batch.tokens; token += workers) {
    bool sees = false;
    if (EXTEND) {
      for (int r0 = 0; r0 < batch.rows && !sees; r0 += 32) {
        Row row = row_at(batch, r0 + lane);
        int after = r0 + lane < batch.rows ? token - batch.query_start[r0 + lane] : -1;
        sees = __ballot_sync(~0u, after >= 0 && after < row.tokens && row.keys > 0) != 0;
      }
    } else {
      sees = batch.context_len[token] > 0;
    }
    if (sees) continue;
    uint16_t* to = call.y + (int64_t)token * call.y_stride;
    ROLLED for (int c = lane * 8; c < HEAD_GROUPS * GROUP * RANK; c += 256) *(Int4*)(to + c) = Int4{0, 0, 0, 0};
#if EXTEND
    ROLLED for (int h = lane; h < HEAD_GROUPS * GROUP; h += 32) call.log_sum[token * (HEAD_GROUPS * GROUP) + h] = -INFINITY;
#endif
  }
}
