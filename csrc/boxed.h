// What the boxed kernels of every engine share. A boxed kernel finds its arguments on the stack, owns them, and leaves
// its result in stack[0]. Schemas: fastclip/_ops.py.
#pragma once

#include <cstring>
#include <memory>
#include <stdexcept>

#include "abi.h"
#include "tensor_list.h"

namespace fastclip::boxed {

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

inline double to_double(StableIValue value) {
  double out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

inline OwnedTensor to_tensor(StableIValue value) {
  AtenTensorHandle handle;
  std::memcpy(&handle, &value, sizeof(handle));
  return OwnedTensor(handle);
}

// An optional argument is null or a number on the heap.
inline std::unique_ptr<StableIValue> to_optional(StableIValue value) {
  return std::unique_ptr<StableIValue>(reinterpret_cast<StableIValue*>(value));
}

inline void leave(StableIValue* stack, OwnedTensor result) {
  const AtenTensorHandle handle = result.release();
  stack[0] = 0;
  std::memcpy(stack, &handle, sizeof(handle));
}

// The arguments of the ops that write, read and checked before anything is written.

// scale_(Tensor(a!)[] tensors, Tensor clip_coef) -> ()
struct ScaleArguments {
  const OwnedTensor coef_tensor;
  const TensorList tensors;
  Scalar clip_coef;

  explicit ScaleArguments(StableIValue* stack) : coef_tensor(to_tensor(stack[1])), tensors(stack[0]) {
    check_writable(tensors.views());
    clip_coef = view_scalar(coef_tensor, tensors.device(), "clip_coef");
  }
};

// clamp_(Tensor(a!)[] tensors, float min, float max) -> ()
struct ClampArguments {
  const TensorList tensors;
  const double min, max;

  explicit ClampArguments(StableIValue* stack) : tensors(stack[0]), min(to_double(stack[1])), max(to_double(stack[2])) {
    check_writable(tensors.views());
    check_bound(tensors.views(), min);
    check_bound(tensors.views(), max);
  }
};

// clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, *, ScalarType? dtype=None) -> Tensor
struct ClipArguments {
  const double max_norm, norm_type;
  const std::unique_ptr<StableIValue> dtype;
  const TensorList grads;
  const Dtype norm_dtype;

  explicit ClipArguments(StableIValue* stack)
      : max_norm(to_double(stack[1])),
        norm_type(to_double(stack[2])),
        dtype(to_optional(stack[3])),
        grads(stack[0]),
        norm_dtype(dtype != nullptr ? to_dtype(*dtype) : promoted_dtype(grads.views())) {
    check_writable(grads.views());
  }
};

// Registers the four ops of a namespace under a dispatch key, for as long as the process lives.
inline void register_kernels(const char* ns, const char* key, Kernel norm_partial, Kernel scale_, Kernel clamp_,
                             Kernel clip_grad_norm_) {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl(ns, key, __FILE__, __LINE__, &library) != 0 ||
      torch_library_impl(library, "norm_partial", norm_partial, kTorchAbi) != 0 ||
      torch_library_impl(library, "scale_", scale_, kTorchAbi) != 0 ||
      torch_library_impl(library, "clamp_", clamp_, kTorchAbi) != 0 ||
      torch_library_impl(library, "clip_grad_norm_", clip_grad_norm_, kTorchAbi) != 0)
    throw std::runtime_error("fastclip: registration with torch failed");
}

}  // namespace fastclip::boxed
