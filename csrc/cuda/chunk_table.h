// The table of a launch: tensors of any dtypes and sizes by value in the kernel's arguments, so that nothing is copied
// to the device and a CUDA graph replays it as it is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../clip.h"
#ifndef __CUDACC_RTC__  // the device reads tables, and fills none
#include <algorithm>

#include "../views.h"
#endif

namespace fastclip::cuda {

// What a kernel's arguments may take on compute capability 7.0 and later.
constexpr size_t kMostArgumentBytes = 32764;

// A dense tensor. 2^32 chunks are 2^48 elements.
struct Entry {
  char* data;
  uint32_t end;         // chunks of this tensor and of all before it
  uint32_t last : 16;   // elements of its last chunk, less one
  uint32_t dtype : 16;  // Dtype
};
static_assert(kChunkSize <= 1 << 16, "what Entry::last counts");
static_assert(sizeof(Entry) == 16, "16 bytes are what the capacities below count on");

template <int kSize>
struct Table {
  static constexpr int kCapacity = kSize;
  uint32_t tensors;
  uint32_t chunks;
  Entry entries[kSize];

#ifndef __CUDACC_RTC__
  // Takes the tensors from `first` on that fit; returns one past the last of them.
  size_t fill(const TensorViews& dense, size_t first) {
    const size_t end = std::min(dense.size(), first + kCapacity);
    tensors = static_cast<uint32_t>(end - first);
    chunks = 0;
    for (size_t i = first; i < end; ++i) {
      const TensorView& tensor = *dense[i];
      chunks += static_cast<uint32_t>((tensor.numel + kChunkSize - 1) / kChunkSize);
      entries[i - first] = {tensor.data, chunks, static_cast<uint32_t>((tensor.numel - 1) % kChunkSize),
                            static_cast<uint32_t>(tensor.dtype)};
    }
    return end;
  }
#endif
};

// Two sizes, because a launch copies all of its arguments.
using ShortTable = Table<254>;
using LongTable = Table<2040>;

// What a kernel takes: arguments of its own, up to 112 bytes, and a table.
template <class OwnArguments, class AnyTable>
struct Arguments {
  OwnArguments own;
  AnyTable table;
  static_assert(sizeof(OwnArguments) + sizeof(AnyTable) <= kMostArgumentBytes, "does not fit");
};

// A chunk of a table, found by all threads alike.
struct Chunk {
  char* data;
  int count;
  Dtype dtype;
  uint32_t tensor;  // its place in the table
};

template <class AnyTable>
FASTCLIP_HD inline Chunk find_chunk(const AnyTable& table, uint32_t chunk) {
  // The first entry that ends after the chunk: from where it is if all are equal, by steps that double, then by halves.
  const float share = static_cast<float>(chunk) / static_cast<float>(table.chunks);
  const uint32_t guess = static_cast<uint32_t>(share * static_cast<float>(table.tensors)), last = table.tensors - 1;
  uint32_t low = guess < last ? guess : last, high = low;
  for (uint32_t step = 1; low > 0 && table.entries[low - 1].end > chunk; step *= 2) {
    high = low - 1;
    low = high > step ? high - step : 0;
  }
  for (uint32_t step = 1; table.entries[high].end <= chunk; step *= 2) {
    low = high + 1;
    high = last - low > step ? low + step : last;
  }
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (table.entries[middle].end > chunk)
      high = middle;
    else
      low = middle + 1;
  }
  const Entry& entry = table.entries[low];
  const Dtype dtype = static_cast<Dtype>(entry.dtype);
  const uint32_t index = chunk - (low > 0 ? table.entries[low - 1].end : 0);
  const int count = chunk + 1 == entry.end ? static_cast<int>(entry.last) + 1 : kChunkSize;
  return {entry.data + int64_t{index} * kChunkSize * element_size(dtype), count, dtype, low};
}

// Division of numbers below 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t by) : shift(0) {
    while (shift < 31 && uint32_t{1} << shift < by) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }
  FASTCLIP_HD uint32_t quotient(uint32_t x) const {
    return (static_cast<uint32_t>(uint64_t{x} * multiplier >> 32) + x) >> shift;
  }
};

// A tensor with holes between its elements: a launch of its own, element by element.
struct StridedTable {
  static constexpr int kMostDims = 64;  // torch's own limit
  char* data;
  int64_t numel;
  int32_t dtype;  // Dtype
  int32_t dims;
  bool is_small;          // below 2^31 elements, which have divisors
  Divisor by[kMostDims];  // the sizes
  Dim dim[kMostDims];     // outermost first

#ifndef __CUDACC_RTC__
  explicit StridedTable(const TensorView& tensor)
      : data(tensor.data),
        numel(tensor.numel),
        dtype(static_cast<int32_t>(tensor.dtype)),
        dims(static_cast<int32_t>(tensor.dims->size())),
        is_small(tensor.numel < int64_t{1} << 31) {
    std::copy(tensor.dims->begin(), tensor.dims->end(), dim);
    for (int d = 0; is_small && d < dims; ++d) by[d] = Divisor(static_cast<uint32_t>(dim[d].size));
  }
#endif
};

FASTCLIP_HD inline int64_t chunks_of(const StridedTable& table) { return (table.numel + kChunkSize - 1) / kChunkSize; }

// Where element i lies, in elements.
FASTCLIP_HD inline int64_t offset_of(const StridedTable& table, int64_t i) {
  int64_t offset = 0;
  int d = table.dims - 1;
  if (table.is_small) {
    uint32_t left = static_cast<uint32_t>(i);
    for (; d > 0; --d) {
      const uint32_t outer = table.by[d].quotient(left);
      offset += (left - outer * static_cast<uint32_t>(table.dim[d].size)) * table.dim[d].stride;
      left = outer;
    }
    return offset + left * table.dim[0].stride;
  }
  for (; d > 0; i /= table.dim[d--].size) offset += i % table.dim[d].size * table.dim[d].stride;
  return offset + i * table.dim[0].stride;
}

}  // namespace fastclip::cuda
