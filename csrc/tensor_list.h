// The argument `Tensor[] tensors` of a boxed kernel, read once into plain views: pointer, length, dtype, layout.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "abi.h"
#include "clip.h"

namespace fastclip {

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

class TensorList {
 public:
  // Takes over the list. Throws std::runtime_error, naming the tensor, for a dtype that has no kernel.
  explicit TensorList(StableIValue list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  const std::vector<TensorView>& views() const { return views_; }
  Dtype promoted_dtype() const;
  // Throws std::runtime_error, naming the tensor, where two elements of one tensor may share memory.
  void check_writable() const;

 private:
  StableListHandle list_;  // keeps the memory of the views alive
  std::vector<TensorView> views_;
};

// A new 0-dim CPU tensor holding value, rounded once to dtype.
AtenTensorHandle new_scalar(double value, Dtype dtype);
// Reads a 0-dim floating-point CPU tensor and gives up the handle.
double take_scalar(StableIValue tensor, const char* argument);
// Reads the code of a dtype argument. Throws std::runtime_error for a dtype that has no kernel.
Dtype to_dtype(StableIValue code);

}  // namespace fastclip
