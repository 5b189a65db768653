// The launches: every pass is one kernel for up to 2,040 dense tensors of any dtypes, and one for each tensor with
// holes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "chunk_table.h"
#include "kernels.h"
#include "passes.h"
#include "runtime.h"

// What a grid may have; other values are for .ci/gpu sweep.
#ifndef FASTCLIP_MOST_BLOCKS
#define FASTCLIP_MOST_BLOCKS 0x7fffffff
#endif

namespace fastclip::cuda {
namespace {

constexpr int64_t kMostBlocks = FASTCLIP_MOST_BLOCKS;
// Partials up to which each block of a clip combines them for itself instead of a launch that does. The blocks come in
// waves of several hundred, each of which pays for it: little where float64 is fast.
constexpr int64_t kMostFolded = 2048, kMostFoldedSlowly = 256;
// Elements that a block writes of a tensor with holes.
constexpr int64_t kStridedPiece = 16 * kThreads;

// A row of kernels.def.
struct Row {
  const char* name;
  int value;     // of the template argument that is one, -1 where none is
  int capacity;  // of the table in the template's arguments, 0 where there is none

  constexpr bool operator==(const Row& other) const {
    const char *a = name, *b = other.name;
    while (*a != 0 && *a == *b) ++a, ++b;
    return *a == *b && value == other.value && capacity == other.capacity;
  }
};
constexpr Row row(const char* name) { return {name, -1, 0}; }
template <class AnyTable>
constexpr Row row(const char* name) {
  return {name, -1, AnyTable::kCapacity};
}
template <auto kValue>
constexpr Row row(const char* name) {
  return {name, static_cast<int>(kValue), 0};
}
template <auto kValue, class AnyTable>
constexpr Row row(const char* name) {
  return {name, static_cast<int>(kValue), AnyTable::kCapacity};
}
#define KERNEL(name) row(#name),
#define KERNEL_OF(name, ...) row<__VA_ARGS__>(#name),
constexpr Row kRows[] = {
#include "kernels.def"
};
#undef KERNEL
#undef KERNEL_OF

// A kernel by its place in kernels.def, and what it takes.
template <class Parameter>
struct Kernel {
  int place = 0;

  constexpr explicit Kernel(const Row& wanted) {
    while (!(kRows[place] == wanted)) ++place;  // does not compile where the row is missing
  }
};

template <NormPass kPass, class AnyTable>
constexpr Kernel<Arguments<NormArguments, AnyTable>> norm_kernel{row<kPass, AnyTable>("norm_kernel")};
constexpr Kernel<StridedNormArguments> strided_norm_kernel{row("strided_norm_kernel")};
template <Finish kFinish>
constexpr Kernel<FinishArguments> finish_kernel{row<kFinish>("finish_kernel")};
constexpr Kernel<FinishEachArguments> finish_each_kernel{row("finish_each_kernel")};
template <bool kWide, class AnyTable>
constexpr Kernel<Arguments<StatsArguments, AnyTable>> stats_kernel{row<kWide, AnyTable>("stats_kernel")};
constexpr Kernel<StridedStatsArguments> strided_stats_kernel{row("strided_stats_kernel")};
constexpr Kernel<FinishStatsArguments> finish_stats_kernel{row("finish_stats_kernel")};
template <class AnyTable>
constexpr Kernel<Arguments<ScaleArguments, AnyTable>> scale_kernel{row<AnyTable>("scale_kernel")};
template <class AnyTable>
constexpr Kernel<Arguments<const double*, AnyTable>> scale_each_kernel{row<AnyTable>("scale_each_kernel")};
template <class AnyTable>
constexpr Kernel<Arguments<FinishArguments, AnyTable>> clip_kernel{row<AnyTable>("clip_kernel")};
template <class AnyTable>
constexpr Kernel<Arguments<Bounds, AnyTable>> clamp_kernel{row<AnyTable>("clamp_kernel")};
template <class AnyTable>
constexpr Kernel<Arguments<SanitizeArguments, AnyTable>> sanitize_kernel{row<AnyTable>("sanitize_kernel")};
constexpr Kernel<StridedWriteArguments> strided_write_kernel{row("strided_write_kernel")};

template <class Parameter>
void launch(const char* name, Kernel<Parameter> kernel, int64_t blocks, int threads, Queue queue,
            const Parameter& arguments) {
  void* parameters[] = {const_cast<Parameter*>(&arguments)};  // which the driver copies
  launch_kernel(name, kernel.place, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), parameters, queue);
}

// Launches a block for each piece of work: the hardware deals them out as multiprocessors become free, whatever else
// runs there.
template <class Parameter>
void launch_blocks(const char* name, Kernel<Parameter> kernel, int64_t pieces, Queue queue,
                   const Parameter& arguments) {
  launch(name, kernel, std::min(pieces, kMostBlocks), kThreads, queue, arguments);
}

struct Layout {
  TensorViews dense, strided;

