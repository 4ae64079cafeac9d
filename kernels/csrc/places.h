// Places in shared memory that one warp fills and others use, in turn.
#pragma once
#include "hopper.h"

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// What says that places are full, and that they are free again.
template <int N> struct Places { uint64_t full[N], free[N]; };
// The place whose turn it is, and the parity of the wait until it is full; until it is free: the other one.
template <int N> struct Ring {
  int state = 0;  // in one register: the place, and the parity times 8
  __device__ __forceinline__ int place() const { return state & 7; }
  __device__ __forceinline__ int parity() const { return state >> 3; }
  __device__ __forceinline__ void next() { state = place() == N - 1 ? ~state & 8 : state + 1; }
};
template <int N> __device__ __forceinline__ void wait_full(Places<N>& at, const Ring<N>& ring, const char* where) {
  mbar_wait(&at.full[ring.place()], ring.parity(), where);
}
template <int N> __device__ __forceinline__ void wait_free(Places<N>& at, const Ring<N>& ring, const char* where) {
  mbar_wait(&at.free[ring.place()], ring.parity() ^ 1, where);
}
template <int N> __device__ __forceinline__ void init(Places<N>& at, int full, int free) {
  for (int i = 0; i < N; ++i) { mbar_init(&at.full[i], full); mbar_init(&at.free[i], free); }
}
