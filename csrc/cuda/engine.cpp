// The engine of CUDA devices: the launches of cuda/passes.h with what they need of torch, and the library's exported
// functions.
#include "../engine.h"

#include "../abi.h"
#include "../entry.h"
#include "passes.h"
#include "runtime.h"

namespace fastclip::cuda {
namespace {

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
// memory of torch's allocator where it asks for some, which given back is used again on the same stream only.
struct Call {
  const DeviceGuard guard;
  OwnedTensor memory;
  double* scratch = nullptr;
  Queue queue;

  explicit Call(Device device) : guard(device.index), queue{device.index, nullptr} {
    FASTCLIP_CALL(aoti_torch_get_current_cuda_stream, device.index, &queue.stream);
  }
  Call(Device device, int64_t scratch_size) : Call(device) {
    memory = new_tensor(scratch_size, Dtype::kFloat64, device);
    scratch = static_cast<double*>(data_of(memory));
  }
};

// Calls pass(views) with a view of each tensor, or unit.
template <class Pass>
void with_each(const Tensors& tensors, const Pass& pass) {
  if (tensors.units.empty()) return pass(tensors.views);
  pass(each_unit(tensors));
}

constexpr Engine kEngine = {
    "CUDA",
    [](const Tensors& tensors, double norm_type, Number partial) {
      const Call call(tensors.device, scratch_size(tensors.views));
      norm_partial(tensors.views, norm_type, call.scratch, static_cast<double*>(partial.data), call.queue);
    },
    [](const Tensors& tensors, double norm_type, Number norm) {
      const Call call(tensors.device, scratch_size(tensors.views));
      total_norm(tensors.views, norm_type, call.scratch, norm.data, norm.dtype, call.queue);
    },
    [](const Tensors& tensors, double norm_type, double* out) {
      with_each(tensors, [&](const std::vector<TensorView>& views) {
        const Call call(tensors.device, scratch_size(views));
        norms(views, norm_type, call.scratch, out, call.queue);
      });
    },
    [](const Tensors& tensors, double* table, Number partial) {
      const Call call(tensors.device, 4 * scratch_size(tensors.views));
      stats(tensors.views, call.scratch, table, partial, call.queue);
    },
    [](const Tensors& tensors, Number coef, bool zero) {
      const Call call(tensors.device);
      scale(tensors.views, coef, zero, call.queue);
    },
    [](const Tensors& tensors, const double* coefs) {
      with_each(tensors, [&](const std::vector<TensorView>& views) {
        const Call call(tensors.device);
        scale_each(views, coefs, call.queue);
      });
    },
    [](const Tensors& tensors) {
      const Call call(tensors.device);
      sanitize(tensors.views, call.queue);
    },
    [](const Tensors& tensors, double max_norm, Number norm) {
      const Call call(tensors.device);
      clip_with_norm(tensors.views, max_norm, norm, call.queue);
    },
    [](const Tensors& tensors, double low, double high) {
      const Call call(tensors.device);
      clamp(tensors.views, low, high, call.queue);
    },
    [](const Tensors& tensors, const Clip& clip, Number norm) {
      const Call call(tensors.device, scratch_size(tensors.views));
      clip_grad_norm(tensors.views, clip, call.scratch, norm, call.queue);
    },
};

}  // namespace
}  // namespace fastclip::cuda

using namespace fastclip;

// Called first: opens the driver's library, and starts nothing. Returns null, or why it cannot be used.
FASTCLIP_EXPORT const char* fastclip_cuda_open_driver(const char* name) {
  return error_of([&] { cuda::open_driver(name); });
}

// Called once after that: registers the kernels for a namespace under a dispatch key. Returns null, or what went wrong.
FASTCLIP_EXPORT const char* fastclip_cuda_init(const char* ns, const char* key) {
  return error_of([&] { Ops<cuda::kEngine>::enroll(ns, key); });
}

// Loads the kernels for a device. Returns null, or why it cannot run them.
FASTCLIP_EXPORT const char* fastclip_cuda_unsupported(int device) {
  return error_of([&] {
    const cuda::DeviceGuard guard(device);
    cuda::load_kernels(device);
  });
}

// With the GIL. The engine's builtins by name, or null and a Python error.
FASTCLIP_EXPORT PyObject* fastclip_cuda_functions(const dlpack::Exchange* exchange) {
  dlpack::exchange = exchange;
  return python::given([] { return Builtins<cuda::kEngine>::all(); });
}
