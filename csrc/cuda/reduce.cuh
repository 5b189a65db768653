// Reductions over the threads of a block, in an order that depends on nothing but their number.
#pragma once

#include <cuda_runtime.h>

#include "../clip.h"

namespace fastclip::cuda {

constexpr int kWarp = 32;

// One value for each warp of the largest block.
static __device__ double* warp_values() {
  __shared__ double values[kWarp];
  return values;
}

// f(x, y) combines the values of a warp; every thread gets the result.
template <class Combine>
__device__ double warp_reduce(double x, const Combine& combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// f(x, y) combines the values of all threads; every thread gets the result. All threads of the block have to call.
template <int kBlock, class Combine>
__device__ double block_reduce(double x, const Combine& combine) {
  constexpr int kWarps = kBlock / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = warp_reduce(x, combine);
  double* values = warp_values();
  __syncthreads();  // all have read what the call before left
  if (lane == 0) values[warp] = x;
  __syncthreads();
  x = values[lane % kWarps];
#pragma unroll
  for (int mask = kWarps / 2; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

}  // namespace fastclip::cuda
