// The names of kernels/csrc/hopper.h on the CPU, for tests of the kernels' logic.
//
// Every thread is a fiber and blocks run interleaved. Copies land late and in any order, matrix products read shared
// memory and registers as late as a wait allows (with odd seeds as early as they may), warps fall behind at random,
// copies and warps far behind with seeds from 1,000 on, shared memory starts as NaN. What the hardware refuses (sizes,
// alignment, swizzles) fails, and so does a deadlock, with the place of every warp.
//
// It cannot see: missing proxy fences and memory-model races (plain stores and loads of a warpgroup run in order),
// registers, speed, and whether it reads the PTX manual rightly. The GPU tests and compute-sanitizer are for those.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define GRID_CONSTANT const
#define UNROLL
#define __cluster_dims__(...)
#define LAUNCH_FACTS(threads, shared, cluster) static const int launch_facts[3] = {threads, shared, cluster}

struct alignas(64) TensorMap { int id; char pad[124]; };
struct alignas(16) Int4 { int x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };
struct alignas(8) Two { uint32_t x, y; };

namespace emulator {

// -- numbers

inline float bits_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t float_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
inline float widen(uint16_t h) {
#if FP16
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float sign = h & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24));
#else
  return bits_float((uint32_t)h << 16);
#endif
}
inline float widen_e4m3(uint8_t b) {
  int exponent = b >> 3 & 15, mantissa = b & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  return (b & 128 ? -1.f : 1.f) * (exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9));
}
template <bool HALF> inline uint16_t narrow(float f) {  // to float16, else bfloat16; to nearest, ties to even
  if (isnan(f)) return 0x7fff;
  uint32_t u = float_bits(f);
  if (!HALF) return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  uint16_t sign = u >> 16 & 0x8000;
  float a = fabsf(f);
  if (a >= 65520.f) return sign | 0x7c00;
  int exponent = a < ldexpf(1, -14) ? -14 : ilogbf(a);
  int steps = (int)nearbyintf(ldexpf(a, 10 - exponent));  // 1024 to 2048, or less if subnormal; carries by itself
  return sign | (uint16_t)(steps + ((exponent + 14) << 10));
}
inline uint16_t half_of_e4m3(uint8_t x) {
  int exponent = x >> 3 & 15, mantissa = x & 7;
  float a = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return (x & 127) == 127 ? 0x7fff : narrow<true>(x & 128 ? -a : a);
}

// -- state

struct Map { const uint8_t* base; int rank, size; bool swizzled; uint64_t dims[5], strides[5]; uint32_t box[5]; };
struct Bar { int count = 0, pending = 0; long bytes = 0; int phase = 0; };
struct Named { int arrived = 0; long generation = 0; };
struct Copy {
  TensorMap map; uint32_t to, bar; int at[5]; int rounds;  // how long it takes yet
  const uint8_t* from = nullptr; uint32_t bytes = 0;  // of a copy without a map
};
struct Small { const void* from; uint32_t to; int thread, rounds; long number; };  // a copy of 16 bytes that a thread asked for
struct Arrival { uint32_t bar; int thread; long number; };  // waits for the thread's copies with lower numbers
// d[64 x n] of a[64 x k] and b[n x k] of 16-bit elements, of e4m3 where `small` is 1, of int8 with sums of int32 where 2.
struct Product {  // rows: of b contiguous; turned: those of a
  float* d[128]; const uint32_t* a_registers[128]; int n, k, small; bool registers, rows, turned; uint64_t a, b; int accumulate, arrived;
};
struct Warpgroup { std::deque<Product> products; long first = 0; long issued[128] = {}; std::vector<long> ends[128]; };
struct Warp { uint64_t slot[32]; uint32_t registers[32][6]; int arrived = 0; long generation = 0; int asleep = 0; };
struct Block {
  int index, registers = 0; std::vector<uint8_t> store; uint8_t* shared; std::map<uint32_t, Bar> bars; Named named[16];
  std::vector<Copy> copies; std::vector<Small> smalls; std::vector<Arrival> arrivals; long number = 0; int running = 0; bool gone = false; std::vector<Warpgroup> warpgroups; std::vector<Warp> warps;
};
constexpr size_t STACK = 64 << 10;
struct Fiber { ucontext_t context; std::unique_ptr<uint8_t[]> stack; Block* block; int thread; bool done = false, waited = false; const char* where = ""; };
struct Dim { int x; };
struct State {
  ucontext_t main; Fiber* now = nullptr; bool progress = false; std::mt19937 random; int threads = 0, grid = 0; bool eager = false, drowsy = false;
  std::function<void()> body; std::string failure; std::vector<Map> maps;
  int cluster = 1; std::vector<Block*> blocks; std::vector<Named> clusters;  // blocks of a cluster; of all, their barriers
};
inline State& state() { static State s; return s; }
inline Block& block() { return *state().now->block; }
inline int first_registers() { return std::min(65536 / state().threads / 8 * 8, 248); }
inline int thread() { return state().now->thread; }

