// Reductions over the threads of a block, in an order that depends on nothing but their number.
#pragma once

#include <cuda_runtime.h>

#include "../clip.h"
#include "kernels.h"

namespace fastclip::cuda {

// One value for each warp of the largest block.
static __device__ double* warp_values() {
  __shared__ double values[kWarp];
  return values;
}

// What f() is in the first thread, for all threads of the block, which have to call, and once in a kernel: for
// arithmetic that few GPUs are fast at.
static __device__ double* first_value() {
  __shared__ double value;
  return &value;
}
template <class F>
__device__ double in_first_thread(const F& f) {
  double* value = first_value();
  if (threadIdx.x == 0) *value = f();
  __syncthreads();
  return *value;
}

// f(x, y) combines the values of a warp; every thread gets the result.
template <class Combine>
__device__ double warp_reduce(double x, const Combine& combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// f(x, y) combines kEach values of each thread, as if each were that of a thread of a block kEach times as large; every
// thread gets the result. All threads of the block have to call.
template <int kBlock, int kEach, class Combine>
__device__ double block_reduce(const double (&each)[kEach], const Combine& combine) {
  constexpr int kWarps = kBlock / kWarp, kValues = kEach * kWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* values = warp_values();
  double of_warp[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) of_warp[i] = warp_reduce(each[i], combine);
  __syncthreads();  // all have read what the call before left
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (lane == 0) values[i * kWarps + warp] = of_warp[i];
  __syncthreads();
  double x = values[lane % kValues];
#pragma unroll
  for (int mask = kValues / 2; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}
template <int kBlock, class Combine>
__device__ double block_reduce(double x, const Combine& combine) {
  const double one[] = {x};
  return block_reduce<kBlock>(one, combine);
}

}  // namespace fastclip::cuda
