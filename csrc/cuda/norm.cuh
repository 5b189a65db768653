// The norm: one partial for each chunk, then one block that combines them and finishes. Meaning: clip.h.
#pragma once

#include "chunk_table.h"
#include "element.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace fastclip::cuda {

// What a float32 sum of squares must reach so that those below float32's range cannot matter: 65,536 errors of 2^-150
// are 2^-44 of it.
constexpr double kLeastSumOfSquares = 0x1p-90;

// A float32 sum as a pair with what was rounded away from it: as good as float64 over a chunk, on GPUs that have none.
struct Pair {
  float sum = 0, error = 0;

  // Knuth's two-sum.
  __device__ void add(float x) {
    const float total = sum + x, part = total - sum;
    error += (sum - (total - part)) + (x - part);
    sum = total;
  }
  __device__ void add_square(float x) {
    const float square = x * x;
    error += fmaf(x, x, -square);
    add(square);
  }
  // The same bits where float32 holds the square.
  __device__ void add_exact_square(float x) {
    const float total = fmaf(x, x, sum), part = total - sum;
    error += (sum - (total - part)) + fmaf(x, x, -part);
    sum = total;
  }
  __device__ double wide() const { return double{sum} + double{error}; }
};

template <NormKind kKind>
__device__ double add_wide(double sum, double x, double p) {
  if (kKind == NormKind::kSquares) return fma(x, x, sum);
  if (kKind == NormKind::kAbs) return sum + fabs(x);
  return sum + exp2(p * log2(fabs(x)));  // log2(0) is -inf, as it has to be
}

__device__ inline double block_sum(double x) {
  return block_reduce<kThreads>(x, [](double a, double b) { return a + b; });
}

// Sees no element beside the sum.
struct NoLook {
  template <class Bits>
  __device__ void operator()(Bits) const {}
};

// The edges in float64. `look` is called with the bits of each element, once.
template <NormKind kKind, class E, class Look = NoLook>
__device__ double edge_sum(const Run<E>& run, double p, const Look& look = {}) {
  double sum = 0;
  run.for_each_edge([&](const typename E::Storage* place) {
    look(*place);
    sum = add_wide<kKind>(sum, E::widen(*place), p);
  });
  return sum;
}

template <NormKind kKind, class E, class Look = NoLook>
__device__ double wide_sum(const Run<E>& run, double p, const Look& look = {}) {
  double sum = edge_sum<kKind>(run, p, look);
  run.for_each_vector([&](const Vector<E>& vector, const Vector<E>*) {
#pragma unroll
    for (int i = 0; i < Vector<E>::kLanes; ++i) {
      look(vector.lanes[i]);
      sum = add_wide<kKind>(sum, E::widen(vector.lanes[i]), p);
    }
  });
  return block_sum(sum);
}

// sum x^2 or sum |x| of a chunk.
template <NormKind kKind, class E, class Look = NoLook>
__device__ double sum_of(const Run<E>& run, const Look& look = {}) {
  if constexpr (sizeof(typename E::Opmath) == sizeof(double)) {
    return wide_sum<kKind>(run, 0, look);
  } else {
    constexpr bool kExactSquares = sizeof(typename E::Storage) == 2;
    constexpr uint32_t kMagnitudes = sizeof(typename E::Storage) == 2 ? 0x7fff7fff : 0x7fffffff;
    Pair pair;
    uint32_t seen = 0;
    run.for_each_vector([&](const Vector<E>& vector, const Vector<E>*) {
      seen |= any_bits(vector);
#pragma unroll
      for (int i = 0; i < Vector<E>::kLanes; ++i) {
        look(vector.lanes[i]);
        const float x = E::widen(vector.lanes[i]);
        if (kKind == NormKind::kAbs)
          pair.add(fabsf(x));
        else if (kExactSquares)
          pair.add_exact_square(x);
        else
          pair.add_square(x);
      }
    });
    const double sum = block_sum(pair.wide() + edge_sum<kKind>(run, 0, look));
    const double least = kKind == NormKind::kSquares ? kLeastSumOfSquares : 0;
    if (sum >= least) return sum;
    // Float32 lost squares below its range, or overflowed, which makes the pair NaN; unless the body is all zero, as
    // where a layer is frozen or a row of an embedding was not used.
    if (block_sum((seen & kMagnitudes) != 0) == 0) return sum;
    return wide_sum<kKind>(run, 0);
  }
}

// max |x| and min |x| over the elements that a thread has seen. Magnitudes compare as integers, NaN above inf.
template <class E>
struct Extremes {
  using Bits = typename E::Storage;
  static constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits largest = 0, smallest = kMagnitude;

  __device__ void add(Bits bits) {
    const Bits magnitude = bits & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
    smallest = magnitude < smallest ? magnitude : smallest;
  }
  // A NaN wins; kCount is whether there is a non-zero.
  __device__ double value(NormKind kind) const {
    if (kind == NormKind::kCount) return largest != 0;
    const double maximum = E::widen(largest);
    if (kind == NormKind::kMax || maximum != maximum) return maximum;
    return smallest == kMagnitude ? identity(kind) : double{E::widen(smallest)};
  }
};

