// The passes that write: x *= clip_coef, and x = min(max(x, low), high). Meaning: clip.h.
#pragma once

#include "chunk_table.h"
#include "element.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace fastclip::cuda {

// What scaling does to an element; nothing is read where the coefficient is 1 in the dtype of the arithmetic.
template <class E>
struct Scale {
  using Opmath = typename E::Opmath;
  Opmath clip_coef;

  __device__ explicit Scale(double coef) : clip_coef(static_cast<Opmath>(coef)) {}
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

// What clamping does to an element: a NaN stays, and only what is out of bounds changes. Bounds are rounded to the
// dtype of the tensor first, as torch does; all becomes the upper one where it is below the lower.
template <class E>
struct Clamp {
  using Storage = typename E::Storage;
  using Opmath = typename E::Opmath;
  Storage low, high;

  __device__ explicit Clamp(const Bounds& bounds)
      : low(E::narrow(static_cast<Opmath>(bounds.low))), high(E::narrow(static_cast<Opmath>(bounds.high))) {
    if (E::widen(low) > E::widen(high)) low = high;
  }
  __device__ bool operator()(Storage& x) const {
    const Storage before = x;
    if (E::widen(before) < E::widen(low)) x = low;
    if (E::widen(before) > E::widen(high)) x = high;
    return x != before;
  }
};

// Changes the elements of a vector; whether it has to be written.
template <class E, class Change>
__device__ bool change_vector(Vector<E>& vector, const Change& change) {
  bool changed = false;
#pragma unroll
  for (int i = 0; i < Vector<E>::kLanes; ++i) changed = change(vector.lanes[i]) || changed;
  return changed;
}
template <class E>
__device__ bool change_vector(Vector<E>& vector, const Clamp<E>& clamp) {
  const Vector<E> before = vector;
  if constexpr (sizeof(typename E::Storage) == 2) {
    const uint32_t low = clamp.low * 0x10001u, high = clamp.high * 0x10001u;
    uint32_t words[kVectorBytes / sizeof(uint32_t)];
    memcpy(words, &vector, sizeof(words));
#pragma unroll
    for (uint32_t& word : words) word = E::clamp_pair(word, low, high);
    memcpy(&vector, words, sizeof(words));
  } else {
#pragma unroll
    for (int i = 0; i < Vector<E>::kLanes; ++i) clamp(vector.lanes[i]);
  }
  return differ(vector, before);
}

template <bool kBackwards, class E, class Change>
__device__ void write_run(const Run<E>& run, const Change& change) {
  const auto write = [&](Vector<E> vector, Vector<E>* place) {
    if (change_vector(vector, change)) store(place, vector);
  };
  if constexpr (kBackwards)
    run.for_each_vector_backwards(write);
  else
    run.for_each_vector(write);
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

// All threads of the block have to call.
__device__ inline double coefficient(const ScaleArguments& arguments) {
  return in_first_thread([&] {
    const double number =
        arguments.number == nullptr ? arguments.value : load_scalar(arguments.number, arguments.dtype);
    return arguments.is_norm ? clip_coef(number, arguments.value) : number;
  });
}

// x *= clip_coef for a chunk.
__device__ inline void scale_chunk(const Chunk& chunk, double clip_coef, bool zero) {
  with_element(chunk.dtype, [&](auto element) {
    using E = decltype(element);
    const Run<E> run(chunk.data, chunk.count);
    const Scale<E> scale(clip_coef);
    if (is_below_float32(clip_coef))
      write_elements(run, ScaleWide<E>{clip_coef});
    else if (zero && clip_coef == 0)
      write_elements(run, Zero<E>());
    else if (scale.is_needed())
      write_run<true>(run, scale);
  });
}

// The chunks of a table, the last first, and each from its end: what the norm read last is still in L2.
template <class AnyTable>
__device__ void scale_chunks(const AnyTable& table, double clip_coef, bool zero) {
  for (int64_t i = int64_t{table.chunks} - 1 - blockIdx.x; i >= 0; i -= gridDim.x)
    scale_chunk(find_chunk(table, static_cast<uint32_t>(i)), clip_coef, zero);
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scale_kernel(const __grid_constant__ Arguments<ScaleArguments, AnyTable> arguments) {
  const double clip_coef = coefficient(arguments.own);
  if (clip_coef != 1) scale_chunks(arguments.table, clip_coef, arguments.own.zero);
}

// The same with a coefficient for each tensor of the table.
template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scale_each_kernel(const __grid_constant__ Arguments<const double*, AnyTable> arguments) {
  for (int64_t i = int64_t{arguments.table.chunks} - 1 - blockIdx.x; i >= 0; i -= gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, static_cast<uint32_t>(i));
    const double coef = arguments.own[chunk.tensor];
    if (coef != 1) scale_chunk(chunk, coef, false);
  }
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    clamp_kernel(const __grid_constant__ Arguments<Bounds, AnyTable> arguments) {
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    with_element(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      write_run<false>(Run<E>(chunk.data, chunk.count), Clamp<E>(arguments.own));
    });
  }
}

template <class AnyTable>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sanitize_kernel(const __grid_constant__ Arguments<SanitizeArguments, AnyTable> arguments) {
  for (uint32_t i = blockIdx.x; i < arguments.table.chunks; i += gridDim.x) {
    const Chunk chunk = find_chunk(arguments.table, i);
    with_element(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      write_run<false>(Run<E>(chunk.data, chunk.count), Sanitize<E>());
    });
  }
}

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
  const double clip_coef = arguments.write == Write::kScale ? coefficient(arguments.scale) : 0;
  with_element(static_cast<Dtype>(arguments.table.dtype), [&](auto element) {
    using E = decltype(element);
    if (arguments.write == Write::kClamp) return write_strided<E>(arguments.table, Clamp<E>(arguments.bounds));
    if (arguments.write == Write::kSanitize) return write_strided<E>(arguments.table, Sanitize<E>());
    if (is_below_float32(clip_coef))
      write_strided<E>(arguments.table, ScaleWide<E>{clip_coef});
    else if (arguments.scale.zero && clip_coef == 0)
      write_strided<E>(arguments.table, Zero<E>());
    else if (const Scale<E> scale(clip_coef); scale.is_needed())
      write_strided<E>(arguments.table, scale);
  });
}

}  // namespace fastclip::cuda
