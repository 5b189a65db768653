// What an op finds on its stack, through torch's stable C ABI. Schemas: fastclip/_ops.py.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "abi.h"
#include "clip.h"
#include "views.h"

namespace fastclip {

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

// Throws std::runtime_error where a function of torch's C ABI failed.
void check_torch(AOTITorchError error, const char* function);
#define FASTCLIP_CALL(function, ...) ::fastclip::check_torch(function(__VA_ARGS__), #function)

// A new tensor of `size` elements in one dimension, or a 0-dim one for kScalar, uninitialised.
constexpr int64_t kScalar = -1;
OwnedTensor new_tensor(int64_t size, Dtype dtype, Device device);
// A new contiguous one of two dimensions.
OwnedTensor new_table(int64_t rows, int64_t columns, Dtype dtype, Device device);
// The memory of a tensor.
void* data_of(const OwnedTensor& tensor);
// The number of a 0-dim floating-point tensor. Throws std::runtime_error, naming the argument, where the tensor is
// none, or not on the device.
Number view_number(const OwnedTensor& tensor, Device device, const char* argument);
// The memory of a contiguous float64 tensor of one dimension and `size` elements. Throws std::runtime_error, naming the
// argument, where the tensor is none, or not on the device.
const double* view_numbers(const OwnedTensor& tensor, int64_t size, Device device, const char* argument);
// Reads the code of a dtype argument. Throws std::runtime_error for a dtype that has no kernel.
Dtype to_dtype(StableIValue code);

// The argument `Tensor[] tensors`. The handles of the list are the callee's: nothing else keeps a temporary alive.
class TensorList {
 public:
  // Throws std::runtime_error, naming the tensor, for one that has no kernel or no memory, and for a device that is not
  // that of the first tensor.
  explicit TensorList(StableIValue list);

  // Throws std::runtime_error, naming the tensor, where two elements of one may share memory.
  void check_writable() const;
  const Tensors& tensors() const { return tensors_; }

 private:
  std::vector<OwnedTensor> owned_;
  Tensors tensors_;
};

template <class T>
T from_stack(StableIValue value) {
  T out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

inline OwnedTensor to_tensor(StableIValue value) { return OwnedTensor(from_stack<AtenTensorHandle>(value)); }

// An optional argument is null or a number on the heap.
inline std::unique_ptr<StableIValue> to_optional(StableIValue value) {
  return std::unique_ptr<StableIValue>(reinterpret_cast<StableIValue*>(value));
}

// Null where the argument is None.
inline OwnedTensor to_optional_tensor(StableIValue value) {
  const std::unique_ptr<StableIValue> handle = to_optional(value);
  return handle == nullptr ? nullptr : to_tensor(*handle);
}

inline void leave(StableIValue* stack, OwnedTensor result) {
  const AtenTensorHandle handle = result.release();
  stack[0] = 0;
  std::memcpy(stack, &handle, sizeof(handle));
}

}  // namespace fastclip
