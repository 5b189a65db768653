// The elements of a chunk: how they lie in memory and in arithmetic, and the walk over them in vectors of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../clip.h"
#include "kernels.h"

// Other values are for .ci/gpu sweep.
#ifndef FASTCLIP_UNROLL
#define FASTCLIP_UNROLL 4
#endif

namespace fastclip::cuda {

constexpr int kVectorBytes = 16;

template <Dtype kDtype>
struct Element;

template <class Pair>
__device__ Pair pair_of(uint32_t bits) {
  Pair pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

// The bits of x, of low where `below`, of high where `above`.
__device__ inline uint32_t select(uint32_t x, uint32_t below, uint32_t low, uint32_t above, uint32_t high) {
  x = (x & ~below) | (low & below);
  return (x & ~above) | (high & above);
}

template <>
struct Element<Dtype::kFloat32> {
  using Storage = uint32_t;
  static constexpr Storage kInfinity = 0x7f800000u;
  using Opmath = float;
  static __device__ float widen(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ uint32_t narrow(float x) { return __float_as_uint(x); }
};
template <>
struct Element<Dtype::kFloat64> {
  using Storage = unsigned long long;
  static constexpr Storage kInfinity = 0x7ff0000000000000ull;
  using Opmath = double;
  static __device__ double widen(unsigned long long bits) { return __longlong_as_double(static_cast<long long>(bits)); }
  static __device__ unsigned long long narrow(double x) {
    return static_cast<unsigned long long>(__double_as_longlong(x));
  }
};
template <>
struct Element<Dtype::kBFloat16> {
  using Storage = uint16_t;
  static constexpr Storage kInfinity = 0x7f80;
  using Opmath = float;
  static __device__ float widen(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
  static __device__ uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  // As of float16; one by one before compute capability 9.0, which compares them in pairs.
  static __device__ uint32_t clamp_each(uint32_t x, uint32_t low, uint32_t high) {
    constexpr uint32_t kUpper = 0xffff0000u;
    const float lowest = __uint_as_float(low & kUpper), highest = __uint_as_float(high & kUpper);
    const auto clamped = [&](uint32_t bits) {
      float one = __uint_as_float(bits);
      one = one < lowest ? lowest : one;
      return __float_as_uint(one > highest ? highest : one);
    };
    return __byte_perm(clamped(x << 16), clamped(x & kUpper), 0x7632);
  }
  static __device__ uint32_t clamp_pair(uint32_t x, uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return clamp_each(x, low, high);
#else
    const __nv_bfloat162 pair = pair_of<__nv_bfloat162>(x);
    return select(x, __hlt2_mask(pair, pair_of<__nv_bfloat162>(low)), low,
                  __hgt2_mask(pair, pair_of<__nv_bfloat162>(high)), high);
#endif
  }
};
template <>
struct Element<Dtype::kFloat16> {
  using Storage = uint16_t;
  static constexpr Storage kInfinity = 0x7c00;
  using Opmath = float;
  static __device__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
  // Both numbers of a word, within bounds of which there are two in a word, too; low <= high, and a NaN stays.
  static __device__ uint32_t clamp_pair(uint32_t x, uint32_t low, uint32_t high) {
    const __half2 pair = pair_of<__half2>(x);
    return select(x, __hlt2_mask(pair, pair_of<__half2>(low)), low, __hgt2_mask(pair, pair_of<__half2>(high)), high);
  }
};

// Calls f(Element<dtype>()) with the dtype of this chunk, which all threads of the block share.
template <class F>
__device__ auto with_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Element<Dtype::kFloat32>());
    case Dtype::kFloat64:
      return f(Element<Dtype::kFloat64>());
    case Dtype::kBFloat16:
      return f(Element<Dtype::kBFloat16>());
    default:
      return f(Element<Dtype::kFloat16>());
  }
}

template <class E>
struct alignas(kVectorBytes) Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(typename E::Storage);
  typename E::Storage lanes[kLanes];
};

template <class E>
__device__ Vector<E> load(const Vector<E>* place) {
  const uint4 words = *reinterpret_cast<const uint4*>(place);
  Vector<E> vector;
  memcpy(&vector, &words, sizeof(vector));
  return vector;
}

