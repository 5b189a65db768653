// The passes over each tensor, or unit, alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "chunks.h"
#include "half.h"
#include "passes.h"

namespace fastclip::cpu {
namespace {

// What a unit after the first of a chunk costs beside its elements, in bytes of memory traffic.
constexpr int64_t kUnitCost = 64;

// Units of a tensor, or a tensor, that are a chunk or less each, and about a chunk together.
struct ShortChunk {
  const TensorView* first;
  const Units* units;  // null for a tensor
  int64_t begin;       // of the units
  int64_t count;
  int64_t number;  // of the first of them, in the whole list
  int64_t cost_before;

  char* data(int64_t i = 0) const { return units == nullptr ? first->data : unit_data(*first, *units, begin + i); }
  int64_t bytes() const { return first->numel * element_size(first->dtype); }
};

// A list for a pass over each tensor, or unit, alone: the short ones in chunks, and the long ones, of several chunks
// each, by their numbers.
class Each {
 public:
  struct ShortTable {
    std::vector<ShortChunk> chunks;
    int64_t cost = 0;
  } shorts;
  TensorViews longs;
  std::vector<int64_t> numbers;

  explicit Each(const Tensors& tensors)
      : Each(tensors, all_of(tensors), [](const TensorView&, int64_t) { return true; }) {}

  // Of some tensors, in order, without the long ones that keep(view, number) leaves out.
  template <class Keep>
  Each(const Tensors& tensors, const std::vector<size_t>& places, const Keep& keep) {
    size_t num_longs = 0;
    for (const size_t k : places)
      if (is_long(tensors.views[k])) num_longs += static_cast<size_t>(tensors.count_of(k));
    shorts.chunks.reserve(places.size());
    units_.reserve(tensors.units.empty() ? 0 : num_longs);
    longs.reserve(num_longs);
    numbers.reserve(num_longs);
    int64_t number = 0;
    size_t next = 0;
    for (const size_t k : places) {
      for (; next < k; ++next) number += tensors.count_of(next);
      if (is_long(tensors.views[k]))
        add_longs(tensors, k, number, keep);
      else if (tensors.views[k].numel > 0)
        add_shorts(tensors, k, number);
    }
  }

 private:
  static bool is_long(const TensorView& tensor) { return tensor.numel > kChunkSize; }
  static std::vector<size_t> all_of(const Tensors& tensors) {
    std::vector<size_t> places(tensors.views.size());
    std::iota(places.begin(), places.end(), size_t{0});
    return places;
  }

  template <class Keep>
  void add_longs(const Tensors& tensors, size_t k, int64_t number, const Keep& keep) {
    const TensorView& first = tensors.views[k];
    for (int64_t i = 0; i < tensors.count_of(k); ++i) {
      if (!keep(first, number + i)) continue;
      if (!tensors.units.empty()) units_.push_back(unit_view(first, tensors.units[k], i));
      longs.push_back(tensors.units.empty() ? &first : &units_.back());
      numbers.push_back(number + i);
    }
  }

  void add_shorts(const Tensors& tensors, size_t k, int64_t number) {
    const TensorView& first = tensors.views[k];
    const int64_t all = tensors.count_of(k), at_once = kChunkSize / first.numel;
    for (int64_t begin = 0; begin < all; begin += at_once) {
      const int64_t count = std::min(at_once, all - begin);
      shorts.chunks.push_back({&first, tensors.units_of(k), begin, count, number + begin, shorts.cost});
      shorts.cost += kChunkCost + (count - 1) * kUnitCost + count * shorts.chunks.back().bytes();
    }
  }

