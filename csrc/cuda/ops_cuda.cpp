// The CUDA kernels of torch.ops.fastclip, registered through torch's stable C ABI.
#include <stdexcept>
#include <utility>

#include "../abi.h"
#include "../boxed.h"
#include "../clip.h"
#include "../export.h"
#include "../plan.h"
#include "../tensor_list.h"
#include "passes.h"

namespace {

using namespace fastclip;
using namespace fastclip::boxed;

// Makes a device the current one, as launches need it, for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { FASTCLIP_CALL(aoti_torch_create_device_guard, index, &guard_); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// What a pass needs of torch for as long as it is queued: its device as the current one, that device's stream, and
// memory of torch's allocator, which given back is used again on the same stream only.
struct Call {
  const DeviceGuard guard;
  const OwnedTensor memory;
  double* const scratch;
  cuda::Queue queue;

  Call(Device device, int64_t scratch_size)
      : guard(device.index),
        memory(new_tensor(scratch_size, Dtype::kFloat64, device)),
        scratch(static_cast<double*>(data_of(memory))),
        queue{device.index, nullptr} {
    FASTCLIP_CALL(aoti_torch_get_current_cuda_stream, device.index, &queue.stream);
  }
};

// norm_partial(Tensor[] tensors, float norm_type) -> Tensor
void norm_partial(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const Call call(tensors.device(), cuda::scratch_size(tensors.views()));
  OwnedTensor result = new_tensor(kScalar, Dtype::kFloat64, tensors.device());
  cuda::norm_partial(tensors.views(), to_double(stack[1]), call.scratch, static_cast<double*>(data_of(result)),
                     call.queue);
  leave(stack, std::move(result));
}

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleArguments arguments(stack);
  const Call call(arguments.tensors.device(), 1);
  cuda::scale(arguments.tensors.views(), arguments.clip_coef, call.scratch, call.queue);
}

void clamp_(StableIValue* stack, uint64_t, uint64_t) {
  const ClampArguments arguments(stack);
  const Call call(arguments.tensors.device(), 1);
  cuda::clamp(arguments.tensors.views(), arguments.min, arguments.max, call.scratch, call.queue);
}

void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
  const ClipArguments arguments(stack);
  const TensorList& grads = arguments.grads;
  const Call call(grads.device(), cuda::scratch_size(grads.views()));
  OwnedTensor norm = new_tensor(kScalar, arguments.norm_dtype, grads.device());
  cuda::clip_grad_norm(grads.views(), arguments.max_norm, arguments.norm_type, call.scratch, data_of(norm),
                       arguments.norm_dtype, call.queue);
  leave(stack, std::move(norm));
}

}  // namespace

// The version of CUDA that the driver has to serve, as 1000 * major + 10 * minor.
FASTCLIP_EXPORT int fastclip_cuda_runtime_version() { return cuda::runtime_version(); }

// Called once after loading: registers the kernels for a namespace under a dispatch key. Returns null, or what went
// wrong.
FASTCLIP_EXPORT const char* fastclip_cuda_init(const char* ns, const char* key) {
  return error_of([&] { register_kernels(ns, key, norm_partial, scale_, clamp_, clip_grad_norm_); });
}

// Why a device cannot run the kernels; null where it can.
FASTCLIP_EXPORT const char* fastclip_cuda_unsupported(int device) {
  return error_of([&] {
    const DeviceGuard guard(device);
    if (const char* reason = cuda::unsupported()) throw std::runtime_error(reason);
  });
}

// The short way in, for a plan of tensors on a GPU: what the ops do. `norm` is a 0-dim tensor's memory, on that GPU.
FASTCLIP_EXPORT const char* fastclip_cuda_plan_clip_grad_norm(const Plan* plan, double max_norm, double norm_type,
                                                              void* norm, int dtype) {
  return error_of([&] {
    const Call call({aoti_torch_device_type_cuda(), plan->gpu}, cuda::scratch_size(plan->tensors));
    cuda::clip_grad_norm(plan->tensors, max_norm, norm_type, call.scratch, norm, static_cast<Dtype>(dtype), call.queue);
  });
}

FASTCLIP_EXPORT const char* fastclip_cuda_plan_clamp(const Plan* plan, double clip_value) {
  return error_of([&] {
    const Call call({aoti_torch_device_type_cuda(), plan->gpu}, 1);
    cuda::clamp(plan->tensors, -clip_value, clip_value, call.scratch, call.queue);
  });
}