// A fiber that fails is left where it stands.
inline void fail(const std::string& what) {
  if (!state().now) throw std::runtime_error(what);
  state().failure = what;
  swapcontext(&state().now->context, &state().main);
}
inline void check(bool right, const char* what) { if (!right) fail(what); }

__attribute__((noinline)) inline void yield(const char* where) {
  Fiber* f = state().now;
  f->where = where;
  swapcontext(&f->context, &state().main);
}
template <class F> __attribute__((noinline)) inline void wait_until(F ready, const char* where) {
  while (!ready()) yield(where);
  state().progress = true;
}

// -- mbarriers, copies and matrix products: compiled once for all kernels, where RUNTIME

void complete(Bar& b);
Bar& bar_at(Block& c, uint32_t at);
void issue(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, bool rows, int accumulate, int small = 0, bool turned = false);
void wait_groups(int n);
void launch(int grid, int threads, size_t shared, int cluster, unsigned seed, std::function<void()> body);
TensorMap encode(const void* base, int size, int rank, const uint64_t* dims, const uint64_t* strides, const uint32_t* box, bool swizzled);

#ifdef RUNTIME
// -- mbarriers and copies

void complete(Bar& b) { if (b.pending == 0 && b.bytes == 0) { b.phase++; b.pending = b.count; } }
Bar& bar_at(Block& c, uint32_t at) {
  auto found = c.bars.find(at);
  check(found != c.bars.end(), "there is no such mbarrier");
  return found->second;
}
void run_bulk(Block& c, const Copy& copy) {
  check(copy.to % 16 == 0 && (uintptr_t)copy.from % 16 == 0 && copy.bytes % 16 == 0 && copy.bytes, "bulk copy: places and bytes are multiples of 16");
  check(copy.to + copy.bytes <= c.store.size(), "copy: beyond shared memory");
  memcpy(c.shared + copy.to, copy.from, copy.bytes);
  Bar& bar = bar_at(c, copy.bar);
  bar.bytes -= copy.bytes;
  complete(bar);
}
void run_copy(Block& c, const Copy& copy) {
  if (copy.from) return run_bulk(c, copy);
  const Map& m = state().maps.at(copy.map.id);
  uint32_t total = m.size;
  for (int i = 0; i < m.rank; ++i) total *= m.box[i];
  check(!m.swizzled || (m.box[0] * m.size == 128 && copy.to % 1024 == 0), "swizzled copy: 128-byte rows at multiples of 1024");
  check(copy.to % 128 == 0, "copy: its place is no multiple of 128");
  check((long)copy.at[0] * m.size % 16 == 0, "copy: the inner coordinate is no multiple of 16 bytes");
  check(copy.to + total <= c.store.size(), "copy: beyond shared memory");
  uint32_t index[5] = {};
  for (uint32_t offset = 0; offset < total; offset += m.size) {
    bool inside = true;
    const uint8_t* from = m.base;
    for (int i = 0; i < m.rank; ++i) {
      long at = (long)copy.at[i] + index[i];
      if (at < 0 || at >= (long)m.dims[i]) inside = false; else from += at * m.strides[i];
    }
    uint32_t to = copy.to + offset;
    if (m.swizzled) to ^= (to >> 7 & 7) << 4;
    if (inside) memcpy(c.shared + to, from, m.size); else memset(c.shared + to, 0, m.size);
    for (int i = 0; i < m.rank; ++i) { if (++index[i] < m.box[i]) break; index[i] = 0; }
  }
  Bar& bar = bar_at(c, copy.bar);
  bar.bytes -= total;
  complete(bar);
}

