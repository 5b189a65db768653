// The passes that write: x *= clip_coef, and x = min(max(x, low), high). Meaning: clip.h.
#pragma once

#include "chunk_table.h"
#include "element.cuh"

namespace fastclip::cuda {

// What scaling does to an element; nothing is read where the coefficient is 1 in the dtype of the arithmetic.
template <class E>
struct Scale {
  using Opmath = typename E::Opmath;
  Opmath clip_coef;

  __device__ explicit Scale(const double* place) : clip_coef(static_cast<Opmath>(*place)) {}
  __device__ bool is_needed() const { return clip_coef != Opmath{1}; }
  // Whether x has to be written.
  __device__ bool operator()(typename E::Storage& x) const {
    x = E::narrow(E::widen(x) * clip_coef);
    return true;
  }
};

// The same for a coefficient below float32, in float64.
template <class E>
struct ScaleWide {
  double clip_coef;

  __device__ bool operator()(typename E::Storage& x) const {
    x = E::narrow(static_cast<typename E::Opmath>(E::widen(x) * clip_coef));
    return true;
  }
};

// What is left of all elements where `zero` was asked for and the coefficient is 0.
template <class E>
struct Zero {
  __device__ bool operator()(typename E::Storage& x) const {
    x = 0;
    return true;
  }
};

// What sanitizing does to an element: inf and NaN become 0.
template <class E>
struct Sanitize {
  __device__ bool operator()(typename E::Storage& x) const {
    if (is_finite(E::widen(x))) return false;
    x = 0;
    return true;
  }
};

// What clamping does to an element: a NaN stays, and only what is out of bounds changes. A bound is rounded to the
// dtype of the tensor as torch does, when it is stored.
struct Bounds {
  double low, high;
};
template <class E>
struct Clamp {
  using Opmath = typename E::Opmath;
  Opmath low, high;

  __device__ explicit Clamp(const Bounds& bounds)
      : low(static_cast<Opmath>(bounds.low)), high(static_cast<Opmath>(bounds.high)) {}
  __device__ bool operator()(typename E::Storage& x) const {
    const Opmath before = E::widen(x);
    Opmath after = before < low ? low : before;
    after = after > high ? high : after;
    const bool changes = after < before || after > before;
    if (changes) x = E::narrow(after);
    return changes;
  }
};

template <class E, class Change>
__device__ void write_run(const Run<E>& run, const Change& change) {
  run.for_each_vector([&](Vector<E> vector, Vector<E>* place) {
    bool changed = false;
#pragma unroll
    for (int i = 0; i < Vector<E>::kLanes; ++i) changed = change(vector.lanes[i]) || changed;
    if (changed) store(place, vector);
  });
  run.for_each_edge([&](typename E::Storage* place) {
    typename E::Storage x = *place;
    if (change(x)) *place = x;
  });
}

// One element at a time, for what is rare.
template <class E, class Change>
__device__ void write_elements(const Run<E>& run, const Change& change) {
  typename E::Storage* elements = reinterpret_cast<typename E::Storage*>(run.body) - run.head;
#pragma unroll 1
  for (int i = threadIdx.x; i < run.count(); i += kThreads) change(elements[i]);
}

struct ScaleArguments {
  const double* clip_coef;
  bool zero;  // whether a coefficient of 0 makes zeros also of inf and NaN
};

// x *= *clip_coef for a chunk.
__device__ inline void scale_chunk(const Chunk& chunk, const ScaleArguments& arguments) {
  const double* const clip_coef = arguments.clip_coef;
  with_element(chunk.dtype, [&](auto element) {
    using E = decltype(element);
    const Run<E> run(chunk.data, chunk.count);
    const Scale<E> scale(clip_coef);
    if (is_below_float32(*clip_coef))
      write_elements(run, ScaleWide<E>{*clip_coef});
    else if (arguments.zero && *clip_coef == 0)
      write_elements(run, Zero<E>());
    else if (scale.is_needed())
      write_run(run, scale);
  });
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, 4)
    scale_kernel(const __grid_constant__ Arguments<ScaleArguments, AnyTable> arguments) {
  const double* const clip_coef = arguments.own.clip_coef;
  if (*clip_coef == 1) return;
  // Backwards: what the norm read last is still in L2.
  for (int64_t i = int64_t{arguments.table.chunks} - 1 - blockIdx.x; i >= 0; i -= gridDim.x) {
    scale_chunk(find_chunk(arguments.table, static_cast<uint32_t>(i)), arguments.own);
  }
}

// The same with a coefficient for each tensor of the table.
template <class AnyTable>
__global__ void __launch_bounds__(kThreads, 4)
    scale_each_kernel(const __grid_constant__ Arguments<const double*, AnyTable> arguments) {
  for (int64_t i = int64_t{arguments.table.chunks} - 1 - blockIdx.x; i >= 0; i -= gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, static_cast<uint32_t>(i));
    const double* const coef = arguments.own + chunk.tensor;
    if (*coef != 1) scale_chunk(chunk, {coef, false});
  }
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, 4)
    clamp_kernel(const __grid_constant__ Arguments<Bounds, AnyTable> arguments) {
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    with_element(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      write_run(Run<E>(chunk.data, chunk.count), Clamp<E>(arguments.own));
    });
  }
}

struct SanitizeArguments {};

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, 4)
    sanitize_kernel(const __grid_constant__ Arguments<SanitizeArguments, AnyTable> arguments) {
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    with_element(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      write_run(Run<E>(chunk.data, chunk.count), Sanitize<E>());
    });
  }
}

// The same for one tensor with holes.
enum class Write : uint8_t { kScale, kClamp, kSanitize };
struct StridedWriteArguments {
  Write write;
  ScaleArguments scale;
  Bounds bounds;
  StridedTable table;
};

template <class E, class Change>
__device__ void write_strided(const StridedTable& table, const Change& change) {
  for (int64_t j = int64_t{blockIdx.x} * kThreads + threadIdx.x; j < table.numel; j += int64_t{gridDim.x} * kThreads) {
    typename E::Storage* place = reinterpret_cast<typename E::Storage*>(table.data) + offset_of(table, j);
    typename E::Storage x = *place;
    if (change(x)) *place = x;
  }
}

__global__ void __launch_bounds__(kThreads)
    strided_write_kernel(const __grid_constant__ StridedWriteArguments arguments) {
  with_element(static_cast<Dtype>(arguments.table.dtype), [&](auto element) {
    using E = decltype(element);
    const double* const clip_coef = arguments.scale.clip_coef;
    if (arguments.write == Write::kClamp)
      write_strided<E>(arguments.table, Clamp<E>(arguments.bounds));
    else if (arguments.write == Write::kSanitize)
      write_strided<E>(arguments.table, Sanitize<E>());
    else if (is_below_float32(*clip_coef))
      write_strided<E>(arguments.table, ScaleWide<E>{*clip_coef});
    else if (arguments.scale.zero && *clip_coef == 0)
      write_strided<E>(arguments.table, Zero<E>());
    else if (const Scale<E> scale(clip_coef); scale.is_needed())
      write_strided<E>(arguments.table, scale);
  });
}

// The coefficient of the kernels above, from a number of any dtype or, where there is none, from `value`.
__global__ void coef_kernel(double* clip_coef, const void* number, Dtype dtype, double value) {
  *clip_coef = number != nullptr ? load_scalar(number, dtype) : value;
}

// The coefficient of a norm that is known.
__global__ void norm_coef_kernel(double* coef, const void* norm, Dtype dtype, double max_norm) {
  *coef = clip_coef(load_scalar(norm, dtype), max_norm);
}

}  // namespace fastclip::cuda
