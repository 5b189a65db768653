// torch's functions for CUDA; and what tests set and read, for tests/on_cpu.py.
#include "../../../csrc/abi.h"
#include "cuda_runtime.h"

#define HIDDEN extern "C" __attribute__((visibility("hidden")))
#define EXPORT extern "C" __attribute__((visibility("default")))

using cuda_on_cpu::device;
using cuda_on_cpu::simulator;

namespace {
std::vector<cuda_on_cpu::Launch> launches;
int device_guards = 0;
}  // namespace

HIDDEN int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
HIDDEN AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
HIDDEN AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++device_guards;
  return *guard = reinterpret_cast<DeviceGuardHandle>(&device_guards), 0;
}
HIDDEN AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return --device_guards, 0; }

EXPORT void cuda_on_cpu_configure(unsigned most_blocks, int float64_ratio, unsigned seed, int dropped_barrier) {
  device.most_blocks = most_blocks;
  device.float64_ratio = float64_ratio;
  simulator.seed(seed);
  simulator.dropped_barrier =
      dropped_barrier < 0 ? nullptr : simulator.barriers().at(static_cast<size_t>(dropped_barrier));
}

// The call of the runtime after so many others fails with this error; -1: none.
EXPORT void cuda_on_cpu_fail(int calls, int error) {
  device.calls_until_failure = calls;
  device.failure = static_cast<cudaError_t>(error);
}

// The call sites of __syncthreads so far, and the text of one.
EXPORT int cuda_on_cpu_barriers() { return static_cast<int>(simulator.barriers().size()); }
EXPORT const char* cuda_on_cpu_barrier(int index) {
  static std::string text;
  text = simulator.barriers().at(static_cast<size_t>(index))->text();
  return text.c_str();
}

// The launches since the last call; each can be read until the next.
EXPORT int cuda_on_cpu_launches() {
  launches = std::exchange(device.launches, {});
  return static_cast<int>(launches.size());
}
EXPORT const cuda_on_cpu::Launch* cuda_on_cpu_launch(int index) { return &launches[static_cast<size_t>(index)]; }

// What a call leaves behind for others: device guards that are not undone, an error that is not taken.
EXPORT int cuda_on_cpu_device_guards() { return device_guards; }
EXPORT int cuda_on_cpu_last_error() { return device.last_error; }