// Copies of 16 bytes whose time has come, then the arrivals that wait for no other; whether there were any.
bool run_smalls(Block& c) {
  if (c.smalls.empty() && c.arrivals.empty()) return false;
  std::vector<Small> copies;
  std::vector<Arrival> arrivals;
  std::map<int, long> oldest;  // of a thread's copies that are under way
  copies.swap(c.smalls);
  arrivals.swap(c.arrivals);
  for (auto& copy : copies) {
    if (copy.rounds-- <= 0) { memcpy(c.shared + copy.to, copy.from, 16); continue; }
    c.smalls.push_back(copy);
    oldest.emplace(copy.thread, copy.number);  // the first of a thread is its oldest
  }
  for (auto& arrival : arrivals) {
    auto found = oldest.find(arrival.thread);
    if (found != oldest.end() && found->second < arrival.number) { c.arrivals.push_back(arrival); continue; }
    Bar& bar = bar_at(c, arrival.bar);
    check(bar.pending > 0, "too many arrivals at an mbarrier");
    bar.pending--;
    complete(bar);
  }
  return true;
}

// -- matrix products

float operand(Block& c, uint64_t descriptor, bool rows_contiguous, int small, int r, int k) {
  uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  check(descriptor >> 62 == 1, "descriptor: 128-byte swizzle only");
  uint32_t at = rows_contiguous ? start + (r / 64) * leading + (r % 64) * 2 + (k / 8) * stride + (k % 8) * 128
                                : start + (r / 8) * stride + (r % 8) * 128 + k * (small ? 1 : 2);
  at ^= (at >> 7 & 7) << 4;
  if (small == 2) return (int8_t)c.shared[at];
  if (small) return widen_e4m3(c.shared[at]);
  uint16_t h;
  memcpy(&h, c.shared + at, 2);
  return widen(h);
}
int row_of(int thread, int high) { return (thread / 32) * 16 + (thread % 32) / 4 + high * 8; }
void execute(Block& c, Product& p) {
  std::vector<float> a(64 * p.k), b(p.n * p.k);
  for (int n = 0; n < p.n; ++n) for (int k = 0; k < p.k; ++k) b[n * p.k + k] = operand(c, p.b, p.rows, p.small, n, k);
  if (p.registers) {
    for (int t = 0; t < 128; ++t) for (int j = 0; j < 4; ++j) {
      float* to = &a[row_of(t, j & 1) * 16 + 2 * (t % 4) + (j >> 1) * 8];
      to[0] = widen(p.a_registers[t][j] & 0xffff);
      to[1] = widen(p.a_registers[t][j] >> 16);
    }
  } else {
    for (int m = 0; m < 64; ++m) for (int k = 0; k < p.k; ++k) a[m * p.k + k] = operand(c, p.a, p.turned, p.small, m, k);
  }
  for (int t = 0; t < 128; ++t) for (int i = 0; i < p.n / 2; ++i) {
    int row = row_of(t, i >> 1 & 1), column = (i / 4) * 8 + 2 * (t % 4) + (i & 1);
    if (p.small == 2) {
      int32_t& d = *(int32_t*)&p.d[t][i];
      if (!p.accumulate) d = 0;
      for (int k = 0; k < p.k; ++k) d += (int)a[row * p.k + k] * (int)b[column * p.k + k];
      continue;
    }
    float s = p.accumulate ? p.d[t][i] : 0.f;
    for (int k = 0; k < p.k; ++k) s += a[row * p.k + k] * b[column * p.k + k];
    p.d[t][i] = s;
  }
}
void run_first(Block& c, Warpgroup& w) {
  execute(c, w.products.front());
  w.products.pop_front();
  w.first++;
}
void issue(float* d, int n, const uint32_t* registers, uint64_t a, uint64_t b, bool rows, int accumulate, int small, bool turned) {
  Warpgroup& w = block().warpgroups[thread() / 128];
  int t = thread() % 128;
  long number = w.issued[t]++;
  while ((long)w.products.size() + w.first <= number) {
    Product p{};
    p.n = n; p.k = small ? 32 : 16; p.registers = registers; p.rows = rows; p.small = small; p.turned = turned; p.a = a; p.b = b; p.accumulate = accumulate;
    w.products.push_back(p);
  }
  Product& p = w.products[number - w.first];
  check(p.n == n && p.a == a && p.b == b && p.accumulate == accumulate && p.registers == (registers != nullptr) && p.rows == rows && p.small == small && p.turned == turned, "threads of a warpgroup disagree about a product");
  p.d[t] = d; p.a_registers[t] = registers; p.arrived++;
  while (state().eager && !w.products.empty() && w.products.front().arrived == 128) run_first(block(), w);
}
void wait_groups(int n) {
  Block& c = block();
  Warpgroup& w = c.warpgroups[thread() / 128];
  auto& ends = w.ends[thread() % 128];
  if ((int)ends.size() <= n) return;
  long until = ends[ends.size() - 1 - n];
  while (w.first < until) {
    wait_until([&] { return w.first >= until || w.products.front().arrived == 128; }, "wgmma.wait");
    if (w.first >= until) break;
    run_first(c, w);
  }
}
#endif  // RUNTIME