  std::vector<TensorView> units_;
};

// Calls body(runs, number) for every unit of a chunk; runs(body) is for_each_run of its elements.
template <class Body>
void for_each_unit(const ShortChunk& chunk, const Body& body) {
  for (int64_t i = 0; i < chunk.count; ++i) {
    const auto runs = [&chunk, i](const auto& run) {
      if (chunk.units != nullptr)
        run(chunk.data(i), chunk.first->numel);
      else
        for_each_run(*chunk.first, 0, chunk.first->numel, run);
    };
    body(runs, chunk.number + i);
  }
}

// x *= coef_of(runs, dtype, i) for each short tensor, or unit, i, whose elements are in those runs.
template <class CoefOf>
void scale_shorts(const Each& each, const CoefOf& coef_of) {
  check_written(for_each_chunk(each.shorts, Walk::kForward, [&](int64_t i) {
    const ShortChunk& chunk = each.shorts.chunks[i];
    const Dtype dtype = chunk.first->dtype;
    for_each_unit(chunk, [&](const auto& runs, int64_t number) {
      const double coef = coef_of(runs, dtype, number);
      if (is_one(coef, dtype)) return;
      runs([&](char* data, int64_t count) { return scale_run(dtype, data, count, coef); });
    });
  }));
}

// x *= coef_of(place) for the long ones of a table. Backwards, because what a norm read last is still in cache.
template <class CoefOf>
void scale_longs(const ChunkTable& table, const CoefOf& coef_of) {
  check_written(for_each_chunk(table, Walk::kBackward, [&](int64_t i) {
    const Chunk& chunk = table.chunks[i];
    const Dtype dtype = chunk.tensor->dtype;
    const double coef = coef_of(chunk.place);
    for_each_run(chunk, [&](char* data, int64_t count) { return scale_run(dtype, data, count, coef); });
  }));
}

// norms[i] = the norm of each long one, by its number.
void find_long_norms(const Each& each, double norm_type, double* norms) {
  const NormKind kind = norm_kind(norm_type);
  const ChunkTable table(each.longs);
  const std::vector<Partial> partials = partials_of(table, norm_type, false);
  TensorViews lost;  // those of kPow whose powers may have left float64
  std::vector<int64_t> lost_numbers;
  for_each_tensor(table, [&](const TensorView* tensor, size_t begin, size_t end) {
    Partial sum{identity(kind)};
    for (size_t i = begin; i < end; ++i)
      sum = combine_exactly(kind == NormKind::kCount ? NormKind::kMax : kind, sum, partials[i]);
    const int64_t number = each.numbers[table.chunks[begin].place];
    norms[number] = root(kind, sum.rounded(), norm_type);
    if (kind != NormKind::kPow || is_well_in_float64(sum.rounded())) return;
    lost.push_back(tensor);
    lost_numbers.push_back(number);
  });
  if (lost.empty()) return;
  const ChunkTable again(lost);
  const std::vector<Partial> parts = partials_of(again, norm_type, true);
  for_each_tensor(again, [&](const TensorView*, size_t begin, size_t end) {
    norms[lost_numbers[again.chunks[begin].place]] = combine_norms(parts.data() + begin, parts.data() + end, norm_type);
  });
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

}  // namespace

void norms(const Tensors& tensors, double norm_type, double* norms) {
  const DefaultFloatMode mode;
  std::fill(norms, norms + tensors.count, 0.0);
  const Each each(tensors);
  const AOTITorchError error = for_each_chunk(each.shorts, Walk::kForward, [&](int64_t i) {
    const ShortChunk& chunk = each.shorts.chunks[i];
    for_each_unit(
        chunk, [&](const auto& runs, int64_t number) { norms[number] = norm_of(runs, chunk.first->dtype, norm_type); });
  });
  check_torch(error, "torch_parallel_for");
  find_long_norms(each, norm_type, norms);
}

void scale_each(const Tensors& tensors, const double* coefs) {
  const DefaultFloatMode mode;
  struct Round {
    Each each;
    ChunkTable longs;
  };
  const auto changes = [coefs](const TensorView& tensor, int64_t i) { return !is_one(coefs[i], tensor.dtype); };
  std::vector<Round> rounds;  // all memory is there before the first write
  for (const std::vector<size_t>& places : write_rounds(tensors)) {
    Each each(tensors, places, changes);
    ChunkTable longs(each.longs);
    rounds.push_back({std::move(each), std::move(longs)});
  }
  for (const Round& round : rounds) {
    scale_shorts(round.each, [coefs](const auto&, Dtype, int64_t number) { return coefs[number]; });
    scale_longs(round.longs, [&](size_t place) { return coefs[round.each.numbers[place]]; });
  }
}

void clip_each(const Tensors& tensors, double norm_type, const EachBound& bound, double* measures) {
  const DefaultFloatMode mode;
  const auto coef_of = [&](double norm, int64_t i) {
    measures[i] = bound.measure(norm, i);
    return bound.coef(measures[i], i);
  };
  if (write_rounds(tensors).size() > 1) {  // every norm is that before any write
    norms(tensors, norm_type, measures);
    std::vector<double> coefs(static_cast<size_t>(tensors.count));
    for (int64_t i = 0; i < tensors.count; ++i) coefs[static_cast<size_t>(i)] = coef_of(measures[i], i);
    return scale_each(tensors, coefs.data());
  }
  std::fill(measures, measures + tensors.count, 0.0);
  const Each each(tensors);
  find_long_norms(each, norm_type, measures);
  TensorViews changed;
  std::vector<double> coefs;
  for (size_t place = 0; place < each.longs.size(); ++place) {
    const double coef = coef_of(measures[each.numbers[place]], each.numbers[place]);
    if (is_one(coef, each.longs[place]->dtype)) continue;
    changed.push_back(each.longs[place]);
    coefs.push_back(coef);
  }
  const ChunkTable longs(changed);  // all memory is there before the first write
  scale_longs(longs, [&](size_t place) { return coefs[place]; });
  scale_shorts(each, [&](const auto& runs, Dtype dtype, int64_t number) {
    return coef_of(norm_of(runs, dtype, norm_type), number);
  });
}

bool clipped_sums(const Tensors& list, const std::vector<TensorView>& sums, double max_norm, bool per_layer,
                  double* norms) {
  // Examples at a time, a multiple of the rows that the loop adds at once: they are added up while in cache.
  constexpr size_t kCacheBytes = size_t{4} << 20, kRows = 4;
  const DefaultFloatMode mode;
  const std::vector<TensorView> examples = each_unit(list);
  bool are_ordinary = true;
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
        const double coef = each_coef(norm, max_norm, 0.0);
        are_ordinary &= !is_below_float32(coef);
        coefs[k * batch + i] = coef;
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
  return are_ordinary;
}

}  // namespace fastclip::cpu
