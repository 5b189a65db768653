// The CPU kernels of torch.ops.fastclip (schemas: fastclip/_ops.py), registered through torch's stable C ABI.
// A boxed kernel finds its arguments on the stack, owns them, and leaves its result in stack[0].
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "abi.h"
#include "clip.h"
#include "cpu/loops.h"
#include "cpu/passes.h"
#include "tensor_list.h"

namespace {

using namespace fastclip;

double to_double(StableIValue value) {
  double out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

OwnedTensor to_tensor(StableIValue value) {
  AtenTensorHandle handle;
  std::memcpy(&handle, &value, sizeof(handle));
  return OwnedTensor(handle);
}

void leave(StableIValue* stack, OwnedTensor result) {
  const AtenTensorHandle handle = result.release();
  stack[0] = 0;
  std::memcpy(stack, &handle, sizeof(handle));
}

// norm_partial(Tensor[] tensors, float norm_type) -> Tensor
void norm_partial(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  leave(stack, new_scalar(cpu::norm_partial(tensors.views(), to_double(stack[1])), Dtype::kFloat64));
}

// scale_(Tensor(a!)[] tensors, Tensor clip_coef) -> ()
void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const OwnedTensor clip_coef = to_tensor(stack[1]);
  const TensorList tensors(stack[0]);
  check_writable(tensors.views());
  cpu::scale(tensors.views(), read_scalar(clip_coef, "clip_coef"));
}

// clamp_(Tensor(a!)[] tensors, float min, float max) -> ()
void clamp_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  check_writable(tensors.views());
  const double min = to_double(stack[1]), max = to_double(stack[2]);
  cpu::check_bound(tensors.views(), min);
  cpu::check_bound(tensors.views(), max);
  cpu::clamp(tensors.views(), min, max);
}

// clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, *, ScalarType? dtype=None) -> Tensor
void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
  const double max_norm = to_double(stack[1]), norm_type = to_double(stack[2]);
  const std::unique_ptr<StableIValue> dtype(reinterpret_cast<StableIValue*>(stack[3]));
  const TensorList grads(stack[0]);
  const Dtype norm_dtype = dtype != nullptr ? to_dtype(*dtype) : promoted_dtype(grads.views());
  check_writable(grads.views());
  const double total_norm = cpu::total_norm(grads.views(), norm_type);
  OwnedTensor result = new_scalar(total_norm, norm_dtype);
  cpu::scale(grads.views(), clip_coef(total_norm, max_norm));
  leave(stack, std::move(result));
}

void register_kernels() {
  TorchLibraryHandle library = nullptr;  // lives as long as the process
  if (aoti_torch_library_init_impl("fastclip", "CPU", __FILE__, __LINE__, &library) != 0 ||
      torch_library_impl(library, "norm_partial", norm_partial, kTorchAbi) != 0 ||
      torch_library_impl(library, "scale_", scale_, kTorchAbi) != 0 ||
      torch_library_impl(library, "clamp_", clamp_, kTorchAbi) != 0 ||
      torch_library_impl(library, "clip_grad_norm_", clip_grad_norm_, kTorchAbi) != 0)
    throw std::runtime_error("fastclip: registration with torch failed");
}

}  // namespace

#define FASTCLIP_EXPORT extern "C" __attribute__((visibility("default")))

// Called once after loading: chooses the ISA and registers the kernels. Returns null, or what went wrong.
FASTCLIP_EXPORT const char* fastclip_cpu_init() {
  static std::string error;
  try {
    cpu::loops();
    register_kernels();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// The name of the chosen ISA.
FASTCLIP_EXPORT const char* fastclip_cpu_isa() { return cpu::loops().isa; }
