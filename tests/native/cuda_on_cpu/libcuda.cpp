// A CUDA driver without a device: the functions of csrc/cuda/driver.h, whose kernels the CPU runs, with what a driver
// checks of their use; and what tests set and read, for tests/on_cpu.py. A stream does all at once.
#include <dlfcn.h>

#include <array>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../../../csrc/cuda/driver.h"
#include "cuda_runtime.h"

// dladdr tells the name of a kernel, as a compiler writes it, only of what is exported.
#pragma GCC visibility push(default)
#include "../../../csrc/cuda/kernels.cu"
#pragma GCC visibility pop

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Error : unsigned {
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kNotFound = 500,
  kLaunchFailure = 719,
  kStreamCaptureUnsupported = 900,
};
constexpr int kDevices = 4;
constexpr uintptr_t kStream = 0x57;   // of torch_cuda.cpp
constexpr size_t kMostBytes = 32764;  // of arguments

struct SimulatedKernel {
  size_t bytes;
  std::function<void(unsigned grid, unsigned block, void** parameters)> run;
};

struct Library {
  int arch;
  bool is_ptx;
  std::map<std::string, struct LoadedKernel> kernels;
};
struct LoadedKernel {
  const SimulatedKernel* kernel;
  Library* library;
};

struct Context {
  int device;
};

struct Launch {
  unsigned grid, block, argument_bytes;
};

struct State {
  int version = 12020;
  bool is_initialized = false;
  std::array<int, kDevices> arch = {90, 90, 90, 90};
  int float64_ratio = 2;
  unsigned most_blocks = 4;  // of a grid; the rest of it is not there, and kernels find it with what is
  std::array<Context, kDevices> primary = {{{0}, {1}, {2}, {3}}};
  std::array<int, kDevices> retained{};
  std::set<Library*> libraries;
  std::set<std::pair<const Context*, const LoadedKernel*>> in_contexts;
  std::vector<Launch> launches, read;
  int last_loaded = 0;
  // The launch or memset after so many others fails; or the named call. Below zero, or empty: none.
  int launches_until_failure = -1;
  std::string failing;
  CUresult failure = static_cast<CUresult>(kLaunchFailure);
  std::map<std::string, int> calls;
};
State state;
thread_local std::vector<Context*> contexts;
thread_local CUstreamCaptureMode capture_mode{};  // global
thread_local bool is_capturing = false;

CUresult error(Error code) { return static_cast<CUresult>(code); }

// Counts a call, and whether it is to fail.
CUresult begin(const char* name) {
  ++state.calls[name];
  if (state.failing == name) return state.failing.clear(), state.failure;
  if (!state.is_initialized && std::string(name) != "cuInit") return error(kNotInitialized);
  return CUDA_SUCCESS;
}
CUresult begin_in_stream(const char* name, CUstream stream) {
  if (const CUresult failed = begin(name)) return failed;
  if (state.launches_until_failure >= 0 && state.launches_until_failure-- == 0) return state.failure;
  if (contexts.empty()) return error(kInvalidContext);
  return reinterpret_cast<uintptr_t>(stream) == kStream ? CUDA_SUCCESS : error(kInvalidValue);
}
#define BEGIN(name) \
  if (const CUresult failed = begin(name)) return failed

template <class... P>
SimulatedKernel simulated(void (*kernel)(P...)) {
  return {cuda_on_cpu::bytes_of<P...>(), [kernel](unsigned grid, unsigned block, void** parameters) {
            size_t i = 0;
            // In braces the order is that of the parameters.
            std::tuple<P...> arguments{*static_cast<const std::remove_cv_t<P>*>(parameters[i++])...};
            cuda_on_cpu::run(grid, block, kernel, std::move(arguments));
          }};
}

// By the name in the source, and by the one that a compiler makes of it.
template <class... P>
void add(std::map<std::string, SimulatedKernel>& kernels, const char* name, void (*kernel)(P...)) {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(kernel), &info);
  kernels[name] = simulated(kernel);
  if (info.dli_sname != nullptr) kernels[info.dli_sname] = simulated(kernel);
}

const std::map<std::string, SimulatedKernel>& kernels() {
  static const auto all = [] {
    std::map<std::string, SimulatedKernel> all;
#define KERNEL(name) add(all, #name, &name);
#define KERNEL_OF(name, ...) add(all, #name "<" #__VA_ARGS__ ">", &name<__VA_ARGS__>);
#include "../../../csrc/cuda/kernels.def"
#undef KERNEL
#undef KERNEL_OF
    return all;
  }();
  return all;
}