template <class E>
__device__ void store(Vector<E>* place, const Vector<E>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof(words));
  *reinterpret_cast<uint4*>(place) = words;
}

// The bits that are set in any word of a vector.
template <class E>
__device__ uint32_t any_bits(const Vector<E>& vector) {
  uint4 words;
  memcpy(&words, &vector, sizeof(words));
  return words.x | words.y | words.z | words.w;
}

// Whether any bit of two vectors differs.
template <class E>
__device__ bool differ(const Vector<E>& a, const Vector<E>& b) {
  uint4 x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  return ((x.x ^ y.x) | (x.y ^ y.y) | (x.z ^ y.z) | (x.w ^ y.w)) != 0;
}

// The elements of a chunk: a body of whole vectors that starts at a multiple of 16 bytes, and the edges, of less than a
// vector each, before and after it.
template <class E>
struct Run {
  using Storage = typename E::Storage;
  static constexpr int kLanes = Vector<E>::kLanes;

  Vector<E>* body;
  int vectors, head, tail;

  __device__ Run(char* data, int count) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kVectorBytes);
    const int before = (kVectorBytes - misaligned) % kVectorBytes / static_cast<int>(sizeof(Storage));
    head = before < count ? before : count;
    vectors = (count - head) / kLanes;
    tail = count - head - vectors * kLanes;
    body = reinterpret_cast<Vector<E>*>(data + head * sizeof(Storage));
  }

  __device__ int count() const { return head + vectors * kLanes + tail; }

  // Calls f(place) for the edges: one element for each of the first threads.
  template <class F>
  __device__ void for_each_edge(const F& f) const {
    const int lane = threadIdx.x;
    Storage* elements = reinterpret_cast<Storage*>(body);
    if (lane < kLanes) {
      if (lane < head) f(elements + lane - head);
    } else if (lane - kLanes < tail) {
      f(elements + vectors * kLanes + lane - kLanes);
    }
  }

  // Calls f(vector, place) for the body, with four loads in flight before the first use.
  template <class F>
  __device__ void for_each_vector(const F& f) const {
    int i = threadIdx.x;
    for (; i + kBatch - kThreads < vectors; i += kBatch) batch(i, f);
#pragma unroll 1
    for (; i < vectors; i += kThreads) f(load(body + i), body + i);
  }

  // The same batches in the other order: what the walk above came to last is first.
  template <class F>
  __device__ void for_each_vector_backwards(const F& f) const {
    const int lane = threadIdx.x;
    const int rest = (vectors - lane + kThreads - 1) / kBatch * kBatch + lane;
#pragma unroll 1
    for (int i = rest; i < vectors; i += kThreads) f(load(body + i), body + i);
    for (int i = rest - kBatch; i >= 0; i -= kBatch) batch(i, f);
  }

  // Calls f(x) for every element, in order of memory; for arithmetic that is slower than memory.
  template <class F>
  __device__ void for_each_element(const F& f) const {
    const Storage* elements = reinterpret_cast<const Storage*>(body) - head;
#pragma unroll 1
    for (int i = threadIdx.x; i < count(); i += kThreads) f(E::widen(elements[i]));
  }

 private:
  static constexpr int kUnroll = FASTCLIP_UNROLL, kBatch = kUnroll * kThreads;

  template <class F>
  __device__ void batch(int i, const F& f) const {
    Vector<E> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = load(body + i + u * kThreads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) f(loaded[u], body + i + u * kThreads);
  }
};

// A number of any of the dtypes, and back with one rounding to float32 on the way to 16 bits.
__device__ inline double load_scalar(const void* place, Dtype dtype) {
  return with_element(dtype, [place](auto element) {
    using E = decltype(element);
    return static_cast<double>(E::widen(*static_cast<const typename E::Storage*>(place)));
  });
}
__device__ inline void store_scalar(void* place, Dtype dtype, double value) {
  with_element(dtype, [place, value](auto element) {
    using E = decltype(element);
    *static_cast<typename E::Storage*>(place) = E::narrow(static_cast<typename E::Opmath>(value));
  });
}

}  // namespace fastclip::cuda