// -- barriers and exchange within a block

inline void named(int id, int threads, bool wait) {
  Named& b = block().named[id];
  long generation = b.generation;
  if (++b.arrived == threads) { b.arrived = 0; b.generation++; }
  if (wait) wait_until([&] { return b.generation != generation; }, "named barrier");
}
inline void warp_sync() {
  Warp& w = block().warps[thread() / 32];
  long generation = w.generation;
  if (++w.arrived == 32) { w.arrived = 0; w.generation++; }
  wait_until([&] { return w.generation != generation; }, "warp");
}
template <class T> inline T exchange(T mine, int from) {
  Warp& w = block().warps[thread() / 32];
  uint64_t raw = 0;
  memcpy(&raw, &mine, sizeof(T));
  w.slot[thread() % 32] = raw;
  warp_sync();
  T other;
  memcpy(&other, &w.slot[from & 31], sizeof(T));
  warp_sync();
  return other;
}
inline uint32_t ballot(bool mine) {
  Warp& w = block().warps[thread() / 32];
  w.slot[thread() % 32] = mine;
  warp_sync();
  uint32_t all = 0;
  for (int i = 0; i < 32; ++i) all |= (uint32_t)(w.slot[i] & 1) << i;
  warp_sync();
  return all;
}

#ifdef RUNTIME
// -- launching

