// CUDA's dialect of csrc/cuda, run by the host: this proves values, indexing, and that barriers, grid and order of
// blocks are right under the schedules tried; nothing about nvcc, the memory order of a GPU, speed, or a driver. Each
// CUDA thread is a fiber; the threads of a block run in a random order, which changes wherever they meet.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static __attribute__((section("cuda_on_cpu_shared")))
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {
  int binaryVersion, maxThreadsPerBlock, numRegs;
};

extern "C" char __start_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_on_cpu_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kMaxArguments = 32764;
constexpr size_t kStack = 65536 + 9 * 64;  // so that the tops of stacks lie in different sets of the caches

struct Launch {
  unsigned grid, block, argument_bytes;
};

// A call in a kernel, at which a thread waits.
struct Place {
  const char* what;
  const char* file = nullptr;
  int line = 0;

  bool operator==(const Place& other) const {
    return line == other.line && what == other.what && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    if (file == nullptr) return what;
    const char* slash = std::strrchr(file, '/');
    return std::string(what) + " at " + (slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

inline const Place kStart{"start"}, kExit{"exited"};

class Simulator {
 public:
  // What tests set (torch_cuda.cpp).
  int multiprocessors = 4, blocks_per_multiprocessor = 2;
  int dropped_barrier = -1;
  int calls_until_failure = -1;  // below zero: no call fails
  cudaError_t failure = cudaErrorLaunchFailure;
  // What tests read.
  std::deque<Place> barriers;  // the calls of __syncthreads that were reached
  std::vector<Launch> launches;
  cudaError_t last_error = cudaSuccess;

  void seed(unsigned seed) { random_ = 0x9e3779b97f4a7c15ull * (seed + 1ull); }

  // What every call of the runtime returns.
  cudaError_t status(cudaError_t error = cudaSuccess) {
    if (error == cudaSuccess && calls_until_failure >= 0 && calls_until_failure-- == 0) error = failure;
    return error == cudaSuccess ? error : last_error = error;
  }

  void run(unsigned grid, unsigned block, void (*kernel)(void*), void* arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);
    gridDim = dim3(grid), blockDim = dim3(block);
    kernel_ = kernel, arguments_ = arguments;
    std::vector<unsigned> blocks(grid);
    for (unsigned i = 0; i < grid; ++i) {  // Fisher-Yates
      const unsigned j = below(i + 1);
      blocks[i] = blocks[j], blocks[j] = i;
    }
    for (const unsigned b : blocks) {
      blockIdx = dim3(b, 0, 0);
      poison_shared();
      at_barrier_ = exited_ = 0;
      std::memset(at_shuffle_, 0, sizeof(at_shuffle_));
      std::fill_n(places_, block, &kStart);
      meet(0, block);
      run_block();
      if (exited_ == block) continue;
      const std::string error = describe();
      ready_warps_ = 0;
      std::memset(ready_, 0, sizeof(ready_));
      std::memset(resume_, 0, sizeof(resume_));  // what the threads left on their stacks is lost
      throw std::runtime_error(error);
    }
  }

  void barrier(const Place& place) {
    const size_t index = find(&barriers, place);
    if (static_cast<int>(index) == dropped_barrier) return;
    places_[threadIdx.x] = &barriers[index];
    if (++at_barrier_ == blockDim.x) {
      at_barrier_ = 0;
      meet(0, blockDim.x);
    }
    wait();
  }

  // All lanes of a warp bring a value; each receives that of the source it names.
  uint64_t shuffle(uint64_t value, unsigned lane_mask, const Place& place) {
    const unsigned me = threadIdx.x, warp = me / kWarp;
    places_[me] = &shuffles_[find(&shuffles_, place)];
    values_[me] = value;
    sources_[me] = me ^ lane_mask;
    if (++at_shuffle_[warp] == kWarp) {
      at_shuffle_[warp] = 0;
      for (unsigned t = warp * kWarp; t < (warp + 1) * kWarp; ++t) received_[t] = values_[sources_[t]];
      meet(warp * kWarp, kWarp);
    }
    wait();
    return received_[me];
  }

  // Ends the launch for what the running thread does; outside of a launch, the process.
  [[noreturn]] void stop(const Place& place) {
    if (!running_) std::abort();
    places_[threadIdx.x] = &shuffles_[find(&shuffles_, place)];
    _longjmp(host_, 1);
  }

 private:
  unsigned below(unsigned n) {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return static_cast<unsigned>((random_ * 0x2545f4914f6cdd1dull >> 32) * n >> 32);
  }

  // One of the bits that are set.
  unsigned pick(uint32_t bits) {
    const unsigned from = below(32);
    const uint32_t rotated = bits >> from | bits << (32 - from) % 32;
    return (from + static_cast<unsigned>(__builtin_ctz(rotated))) % 32;
  }

  // Bytes that are NaN in every dtype and that differ from block to block.
  void poison_shared() {
    const uint32_t word = 0x7ff00001u | below(1 << 20);
    const size_t size = static_cast<size_t>(__stop_cuda_on_cpu_shared - __start_cuda_on_cpu_shared);
    for (size_t i = 0; i < size; i += sizeof(word))
      std::memcpy(__start_cuda_on_cpu_shared + i, &word, std::min(sizeof(word), size - i));
  }

  static size_t find(std::deque<Place>* places, const Place& place) {
    const auto known = std::find(places->begin(), places->end(), place);
    if (known != places->end()) return static_cast<size_t>(known - places->begin());
    places->push_back(place);
    return places->size() - 1;
  }

  std::string describe() const {
    std::map<std::string, std::vector<unsigned>> threads;
    for (unsigned t = 0; t < blockDim.x; ++t)
      threads[ready_[t / kWarp] >> t % kWarp & 1 ? "ready" : places_[t]->text()].push_back(t);
    std::string text = "cuda_on_cpu: block " + std::to_string(blockIdx.x) + " of " + std::to_string(gridDim.x) + ":";
    for (const auto& [what, which] : threads)
      text +=
          " thread " + std::to_string(which[0]) + " and " + std::to_string(which.size() - 1) + " more: " + what + ";";
    return text;
  }

  // Lets threads go on that wait at one and the same place.
  void meet(unsigned first, unsigned count) {
    for (unsigned t = first; t < first + count; ++t)
      if (places_[t] != places_[first]) _longjmp(host_, 1);
    for (unsigned t = first; t < first + count; t += kWarp) {
      ready_[t / kWarp] = ~0u >> (kWarp - std::min(kWarp, first + count - t));
      ready_warps_ |= 1u << t / kWarp;
    }
  }

  // The compiler must take this for a call that may read and write any shared variable.
  __attribute__((noinline)) void wait() {
    jmp_buf here;
    resume_[threadIdx.x] = &here;
    asm volatile("" ::: "memory");
    if (_setjmp(here) == 0) run_next();
    asm volatile("" ::: "memory");
  }

  __attribute__((noinline)) void run_block() {
    running_ = true;
    if (_setjmp(host_) == 0) run_next();
    running_ = false;
  }

  [[noreturn]] void run_next() {
    if (ready_warps_ == 0) _longjmp(host_, 1);
    // Mostly on with the same warp, which is in the cache.
    if (ready_[warp_] == 0 || below(16) == 0) warp_ = pick(ready_warps_);
    const unsigned lane = pick(ready_[warp_]), next = warp_ * kWarp + lane;
    if ((ready_[warp_] &= ~(1u << lane)) == 0) ready_warps_ &= ~(1u << warp_);
    threadIdx = dim3(next, 0, 0);
    if (resume_[next] != nullptr) _longjmp(*resume_[next], 1);
    start(next);
  }

  [[noreturn]] void start(unsigned thread) {
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_ + thread * kStack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, thread_main, 0);
    setcontext(&context);
    std::abort();
  }

  static void thread_main();

  static char* new_stacks() {
    void* memory =
        mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }

  std::mutex mutex_;
  uint64_t random_ = 1;
  char* stacks_ = new_stacks();
  jmp_buf host_;
  jmp_buf* resume_[kMaxThreads] = {};  // null where a thread has yet to start
  const Place* places_[kMaxThreads];
  uint64_t values_[kMaxThreads], received_[kMaxThreads];
  unsigned sources_[kMaxThreads];
  uint32_t ready_warps_ = 0, ready_[kMaxThreads / kWarp] = {};  // one bit for each warp, and for each lane
  unsigned warp_ = 0, at_barrier_ = 0, exited_ = 0, at_shuffle_[kMaxThreads / kWarp];
  bool running_ = false;
  std::deque<Place> shuffles_;
  void (*kernel_)(void*) = nullptr;
  void* arguments_ = nullptr;
};

inline Simulator simulator;

inline void Simulator::thread_main() {
  for (;;) {
    simulator.kernel_(simulator.arguments_);
    simulator.places_[threadIdx.x] = &kExit;
    ++simulator.exited_;
    simulator.wait();
  }
}

// The size of a parameter list, each parameter aligned to its type.
template <class... P>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return bytes;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::simulator.barrier({"__syncthreads", file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= sizeof(uint64_t), "not a type that CUDA can shuffle");
  if (mask != 0xffffffffu) cuda_on_cpu::simulator.stop({"a shuffle of part of a warp", file, line});
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = cuda_on_cpu::simulator.shuffle(bits, static_cast<unsigned>(lane_mask) % cuda_on_cpu::kWarp,
                                        {"a shuffle", file, line});
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float x) { return fastclip::cpu::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return fastclip::cpu::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return fastclip::cpu::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return fastclip::cpu::bit_cast<double>(x); }

// A NaN gets torch's bits here, and those of the device there.
using __half = fastclip::cpu::float16;
using __nv_bfloat16 = fastclip::cpu::bfloat16;
inline float __half2float(__half x) { return fastclip::cpu::to_float(x); }
inline __half __float2half_rn(float x) {
  __half out;
  fastclip::cpu::from_float(x, &out);
  return out;
}
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 out;
  fastclip::cpu::from_float(x, &out);
  return out;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

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
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::simulator.last_error, cudaSuccess); }
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cuda_on_cpu::simulator.status();
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cuda_on_cpu::simulator.status(); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_on_cpu::simulator.multiprocessors, cuda_on_cpu::simulator.status();
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = cuda_on_cpu::simulator.blocks_per_multiprocessor, cuda_on_cpu::simulator.status();
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return *attributes = {80, 1024, 32}, cuda_on_cpu::simulator.status();
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  const cudaError_t error = cuda_on_cpu::simulator.status();
  if (error == cudaSuccess) std::memset(to, byte, bytes);
  return error;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  using Arguments = std::tuple<std::decay_t<P>...>;
  constexpr size_t bytes = cuda_on_cpu::parameter_bytes<std::decay_t<P>...>();
  const dim3 grid = config->gridDim, block = config->blockDim;
  cuda_on_cpu::Simulator& simulator = cuda_on_cpu::simulator;
  if (grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 || block.x > cuda_on_cpu::kMaxThreads ||
      grid.y * grid.z * block.y * block.z != 1)
    return simulator.status(cudaErrorInvalidConfiguration);
  if (bytes > cuda_on_cpu::kMaxArguments || config->dynamicSmemBytes != 0)
    return simulator.status(cudaErrorInvalidValue);
  if (const cudaError_t error = simulator.status(); error != cudaSuccess) return error;
  simulator.launches.push_back({grid.x, block.x, static_cast<unsigned>(bytes)});
  std::pair<void (*)(P...), Arguments> call(kernel, Arguments(static_cast<P>(std::forward<A>(arguments))...));
  simulator.run(
      grid.x, block.x,
      [](void* opaque) {
        auto* call = static_cast<std::pair<void (*)(P...), Arguments>*>(opaque);
        std::apply(call->first, call->second);
      },
      &call);
  return cudaSuccess;
}
