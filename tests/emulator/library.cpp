// One kernel as a shared library on the CPU: -DSOURCE="file.cu" -DKERNEL=name; see emulated.py.
#include SOURCE
#include <utility>

template <class T> static T get(void** parameters, int i) { T x; memcpy(&x, parameters[i], sizeof(T)); return x; }
template <class... A, size_t... I>
static void call(void (*f)(A...), void** p, int grid, unsigned seed, std::index_sequence<I...>) {
  emulator::launch(grid, launch_facts[0], launch_facts[1], launch_facts[2], seed, [=] { f(get<std::remove_cv_t<std::remove_reference_t<A>>>(p, I)...); });
}
template <class... A> static void call(void (*f)(A...), void** p, int grid, unsigned seed) {
  call(f, p, grid, seed, std::index_sequence_for<A...>{});
}

static std::string said;
template <class F> static const char* told(F run) {  // what went wrong, or null
  try { run(); return nullptr; } catch (const std::exception& e) { said = e.what(); return said.c_str(); }
}
extern "C" const char* emulate(void** parameters, int grid, unsigned seed) {
  return told([&] { call(&KERNEL, parameters, grid, seed); });
}
extern "C" const char* encode_map(void* out, void* base, int size, int rank, const uint64_t* dims, const uint64_t* strides, const uint32_t* box, int swizzle) {
  return told([&] { TensorMap m = emulator::encode(base, size, rank, dims, strides, box, swizzle); memcpy(out, &m, 128); });
}
