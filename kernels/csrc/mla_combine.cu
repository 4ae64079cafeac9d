// Units of mla_decode.cu that lie in several shares: their parts, added up in order.
//
// Where a share ends within a unit, EACH thread blocks (and as many for each group of heads) take an equal part of that
// unit's results: those of one that lies in all shares are made everywhere. Results are cut into runs of 128 numbers,
// which a warp adds up, or several, each some of the parts, where there are more warps than runs.
#include "mla_shapes.h"

constexpr int WARPS = 16, EACH = N > 16 ? N / 16 : 1, RUNS = RANK * N / 128, AHEAD = 4;
struct alignas(16) Four { float x[4]; };
// Of four vectors, one each of a lane's numbers.
struct Sums {
  float top[4], sum[4], value[4];
  __device__ __forceinline__ Sums() {
    UNROLL for (int i = 0; i < 4; ++i) { top[i] = -INFINITY; sum[i] = value[i] = 0.f; }
  }
  __device__ __forceinline__ void add(int i, float log, float weight, float x) {
    float higher = fmaxf(top[i], log);
    if (higher == -INFINITY) return;  // neither has any
    float before = exp2_fast(top[i] - higher), now = exp2_fast(log - higher);
    sum[i] = sum[i] * before + now * weight;
    value[i] = value[i] * before + now * x;
    top[i] = higher;
  }
};

constexpr int SHARED = WARPS * 32 * sizeof(Sums) + 1024;
LAUNCH_FACTS(WARPS * 32, SHARED, 1);

struct Call {
  uint16_t* y; float* log_sum; const float *parts, *logs;
  Batch batch;
  int shares, y_stride;
};

__device__ __forceinline__ void run(const Call& call) {
  Sums* held = (Sums*)smem_base();  // of each warp and lane
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = blockIdx.x % HEAD_GROUPS;
  int number = blockIdx.x / HEAD_GROUPS, share = number / EACH + 1;  // the one that begins here
  Line line = line_of(call.batch, call.shares);
  int place = share * line.share, unit = 0, begin = place;
  Row row{};
  Cursor at{0, 0};
  if (place < line.total) {
    at = find_row(call.batch, place);
    row = row_at(call.batch, at.row);
    unit = (place - at.start) / row.blocks;
    begin = at.start + unit * row.blocks;
  }
#if PDL
  dependents_go();
  dependence_wait();
#endif
  if (begin == place) return;  // no unit lies on both sides
  int first = begin / line.share, last = (begin + row.blocks - 1) / line.share, parts = last - first + 1;
  int mine = number - first * EACH, all = (last - first) * EACH;
  int token = (EXTEND ? call.batch.query_start[at.row] : at.row) + unit * TOKENS;
  int vectors = min(row.tokens - unit * TOKENS, TOKENS) * GROUP;
  int together = 1;  // warps of a run
  while (together < WARPS && together < parts && 2 * together * RUNS <= all * WARPS) together *= 2;
  int runs = WARPS / together, of_run = warp % together;  // runs at once
  for (int r = mine * runs + warp / together; r < RUNS; r += all * runs) {
    int number_of = r % PER, vector = 8 * (number_of / 4) + (number_of & 1);  // and every second one of 4
    Sums sums;
    for (int part = of_run; part < parts; part += together * AHEAD) {
      Four x[AHEAD];
      float logs[AHEAD][4];
      UNROLL for (int a = 0; a < AHEAD; ++a) {
        int p = part + a * together;
        int64_t from = part_at(first + p, p == 0, group);
        if (p < parts) {
          Int4 raw = load_written(call.parts + from * (RANK * N) + r * 128 + lane * 4);
          x[a] = *(const Four*)&raw;
        }
        UNROLL for (int i = 0; i < 4; ++i) {
          logs[a][i] = p < parts ? load_written_one(call.logs + from * N + vector + 2 * i) : -INFINITY;
        }
      }
      UNROLL for (int a = 0; a < AHEAD; ++a) {
        if (part + a * together < parts) UNROLL for (int i = 0; i < 4; ++i) sums.add(i, logs[a][i], 1.f, x[a].x[i]);
      }
    }
    if (together > 1) {  // then a warp has one run at most, and a run's warps go on or leave together
      held[threadIdx.x] = sums;
      named_sync(1 + warp / together, 32 * together);
      if (of_run > 0) return;
      for (int w = 1; w < together; ++w) {
        Sums& other = held[(warp + w) * 32 + lane];
        UNROLL for (int i = 0; i < 4; ++i) sums.add(i, other.top[i], other.sum[i], other.value[i]);
      }
    }
    // A lane's numbers are those of threads 4 * lane to 4 * lane + 3 of a warpgroup.
    int tile = r / PER, column = tile * 64 + lane / 8 * 16 + lane % 8 + (number_of & 2) * 4;
    UNROLL for (int i = 0; i < 4; ++i) {
      int v = vector + 2 * i;
      if (v >= vectors) continue;
      int head = group * GROUP + v % GROUP;
      call.y[(int64_t)(token + v / GROUP) * call.y_stride + head * RANK + column] =
          (uint16_t)pack2(sums.value[i] / sums.sum[i], 0.f);
#if EXTEND
      if (tile == 0 && column == 0) {
        float log = (sums.top[i] + log2f(sums.sum[i])) * 0.6931471805599453f;
        call.log_sum[(int64_t)(token + v / GROUP) * (HEAD_GROUPS * GROUP) + head] = log;
      }
#endif
    }
  }
}

// Blocks: (shares - 1) * EACH * HEAD_GROUPS; shares: thread blocks of mla_decode.cu a group of heads.
#if EXTEND
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
mla_extend_combine(uint16_t* y, float* log_sum, const float* parts, const float* logs, const int* query_start,
                   const int* query_len, const int* context_len, int rows, int tokens, int shares, int y_stride) {
  run(Call{y, log_sum, parts, logs, Batch{query_start, query_len, context_len, rows, tokens}, shares, y_stride});
}
#else
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
mla_decode_combine(uint16_t* y, const float* parts, const float* logs, const int* context_len, int rows, int shares,
                   int y_stride) {
  run(Call{y, nullptr, parts, logs, Batch{nullptr, nullptr, context_len, rows, rows}, shares, y_stride});
}
#endif
