// The CUDA kernels of torch.ops.fastclip, registered through torch's stable C ABI.
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "../abi.h"
#include "../boxed.h"
#include "../clip.h"
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

cuda::Queue current_queue(Device device) {
  cuda::Queue queue{device.index, nullptr};
  FASTCLIP_CALL(aoti_torch_get_current_cuda_stream, device.index, &queue.stream);
  return queue;
}

// Memory of torch's allocator: given back when the call returns, it is used again on the same stream only.
struct Scratch {
  OwnedTensor tensor;
  double* data;

  Scratch(Device device, int64_t size)
      : tensor(new_tensor(size, Dtype::kFloat64, device)), data(static_cast<double*>(data_of(tensor))) {}
};

// norm_partial(Tensor[] tensors, float norm_type) -> Tensor
void norm_partial(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  const DeviceGuard guard(tensors.device().index);
  const Scratch scratch(tensors.device(), cuda::scratch_size(tensors.views()));
  OwnedTensor result = new_tensor(kScalar, Dtype::kFloat64, tensors.device());
  cuda::norm_partial(tensors.views(), to_double(stack[1]), scratch.data, static_cast<double*>(data_of(result)),
                     current_queue(tensors.device()));
  leave(stack, std::move(result));
}

// scale_(Tensor(a!)[] tensors, Tensor clip_coef) -> ()
void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const OwnedTensor clip_coef = to_tensor(stack[1]);
  const TensorList tensors(stack[0]);
  check_writable(tensors.views());
  const Scalar coef = view_scalar(clip_coef, tensors.device(), "clip_coef");
  const DeviceGuard guard(tensors.device().index);
  const Scratch scratch(tensors.device(), 1);
  cuda::scale(tensors.views(), coef, scratch.data, current_queue(tensors.device()));
}

// clamp_(Tensor(a!)[] tensors, float min, float max) -> ()
void clamp_(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList tensors(stack[0]);
  check_writable(tensors.views());
  const double min = to_double(stack[1]), max = to_double(stack[2]);
  check_bound(tensors.views(), min);
  check_bound(tensors.views(), max);
  const DeviceGuard guard(tensors.device().index);
  const Scratch scratch(tensors.device(), 1);
  cuda::clamp(tensors.views(), min, max, scratch.data, current_queue(tensors.device()));
}

// clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, *, ScalarType? dtype=None) -> Tensor
void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
  const double max_norm = to_double(stack[1]), norm_type = to_double(stack[2]);
  const std::unique_ptr<StableIValue> dtype = to_optional(stack[3]);
  const TensorList grads(stack[0]);
  const Dtype norm_dtype = dtype != nullptr ? to_dtype(*dtype) : promoted_dtype(grads.views());
  check_writable(grads.views());
  const DeviceGuard guard(grads.device().index);
  const Scratch scratch(grads.device(), cuda::scratch_size(grads.views()));
  OwnedTensor norm = new_tensor(kScalar, norm_dtype, grads.device());
  cuda::clip_grad_norm(grads.views(), max_norm, norm_type, scratch.data, data_of(norm), norm_dtype,
                       current_queue(grads.device()));
  leave(stack, std::move(norm));
}

// The text of what went wrong, for whoever cannot catch an exception; null where nothing did.
template <class Body>
const char* error_of(const Body& body) {
  static thread_local std::string error;
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

#define FASTCLIP_EXPORT extern "C" __attribute__((visibility("default")))

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
    const Device device{aoti_torch_device_type_cuda(), plan->gpu};
    const DeviceGuard guard(device.index);
    const Scratch scratch(device, cuda::scratch_size(plan->tensors));
    cuda::clip_grad_norm(plan->tensors, max_norm, norm_type, scratch.data, norm, static_cast<Dtype>(dtype),
                         current_queue(device));
  });
}

FASTCLIP_EXPORT const char* fastclip_cuda_plan_clamp(const Plan* plan, double clip_value) {
  return error_of([&] {
    const Device device{aoti_torch_device_type_cuda(), plan->gpu};
    const DeviceGuard guard(device.index);
    const Scratch scratch(device, 1);
    cuda::clamp(plan->tensors, -clip_value, clip_value, scratch.data, current_queue(device));
  });
}
