// The CPU kernels of torch.ops.fastclip, registered through torch's stable C ABI.
#include <utility>

#include "abi.h"
#include "boxed.h"
#include "clip.h"
#include "cpu/float_mode.h"
#include "cpu/half.h"
#include "cpu/loops.h"
#include "cpu/passes.h"
#include "export.h"
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
  const cpu::DefaultFloatMode mode;
  const TensorList tensors(stack[0]);
  leave(stack, new_scalar(cpu::norm_partial(tensors.views(), to_double(stack[1])), Dtype::kFloat64));
}

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const cpu::DefaultFloatMode mode;
  const ScaleArguments arguments(stack);
  cpu::scale(arguments.tensors.views(), read(arguments.clip_coef));
}

void clamp_(StableIValue* stack, uint64_t, uint64_t) {
  const ClampArguments arguments(stack);
  cpu::clamp(arguments.tensors.views(), arguments.min, arguments.max);
}

void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
  const cpu::DefaultFloatMode mode;
  const ClipArguments arguments(stack);
  const double total_norm = cpu::total_norm(arguments.grads.views(), arguments.norm_type);
  OwnedTensor result = new_scalar(total_norm, arguments.norm_dtype);
  cpu::scale(arguments.grads.views(), clip_coef(total_norm, arguments.max_norm));
  leave(stack, std::move(result));
}

}  // namespace

// Called once after loading: chooses the ISA and registers the kernels. Returns null, or what went wrong.
FASTCLIP_EXPORT const char* fastclip_cpu_init() {
  return error_of([] {
    cpu::loops();
    register_kernels("fastclip", "CPU", norm_partial, scale_, clamp_, clip_grad_norm_);
  });
}

// The name of the chosen ISA.
FASTCLIP_EXPORT const char* fastclip_cpu_isa() { return cpu::loops().isa; }
