// The CPU kernels of torch.ops.fastclip, registered through torch's stable C ABI.
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "abi.h"
#include "boxed.h"
#include "clip.h"
#include "cpu/half.h"
#include "cpu/loops.h"
#include "cpu/passes.h"
#include "tensor_list.h"

namespace {

using namespace fastclip;
using namespace fastclip::boxed;

OwnedTensor new_scalar(double value, Dtype dtype) {
  OwnedTensor tensor = new_tensor(kScalar, dtype, {aoti_torch_device_type_cpu(), 0});
  void* data = data_of(tensor);
  switch (dtype) {
    case Dtype::kFloat64:
      *static_cast<double*>(data) = value;
      break;
    case Dtype::kFloat32:
      *static_cast<float*>(data) = static_cast<float>(value);
      break;
    case Dtype::kBFloat16:
      cpu::from_float(static_cast<float>(value), static_cast<cpu::bfloat16*>(data));
      break;
    case Dtype::kFloat16:
      cpu::from_float(static_cast<float>(value), static_cast<cpu::float16*>(data));
      break;
  }
  return tensor;
}

double read(Scalar scalar) {
  switch (scalar.dtype) {
    case Dtype::kFloat64:
      return *static_cast<double*>(scalar.data);
    case Dtype::kFloat32:
      return *static_cast<float*>(scalar.data);
    case Dtype::kBFloat16:
      return cpu::to_float(*static_cast<cpu::bfloat16*>(scalar.data));
    case Dtype::kFloat16:
      return cpu::to_float(*static_cast<cpu::float16*>(scalar.data));
  }
  return 0.0;
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
  cpu::scale(tensors.views(), read(view_scalar(clip_coef, tensors.device(), "clip_coef")));
}

// clamp_(Tensor(a!)[] tensors, float min, float max) -> ()
void clamp_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  check_writable(tensors.views());
  const double min = to_double(stack[1]), max = to_double(stack[2]);
  check_bound(tensors.views(), min);
  check_bound(tensors.views(), max);
  cpu::clamp(tensors.views(), min, max);
}

// clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, *, ScalarType? dtype=None) -> Tensor
void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
  const double max_norm = to_double(stack[1]), norm_type = to_double(stack[2]);
  const std::unique_ptr<StableIValue> dtype = to_optional(stack[3]);
  const TensorList grads(stack[0]);
  const Dtype norm_dtype = dtype != nullptr ? to_dtype(*dtype) : promoted_dtype(grads.views());
  check_writable(grads.views());
  const double total_norm = cpu::total_norm(grads.views(), norm_type);
  OwnedTensor result = new_scalar(total_norm, norm_dtype);
  cpu::scale(grads.views(), clip_coef(total_norm, max_norm));
  leave(stack, std::move(result));
}

}  // namespace

#define FASTCLIP_EXPORT extern "C" __attribute__((visibility("default")))

// Called once after loading: chooses the ISA and registers the kernels. Returns null, or what went wrong.
FASTCLIP_EXPORT const char* fastclip_cpu_init() {
  static std::string error;
  try {
    cpu::loops();
    register_kernels("fastclip", "CPU", norm_partial, scale_, clamp_, clip_grad_norm_);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

// The name of the chosen ISA.
FASTCLIP_EXPORT const char* fastclip_cpu_isa() { return cpu::loops().isa; }
