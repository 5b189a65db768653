// CUDA as the device code of csrc/cuda uses it, on the host: this proves values, indexing, and that barriers, grid and
// order of blocks are right under the schedules tried; nothing about NVRTC, the memory order of a GPU, or speed.
#pragma once

#include <math.h>

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../../../csrc/cpu/half.h"
#include "simulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::simulator.barrier({cuda_on_cpu::kBarrier, file, line});
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= sizeof(uint64_t), "not a type that CUDA can shuffle");
  if (lanes != ~0u || mask < 0 || mask > 31) cuda_on_cpu::simulator.stop({"not a shuffle of a warp", file, line});
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = cuda_on_cpu::simulator.shuffle_xor(bits, static_cast<unsigned>(mask), {cuda_on_cpu::kShuffle, file, line});
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float x) { return fastclip::cpu::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return fastclip::cpu::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return fastclip::cpu::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return fastclip::cpu::bit_cast<double>(x); }

// A NaN has torch's bits here, and the device's own there.
using __half = fastclip::cpu::float16;
using __nv_bfloat16 = fastclip::cpu::bfloat16;
inline float __half2float(__half x) { return fastclip::cpu::to_float(x); }
inline __half __float2half_rn(float x) {
  __half out;
  fastclip::cpu::from_float(x, &out);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 out;
  fastclip::cpu::from_float(x, &out);
  return out;
}
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

template <class T>
struct PairOf {
  T x, y;
};
using __half2 = PairOf<__half>;
using __nv_bfloat162 = PairOf<__nv_bfloat16>;
template <class T>
unsigned __hlt2_mask(PairOf<T> a, PairOf<T> b) {
  using fastclip::cpu::to_float;
  return (to_float(a.x) < to_float(b.x) ? 0xffffu : 0u) | (to_float(a.y) < to_float(b.y) ? 0xffff0000u : 0u);
}
template <class T>
unsigned __hgt2_mask(PairOf<T> a, PairOf<T> b) {
  return __hlt2_mask(b, a);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

// What -fsanitize=alignment calls, with a place in the source.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};
extern "C" inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, void*) {
  cuda_on_cpu::simulator.stop({"a misaligned access", at->file, static_cast<int>(at->line)});
}

namespace cuda_on_cpu {

// The size of a parameter list, each parameter aligned as its type is.
template <class... P>
constexpr size_t bytes_of() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

// Runs a kernel and returns when it is done.
template <class... P>
void run(unsigned grid, unsigned block, void (*kernel)(P...), std::tuple<P...> arguments) {
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call(kernel, std::move(arguments));
  const auto run_thread = [](void* opaque) {
    Call* call = static_cast<Call*>(opaque);
    std::apply(call->first, call->second);
  };
  simulator.run(grid, block, run_thread, &call);
}

}  // namespace cuda_on_cpu
