#include "passes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../abi.h"
#include "../op_arguments.h"
#include "float_mode.h"
#include "half.h"
#include "loops.h"

namespace fastclip::cpu {
namespace {

// Elements gathered at a time from a tensor that is not one run of memory: 16 KiB of float64, half of an L1 cache.
constexpr int64_t kBlockSize = 2048;
// What a chunk costs beside its elements, in bytes of memory traffic; and the least work worth a thread.
constexpr int64_t kChunkCost = 256;
constexpr int64_t kGrain = 512 * 1024;

struct Chunk {
  const TensorView* tensor;
  int64_t begin;
  int64_t count;
  int64_t cost_before;  // of all chunks before this one
};

struct ChunkTable {
  std::vector<Chunk> chunks;
  int64_t cost = 0;

  // Chunks of so many elements, each of which is passed over so many times.
  explicit ChunkTable(const TensorViews& tensors, int64_t chunk_size = kChunkSize, int64_t times = 1) {
    size_t size = 0;
    for (const TensorView* tensor : tensors) size += static_cast<size_t>((tensor->numel + chunk_size - 1) / chunk_size);
    chunks.reserve(size);
    for (const TensorView* tensor : tensors) {
      for (int64_t begin = 0; begin < tensor->numel; begin += chunk_size) {
        const int64_t count = std::min(chunk_size, tensor->numel - begin);
        chunks.push_back({tensor, begin, count, cost});
        cost += kChunkCost + count * element_size(tensor->dtype) * times;
      }
    }
  }
};

// The next tensor is somewhere else in memory, where no hardware prefetch looks: asks for its first lines.
void prefetch(const Chunk& chunk) {
  constexpr int64_t kBytes = 1024, kLine = 64;
  const int64_t size = element_size(chunk.tensor->dtype);
  const char* data = chunk.tensor->data + chunk.begin * size;
  for (int64_t byte = 0; byte < std::min(kBytes, chunk.count * size); byte += kLine) __builtin_prefetch(data + byte);
}

enum class Walk { kForward, kBackward };

// Calls body(index of chunk) for every chunk, on torch's threads, each of which gets neighbours of about equal cost;
// returns what torch_parallel_for returns.
template <class Body>
AOTITorchError for_each_chunk(const ChunkTable& table, Walk walk, const Body& body) {
  struct Context {
    const ChunkTable& table;
    Walk walk;
    const Body& body;
  } context{table, walk, body};
  const auto run = [](int64_t cost_begin, int64_t cost_end, void* opaque) {
    const DefaultFloatMode mode;
    const Context& c = *static_cast<const Context*>(opaque);
    const auto index_at = [&c](int64_t cost) {
      const auto& chunks = c.table.chunks;
      const auto before = [](const Chunk& chunk, int64_t cost) { return chunk.cost_before < cost; };
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
void copy_elements(const TensorView& tensor, int64_t begin, int64_t count, char* block, bool to_block) {
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

// Calls body(pointer, count) on runs of memory that hold the chunk; a body that returns true has written to its run.
template <class Body>
void for_each_run(const Chunk& chunk, const Body& body) {
  const TensorView& tensor = *chunk.tensor;
  if (tensor.dims == nullptr) {
    body(tensor.data + chunk.begin * element_size(tensor.dtype), chunk.count);
    return;
  }
  alignas(64) char block[kBlockSize * 8];
  for (int64_t done = 0; done < chunk.count; done += kBlockSize) {
    const int64_t count = std::min(kBlockSize, chunk.count - done);
    copy_elements(tensor, chunk.begin + done, count, block, true);
    if (body(block, count)) copy_elements(tensor, chunk.begin + done, count, block, false);
  }
}

// Calls body(pointer, count, tensor) on the runs of all tensors. All memory is there before the first write.
template <class Body>
void write(const TensorViews& tensors, Walk walk, const Body& body) {
  const std::vector<TensorViews> rounds = write_rounds(tensors);
  const std::vector<ChunkTable> tables(rounds.begin(), rounds.end());
  for (const ChunkTable& table : tables) {
    const AOTITorchError error = for_each_chunk(table, walk, [&](int64_t i) {
      const TensorView& tensor = *table.chunks[i].tensor;
      for_each_run(table.chunks[i], [&](char* data, int64_t count) { return body(data, count, tensor); });
    });
    if (error != 0)
      throw std::runtime_error("fastclip: torch's torch_parallel_for failed: gradients may be partly written");
  }
}

double round_to(Dtype dtype, double bound) {
  bfloat16 b16;
  float16 f16;
  switch (dtype) {
    case Dtype::kFloat64:
      return bound;
    case Dtype::kFloat32:
      return static_cast<float>(bound);
    case Dtype::kBFloat16:
      from_float(static_cast<float>(bound), &b16);
      return to_float(b16);
    case Dtype::kFloat16:
      from_float(static_cast<float>(bound), &f16);
      return to_float(f16);
  }
  return bound;
}

void round_all(Dtype dtype, const float* from, void* to, int64_t count) {
  const auto round_into = [&](auto* out) {
    for (int64_t i = 0; i < count; ++i) from_float(from[i], out + i);
  };
  if (dtype == Dtype::kBFloat16)
    round_into(static_cast<bfloat16*>(to));
  else
    round_into(static_cast<float16*>(to));
}

// combine(), without rounding the smaller sum away.
Partial combine_exactly(NormKind kind, Partial a, Partial b) {
  const double value = combine(kind, a.value, b.value);
  if (kind == NormKind::kMax || kind == NormKind::kMin) return {value};
  const double part = value - a.value;
  return {value, a.error + b.error + ((a.value - (value - part)) + (b.value - part))};
}

// The partial of every chunk, in order; with `are_norms`, which is for kPow, the norm of every chunk.
std::vector<Partial> partials_of(const ChunkTable& table, double norm_type, bool are_norms) {
  std::vector<Partial> partials(table.chunks.size());
  const Loops& isa = loops();
  const AOTITorchError error = for_each_chunk(table, Walk::kForward, [&](int64_t i) {
    const Dtype dtype = table.chunks[i].tensor->dtype;
    const auto reduce = [&](NormKind kind, double unit) {
      const auto partial_of = isa.norm_partial[static_cast<int>(dtype)][static_cast<int>(kind)];
      Partial partial{identity(kind)};
      for_each_run(table.chunks[i], [&](const char* data, int64_t count) {
        const Partial run =
            kind == NormKind::kPow ? Partial{norm_pow(dtype, data, count, norm_type, unit)} : partial_of(data, count);
        // Runs of one tensor count once.
        partial = combine_exactly(kind == NormKind::kCount ? NormKind::kMax : kind, partial, run);
        return false;
      });
      return partial;
    };
    const double unit = are_norms ? power_unit(reduce(unit_kind(norm_type), 1.0).value) : 1.0;
    const Partial partial = reduce(norm_kind(norm_type), unit);
    partials[i] = are_norms ? Partial{root_in(unit, partial.rounded(), norm_type)} : partial;
  });
  check_torch(error, "torch_parallel_for");
  return partials;
}

// The norm of a list, of kPow, from the norms of its chunks [begin, end).
double combine_norms(const Partial* begin, const Partial* end, double norm_type) {
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
    for (end = begin + 1; end < chunks.size() && chunks[end].tensor == chunks[begin].tensor;) ++end;
    body(chunks[begin].tensor, begin, end);
  }
}

}  // namespace

double norm_partial(const std::vector<TensorView>& tensors, double norm_type) {
  const DefaultFloatMode mode;
  const NormKind kind = norm_kind(norm_type);
  const ChunkTable table(nonempty(tensors));
  const std::vector<Partial> partials = partials_of(table, norm_type, false);
  Partial total{identity(kind)};
  const auto add = [&](Partial partial) { total = combine_exactly(kind, total, partial); };
  if (kind != NormKind::kCount) {
    for (const Partial& partial : partials) add(partial);
    return total.rounded();
  }
  for_each_tensor(table, [&](const TensorView*, size_t begin, size_t end) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) any |= partials[i].value != 0;
    add({any ? 1.0 : 0.0});
  });
  return total.rounded();
}

double total_norm(const std::vector<TensorView>& tensors, double norm_type) {
  const DefaultFloatMode mode;
  const TensorViews views = nonempty(tensors);
  if (views.empty()) return 0.0;
  const NormKind kind = norm_kind(norm_type);
  const double partial = norm_partial(tensors, norm_type);
  if (kind != NormKind::kPow || is_well_in_float64(partial)) return root(kind, partial, norm_type);
  const std::vector<Partial> norms = partials_of(ChunkTable(views), norm_type, true);
  return combine_norms(norms.data(), norms.data() + norms.size(), norm_type);
}

void norms(const std::vector<TensorView>& tensors, double norm_type, double* norms) {
  const DefaultFloatMode mode;
  const NormKind kind = norm_kind(norm_type);
  std::fill(norms, norms + tensors.size(), 0.0);
  const ChunkTable table(nonempty(tensors));
  const std::vector<Partial> partials = partials_of(table, norm_type, false);
  TensorViews lost;  // those of kPow whose powers may have left float64
  for_each_tensor(table, [&](const TensorView* tensor, size_t begin, size_t end) {
    Partial sum{identity(kind)};
    for (size_t i = begin; i < end; ++i)
      sum = combine_exactly(kind == NormKind::kCount ? NormKind::kMax : kind, sum, partials[i]);
    norms[tensor - tensors.data()] = root(kind, sum.rounded(), norm_type);
    if (kind == NormKind::kPow && !is_well_in_float64(sum.rounded())) lost.push_back(tensor);
  });
  if (lost.empty()) return;
  const ChunkTable again(lost);
  const std::vector<Partial> parts = partials_of(again, norm_type, true);
  for_each_tensor(again, [&](const TensorView* tensor, size_t begin, size_t end) {
    norms[tensor - tensors.data()] = combine_norms(parts.data() + begin, parts.data() + end, norm_type);
  });
}

double stats(const std::vector<TensorView>& tensors, double* table) {
  const DefaultFloatMode mode;
  std::fill(table, table + 4 * tensors.size(), 0.0);
  const ChunkTable chunks(nonempty(tensors));
  std::vector<Stats> found(chunks.chunks.size());
  const Loops& isa = loops();
  const auto add = [](Stats* sum, const Stats& part) {
    sum->squares = combine_exactly(NormKind::kSquares, sum->squares, part.squares);
    sum->largest = max_nan(sum->largest, part.largest);
    sum->nonfinite += part.nonfinite;
    sum->zeros += part.zeros;
  };
  const AOTITorchError error = for_each_chunk(chunks, Walk::kForward, [&](int64_t i) {
    const Chunk& chunk = chunks.chunks[i];
    for_each_run(chunk, [&](const char* data, int64_t count) {
      add(&found[i], isa.stats[static_cast<int>(chunk.tensor->dtype)](data, count));
      return false;
    });
  });
  check_torch(error, "torch_parallel_for");
  Stats all;
  for (const Stats& each : found) add(&all, each);
  for_each_tensor(chunks, [&](const TensorView* tensor, size_t begin, size_t end) {
    Stats sum;
    for (size_t i = begin; i < end; ++i) add(&sum, found[i]);
    double* const row = table + 4 * (tensor - tensors.data());
    row[0] = sum.squares.rounded();
    row[1] = sum.largest;
    row[2] = static_cast<double>(sum.nonfinite);
    row[3] = static_cast<double>(sum.zeros);
  });
  return all.squares.rounded();
}

namespace {

// x *= coef_of(tensor).
template <class CoefOf>
void scale_by(const std::vector<TensorView>& tensors, const CoefOf& coef_of) {
  const DefaultFloatMode mode;
  TensorViews changed = nonempty(tensors);
  const auto stays = [&coef_of](const TensorView* tensor) {
    const double coef = coef_of(*tensor);
    return tensor->dtype == Dtype::kFloat64 ? coef == 1.0 : static_cast<float>(coef) == 1.0f;
  };
  changed.erase(std::remove_if(changed.begin(), changed.end(), stays), changed.end());
  const Loops& isa = loops();
  // Backwards, because what the norm read last is still in cache.
  write(changed, Walk::kBackward, [&](char* data, int64_t count, const TensorView& tensor) {
    const double coef = coef_of(tensor);
    if (is_below_float32(coef))
      scale_wide(tensor.dtype, data, count, coef);
    else
      isa.scale[static_cast<int>(tensor.dtype)](data, count, coef);
    return true;
  });
}

}  // namespace

void scale(const std::vector<TensorView>& tensors, double coef, bool zero) {
  if (!zero || coef != 0) return scale_by(tensors, [coef](const TensorView&) { return coef; });
  write(nonempty(tensors), Walk::kBackward, [](char* data, int64_t count, const TensorView& tensor) {
    std::memset(data, 0, static_cast<size_t>(count * element_size(tensor.dtype)));
    return true;
  });
}

void scale_each(const std::vector<TensorView>& tensors, const double* coefs) {
  scale_by(tensors, [&tensors, coefs](const TensorView& tensor) { return coefs[&tensor - tensors.data()]; });
}

void sanitize(const std::vector<TensorView>& tensors) {
  write(nonempty(tensors), Walk::kForward,
        [](char* data, int64_t count, const TensorView& tensor) { return sanitize(tensor.dtype, data, count); });
}

void clamp(const std::vector<TensorView>& tensors, double lo, double hi) {
  const DefaultFloatMode mode;
  if (lo != lo || hi != hi) return scale(tensors, std::numeric_limits<double>::quiet_NaN(), false);
  double los[kNumDtypes], his[kNumDtypes];
  for (int d = 0; d < kNumDtypes; ++d) {
    los[d] = round_to(static_cast<Dtype>(d), lo);
    his[d] = round_to(static_cast<Dtype>(d), hi);
  }
  const Loops& isa = loops();
  write(nonempty(tensors), Walk::kForward, [&](char* data, int64_t count, const TensorView& tensor) {
    const int d = static_cast<int>(tensor.dtype);
    return isa.clamp[d](data, count, los[d], his[d]);
  });
}

void clipped_sums(const std::vector<TensorView>& examples, const std::vector<TensorView>& sums, double max_norm,
                  bool per_layer, double* norms) {
  // Examples at a time, a multiple of the rows that the loop adds at once: they are added up while in cache.
  constexpr size_t kCacheBytes = size_t{4} << 20, kRows = 4;
  const DefaultFloatMode mode;
  const size_t batch = examples.size() / sums.size();
  size_t example_bytes = 1, num_halves = 0;
  std::vector<size_t> first_half;  // where the float32 sums of a tensor of 16 bits begin
  for (const TensorView& sum : sums) {
    // Of no elements there may be no memory, which memset does not take.
    if (sum.numel > 0) std::memset(sum.data, 0, static_cast<size_t>(sum.numel * element_size(sum.dtype)));
    example_bytes += static_cast<size_t>(sum.numel * element_size(sum.dtype));
    first_half.push_back(num_halves);
    if (element_size(sum.dtype) == 2) num_halves += static_cast<size_t>(sum.numel);
  }
  std::vector<float> halves(num_halves);
  const size_t at_once = std::max(kCacheBytes / example_bytes / kRows, size_t{1}) * kRows;
  const ChunkTable columns(nonempty(sums), 4096, static_cast<int64_t>(at_once));
  std::vector<Partial> squares(examples.size());
  std::vector<double> coefs(examples.size());
  const Loops& isa = loops();
  for (size_t first = 0; first < batch; first += at_once) {
    const size_t last = std::min(first + at_once, batch);
    TensorViews block;
    for (size_t k = 0; k < sums.size(); ++k)
      for (size_t i = first; i < last; ++i) block.push_back(&examples[k * batch + i]);
    const ChunkTable table(block);
    const std::vector<Partial> partials = partials_of(table, 2.0, false);
    for_each_tensor(table, [&](const TensorView* example, size_t begin, size_t end) {
      Partial& sum = squares[static_cast<size_t>(example - examples.data())];
      for (size_t c = begin; c < end; ++c) sum = combine_exactly(NormKind::kSquares, sum, partials[c]);
    });
    for (size_t i = first; i < last; ++i) {
      Partial all{};
      for (size_t k = 0; k < sums.size(); ++k) all = combine_exactly(NormKind::kSquares, all, squares[k * batch + i]);
      for (size_t k = 0; k < sums.size(); ++k) {
        const double norm = std::sqrt((per_layer ? squares[k * batch + i] : all).rounded());
        norms[per_layer ? k * batch + i : i] = norm;
        coefs[k * batch + i] = norm <= max_norm ? 1.0 : max_norm / norm;
      }
    }
    const AOTITorchError error = for_each_chunk(columns, Walk::kForward, [&](int64_t c) {
      const Chunk& chunk = columns.chunks[c];
      const size_t k = static_cast<size_t>(chunk.tensor - sums.data());
      const int64_t size = element_size(chunk.tensor->dtype);
      char* const out = chunk.tensor->data + chunk.begin * size;
      float* const wide = size == 2 ? halves.data() + first_half[k] + chunk.begin : nullptr;
      for (size_t i = first; i < last; i += kRows) {
        const void* rows[kRows];
        const size_t count = std::min(kRows, last - i);
        for (size_t r = 0; r < count; ++r) rows[r] = examples[k * batch + i + r].data + chunk.begin * size;
        isa.add_scaled[static_cast<int>(chunk.tensor->dtype)](wide != nullptr ? static_cast<void*>(wide) : out, rows,
                                                              &coefs[k * batch + i], static_cast<int64_t>(count),
                                                              chunk.count);
      }
      if (wide != nullptr && last == batch) round_all(chunk.tensor->dtype, wide, out, chunk.count);
    });
    check_torch(error, "torch_parallel_for");
  }
}

}  // namespace fastclip::cpu