  explicit Layout(const TensorViews& tensors) {
    dense.reserve(tensors.size());
    for (const TensorView* tensor : tensors) (tensor->dims == nullptr ? dense : strided).push_back(tensor);
  }
};

enum class Walk { kForward, kBackward };

// Calls launch(arguments), whose table is filled, for each kernel that the dense tensors take.
template <class OwnArguments, class Launch>
void for_each_table(const TensorViews& dense, Walk walk, const Launch& launch) {
  constexpr size_t kCapacity = LongTable::kCapacity;
  const size_t tables = (dense.size() + kCapacity - 1) / kCapacity;
  for (size_t t = 0; t < tables; ++t) {
    const size_t first = (walk == Walk::kForward ? t : tables - 1 - t) * kCapacity;
    if (dense.size() - first <= ShortTable::kCapacity) {
      Arguments<OwnArguments, ShortTable> arguments;
      arguments.table.fill(dense, first);
      launch(arguments);
    } else {
      Arguments<OwnArguments, LongTable> arguments;
      arguments.table.fill(dense, first);
      launch(arguments);
    }
  }
}

template <class OwnArguments, class AnyTable>
void launch_norm(NormKind kind, bool are_norms, const Arguments<OwnArguments, AnyTable>& arguments, Queue queue) {
  const uint32_t chunks = arguments.table.chunks;
  switch (kind) {
    case NormKind::kSquares:
      if (has_fast_float64(queue))
        return launch_blocks("norm_kernel<wide squares>", norm_kernel<NormPass::kWideSquares, AnyTable>, chunks, queue,
                             arguments);
      return launch_blocks("norm_kernel<squares>", norm_kernel<NormPass::kSquares, AnyTable>, chunks, queue, arguments);
    case NormKind::kAbs:
      if (has_fast_float64(queue))
        return launch_blocks("norm_kernel<wide abs>", norm_kernel<NormPass::kWideAbs, AnyTable>, chunks, queue,
                             arguments);
      return launch_blocks("norm_kernel<abs>", norm_kernel<NormPass::kAbs, AnyTable>, chunks, queue, arguments);
    case NormKind::kPow:
      if (are_norms)
        return launch_blocks("norm_kernel<pow norm>", norm_kernel<NormPass::kPowNorm, AnyTable>, chunks, queue,
                             arguments);
      return launch_blocks("norm_kernel<pow>", norm_kernel<NormPass::kPow, AnyTable>, chunks, queue, arguments);
    default:
      return launch_blocks("norm_kernel<extreme>", norm_kernel<NormPass::kExtreme, AnyTable>, chunks, queue, arguments);
  }
}

// Calls body(tensors, index of the first) for each run of dense tensors that are neighbours in the list, and for each
// strided tensor by itself; `first` is the first tensor of the list.
template <class Body>
void for_each_neighbours(const TensorViews& tensors, const TensorView* first, const Body& body) {
  for (size_t begin = 0, end; begin < tensors.size(); begin = end) {
    end = begin + 1;
    if (tensors[begin]->dims == nullptr)
      while (end < tensors.size() && tensors[end]->dims == nullptr && tensors[end] == tensors[end - 1] + 1) ++end;
    body(TensorViews(tensors.begin() + begin, tensors.begin() + end), tensors[begin] - first);
  }
}

// Fills the partials, which for kPow with `are_norms` are the norms of chunks; returns their number.
int64_t launch_norms(const Layout& layout, double norm_type, bool are_norms, double* partials, Queue queue) {
  const NormKind kind = norm_kind(norm_type);
  if (kind == NormKind::kCount) {
    const size_t bytes = (layout.dense.size() + layout.strided.size()) * sizeof(double);
    set_zero(partials, bytes, queue);
  }
  double* next = partials;
  for_each_table<NormArguments>(layout.dense, Walk::kForward, [&](auto& arguments) {
    arguments.own = {next, norm_type};
    launch_norm(kind, are_norms, arguments, queue);
    next += kind == NormKind::kCount ? arguments.table.tensors : arguments.table.chunks;
  });
  for (const TensorView* tensor : layout.strided) {
    const StridedNormArguments arguments{{next, norm_type}, kind, are_norms, StridedTable(*tensor)};
    const int64_t chunks = chunks_of(arguments.table);
    launch_blocks("strided_norm_kernel", strided_norm_kernel, chunks, queue, arguments);
    next += kind == NormKind::kCount ? 1 : chunks;
  }
  return next - partials;
}

// What is asked where nothing is clipped.
Clip of_order(double norm_type) { return {0, norm_type, Nonfinite::kPropagate, {}, {}}; }

void launch_finish(const FinishArguments& arguments, bool are_norms, Queue queue) {
  const auto kernel = are_norms ? finish_kernel<Finish::kCombineNorms> : finish_kernel<Finish::kRoot>;
  launch("finish_kernel", kernel, 1, kFinishThreads, queue, arguments);
}

ScaleArguments scaled_by(Number coef, bool zero) { return {coef.data, 0, coef.dtype, false, zero}; }

// The launches that write tensors, in rounds.
class Writes {
 public:
  explicit Writes(const TensorViews& tensors) {
    for (const TensorViews& round : write_rounds(tensors)) rounds_.emplace_back(round);
  }

