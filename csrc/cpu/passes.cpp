#include "passes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "chunks.h"
#include "half.h"

namespace fastclip::cpu {
namespace {

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
    check_written(error);
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

void scale(const std::vector<TensorView>& tensors, double coef, bool zero) {
  const DefaultFloatMode mode;
  if (zero && coef == 0)
    return write(nonempty(tensors), Walk::kBackward, [](char* data, int64_t count, const TensorView& tensor) {
      std::memset(data, 0, static_cast<size_t>(count * element_size(tensor.dtype)));
      return true;
    });
  TensorViews changed = nonempty(tensors);
  const auto stays = [coef](const TensorView* tensor) { return is_one(coef, tensor->dtype); };
  changed.erase(std::remove_if(changed.begin(), changed.end(), stays), changed.end());
  // Backwards, because what the norm read last is still in cache.
  write(changed, Walk::kBackward, [coef](char* data, int64_t count, const TensorView& tensor) {
    return scale_run(tensor.dtype, data, count, coef);
  });
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

}  // namespace fastclip::cpu
