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
// torch.promote_types over all tensors.
Dtype promoted_dtype(const std::vector<TensorView>& tensors);
// The view of a strided tensor; sizes and strides, in elements, are those of torch.
TensorView make_view(void* data, Dtype dtype, int64_t dim, const int64_t* sizes, const int64_t* strides);

class TensorList {
 public:
  // Takes over the list. Throws std::runtime_error, naming the tensor, for a dtype that has no kernel.
  explicit TensorList(StableIValue list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  const std::vector<TensorView>& views() const { return views_; }

 private:
  StableListHandle list_;  // keeps the memory of the views alive
  std::vector<TensorView> views_;
};

// A new 0-dim CPU tensor.
OwnedTensor new_scalar(double value, Dtype dtype);
// Reads a 0-dim floating-point CPU tensor. Throws std::runtime_error, naming the argument, for any other.
double read_scalar(const OwnedTensor& tensor, const char* argument);
// Reads the code of a dtype argument. Throws std::runtime_error for a dtype that has no kernel.
Dtype to_dtype(StableIValue code);

}  // namespace fastclip
