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