  // Whether one launch writes it all.
  bool are_one_launch() const {
    if (rounds_.size() != 1 || !rounds_[0].strided.empty()) return false;
    const size_t tensors = rounds_[0].dense.size();
    return tensors > 0 && tensors <= LongTable::kCapacity;
  }

  void clip(const FinishArguments& finish, Queue queue) {
    for_each_table<FinishArguments>(rounds_[0].dense, Walk::kBackward, [&](auto& arguments) {
      using AnyTable = decltype(arguments.table);
      arguments.own = finish;
      launch_write("clip_kernel", clip_kernel<AnyTable>, arguments.table.chunks, queue, arguments);
    });
  }

  void scale(ScaleArguments scale, Queue queue) {
    for (const Layout& round : rounds_) {
      write_strided(round.strided, Write::kScale, scale, {}, queue);
      // Backwards: what the norm read last is still in L2.
      for_each_table<ScaleArguments>(round.dense, Walk::kBackward, [&](auto& arguments) {
        using AnyTable = decltype(arguments.table);
        arguments.own = scale;
        launch_write("scale_kernel", scale_kernel<AnyTable>, arguments.table.chunks, queue, arguments);
      });
    }
  }

  // coefs[i] for tensor i of the list, whose first is `first`.
  void scale_each(const TensorView* first, const double* coefs, Queue queue) {
    for (const Layout& round : rounds_) {
      for_each_neighbours(round.strided, first, [&](const TensorViews& tensor, int64_t index) {
        write_strided(tensor, Write::kScale, scaled_by({const_cast<double*>(coefs + index)}, false), {}, queue);
      });
      for_each_neighbours(round.dense, first, [&](const TensorViews& tensors, int64_t index) {
        const double* next = coefs + index;
        for_each_table<const double*>(tensors, Walk::kForward, [&](auto& arguments) {
          using AnyTable = decltype(arguments.table);
          arguments.own = next;
          launch_write("scale_each_kernel", scale_each_kernel<AnyTable>, arguments.table.chunks, queue, arguments);
          next += arguments.table.tensors;
        });
      });
    }
  }

  void clamp(Bounds bounds, Queue queue) {
    for (const Layout& round : rounds_) {
      write_strided(round.strided, Write::kClamp, {}, bounds, queue);
      for_each_table<Bounds>(round.dense, Walk::kForward, [&](auto& arguments) {
        using AnyTable = decltype(arguments.table);
        arguments.own = bounds;
        launch_write("clamp_kernel", clamp_kernel<AnyTable>, arguments.table.chunks, queue, arguments);
      });
    }
  }

  void sanitize(Queue queue) {
    for (const Layout& round : rounds_) {
      write_strided(round.strided, Write::kSanitize, {}, {}, queue);
      for_each_table<SanitizeArguments>(round.dense, Walk::kForward, [&](auto& arguments) {
        using AnyTable = decltype(arguments.table);
        launch_write("sanitize_kernel", sanitize_kernel<AnyTable>, arguments.table.chunks, queue, arguments);
      });
    }
  }

