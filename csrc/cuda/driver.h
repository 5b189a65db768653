// The functions of CUDA's driver interface (12.1 and later) that fastclip calls, declared once: the driver is opened at
// run time, and the build needs no part of CUDA. CI compiles this file next to the real cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastclip::cuda {

#ifndef CUDA_VERSION
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;
using CUdeviceptr = unsigned long long;

enum CUresult : unsigned { CUDA_SUCCESS = 0 };
enum CUdevice_attribute : unsigned {
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO = 87,
};
enum CUstreamCaptureMode : unsigned { CU_STREAM_CAPTURE_MODE_RELAXED = 2 };
enum CUjit_option : unsigned {};
enum CUlibraryOption : unsigned {};
struct CUlaunchAttribute;

struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned numAttrs;
};
#endif

// FUNCTION(name, parameters), each by the name that it has in the library.
#define FASTCLIP_DRIVER_FUNCTIONS(FUNCTION)                                                                       \
  FUNCTION(cuDriverGetVersion, int* version)                                                                      \
  FUNCTION(cuGetErrorString, CUresult error, const char** text)                                                   \
  FUNCTION(cuInit, unsigned flags)                                                                                \
  FUNCTION(cuDeviceGet, CUdevice* device, int ordinal)                                                            \
  FUNCTION(cuDeviceGetAttribute, int* value, CUdevice_attribute attribute, CUdevice device)                       \
  FUNCTION(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)                                         \
  FUNCTION(cuCtxGetCurrent, CUcontext* context)                                                                   \
  FUNCTION(cuCtxPushCurrent_v2, CUcontext context)                                                                \
  FUNCTION(cuCtxPopCurrent_v2, CUcontext* context)                                                                \
  FUNCTION(cuThreadExchangeStreamCaptureMode, CUstreamCaptureMode* mode)                                          \
  FUNCTION(cuLibraryLoadData, CUlibrary* library, const void* code, CUjit_option* jit_options, void** jit_values, \
           unsigned jit_count, CUlibraryOption* options, void** values, unsigned count)                           \
  FUNCTION(cuLibraryUnload, CUlibrary library)                                                                    \
  FUNCTION(cuLibraryGetKernel, CUkernel* kernel, CUlibrary library, const char* name)                             \
  FUNCTION(cuKernelGetFunction, CUfunction* function, CUkernel kernel)                                            \
  FUNCTION(cuLaunchKernelEx, const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra)  \
  FUNCTION(cuMemsetD8Async, CUdeviceptr place, unsigned char byte, size_t bytes, CUstream stream)

struct Driver {
#define FASTCLIP_MEMBER(name, ...) CUresult (*name)(__VA_ARGS__);
  FASTCLIP_DRIVER_FUNCTIONS(FASTCLIP_MEMBER)
#undef FASTCLIP_MEMBER
};

}  // namespace fastclip::cuda
