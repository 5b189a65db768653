// The tables of csrc/cuda on paper: no memory is touched, so that tensors can be larger than any machine's.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/chunk_table.h"

namespace {

using namespace fastclip;
using namespace fastclip::cuda;

void check(bool holds, const char* what, uint64_t number) {
  if (holds) return;
  std::fprintf(stderr, "%s: %llu\n", what, static_cast<unsigned long long>(number));
  std::exit(1);
}

char* address(uint64_t bytes) { return reinterpret_cast<char*>(uint64_t{1} << 46) + bytes; }

// Every chunk is found in its tensor, the last one with what is left; large tensors are looked at around powers of two.
template <int kSize>
void table(const std::vector<std::pair<int64_t, Dtype>>& sizes) {
  std::vector<TensorView> views;
  for (const auto& [numel, dtype] : sizes) views.push_back({address(views.size() << 40), numel, nullptr, dtype});
  TensorViews dense;
  for (const TensorView& view : views) dense.push_back(&view);
  const auto filled = std::make_unique<Table<kSize>>();
  for (size_t first = 0; first < dense.size();) {
    const size_t end = filled->fill(dense, first);
    check(end - first == std::min<size_t>(kSize, dense.size() - first), "tensors that fit", end - first);
    uint64_t before = 0;
    for (size_t t = first; t < end; ++t) {
      const uint64_t numel = static_cast<uint64_t>(views[t].numel), chunks = (numel + kChunkSize - 1) / kChunkSize;
      std::vector<uint64_t> looked_at{0, chunks - 1, chunks / 2};
      for (uint64_t power = 1; power < chunks; power *= 2) looked_at.insert(looked_at.end(), {power - 1, power});
      for (const uint64_t c : looked_at) {
        const Chunk chunk = find_chunk(*filled, static_cast<uint32_t>(before + c));
        const uint64_t bytes = c * kChunkSize * static_cast<uint64_t>(element_size(views[t].dtype));
        check(chunk.tensor == t - first && chunk.dtype == views[t].dtype, "tensor of chunk", before + c);
        check(chunk.data == views[t].data + bytes, "address of chunk", before + c);
        const uint64_t count = c + 1 < chunks ? kChunkSize : numel - c * kChunkSize;
        check(static_cast<uint64_t>(chunk.count) == count, "elements of chunk", before + c);
      }
      before += chunks;
    }
    check(filled->chunks == before && filled->tensors == end - first, "chunks of table", filled->chunks);
    first = end;
  }
}

void strided() {
  TensorView view{address(0), 0, nullptr, Dtype::kBFloat16};
  const int64_t rows = (int64_t{1} << 31) + 7, columns = 3, pitch = 5;
  view.numel = rows * columns;
  view.dims = std::make_unique<const std::vector<Dim>>(std::vector<Dim>{{rows, pitch}, {columns, 1}});
  const StridedTable table(view);
  check(chunks_of(table) == (view.numel + kChunkSize - 1) / kChunkSize, "chunks", static_cast<uint64_t>(view.numel));
  for (const int64_t row : {int64_t{0}, int64_t{1}, (int64_t{1} << 31) - 1, int64_t{1} << 31, rows - 1})
    for (int64_t column = 0; column < columns; ++column)
      check(offset_of(table, row * columns + column) == row * pitch + column, "offset", static_cast<uint64_t>(row));
}

// Below 2^31 elements places are found by multiplications.
void small_strided() {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{kMost},
                                                                             {kMost, 1},
                                                                             {1, kMost},
                                                                             {3, kMost / 3},
                                                                             {46341, 46340},
                                                                             {7, 1, 641, 6700},
                                                                             {65536, 32767},
                                                                             {2, 3, 5}}) {
    TensorView view{address(0), 1, nullptr, Dtype::kFloat32};
    std::vector<Dim> dims(sizes.size());
    int64_t pitch = 1;
    for (size_t d = sizes.size(); d-- > 0; pitch = pitch * sizes[d] + 5) dims[d] = {sizes[d], pitch};
    for (const int64_t size : sizes) view.numel *= size;
    view.dims = std::make_unique<const std::vector<Dim>>(dims);
    const StridedTable table(view);
    for (int64_t k = 0; k < 4000; ++k) {
      int64_t i = k < 1000 ? k : k < 2000 ? view.numel - 1 - (k - 1000) : k * 7919 * 104729;
      i = (i % view.numel + view.numel) % view.numel;
      int64_t expected = 0, left = i;
      for (size_t d = dims.size(); d-- > 0; left /= sizes[d]) expected += left % sizes[d] * dims[d].stride;
      check(offset_of(table, i) == expected, "offset in a small tensor", static_cast<uint64_t>(i));
    }
  }
}

}  // namespace

int main() {
  const int64_t large = 5 * (int64_t{1} << 31) + 3;
  table<254>({{large, Dtype::kBFloat16},
              {1, Dtype::kFloat32},
              {(int64_t{1} << 32) * kChunkSize / 4, Dtype::kFloat64},
              {kChunkSize, Dtype::kFloat16},
              {kChunkSize + 1, Dtype::kFloat32},
              {kChunkSize - 1, Dtype::kFloat64},
              {large, Dtype::kFloat32}});
  std::vector<std::pair<int64_t, Dtype>> many;
  for (int64_t i = 0; i < 10000; ++i)
    many.push_back({1 + i * 37 % (3 * kChunkSize), static_cast<Dtype>(i % kNumDtypes)});
  table<2040>(many);
  table<254>(many);
  strided();
  small_strided();
}