 private:
  void write_strided(const TensorViews& strided, Write write, ScaleArguments scale, Bounds bounds, Queue queue) {
    for (const TensorView* tensor : strided) {
      const StridedWriteArguments arguments{write, scale, bounds, StridedTable(*tensor)};
      const int64_t blocks = (tensor->numel + kStridedPiece - 1) / kStridedPiece;
      launch_write("strided_write_kernel", strided_write_kernel, blocks, queue, arguments);
    }
  }

  template <class... Given>
  void launch_write(const Given&... given) {
    try {
      launch_blocks(given...);
    } catch (const std::runtime_error& error) {
      if (queued_ == 0) throw;
      throw std::runtime_error(error.what() + std::string("; ") + std::to_string(queued_) +
                               " launches before it write, so gradients may be partly written");
    }
    ++queued_;
  }

  std::vector<Layout> rounds_;
  int64_t queued_ = 0;
};

}  // namespace

int64_t scratch_size(const std::vector<TensorView>& tensors) {
  int64_t size = 1;  // the coefficient
  for (const TensorView& tensor : tensors) size += (tensor.numel + kChunkSize - 1) / kChunkSize;
  return size;
}

void norm_partial(const std::vector<TensorView>& tensors, double norm_type, double* scratch, double* result,
                  Queue queue) {
  double* const partials = scratch + 1;
  const int64_t slots = launch_norms(Layout(nonempty(tensors)), norm_type, false, partials, queue);
  const FinishArguments arguments{partials, slots, of_order(norm_type), {result}, nullptr, norm_kind(norm_type)};
  launch("finish_kernel", finish_kernel<Finish::kPartial>, 1, kFinishThreads, queue, arguments);
}

void total_norm(const std::vector<TensorView>& tensors, double norm_type, double* scratch, void* norm, Dtype dtype,
                Queue queue) {
  const TensorViews views = nonempty(tensors);
  const bool are_norms = powers_may_leave_float64(views, norm_type);
  const int64_t slots = launch_norms(Layout(views), norm_type, are_norms, scratch + 1, queue);
  launch_finish({scratch + 1, slots, of_order(norm_type), {norm, dtype}, nullptr, norm_kind(norm_type)}, are_norms,
                queue);
}

void norms(const std::vector<TensorView>& tensors, double norm_type, double* scratch, double* norms, Queue queue) {
  const TensorViews views = nonempty(tensors);
  const NormKind kind = norm_kind(norm_type);
  const bool are_norms = powers_may_leave_float64(views, norm_type);
  if (views.size() < tensors.size())  // of no elements the norm is 0
    set_zero(norms, tensors.size() * sizeof(double), queue);
  const auto slots_of = [kind](const TensorView& tensor) {
    return kind == NormKind::kCount ? 1 : static_cast<uint32_t>((tensor.numel + kChunkSize - 1) / kChunkSize);
  };
  double* partials = scratch + 1;
  for_each_neighbours(views, tensors.data(), [&](const TensorViews& neighbours, int64_t index) {
    const int64_t slots = launch_norms(Layout(neighbours), norm_type, are_norms, partials, queue);
    FinishEachArguments arguments{partials, norms + index, norm_type, 0, kind, are_norms, {}};
    for (size_t i = 0; i < neighbours.size();) {
      uint32_t& count = arguments.tensors;
      uint32_t end = 0;
      for (count = 0; i < neighbours.size() && count < LongTable::kCapacity; ++i)
        arguments.ends[count++] = end += slots_of(*neighbours[i]);
      constexpr int kWarps = kThreads / kWarp;
      launch_blocks("finish_each_kernel", finish_each_kernel, (count + kWarps - 1) / kWarps, queue, arguments);
      arguments.partials += end;
      arguments.norms += count;
    }
    partials += slots;
  });
}

