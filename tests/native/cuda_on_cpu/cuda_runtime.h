// CUDA as csrc/cuda uses it, on the host: this proves values, indexing, and that barriers, grid and order of blocks are
// right under the schedules tried; nothing about nvcc, the memory order of a GPU, speed, or a driver.
#pragma once

#include <math.h>

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/half.h"
#include "simulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_VERSION 13000

// Device code.

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

// Host code.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrSingleToDoublePrecisionPerfRatio = 87 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {
  int maxThreadsPerBlock, numRegs;
};

namespace cuda_on_cpu {

constexpr size_t kMostArgumentBytes = 32764;

struct Launch {
  unsigned grid, block, argument_bytes;
};

struct Device {
  unsigned most_blocks = 4;  // of a grid; the rest of it is not there, and kernels find it with what is
  int float64_ratio = 2;
  int calls_until_failure = -1;  // below zero: no call fails
  cudaError_t failure = cudaErrorLaunchFailure;
  cudaError_t last_error = cudaSuccess;
  std::vector<Launch> launches;

  // What every call returns.
  cudaError_t status(cudaError_t error = cudaSuccess) {
    if (error == cudaSuccess && calls_until_failure >= 0 && calls_until_failure-- == 0) error = failure;
    return error == cudaSuccess ? error : last_error = error;
  }
};
inline Device device;

// The size of a parameter list, each parameter aligned as its type is.
template <class... P>
constexpr size_t bytes_of() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

}  // namespace cuda_on_cpu

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::device.last_error, cudaSuccess); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_cpu::device.float64_ratio;
  return cuda_on_cpu::device.status();
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cuda_on_cpu::device.status();
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  const cudaError_t error = cuda_on_cpu::device.status();
  if (error == cudaSuccess) std::memset(to, byte, bytes);
  return error;
}

// Returns when the kernel is done.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  cuda_on_cpu::Device& device = cuda_on_cpu::device;
  constexpr size_t kBytes = cuda_on_cpu::bytes_of<P...>();
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.x > 0x7fffffff || block.x == 0 || block.x > cuda_on_cpu::kMostThreads ||
      grid.y * grid.z * block.y * block.z != 1 || config->dynamicSmemBytes != 0)
    return device.status(cudaErrorInvalidConfiguration);
  if (kBytes > cuda_on_cpu::kMostArgumentBytes) return device.status(cudaErrorInvalidValue);
  if (const cudaError_t error = device.status(); error != cudaSuccess) return error;
  device.launches.push_back({grid.x, block.x, static_cast<unsigned>(kBytes)});
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call(kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(arguments))...));
  const auto run_thread = [](void* opaque) {
    Call* call = static_cast<Call*>(opaque);
    std::apply(call->first, call->second);
  };
  cuda_on_cpu::simulator.run(std::min(grid.x, device.most_blocks), block.x, run_thread, &call);
  return cudaSuccess;
}