// What the code is for: its name from images.cpp, an ELF file, or PTX.
bool read_code(const char* code, Library& library) {
  const std::string text(code, strnlen(code, 4096));
  const auto number_after = [&](const std::string& word) {
    return std::atoi(text.c_str() + text.find(word) + word.size());
  };
  if (text.compare(0, 4, "\177ELF") == 0) {
    uint32_t flags;
    std::memcpy(&flags, code + 48, sizeof(flags));
    // In the ABI of before CUDA 13: sm in the low byte.
    library.arch = static_cast<int>(flags & 0xff);
  } else if (text.compare(0, 3, "sm_") == 0) {
    library.arch = number_after("sm_");
  } else if (text.compare(0, 8, "compute_") == 0) {
    library.arch = number_after("compute_");
    library.is_ptx = true;
  } else if (text.find(".target sm_") != std::string::npos) {
    library.arch = number_after(".target sm_");
    library.is_ptx = true;
  } else {
    return false;
  }
  return true;
}

bool runs_on(const Library& library, int arch) {
  return library.arch <= arch && (library.is_ptx || library.arch / 10 == arch / 10);
}

}  // namespace

// The driver.

EXPORT CUresult cuDriverGetVersion(int* version) { return *version = state.version, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult code, const char** text) {
  static const std::map<unsigned, const char*> texts{
      {kInvalidValue, "invalid argument"},
      {kNotInitialized, "initialization error"},
      {kInvalidDevice, "invalid device ordinal"},
      {kInvalidContext, "invalid device context"},
      {kNoBinaryForGpu, "no kernel image is available for execution on the device"},
      {kNotFound, "named symbol not found"},
      {kLaunchFailure, "unspecified launch failure"},
      {kStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
  };
  const auto found = texts.find(code);
  *text = found == texts.end() ? nullptr : found->second;
  return *text == nullptr ? error(kInvalidValue) : CUDA_SUCCESS;
}
EXPORT CUresult cuInit(unsigned flags) {
  BEGIN("cuInit");
  state.is_initialized = true;
  return flags == 0 ? CUDA_SUCCESS : error(kInvalidValue);
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  BEGIN("cuDeviceGet");
  if (ordinal == -1) ordinal = 0;  // torch's index of the CPU
  if (ordinal < 0 || ordinal >= kDevices) return error(kInvalidDevice);
  return *device = 100 + ordinal, CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  BEGIN("cuDeviceGetAttribute");
  const int arch = state.arch.at(static_cast<size_t>(device - 100));
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? arch / 10
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? arch % 10
                                                                   : state.float64_ratio;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  BEGIN("cuDevicePrimaryCtxRetain");
  const size_t index = static_cast<size_t>(device - 100);
  ++state.retained.at(index);
  return *context = reinterpret_cast<CUcontext>(&state.primary[index]), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  BEGIN("cuCtxGetCurrent");
  return *context = reinterpret_cast<CUcontext>(contexts.empty() ? nullptr : contexts.back()), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  BEGIN("cuCtxPushCurrent_v2");
  return contexts.push_back(reinterpret_cast<Context*>(context)), CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (contexts.empty()) return error(kInvalidContext);
  *context = reinterpret_cast<CUcontext>(contexts.back());
  contexts.pop_back();
  return begin("cuCtxPopCurrent_v2");
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  BEGIN("cuThreadExchangeStreamCaptureMode");
  return std::swap(*mode, capture_mode), CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned jit_count,
                                  CUlibraryOption*, void**, unsigned count) {
  BEGIN("cuLibraryLoadData");
  if (is_capturing && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return error(kStreamCaptureUnsupported);
  auto loaded = std::make_unique<Library>();
  if (jit_count + count != 0 || !read_code(static_cast<const char*>(code), *loaded)) return error(kInvalidValue);
  state.last_loaded = loaded->arch + (loaded->is_ptx ? 1000 : 0);
  *library = reinterpret_cast<CUlibrary>(loaded.get());
  state.libraries.insert(loaded.release());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryUnload(CUlibrary library) {
  Library* const loaded = reinterpret_cast<Library*>(library);
  if (state.libraries.erase(loaded) == 0) return error(kInvalidValue);
  delete loaded;
  return begin("cuLibraryUnload");
}
EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  BEGIN("cuLibraryGetKernel");
  const auto found = kernels().find(name);
  if (found == kernels().end()) return error(kNotFound);
  Library& loaded = *reinterpret_cast<Library*>(library);
  LoadedKernel& entry = loaded.kernels[name] = {&found->second, &loaded};
  return *kernel = reinterpret_cast<CUkernel>(&entry), CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  BEGIN("cuKernelGetFunction");
  if (contexts.empty()) return error(kInvalidContext);
  if (is_capturing && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return error(kStreamCaptureUnsupported);
  const auto* loaded = reinterpret_cast<LoadedKernel*>(kernel);
  if (!runs_on(*loaded->library, state.arch.at(static_cast<size_t>(contexts.back()->device))))
    return error(kNoBinaryForGpu);
  state.in_contexts.insert({contexts.back(), loaded});
  return *function = reinterpret_cast<CUfunction>(kernel), CUDA_SUCCESS;
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr place, unsigned char byte, size_t bytes, CUstream stream) {
  if (const CUresult failed = begin_in_stream("cuMemsetD8Async", stream)) return failed;
  return std::memset(reinterpret_cast<void*>(place), byte, bytes), CUDA_SUCCESS;
}
// Returns when the kernel is done.
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  if (const CUresult failed = begin_in_stream("cuLaunchKernelEx", config->hStream)) return failed;
  const unsigned grid = config->gridDimX, block = config->blockDimX;
  const auto* loaded = reinterpret_cast<LoadedKernel*>(function);
  if (grid == 0 || grid > 0x7fffffff || block == 0 || block > cuda_on_cpu::kMostThreads || config->gridDimY != 1 ||
      config->gridDimZ != 1 || config->blockDimY != 1 || config->blockDimZ != 1 || config->sharedMemBytes != 0 ||
      config->numAttrs != 0 || extra != nullptr || loaded->kernel->bytes > kMostBytes)
    return error(kInvalidValue);
  // Loading it now would be too late for a capture.
  if (state.in_contexts.count({contexts.back(), loaded}) == 0) return error(kStreamCaptureUnsupported);
  state.launches.push_back({grid, block, static_cast<unsigned>(loaded->kernel->bytes)});
  loaded->kernel->run(std::min(grid, state.most_blocks), block, parameters);
  return CUDA_SUCCESS;
}

// The tests.

EXPORT void cuda_on_cpu_configure(unsigned most_blocks, int float64_ratio, unsigned seed, int dropped_barrier) {
  state.most_blocks = most_blocks;
  state.float64_ratio = float64_ratio;
  cuda_on_cpu::Simulator& simulator = cuda_on_cpu::simulator;
  simulator.seed(seed);
  simulator.dropped_barrier =
      dropped_barrier < 0 ? nullptr : simulator.barriers().at(static_cast<size_t>(dropped_barrier));
}
EXPORT void cuda_on_cpu_set_version(int version) { state.version = version; }
EXPORT void cuda_on_cpu_set_arch(int device, int arch) { state.arch.at(static_cast<size_t>(device)) = arch; }
EXPORT void cuda_on_cpu_set_capturing(bool capturing) { is_capturing = capturing; }
// The primary context of a device becomes that of this thread; -1: none is.
EXPORT void cuda_on_cpu_set_context(int device) {
  contexts.clear();
  if (device >= 0) contexts.push_back(&state.primary.at(static_cast<size_t>(device)));
}

// The launch or memset after so many others fails with this error; -1: none.
EXPORT void cuda_on_cpu_fail(int launches, int error) {
  state.launches_until_failure = launches;
  state.failure = static_cast<CUresult>(error);
}
// The next call of this function fails with this error.
EXPORT void cuda_on_cpu_fail_call(const char* name, int error) {
  state.failing = name;
  state.failure = static_cast<CUresult>(error);
}

// The call sites of __syncthreads so far, and the text of one.
EXPORT int cuda_on_cpu_barriers() { return static_cast<int>(cuda_on_cpu::simulator.barriers().size()); }
EXPORT const char* cuda_on_cpu_barrier(int index) {
  static std::string text;
  text = cuda_on_cpu::simulator.barriers().at(static_cast<size_t>(index))->text();
  return text.c_str();
}

// The launches since the last call; each can be read until the next.
EXPORT int cuda_on_cpu_launches() {
  state.read = std::exchange(state.launches, {});
  return static_cast<int>(state.read.size());
}
EXPORT const Launch* cuda_on_cpu_launch(int index) { return &state.read[static_cast<size_t>(index)]; }

// What was loaded last: the architecture of the code, plus 1,000 where it is PTX.
EXPORT int cuda_on_cpu_last_loaded() { return state.last_loaded; }
EXPORT int cuda_on_cpu_calls(const char* name) { return state.calls[name]; }
// What a call leaves behind: libraries, contexts of this thread, and whether it changed how the thread captures.
EXPORT int cuda_on_cpu_libraries() { return static_cast<int>(state.libraries.size()); }
EXPORT int cuda_on_cpu_contexts() { return static_cast<int>(contexts.size()) + (capture_mode == 0 ? 0 : 100); }
EXPORT int cuda_on_cpu_retained(int device) { return state.retained.at(static_cast<size_t>(device)); }
