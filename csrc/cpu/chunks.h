// What the passes of the CPU are made of: a list in chunks, walked by torch's threads; the norm of what a chunk holds,
// and its scaling.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../abi.h"
#include "../clip.h"
#include "../op_arguments.h"
#include "../views.h"
#include "float_mode.h"
#include "loops.h"

namespace fastclip::cpu {

// Elements gathered at a time from a tensor that is not one run of memory: 16 KiB of float64, half of an L1 cache.
constexpr int64_t kBlockSize = 2048;
// What a chunk costs beside its elements, in bytes of memory traffic; and the least work worth a thread.
constexpr int64_t kChunkCost = 256;
constexpr int64_t kGrain = 512 * 1024;

struct Chunk {
  const TensorView* tensor;
  size_t place;  // of the tensor in the list
  int64_t begin;
  int64_t count;
  int64_t cost_before;  // of all chunks before this one

  const char* data() const { return tensor->data + begin * element_size(tensor->dtype); }
  int64_t bytes() const { return count * element_size(tensor->dtype); }
};

struct ChunkTable {
  std::vector<Chunk> chunks;
  int64_t cost = 0;

  // Chunks of so many elements, each of which is passed over so many times.
  explicit ChunkTable(const TensorViews& tensors, int64_t chunk_size = kChunkSize, int64_t times = 1) {
    size_t size = 0;
    for (const TensorView* tensor : tensors) size += static_cast<size_t>((tensor->numel + chunk_size - 1) / chunk_size);
    chunks.reserve(size);
    for (size_t place = 0; place < tensors.size(); ++place) {
      const TensorView* const tensor = tensors[place];
      for (int64_t begin = 0; begin < tensor->numel; begin += chunk_size) {
        const int64_t count = std::min(chunk_size, tensor->numel - begin);
        chunks.push_back({tensor, place, begin, count, cost});
        cost += kChunkCost + chunks.back().bytes() * times;
      }
    }
  }
};

// The next chunk is somewhere else in memory, where no hardware prefetch looks: asks for its first lines.
template <class AnyChunk>
void prefetch(const AnyChunk& chunk) {
  constexpr int64_t kBytes = 1024, kLine = 64;
  for (int64_t byte = 0; byte < std::min(kBytes, chunk.bytes()); byte += kLine) __builtin_prefetch(chunk.data() + byte);
}

enum class Walk { kForward, kBackward };

// Calls body(index of chunk) for every chunk, on torch's threads, each of which gets neighbours of about equal cost;
// returns what torch_parallel_for returns.
template <class Table, class Body>
AOTITorchError for_each_chunk(const Table& table, Walk walk, const Body& body) {
  struct Context {
    const Table& table;
    Walk walk;
    const Body& body;
  } context{table, walk, body};
  const auto run = [](int64_t cost_begin, int64_t cost_end, void* opaque) {
    const DefaultFloatMode mode;
    const Context& c = *static_cast<const Context*>(opaque);
    const auto index_at = [&c](int64_t cost) {
      const auto& chunks = c.table.chunks;
      const auto before = [](const auto& chunk, int64_t cost) { return chunk.cost_before < cost; };
      return std::lower_bound(chunks.begin(), chunks.end(), cost, before) - chunks.begin();
    };
    const auto first = index_at(cost_begin), last = index_at(cost_end);
    const auto& chunks = c.table.chunks;
    if (c.walk == Walk::kForward) {
      for (auto i = first; i < last; ++i) {
        if (i + 1 < last) prefetch(chunks[i + 1]);
        c.body(i);
      }
    } else {
      for (auto i = last; i-- > first;) {
        if (i > first) prefetch(chunks[i - 1]);
        c.body(i);
      }
    }
  };
  if (table.cost > kGrain) return torch_parallel_for(0, table.cost, kGrain, run, &context);
  run(0, table.cost, &context);
  return 0;
}

template <class T>
void copy_strided(char* memory, char* block, int64_t count, int64_t stride, bool to_block) {
  T* strided = reinterpret_cast<T*>(memory);
  T* packed = reinterpret_cast<T*>(block);
  if (to_block)
    for (int64_t i = 0; i < count; ++i) packed[i] = strided[i * stride];
  else
    for (int64_t i = 0; i < count; ++i) strided[i * stride] = packed[i];
}

// Copies elements [begin, begin + count) of a strided tensor, in the order of its memory, to or from a block.
inline void copy_elements(const TensorView& tensor, int64_t begin, int64_t count, char* block, bool to_block) {
  const int64_t size = element_size(tensor.dtype);
  const auto copy = size == 8 ? copy_strided<uint64_t> : size == 4 ? copy_strided<uint32_t> : copy_strided<uint16_t>;
  const std::vector<Dim>& dims = *tensor.dims;
  const Dim inner = dims.back();
  while (count > 0) {
    int64_t offset = 0, outer_index = begin / inner.size;
    const int64_t inner_index = begin % inner.size;
    for (size_t d = dims.size() - 1; d-- > 0; outer_index /= dims[d].size)
      offset += outer_index % dims[d].size * dims[d].stride;
    const int64_t run = std::min(count, inner.size - inner_index);
    copy(tensor.data + (offset + inner_index * inner.stride) * size, block, run, inner.stride, to_block);
    begin += run;
    count -= run;
    block += run * size;
  }
}

// Calls body(pointer, count) on runs of memory that hold elements [begin, begin + count) of a tensor; a body that
// returns true has written to its run.
template <class Body>
void for_each_run(const TensorView& tensor, int64_t begin, int64_t count, const Body& body) {
  if (tensor.dims == nullptr) {
    body(tensor.data + begin * element_size(tensor.dtype), count);
    return;
  }
  alignas(64) char block[kBlockSize * 8];
  for (int64_t done = 0; done < count; done += kBlockSize) {
    const int64_t size = std::min(kBlockSize, count - done);
    copy_elements(tensor, begin + done, size, block, true);
    if (body(block, size)) copy_elements(tensor, begin + done, size, block, false);
  }
}
template <class Body>
void for_each_run(const Chunk& chunk, const Body& body) {
  for_each_run(*chunk.tensor, chunk.begin, chunk.count, body);
}

inline void check_written(AOTITorchError error) {
  if (error != 0)
    throw std::runtime_error("fastclip: torch's torch_parallel_for failed: gradients may be partly written");
}

// combine(), without rounding the smaller sum away.
inline Partial combine_exactly(NormKind kind, Partial a, Partial b) {
  const double value = combine(kind, a.value, b.value);
  if (kind == NormKind::kMax || kind == NormKind::kMin) return {value};
  const double part = value - a.value;
  return {value, a.error + b.error + ((a.value - (value - part)) + (b.value - part))};
}

// The partial of what runs(body) calls its body with; of kPow, powers are in a unit.
template <class Runs>
Partial partial_of(const Runs& runs, Dtype dtype, NormKind kind, double norm_type, double unit) {
  const auto loop = loops().norm_partial[static_cast<int>(dtype)][static_cast<int>(kind)];
  Partial partial{identity(kind)};
  runs([&](const char* data, int64_t count) {
    const Partial run =
        kind == NormKind::kPow ? Partial{norm_pow(dtype, data, count, norm_type, unit)} : loop(data, count);
    // Runs of one tensor count once.
    partial = combine_exactly(kind == NormKind::kCount ? NormKind::kMax : kind, partial, run);
    return false;
  });
  return partial;
}

// The norm of kPow, whose powers may leave float64.
template <class Runs>
double power_norm_of(const Runs& runs, Dtype dtype, double norm_type) {
  const double unit = power_unit(partial_of(runs, dtype, unit_kind(norm_type), norm_type, 1.0).value);
  return root_in(unit, partial_of(runs, dtype, NormKind::kPow, norm_type, unit).rounded(), norm_type);
}

// The norm of a short tensor, or unit.
template <class Runs>
double norm_of(const Runs& runs, Dtype dtype, double norm_type) {
  const NormKind kind = norm_kind(norm_type);
  const double partial = partial_of(runs, dtype, kind, norm_type, 1.0).rounded();
  if (kind == NormKind::kPow && !is_well_in_float64(partial)) return power_norm_of(runs, dtype, norm_type);
  return root(kind, partial, norm_type);
}

// The partial of every chunk, in order; with `are_norms`, which is for kPow, the norm of every chunk.
inline std::vector<Partial> partials_of(const ChunkTable& table, double norm_type, bool are_norms) {
  std::vector<Partial> partials(table.chunks.size());
  const AOTITorchError error = for_each_chunk(table, Walk::kForward, [&](int64_t i) {
    const Dtype dtype = table.chunks[i].tensor->dtype;
    const auto runs = [&](const auto& run) { for_each_run(table.chunks[i], run); };
    partials[i] = are_norms ? Partial{power_norm_of(runs, dtype, norm_type)}
                            : partial_of(runs, dtype, norm_kind(norm_type), norm_type, 1.0);
  });
  check_torch(error, "torch_parallel_for");
  return partials;
}

// The norm of a list, of kPow, from the norms of its chunks [begin, end).
inline double combine_norms(const Partial* begin, const Partial* end, double norm_type) {
  double extreme = identity(unit_kind(norm_type)), sum = 0.0;
  for (const Partial* norm = begin; norm != end; ++norm) extreme = combine(unit_kind(norm_type), extreme, norm->value);
  const double unit = power_unit(extreme);
  for (const Partial* norm = begin; norm != end; ++norm) sum += std::pow(norm->value / unit, norm_type);
  return root_in(unit, sum, norm_type);
}

// Calls body(tensor, begin, end) for every tensor with the range of its chunks.
template <class Body>
void for_each_tensor(const ChunkTable& table, const Body& body) {
  const std::vector<Chunk>& chunks = table.chunks;
  for (size_t begin = 0, end; begin < chunks.size(); begin = end) {
    for (end = begin + 1; end < chunks.size() && chunks[end].place == chunks[begin].place;) ++end;
    body(chunks[begin].tensor, begin, end);
  }
}

// Whether x *= coef leaves every x as it is.
inline bool is_one(double coef, Dtype dtype) {
  return dtype == Dtype::kFloat64 ? coef == 1.0 : static_cast<float>(coef) == 1.0f;
}

// x *= coef, for a run of elements.
inline bool scale_run(Dtype dtype, char* data, int64_t count, double coef) {
  if (is_below_float32(coef))
    scale_wide(dtype, data, count, coef);
  else
    loops().scale[static_cast<int>(dtype)](data, count, coef);
  return true;
}

}  // namespace fastclip::cpu
