// The functions that torch has for CUDA, where the tensors of the CPU are those of the devices. Loaded before a library
// that calls them, or linked into it.
#include "../../../csrc/abi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
int device_guards = 0;
int32_t device_index = -1;
}  // namespace

EXPORT int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
EXPORT AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) { return *index = device_index, 0; }
EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** current) {
  return *current = reinterpret_cast<void*>(0x57), 0;  // which libcuda.cpp knows
}
EXPORT AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++device_guards;
  return *guard = reinterpret_cast<DeviceGuardHandle>(&device_guards), 0;
}
EXPORT AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return --device_guards, 0; }

// Which device all tensors are on.
EXPORT void cuda_on_cpu_put_tensors_on(int32_t index) { device_index = index; }
// Device guards that are not undone.
EXPORT int cuda_on_cpu_device_guards() { return device_guards; }