void entry() { state().body(); state().now->done = true; state().progress = true; swapcontext(&state().now->context, &state().main); }
void launch(int grid, int threads, size_t shared, int cluster, unsigned seed, std::function<void()> body) {
  State& s = state();
  check(grid % cluster == 0, "a grid has whole clusters");
  s.cluster = cluster; s.blocks.clear(); s.clusters.assign(grid / cluster, Named());
  s.random.seed(seed); s.eager = seed & 1; s.drowsy = seed >= 1000; s.threads = threads; s.grid = grid; s.body = body; s.now = nullptr; s.failure.clear();
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int b = 0; b < grid; ++b) {
    auto c = std::make_unique<Block>();
    c->index = b; c->running = threads; c->store.assign(shared + 2048, 0xff); c->shared = c->store.data();  // NaN
    c->warpgroups.resize(threads / 128); c->warps.resize(threads / 32);
    for (int t = 0; t < threads; ++t) {
      auto f = std::make_unique<Fiber>();
      f->block = c.get(); f->thread = t; f->stack.reset(new uint8_t[STACK]);  // not cleared: most of it is never touched
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.get(); f->context.uc_stack.ss_size = STACK; f->context.uc_link = &s.main;
      makecontext(&f->context, entry, 0);
      fibers.push_back(std::move(f));
    }
    s.blocks.push_back(c.get());
    blocks.push_back(std::move(c));
  }
  size_t left = fibers.size();
  int idle = 0;
  while (left) {
    s.progress = false; s.now = nullptr;
    for (auto& c : blocks) {
      if (run_smalls(*c)) s.progress = true;
      std::vector<Copy> pending;
      pending.swap(c->copies);
      for (auto& copy : pending) {
        if (copy.rounds-- <= 0) run_copy(*c, copy); else c->copies.push_back(copy);
        s.progress = true;
      }
    }
    uint32_t luck = 0;
    for (auto& f : fibers) {
      if (f->thread % 32 == 0) {
        luck = s.random() & 3;
        int& asleep = f->block->warps[f->thread / 32].asleep;
        if (s.drowsy && s.random() % 200 == 0) asleep = 200;
        if (asleep > 0) { luck = 0; asleep--; }
      }
      if (f->done || luck == 0) continue;  // now and then a warp falls behind
      s.now = f.get();
      swapcontext(&s.main, &f->context);
      s.now = nullptr;
      if (!s.failure.empty()) throw std::runtime_error(s.failure);
      if (f->done) { left--; f->block->gone = --f->block->running == 0; }
    }
    if (s.progress) idle = 0; else if (++idle > (s.drowsy ? 2000 : 50)) {
      std::string text = "deadlock:";
      for (auto& f : fibers) if (!f->done && f->thread % 32 == 0) {
        text += " block " + std::to_string(f->block->index) + " warp " + std::to_string(f->thread / 32) + " at " + f->where + ";";
      }
      throw std::runtime_error(text);
    }
  }
  for (auto& c : blocks) check(c->copies.empty() && c->smalls.empty() && c->arrivals.empty(), "a copy is under way at the end");
}
// Innermost axis first and strides in bytes of all axes but that, as the driver has them.
TensorMap encode(const void* base, int size, int rank, const uint64_t* dims, const uint64_t* strides, const uint32_t* box, bool swizzled) {
  Map m{};
  m.base = (const uint8_t*)base; m.rank = rank; m.size = size; m.swizzled = swizzled; m.strides[0] = size;
  check((uintptr_t)base % 16 == 0, "tensor map: its base is no multiple of 16");
  check(box[0] * size % 16 == 0, "tensor map: the inner box is no multiple of 16 bytes");
  for (int i = 0; i < rank; ++i) {
    m.dims[i] = dims[i]; m.box[i] = box[i];
    check(box[i] >= 1 && box[i] <= 256, "tensor map: a side of the box");
    if (i) { m.strides[i] = strides[i - 1]; check(strides[i - 1] % 16 == 0, "tensor map: strides are multiples of 16"); }
  }
  state().maps.push_back(m);
  TensorMap t{};
  t.id = (int)state().maps.size() - 1;
  return t;
}
#endif  // RUNTIME
}  // namespace emulator

