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

// A list of tensors in the memory of one device. Whoever makes it keeps that memory alive.
struct Tensors {
  std::vector<TensorView> views;
  Device device{};
  int64_t bytes = 0;  // of all elements

  void add(TensorView view) {
    bytes += view.numel * element_size(view.dtype);
    views.push_back(std::move(view));
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

}  // namespace fastclip
