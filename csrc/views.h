// Tensors as plain views (pointer, length, dtype, layout), and what must hold before one is read or written.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "clip.h"

namespace fastclip {

// A device by torch's codes.
struct Device {
  int32_t type;
  int32_t index;
};

struct TensorView {
  char* data;
  int64_t numel;
  // Null: numel elements in a row. Else the dimensions, outermost first, merged where their strides allow it.
  std::unique_ptr<const std::vector<Dim>> dims;
  Dtype dtype;
};

// The units of a tensor: so many runs of memory, each like the tensor's view, which is the first of them.
struct Units {
  int64_t count;
  std::vector<Dim> dims;  // of which the number of a unit is an index, outermost first

  // Where unit i begins, in elements.
  int64_t offset(int64_t i) const {
    int64_t offset = 0;
    for (size_t d = dims.size(); d-- > 1; i /= dims[d].size) offset += i % dims[d].size * dims[d].stride;
    return dims.empty() ? offset : offset + i * dims[0].stride;
  }
};

// A list of tensors in the memory of one device, or of their units, which the passes that treat each alone then take.
// Whoever makes it keeps that memory alive.
struct Tensors {
  std::vector<TensorView> views;
  std::vector<Units> units;  // none where each view is a whole tensor
  Device device{};
  int64_t count = 0;  // of tensors, or of all units
  int64_t bytes = 0;  // of all elements

  // Those of the tensor of view k; null where it is a whole one.
  const Units* units_of(size_t k) const { return units.empty() ? nullptr : &units[k]; }
  int64_t count_of(size_t k) const { return units.empty() ? 1 : units[k].count; }

  void add(TensorView view) {
    ++count;
    bytes += view.numel * element_size(view.dtype);
    views.push_back(std::move(view));
  }
  void add(TensorView first, Units all) {
    count += all.count;
    bytes += all.count * first.numel * element_size(first.dtype);
    views.push_back(std::move(first));
    units.push_back(std::move(all));
  }
};

// The view of a strided tensor; sizes and strides, in elements, are those of torch.
TensorView make_view(void* data, Dtype dtype, int64_t dim, const int64_t* sizes, const int64_t* strides);

// Whether a tensor has elements and no memory for them, as after its storage was resized to nothing.
bool lacks_memory(const TensorView& tensor);
// Whether two elements of one tensor may share memory, which then must not be written.
bool may_overlap_itself(const TensorView& tensor);
// Throws std::runtime_error, naming the tensor, where a finite bound overflows its dtype, as torch does.
void check_bound(const std::vector<TensorView>& tensors, double bound);

// torch.promote_types over all tensors.
Dtype promoted_dtype(const std::vector<TensorView>& tensors);

using TensorViews = std::vector<const TensorView*>;

// The tensors that have elements.
TensorViews nonempty(const std::vector<TensorView>& tensors);
// Whether powers of this order, of some tensor, may leave float64 (clip.h).
bool powers_may_leave_float64(const TensorViews& tensors, double norm_type);
// The tensors in rounds of which each can be written at once: torch writes a tensor that is listed twice, or that
// overlaps another, twice, in the order of the list.
std::vector<TensorViews> write_rounds(const TensorViews& tensors);
// The same for a list whose units are written: the places of its tensors, of those that have elements.
std::vector<std::vector<size_t>> write_rounds(const Tensors& tensors);

// Where unit i begins; a view of it, and of each.
inline char* unit_data(const TensorView& first, const Units& units, int64_t i) {
  return first.data + units.offset(i) * element_size(first.dtype);
}
TensorView unit_view(const TensorView& first, const Units& units, int64_t i);
std::vector<TensorView> each_unit(const Tensors& tensors);

}  // namespace fastclip
