#include "views.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace fastclip {
namespace {

bool is_contiguous(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1;
  for (int64_t d = dim; d-- > 0; expected *= sizes[d])
    if (sizes[d] != 1 && strides[d] != expected) return false;
  return true;
}

// Sorted by stride, dimensions merge to a single run of stride 1 exactly when the memory is dense in some order.
std::unique_ptr<const std::vector<Dim>> merged_dims(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  if (is_contiguous(dim, sizes, strides)) return nullptr;
  std::vector<Dim> dims;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != 1) dims.push_back({sizes[d], strides[d]});
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  std::vector<Dim> merged;
  for (const Dim& inner : dims) {
    if (!merged.empty() && merged.back().stride == inner.stride * inner.size)
      merged.back() = {merged.back().size * inner.size, inner.stride};
    else
      merged.push_back(inner);
  }
  if (merged.size() == 1 && merged[0].stride == 1) return nullptr;
  return std::make_unique<const std::vector<Dim>>(std::move(merged));
}

// The memory of a tensor, from its first element to one past its last.
struct Span {
  const char *begin, *end;
};
Span span_of(const TensorView& tensor, const Units* units = nullptr) {
  const auto reach_of = [](const std::vector<Dim>& dims) {
    int64_t reach = 0;
    for (const Dim& dim : dims) reach += (dim.size - 1) * dim.stride;
    return reach;
  };
  int64_t reach = tensor.dims == nullptr ? tensor.numel : 1 + reach_of(*tensor.dims);
  if (units != nullptr) reach += reach_of(units->dims);
  return {tensor.data, tensor.data + reach * element_size(tensor.dtype)};
}

// For each span the round in which it can be written; the last of them all.
size_t number_rounds(const std::vector<Span>& spans, std::vector<size_t>* round) {
  struct Place {
    Span span;
    size_t index;
  };
  std::vector<Place> places;
  places.reserve(spans.size());
  for (size_t i = 0; i < spans.size(); ++i) places.push_back({spans[i], i});
  const auto before = [](const Place& a, const Place& b) { return a.span.begin < b.span.begin; };
  if (!std::is_sorted(places.begin(), places.end(), before)) std::sort(places.begin(), places.end(), before);
  // Spans that are connected go one after the other; the first of them, like all others, in the first round.
  round->assign(spans.size(), 0);
  std::vector<size_t> cluster;
  size_t last = 0;
  for (size_t i = 0; i < places.size();) {
    const char* end = places[i].span.end;
    cluster = {places[i].index};
    for (++i; i < places.size() && places[i].span.begin < end; ++i) {
      end = std::max(end, places[i].span.end);
      cluster.push_back(places[i].index);
    }
    if (cluster.size() == 1) continue;
    std::sort(cluster.begin(), cluster.end());
    for (size_t r = 0; r < cluster.size(); ++r) (*round)[cluster[r]] = r;
    last = std::max(last, cluster.size() - 1);
  }
  return last;
}

}  // namespace

TensorView make_view(void* data, Dtype dtype, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  TensorView view{static_cast<char*>(data), 1, nullptr, dtype};
  for (int64_t d = 0; d < dim; ++d) view.numel *= sizes[d];
  if (view.numel > 0) view.dims = merged_dims(dim, sizes, strides);
  return view;
}

bool lacks_memory(const TensorView& tensor) { return tensor.numel > 0 && tensor.data == nullptr; }

bool may_overlap_itself(const TensorView& tensor) {
  if (tensor.dims == nullptr) return false;
  int64_t reach = 1;  // one past the furthest element that the inner dimensions touch
  for (auto dim = tensor.dims->rbegin(); dim != tensor.dims->rend(); ++dim) {
    if (dim->stride < reach) return true;
    reach += (dim->size - 1) * dim->stride;
  }
  return false;
}

void check_bound(const std::vector<TensorView>& tensors, double bound) {
  static constexpr double kLargest[kNumDtypes] = {0x1.fffffep127, std::numeric_limits<double>::max(), 0x1.fep127,
                                                  65504.0};
  for (size_t i = 0; i < tensors.size(); ++i)
    if (std::isfinite(bound) && std::fabs(bound) > kLargest[static_cast<int>(tensors[i].dtype)])
      throw std::runtime_error("fastclip: tensors[" + std::to_string(i) +
                               "]: value cannot be converted to its dtype without overflow: " + std::to_string(bound));
}

Dtype promoted_dtype(const std::vector<TensorView>& tensors) {
  Dtype dtype = tensors.empty() ? Dtype::kFloat32 : tensors.front().dtype;
  for (const TensorView& view : tensors) dtype = promote(dtype, view.dtype);
  return dtype;
}

TensorViews nonempty(const std::vector<TensorView>& tensors) {
  TensorViews out;
  out.reserve(tensors.size());
  for (const TensorView& tensor : tensors)
    if (tensor.numel > 0) out.push_back(&tensor);
  return out;
}

bool powers_may_leave_float64(const TensorViews& tensors, double norm_type) {
  return norm_kind(norm_type) == NormKind::kPow &&
         std::any_of(tensors.begin(), tensors.end(), [norm_type](const TensorView* tensor) {
           return !powers_stay_in_float64(tensor->dtype, norm_type);
         });
}

std::vector<TensorViews> write_rounds(const TensorViews& tensors) {
  std::vector<Span> spans;
  spans.reserve(tensors.size());
  for (const TensorView* tensor : tensors) spans.push_back(span_of(*tensor));
  std::vector<size_t> round;
  std::vector<TensorViews> out(number_rounds(spans, &round) + 1);
  out[0].reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) out[round[i]].push_back(tensors[i]);
  return out;
}

std::vector<std::vector<size_t>> write_rounds(const Tensors& tensors) {
  std::vector<Span> spans;
  std::vector<size_t> places, round;
  for (size_t k = 0; k < tensors.views.size(); ++k) {
    if (tensors.views[k].numel == 0 || tensors.count_of(k) == 0) continue;
    spans.push_back(span_of(tensors.views[k], tensors.units_of(k)));
    places.push_back(k);
  }
  std::vector<std::vector<size_t>> out(number_rounds(spans, &round) + 1);
  out[0].reserve(places.size());
  for (size_t i = 0; i < places.size(); ++i) out[round[i]].push_back(places[i]);
  return out;
}

TensorView unit_view(const TensorView& first, const Units& units, int64_t i) {
  return {unit_data(first, units, i), first.numel, nullptr, first.dtype};
}

std::vector<TensorView> each_unit(const Tensors& tensors) {
  std::vector<TensorView> each;
  each.reserve(static_cast<size_t>(tensors.count));
  for (size_t k = 0; k < tensors.units.size(); ++k)
    for (int64_t i = 0; i < tensors.units[k].count; ++i)
      each.push_back(unit_view(tensors.views[k], tensors.units[k], i));
  return each;
}

}  // namespace fastclip
