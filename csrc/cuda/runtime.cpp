#include "runtime.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "driver.h"
#include "images.h"

namespace fastclip::cuda {
namespace {

#define FASTCLIP_COUNT(...) +1
constexpr int kNumKernels = 0
#define KERNEL FASTCLIP_COUNT
#define KERNEL_OF FASTCLIP_COUNT
#include "kernels.def"
#undef KERNEL
#undef KERNEL_OF
    ;

// Arguments of more than 4 KB came with 12.1, and what a compiler makes runs under every driver of its own and later
// major versions.
constexpr int kLeastDriver = 12010;

Driver driver;

std::string dotted(int version) { return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10); }

void check(CUresult error, const char* what) {
  if (error == CUDA_SUCCESS) return;
  const char* text = nullptr;
  if (driver.cuGetErrorString(error, &text) != CUDA_SUCCESS || text == nullptr) text = "unrecognized error code";
  throw std::runtime_error(std::string("fastclip: ") + what + ": " + text);
}
#define FASTCLIP_DRIVER_CALL(name, ...) check(driver.name(__VA_ARGS__), #name)

// The code for one architecture. A library belongs to no context: each loads what it launches of it.
struct Code {
  CUlibrary library = nullptr;
  std::array<CUkernel, kNumKernels> kernels{};
};

struct DeviceState {
  CUdevice handle = 0;
  CUcontext primary = nullptr;  // retained until the process ends, as the CUDA runtime does
  const Code* code = nullptr;   // null until all kernels are loaded
};

std::mutex mutex;
std::map<int, DeviceState> devices;
std::map<const Image*, Code> codes;

// Makes the primary context of a device current where the thread has none, as long as it lives. With one, torch's
// device guard has made it that of the device.
class Current {
 public:
  explicit Current(DeviceState& device) {
    CUcontext current = nullptr;
    FASTCLIP_DRIVER_CALL(cuCtxGetCurrent, &current);
    if (current != nullptr) return;
    if (device.primary == nullptr) FASTCLIP_DRIVER_CALL(cuDevicePrimaryCtxRetain, &device.primary, device.handle);
    FASTCLIP_DRIVER_CALL(cuCtxPushCurrent_v2, device.primary);
    is_pushed_ = true;
  }
  ~Current() {
    CUcontext popped = nullptr;
    if (is_pushed_) driver.cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  bool is_pushed_ = false;
};

// Lets this thread load code while a stream is being captured, which a capture in global mode would take for an error;
// torch allocates memory so.
class RelaxedCapture {
 public:
  RelaxedCapture() { FASTCLIP_DRIVER_CALL(cuThreadExchangeStreamCaptureMode, &mode_); }
  ~RelaxedCapture() { driver.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

int attribute(CUdevice device, CUdevice_attribute which) {
  int value = 0;
  FASTCLIP_DRIVER_CALL(cuDeviceGetAttribute, &value, which, device);
  return value;
}

// The best code for a compute capability: that of the same major version and the latest minor one up to it, else PTX.
const Image& image_for(int arch) {
  const Image* best = nullptr;
  for (const Image* image = kImages; image < kImages + kNumImages; ++image) {
    if (image->arch > arch || (!image->is_ptx && image->arch / 10 != arch / 10)) continue;
    if (best == nullptr || best->is_ptx > image->is_ptx || (best->is_ptx == image->is_ptx && best->arch < image->arch))
      best = image;
  }
  if (best != nullptr) return *best;
  std::string archs;
  for (const Image* image = kImages; image < kImages + kNumImages; ++image)
    archs += (archs.empty() ? "" : ", ") + std::to_string(image->arch / 10) + '.' + std::to_string(image->arch % 10) +
             (image->is_ptx ? " and later" : "");
  throw std::runtime_error("fastclip: no kernels for compute capability " + std::to_string(arch / 10) + '.' +
                           std::to_string(arch % 10) + ", only for " + archs);
}

// With the mutex. What is loaded in part is given back.
const Code& code_of(const Image& image) {
  if (const auto known = codes.find(&image); known != codes.end()) return known->second;
  Code code;
  FASTCLIP_DRIVER_CALL(cuLibraryLoadData, &code.library, image.code, nullptr, nullptr, 0, nullptr, nullptr, 0);
  try {
    for (int i = 0; i < kNumKernels; ++i)
      FASTCLIP_DRIVER_CALL(cuLibraryGetKernel, &code.kernels[i], code.library, kKernelNames[i]);
    return codes.emplace(&image, code).first->second;
  } catch (...) {
    driver.cuLibraryUnload(code.library);
    throw;
  }
}

// The device with its kernels loaded; its reference stays good.
DeviceState& loaded(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceState& device = devices[index];
  if (device.code != nullptr) return device;
  FASTCLIP_DRIVER_CALL(cuInit, 0);
  FASTCLIP_DRIVER_CALL(cuDeviceGet, &device.handle, index);
  const int major = attribute(device.handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  const int minor = attribute(device.handle, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  const Image& image = image_for(10 * major + minor);
  const Current current(device);
  const RelaxedCapture relaxed;
  const Code& code = code_of(image);
  // With CUDA_MODULE_LOADING=LAZY, the default since 12.2, a library loads nothing: asking for its functions does, into
  // the current context. Another context of the device loads a kernel when it first launches it.
  for (const CUkernel kernel : code.kernels) {
    CUfunction function = nullptr;
    FASTCLIP_DRIVER_CALL(cuKernelGetFunction, &function, kernel);
  }
  device.code = &code;
  return device;
}

}  // namespace

void open_driver(const char* name) {
  void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(std::string("no NVIDIA driver (") + name + ')');
  Driver opened{};
  int version = 0;
  opened.cuDriverGetVersion = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (opened.cuDriverGetVersion == nullptr || opened.cuDriverGetVersion(&version) != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + " does not tell its version");
  const int needed = kCompilerVersion / 1000 * 1000 > kLeastDriver ? kCompilerVersion / 1000 * 1000 : kLeastDriver;
  if (version < needed)
    throw std::runtime_error("the NVIDIA driver serves CUDA " + dotted(version) + ", and the kernels need " +
                             dotted(needed));
#define FASTCLIP_LOOK_UP(function, ...)                                                     \
  opened.function = reinterpret_cast<CUresult (*)(__VA_ARGS__)>(dlsym(library, #function)); \
  if (opened.function == nullptr) throw std::runtime_error(std::string(name) + " has no " #function);
  FASTCLIP_DRIVER_FUNCTIONS(FASTCLIP_LOOK_UP)
#undef FASTCLIP_LOOK_UP
  driver = opened;
}

void load_kernels(int device) { loaded(device); }

bool has_fast_float64(Queue queue) {
  return attribute(loaded(queue.device).handle, CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO) == 2;
}

void launch_kernel(const char* name, int kernel, unsigned blocks, unsigned threads, void** parameters, Queue queue) {
  DeviceState& device = loaded(queue.device);
  const Current current(device);
  const CUlaunchConfig config{blocks, 1, 1, threads, 1, 1, 0, static_cast<CUstream>(queue.stream), nullptr, 0};
  // The driver takes a CUkernel for a CUfunction, of the context that is current.
  const auto function = reinterpret_cast<CUfunction>(device.code->kernels[static_cast<size_t>(kernel)]);
  check(driver.cuLaunchKernelEx(&config, function, parameters, nullptr), name);
}

void set_zero(void* place, size_t bytes, Queue queue) {
  const Current current(loaded(queue.device));
  FASTCLIP_DRIVER_CALL(cuMemsetD8Async, reinterpret_cast<uintptr_t>(place), 0, bytes,
                       static_cast<CUstream>(queue.stream));
}

}  // namespace fastclip::cuda