void stats(const std::vector<TensorView>& tensors, double* scratch, double* table, Number partial, Queue queue) {
  const TensorViews views = nonempty(tensors);
  if (views.size() < tensors.size()) set_zero(table, 4 * tensors.size() * sizeof(double), queue);
  const Layout layout(views);
  // In the order of norm_partial, whose bits the sum has.
  StatsArguments next{scratch + 1, scratch + scratch_size(tensors)};
  const StatsArguments all = next;
  const auto advance = [&next](int64_t chunks) {
    next.squares += chunks;
    next.more += 3 * chunks;
  };
  for_each_table<StatsArguments>(layout.dense, Walk::kForward, [&](auto& arguments) {
    using AnyTable = decltype(arguments.table);
    arguments.own = next;
    const auto kernel = has_fast_float64(queue) ? stats_kernel<true, AnyTable> : stats_kernel<false, AnyTable>;
    launch_blocks("stats_kernel", kernel, arguments.table.chunks, queue, arguments);
    advance(arguments.table.chunks);
  });
  for (const TensorView* tensor : layout.strided) {
    const StridedStatsArguments arguments{next, StridedTable(*tensor)};
    launch_blocks("strided_stats_kernel", strided_stats_kernel, chunks_of(arguments.table), queue, arguments);
    advance(chunks_of(arguments.table));
  }
  const FinishArguments finish{all.squares, next.squares - all.squares, of_order(2), partial,
                               nullptr,     NormKind::kSquares};
  launch("finish_kernel", finish_kernel<Finish::kPartial>, 1, kFinishThreads, queue, finish);
  TensorViews order;  // inserted: a copied vector takes a symbol of libstdc++ that is newer than the wheels'
  for (const TensorViews* list : {&layout.dense, &layout.strided})
    order.insert(order.end(), list->begin(), list->end());
  FinishStatsArguments rows{all, table, 0, {}, {}};
  for (size_t i = 0; i < order.size();) {
    uint32_t& count = rows.tensors;
    uint32_t end = 0;
    for (count = 0; i < order.size() && count < LongTable::kCapacity; ++i, ++count) {
      end += static_cast<uint32_t>((order[i]->numel + kChunkSize - 1) / kChunkSize);
      rows.ends[count] = end;
      rows.places[count] = static_cast<uint32_t>(order[i] - tensors.data());
    }
    constexpr int kWarps = kThreads / kWarp;
    launch_blocks("finish_stats_kernel", finish_stats_kernel, (count + kWarps - 1) / kWarps, queue, rows);
    rows.own.squares += end;
    rows.own.more += int64_t{3} * end;
  }
}

void scale_each(const std::vector<TensorView>& tensors, const double* coefs, Queue queue) {
  Writes(nonempty(tensors)).scale_each(tensors.data(), coefs, queue);
}

void scale(const std::vector<TensorView>& tensors, Number coef, bool zero, Queue queue) {
  Writes(nonempty(tensors)).scale(scaled_by(coef, zero), queue);
}

void sanitize(const std::vector<TensorView>& tensors, Queue queue) { Writes(nonempty(tensors)).sanitize(queue); }

void clamp(const std::vector<TensorView>& tensors, double lo, double hi, Queue queue) {
  Writes writes(nonempty(tensors));
  if (lo == lo && hi == hi) return writes.clamp({lo, hi}, queue);
  writes.scale({nullptr, NAN, Dtype::kFloat64, false, false}, queue);
}

void clip_with_norm(const std::vector<TensorView>& tensors, double max_norm, Number norm, Queue queue) {
  Writes(nonempty(tensors)).scale({norm.data, max_norm, norm.dtype, true, false}, queue);
}

void clip_grad_norm(const std::vector<TensorView>& tensors, const Clip& clip, double* scratch, Number norm,
                    Queue queue) {
  const TensorViews views = nonempty(tensors);
  Writes writes(views);
  if (clip.nonfinite == Nonfinite::kSanitize) writes.sanitize(queue);
  const bool are_norms = powers_may_leave_float64(views, clip.norm_type);
  const int64_t slots = launch_norms(Layout(views), clip.norm_type, are_norms, scratch + 1, queue);
  const FinishArguments finish{scratch + 1, slots, clip, norm, scratch, norm_kind(clip.norm_type)};
  if (!are_norms && writes.are_one_launch() && slots <= (has_fast_float64(queue) ? kMostFolded : kMostFoldedSlowly))
    return writes.clip(finish, queue);
  launch_finish(finish, are_norms, queue);
  writes.scale(scaled_by({scratch}, clip.nonfinite == Nonfinite::kZero), queue);
}

}  // namespace fastclip::cuda
