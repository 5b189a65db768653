// Tensors as plain views (pointer, length, dtype, layout), and the argument `Tensor[] tensors` of a boxed kernel read
// into them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "abi.h"
#include "clip.h"

namespace fastclip {

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// Throws std::runtime_error where a function of torch's C ABI failed.
void check_torch(AOTITorchError error, const char* function);
#define FASTCLIP_CALL(function, ...) ::fastclip::check_torch(function(__VA_ARGS__), #function)

// A device by torch's codes.
struct Device {
  int32_t type;
  int32_t index;
};

// One dimension of a tensor that is not one dense run of memory; strides in elements.
struct Dim {
  int64_t size;
  int64_t stride;
};

struct TensorView {
  char* data;
  int64_t numel;
  // Null: numel elements in a row. Else the dimensions, outermost first, merged where their strides allow it.
  std::unique_ptr<const std::vector<Dim>> dims;
  Dtype dtype;
};

// Throws std::runtime_error, naming the tensor, where two elements of one tensor may share memory.
void check_writable(const std::vector<TensorView>& tensors);
// Throws std::runtime_error where a finite bound overflows the dtype of a tensor, as torch does.
void check_bound(const std::vector<TensorView>& tensors, double bound);
// torch.promote_types over all tensors.
Dtype promoted_dtype(const std::vector<TensorView>& tensors);
// The view of a strided tensor; sizes and strides, in elements, are those of torch.
TensorView make_view(void* data, Dtype dtype, int64_t dim, const int64_t* sizes, const int64_t* strides);

using TensorViews = std::vector<const TensorView*>;

// The tensors that have elements.
TensorViews nonempty(const std::vector<TensorView>& tensors);
// Whether powers of this order, of some tensor, may leave float64 (clip.h).
bool powers_may_leave_float64(const TensorViews& tensors, double norm_type);
// The tensors in rounds of which each can be written at once: torch writes a tensor that is listed twice, or that
// overlaps another, twice, in the order of the list.
std::vector<TensorViews> write_rounds(const TensorViews& tensors);

class TensorList {
 public:
  // Takes over the list. Throws std::runtime_error, naming the tensor, for a dtype that has no kernel and for a device
  // that is not that of the first tensor.
  explicit TensorList(StableIValue list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  const std::vector<TensorView>& views() const { return views_; }
  Device device() const { return device_; }

 private:
  StableListHandle list_;  // keeps the memory of the views alive
  std::vector<TensorView> views_;
  Device device_{};
};

// A new tensor of `size` elements in one dimension, or a 0-dim one for kScalar, uninitialised.
constexpr int64_t kScalar = -1;
OwnedTensor new_tensor(int64_t size, Dtype dtype, Device device);
// The memory of a tensor.
void* data_of(const OwnedTensor& tensor);
// The number of a 0-dim floating-point tensor. Throws std::runtime_error, naming the argument, where the tensor is
// none, or not on the device.
struct Scalar {
  void* data;
  Dtype dtype;
};
Scalar view_scalar(const OwnedTensor& tensor, Device device, const char* argument);
// Reads the code of a dtype argument. Throws std::runtime_error for a dtype that has no kernel.
Dtype to_dtype(StableIValue code);

}  // namespace fastclip
