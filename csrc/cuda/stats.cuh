// What a look at each element tells beside the sum of squares, in the same read, and with its bits.
#pragma once

#include "norm.cuh"

namespace fastclip::cuda {

// Of the elements that a thread has seen; magnitudes compare as integers, NaN above inf.
template <class E>
struct Counts {
  using Bits = typename E::Storage;
  Bits largest = 0;
  uint32_t nonfinite = 0, zeros = 0;

  __device__ void add(Bits bits) {
    const Bits magnitude = bits & Extremes<E>::kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
    nonfinite += magnitude >= E::kInfinity;
    zeros += magnitude == 0;
  }
};

// The numbers of chunk i.
template <class E>
__device__ void store_stats(const StatsArguments& arguments, int64_t i, double squares, const Counts<E>& counts) {
  const double largest = block_extreme(NormKind::kMax, E::widen(counts.largest));
  const double nonfinite = block_sum(counts.nonfinite), zeros = block_sum(counts.zeros);
  if (threadIdx.x != 0) return;
  arguments.squares[i] = squares;
  double* const more = arguments.more + 3 * i;
  more[0] = largest;
  more[1] = nonfinite;
  more[2] = zeros;
}

template <bool kWide, class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    stats_kernel(const __grid_constant__ Arguments<StatsArguments, AnyTable> arguments) {
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    with_element(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      const Run<E> run(chunk.data, chunk.count);
      Counts<E> counts;
      const auto look = [&](typename E::Storage bits) { counts.add(bits); };
      double squares;
      if constexpr (kWide)
        squares = wide_sum<NormKind::kSquares>(run, 0, look);
      else
        squares = sum_of<NormKind::kSquares>(run, look);
      store_stats(arguments.own, i, squares, counts);
    });
  }
}

// The same for one tensor with holes.
__global__ void __launch_bounds__(kThreads)
    strided_stats_kernel(const __grid_constant__ StridedStatsArguments arguments) {
  const StridedTable& table = arguments.table;
  for (int64_t i = blockIdx.x; i < chunks_of(table); i += gridDim.x) {
    with_element(static_cast<Dtype>(table.dtype), [&](auto element) {
      using E = decltype(element);
      Counts<E> counts;
      double sum = 0;
      for_each_strided<E>(table, i, [&](typename E::Storage bits) {
        counts.add(bits);
        sum = add_wide<NormKind::kSquares>(sum, E::widen(bits), 0);
      });
      store_stats(arguments.own, i, block_sum(sum), counts);
    });
  }
}

// The row of each tensor from its chunks. A warp takes one at a time.
__global__ void __launch_bounds__(kThreads)
    finish_stats_kernel(const __grid_constant__ FinishStatsArguments arguments) {
  constexpr uint32_t kWarps = kThreads / kWarp;
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t i = blockIdx.x * kWarps + threadIdx.x / kWarp; i < arguments.tensors; i += gridDim.x * kWarps) {
    const uint32_t begin = i > 0 ? arguments.ends[i - 1] : 0, end = arguments.ends[i];
    const auto reduce = [&](NormKind how, const double* first, int step) {
      double x = 0;
      for (uint32_t slot = begin + lane; slot < end; slot += kWarp) x = combine(how, x, first[int64_t{slot} * step]);
      return warp_reduce(x, [how](double a, double b) { return combine(how, a, b); });
    };
    const double row[] = {
        reduce(NormKind::kSquares, arguments.own.squares, 1), reduce(NormKind::kMax, arguments.own.more, 3),
        reduce(NormKind::kSquares, arguments.own.more + 1, 3), reduce(NormKind::kSquares, arguments.own.more + 2, 3)};
    if (lane != 0) continue;
    double* const out = arguments.table + int64_t{4} * arguments.places[i];
    for (int k = 0; k < 4; ++k) out[k] = row[k];
  }
}

}  // namespace fastclip::cuda