__device__ inline double block_extreme(NormKind kind, double x) {
  if (kind == NormKind::kMin) return block_reduce<kThreads>(x, [](double a, double b) { return min_nan(a, b); });
  return block_reduce<kThreads>(x, [](double a, double b) { return max_nan(a, b); });
}

template <class E>
__device__ double extreme_of(const Run<E>& run, NormKind kind) {
  Extremes<E> extremes;
  run.for_each_vector([&](const Vector<E>& vector, const Vector<E>*) {
#pragma unroll
    for (int i = 0; i < Vector<E>::kLanes; ++i) extremes.add(vector.lanes[i]);
  });
  run.for_each_edge([&](const typename E::Storage* place) { extremes.add(*place); });
  return block_extreme(kind, extremes.value(kind));
}

template <class E>
__device__ double powers_of(const Run<E>& run, double p, double unit) {
  double sum = 0;
  run.for_each_element([&](double x) { sum = add_wide<NormKind::kPow>(sum, x / unit, p); });
  return block_sum(sum);
}

template <NormPass kPass, class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_kernel(const __grid_constant__ Arguments<NormArguments, AnyTable> arguments) {
  const double p = arguments.own.p;
  const NormKind kind = p == 0 ? NormKind::kCount : p > 0 ? NormKind::kMax : NormKind::kMin;
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    const double partial = with_element(chunk.dtype, [&](auto element) {
      const Run<decltype(element)> run(chunk.data, chunk.count);
      if constexpr (kPass == NormPass::kSquares)
        return sum_of<NormKind::kSquares>(run);
      else if constexpr (kPass == NormPass::kAbs)
        return sum_of<NormKind::kAbs>(run);
      else if constexpr (kPass == NormPass::kWideSquares)
        return wide_sum<NormKind::kSquares>(run, 0);
      else if constexpr (kPass == NormPass::kWideAbs)
        return wide_sum<NormKind::kAbs>(run, 0);
      else if constexpr (kPass == NormPass::kExtreme)
        return extreme_of(run, kind);
      else if constexpr (kPass == NormPass::kPow)
        return powers_of(run, p, 1);
      const bool in_unit = !powers_stay_in_float64(chunk.dtype, p);
      const double unit = in_unit ? power_unit(extreme_of(run, unit_kind(p))) : 1;
      return root_in(unit, powers_of(run, p, unit), p);
    });
    if (threadIdx.x != 0) continue;
    // Of a count, a tensor has one slot, zero before: all of its chunks that find something store the same 1.
    if (kPass != NormPass::kExtreme || kind != NormKind::kCount)
      arguments.own.partials[i] = partial;
    else if (partial != 0)
      arguments.own.partials[chunk.tensor] = 1;
  }
}

// Calls f(bits) for a thread's share of chunk i.
template <class E, class F>
__device__ void for_each_strided(const StridedTable& table, int64_t i, const F& f) {
  const int64_t begin = i * kChunkSize, end = begin + kChunkSize < table.numel ? begin + kChunkSize : table.numel;
  for (int64_t j = begin + threadIdx.x; j < end; j += kThreads)
    f(reinterpret_cast<const typename E::Storage*>(table.data)[offset_of(table, j)]);
}

template <class E>
__device__ double strided_sum(const StridedTable& table, int64_t i, NormKind kind, double p, double unit) {
  double sum = 0;
  for_each_strided<E>(table, i, [&](typename E::Storage bits) {
    const double x = E::widen(bits);
    if (kind == NormKind::kSquares)
      sum = add_wide<NormKind::kSquares>(sum, x, 0);
    else if (kind == NormKind::kAbs)
      sum = add_wide<NormKind::kAbs>(sum, x, 0);
    else
      sum = add_wide<NormKind::kPow>(sum, x / unit, p);
  });
  return block_sum(sum);
}

template <class E>
__device__ double strided_extreme(const StridedTable& table, int64_t i, NormKind kind) {
  Extremes<E> extremes;
  for_each_strided<E>(table, i, [&](typename E::Storage bits) { extremes.add(bits); });
  return block_extreme(kind, extremes.value(kind));
}

__global__ void __launch_bounds__(kThreads)
    strided_norm_kernel(const __grid_constant__ StridedNormArguments arguments) {
  const StridedTable& table = arguments.table;
  const NormKind kind = arguments.kind;
  const Dtype dtype = static_cast<Dtype>(table.dtype);
  const double p = arguments.own.p;
  const bool sums = kind == NormKind::kSquares || kind == NormKind::kAbs || kind == NormKind::kPow;
  const bool in_unit = arguments.are_norms && !powers_stay_in_float64(dtype, p);
  for (int64_t i = blockIdx.x; i < chunks_of(table); i += gridDim.x) {
    const double partial = with_element(dtype, [&](auto element) {
      using E = decltype(element);
      double unit = 1;
      if (in_unit) unit = power_unit(strided_extreme<E>(table, i, unit_kind(p)));
      if (!sums) return strided_extreme<E>(table, i, kind);
      const double sum = strided_sum<E>(table, i, kind, p, unit);
      return arguments.are_norms ? root_in(unit, sum, p) : sum;
    });
    if (threadIdx.x != 0) continue;
    if (kind != NormKind::kCount)
      arguments.own.partials[i] = partial;
    else if (partial != 0)
      arguments.own.partials[0] = 1;
  }
}