#define threadIdx (emulator::Dim{emulator::thread()})
#define blockIdx (emulator::Dim{emulator::block().index})
#define gridDim (emulator::Dim{emulator::state().grid})
inline uint8_t* smem_base() { return emulator::block().shared; }
inline uint32_t smem_u32(const void* p) { return (uint32_t)((const uint8_t*)p - emulator::block().shared); }
inline void mbar_init(uint64_t* b, uint32_t n) { emulator::Bar x; x.count = x.pending = n; emulator::block().bars[smem_u32(b)] = x; }
inline void mbar_fence_init() {}
inline void mbar_arrive(uint64_t* b) {
  emulator::Bar& x = emulator::bar_at(emulator::block(), smem_u32(b));
  emulator::check(x.pending > 0, "too many arrivals at an mbarrier");
  x.pending--;
  emulator::complete(x);
}
inline void mbar_expect(uint64_t* b, uint32_t bytes) { emulator::bar_at(emulator::block(), smem_u32(b)).bytes += bytes; mbar_arrive(b); }
inline void mbar_wait(uint64_t* b, uint32_t parity, const char* where) {
  emulator::Bar& x = emulator::bar_at(emulator::block(), smem_u32(b));
  emulator::wait_until([&] { return (uint32_t)(x.phase & 1) != parity; }, where);
}
inline int cluster_rank() { return emulator::block().index % emulator::state().cluster; }
inline emulator::Block& emulated_of_rank(int rank) {
  emulator::State& s = emulator::state();
  emulator::check(0 <= rank && rank < s.cluster, "a cluster has no block of that rank");
  return *s.blocks[emulator::block().index / s.cluster * s.cluster + rank];
}
inline void cluster_sync() {
  emulator::State& s = emulator::state();
  emulator::Named& b = s.clusters[emulator::block().index / s.cluster];
  long generation = b.generation;
  if (++b.arrived == s.threads * s.cluster) { b.arrived = 0; b.generation++; }
  emulator::wait_until([&] { return b.generation != generation; }, "cluster barrier");
}
inline Float4 load_of_rank(const float* p, int rank) {
  emulator::Block& other = emulated_of_rank(rank);
  emulator::check(smem_u32(p) % 16 == 0, "a load of 16 bytes of another block from an odd place");
  emulator::check(!other.gone, "shared memory of a block that has ended");
  Float4 r;
  memcpy(&r, other.shared + smem_u32(p), 16);
  return r;
}
inline void mbar_arrive_at(uint64_t* b, int rank) {
  emulator::Block& other = emulated_of_rank(rank);
  emulator::check(!other.gone, "an mbarrier of a block that has ended");
  emulator::Bar& x = emulator::bar_at(other, smem_u32(b));
  emulator::check(x.pending > 0, "too many arrivals at an mbarrier");
  x.pending--;
  emulator::complete(x);
}
inline void mbar_wait_cluster(uint64_t* b, uint32_t parity, const char* where) { mbar_wait(b, parity, where); }
inline void fence_async_proxy() {}
inline void tma_prefetch_map(const TensorMap*) {}
inline int emulated_delay() { uint32_t r = emulator::state().random(); return r & 3 ? r >> 8 & 3 : emulator::state().drowsy ? 400 : 40; }  // now and then a long one
inline void tma_2d(void* d, const TensorMap* m, uint64_t* b, int c0, int c1) {
  emulator::block().copies.push_back({*m, smem_u32(d), smem_u32(b), {c0, c1, 0, 0, 0}, emulated_delay()});
}
inline void tma_3d(void* d, const TensorMap* m, uint64_t* b, int c0, int c1, int c2) {
  emulator::block().copies.push_back({*m, smem_u32(d), smem_u32(b), {c0, c1, c2, 0, 0}, emulated_delay()});
}
inline void tma_4d(void* d, const TensorMap* m, uint64_t* b, int c0, int c1, int c2, int c3) {
  emulator::block().copies.push_back({*m, smem_u32(d), smem_u32(b), {c0, c1, c2, c3, 0}, emulated_delay()});
}
inline void copy_16(void* d, const void* from) {
  emulator::Block& c = emulator::block();
  emulator::check(smem_u32(d) % 16 == 0 && (uintptr_t)from % 16 == 0, "copy of 16 bytes: a place is no multiple of 16");
  emulator::check(smem_u32(d) + 16 <= c.store.size(), "copy of 16 bytes: beyond shared memory");
  c.smalls.push_back({from, smem_u32(d), emulator::thread(), emulated_delay(), c.number++});
}
inline void mbar_arrive_after_copies(uint64_t* b) {
  emulator::Block& c = emulator::block();
  c.arrivals.push_back({smem_u32(b), emulator::thread(), c.number++});
}
inline void bulk_load(void* d, const void* from, uint64_t* b, uint32_t bytes) {
  emulator::block().copies.push_back({{}, smem_u32(d), smem_u32(b), {}, emulated_delay(), (const uint8_t*)from, bytes});
}
inline Int4 load_written(const void* p) {
  emulator::check((uintptr_t)p % 16 == 0, "a load of 16 bytes from an address that is no multiple of 16");
  emulator::check(emulator::state().now->waited, "what kernels before wrote is read before the wait for them");
  Int4 r;
  memcpy(&r, p, 16);
  return r;
}
inline uint32_t load_written_two(const uint16_t* p) {
  emulator::check((uintptr_t)p % 4 == 0, "a load of 4 bytes from an address that is no multiple of 4");
  emulator::check(emulator::state().now->waited, "what kernels before wrote is read before the wait for them");
  uint32_t r;
  memcpy(&r, p, 4);
  return r;
}
inline float load_written_one(const float* p) {
  emulator::check(emulator::state().now->waited, "what kernels before wrote is read before the wait for them");
  return *p;
}
inline Int4 load_kept(const void* p) {
  emulator::check((uintptr_t)p % 16 == 0, "a load of 16 bytes from an address that is no multiple of 16");
  Int4 r;
  memcpy(&r, p, 16);
  return r;
}
inline void fence_gpu() {}
inline Int4 load_constant(const void* p) {
  emulator::check((uintptr_t)p % 16 == 0, "a load of 16 bytes from an address that is no multiple of 16");
  Int4 r;
  memcpy(&r, p, 16);
  return r;
}
inline void dependents_go() {}
inline void dependence_wait() {
  if (emulator::state().random() & 1) emulator::yield("dependence");
  emulator::state().now->waited = true;
}
inline void named_sync(int id, int threads) { emulator::named(id, threads, true); }
inline void named_arrive(int id, int threads) { emulator::named(id, threads, false); }
// A block starts with as many registers as its threads can have; more come only when others gave some back.
template <int N> inline void setmaxnreg_inc() {
  int more = N - emulator::first_registers();
  emulator::Block& c = emulator::block();
  emulator::wait_until([&] { return c.registers >= more; }, "setmaxnreg");
  c.registers -= more;
}
template <int N> inline void setmaxnreg_dec() { emulator::block().registers += emulator::first_registers() - N; }
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& w = emulator::block().warpgroups[emulator::thread() / 128];
  int t = emulator::thread() % 128;
  w.ends[t].push_back(w.issued[t]);
}
template <int N> inline void wgmma_wait() { emulator::wait_groups(N); }
template <int N> inline void keep(float (&)[N]) {}
template <int N> inline void keep(int (&)[N]) {}
template <int R> inline void wgmma_ss_16bit(float (&d)[R], uint64_t a, uint64_t b, int accumulate) { emulator::issue(d, 2 * R, nullptr, a, b, false, accumulate); }
template <int R> inline void wgmma_ss_e4m3(float (&d)[R], uint64_t a, uint64_t b, int accumulate) { emulator::issue(d, 2 * R, nullptr, a, b, false, accumulate, true); }
template <int R> inline void wgmma_ss_s8(int (&d)[R], uint64_t a, uint64_t b, int accumulate) { emulator::issue((float*)d, 2 * R, nullptr, a, b, false, accumulate, 2); }
template <int R> inline void wgmma_turned(float (&d)[R], uint64_t a, uint64_t b, int accumulate) { emulator::issue(d, 2 * R, nullptr, a, b, false, accumulate, false, true); }
inline void store_turned(void* to, uint32_t first, uint32_t second) {
  int lane = emulator::thread() % 32;
  emulator::check(smem_u32(to) % 16 == 0, "stored blocks: a row's address is no multiple of 16");
  for (int block = 0; block < 2; ++block) {
    uint32_t two = block ? second : first;
    uint16_t* rows[8];  // a lane has row lane / 4 and two columns, which become rows
    for (int r = 0; r < 8; ++r) rows[r] = emulator::exchange((uint16_t*)to, block * 8 + r);
    for (int j = 0; j < 2; ++j) rows[lane % 4 * 2 + j][lane / 4] = (uint16_t)(two >> 16 * j);
  }
}
inline void unpack2(uint32_t two, float (&x)[2]) { x[0] = emulator::widen(two & 0xffff); x[1] = emulator::widen(two >> 16); }
inline uint32_t emulated_to_fp8(float x) {  // to nearest, ties to even; beyond 448 saturated
  uint32_t sign = std::signbit(x) ? 128 : 0;
  float a = fabsf(x);
  if (isnan(a)) return 127;
  if (a >= 448.f) return sign | 126;
  int exponent = a < ldexpf(1, -6) ? -6 : ilogbf(a);
  int steps = (int)nearbyintf(ldexpf(a, 3 - exponent));  // 8 to 16, or less if subnormal; carries by itself
  return sign | (uint32_t)(steps + ((exponent + 6) << 3));
}
inline uint32_t pack_fp8(float low, float high) { return emulated_to_fp8(low) | emulated_to_fp8(high) << 8; }
inline void widen_fp8(float* to, uint32_t two) {
  to[0] = emulator::widen_e4m3(two & 255);
  to[1] = emulator::widen_e4m3(two >> 8 & 255);
}
inline float low2(uint32_t two) { return emulator::widen(two & 0xffff); }
inline float high2(uint32_t two) { return emulator::widen(two >> 16); }
template <int N> inline void wgmma_ss(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  emulator::issue(d, 2 * N, nullptr, a, b, false, accumulate);
}
template <int ROWS, int N> inline void wgmma_rs(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  emulator::issue(d, 2 * N, a, 0, b, ROWS, accumulate);
}
inline int from_here(int x) { return x; }
inline uint32_t pack2(float low, float high) { return emulator::narrow<FP16>(low) | (uint32_t)emulator::narrow<FP16>(high) << 16; }
inline uint32_t pack_bf16(float low, float high) { return emulator::narrow<false>(low) | (uint32_t)emulator::narrow<false>(high) << 16; }
inline uint32_t half2_of_e4m3(uint16_t x) { return emulator::half_of_e4m3(x & 0xff) | (uint32_t)emulator::half_of_e4m3(x >> 8) << 16; }
inline uint32_t half2_of_bf16(uint32_t x) {
  float low = emulator::bits_float(x << 16), high = emulator::bits_float(x & 0xffff0000u);
  auto bound = [](float f) { return f > 65504.f ? 65504.f : f < -65504.f ? -65504.f : f; };
  return emulator::narrow<true>(bound(low)) | (uint32_t)emulator::narrow<true>(bound(high)) << 16;
}
inline uint32_t minus2(uint32_t a, uint32_t b) { return pack2(low2(a) - low2(b), high2(a) - high2(b)); }
inline uint32_t times2(uint32_t a, uint32_t b) { return pack2(low2(a) * low2(b), high2(a) * high2(b)); }
inline uint32_t times_plus2(uint32_t a, uint32_t b, uint32_t c) {
  return pack2(low2(a) * low2(b) + low2(c), high2(a) * high2(b) + high2(c));
}
inline int __float_as_int(float x) { int r; memcpy(&r, &x, sizeof r); return r; }
inline float __int_as_float(int x) { float r; memcpy(&r, &x, sizeof r); return r; }
inline float half_as_float(uint16_t h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float sign = h & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24));
}
inline void mma_16x8x16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& w = emulator::block().warps[emulator::thread() / 32];
  int lane = emulator::thread() % 32, row = lane / 4, column = 2 * (lane % 4);
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(w.registers[lane], mine, sizeof mine);
  emulator::warp_sync();
  float sum[4] = {d[0], d[1], d[2], d[3]};
  for (int k = 0; k < 16; ++k) {
    int of = k % 8 / 2, shift = 16 * (k & 1), high = k / 8;  // lane of four, half of a register, which of two registers
    for (int j = 0; j < 4; ++j) {
      uint32_t left = w.registers[row * 4 + of][2 * high + (j >> 1)] >> shift;
      uint32_t right = w.registers[(column + (j & 1)) * 4 + of][4 + high] >> shift;
      sum[j] += emulator::widen(left & 0xffff) * emulator::widen(right & 0xffff);
    }
  }
  emulator::warp_sync();
  memcpy(d, sum, sizeof sum);
}
inline void load_blocks(uint32_t (&r)[4], const void* row) {
  int lane = emulator::thread() % 32;
  emulator::check(smem_u32(row) % 16 == 0, "loaded blocks: a row's address is no multiple of 16");
  for (int block = 0; block < 4; ++block) {
    const uint8_t* from = emulator::exchange((const uint8_t*)row, block * 8 + lane / 4);
    memcpy(&r[block], from + lane % 4 * 4, 4);
  }
}
inline uint32_t keep_field(uint32_t words, uint32_t lift) { return (words & 0x000f000f) | lift; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline void __syncthreads() { emulator::named(0, emulator::state().threads, true); }
inline void __syncwarp() { emulator::warp_sync(); }
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return emulator::exchange(v, from); }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) { return emulator::exchange(v, (emulator::thread() % 32) ^ mask); }
template <class T> inline T __shfl_up_sync(unsigned, T v, int delta) {
  int lane = emulator::thread() % 32;
  return emulator::exchange(v, lane >= delta ? lane - delta : lane);
}
inline uint32_t __ballot_sync(unsigned, bool b) { return emulator::ballot(b); }
inline bool __any_sync(unsigned, bool b) { return emulator::ballot(b) != 0; }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline int atomicAdd(int* p, int v) { int old = *p; *p += v; return old; }
using std::max;
using std::min;