// Combines partials in an order that no block's size changes: every 1,024th by a thread of the largest block, then the
// threads. Eight loads are in flight before the first is used.
template <int kBlock, NormKind kKind>
__device__ double folded(const double* partials, int64_t slots) {
  constexpr int kLoads = 8, kEach = kFinishThreads / kBlock;
  const auto both = [](double a, double b) { return combine(kKind, a, b); };
  double each[kEach];
#pragma unroll
  for (double& x : each) x = identity(kKind);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < slots; i += kLoads * kBlock) {
    double loaded[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) loaded[k] = i + k * kBlock < slots ? partials[i + k * kBlock] : identity(kKind);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) each[k % kEach] = both(each[k % kEach], loaded[k]);
  }
  return block_reduce<kBlock>(each, both);
}

template <int kBlock>
__device__ double combined(NormKind kind, const double* partials, int64_t slots) {
  if (kind == NormKind::kMax) return folded<kBlock, NormKind::kMax>(partials, slots);
  if (kind == NormKind::kMin) return folded<kBlock, NormKind::kMin>(partials, slots);
  return folded<kBlock, NormKind::kSquares>(partials, slots);  // a sum, as of all others
}

__device__ inline double combined_norms(double p, const double* norms, int64_t slots) {
  const double unit = power_unit(combined<kFinishThreads>(unit_kind(p), norms, slots));
  double sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < slots; i += kFinishThreads) sum = add_wide<NormKind::kPow>(sum, norms[i] / unit, p);
  sum = block_reduce<kFinishThreads>(sum, [](double a, double b) { return a + b; });
  return root_in(unit, sum, p);
}

// The norm of each tensor alone. A warp takes one at a time: most tensors have few slots.
__global__ void __launch_bounds__(kThreads) finish_each_kernel(const __grid_constant__ FinishEachArguments arguments) {
  constexpr uint32_t kWarps = kThreads / kWarp;
  const NormKind kind = arguments.kind;
  const double p = arguments.p;
  const uint32_t lane = threadIdx.x % kWarp;
  for (uint32_t i = blockIdx.x * kWarps + threadIdx.x / kWarp; i < arguments.tensors; i += gridDim.x * kWarps) {
    const uint32_t begin = i > 0 ? arguments.ends[i - 1] : 0, end = arguments.ends[i];
    const auto reduce = [&](NormKind how, auto term) {
      double x = identity(how);
      for (uint32_t slot = begin + lane; slot < end; slot += kWarp) x = combine(how, x, term(arguments.partials[slot]));
      return warp_reduce(x, [how](double a, double b) { return combine(how, a, b); });
    };
    double norm;
    if (arguments.are_norms) {
      const double unit = power_unit(reduce(unit_kind(p), [](double x) { return x; }));
      const double sum = reduce(NormKind::kPow, [=](double x) { return add_wide<NormKind::kPow>(0, x / unit, p); });
      norm = root_in(unit, sum, p);
    } else {
      norm = root(kind, reduce(kind, [](double x) { return x; }), p);
    }
    if (lane == 0) arguments.norms[i] = norm;
  }
}

// What the gradients are multiplied by, from their norm. One thread of the launch `writes` what the caller is told.
__device__ inline double finish_clip(double norm, const FinishArguments& arguments, bool writes) {
  const Clip& clip = arguments.clip;
  const Number number = clip.inv_scale;
  const double inv_scale = number.data == nullptr ? 1.0 : load_scalar(number.data, number.dtype);
  norm = scaled_norm(norm, clip.norm_type, inv_scale);
  if (writes && clip.found_inf.data != nullptr)
    *static_cast<float*>(clip.found_inf.data) = is_finite(norm) ? 0.0f : 1.0f;
  if (writes) store_scalar(arguments.norm.data, arguments.norm.dtype, norm);
  return clip_factor(norm, inv_scale, clip);
}

template <Finish kFinish>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const __grid_constant__ FinishArguments arguments) {
  double x;
  if constexpr (kFinish == Finish::kCombineNorms)
    x = combined_norms(arguments.clip.norm_type, arguments.partials, arguments.slots);
  else
    x = combined<kFinishThreads>(arguments.kind, arguments.partials, arguments.slots);
  if (threadIdx.x != 0) return;
  if (kFinish == Finish::kRoot) x = root(arguments.kind, x, arguments.clip.norm_type);
  if (kFinish != Finish::kPartial && arguments.slots == 0) x = 0;  // of nothing the norm is 0
  if (arguments.clip_coef != nullptr)
    *arguments.clip_coef = finish_clip(x, arguments, true);
  else
    store_scalar(arguments.norm.data, arguments.norm.dtype, x);
}

}  // namespace fastclip::cuda
